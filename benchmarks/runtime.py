"""The balance of every choice of replicas, the gain of shares, and the traffic of moving weights.

    pip install '.[cli]'
    python benchmarks/runtime.py                     # all three tables: two minutes
    python benchmarks/runtime.py routing --tokens FILE --prefix law_

Routing: token by token, over as many GPUs as the plan has, each with an equal part of the tokens.
The bundled tokens are 8192 of gpt-oss-20b in every third of its 24 layers, the ninth window of
`loads.example("gpt_oss_20b")`; source and licence are the same. FILE is a .npz file whose arrays
`PREFIXids` are [tokens, layers, k].
"""

import argparse
import statistics
import time
from functools import partial
from pathlib import Path
from typing import Any

import jax

if __name__ == "__main__":
    jax.config.update("jax_num_cpu_devices", 8)

import jax.numpy as jnp
import numpy as np
from cases import SHAPES, load_of, timed
from jax.sharding import NamedSharding, PartitionSpec
from next_window import measured
from rich.console import Console
from rich.table import Table

import eplb_jax
from eplb_jax import Topology, metrics, runtime
from eplb_jax.evaluation.metrics import gpu_loads_in_order
from eplb_jax.runtime import Choice
from eplb_jax.runtime.transport import route_of

TOKENS = Path(__file__).parent / "tokens.npz"
WINDOWS = 8


def percent(value: float | jax.Array) -> str:
    return f"{100 * float(value):.2f}"


def slots_of(
    ids: np.ndarray, plan: eplb_jax.Placement, topology: Topology
) -> dict[str, np.ndarray]:
    """The slots [layers, GPUs, tokens of a GPU, k] of every choice."""
    num_gpus = topology.num_gpus
    by_gpu = jnp.asarray(ids.reshape(num_gpus, -1, *ids.shape[1:]).transpose(2, 0, 1, 3), jnp.int32)
    load = jnp.stack([runtime.expert_counts(x, plan.logcnt.shape[1]) for x in by_gpu])
    gpu = jnp.arange(num_gpus)

    @partial(jax.jit, static_argnames=("choice", "shared"))
    def routed(ids, plan, given, gpus=None, *, choice: Choice = "round_robin", shared=None):
        def of_gpu(ids, gpu, layer, given):
            given = {"gpu": gpu, "axis_name": shared} | given
            return runtime.to_physical(ids, layer, choice, **given)

        over_gpus = jax.vmap(of_gpu, (0, None if gpus is None else 0, None, None), axis_name="gpu")
        return jax.vmap(over_gpus, (0, None, 0, 0))(ids, gpus, plan, given)

    shares = {"shares": runtime.split_load(load, plan, topology)}
    keys = jax.random.split(jax.random.key(0), len(by_gpu))
    nearest = runtime.nearest_replica(plan, topology)
    first = jax.vmap(lambda x, y: y[x, 0])(by_gpu, plan.log2phy)
    return {
        "the first replica": np.asarray(first),
        '"round_robin", all GPUs together': np.asarray(routed(by_gpu, plan, {}, shared="gpu")),
        '"round_robin", every GPU alone': np.asarray(routed(by_gpu, plan, {})),
        "the same, from its number on": np.asarray(routed(by_gpu, plan, {}, gpu)),
        '"token"': np.asarray(routed(by_gpu, plan, {}, choice="token")),
        '"random"': np.asarray(routed(by_gpu, plan, {"key": keys}, choice="random")),
        '"nearest"': np.asarray(routed(by_gpu, plan, {"table": nearest}, gpu, choice="nearest")),
        '"shares", all GPUs together': np.asarray(
            routed(by_gpu, plan, shares, choice="shares", shared="gpu")
        ),
        '"shares", every GPU alone': np.asarray(routed(by_gpu, plan, shares, choice="shares")),
    }


def counts(ids: np.ndarray, most: int) -> np.ndarray:
    """The count of every id, layer by layer."""
    return np.stack([np.bincount(x.ravel(), minlength=most) for x in ids])


def routing(console: Console, path: Path, prefix: str, num_slots: int, num_gpus: int) -> None:
    """Max / mean GPU load - 1 of routed tokens, and as the plan predicts it."""
    with np.load(path) as file:
        ids = np.concatenate([file[x] for x in file.files if x == f"{prefix}ids"])
    num_experts = int(ids.max()) + 1
    half = len(ids) // 2 // num_gpus * num_gpus
    halves = ids[:half], ids[half : 2 * half]
    loads = [counts(x.swapaxes(0, 1), num_experts) for x in halves]
    topology = Topology.of_replicas(num_slots, num_gpus)
    plan = eplb_jax.plan(loads[0], topology)
    table = Table(title=f"{path.name}: {half} tokens, {num_experts} in {num_slots} / {num_gpus}")
    for name in ("choice", "plan's own tokens, %", "next tokens, %", "on own GPU, %"):
        table.add_column(name, justify="left" if name == "choice" else "right")
    promised = [percent(metrics.balance(x, plan, topology).mean_imbalance) for x in loads]
    bare = [percent(imbalance_of(x, num_gpus)) for x in loads]
    table.add_row("no replicas, experts in order", *bare, "")
    table.add_row("predicted: equal shares", *promised, "", end_section=True)
    both = [slots_of(x, plan, topology) for x in halves]
    for name, slots in both[0].items():
        sent = [counts(x, num_slots) for x in (slots, both[1][name])]
        cells = [percent(imbalance_of(x, num_gpus)) for x in sent]
        home = slots // (num_slots // num_gpus) == np.arange(num_gpus)[:, None, None]
        table.add_row(name, *cells, f"{100 * home.mean():.0f}")
    console.print(table)


def imbalance_of(load: np.ndarray, num_gpus: int) -> jax.Array:
    """The imbalance of experts, or slots, on GPUs in order."""
    return metrics.balance_of(
        jnp.asarray(gpu_loads_in_order(load, num_gpus), jnp.float32)
    ).mean_imbalance


def costs(console: Console) -> None:
    """Time of a choice for the tokens of one GPU: 4096, 8 experts each of 256, in 288 slots."""
    load = load_of(SHAPES["v3"])
    plan = eplb_jax.plan(load, Topology(32, 9)).layer(0)
    chance = jnp.log(jnp.asarray(load[0] / load[0].sum()))
    noise = jax.random.gumbel(jax.random.key(0), (4096, 256))
    ids = jax.lax.top_k(chance + noise, 8)[1]
    table = Table(title="4096 tokens x 8 of 256 experts", min_width=34)
    table.add_column("choice")
    table.add_column("us", justify="right")
    nearest = runtime.nearest_replica(plan.phy2log, Topology(32, 9))
    shares = runtime.split_load(load[0], plan, Topology(32, 9))
    choices: dict[Choice, dict[str, Any]] = {
        "round_robin": {},
        "token": {},
        "random": {"key": jax.random.key(1)},
        "nearest": {"table": nearest, "gpu": 3},
        "shares": {"shares": shares},
    }
    route = jax.jit(runtime.to_physical, static_argnames="choice")
    calls = {x: partial(route, ids, plan, choice=x, **given) for x, given in choices.items()}
    calls["expert_counts"] = partial(jax.jit(runtime.expert_counts, static_argnums=1), ids, 256)
    for name, took in timed(calls, 30).items():
        table.add_row(name, f"{took.steady * 1e6:.0f}")
    console.print(table)


def splitting(console: Console) -> None:
    """The imbalance of the window after those of the plan, with equal shares and `split_load`."""
    table = Table(title="Imbalance of the next window, mean over layers and windows, %")
    for name in ("trace", "slots / GPUs", "equal shares", "split_load", "ratio"):
        table.add_column(name, justify="right")
    for name, shuffled, num_slots, num_gpus in [
        ("gpt_oss_20b", False, 40, 8),
        ("gpt_oss_20b", False, 48, 16),
        ("gpt_oss_20b_decode", False, 40, 8),
        ("deepseek_v2_lite", False, 72, 8),
        ("deepseek_v2_lite", True, 72, 8),
        ("deepseek_v2_lite", True, 96, 8),
        ("deepseek_v2_lite", True, 80, 16),
    ]:
        trace = measured(name, shuffled)
        topology = Topology.of_replicas(num_slots, num_gpus)
        equal, split = [], []
        for now in range(WINDOWS, len(trace)):
            past = trace[now - WINDOWS : now]
            plan = eplb_jax.plan(past, topology)
            shares = runtime.split_load(trace[now], plan, topology)
            equal.append(metrics.balance(trace[now], plan, topology).mean_imbalance)
            split.append(metrics.balance(trace[now], plan, topology, split=shares).mean_imbalance)
        ratio = f"{np.mean(split) / np.mean(equal):.2f}"
        title = name + (", shuffled" if shuffled else "")
        means = percent(float(np.mean(equal))), percent(float(np.mean(split)))
        table.add_row(title, f"{num_slots} / {num_gpus}", *means, ratio)
    console.print(table)
    load = load_of(SHAPES["v3"])
    plan = eplb_jax.plan(load, Topology(32, 9))
    calls = {x: partial(runtime.split_load, load, plan, Topology(32, 9), steps=x) for x in (32, 64)}
    for steps, took in timed({str(x): call for x, call in calls.items()}, 30).items():
        console.print(f"{steps} steps of 58 x 256 in 288 / 32: {took.steady * 1e3:.2f} ms")


def moving(console: Console) -> None:
    """The rows that `relocate` sends over eight devices, and those that have to move."""
    devices = jax.devices() if jax.device_count() >= 8 else jax.devices("cpu")
    kind = devices[0].platform
    mesh = jax.make_mesh((8,), ("expert",), devices=devices[:8])
    trace = eplb_jax.loads.example("gpt_oss_20b")
    table = Table(title=f"gpt-oss-20b, 24 layers, 40 slots, 8 devices ({kind}), rows of 1 MB")
    columns = ("new plan", "rows moved", "sent, two hops", "rounds a layer", "ms", "ms, ragged")
    for name in columns:
        table.add_column(name, justify="left" if name == columns[0] else "right")
    topology = Topology(8, 5)
    old = eplb_jax.plan(trace[:8], topology)
    everywhere = NamedSharding(mesh, PartitionSpec())
    rows = np.broadcast_to(np.arange(32, dtype=np.float32)[:, None], (24, 32, 1 << 18))
    move = jax.jit(partial(runtime.relocate, mesh=mesh), static_argnames="ragged", donate_argnums=0)
    route = jax.jit(jax.vmap(lambda x, y: route_of(x, y, 32, 8).rounds))
    for name, options in {
        "the same": {"previous": old, "max_moves": 0},
        "max_moves=4": {"previous": old, "max_moves": 4},
        "max_moves=10": {"previous": old, "max_moves": 10},
        "previous=": {"previous": old},
        "without previous": {},
    }.items():
        new = eplb_jax.plan(trace[8:16], topology, **options)
        received = int(eplb_jax.moves(old, new, topology).received.sum())
        sends, receives = (np.asarray(x) for x in route(old.phy2log, new.phy2log))
        plans = jax.device_put((old, new), everywhere)
        took = {}
        for ragged in (False,) if kind == "cpu" else (False, True):
            times = []
            for _ in range(4):
                weights = jax.block_until_ready(jnp.copy(runtime.to_slots(rows, old, mesh)))
                start = time.perf_counter()
                weights = jax.block_until_ready(move(weights, *plans, ragged=ragged).params)
                times.append(time.perf_counter() - start)
                assert (np.asarray(weights[..., 0]) == np.asarray(new.phy2log)).all()
            took[ragged] = f"{1e3 * statistics.median(times[1:]):.0f}"
        busiest = f"{sends.mean():.1f} + {receives.mean():.1f}"
        sent = (sends + receives).sum() * 8 * 7 / 8
        table.add_row(name, f"{received}", f"{sent:.0f}", busiest, took[False], took.get(True))
    console.print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("tables", nargs="*", default=["routing", "split", "moving"])
    parser.add_argument("--tokens", type=Path, default=TOKENS)
    parser.add_argument("--prefix", default="")
    parser.add_argument("--slots", type=int, default=40)
    parser.add_argument("--gpus", type=int, default=8)
    args = parser.parse_args()
    console = Console(width=110)
    if "routing" in args.tables:
        routing(console, args.tokens, args.prefix, args.slots, args.gpus)
        costs(console)
    if "split" in args.tables:
        splitting(console)
    if "moving" in args.tables:
        moving(console)


if __name__ == "__main__":
    main()
