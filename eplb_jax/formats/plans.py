"""The plan files of this project: JSON with the map, the topology, layer numbers and a hash."""

import hashlib
import json
from typing import Any

import numpy as np

from eplb_jax.formats.sources import Source
from eplb_jax.formats.types import Format, PlanFile
from eplb_jax.types import Topology

NAME = "eplb-jax"
VERSION = 1
"""Version of the format. A reader refuses later ones."""


def to_json(plan: PlanFile) -> dict[str, Any]:
    """The content of a plan file, for `json.dumps`.

    Raises:
        ValueError: The plan has no topology.
    """
    if plan.topology is None:
        raise ValueError("a plan file needs the topology; give the number of GPUs")
    topology = plan.topology
    content = {
        "format": NAME,
        "version": VERSION,
        "topology": {
            "num_gpus": topology.num_gpus,
            "slots": topology.slots,
            "num_nodes": topology.num_nodes,
            "num_groups": topology.num_groups,
            "nodes": topology.nodes,
        },
        "num_experts": plan.num_experts,
        "num_layers": plan.num_layers,
        "layers": list(plan.layers),
        "phy2log": plan.phy2log.tolist(),
    }
    return content | {"sha256": _hash(content)}


def _hash(content: dict[str, Any]) -> str:
    """SHA-256 of everything that says what the plan is."""
    named = {k: content[k] for k in ("topology", "num_experts", "layers", "phy2log")}
    return hashlib.sha256(json.dumps(named, sort_keys=True).encode()).hexdigest()


def _is_plan(source: Source) -> bool:
    return source.kind == "json" and bool(source.keys) and source.content.get("format") == NAME


def _read(source: Source) -> PlanFile:
    content = source.content
    if content["version"] != VERSION:
        raise ValueError(f"version {content['version']} is not known; this reads {VERSION}")
    if content["sha256"] != _hash(content):
        raise ValueError("its hash does not fit its map: the file was changed or cut off")
    topology = Topology(**content["topology"])
    phy2log = np.asarray(content["phy2log"])
    if phy2log.shape[1:] != (topology.num_replicas,):
        raise ValueError(f"a map of the shape {phy2log.shape} for {topology.num_replicas} slots")
    return PlanFile(
        phy2log, tuple(content["layers"]), content["num_experts"], topology, content["num_layers"]
    )


FORMATS = (
    Format(
        NAME,
        "a plan of this project, with topology and hash",
        _is_plan,
        read_plan=_read,
        write_plan=lambda plan: json.dumps(to_json(plan)).encode(),
    ),
)
