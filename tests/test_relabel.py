"""The assignment problem, and plans renumbered so that few slots change."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.optimize import linear_sum_assignment

from eplb_jax import Topology, check_placement, moves, plan
from eplb_jax.evaluation.metrics import balance
from eplb_jax.transition.assignment import MAX_TOTAL, assignment
from eplb_jax.transition.moves import SAME_NODE, STAYS
from tests.helpers import QUICK, assert_same, lognormal

TOPOLOGY = Topology(8, slots=6, num_nodes=2, num_groups=4)
LOAD = lognormal(6, 32)
DRIFT = np.random.default_rng(1).lognormal(sigma=0.3, size=LOAD.shape)
LATER = (LOAD * DRIFT).astype(np.float32)


def make(load, policy, previous=None):
    """A new plan, renumbered."""
    options = {"policy": policy, "strategy": QUICK, "tolerance": None}
    return plan(load, TOPOLOGY, previous=previous, **options)


def in_common(old, new, parts):
    """How many experts each of the old parts (GPUs or nodes) shares with each of the new GPUs."""
    before = [set(x) for x in np.reshape(old, (parts, -1)).tolist()]
    after = [set(x) for x in np.reshape(new, (TOPOLOGY.num_gpus, -1)).tolist()]
    return np.array([[len(a & b) for b in after] for a in before])


def most(value):
    """The maximum total value of an assignment."""
    return value[linear_sum_assignment(value, maximize=True)].sum()


def most_kept(old, new, num_nodes):
    """By scipy's assignments: of the GPUs of every pair of nodes, then of the nodes."""
    shape = num_nodes, TOPOLOGY.num_gpus // num_nodes
    value = in_common(old, new, TOPOLOGY.num_gpus).reshape(*shape, *shape)
    nodes = itertools.product(range(num_nodes), repeat=2)
    kept = [most(value[a, :, b]) for a, b in nodes]
    return most(np.reshape(kept, (num_nodes, num_nodes)))


@pytest.mark.parametrize("n", [0, 1, 2, 4, 8, 21])
def test_the_assignment_is_optimal(n):
    rng = np.random.default_rng(n)
    limits = 2, 9, 1000, MAX_TOTAL // max(n, 1) + 1
    value = np.concatenate([rng.integers(0, limit, (10, n, n)) for limit in limits])
    value = np.concatenate([value, np.full((1, n, n), MAX_TOTAL // max(n, 1))])
    column = np.asarray(jax.jit(jax.vmap(assignment))(jnp.asarray(value, jnp.int32)))
    np.testing.assert_array_equal(np.sort(column, axis=1), np.tile(np.arange(n), (len(value), 1)))
    total = np.take_along_axis(value, column[..., None], 2).sum((1, 2))
    np.testing.assert_array_equal(total, [most(x) for x in value])
    np.testing.assert_array_equal(column[-1], np.arange(n))  # all are equal


@pytest.mark.parametrize("policy", ["global", "hierarchical"])
def test_as_many_slots_as_possible_stay_and_loads_are_the_same(policy):
    first, alone = make(LOAD, policy), make(LATER, policy)
    result = make(LATER, policy, first)
    check_placement(result)
    after, before = (np.asarray(moves(first, x, TOPOLOGY).copies) for x in (result, alone))
    nodes = TOPOLOGY.num_nodes if policy == "hierarchical" else 1
    kept = [most_kept(*x, nodes) for x in zip(first.phy2log, alone.phy2log, strict=True)]
    np.testing.assert_array_equal(after[:, STAYS], kept)
    assert np.sum(kept) > 1.5 * before[:, STAYS].sum()
    loads = [np.sort(balance(LATER, x, TOPOLOGY).gpu_load) for x in (result, alone)]
    np.testing.assert_allclose(*loads, rtol=1e-6)  # added up in another order
    np.testing.assert_array_equal(alone.logcnt, result.logcnt)


def test_among_equals_experts_come_from_their_node():
    first, alone = make(LOAD, "global"), make(LATER, "global")
    copies = np.asarray(moves(first, make(LATER, "global", first), TOPOLOGY).copies)
    many = TOPOLOGY.num_replicas + 1
    for layer, (old, new) in enumerate(zip(first.phy2log, alone.phy2log, strict=True)):
        kept = in_common(old, new, TOPOLOGY.num_gpus)
        on_node = np.repeat(in_common(old, new, TOPOLOGY.num_nodes), TOPOLOGY.gpus_per_node, 0)
        wanted = divmod(most(many * kept + on_node - kept), many)
        assert (copies[layer, STAYS], copies[layer, SAME_NODE]) == wanted


def test_the_same_load_moves_nothing():
    first = make(LOAD, "global")
    assert_same(make(LOAD, "global", first), first)
    assert_same(make(LOAD, "global", np.asarray(first.phy2log)), first)
    # Whole nodes have changed places.
    mixed = np.random.default_rng(0).permutation(8)
    elsewhere = np.reshape(first.phy2log, (6, 8, 6))[:, mixed].reshape(6, 48)
    back = make(LOAD, "global", elsewhere)
    np.testing.assert_array_equal(moves(elsewhere, back, TOPOLOGY).copies, [[48, 0, 0, 0, 0]] * 6)


def test_under_jit():
    first = make(LOAD, "global")
    step = jax.jit(lambda load, old: make(load, "global", old))
    assert_same(step(LATER, first), make(LATER, "global", first))
