"""The page of a report: numbers as text, tables and pictures in one HTML file."""

import base64
import json
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jinja2 import Environment, PackageLoader, StrictUndefined

from eplb_jax.cli import drawings
from eplb_jax.cli.units import percent, seconds, size
from eplb_jax.evaluation.diagnosis import (
    DEEPSEEK,
    KEPT,
    LAST_WINDOW,
    MEMORY,
    NO_BALANCER,
    Diagnosis,
)
from eplb_jax.formats import PlanFile
from eplb_jax.formats.plans import to_json
from eplb_jax.planning.next_plan import TOLERANCE
from eplb_jax.transition.moves import OTHER_NODE, SAME_GPU, SAME_NODE, STAYS, STORAGE

_WORST, _FIRST = 8, 10
_ENOUGH = 0.8  # of the gain

WAYS = {
    NO_BALANCER: "experts in order, one replica each",
    KEPT: "never replaced",
    MEMORY: "planned from all windows so far, starting from the plan in place",
    LAST_WINDOW: "the same without memory: planned from the one window before",
    DEEPSEEK: "planned from the one window before, without regard to the plan in place",
}
"""What the replays do."""

REACHES = {
    STAYS: "stay as they are",
    SAME_GPU: "are copied inside the GPU",
    SAME_NODE: "come from another GPU of the node",
    OTHER_NODE: "come from another node",
    STORAGE: "come from storage",
}
"""Where the experts of slots come from."""

_FROM = {SAME_NODE: "From its node", OTHER_NODE: "From other nodes", STORAGE: "From storage"}


class Source(NamedTuple):
    """What the report is of, and how it was made.

    Attributes:
        trace: Name of the trace.
        plan: Name of the plan in place; None if there is none.
        layers: Number of every layer in the model; None: from 0.
        made: When and with what, one line for each.
    """

    trace: str
    plan: str | None
    layers: Sequence[int] | None
    made: Sequence[str]


def page(diagnosis: Diagnosis, source: Source) -> str:
    """The HTML of a report, complete in itself: no scripts, no other files, no network."""
    environment = Environment(
        loader=PackageLoader("eplb_jax.cli"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "percent": percent,
        "size": size,
        "seconds": seconds,
        "count": "{:,}".format,
        "windows": _windows,
    }
    d, layers = diagnosis, source.layers
    layers = range(d.shape[1]) if layers is None else layers
    load, new_load = (x.gpu_load.mean(axis=0) for x in (d.before, d.after))
    before, after = drawings.heat_maps(load, new_load, d.topology, layers)
    return environment.get_template("report.html").render(
        d=d,
        source=source,
        num_windows=d.shape[0],
        num_layers=d.shape[1],
        num_experts=d.shape[2],
        moved=int(d.moves.received.sum()),
        slots=d.shape[1] * d.topology.num_replicas,
        verdict=verdict(d),
        heat_before=before,
        heat_after=after,
        lines=drawings.lines(d.replays, d.window, d.seen, d.shape[0]),
        windows_of_point=drawings.windows_of_point(d.shape[0] - d.window),
        dashes=drawings.LINES,
        steps=drawings.steps(d.spares, d.topology.slots_per_gpu),
        worst=_worst_layers(d, layers, load),
        ways=_ways(d),
        hottest=[(layers[x.layer], x) for x in d.hottest],
        reaches=_reaches(d),
        gpus=_by_gpu(d),
        places=[_FROM[i] for i in _reached(d)],
        first=_first_layers(d, layers),
        enough=_layers_for(d, _ENOUGH),
        spares=(spares := _spares(d)),
        larger=_larger(spares),
        tolerance=TOLERANCE,
        plan_file=_plan_file(d, layers),
    )


def _plan_file(d: Diagnosis, layers: Sequence[int]) -> str:
    """The new plan and its moves as an address that holds the JSON file itself."""
    new, num_experts = np.asarray(d.new.phy2log), d.shape[2]
    content = to_json(PlanFile(new, tuple(layers), num_experts, d.topology))
    content |= {"previous": np.asarray(d.old.phy2log).tolist(), "source": d.moves.source.tolist()}
    text = json.dumps(content, separators=(",", ":"))
    return "data:application/json;base64," + base64.b64encode(text.encode()).decode()


def verdict(d: Diagnosis) -> tuple[str, str]:
    """What to do in some words, and why in a sentence."""
    moved = int(d.moves.received.sum())
    plans = f"imbalance is {percent(d.after.mean_imbalance)} with the new plan and " + (
        f"{percent(d.before.mean_imbalance)} with the plan in place"
        if d.given
        else f"{percent(d.before.mean_imbalance)} without a balancer"
    )
    judged = d.shape[0] - d.seen
    place = "Keep the plan in place" if d.given else "Leave the experts as they are"
    if moved == 0:
        return place, "the balancer proposes no moves: a new plan would hardly be better."
    if d.decision.action == "undecided":
        few = "one window says too little" if judged == 1 else f"{judged} windows do not agree"
        return f"{place} for now", f"{few} on whether a new plan is better; {plans}."
    if d.decision.action == "keep":
        why = "the time it saves is less than that of moving" if d.known else "it saves no time"
        return place, f"on windows that the new plan was not made from, {why}; {plans}."
    if d.known:
        return (
            "Move to the new plan",
            f"on windows that it was not made from, it saves more time than moving takes: {plans}.",
        )
    return (
        "The new plan is better",
        f"on windows that it was not made from, {plans}. "
        "Whether that is worth the moves depends on costs that were not given.",
    )


def _windows(first: int, end: int) -> str:
    r"""The windows from one number up to another.

    Example:
        >>> _windows(30, 40), _windows(3, 4)
        ('windows 30 to 39', 'window\xa03')
    """
    if end - first == 1:
        return f"window\N{NO-BREAK SPACE}{first}"
    return f"windows {first} to {end - 1}"


def _by_layer(d: Diagnosis) -> tuple[np.ndarray, np.ndarray]:
    """The imbalance of every layer with the old plan and the new one."""
    return d.before.imbalance.mean(axis=0), d.after.imbalance.mean(axis=0)


def _worst_layers(d: Diagnosis, layers: Sequence[int], gpu_load: np.ndarray) -> list[dict]:
    before, after = _by_layer(d)
    return [
        {
            "layer": layers[i],
            "before": before[i],
            "after": after[i],
            "gpu": int(gpu_load[i].argmax()),
        }
        for i in np.argsort(-before, kind="stable")[:_WORST]
    ]


def _ways(d: Diagnosis) -> list[dict]:
    rows = []
    for name, result in d.replays.items():
        busy = result.imbalance[result.load > 0]
        planned = result.moves.size > 0
        rows.append(
            {
                "name": name,
                "what": WAYS[name],
                "mean": result.mean_imbalance,
                "worst": float(busy.max(initial=0)),
                "moves": result.moves.sum(axis=1).mean() if planned else 0,
                "share": result.moves.mean() / d.topology.num_replicas if planned else 0,
            }
        )
    return rows


def _reaches(d: Diagnosis) -> list[dict]:
    count = d.moves.copies.sum(axis=0)
    return [
        {"what": text, "slots": int(count[i]), "share": count[i] / count.sum()}
        for i, text in REACHES.items()
        if count[i]
    ]


def _by_gpu(d: Diagnosis) -> dict[str, list[dict]]:
    """Moves by node and by GPU: slots filled from each place that is one, and experts sent."""
    num_gpus, sent = d.topology.num_gpus, d.moves.sent.sum(axis=0)
    filled = {
        reach: np.bincount(d.topology.gpu_of_slot, (d.moves.reach == reach).sum(axis=0), num_gpus)
        for reach in _reached(d)
    }

    def rows(unit: np.ndarray) -> list[dict]:
        return [
            {
                "name": int(i),
                "filled": [int(x[unit == i].sum()) for x in filled.values()],
                "received": int(sum(x[unit == i].sum() for x in filled.values())),
                "sent": int(sent[unit == i].sum()),
            }
            for i in np.unique(unit)
        ]

    return {"node": rows(d.topology.node_of_gpu), "GPU": rows(np.arange(num_gpus))}


def _reached(d: Diagnosis) -> list[int]:
    """The places, other than a GPU itself, that experts come from."""
    return [i for i in _FROM if (d.moves.reach == i).any()]


def _first_layers(d: Diagnosis, layers: Sequence[int]) -> list[dict]:
    """The layers with the largest gain per move, of those that move anything."""
    before, after = _by_layer(d)
    moved = d.moves.received.sum(axis=1)
    gain = d.decision.layer_gain
    total = gain.sum()
    return [
        {
            "layer": layers[i],
            "before": before[i],
            "after": after[i],
            "moved": int(moved[i]),
            "share": gain[i] / total if total > 0 else 0.0,
        }
        for i in d.decision.order
        if moved[i] and gain[i] > 0
    ][:_FIRST]


def _layers_for(d: Diagnosis, share: float) -> dict | None:
    """How many layers, in their order, bring that share of the gain, and of the moves."""
    gain = d.decision.layer_gain[d.decision.order]
    moved = d.moves.received.sum(axis=1)[d.decision.order]
    if gain.sum() <= 0 or not moved.sum():
        return None
    number = int(np.argmax(np.cumsum(gain) >= share * gain.sum())) + 1
    return {"share": share, "layers": number, "moves": moved[:number].sum() / moved.sum()}


def _spares(d: Diagnosis) -> list[dict]:
    now = d.topology.slots_per_gpu
    return [
        {
            "slots": x.slots_per_gpu,
            "replicas": x.slots_per_gpu * d.topology.num_gpus,
            "spare": x.slots_per_gpu * d.topology.num_gpus - d.shape[2],
            "memory": x.slots_per_gpu * d.shape[1],
            "more": x.slots_per_gpu / now - 1,
            "now": x.slots_per_gpu == now,
            "imbalance": x.imbalance,
        }
        for x in d.spares
    ]


def _larger(spares: list[dict]) -> dict | None:
    """The next larger number of slots, beside the one of today."""
    place = next(i for i, x in enumerate(spares) if x["now"])
    if place + 1 == len(spares):
        return None
    return spares[place + 1] | {"now": spares[place]["imbalance"]}
