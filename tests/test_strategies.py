"""What every strategy must do. A new strategy is tested by its name in STRATEGIES."""

import dataclasses
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import assert_feasible, assert_same, lognormal, pack_loads
from jax.sharding import NamedSharding, PartitionSpec

import eplb_jax
from eplb_jax import STRATEGIES, Strategy, balanced_packing
from eplb_jax.packing import search
from eplb_jax.packing.columns import Columns
from eplb_jax.packing.orders import Lpt, RampedLpt, Zigzag
from eplb_jax.packing.pair_exchange import Pairs
from eplb_jax.packing.peak_exchange import Peak
from eplb_jax.packing.portfolio import Portfolio
from eplb_jax.packing.rebuild import Rebuild

COLLECTIVES = re.compile(
    r"all-gather|all-reduce|all-to-all|collective-permute|collective-broadcast|reduce-scatter"
)

# `fast` and `best` are `auto` with other numbers; tests/test_rebalance.py has what is said of them.
DISTINCT = [name for name in STRATEGIES if name not in ("fast", "best")]
every_strategy = pytest.mark.parametrize("name", DISTINCT)


@every_strategy
@pytest.mark.parametrize(("layers", "n", "m"), [(3, 24, 4), (2, 27, 3)])
def test_feasible(name, layers, n, m):
    packing = balanced_packing(lognormal(layers, n), m, strategy=name)
    assert packing.pack_index.dtype == packing.rank_in_pack.dtype == jnp.int32
    assert packing.pack_index.shape == (layers, n)
    assert_feasible(packing, m)


@every_strategy
def test_hard_weights(name):
    n, m = 24, 4
    rng = np.random.default_rng(0)
    weight = np.stack(
        [
            np.zeros(n),
            np.ones(n),
            np.eye(n)[5],
            np.full(n, 3e38),
            rng.uniform(size=n) * 1e-30,
            np.where(np.arange(n) < 12, 0, 1),
            rng.integers(0, 3, n),
            2.0 ** rng.integers(-60, 60, n),
            np.arange(n),
        ]
    )
    loads = []
    for rows in np.split(weight, 3):  # a shape that other tests have compiled
        packing = balanced_packing(rows, m, strategy=name)
        assert_feasible(packing, m)
        loads.append(pack_loads(rows, packing.pack_index, m))
    loads = np.concatenate(loads)
    np.testing.assert_allclose(loads[:2].max(axis=1), [0, 6])
    assert loads[2].max() == 1
    np.testing.assert_allclose(loads[3], loads[3, 0])
    assert loads[5].max() == 3
    assert loads[7].max() <= 2 * weight[7].max()


@every_strategy
def test_one_pack_and_packs_of_one_item(name):
    weight = np.asarray([[3, 9, 1, 5]])
    alone = balanced_packing(weight, 4, strategy=name)
    np.testing.assert_array_equal(alone.pack_index, [[0, 1, 2, 3]])
    np.testing.assert_array_equal(alone.rank_in_pack, [[0, 0, 0, 0]])
    together = balanced_packing(weight, 1, strategy=name)
    np.testing.assert_array_equal(together.pack_index, [[0, 0, 0, 0]])
    np.testing.assert_array_equal(together.rank_in_pack, [[2, 0, 3, 1]])


@every_strategy
def test_never_worse_than_its_own_start(name):
    strategy = STRATEGIES[name]
    weight = lognormal(3, 24)
    start = dataclasses.replace(strategy, refinement=None)
    before = pack_loads(weight, balanced_packing(weight, 4, strategy=start).pack_index, 4)
    after = pack_loads(weight, balanced_packing(weight, 4, strategy=name).pack_index, 4)
    assert np.all(after.max(axis=1) <= before.max(axis=1) * (1 + 1e-6))
    if strategy.refinement is not None:
        assert after.max(axis=1).mean() < before.max(axis=1).mean()


@every_strategy
def test_deterministic_and_a_layer_does_not_see_the_others(name):
    weight = lognormal(3, 24)
    packing = balanced_packing(weight, 4, strategy=name)
    assert_same(packing, balanced_packing(weight, 4, strategy=name))
    assert_same(packing, balanced_packing(weight, 4, strategy=name, key=jax.random.key(0)))
    others = np.stack([weight[2], 4 * weight[1], weight[2]])
    assert_same([x[1] for x in packing], [x[1] for x in balanced_packing(others, 4, strategy=name)])


@every_strategy
def test_the_packing_follows_its_items(name):
    """Items in another order: the same packing of the same items, where no weights tie."""
    weight = lognormal(3, 24)
    order = np.random.default_rng(0).permutation(24)
    one = balanced_packing(weight, 4, strategy=name)
    other = balanced_packing(weight[:, order], 4, strategy=name)
    assert_same([np.asarray(x)[:, order] for x in one], other)


@every_strategy
def test_under_jit_and_vmap(name):
    weight = jnp.asarray(lognormal(4, 12))
    small = smaller(STRATEGIES[name])
    eager = balanced_packing(weight, 3, strategy=small)

    def pack(weight):
        return balanced_packing(weight, 3, strategy=small)

    assert_same(jax.jit(pack)(weight), eager)
    stacked = jax.vmap(pack)(weight.reshape(2, 2, 12))
    assert_same([x.reshape(4, 12) for x in stacked], eager)


@pytest.mark.parametrize("name", ["greedy", "auto"])
def test_as_python_loops(name):
    weight = lognormal(1, 6)
    small = smaller(STRATEGIES[name])
    jitted = balanced_packing(weight, 3, strategy=small)
    with jax.disable_jit():
        assert_same(balanced_packing(weight, 3, strategy=small), jitted)


def smaller(strategy):
    """The same strategy with at most 4 candidates a family, 2 steps or fewer and 2 attempts."""
    orders = tuple(dataclasses.replace(x, count=min(x.count, 4)) for x in strategy.orders)
    refinement = strategy.refinement
    if isinstance(refinement, Portfolio):
        refinement = Portfolio(1, 1, 1)
    elif refinement is not None:
        refinement = dataclasses.replace(refinement, steps=2)
    if isinstance(refinement, Rebuild):
        refinement = dataclasses.replace(refinement, attempts=min(refinement.attempts, 2))
    keep = min(strategy.keep, sum(x.count for x in orders))
    return dataclasses.replace(strategy, orders=orders, refinement=refinement, keep=keep)


@every_strategy
def test_new_values_compile_nothing(name):
    strategy = smaller(STRATEGIES[name])
    chex.clear_trace_counter()
    traced = chex.assert_max_traces(search.packs, n=1)
    run = jax.jit(lambda w, key: traced(w, 4, strategy, key))
    for seed in range(3):
        run(jnp.asarray(lognormal(3, 24, seed=seed)), jax.random.key(seed))
    balanced_packing(lognormal(3, 24), 4, strategy=strategy)
    with jax.no_tracing():
        balanced_packing(lognormal(3, 24, seed=9), 4, strategy=strategy)


@every_strategy
def test_the_same_with_and_without_x64(name):
    weight, small = lognormal(3, 24), smaller(STRATEGIES[name])
    narrow = balanced_packing(weight, 4, strategy=small)
    with jax.enable_x64(True):
        wide = balanced_packing(jnp.asarray(weight.astype(np.float64)), 4, strategy=small)
    assert wide.pack_index.dtype == jnp.int32
    assert_same(wide, narrow)


@every_strategy
def test_kinds_of_numbers(name):
    counts = np.random.default_rng(0).integers(0, 256, (3, 24))
    expected = balanced_packing(counts.astype(np.float32), 4, strategy=name)
    for kind in (np.int32, np.int64, np.uint8, np.float64, np.float16, jnp.bfloat16):
        assert_same(balanced_packing(counts.astype(kind), 4, strategy=name), expected)
    for kind in (jnp.int32, jnp.bfloat16):
        assert_same(balanced_packing(jnp.asarray(counts, kind), 4, strategy=name), expected)
    assert_same(balanced_packing(counts.tolist(), 4, strategy=name), expected)
    large = balanced_packing(counts.astype(np.int64) * 2**50, 4, strategy=name)
    assert_same(large, expected)


@every_strategy
def test_layers_over_a_mesh_need_no_communication(name):
    mesh = jax.make_mesh((8,), ("layer",))  # explicit, as JAX has it by default
    weight = lognormal(16, 24)
    small = smaller(STRATEGIES[name])
    sharded = jax.device_put(weight, NamedSharding(mesh, PartitionSpec("layer")))

    def plan(weight):
        return eplb_jax.rebalance_experts(weight, 32, 1, 1, 4, strategy=small)

    compiled = jax.jit(plan).lower(sharded).compile()
    assert not COLLECTIVES.findall(compiled.as_text())
    assert_same(compiled(sharded), plan(weight))


@every_strategy
def test_no_copies_to_the_host_inside_jit(name):
    weight, small = jax.device_put(lognormal(3, 24)), smaller(STRATEGIES[name])
    run = jax.jit(lambda w: balanced_packing(w, 4, strategy=small))
    jax.block_until_ready(run(weight))
    with jax.transfer_guard("disallow"):
        jax.block_until_ready(run(weight))


def test_more_candidates_are_better_and_blocks_do_not_matter(monkeypatch):
    base = dataclasses.replace(STRATEGIES["two_swap"], refinement=None, keep=1)
    few = dataclasses.replace(base, orders=(RampedLpt(4, 0.0, 0.2),))
    weight = lognormal(4, 24)

    def spread(strategy):
        loads = pack_loads(weight, balanced_packing(weight, 4, strategy=strategy).pack_index, 4)
        return (loads.max(axis=1) - loads.min(axis=1)).mean()

    assert spread(base) < spread(few)
    mixed = dataclasses.replace(base, orders=(Lpt(), RampedLpt(70, 0.0, 0.2), Zigzag()))
    for strategy in (base, mixed):
        whole = balanced_packing(weight, 4, strategy=strategy)
        with monkeypatch.context() as context:
            context.setattr(search, "BLOCK", 24 * 32)
            jax.clear_caches()
            assert_same(balanced_packing(weight, 4, strategy=strategy), whole)


def test_bad_counts_are_named():
    with pytest.raises(ValueError, match=r"keep=300 must be between 1 and .* 256"):
        dataclasses.replace(STRATEGIES["two_swap"], keep=300)
    with pytest.raises(ValueError, match="at least one candidate"):
        Strategy(orders=())


@pytest.mark.parametrize("name", ["auto", "greedy", "lns"])
def test_items_with_one_label_go_to_distinct_packs(name):
    weight = lognormal(5, 24)
    labels = np.tile(np.repeat(np.arange(8) * 10**6, 3), (5, 1))
    plain = balanced_packing(weight, 4, strategy=name)
    marked = balanced_packing(weight, 4, strategy=name, labels=labels)
    assert_feasible(marked, 4)

    def meetings(packing, labels):
        key = np.sort(np.asarray(packing.pack_index) + 8 * (labels // 10**6), axis=1)
        return (key[:, 1:] == key[:, :-1]).sum(axis=1)

    assert meetings(plain, labels).sum() > 0
    assert meetings(marked, labels).sum() == 0
    assert_same(
        marked,
        jax.jit(lambda w, x: balanced_packing(w, 4, strategy=name, labels=x))(weight, labels),
    )
    crowd = np.tile(np.where(np.arange(24) < 10, 0, np.arange(24) * 10**6), (5, 1))
    met = meetings(balanced_packing(weight, 4, strategy=name, labels=crowd), crowd)
    assert np.all(met >= 6)  # ten in four packs
    if name == "auto":
        assert np.all(met == 6)


@pytest.mark.parametrize("refinement", [Columns(4), Pairs(4), Peak(4)], ids=str)
def test_each_exchange_alone_is_a_refinement_of_any_strategy(refinement):
    strategy = Strategy((Lpt(), Zigzag()), keep=2, refinement=refinement)
    weight, labels = lognormal(5, 24), np.tile(np.repeat(np.arange(8), 3), (5, 1))
    for marks in (None, labels):
        assert_feasible(balanced_packing(weight, 4, strategy=strategy, labels=marks), 4)


def test_bad_labels_are_named():
    weight = np.ones((2, 12))
    with pytest.raises(ValueError, match=r"shape of the weights, \(2, 12\), got \(12,\)"):
        balanced_packing(weight, 4, labels=np.arange(12))
    with pytest.raises(TypeError, match="labels must be whole numbers, got dtype float64"):
        balanced_packing(weight, 4, labels=weight)
    with pytest.raises(ValueError, match="labels must fit in 32 bits, got 1099511627776"):
        balanced_packing(weight, 4, labels=np.full((2, 12), 2**40))


def test_no_layers():
    packing = balanced_packing(np.zeros((0, 12)), 6)
    assert packing.pack_index.shape == packing.rank_in_pack.shape == (0, 12)
