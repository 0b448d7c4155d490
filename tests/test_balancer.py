"""The loop of a running service."""

import eplb_torch
import jax
import numpy as np
import pytest
import torch

import eplb_jax
from eplb_jax import Topology, balancer, check_placement
from tests.helpers import QUICK, assert_same, lognormal

TOPOLOGY = Topology(8, slots=6)
LOAD = lognormal(4, 32) * 1000
OPTIONS = {"strategy": QUICK}


def windows(count, noise=0.05, seed=0):
    rng = np.random.default_rng(seed)
    return (LOAD * rng.lognormal(0, noise, (count, *LOAD.shape))).astype(np.float32)


def test_the_loop():
    service = balancer(TOPOLOGY, **OPTIONS)
    state = service.init(4, 32)
    np.testing.assert_array_equal(state.plan.phy2log, np.tile(np.arange(48) % 32, (4, 1)))
    nothing = service.propose(state)
    assert nothing.reasons() == ["no load"] * 4
    assert_same(nothing.plan, state.plan)
    history = eplb_jax.init_history(4, 32)
    for window in windows(3):
        state = service.observe(state, window)
        history = eplb_jax.update_history(history, window)
    assert int(state.age) == 3
    proposal = service.propose(state)
    expected = eplb_jax.plan(history, TOPOLOGY, previous=state.plan, **OPTIONS)
    assert_same(proposal.plan, expected)
    assert proposal.reasons() == ["better"] * 4
    assert_same(proposal.moves, eplb_jax.moves(state.plan, expected, TOPOLOGY))
    # Predicted times are those of the windows seen, in tokens of the most loaded GPU.
    for plan, time in ((state.plan, proposal.time_in_place), (expected, proposal.time)):
        loads = np.asarray(eplb_jax.metrics.gpu_loads(windows(3), plan, TOPOLOGY))
        np.testing.assert_allclose(time, loads.max(axis=2).mean(axis=0), rtol=0.02)
    gain = np.asarray(proposal.time_in_place - proposal.time)
    rate = gain / np.asarray(proposal.moves.received).sum(axis=1)
    assert np.all(np.diff(rate[np.asarray(proposal.order)]) <= 0)

    first = np.asarray(proposal.order)[:2]
    some = service.commit(state, proposal, np.isin(np.arange(4), first))
    check_placement(some.plan)
    again = service.propose(some)
    changed = np.asarray(again.moves.received).sum(axis=1)
    assert changed[first].sum() < changed.sum() / 4
    done = service.commit(some, again)
    assert int(done.age) == 0
    for _ in range(6):  # a layer may take several steps
        last, done = done, service.commit(done, service.propose(done))
    assert service.propose(done).reasons() == ["near enough"] * 4
    assert_same(last.plan, done.plan)


def test_states_under_jit_compile_once_and_are_those_of_direct_calls():
    service = balancer(TOPOLOGY, elastic=True, steps_per_window=2, **OPTIONS)
    observe, propose = jax.jit(service.observe), jax.jit(service.propose)
    state = direct = service.init(4, 32)
    for step, window in enumerate(windows(6)):
        active = np.arange(8) != step
        state, direct = observe(state, window), service.observe(direct, window)
        assert_same(jax.tree.leaves(state), jax.tree.leaves(direct))
        ours, theirs = propose(state, active=active), service.propose(direct, active=active)
        assert_same(ours.plan, theirs.plan)
        np.testing.assert_array_equal(ours.verdict, theirs.verdict)
        assert np.all(np.asarray(ours.plan.phy2log).reshape(4, 8, 6)[:, step] == -1)
        state, direct = (service.commit(x, y) for x, y in ((state, ours), (direct, theirs)))
    assert int(state.age) == 0
    assert propose._cache_size() == observe._cache_size() == 1
    assert "lost experts" in ours.reasons()


def test_saved_states_and_another_topology(tmp_path):
    service = balancer(TOPOLOGY, **OPTIONS)
    state = service.init(4, 32)
    for window in windows(3):
        state = service.observe(state, window)
    state = service.commit(state, service.propose(state))
    eplb_jax.save_balancer(tmp_path / "state.npz", state)
    loaded = eplb_jax.load_balancer(tmp_path / "state.npz")
    assert_same(jax.tree.leaves(loaded), jax.tree.leaves(state))
    eplb_jax.save_history(tmp_path / "history.npz", state.history)
    with pytest.raises(ValueError, match="no whole state of a balancer"):
        eplb_jax.load_balancer(tmp_path / "history.npz")
    before = np.asarray(state.plan.phy2log).reshape(4, 8, 6)
    left, kept = (0, 1, 2, 4, 5, 6, 7), {"plan": loaded.plan, "history": loaded.history}
    smaller = balancer(Topology(7, slots=6), elastic=True, **OPTIONS)
    moved = smaller.init(4, 32, previous_gpus=left, **kept).plan.phy2log
    np.testing.assert_array_equal(np.asarray(moved).reshape(4, 7, 6), before[:, list(left)])
    exchanged = balancer(TOPOLOGY, elastic=True, **OPTIONS)  # a GPU leaves, a new one comes
    proposal = exchanged.propose(exchanged.init(4, 32, previous_gpus=(*left, -1), **kept))
    check_placement(proposal.plan)
    after = np.asarray(proposal.plan.phy2log).reshape(4, 8, 6)
    assert np.mean(after[:, :7] == before[:, list(left)]) > 0.6
    with pytest.raises(ValueError, match="plan lacks an expert in a layer; nearest: elastic=True"):
        balancer(Topology(7, slots=6)).init(4, 32, plan=loaded.plan, previous_gpus=left)
    with pytest.raises(ValueError, match="active needs a balancer with elastic=True"):
        service.propose(state, active=np.ones(8, bool))
    with pytest.raises(ValueError, match=r"history has the shape \(4, 32\), not \(5, 32\)"):
        service.init(5, 32, history=loaded.history)


def test_the_same_for_torch():
    service = eplb_torch.Balancer(4, 32, TOPOLOGY, elastic=True, **OPTIONS)
    plain = balancer(TOPOLOGY, elastic=True, **OPTIONS)
    state = plain.init(4, 32)
    active = torch.arange(8) != 3
    for window in windows(2):
        service.observe(torch.from_numpy(window))
        state = plain.observe(state, window)
    proposal = service.propose(active=active)
    expected = plain.propose(state, active=active.numpy())
    assert_same(proposal.plan, expected.plan)
    phy2log, log2phy, logcnt = service.commit(proposal)
    assert phy2log.dtype == log2phy.dtype == logcnt.dtype == torch.int64
    np.testing.assert_array_equal(phy2log, expected.plan.phy2log)
    copy = eplb_torch.Balancer(4, 32, TOPOLOGY, elastic=True, **OPTIONS)
    copy.load_state_dict(service.state_dict())
    assert torch.equal(copy.plan[1], service.plan[1])
    assert_same(copy.propose().plan, service.propose().plan)
    other = eplb_torch.Balancer(5, 32, TOPOLOGY)
    with pytest.raises(ValueError, match="state must have the shapes"):
        other.load_state_dict(service.state_dict())
    with pytest.raises(ValueError, match="is nan"):
        service.observe(torch.full((4, 32), float("nan")))
