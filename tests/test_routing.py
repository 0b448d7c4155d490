"""Slots of routed tokens, against counting one token after the other, and their balance."""

from collections import Counter
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import eplb_jax
from eplb_jax import metrics, runtime
from tests.helpers import lognormal

E, R, G = 32, 48, 8
TOPOLOGY = eplb_jax.Topology(G, R // G)
LOAD = lognormal(2, E)
SHARES = np.random.default_rng(5).random(R).astype(np.float32)


def routed(tokens=400, k=4, seed=0):
    """Distinct experts for every token, as a router draws them."""
    rng = np.random.default_rng(seed)
    chance = LOAD[0].astype(np.float64) / LOAD[0].astype(np.float64).sum()
    return np.stack([rng.choice(E, k, replace=False, p=chance) for _ in range(tokens)]).astype(
        np.int32
    )


IDS = routed()


@pytest.fixture(scope="module")
def plan():
    return eplb_jax.plan(LOAD, TOPOLOGY, strategy="greedy")


def choices(plan):
    """Every choice, with the arguments it wants."""
    return {
        "round_robin": {},
        "token": {},
        "random": {"key": jax.random.key(1)},
        "nearest": {
            "table": runtime.nearest_replica(plan, eplb_jax.Topology(G, R // G, 2))[0],
            "gpu": 3,
        },
        "shares": {"shares": jnp.asarray(SHARES)},
    }


def in_turn(ids, layer, first=0):
    """The oracle of "round_robin"."""
    log2phy, logcnt = np.asarray(layer.log2phy), np.asarray(layer.logcnt)
    seen, slots = Counter(), np.empty_like(ids)
    for place, expert in np.ndenumerate(ids):
        slots[place] = log2phy[expert, (seen[expert] + first) % logcnt[expert]]
        seen[expert] += 1
    return slots


def test_every_choice_leads_to_a_slot_of_the_expert(plan):
    layer, padded = plan.layer(0), IDS.copy()
    padded[::5] = np.array([-1, E, 2**31 - 1, -(2**31)])
    for choice, given in choices(plan).items():
        to_physical = jax.jit(partial(runtime.to_physical, choice=choice))
        slots = np.asarray(to_physical(padded, layer, **given))
        assert slots.dtype == np.int32
        assert (slots[::5] == -1).all()
        live = (padded >= 0) & (padded < E)
        np.testing.assert_array_equal(np.asarray(layer.phy2log)[slots[live]], padded[live])


def test_round_robin_is_the_number_of_the_token_among_those_of_its_expert(plan):
    layer = plan.layer(0)
    np.testing.assert_array_equal(runtime.to_physical(IDS, layer), in_turn(IDS, layer))
    shifted = runtime.to_physical(IDS.astype(np.uint8), layer, gpu=jnp.int32(3))
    np.testing.assert_array_equal(shifted, in_turn(IDS, layer, first=3))


def test_many_ids_are_sorted_by_two_operands(plan, monkeypatch):
    """Above 2^31 / E tokens both do not fit in one number."""
    monkeypatch.setattr("eplb_jax.runtime.routing._ONE_OPERAND", 1)
    layer = plan.layer(0)
    np.testing.assert_array_equal(runtime.to_physical(IDS, layer), in_turn(IDS, layer))


def test_token_counts_tokens(plan):
    layer = plan.layer(0)
    number = np.arange(len(IDS))[:, None]
    wanted = np.asarray(layer.log2phy)[IDS, number % np.asarray(layer.logcnt)[IDS]]
    np.testing.assert_array_equal(runtime.to_physical(IDS, layer, "token"), wanted)


def test_batches_and_sequences_are_tokens(plan):
    for choice, given in choices(plan).items():
        if choice != "random":
            flat = runtime.to_physical(IDS, plan.layer(0), choice, **given)
            deep = runtime.to_physical(IDS.reshape(4, 100, 4), plan.layer(0), choice, **given)
            np.testing.assert_array_equal(deep, flat.reshape(4, 100, 4))


def test_shares_are_followed_to_a_token(plan):
    layer = plan.layer(0)
    phy2log = np.asarray(layer.phy2log)
    for shares in (SHARES, np.where(np.arange(R) % 3 == 0, 0, SHARES), np.ones(R, np.float32)):
        slots = runtime.to_physical(IDS, layer, "shares", shares=jnp.asarray(shares, jnp.float32))
        sent = np.bincount(np.asarray(slots).ravel(), minlength=R)
        whole = np.bincount(phy2log, weights=shares, minlength=E)
        tokens = np.bincount(IDS.ravel(), minlength=E)
        some = whole[phy2log] > 0
        wanted = shares / np.where(some, whole[phy2log], 1) * tokens[phy2log]
        assert np.abs(sent - wanted)[some].max() <= 1
        np.testing.assert_array_equal(np.bincount(phy2log, weights=sent, minlength=E), tokens)


def test_shares_that_are_all_zero_name_the_last_slot(plan):
    layer, zeros = plan.layer(0), jnp.zeros(R, jnp.float32)
    log2phy, logcnt = np.asarray(layer.log2phy), np.asarray(layer.logcnt)
    slots = runtime.to_physical(IDS, layer, "shares", shares=zeros)
    np.testing.assert_array_equal(slots, log2phy[IDS, logcnt[IDS] - 1])


def test_foreign_map(plan):
    in_order = eplb_jax.placement_of(plan.phy2log[0])
    slots = runtime.to_physical(IDS, np.asarray(plan.phy2log[0]))
    np.testing.assert_array_equal(slots, in_turn(IDS, in_order))


def test_random_depends_on_its_key_alone(plan):
    layer = plan.layer(0)

    def draw(seed):
        return runtime.to_physical(IDS, layer, "random", key=jax.random.key(seed))

    np.testing.assert_array_equal(draw(0), draw(0))
    assert (np.asarray(draw(0)) != np.asarray(draw(1))).any()
    # Every replica of an expert gets its part: five standard deviations around it.
    many = np.tile(np.arange(E, dtype=np.int32), (4000, 1))
    slots = runtime.to_physical(many, layer, "random", key=jax.random.key(2))
    sent = np.bincount(np.asarray(slots).ravel(), minlength=R)
    chance = 1 / np.asarray(layer.logcnt)[np.asarray(layer.phy2log)]
    assert np.all(np.abs(sent - 4000 * chance) <= 5 * np.sqrt(4000 * chance * (1 - chance)))


def test_each_device_alone_or_all_together(plan):
    """With axis_name tokens are numbered over all devices, else on each."""
    layer = plan.layer(0)
    mesh = jax.make_mesh((4, 2), ("data", "expert"), axis_types=(AxisType.Auto,) * 2)
    axes = ("data", "expert")
    specs = {"mesh": mesh, "in_specs": (P(axes), P(), P()), "out_specs": P(axes)}

    @partial(jax.jit, static_argnums=(2, 3))
    def slots(ids, shares, choice, axis_name):
        def on_device(ids, layer, shares):
            given = {"axis_name": axis_name, "shares": shares}
            return runtime.to_physical(ids, layer, choice, **given)

        return jax.shard_map(on_device, **specs)(ids, layer, shares)

    shares = jnp.asarray(SHARES)
    for choice in ("round_robin", "shares"):
        together = runtime.to_physical(IDS, layer, choice, shares=shares)
        np.testing.assert_array_equal(slots(IDS, shares, choice, axes), together)
    alone = np.asarray(slots(IDS, shares, "round_robin", None)).reshape(8, -1, 4)
    for ids, mine in zip(IDS.reshape(8, -1, 4), alone, strict=True):
        np.testing.assert_array_equal(mine, in_turn(ids, layer))


@pytest.mark.parametrize("nodes", [1, 2, 4])
def test_nearest(plan, nodes):
    table = np.asarray(runtime.nearest_replica(plan, eplb_jax.Topology(G, R // G, nodes)))
    gpu_of, node_of = np.arange(R) // (R // G), np.arange(G) // (G // nodes)
    for layer, phy2log in enumerate(np.asarray(plan.phy2log)):
        for expert in range(E):
            gpus = set(gpu_of[phy2log == expert])
            chosen = table[layer, expert]
            assert (phy2log[chosen] == expert).all()
            for gpu in range(G):
                to = gpu_of[chosen[gpu]]
                near = {x for x in gpus if node_of[x] == node_of[gpu]}
                assert to == gpu if gpu in gpus else to in (near or gpus)
            # No GPU could send to a replica as near with two clients fewer.
            clients = Counter(dict.fromkeys(gpus, 0) | Counter(gpu_of[chosen]))
            for gpu in set(range(G)) - gpus:
                near = {x for x in gpus if node_of[x] == node_of[gpu]}
                fewest = min(clients[x] for x in near or gpus)
                assert near or clients[gpu_of[chosen[gpu]]] <= fewest + 1
    one = runtime.nearest_replica(plan.phy2log[1], eplb_jax.Topology(G, R // G, nodes))
    np.testing.assert_array_equal(one, table[1])


def test_explicit_axes(plan):
    """`jax.make_mesh` makes them by default; arrays say how they lie, and keep it."""
    mesh = jax.make_mesh((8,), ("data",))
    layer = plan.layer(0)
    with jax.set_mesh(mesh):
        ids = jax.device_put(IDS, jax.NamedSharding(mesh, P("data")))
        for choice, given in choices(plan).items():
            wanted = runtime.to_physical(IDS, layer, choice, **given)
            slots = jax.jit(partial(runtime.to_physical, choice=choice))(ids, layer, **given)
            np.testing.assert_array_equal(slots, wanted)
            assert jax.typeof(slots).sharding.spec == P("data", None)
        load = jax.jit(runtime.expert_counts, static_argnums=1)(ids, E)
    np.testing.assert_array_equal(load, np.bincount(IDS.ravel(), minlength=E))


def test_no_new_plan_compiles_anything():
    plans = [eplb_jax.plan(lognormal(1, E, seed=s), TOPOLOGY, strategy="greedy") for s in range(3)]
    jitted = jax.jit(runtime.to_physical)
    for other in plans:
        jitted(IDS, other.layer(0))
    assert jitted._cache_size() == 1


def test_nothing_but_padding(plan):
    for choice, given in choices(plan).items():
        for ids in (np.full((3, 2), -1, np.int32), np.empty((0, 2), np.int32)):
            np.testing.assert_array_equal(
                runtime.to_physical(ids, plan.layer(0), choice, **given), ids
            )


def test_errors(plan):
    layer = plan.layer(0)
    for call, error, says in [
        (lambda: runtime.to_physical(IDS, layer, "best"), ValueError, "round_robin, token, random"),
        (lambda: runtime.to_physical(IDS, layer, "random"), ValueError, "'random' needs key="),
        (lambda: runtime.to_physical(IDS, layer, "nearest", gpu=0), ValueError, "needs table="),
        (lambda: runtime.to_physical(IDS, layer, "shares"), ValueError, "needs shares="),
        (lambda: runtime.to_physical(IDS, plan), ValueError, r"plan.layer\(i\)"),
        (lambda: runtime.to_physical(LOAD, layer), TypeError, "ids must be integers"),
        (
            lambda: runtime.to_physical(IDS[:, 0], layer),
            ValueError,
            r"shape \[tokens, k\], got \(400,",
        ),
        (
            lambda: runtime.nearest_replica(plan, eplb_jax.Topology(16, 2)),
            ValueError,
            "but the plan has 48 slots",
        ),
    ]:
        with pytest.raises(error, match=says):
            call()
    table = runtime.nearest_replica(plan, TOPOLOGY)
    for given, says in [
        ({"choice": "nearest", "table": table, "gpu": 0}, r"not \[32, GPUs\]"),
        ({"choice": "nearest", "table": table[0], "gpu": 8}, "gpu=8 is not one of 8 GPUs"),
        ({"choice": "shares", "shares": jnp.ones(E)}, "there are 48 slots"),
    ]:
        with pytest.raises(ValueError, match=says):
            runtime.to_physical(IDS, layer, **given)
    with pytest.raises(IndexError, match="layer 2 of a plan of 2 layers"):
        plan.layer(2)


def test_tokens_of_a_real_model_keep_the_promise():
    """Of gpt-oss-20b: per choice, the imbalance that its plan promises, and a little more."""
    with np.load(Path(__file__).parents[1] / "benchmarks" / "tokens.npz") as file:
        ids = np.moveaxis(file["ids"][:4096].astype(np.int32), 1, 0)
    load = np.stack([np.bincount(x.ravel(), minlength=32) for x in ids])
    plan = eplb_jax.plan(load, eplb_jax.Topology(8, 5), strategy="greedy")
    promised = metrics.balance(load, plan, eplb_jax.Topology(8, 5)).mean_imbalance
    more = {"round_robin": 0.001, "token": 0.02, "random": 0.03, "shares": 0.001}
    share = jnp.asarray(1 / np.take_along_axis(plan.logcnt, plan.phy2log, axis=1), jnp.float32)
    for choice, allowed in more.items():

        def route(ids, layer, shares, choice=choice):
            return runtime.to_physical(ids, layer, choice, key=jax.random.key(0), shares=shares)

        slots = np.asarray(jax.jit(jax.vmap(route))(ids, plan, share))
        sent = np.stack([np.bincount(x.ravel() // 5, minlength=8) for x in slots])
        got = metrics.balance_of(jnp.asarray(sent, jnp.float32)).mean_imbalance
        assert promised - 0.001 <= got <= promised + allowed
