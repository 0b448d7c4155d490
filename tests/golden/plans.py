"""Hashes of plans, at XLA's default flags: what a change of the code's structure must not change.

python tests/golden/plans.py            # compare with plans.json; prints what differs
python tests/golden/plans.py --write    # make plans.json anew
"""

import hashlib
import json
import sys
from pathlib import Path

import numpy as np

import eplb_jax

FILE = Path(__file__).with_suffix(".json")
SEEDS = [
    "greedy_swap",
    "ensemble_greedy",
    "restarts",
    "lns",
    "reconstruct",
    "ensemble",
    "two_swap",
    "pruned",
]
PENALTY = "price" if eplb_jax.__doc__ and not hasattr(eplb_jax, "plan") else "move_penalty"


def lognormal(layers, experts, seed, sigma=1.0):
    return np.random.default_rng(seed).lognormal(sigma=sigma, size=(layers, experts))


def drawn(layers, experts, seed):
    """Lognormal loads; the last layers are idle, one-hot, equal, and of few distinct values."""
    load = lognormal(layers, experts, seed).astype(np.float32)
    load[-1], load[-2], load[-3] = 0, np.arange(experts) == 3, 7
    load[-4] = np.random.default_rng(seed).integers(0, 4, experts)
    return load


def windows(count, layers, experts, seed):
    trace = np.stack([drawn(layers, experts, seed + i) for i in range(count)])
    trace[:, 0] = lognormal(1, experts, seed) * (1 + 0.1 * lognormal(count, experts, seed + 99))
    trace[count // 2, 1] = 0
    return trace


def cases():
    """Names, and what makes the arrays."""
    rebalance = eplb_jax.rebalance_experts
    shapes = {
        "c1": (12, 8, 8, 1, 1, 8),
        "c2": (12, 28, 32, 1, 1, 16),
        "c3": (12, 20, 24, 1, 1, 8),
        "c4": (12, 26, 32, 1, 1, 8),
        "c5": (12, 32, 40, 1, 1, 8),
        "c7": (12, 24, 28, 1, 1, 4),
        "c12": (12, 64, 96, 1, 1, 8),
        "c24": (8, 64, 96, 1, 1, 4),
        "few_slots": (8, 4, 16, 1, 1, 2),
        "hierarchical": (12, 32, 48, 8, 2, 8),
        "groups_exhaustive": (12, 64, 80, 8, 4, 8),
        "many_layers": (300, 16, 20, 1, 1, 4),
    }
    for name, (layers, *counts) in shapes.items():
        load = drawn(layers, counts[0], 1)
        for strategy in ("auto", "greedy", "fast", "best"):
            if strategy == "best" and name not in ("c2", "c4", "c12", "hierarchical"):
                continue
            yield (
                f"{strategy} {name}",
                lambda a=load, c=counts, s=strategy: rebalance(a, *c[1:], strategy=s),
            )
    for strategy in SEEDS:
        for name in ("c3", "c7", "hierarchical"):
            layers, *counts = shapes[name]
            load = drawn(layers, counts[0], 2)
            yield (
                f"{strategy} {name}",
                lambda a=load, c=counts, s=strategy: rebalance(a, *c[1:], strategy=s),
            )
    for count in (2, 8, 16, 23):
        for name in ("c2", "c5", "c12", "hierarchical"):
            layers, *counts = shapes[name]
            trace = windows(count, layers, counts[0], 3)
            yield f"auto {name}, {count} windows", lambda a=trace, c=counts: rebalance(a, *c[1:])
    trace = windows(4, 12, 32, 4)
    for strategy in ("fast", "best", "greedy", "lns", "two_swap"):
        yield f"{strategy}, 4 windows", lambda s=strategy: rebalance(trace, 40, 1, 1, 8, strategy=s)
    for name, topology in {"one node": (40, 1, 1, 8), "nodes": (48, 8, 2, 8)}.items():
        old = rebalance(drawn(12, 32, 5), *topology)
        for count in (1, 4):
            load = windows(count, 12, 32, 6)
            load = load[0] if count == 1 else load
            title = f"{name}, {count} windows"
            yield (
                f"previous, {title}",
                lambda a=load, t=topology, o=old: rebalance(a, *t, previous=o),
            )
            for most in (0, 1, 4, 12, 40):
                yield (
                    f"max_moves {most}, {title}",
                    lambda a=load, t=topology, o=old, k=most: rebalance(
                        a, *t, previous=o, max_moves=k
                    ),
                )
            yield (
                f"penalty, {title}",
                lambda a=load, t=topology, o=old: rebalance(a, *t, previous=o, **{PENALTY: 0.01}),
            )
            yield (
                f"penalty and map, {title}",
                lambda a=load, t=topology, o=old: rebalance(
                    a, *t, previous=np.asarray(o.phy2log), max_moves=9, **{PENALTY: 0.003}
                ),
            )
    for strategy in ("auto", "greedy", "best", *SEEDS):
        weight = drawn(12, 24, 7)
        labels = np.random.default_rng(8).integers(0, 14, (12, 24))
        yield (
            f"packing, {strategy}",
            lambda w=weight, s=strategy: eplb_jax.balanced_packing(w, 6, strategy=s),
        )
        yield (
            f"packing with labels, {strategy}",
            lambda w=weight, x=labels, s=strategy: eplb_jax.balanced_packing(
                w, 6, strategy=s, labels=x
            ),
        )
    v3, oss = eplb_jax.loads.example(), eplb_jax.loads.example("gpt_oss_20b")
    lite = eplb_jax.loads.example("deepseek_v2_lite")
    for strategy in ("auto", "fast", "greedy", "restarts", "lns", "two_swap"):
        yield (
            f"v3, {strategy}",
            lambda s=strategy: rebalance(v3.sum(0), 288, 8, 4, 32, policy="global", strategy=s),
        )
    yield "v3, hierarchical", lambda: rebalance(v3.sum(0), 288, 8, 4, 32)
    yield "v3, 2 windows", lambda: rebalance(v3, 288, 8, 4, 32, policy="global")
    yield "v3, c = 2", lambda: rebalance(v3[0, :8], 288, 1, 1, 144)
    yield "gpt_oss, 8 windows", lambda: rebalance(oss[:8], 40, 1, 1, 8)
    yield "lite, 20 windows", lambda: rebalance(lite[:20], 72, 1, 1, 8)
    yield "replicas", lambda: eplb_jax.replicate_experts(drawn(12, 32, 9), 50)


def digest(arrays) -> str:
    parts = [np.ascontiguousarray(np.asarray(x)) for x in arrays]
    content = b"".join(repr((x.dtype.str, x.shape)).encode() + x.tobytes() for x in parts)
    return hashlib.sha256(content).hexdigest()[:16]


def main() -> None:
    hashes, plans, differing = {}, 0, 0
    known = json.loads(FILE.read_text()) if FILE.exists() else {}
    only = [x for x in sys.argv[1:] if not x.startswith("--")]
    for name, make in cases():
        if only and not any(x in name for x in only):
            continue
        result = make()
        hashes[name], plans = digest(result), plans + len(result[0])
        if "--write" not in sys.argv and hashes[name] != known.get(name):
            differing += 1
            print(f"differs: {name}", flush=True)
    if "--write" in sys.argv:
        FILE.write_text(json.dumps(hashes, indent=1) + "\n")
    print(f"{len(hashes)} cases, {plans} plans of a layer, {differing} differ")
    sys.exit(differing > 0)


if __name__ == "__main__":
    main()
