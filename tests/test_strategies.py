"""What every strategy must do, and what the search does for all of them.

A new strategy is tested by its name in STRATEGIES.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from eplb_jax import STRATEGIES, Strategy, Topology, balanced_packing, plan
from eplb_jax.packing import search
from eplb_jax.packing.columns import Columns
from eplb_jax.packing.constructions import greedy
from eplb_jax.packing.orders import Lpt, RampedLpt, Shuffle, Zigzag
from eplb_jax.packing.pair_exchange import Pairs
from eplb_jax.packing.peak_exchange import Peak
from tests.helpers import COLLECTIVES, assert_feasible, assert_same, lognormal, pack_loads

# `fast` and `best` are `auto` with other numbers; tests/test_rebalance.py has what is said of them.
DISTINCT = [name for name in STRATEGIES if name not in ("fast", "best")]
every_strategy = pytest.mark.parametrize("name", DISTINCT)
# One strategy for each way through the search: no refinement, lanes and swaps, ruin and recreate,
# exchanges that keep labels. They share the program of these three layers.
PATHS = ["greedy", "restarts", "lns", "auto"]
every_path = pytest.mark.parametrize("name", PATHS)
WEIGHT, PACKS = lognormal(3, 24), 4


def pack(weight, name, **options):
    return balanced_packing(weight, PACKS, strategy=name, **options)


@every_strategy
def test_feasible(name):
    packing = pack(WEIGHT, name)
    assert packing.pack_index.dtype == packing.rank_in_pack.dtype == jnp.int32
    assert packing.pack_index.shape == WEIGHT.shape
    assert_feasible(packing, PACKS)


@every_strategy
def test_hard_weights(name):
    n = WEIGHT.shape[1]
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
    for rows in np.split(weight, 3):
        packing = pack(rows, name)
        assert_feasible(packing, PACKS)
        loads.append(pack_loads(rows, packing.pack_index, PACKS))
    loads = np.concatenate(loads)
    np.testing.assert_allclose(loads[:2].max(axis=1), [0, 6])
    assert loads[2].max() == 1
    np.testing.assert_allclose(loads[3], loads[3, 0])
    assert loads[5].max() == 3
    assert loads[7].max() <= 2 * weight[7].max()


@every_strategy
def test_never_worse_than_its_own_start(name):
    start = dataclasses.replace(STRATEGIES[name], refinement=None)
    before, after = (
        pack_loads(WEIGHT, pack(WEIGHT, x).pack_index, PACKS).max(axis=1) for x in (start, name)
    )
    assert np.all(after <= before * (1 + 1e-6))
    if STRATEGIES[name].refinement is not None:
        assert after.mean() < before.mean()


@every_path
def test_one_pack_and_packs_of_one_item(name):
    weight = np.asarray([[3, 9, 1, 5]])
    alone = balanced_packing(weight, 4, strategy=name)
    np.testing.assert_array_equal(alone.pack_index, [[0, 1, 2, 3]])
    np.testing.assert_array_equal(alone.rank_in_pack, [[0, 0, 0, 0]])
    together = balanced_packing(weight, 1, strategy=name)
    np.testing.assert_array_equal(together.pack_index, [[0, 0, 0, 0]])
    np.testing.assert_array_equal(together.rank_in_pack, [[2, 0, 3, 1]])


@every_path
def test_deterministic_and_the_packing_follows_its_items(name):
    """Items in another order: the same packing of the same items, where no weights tie."""
    one = pack(WEIGHT, name)
    assert_same(one, pack(WEIGHT, name))
    order = np.random.default_rng(0).permutation(24)
    assert_same([np.asarray(x)[:, order] for x in one], pack(WEIGHT[:, order], name))


@pytest.mark.parametrize("name", ["greedy", "restarts"])  # auto: test_default_flags.py
def test_a_layer_is_packed_alike_among_any_others(name):
    """Layers with ties and near ties, 1, 7, 60 and 300 at a time."""
    rng = np.random.default_rng(0)
    near = 1000 * (1 + 1e-6 * rng.standard_normal((150, 18)))
    weight = np.concatenate([rng.integers(1, 4, (150, 18)), near])[rng.permutation(300)]
    whole = balanced_packing(weight, 3, strategy=name)
    for count in (1, 7, 60):
        for first in (0, 300 - count):
            part = slice(first, first + count)
            packed = balanced_packing(weight[part], 3, strategy=name)
            assert_same([x[part] for x in whole], packed)


@every_path
def test_under_jit_and_vmap_new_values_compile_nothing_and_copy_nothing(name):
    run = jax.jit(jax.vmap(lambda weight, key: pack(weight, name, key=key), (0, None)))
    keys = [jax.random.key(seed) for seed in (0, 1)]
    weights = np.stack([WEIGHT, lognormal(3, 24, seed=1)])
    on_device = [jax.device_put(x) for x in (weights, lognormal(6, 24).reshape(2, 3, 24))]
    # The default key is fixed.
    for weight, *packing in zip(weights, *run(on_device[0], keys[0]), strict=True):
        assert_same(packing, pack(weight, name))
    with jax.no_tracing():
        pack(lognormal(3, 24, seed=9), name)
        with jax.transfer_guard("disallow"):
            jax.block_until_ready(run(on_device[1], keys[1]))


def test_as_python_loops():
    weight = jnp.asarray(lognormal(1, 6))
    strategy = Strategy(construction=greedy, refinement=Pairs(2, two=False))
    jitted = balanced_packing(weight, 2, strategy=strategy)
    with jax.disable_jit():
        assert_same(balanced_packing(weight, 2, strategy=strategy), jitted)


@every_path
def test_the_same_with_and_without_x64(name):
    with jax.enable_x64(True):
        wide = pack(jnp.asarray(WEIGHT.astype(np.float64)), name)
    assert wide.pack_index.dtype == jnp.int32
    assert_same(wide, pack(WEIGHT, name))


def test_kinds_of_numbers():
    counts = np.random.default_rng(0).integers(0, 256, (3, 24))
    expected = pack(counts.astype(np.float32), "greedy")
    for kind in (np.int32, np.int64, np.uint8, np.float64, np.float16, jnp.bfloat16):
        assert_same(pack(counts.astype(kind), "greedy"), expected)
    for kind in (jnp.int32, jnp.bfloat16):
        assert_same(pack(jnp.asarray(counts, kind), "greedy"), expected)
    assert_same(pack(counts.tolist(), "greedy"), expected)
    assert_same(pack(counts.astype(np.int64) * 2**50, "greedy"), expected)


@every_path
def test_layers_over_a_mesh_need_no_communication(name):
    mesh = jax.make_mesh((8,), ("layer",))  # explicit, as JAX has it by default
    weight = lognormal(24, 24)
    sharded = jax.device_put(weight, NamedSharding(mesh, PartitionSpec("layer")))
    compiled = jax.jit(lambda x: pack(x, name)).lower(sharded).compile()
    assert not COLLECTIVES.findall(compiled.as_text())
    packed = compiled(sharded)
    for first in range(0, 24, 3):
        part = slice(first, first + 3)
        assert_same([np.asarray(x)[part] for x in packed], pack(weight[part], name))


def programs(closed):
    """A program and all programs in its equations."""
    yield closed
    params = [list(x.params.values()) for x in closed.eqns]
    for inner in jax.tree.leaves(params, is_leaf=lambda x: hasattr(x, "consts")):
        if hasattr(inner, "consts"):
            yield from programs(inner)


@pytest.mark.parametrize("name", ["auto", "best", "restarts", "lns"])
def test_programs_do_not_grow_with_the_slots_of_a_gpu(name):
    """No Python loops over slots, and no constants with an entry for every pair of slots."""
    lengths = []
    for slots, num_experts in ((24, 40), (144, 256)):
        make = functools.partial(plan, topology=Topology(2, slots=slots), strategy=name)
        parts = list(programs(jax.make_jaxpr(make)(lognormal(1, num_experts))))
        lengths.append(sum(len(x.eqns) for x in parts))
        assert max(np.asarray(c).nbytes for x in parts for c in x.consts) <= 1 << 16
    assert lengths[1] <= 1.05 * lengths[0], lengths


def test_more_candidates_are_better_and_blocks_do_not_matter(monkeypatch):
    one, many = Strategy(), Strategy(orders=(RampedLpt(40, 0.0, 0.2),))

    def spread(strategy):
        loads = pack_loads(WEIGHT, pack(WEIGHT, strategy).pack_index, PACKS)
        return (loads.max(axis=1) - loads.min(axis=1)).mean()

    assert spread(many) < spread(one)
    mixed = Strategy(orders=(Lpt(), RampedLpt(70, 0.0, 0.2), Shuffle(20), Zigzag()), keep=3)

    def contents():
        def run(weight):
            return search.packs(weight, PACKS, mixed, jax.random.key(0))

        return jax.jit(run)(WEIGHT)

    whole = contents()
    monkeypatch.setattr(search, "BLOCK", 24 * 32)
    np.testing.assert_array_equal(contents(), whole)


def test_bad_counts_are_named():
    with pytest.raises(ValueError, match=r"keep=300 must be between 1 and .* 256"):
        dataclasses.replace(STRATEGIES["two_swap"], keep=300)
    with pytest.raises(ValueError, match="at least one candidate"):
        Strategy(orders=())
    with pytest.raises(TypeError, match=r"orders must be a tuple, got \[Lpt"):
        Strategy(orders=[Lpt()])


@pytest.mark.parametrize("name", ["auto", "greedy", "lns"])
def test_items_with_one_label_go_to_distinct_packs(name):
    labels = np.tile(np.repeat(np.arange(8) * 10**6, 3), (3, 1))

    def meetings(packing, labels):
        key = np.sort(np.asarray(packing.pack_index) + 8 * (labels // 10**6), axis=1)
        return (key[:, 1:] == key[:, :-1]).sum(axis=1)

    marked = pack(WEIGHT, name, labels=labels)
    assert_feasible(marked, PACKS)
    assert meetings(pack(WEIGHT, name), labels).sum() > 0
    assert meetings(marked, labels).sum() == 0
    if name == "greedy":
        assert_same(marked, jax.jit(lambda w, x: pack(w, name, labels=x))(WEIGHT, labels))
    crowd = np.tile(np.where(np.arange(24) < 10, 0, np.arange(24) * 10**6), (3, 1))
    met = meetings(pack(WEIGHT, name, labels=crowd), crowd)
    assert np.all(met >= 6)  # ten in four packs
    if name == "auto":
        assert np.all(met == 6)


@pytest.mark.parametrize("refinement", [Columns(4), Pairs(4), Peak(4)], ids=str)
def test_each_exchange_alone_is_a_refinement_of_any_strategy(refinement):
    strategy = Strategy((Lpt(), Zigzag()), keep=2, refinement=refinement)
    labels = np.tile(np.repeat(np.arange(8), 3), (3, 1))
    packing = pack(WEIGHT, strategy, labels=labels)
    assert_feasible(packing, PACKS)
    held = np.sort(8 * np.asarray(packing.pack_index) + labels, axis=1)
    assert np.all(held[:, 1:] > held[:, :-1])


def test_bad_labels_are_named():
    weight = np.ones((2, 12))
    with pytest.raises(ValueError, match=r"shape of the weights, \(2, 12\), got \(12,\)"):
        balanced_packing(weight, 4, labels=np.arange(12))
    with pytest.raises(TypeError, match="labels must be integers, got dtype float64"):
        balanced_packing(weight, 4, labels=weight)
    with pytest.raises(ValueError, match="labels must fit in 32 bits, got 1099511627776"):
        balanced_packing(weight, 4, labels=np.full((2, 12), 2**40))


def test_no_layers():
    packing = balanced_packing(np.zeros((0, 12)), 6)
    assert packing.pack_index.shape == packing.rank_in_pack.shape == (0, 12)
