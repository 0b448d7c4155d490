"""The contract of vLLM, on stubs; `test_peers.py` runs vLLM itself."""

import threading
from importlib.metadata import entry_points

import eplb_torch
import numpy as np
import pytest
import torch
from eplb_torch import sglang, vllm

import eplb_jax
from tests import torch_oracle
from tests.engines import COUNTS, LOAD, modules


class NewContract:
    @classmethod
    def rebalance_experts(
        cls, weight, num_replicas, num_groups, num_nodes, num_ranks, old=None
    ) -> torch.Tensor:
        raise NotImplementedError


class OldContract:
    @classmethod
    def rebalance_experts(
        cls, weight, num_replicas, num_groups, num_nodes, num_ranks
    ) -> "tuple[torch.Tensor, torch.Tensor, torch.Tensor]":
        raise NotImplementedError


@pytest.fixture
def policies(monkeypatch):
    policies = {"default": NewContract}
    modules(monkeypatch, vllm__distributed__eplb__policy={"EPLB_POLICIES": policies})
    monkeypatch.delenv(vllm.VARIABLE, raising=False)
    return policies


def test_vllm_loads_the_plugin_by_its_entry_point(policies, monkeypatch):
    (plugin,) = (x for x in entry_points(group="vllm.general_plugins") if x.name == "eplb_torch")
    register = plugin.load()
    for value in ("", "0"):
        monkeypatch.setenv(vllm.VARIABLE, value)
        register()
        assert policies == {"default": NewContract}
    monkeypatch.setenv(vllm.VARIABLE, "1")
    register()
    assert issubclass(policies["default"], vllm.EplbPolicy)
    assert list(policies) == ["default"]
    monkeypatch.setenv(vllm.VARIABLE, "fastest")
    with pytest.raises(ValueError, match=r"EPLB_TORCH_VLLM=fastest: .* choose one of: auto"):
        register()


def test_vllm_calls_by_position_from_a_thread(policies, monkeypatch):
    monkeypatch.setenv(vllm.VARIABLE, "1")
    vllm.register()
    old = torch.arange(48).expand(3, 48) % 32
    plans = []
    thread = threading.Thread(
        target=lambda: plans.append(policies["default"].rebalance_experts(LOAD, *COUNTS, old))
    )
    thread.start()
    thread.join()
    (plan,) = plans
    assert plan.shape == (3, 48)
    assert plan.dtype == torch.int64
    assert plan.device.type == "cpu"
    seen = eplb_jax.update_history(eplb_jax.init_history(3, 32), LOAD.numpy())
    assert torch.equal(plan, eplb_torch.rebalance_experts(seen, *COUNTS, previous=old)[0])
    alone = eplb_torch.rebalance_experts(LOAD, *COUNTS)[0]
    assert (plan == old).sum() > (alone == old).sum()
    assert torch.equal(plan, vllm.EplbPolicy.rebalance_experts(LOAD, *COUNTS, old))


def test_vllm_scales_up_and_down(policies):
    """New columns are -1 when ranks join, and the old map is wider when they leave."""
    vllm.install()
    plan = policies["default"].rebalance_experts
    old = torch.from_numpy(np.array(eplb_jax.rebalance_experts(LOAD.numpy(), *COUNTS).phy2log))
    grown = torch.cat([old, torch.full((3, 12), -1)], dim=1)
    up = plan(LOAD, 60, 4, 1, 10, grown)
    down = plan(LOAD, 36, 4, 1, 6, old.long())
    for new, width in ((up, 48), (down, 36)):
        eplb_jax.check_placement(eplb_jax.placement_of(new.numpy(), 32))
        assert (new[:, :width] == old[:, :width]).float().mean() > 0.4
    lost = torch.where(old == 5, -1, old)  # as after a fault
    new = plan(LOAD, *COUNTS, lost)
    eplb_jax.check_placement(eplb_jax.placement_of(new.numpy(), 32))
    assert (new == old).float().mean() > 0.7


def test_vllm_keeps_the_old_map_where_the_load_says_nothing(caplog):
    old = torch.arange(48).expand(3, 48) % 32
    assert torch.equal(vllm.EplbPolicy.rebalance_experts(0 * LOAD, *COUNTS, old), old)
    assert "old map stays" not in caplog.text
    broken = LOAD.clone()
    broken[1, 3] = float("nan")
    assert torch.equal(vllm.EplbPolicy.rebalance_experts(broken, *COUNTS, old), old)
    assert "the old map stays: weight at layer 1, expert 3 is nan" in caplog.text
    with pytest.raises(ValueError, match="is nan"):
        vllm.EplbPolicy.rebalance_experts(broken, *COUNTS)


def test_vllm_remembers_between_calls_until_ranks_change(policies, monkeypatch):
    monkeypatch.setenv("EPLB_TORCH_MAX_MOVES", "7")
    monkeypatch.setenv("EPLB_TORCH_STRATEGY", "fast")
    vllm.install()
    assert policies["default"].strategy == "fast"
    monkeypatch.setenv("EPLB_TORCH_STRATEGY", "auto")
    vllm.install()
    policy = policies["default"]
    assert (policy.strategy, policy.max_moves, policy.remember) == ("auto", 7, True)
    old = torch.arange(48).expand(3, 48) % 32
    loads = [LOAD, LOAD.flip(1), LOAD.roll(5, 1)]
    plans = [policy.rebalance_experts(x, *COUNTS, old) for x in loads]
    history = eplb_jax.init_history(3, 32)
    for load, plan in zip(loads, plans, strict=True):
        history = eplb_jax.update_history(history, load.numpy())
        options = {"previous": old, "max_moves": 7}
        assert torch.equal(plan, eplb_torch.rebalance_experts(history, *COUNTS, **options)[0])
    fewer = policy.rebalance_experts(LOAD, 36, 4, 1, 6, old)
    vllm.install()
    assert torch.equal(policies["default"].rebalance_experts(LOAD, 36, 4, 1, 6, old), fewer)
    monkeypatch.setenv("EPLB_TORCH_REMEMBER", "0")
    vllm.install()
    assert not policies["default"].remember
    for name, value in (("TOLERANCE", "-1"), ("REMEMBER", "perhaps"), ("MAX_MOVES", "2.5")):
        monkeypatch.setenv(f"EPLB_TORCH_{name}", value)
        with pytest.raises(ValueError, match=f"EPLB_TORCH_{name}={value} is no"):
            vllm.install()
        monkeypatch.delenv(f"EPLB_TORCH_{name}")


def test_vllm_moves_no_more_than_it_is_told(policies):
    old = torch.arange(48).expand(3, 48) % 32
    topology = eplb_jax.Topology.of_replicas(48, 8, 2, 4)
    for most in (0, 5):
        vllm.install(max_moves=most)
        plan = policies["default"].rebalance_experts(LOAD, *COUNTS, old)
        received = eplb_jax.moves(old.numpy(), plan.numpy(), topology).received
        assert most - 1 <= received.sum(axis=1).max() <= most
    with pytest.raises(ValueError, match="max_moves=-1 is negative; nearest: 0"):
        vllm.install(max_moves=-1)
    with pytest.raises(TypeError, match=r"max_moves must be a whole number, got 1\.5"):
        vllm.install(max_moves=1.5)


@pytest.mark.parametrize(
    "as_old", [lambda x: x.to(torch.uint16), lambda x: x.int(), lambda x: x.tolist()]
)
def test_vllm_takes_an_old_map_of_any_integers(as_old):
    old = torch.arange(48).expand(3, 48) % 32
    expected = vllm.EplbPolicy.rebalance_experts(LOAD, *COUNTS, old)
    assert torch.equal(vllm.EplbPolicy.rebalance_experts(LOAD, *COUNTS, as_old(old)), expected)


def test_a_stage_without_layers():
    none, old = torch.zeros(0, 32), torch.zeros(0, 48, dtype=torch.int64)
    for arguments in ((), (old,)):
        plan = vllm.EplbPolicy.rebalance_experts(none, *COUNTS, *arguments)
        assert plan.shape == (0, 48)
    maps = sglang.rebalance_experts(torch.zeros(5, 0, 32), 48, 6, 4, 2, "deepseek_hierarchical")
    assert maps[0].shape == (0, 48)


def test_vllm_of_an_older_release_gets_three_maps(policies):
    policies["default"] = OldContract
    vllm.install("greedy")
    maps = policies["default"].rebalance_experts(LOAD, *COUNTS)
    expected = torch_oracle.rebalance_experts(LOAD, *COUNTS)
    assert all(torch.equal(x, y) for x, y in zip(maps, expected, strict=True))
    vllm.install("greedy")  # what was read off vLLM's own policy is kept
    assert len(policies["default"].rebalance_experts(LOAD, *COUNTS)) == 3


def test_a_subclass_has_its_own_options():
    class Greedy(vllm.EplbPolicy):
        strategy = "greedy"
        all_maps = True

    expected = torch_oracle.rebalance_experts(LOAD, *COUNTS)
    maps = Greedy.rebalance_experts(LOAD, *COUNTS)
    assert all(torch.equal(x, y) for x, y in zip(maps, expected, strict=True))
