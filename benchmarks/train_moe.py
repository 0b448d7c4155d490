"""A small mixture-of-experts transformer that is trained, counted, planned for and moved.

    pip install '.[cli]'
    python benchmarks/train_moe.py                       # a minute or two on two cores
    python benchmarks/train_moe.py --check --steps 24    # and once more without plans, compared
    python benchmarks/train_moe.py --trace trace.npz     # for `eplb-jax simulate`

Reads the standard library: documentation, code, tables of encodings; sequences go from one to the
next one after another. Eight devices: GPUs where there are several, else of the CPU. Every step
counts what the routers do; every 16 steps a plan is made from the last eight windows of two steps,
and weights and both moments of Adam move. "no balancer": the same tokens, experts in order, no
replicas. "beyond": the share of tokens over 1.25 times the mean, which a model of that
capacity would drop; this one drops none.
"""

import argparse
import itertools
import math
import sysconfig
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from pydoc_data.topics import topics
from statistics import mean, median
from typing import Any, NamedTuple, get_args

import jax
import jax.numpy as jnp
import model as moe
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Int, Int32, PyTree
from rich.console import Console
from rich.table import Table

import eplb_jax
from eplb_jax import Placement, runtime
from eplb_jax.evaluation.metrics import gpu_loads_in_order

WINDOWS, STEPS_PER_WINDOW, STEPS_PER_TEXT = 8, 2, 64
RATE, WARM_UP, DECAYS, CLIP, BALANCE, CAPACITY = 2e-3, 20, (0.9, 0.99), 1.0, 0.02, 1.25


class State(NamedTuple):
    """What a step hands to the next; trees of "shared" weights and of "experts" in slots."""

    params: PyTree[Array]
    first: PyTree[Array]
    second: PyTree[Array]
    steps: Int32[Array, ""]
    plan: Placement
    past: eplb_jax.History


class Run(NamedTuple):
    """What training left behind; "compilation" is every one from the first step on."""

    losses: Float[np.ndarray, " steps"]
    load: Int[np.ndarray, "steps L E"]
    gpu_load: Int[np.ndarray, "steps L G"]
    plans: list[Placement]
    seconds: dict[str, list[float]]
    state: State


def batches(size: int, context: int) -> Iterator[np.ndarray]:
    """Bytes, and the one after them, [size, context + 1]: all change texts, one after another."""
    library = Path(sysconfig.get_path("stdlib"))

    def read(pattern: str) -> bytes:
        return b"".join(x.read_bytes() for x in sorted(library.glob(pattern)))

    prose = "\n".join(topics[name] for name in sorted(topics)).encode()
    texts = prose, read("asyncio/*.py"), read("encodings/cp*.py")
    texts = [np.frombuffer(x, np.uint8) for x in texts]
    for step in itertools.count():
        batch = np.empty((size, context + 1), np.int32)
        for i in range(size):
            text = texts[(step + STEPS_PER_TEXT // 2 * i // size) // STEPS_PER_TEXT % len(texts)]
            start = (text.size * i // size + step * context) % (text.size - context)
            batch[i] = text[start : start + context + 1]
        yield batch


def train_step(
    state: State, tokens: Int32[Array, "B S+1"], *, model: moe.Model, mesh: Mesh
) -> tuple[State, Float[Array, ""], moe.Routed]:
    """One step of Adam, gradients clipped by the norm over experts; the loss and the routing."""

    def loss(params: PyTree[Array]) -> tuple[Array, tuple[Array, moe.Routed]]:
        key = jax.random.fold_in(jax.random.key(1), state.steps)
        logits, routed = moe.forward(
            params, tokens[:, :-1], state.plan, key, model=model, mesh=mesh
        )
        of_next = jnp.take_along_axis(jax.nn.log_softmax(logits), tokens[:, 1:, None], axis=-1)
        return BALANCE * routed.unevenness - jnp.mean(of_next), (-jnp.mean(of_next), routed)

    grads, (value, routed) = jax.grad(loss, has_aux=True)(state.params)
    grads["experts"] = runtime.sum_replicas(grads["experts"], state.plan, mesh, moe.AXIS)
    once = grads | {"experts": runtime.mask_replicas(grads["experts"], state.plan)}
    norm = jnp.sqrt(sum((jnp.sum(x * x) for x in jax.tree.leaves(once)), jnp.zeros(())))
    grads = jax.tree.map(lambda x: x * jnp.minimum(1.0, CLIP / (norm + 1e-6)), grads)

    t = (state.steps + 1).astype(jnp.float32)
    (a, b), rate = DECAYS, RATE * jnp.minimum(1.0, t / WARM_UP)
    first = jax.tree.map(lambda m, g: a * m + (1 - a) * g, state.first, grads)
    second = jax.tree.map(lambda v, g: b * v + (1 - b) * g * g, state.second, grads)
    params = jax.tree.map(
        lambda x, m, v: x - rate * m / (1 - a**t) / (jnp.sqrt(v / (1 - b**t)) + 1e-6),
        *(state.params, first, second),
    )
    past = eplb_jax.update_history(state.past, routed.load, STEPS_PER_WINDOW)
    return State(params, first, second, state.steps + 1, state.plan, past), value, routed


def planned(
    past: eplb_jax.History, plan: Placement, *, num_gpus: int, choice: moe.Choice
) -> Placement:
    """The next plan, for the way that replicas share tokens; every device makes the same."""
    topology = eplb_jax.Topology.of_replicas(plan.phy2log.shape[1], num_gpus)
    split = "flexible" if choice == "shares" else None
    return eplb_jax.plan(past, topology, previous=plan, split=split)


def moved(state: State, plan: Placement, *, mesh: Mesh) -> State:
    """Weights and moments where the plan wants them."""
    trees = state.params, state.first, state.second
    experts = [x["experts"] for x in trees]
    experts, plan = runtime.relocate(experts, state.plan, plan, mesh, moe.AXIS)
    params, first, second = (x | {"experts": y} for x, y in zip(trees, experts, strict=True))
    return State(params, first, second, state.steps, plan, state.past)


def train(
    model: moe.Model, mesh: Mesh, plan: Placement, *, steps: int, every: int | None = None
) -> Run:
    """Train from the same weights on the same text, with a new plan every so many steps."""
    at: Any = [NamedSharding(mesh, PartitionSpec(*x)) for x in ([], [moe.AXIS], [None, moe.AXIS])]
    everywhere, over, slots = at
    tree = {"shared": everywhere, "experts": slots}
    lies = State(tree, tree, tree, everywhere, everywhere, everywhere)
    params, plan = moe.initial(model), jax.device_get(plan)
    params["experts"] = runtime.to_slots(params["experts"], plan, mesh, moe.AXIS)
    first, second = (jax.tree.map(np.zeros_like, params) for _ in range(2))
    past = eplb_jax.init_history(model.layers, model.experts)
    state = State(params, first, second, jnp.zeros((), jnp.int32), plan, past)
    state = jax.device_put(state, lies)

    step = partial(train_step, model=model, mesh=mesh)
    make = partial(planned, num_gpus=mesh.size, choice=model.choice)
    functions = {
        "step": jax.jit(step, out_shardings=(lies, everywhere, everywhere), donate_argnums=0),
        "plan": jax.jit(make, out_shardings=everywhere),
        "move": jax.jit(partial(moved, mesh=mesh), out_shardings=lies, donate_argnums=0),
    }
    ready: dict[str, jax.stages.Compiled] = {}
    seconds: dict[str, list[float]] = {"compilation": []}

    def timed(name: str, call: Callable[[], Any]) -> Any:
        start = time.perf_counter()
        result = jax.block_until_ready(call())
        seconds.setdefault(name, []).append(time.perf_counter() - start)
        return result

    def run(name: str, *args: Any) -> Any:
        if name not in ready:
            ready[name] = timed(f"compile {name}", lambda: functions[name].lower(*args).compile())
        return timed(name, lambda: ready[name](*args))

    def listen(event: str, duration_secs: float, **kwargs: str | int) -> None:
        if event.endswith("backend_compile_duration"):
            seconds["compilation"].append(duration_secs)

    told, plans = [], [plan]
    jax.monitoring.register_event_duration_secs_listener(listen)
    for number, tokens in zip(range(1, steps + 1), batches(mesh.size, model.context), strict=False):
        state, loss, routed = run("step", state, jax.device_put(tokens, over))
        told.append(jax.device_get((loss, routed.load, routed.gpu_load)))
        if every and number % every == 0 and number < steps:
            new = run("plan", state.past, state.plan)
            state = run("move", state, new)
            plans.append(jax.device_get(new))
    jax.monitoring.unregister_event_duration_listener(listen)
    losses, load, gpu_load = map(np.stack, zip(*told, strict=True))
    return Run(losses, load, gpu_load, plans, seconds, state)


def table_of(run: Run, before: int, num_gpus: int) -> Table:
    """How balanced devices were in the steps before the first plan, and in those after it."""
    table = Table(title="tokens of a device, mean over layers and steps", title_justify="left")
    for header in ["steps", "", "balancedness", "least", "mean", "most", "beyond"]:
        table.add_column(header, justify="left" if not header else "right")
    alone, steps = gpu_loads_in_order(run.load, num_gpus), len(run.load)
    for first, last, name in (0, before, "plan for equal loads"), (before, steps, "plans"):
        for label, part in ("no balancer", alone[first:last]), (name, run.gpu_load[first:last]):
            if part.size:
                mean = part.mean(axis=-1, keepdims=True)
                least, most = part.min(axis=-1), part.max(axis=-1)
                beyond = np.maximum(part - CAPACITY * mean, 0).sum() / part.sum()
                balancedness = (mean[..., 0] / most).mean()
                shown = (f"{x.mean():.0f}" for x in (least, mean, most))
                row = f"{first + 1} - {last}", label, f"{balancedness:.3f}", *shown
                table.add_row(*row, f"{100 * beyond:.1f} %")
    return table


def report(run: Run, num_gpus: int) -> Iterator[str]:
    """What training came to and what it took."""
    ends = (run.losses[x].mean() / math.log(2) for x in (slice(16), slice(-16, None)))
    yield "bits a byte, first and last 16 steps: {:.2f}, {:.2f}".format(*ends)
    calls = [x for x in ("step", "plan", "move") if x in run.seconds]
    yield "ms, median: " + ", ".join(f"{x} {1e3 * median(run.seconds[x]):.0f}" for x in calls)
    compiled = ", ".join(f"{x} {run.seconds[f'compile {x}'][0]:.1f}" for x in calls)
    yield f"s to compile: {compiled}; compilations in all: {len(run.seconds['compilation'])}"
    if len(run.plans) > 1:
        rows = jax.tree.leaves([x["experts"] for x in run.state[:3]])
        size = sum(x.nbytes // math.prod(x.shape[:2]) for x in rows)
        topology = eplb_jax.Topology.of_replicas(run.plans[0].phy2log.shape[1], num_gpus)
        moves = [eplb_jax.moves(*x, topology) for x in itertools.pairwise(run.plans)]
        received = mean(int(x.traffic(size).received.sum()) for x in moves)
        fetched = f"{received / size:.0f} of {run.plans[0].phy2log.size} slots from other devices"
        yield f"plans: {len(moves)}; each moves {fetched}, {received / 2**20:.1f} MiB"


def compared(run: Run, other: Run, mesh: Mesh) -> Iterator[str]:
    """How far two runs are apart; float sums differ, and once a router turns on that, all does."""

    def logical(params: PyTree[Array], plan: Placement) -> PyTree[Array]:
        return params | {"experts": runtime.to_logical(params["experts"], plan, mesh, moe.AXIS)}

    alike = np.cumprod((run.load == other.load).all(axis=(1, 2))).sum()
    apart = abs(run.losses - other.losses)
    yield f"losses differ by {apart[:alike].max():.1e} in {alike} steps of equal routing"
    weights = (logical(x.state.params, x.state.plan) for x in (run, other))
    apart = jax.tree.map(lambda x, y: abs(x - y).max(), *weights)
    yield f"weights at the end differ by {max(jax.tree.leaves(apart)):.1e}"
    equal = moe.replicas_equal([x["experts"] for x in run.state[:3]], run.state.plan)
    yield f"replicas are {'equal, bit for bit' if equal else 'not equal'}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--steps", type=int, default=256)
    parser.add_argument("--every", type=int, default=16, help="steps from plan to plan")
    parser.add_argument("--slots", type=int, default=40, help="32: no replicas")
    parser.add_argument("--choice", choices=get_args(moe.Choice), default="round_robin")
    parser.add_argument("--check", action="store_true", help="train without plans too")
    parser.add_argument("--trace", type=Path, help="write the load of every window there, .npz")
    given = parser.parse_args()
    mesh, model = moe.mesh_of_devices(), moe.Model(choice=given.choice)
    equal_load = np.ones((model.layers, model.experts))
    topology = eplb_jax.Topology.of_replicas(given.slots, mesh.size)
    plan = eplb_jax.plan(equal_load, topology, strategy="greedy")
    run = train(model, mesh, plan, steps=given.steps, every=given.every)
    Console(width=100).print(table_of(run, min(given.every, given.steps), mesh.size))
    print(*report(run, mesh.size), sep="\n")
    if given.trace:
        whole = given.steps - given.steps % STEPS_PER_WINDOW
        windows = run.load[:whole].reshape(-1, STEPS_PER_WINDOW, *equal_load.shape).sum(axis=1)
        np.savez_compressed(given.trace, load=windows)
    if given.check:
        other = train(model, mesh, moe.contiguous(model), steps=given.steps)
        print(*compared(run, other, mesh), sep="\n")


if __name__ == "__main__":
    main()
