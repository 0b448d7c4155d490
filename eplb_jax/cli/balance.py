"""`eplb-jax balance`: how balanced the GPUs are under a plan."""

from typing import Annotated

import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.table import Table
from typer import Option

from eplb_jax import formats
from eplb_jax.cli import inputs
from eplb_jax.cli.arguments import Json, Load, LoadFormat, MaybeGpus, Nodes
from eplb_jax.cli.files import STDOUT, check_writable, write_json
from eplb_jax.evaluation.engine_metrics import engine_metrics
from eplb_jax.evaluation.metrics import balance as balance_under
from eplb_jax.evaluation.metrics import balance_of, gpu_loads_in_order


def balance(
    load: Load,
    plan: Annotated[
        str | None,
        Option(metavar="PLAN", help="Plan file; default: the map in LOAD, or no balancer."),
    ] = None,
    num_gpus: MaybeGpus = None,
    num_nodes: Nodes = 1,
    top: Annotated[int, Option(help="Layers, GPUs and experts to list.")] = 5,
    format: LoadFormat = None,
    json_file: Json = None,
) -> None:
    """Print the balance of GPUs, the worst layers and GPUs, and the most loaded experts."""
    check_writable(json_file, (load, plan))
    recording = inputs.read_loads(load, format)
    loads, numbers, phy2log, name = recording.load, recording.layers, None, "no balancer"
    engines = None
    if plan is not None or recording.phy2log is not None:
        name = plan if plan is not None else load
        if plan is not None:
            found = inputs.read_plan(plan, num_gpus, num_nodes)
        else:
            # Its notes are those of the loads.
            in_place = formats.map_in_place(recording)._replace(notes=())
            found = inputs.with_topology(in_place, load, num_gpus, num_nodes)
        loads, phy2log, numbers = inputs.same_layers(recording, found, name)
        topology = inputs.topology_of(found)
        num_gpus, result = topology.num_gpus, balance_under(loads, phy2log, topology)
        engines = engine_metrics(loads, phy2log, topology)
    else:
        if num_gpus is None:
            raise ValueError("give --plan, or --gpus for the balance without a balancer")
        result = balance_of(jnp.asarray(gpu_loads_in_order(loads, num_gpus), jnp.float32))
    gpu_load = np.asarray(result.gpu_load, np.float64)  # [T, L, G]
    imbalance = np.asarray(result.imbalance).reshape(-1, len(numbers))  # [T, L]
    console = Console(highlight=False, stderr=json_file == STDOUT)
    windows = f", mean over {len(loads)} windows" if len(loads) > 1 else ""
    console.print(f"{name}: {len(numbers)} layers, {num_gpus} GPUs{windows}")
    console.print(
        f"imbalance (max / mean GPU load - 1) {imbalance.mean():.2%}; "
        f"balancedness (mean / max) {float(np.mean(result.mean_balancedness)):.4f}"
    )
    if engines is not None:
        console.print(
            f"balancedness as SGLang reports it {engines.sglang_balancedness.mean():.4f}, as vLLM "
            f"{engines.vllm_balancedness.mean():.4f}; imbalance as TensorRT-LLM "
            f"{engines.tensorrt_llm_imbalance.mean():.2%}"
        )
    by_layer = imbalance.mean(axis=0)
    gpu_load = gpu_load.reshape(len(imbalance), len(numbers), -1)
    most = np.eye(gpu_load.shape[-1])[gpu_load.argmax(axis=-1)]  # [T, L, G]
    most[gpu_load.max(axis=-1) == 0] = 0
    worst = Table("layer", "imbalance", "most loaded GPU", title="worst layers")
    for i in np.argsort(-by_layer, kind="stable")[:top]:
        worst.add_row(str(numbers[i]), f"{by_layer[i]:.2%}", str(most[:, i].sum(axis=0).argmax()))
    console.print(worst)
    often = most.mean(axis=(0, 1))
    gpus = Table("GPU", "most loaded in", title="GPUs that others wait for")
    for g in np.argsort(-often, kind="stable")[:top]:
        gpus.add_row(str(g), f"{often[g]:.1%} of layers and windows")
    console.print(gpus)
    tokens = loads.sum(axis=0, dtype=np.float64)
    share = tokens / np.maximum(tokens.sum(axis=1, keepdims=True), 1e-30)
    count = np.ones(share.shape, int)
    if phy2log is not None:
        count = np.stack([np.bincount(x[x >= 0], minlength=share.shape[1]) for x in phy2log])
    experts = Table("layer", "expert", "share of the layer", "replicas", title="hottest experts")
    hottest = []
    for flat in np.argsort(-share, axis=None, kind="stable")[:top]:
        i, e = np.unravel_index(flat, share.shape)
        experts.add_row(str(numbers[i]), str(e), f"{share[i, e]:.2%}", str(count[i, e]))
        hottest.append({"layer": numbers[i], "expert": int(e), "share": float(share[i, e])})
    console.print(experts)
    write_json(
        json_file,
        {
            "plan": name,
            "num_gpus": num_gpus,
            "layers": numbers,
            "balancedness": float(np.mean(result.mean_balancedness)),
            "imbalance": by_layer,
            "gpu_load": gpu_load.mean(axis=0),
            "most_loaded": often,
            "engines": None if engines is None else engines._asdict(),
            "hottest_experts": hottest,
        },
    )
