"""The flexible split on tensors, against that of `eplb_jax`."""

import eplb_torch as eplb
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from eplb_torch import splitting
from torch.utils._python_dispatch import TorchDispatchMode

import eplb_jax
from eplb_jax import Topology, runtime
from tests.helpers import lognormal

E, R, G = 16, 24, 4
PLANS = eplb_jax.plan(lognormal(3, E, seed=1), Topology(G, slots=R // G), strategy="greedy")
PHY2LOG = np.array(PLANS.phy2log)
TOKENS = (100 * lognormal(3, E)).astype(np.int32)


def step(ids, plan):
    """What an engine does in every step of a layer."""
    load = eplb.expert_counts(ids, plan.num_experts)
    shares = eplb.split_load(load, plan, steps=2)
    quotas = eplb.quotas(load, plan, shares)
    return eplb.to_physical(ids, plan, quotas), shares, quotas


def routed(load, seed=0):
    """Ids of these loads in random order, [tokens, 1]."""
    ids = np.repeat(np.arange(len(load)), load)
    return torch.from_numpy(np.random.default_rng(seed).permutation(ids)[:, None])


def gathered(values, base, key, entries):
    """The sums of a GPU."""
    return (base + splitting.pick_entries(values, entries).sum(-1)).gather(-1, key)


def cases():
    crowd = np.r_[np.arange(64), np.zeros(40), np.ones(24)].astype(np.int64)
    loads = np.ones((4, E), np.float32)
    loads[0], loads[1], loads[2] = 0, np.arange(E) == 5, 3e38
    loads[3, ::2] = 0
    odd = lognormal(3, E)
    odd[0, 2], odd[1, 3] = np.nan, -1
    return {
        "tokens": (TOKENS, PHY2LOG, G),
        "one layer": (TOKENS[0], PHY2LOG[0], G),
        "hard loads": (loads, PHY2LOG[[0, 1, 2, 0]], G),
        "invalid loads": (odd, PHY2LOG, G),
        "41 and 25 replicas": (lognormal(1, 64), crowd[None], 8),
        "no spare slots": (lognormal(2, E), np.arange(E)[None].repeat(2, 0), G),
        "one expert": (np.ones((1, 1), np.float32), np.zeros((1, 4), np.int64), 2),
    }


@pytest.mark.parametrize("sums", [splitting._add_by_key, gathered])
@pytest.mark.parametrize("case", cases())
def test_the_shares_of_jax(case, sums, monkeypatch):
    monkeypatch.setattr(splitting, "_add_by_key", sums)
    load, phy2log, num_gpus = cases()[case]
    plan = eplb.prepare_split(phy2log, load.shape[-1], num_gpus)
    topology = Topology.of_replicas(phy2log.shape[-1], num_gpus)
    placed = eplb_jax.placement_of(phy2log, load.shape[-1])
    valid = np.nan_to_num(np.maximum(load, 0))
    for steps in (1, 32):
        ours = eplb.split_load(torch.from_numpy(load), plan, steps=steps)
        theirs = runtime.split_load(valid, placed, topology, steps=steps)
        assert ours.dtype == torch.float32
        np.testing.assert_allclose(ours, theirs, atol=1e-4)
    start = np.random.default_rng(0).random(phy2log.shape).astype(np.float32)
    ours = eplb.split_load(torch.from_numpy(load), plan, steps=1, start=torch.from_numpy(start))
    theirs = runtime.split_load(valid, placed, topology, steps=1, start=start)
    np.testing.assert_allclose(ours, theirs, atol=1e-4)


def test_infinite_loads():
    load = torch.from_numpy(lognormal(3, E))
    load[0, 2] = load[1, :5] = torch.inf
    shares = eplb.split_load(load, eplb.prepare_split(PHY2LOG, E, G))
    total = torch.zeros(3, E).scatter_add(1, torch.from_numpy(PHY2LOG).long(), shares)
    np.testing.assert_allclose(total, 1, rtol=1e-5)


def test_a_start_saves_steps():
    load, later = lognormal(3, E), lognormal(3, E) * lognormal(3, E, sigma=0.02, seed=3)
    plan = eplb.prepare_split(PHY2LOG, E, G)

    def largest(shares):
        loads = np.take_along_axis(later, PHY2LOG, axis=1) * shares.numpy()
        return loads.reshape(3, G, -1).sum(axis=2).max(axis=1)

    later_tensor = torch.from_numpy(later)
    start = eplb.split_load(torch.from_numpy(load), plan)
    best = largest(eplb.split_load(later_tensor, plan, steps=200))
    warm = largest(eplb.split_load(later_tensor, plan, steps=2, start=start))
    cold = largest(eplb.split_load(later_tensor, plan, steps=2))
    assert np.all(warm < best * 1.01)
    assert np.mean(warm) < np.mean(cold)
    again = eplb.split_load(later_tensor, plan, start=torch.zeros(3, R))
    np.testing.assert_allclose(largest(again), best, rtol=5e-3)


@pytest.mark.parametrize("case", ["tokens", "one layer", "41 and 25 replicas", "no spare slots"])
def test_the_quotas_of_jax(case):
    rng = np.random.default_rng(0)
    load, phy2log, num_gpus = cases()[case]
    load = np.array(rng.integers(0, 100_000, load.shape), np.int32)
    load[..., :3] = 0, 1, 2**31 - 1
    shares = rng.dirichlet(np.ones(3), phy2log.shape)[..., 0].astype(np.float32)
    shares *= rng.random(phy2log.shape) < 0.6
    plan = eplb.prepare_split(phy2log, load.shape[-1], num_gpus)
    ours = eplb.quotas(torch.from_numpy(load), plan, torch.from_numpy(shares))
    placed = eplb_jax.placement_of(phy2log, load.shape[-1])
    for mine, theirs in zip(ours, runtime.quotas(load, placed, jnp.asarray(shares)), strict=True):
        assert mine.dtype == torch.int32
        np.testing.assert_array_equal(mine, theirs)


@pytest.mark.parametrize("dtype", [torch.int16, torch.int32, torch.int64])
def test_every_slot_gets_its_quota(dtype):
    plan = eplb.prepare_split(PHY2LOG, E, G)
    for layer in range(3):
        ids = torch.cat([routed(TOKENS[layer]), torch.tensor([[-1], [E]])]).to(dtype)
        slots, _, quotas = step(ids, plan.layer(layer))
        assert slots.shape == ids.shape
        assert slots.dtype == dtype
        assert slots[-2:].tolist() == [[-1], [-1]]
        slots, expert = slots[:-2, 0].long(), ids[:-2, 0].long()
        assert torch.equal(torch.from_numpy(PHY2LOG[layer])[slots], expert)
        assert torch.equal(torch.bincount(slots, minlength=R), quotas.tokens.long())
        for one in range(E):  # tokens come in the order of first tokens
            assert (quotas.first[slots[expert == one]].diff() >= 0).all()


def test_gpus_that_number_tokens_together_fill_the_quotas():
    plan = eplb.prepare_split(PHY2LOG[0], E, G)
    parts = routed(TOKENS[0]).tensor_split(3)
    counts = torch.stack([eplb.expert_counts(x, E) for x in parts])
    load = counts.sum(0)
    quotas = eplb.quotas(load, plan, eplb.split_load(load, plan))
    before = counts.cumsum(0) - counts
    slots = [
        eplb.to_physical(x, plan, quotas, before=y) for x, y in zip(parts, before, strict=True)
    ]
    assert torch.equal(torch.cat(slots).flatten().bincount(minlength=R), quotas.tokens.long())


def test_tokens_past_the_quotas_stay_with_their_expert():
    plan, ids = eplb.prepare_split(PHY2LOG[0], E, G), routed(TOKENS[0])
    none = torch.zeros(R, dtype=torch.int32)
    slots = eplb.to_physical(ids, plan, eplb.Quotas(none, none))
    assert torch.equal(torch.from_numpy(PHY2LOG[0])[slots], ids)


def test_empty_slots_get_nothing():
    phy2log = np.concatenate([PHY2LOG, np.full((3, R // G), -1)], axis=1)
    plan, load = eplb.prepare_split(phy2log, E, G + 1), torch.from_numpy(TOKENS)
    shares = eplb.split_load(load, plan)
    tokens, first = eplb.quotas(load, plan, shares)
    assert not shares[:, R:].any()
    assert not tokens[:, R:].any()
    assert not first[:, R:].any()
    assert torch.equal(tokens.sum(1), load.sum(1))
    ids = routed(TOKENS[0])
    slots = step(ids, plan.layer(0))[0]
    assert torch.equal(torch.from_numpy(PHY2LOG[0])[slots], ids)


def test_update_writes_into_the_same_memory():
    with torch.inference_mode():
        plan = eplb.prepare_split(PHY2LOG[:2], E, G, max_replicas=9)
    layer, ids = plan.layer(1), routed(TOKENS[0])
    plan.update(torch.from_numpy(PHY2LOG[1:]))
    fresh = eplb.prepare_split(PHY2LOG[1:], E, G, max_replicas=9)
    for mine, other in zip(plan[:-1], fresh[:-1], strict=True):
        assert torch.equal(mine, other)
    wide = step(ids, eplb.prepare_split(PHY2LOG[2], E, G))
    for mine, other in zip(step(ids, layer)[1:], wide[1:], strict=True):
        np.testing.assert_array_equal(np.stack(mine), np.stack(other))


class NoSync(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func.overloadpacket.__name__ not in {
            *("_local_scalar_dense", "nonzero", "masked_select", "unique_dim", "bincount"),
            *("is_nonzero", "equal", "_unique2"),
        }
        return func(*args, **(kwargs or {}))


def test_nothing_waits_for_the_device():
    plan, ids = eplb.prepare_split(PHY2LOG[0], E, G), routed(TOKENS[0])
    with NoSync():
        step(ids, plan)


def test_shapes_and_devices_without_values():
    """Meta tensors take the sums of a GPU, and raise where a value is asked for."""
    plan = eplb.prepare_split(PHY2LOG[0], E, G, device="meta")
    ids = torch.empty((9, 2), dtype=torch.int32, device="meta")
    slots, shares, quotas = step(ids, plan)
    assert (slots.shape, shares.shape, quotas.first.shape) == ((9, 2), (R,), (R,))
    assert slots.is_meta
    assert shares.is_meta


def test_compiles_as_one_graph():
    plan, ids = eplb.prepare_split(PHY2LOG[0], E, G), routed(TOKENS[0])
    compiled = torch.compile(step, fullgraph=True, backend="eager")
    for phy2log in PHY2LOG:
        plan.update(phy2log)
        for mine, other in zip(compiled(ids, plan), step(ids, plan), strict=True):
            np.testing.assert_array_equal(np.stack(tuple(mine)), np.stack(tuple(other)))


def test_bad_arguments():
    plan, load = eplb.prepare_split(PHY2LOG, E, G), torch.from_numpy(TOKENS)
    shares = torch.ones(3, R)
    stray = PHY2LOG.copy()
    stray[1, 2] = 77
    for call, error, says in [
        (lambda: eplb.prepare_split(PHY2LOG, E, 5), ValueError, "num_gpus=5 .* 24 slots; 4 does"),
        (lambda: eplb.prepare_split(PHY2LOG, 25, G), ValueError, "num_experts=25.*at most 24"),
        (lambda: eplb.prepare_split(PHY2LOG, E, 0), ValueError, "num_gpus=0; use at least 1"),
        (lambda: eplb.prepare_split(PHY2LOG, 16.0, G), TypeError, "num_experts must be an int"),
        (
            lambda: eplb.prepare_split(PHY2LOG, 17, G),
            ValueError,
            "no slot for expert 16 in layer 0",
        ),
        (lambda: eplb.prepare_split(stray, E, G), ValueError, "layer 1, slot 2 is 77; .* 0 to 15"),
        (lambda: eplb.prepare_split(load / 2, E, G), TypeError, "phy2log must hold integers"),
        (lambda: eplb.prepare_split(PHY2LOG[None], E, G), ValueError, r"\[L, R\] or \[R\]"),
        (
            lambda: eplb.prepare_split(PHY2LOG, E, G, max_replicas=1),
            ValueError,
            "max_replicas=1, .* use at least",
        ),
        (lambda: plan.update(PHY2LOG[0]), ValueError, r"shape \(24,\); that of the plan is"),
        (lambda: eplb.split_load(load[0], plan), ValueError, r"load .* the plan wants \(3, 16\)"),
        (lambda: eplb.split_load(load, plan, steps=-1), ValueError, "steps=-1"),
        (lambda: eplb.split_load(load, plan, start=load), ValueError, "start has the shape"),
        (lambda: eplb.quotas(load / 2, plan, shares), TypeError, "load must hold integers"),
        (lambda: eplb.quotas(load, plan, shares[0]), ValueError, "shares has the shape"),
        (
            lambda: eplb.to_physical(load, plan, eplb.quotas(load, plan, shares)),
            ValueError,
            r"plan has 3 layers; give one: plan.layer\(i\)",
        ),
    ]:
        with pytest.raises(error, match=says):
            call()
