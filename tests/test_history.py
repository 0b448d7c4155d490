"""Histories: against float64 loops, and what plans from them weigh."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType

import eplb_jax
from eplb_jax import Topology, plan
from eplb_jax.planning.history import GAINS
from tests.helpers import COLLECTIVES, QUICK, assert_same

L, E = 3, 12
TOPOLOGY = Topology(4, slots=4)
KEPT = 1 - 1 / 64


def trace_of(count, seed=0):
    """Tokens of mixed traffic: windows of unequal size, an idle layer, an empty window."""
    rng = np.random.default_rng(seed)
    kinds = rng.dirichlet(np.full(E, 0.5), (3, L))
    trace = np.stack(
        [rng.multinomial(n, kinds[rng.integers(3)]) for n in rng.integers(200, 9000, count)]
    )
    trace[2, 1] = 0
    trace[4] = 0
    return trace.astype(np.float32)


def history_by_hand(trace, recent=8, remembered=8):
    """The history of one layer [T, E], in float64: groups (share, tokens, windows) and scores."""
    windows, groups, scores = (
        [],
        [],
        dict.fromkeys(("seen", "error", "tried", "nearest", "gain"), 0),
    )
    lead, squared, means = np.zeros(5), np.zeros(5), None

    def evidence(tokens, spread, largest):
        return tokens * (spread + 1 / largest) / (tokens * spread + 1)

    def squares(x, y):
        """Of integers, which decide between nearly equal costs."""
        return (np.floor((np.floor(x * 2**23) - np.floor(y * 2**23)) / 2**9) ** 2).sum()

    for load in trace:
        if not load.sum():
            continue
        known = [*windows, load]
        size = np.array([x.sum() for x in known])
        share = np.array([x / x.sum() for x in known])
        part = size / size.sum()
        found = (part * ((share - part @ share) ** 2).sum(axis=1)).sum()
        apart = max(found - (len(known) - 1) / size.sum(), 0)
        spread = apart / (1 - (part**2).sum()) if len(known) > 1 else 0
        weight = evidence(size, spread, size.max())
        new, now = share[-1], weight[-1]
        for name in scores:
            scores[name] *= KEPT
        lead, squared = lead * KEPT, squared * KEPT
        if windows:
            away = np.abs(share[:-1] - new).sum(axis=1)
            if len(windows) > 1:
                error = np.abs(weight[:-1] @ share[:-1] / weight[:-1].sum() - new).sum()
                ahead = error - np.abs(means - new).sum(axis=1)
                scores["error"] += now * error
                lead, squared = lead + now * ahead, squared + now * ahead**2
            if groups:
                near = min(np.abs(x - new).sum() for x, _, _ in groups)
                scores["tried"] += now
                scores["nearest"] += now * away.min()
                scores["gain"] += now * max(away.min() - near, 0)
            gains = np.floor(np.array(GAINS) * now + 0.5) / 64
            means = means + gains[:, None] * (new - means)
        else:
            means = np.repeat(new[None], 5, axis=0)
        scores["seen"] += now
        groups = [(x, n * KEPT, k * KEPT) for x, n, k in groups]
        windows.append(load)
        if len(windows) > recent:
            old = windows.pop(0)
            groups.append((old / old.sum(), old.sum(), 1.0))
        if len(groups) > remembered:
            w = [k * evidence(n / k, spread, size.max()) for _, n, k in groups]
            cost = {
                (i, j): w[i] * w[j] / (w[i] + w[j]) * squares(groups[i][0], groups[j][0])
                for i in range(len(groups))
                for j in range(i + 1, len(groups))
            }
            i, j = min(cost, key=cost.__getitem__)
            (a, m, p), (b, n, q) = groups[i], groups[j]
            part = np.floor(128 * w[j] / (w[i] + w[j]) + 0.5) / 128
            groups[i] = a + part * (b - a), m + n, p + q
            groups.pop(j)
    return groups, scores | {"lead": lead, "lead_squared": squared}, means


def remember(trace, **sizes):
    history = eplb_jax.init_history(*trace.shape[1:], **sizes)
    for window in trace:
        history = eplb_jax.update_history(history, jnp.asarray(window))
    return history


def test_a_history_is_that_of_float64():
    trace = trace_of(22)
    history = remember(trace)
    for layer in range(L):
        groups, scores, means = history_by_hand(trace[:, layer].astype(float))
        busy = trace[:, layer][trace[:, layer].sum(axis=1) > 0]
        np.testing.assert_array_equal(history.recent[:, layer], busy[-8:])
        got = [np.asarray(x[:, layer]) for x in history[1:4]]
        order = np.argsort(got[1])
        expected = sorted(groups, key=lambda x: x[1])
        np.testing.assert_allclose(got[1][order], [x[1] for x in expected], rtol=1e-5)
        np.testing.assert_allclose(got[2][order], [x[2] for x in expected], rtol=1e-5)
        shares = got[0][order] / 2**23
        np.testing.assert_allclose(shares, [x[0] for x in expected], atol=3e-3)
        np.testing.assert_allclose(history.means[:, layer] / 2**23, means, atol=2e-4)
        for name, value in scores.items():
            of_layer = np.asarray(getattr(history.scores, name))[..., layer]
            np.testing.assert_allclose(of_layer, value, rtol=0.02, atol=2e-3, err_msg=name)


def test_steps_add_up_to_windows():
    loads = np.random.default_rng(2).integers(0, 9, (10, L, E)).astype(np.int32)
    history = eplb_jax.init_history(L, E, recent=3)
    step = jax.jit(eplb_jax.update_history, static_argnums=2, donate_argnums=0)
    for load in loads:
        history = step(history, load, 2)
    np.testing.assert_array_equal(history.recent, loads.reshape(5, 2, L, E).sum(axis=1)[2:])
    history = step(history, loads[0], 2)
    np.testing.assert_array_equal(history.current, loads[0])
    history = eplb_jax.update_history(history, loads[1], 1)  # windows have become shorter
    np.testing.assert_array_equal(history.recent[-1], loads[0] + loads[1])
    assert not np.any(history.current)


def test_sums_neither_overflow_nor_stall():
    """A float32 sum alone would stop at 2^24, an int32 one wrap at 2^31."""
    steps, huge = 300, 2**25
    step = jax.jit(eplb_jax.update_history, static_argnums=2)
    history = eplb_jax.init_history(1, 2, recent=1)
    for _ in range(steps):
        history = step(history, jnp.array([[huge, 1]], jnp.int32), steps)
    np.testing.assert_allclose(history.recent[0, 0], [steps * huge, steps], rtol=1e-7)
    history = step(eplb_jax.init_history(1, 1), jnp.array([[2.0**24]]), 2**30)
    many = jax.jit(
        lambda x: jax.lax.fori_loop(0, 1000, lambda _, y: step(y, jnp.ones((1, 1)), 2**30), x)
    )
    total = many(history)
    assert float(total.current[0, 0] + total.rest[0, 0]) == 2**24 + 1000


@pytest.mark.parametrize("count", [5, 25])
def test_windows_are_a_history_given_whole(count):
    trace = trace_of(count)
    history = remember(trace)
    result = plan(trace, TOPOLOGY, strategy=QUICK)
    assert_same(plan(history, TOPOLOGY, strategy=QUICK), result)
    assert_same(eplb_jax.rebalance_experts(history, 16, 1, 1, 4, strategy=QUICK), result)
    compiled = eplb_jax.precompile(history, TOPOLOGY, strategy=QUICK)
    assert_same(compiled(history), result)
    with pytest.raises(ValueError, match="load must have the shape that was compiled for"):
        compiled(trace)
    greedy = plan(history, TOPOLOGY, strategy="greedy")
    if count < 8:  # groups are means, whose sums are rounded
        assert_same(greedy, plan(trace, TOPOLOGY, strategy="greedy"))


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_layers_are_independent_and_need_no_communication(kind):
    trace = np.concatenate([trace_of(20, seed) for seed in range(8)], axis=1)
    whole = remember(trace)
    part = remember(trace[:, 4:7])
    assert_same(
        jax.tree.leaves(part)[:-1],
        [
            x[..., 4:7, :] if x.ndim > 1 and x.shape[-1] == E else x[..., 4:7]
            for x in jax.tree.leaves(whole)[:-1]
        ],
    )
    mesh = jax.make_mesh((8,), ("layers",), axis_types=(kind,))

    def spread(x):
        axes = ("layers", None) if x.shape[-1:] == (E,) else ("layers",)
        spec = jax.P(*(None,) * (x.ndim - len(axes)), *axes) if x.ndim else jax.P()
        return jax.device_put(x, jax.sharding.NamedSharding(mesh, spec))

    sharded, window = jax.tree.map(spread, whole), spread(jnp.asarray(trace[3]))
    compiled = jax.jit(eplb_jax.update_history).lower(sharded, window).compile()
    assert not COLLECTIVES.findall(compiled.as_text())
    after = eplb_jax.update_history(whole, jnp.asarray(trace[3]))
    result = compiled(sharded, window)
    assert_same(jax.tree.leaves(result), jax.tree.leaves(after))
    assert result.remembered.sharding.spec[1] == "layers"
    twice = eplb_jax.merge_histories([result, result])
    assert_same(jax.tree.leaves(twice), jax.tree.leaves(eplb_jax.merge_histories([after] * 2)))
    assert_same(plan(result, TOPOLOGY, strategy=QUICK), plan(after, TOPOLOGY, strategy=QUICK))


def test_files_hold_histories_whole(tmp_path):
    history, path = remember(trace_of(12)), tmp_path / "history.npz"
    eplb_jax.save_history(path, history)
    restored = eplb_jax.load_history(path)
    assert jax.tree.structure(restored) == jax.tree.structure(history)
    assert_same(jax.tree.leaves(restored), jax.tree.leaves(history))
    assert [x.name for x in tmp_path.iterdir()] == ["history.npz"]
    np.savez(path, load=np.ones(3))
    with pytest.raises(ValueError, match="is no history of format 1"):
        eplb_jax.load_history(path)
    path.write_bytes(b"PK")
    with pytest.raises(ValueError, match="is no history"):
        eplb_jax.load_history(path)


def test_replicas_of_a_service_see_one_traffic():
    trace = trace_of(24)
    half = np.random.default_rng(1).binomial(trace.astype(int), 0.5).astype(np.float32)
    both = [remember(half), remember(trace - half)]
    merged, whole = eplb_jax.merge_histories(both), remember(trace)
    np.testing.assert_array_equal(merged.recent, whole.recent)
    np.testing.assert_allclose(merged.windows.sum(axis=0), whole.windows.sum(axis=0), rtol=1e-5)
    np.testing.assert_allclose(merged.tokens.sum(axis=0), whole.tokens.sum(axis=0), rtol=1e-5)
    # The groups are the three kinds of traffic again.
    for share in np.moveaxis(np.asarray(merged.remembered), 1, 0):
        apart = np.abs(share[:, None] - np.asarray(whole.remembered)[None, :, 0]).sum(axis=2)
        assert len(share) == len(apart)
    load = whole.recent[-1]
    balanced = [
        eplb_jax.metrics.balance(load, plan(x, TOPOLOGY, strategy=QUICK), TOPOLOGY).mean_imbalance
        for x in (merged, whole)
    ]
    assert balanced[0] < 1.2 * balanced[1] + 0.02


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: eplb_jax.init_history(1, 2, recent=0), "recent=0"),
        (lambda: eplb_jax.init_history(1, 2, remembered=-1), "remembered=-1"),
        (
            lambda: eplb_jax.update_history(eplb_jax.init_history(2, 3), jnp.ones((3, 2))),
            r"load has the shape \(3, 2\), the history's \(2, 3\)",
        ),
        (
            lambda: eplb_jax.update_history(eplb_jax.init_history(2, 3), jnp.ones((2, 3)), 0),
            "steps_per_window=0",
        ),
        (
            lambda: eplb_jax.update_history(eplb_jax.init_history(1, 2), [[1, -1]]),
            r"load .* negative",
        ),
        (lambda: eplb_jax.merge_histories([]), "histories must hold at least one"),
        (
            lambda: eplb_jax.merge_histories(
                [eplb_jax.init_history(1, 2), eplb_jax.init_history(1, 3)]
            ),
            r"histories must have one shape, .* in histories\[1\]",
        ),
        (lambda: plan(np.ones((3, 4)), Topology(2, 2), weights="equal"), "weights are of windows"),
        (
            lambda: plan(np.ones((2, 3, 4)), Topology(2, 2), weights=[1, 2, 3]),
            r"weights must have the shape \(2,\), got \(3,\)",
        ),
        (
            lambda: plan(np.ones((2, 3, 4)), Topology(2, 2), weights="all"),
            'nearest: weights="equal"',
        ),
        (
            lambda: plan(eplb_jax.init_history(3, 4), Topology(2, 2), weights="equal"),
            "weights must be None for a history",
        ),
    ],
)
def test_errors(call, says):
    with pytest.raises(ValueError, match=says):
        call()
