"""Weights that follow plans over eight devices: where they lie, what moves, what is refused."""

import re
import warnings
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import eplb_jax
from eplb_jax import runtime
from tests.helpers import assert_bits, lognormal

L, E, R, G = 3, 32, 40, 8
TOPOLOGY = eplb_jax.Topology(G, R // G)
RNG = np.random.default_rng(0)
LOGICAL = {
    "up": RNG.normal(size=(L, E, 4, 6)).astype(np.float32),
    "bias": -np.zeros((L, E), np.float32),  # whose sign a sum would lose
}
MESHES = {
    "one axis": ((8,), ("expert",), "expert", None),
    "tensor parallel": (
        (4, 2),
        ("expert", "tensor"),
        "expert",
        {"up": P(None, "expert", None, "tensor"), "bias": None},
    ),
    "two axes as one": ((2, 4), ("data", "model"), ("data", "model"), None),
}


def plan_of(seed, num_experts=E, num_slots=R):
    load = lognormal(L, num_experts, seed=seed)
    return eplb_jax.plan(load, eplb_jax.Topology(G, num_slots // G), strategy="greedy")


def rows(logical, plan):
    """Where the plan says that they are."""
    return {k: x[np.arange(L)[:, None], np.asarray(plan.phy2log)] for k, x in logical.items()}


@pytest.fixture(scope="module")
def mesh():
    return jax.make_mesh((8,), ("expert",))


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("one axis", AxisType.Auto),
        ("tensor parallel", AxisType.Auto),
        ("tensor parallel", AxisType.Explicit),
        ("two axes as one", AxisType.Explicit),
    ],
)
def test_weights_are_where_the_plan_says(name, kind):
    shape, names, axis, specs = MESHES[name]
    mesh = jax.make_mesh(shape, names, axis_types=(kind,) * len(shape))
    plan, given = plan_of(0), {"mesh": mesh, "axis_name": axis, "specs": specs}
    read = runtime.to_slots(LOGICAL, plan, **given)
    sent = runtime.to_slots(jax.tree.map(jnp.asarray, LOGICAL), plan, **given)
    weights = sent
    for slots in (read, sent):
        assert_bits(slots, rows(LOGICAL, plan))
    for seed in (1, 2, 0):
        weights, plan = runtime.relocate(weights, plan, plan_of(seed), **given)
        assert_bits(weights, rows(LOGICAL, plan))
        assert weights["up"].sharding.is_equivalent_to(read["up"].sharding, 4)
    assert_bits(runtime.to_logical(weights, plan, **given), LOGICAL)


def test_no_new_plan_compiles_anything_and_weights_are_replaced_in_place(mesh, caplog):
    plan = jax.device_put(plan_of(0), NamedSharding(mesh, P()))
    weights = runtime.to_slots(LOGICAL, plan, mesh)
    move = jax.jit(partial(runtime.relocate, mesh=mesh), donate_argnums=0)
    with jax.log_compiles(), warnings.catch_warnings(), caplog.at_level("WARNING"):
        warnings.simplefilter("ignore")
        for seed in range(5):
            given = weights["up"]
            weights, plan = move(weights, plan, plan_of(seed))
            assert given.is_deleted()
    assert_bits(weights, rows(LOGICAL, plan_of(4)))
    assert caplog.text.count("Compiling jit(relocate)") == 1


def test_experts_that_do_not_divide_by_the_devices(mesh):
    logical = {"up": RNG.normal(size=(L, 36, 7)).astype(np.float32)}
    plan = plan_of(0, 36)
    slots = runtime.to_slots(jax.tree.map(jnp.asarray, logical), plan, mesh)
    assert_bits(slots, rows(logical, plan))
    assert slots["up"].sharding.spec[1] == "expert"
    assert_bits(runtime.to_logical(slots, plan, mesh), logical)


def test_numpy_leaves_stay_on_the_host(mesh, monkeypatch):
    """Beside a JAX leaf, too: whole tables of a checkpoint do not fit on one device."""
    plan, read = plan_of(0), []
    make = jax.make_array_from_callback
    monkeypatch.setattr(jax, "make_array_from_callback", lambda *x: read.append(x[0]) or make(*x))
    mixed = LOGICAL | {"bias": jnp.asarray(LOGICAL["bias"])}
    slots = runtime.to_slots(mixed, np.asarray(plan.phy2log), mesh)
    assert_bits(slots, rows(LOGICAL, plan))
    assert read == [(L, R, 4, 6)]


def test_foreign_maps(mesh):
    old, new = plan_of(0), plan_of(1)
    weights = runtime.to_slots(LOGICAL, old, mesh)
    moved, plan = runtime.relocate(weights, np.asarray(old.phy2log), new.phy2log.tolist(), mesh)
    assert_bits(moved, rows(LOGICAL, new))
    np.testing.assert_array_equal(plan.logcnt, new.logcnt)
    assert_bits(runtime.to_logical(moved, new.phy2log, mesh), LOGICAL)


def test_one_layer_and_permutations(mesh):
    old, new = plan_of(0, num_slots=E), plan_of(1, num_slots=E)
    layer = {k: x[1] for k, x in LOGICAL.items()}
    slots = runtime.to_slots(layer, old.layer(1), mesh)
    assert_bits(slots, {k: x[1] for k, x in rows(LOGICAL, old).items()})
    moved, plan = runtime.relocate(slots, old.layer(1), new.layer(1), mesh)
    assert_bits(moved, {k: x[1] for k, x in rows(LOGICAL, new).items()})
    np.testing.assert_array_equal(plan.phy2log, new.phy2log[1])
    assert_bits(runtime.to_logical(moved, plan, mesh), layer)


def test_select_layers(mesh):
    old, new = plan_of(0), plan_of(1)
    mixed = runtime.select_layers(old, new, jnp.array([False, True, False]))
    eplb_jax.check_placement(mixed)
    moved, _ = runtime.relocate(runtime.to_slots(LOGICAL, old, mesh), old, mixed, mesh)
    assert_bits(moved, rows(LOGICAL, mixed))


def hlo_of(old, new, mesh):
    weights = {"up": runtime.to_slots(LOGICAL, old, mesh)["up"]}
    move = jax.jit(partial(runtime.relocate, mesh=mesh))
    return move.lower(weights, old, new).compile().as_text()


def test_what_is_sent(mesh):
    """Two all-to-alls of one row a round; as many rounds as the busiest device needs."""
    old, new = plan_of(0), plan_of(1)
    text = hlo_of(old, new, mesh)
    collectives = re.findall(r"= (.*?) (all-[\w-]+|collective-permute|reduce-scatter)\(", text)
    assert [kind for _, kind in collectives] == ["all-to-all"] * 2
    row = LOGICAL["up"][0, 0].size
    for shape, _ in collectives:
        sizes = [
            np.prod([int(d) for d in x.split(",")]) for x in re.findall(r"f32\[([\d,]+)\]", shape)
        ]
        assert sum(sizes) == row
    moves = eplb_jax.moves(old, new, TOPOLOGY)
    received = np.asarray(moves.received)
    for layer in range(L):
        route = _route(old, new, layer)
        sends, fetches = (int(x) for x in route.rounds)
        assert fetches == received[layer].max()
        assert (np.asarray(route.receive) >= 0).sum() == received[layer].sum()
        # An expert is sent once however many want it; the busiest sends no more than copies do.
        wanted = {int(np.asarray(route.wanted)[g, s]) for g, s in _listed(route.receive)}
        assert (np.asarray(route.send) >= 0).sum() == len(wanted)
        assert sends <= np.asarray(moves.sent)[layer].max() + 2


def _route(old, new, layer):
    from eplb_jax.runtime.transport import route_of

    return route_of(old.phy2log[layer], new.phy2log[layer], E, G)


def _listed(slots):
    return [(g, s) for g, row in enumerate(np.asarray(slots)) for s in row if s >= 0]


def test_identity_moves_nothing(mesh):
    plan = plan_of(0)
    assert [int(x) for x in _route(plan, plan, 0).rounds] == [0, 0]
    weights = runtime.to_slots(LOGICAL, plan, mesh)
    assert_bits(runtime.relocate(weights, plan, plan, mesh).params, rows(LOGICAL, plan))


def broken_plans():
    """Plans that must not be followed, and what the refusal says."""
    plan = plan_of(1)
    lost = plan.phy2log.at[1].set(jnp.where(plan.phy2log[1] == 5, 6, plan.phy2log[1]))
    twice = plan.log2phy.at[2, 0, 0].set(plan.log2phy[2, 1, 0])
    return {
        "a lost expert": (plan._replace(phy2log=lost), "new is an invalid plan: .*layer 1"),
        "a slot that lies twice": (plan._replace(log2phy=twice), "layer 2 is not the inverse"),
        "wrong counts": (
            plan._replace(logcnt=plan.logcnt.at[0, 0].add(1)),
            "logcnt of layer 0 does not count",
        ),
        "no such expert": (plan._replace(phy2log=plan.phy2log.at[0, 0].set(E)), "outside 0..31"),
    }


@pytest.mark.parametrize("fault", broken_plans())
def test_faults_are_refused_before_anything_moves(mesh, fault):
    old, (new, says) = plan_of(0), broken_plans()[fault]
    weights = runtime.to_slots(LOGICAL, old, mesh)
    with pytest.raises(ValueError, match=says):
        runtime.relocate(weights, old, new, mesh)
    assert_bits(weights, rows(LOGICAL, old))
    # Where values are not concrete, the layer keeps its plan and its weights; others move.
    moved, plan = jax.jit(partial(runtime.relocate, mesh=mesh))(weights, old, new)
    eplb_jax.check_placement(plan)
    assert_bits(moved, rows(LOGICAL, plan))
    kept = [bool((plan.phy2log[x] == old.phy2log[x]).all()) for x in range(L)]
    assert sum(kept) == 1


def test_leaves_without_weights_and_odd_ones(mesh):
    old, new = plan_of(0), plan_of(1)
    odd = {
        "half": np.asarray(jnp.asarray(RNG.normal(size=(L, E, 5)), jnp.bfloat16)),
        "flags": RNG.integers(0, 2, (L, E, 3)).astype(bool),
        "eighth": np.asarray(jnp.asarray(RNG.normal(size=(L, E, 9)), jnp.float8_e4m3fn)),
        "empty": np.zeros((L, E, 0), np.float32),
    }
    slots = runtime.to_slots(odd | {"bias": None}, old, mesh)
    moved, _ = runtime.relocate(slots, old, new, mesh, specs=dict.fromkeys([*odd, "bias"]))
    assert moved.pop("bias") is None
    assert_bits(moved, rows(odd, new))


def test_layers_over_an_axis_are_refused():
    """Each device would have some of the layers, and take them for all."""
    mesh = jax.make_mesh((3, 2), ("pipe", "expert"), devices=jax.devices()[:6])
    slots = jax.device_put(np.ones((L, R)), NamedSharding(mesh, P("pipe", "expert")))
    with pytest.raises(ValueError, match=r"params is sharded as .*layers must not be sharded"):
        runtime.relocate(slots, plan_of(0), plan_of(1), mesh)


def test_errors(mesh):
    old, new = plan_of(0), plan_of(1)
    up = {"up": runtime.to_slots(LOGICAL, old, mesh)["up"]}
    elsewhere = jax.device_put(up["up"], NamedSharding(mesh, P()))
    mixed = jax.make_mesh((4, 2), ("expert", "tensor"))
    for call, error, says in [
        (
            lambda: runtime.relocate(up, np.ones((L, R)), new, mesh),
            TypeError,
            "old must hold integers",
        ),
        (
            lambda: runtime.relocate(up, old, plan_of(1, num_slots=48), mesh),
            ValueError,
            "phy2log of new",
        ),
        (
            lambda: runtime.relocate({"up": LOGICAL["up"]}, old, new, mesh),
            ValueError,
            r"params\['up'\]",
        ),
        (
            lambda: runtime.relocate(up, old, new, mesh, "slot"),
            ValueError,
            "axis_name='slot' is not an axis",
        ),
        (
            lambda: runtime.relocate(up, old, new, mixed, specs=P(None, "tensor")),
            ValueError,
            r"params\['up'\] is sharded as .*axis_name='expert'",
        ),
        (
            lambda: runtime.relocate(
                {"up": jnp.zeros((L, 6))},
                *(np.tile(np.arange(6), (L, 1)) for _ in range(2)),
                mesh,
            ),
            ValueError,
            "size of axis_name=8 does not divide slots=6",
        ),
    ]:
        with pytest.raises(error, match=says):
            call()
    with pytest.raises(ValueError, match="a bool for each layer"):
        runtime.select_layers(old, new, jnp.array([2]))
    # What lies on all devices alike is spread first.
    moved, _ = runtime.relocate({"up": elsewhere}, old, new, mesh)
    assert_bits(moved, {"up": rows(LOGICAL, new)["up"]})
