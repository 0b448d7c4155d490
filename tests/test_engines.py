"""The contracts of vLLM and SGLang, on stubs and, in the test marked `peers`, on SGLang itself.

`make peers` installs SGLang's Python files without their dependencies and runs that test.
"""

import enum
import sys
import threading
import types
from importlib.metadata import entry_points
from pathlib import Path

import eplb_torch
import numpy as np
import pytest
import torch
from eplb_torch import sglang, vllm

import eplb_jax
from tests import torch_oracle
from tests.helpers import QUICK, lognormal

COUNTS = 48, 4, 2, 8
LOAD = torch.from_numpy(lognormal(3, 32))
PEERS = Path(sys.prefix) / "peers"


def modules(monkeypatch, **contents):
    """Stub modules and their parent packages, for the length of a test."""
    for name, values in contents.items():
        parts = name.split("__")
        for i in range(1, len(parts) + 1):
            module = types.ModuleType(".".join(parts[:i]))
            module.__path__ = []
            monkeypatch.setitem(sys.modules, module.__name__, module)
            if i > 1:
                setattr(sys.modules[".".join(parts[: i - 1])], parts[i - 1], module)
        module.__dict__.update(values)
    return module


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
    assert torch.equal(plan, eplb_torch.rebalance_experts(LOAD, *COUNTS, previous=old)[0])
    alone = eplb_torch.rebalance_experts(LOAD, *COUNTS)[0]
    assert (plan == old).sum() > (alone == old).sum()
    assert torch.equal(plan, vllm.EplbPolicy.rebalance_experts(LOAD, *COUNTS, old))


def test_vllm_scales_up_and_down():
    """New columns are -1 when ranks join, and the old map is wider when they leave."""
    old = torch.from_numpy(np.array(eplb_jax.rebalance_experts(LOAD.numpy(), *COUNTS).phy2log))
    grown = torch.cat([old, torch.full((3, 12), -1)], dim=1)
    up = vllm.EplbPolicy.rebalance_experts(LOAD, 60, 4, 1, 10, grown)
    down = vllm.EplbPolicy.rebalance_experts(LOAD, 36, 4, 1, 6, old.long())
    for new, width in ((up, 48), (down, 36)):
        eplb_jax.check_placement(eplb_jax.placement_of(new.numpy(), 32))
        assert (new[:, :width] == old[:, :width]).float().mean() > 0.4
    lost = torch.where(old == 5, -1, old)  # as after a fault
    new = vllm.EplbPolicy.rebalance_experts(LOAD, *COUNTS, lost)
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
    monkeypatch.setenv("EPLB_TORCH_STRATEGY", "fast")
    monkeypatch.setenv("EPLB_TORCH_MAX_MOVES", "7")
    vllm.install()
    policy = policies["default"]
    assert (policy.strategy, policy.max_moves, policy.remember) == ("fast", 7, True)
    old = torch.arange(48).expand(3, 48) % 32
    loads = [LOAD, LOAD.flip(1), LOAD.roll(5, 1)]
    plans = [policy.rebalance_experts(x, *COUNTS, old) for x in loads]
    history = eplb_jax.init_history(3, 32)
    for load, plan in zip(loads, plans, strict=True):
        history = eplb_jax.update_history(history, load.numpy())
        options = {"previous": old, "max_moves": 7, "strategy": "fast"}
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
        vllm.install(QUICK, max_moves=most)
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


Algorithm = enum.Enum(
    "Algorithm", "deepseek deepseek_hierarchical deepseek_vec_hierarchical elasticity_aware"
)


@pytest.mark.parametrize("algorithm", [Algorithm.deepseek, "deepseek_vec"])
@pytest.mark.parametrize("groups", [None, 4])
def test_sglang_global(algorithm, groups):
    counts = torch.randint(0, 2**20, (5, 3, 32), dtype=torch.int32)
    maps = sglang.rebalance_experts(counts, 48, 6, groups, 2, algorithm, strategy=QUICK)
    expected = eplb_torch.rebalance_experts(counts, 48, 1, 1, 8, policy="global", strategy=QUICK)
    assert all(torch.equal(x, y) for x, y in zip(maps, expected, strict=True))
    maps = sglang.rebalance_experts(counts, 48, 6, groups, 2, algorithm, strategy="greedy")
    expected = torch_oracle.rebalance_experts(counts.sum(0), 48, 1, 1, 8)
    assert all(torch.equal(x, y) for x, y in zip(maps, expected, strict=True))


@pytest.mark.parametrize(
    "algorithm", [Algorithm.deepseek_vec_hierarchical, "deepseek_hierarchical"]
)
@pytest.mark.parametrize("dtype", [torch.int64, torch.float16])
def test_sglang_hierarchical(algorithm, dtype):
    steps = (LOAD.expand(9, 3, 32) * 1000).to(dtype)
    maps = sglang.rebalance_experts(
        tokens_per_expert=steps,
        num_physical_experts=48,
        num_local_physical_experts=6,
        num_groups=4,
        num_nodes=2,
        algorithm=algorithm,
        strategy=QUICK,
    )
    options = {"policy": "hierarchical", "strategy": QUICK}
    expected = eplb_torch.rebalance_experts(steps.double(), *COUNTS, **options)
    assert all(torch.equal(x, y) for x, y in zip(maps, expected, strict=True))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((48, 5, 4, 2, "deepseek"), "num_local_physical_experts=5 does not divide"),
        ((48, 6, None, 2, "deepseek_hierarchical"), "needs num_groups, got None"),
        ((48, 6, 4, 2, None), "algorithm=None is not supported"),
    ],
)
def test_sglang_bad_input_is_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        sglang.rebalance_experts(LOAD, *arguments)


def test_sglang_refuses_complex_loads():
    with pytest.raises(TypeError, match="must hold real numbers, got dtype complex64"):
        sglang.rebalance_experts(torch.ones(2, 3, 32).to(torch.complex64), 48, 6, 4, 2, "deepseek")


def test_sglang_install(monkeypatch):
    eplb = modules(monkeypatch, sglang__srt__eplb={})
    eplb.eplb_algorithms = types.SimpleNamespace(rebalance_experts=None)
    for _ in range(2):  # the second finds the first in place
        sglang.install("greedy")
        call = eplb.eplb_algorithms.rebalance_experts
        expected = torch_oracle.rebalance_experts(LOAD, *COUNTS)
        maps = call(LOAD, 48, 6, 4, 2, algorithm=Algorithm.deepseek_hierarchical)
        assert all(torch.equal(x, y) for x, y in zip(maps, expected, strict=True))


def test_sglang_with_dead_ranks(monkeypatch):
    """The mask is as long as the capacity, and slots of dead ranks hold expert 0, unlisted."""
    active = torch.tensor([1, 1, 0, 1, 1, 1, 1, 1, 0, 0], dtype=torch.int32)
    state = types.SimpleNamespace(active_ranks=active)
    manager = types.SimpleNamespace(instance=lambda: state)
    eplb = modules(monkeypatch, sglang__srt__eplb={})
    eplb.eplb_algorithms = types.SimpleNamespace(rebalance_experts=None)
    elastic = modules(monkeypatch, sglang__srt__elastic_ep={})
    elastic.elastic_ep = types.SimpleNamespace(ElasticEPStateManager=manager)
    sglang.install(QUICK)
    call = eplb.eplb_algorithms.rebalance_experts
    before, *_ = call(LOAD, 48, 6, 4, 2, Algorithm.deepseek)
    phy2log, log2phy, logcnt = call(LOAD, 48, 6, 4, 2, Algorithm.elasticity_aware)
    dead = torch.arange(48) // 6 == 2
    assert torch.all(phy2log[:, dead] == 0)
    assert not torch.isin(log2phy, torch.arange(12, 18)).any()
    assert torch.all(logcnt.sum(dim=1) == 42)
    assert torch.all(logcnt >= 1)
    assert (phy2log == before)[:, ~dead].float().mean() > 0.6  # the plan that was returned last
    state.active_ranks = torch.ones(8, dtype=torch.int32)
    back, _, logcnt = call(LOAD, 48, 6, 4, 2, Algorithm.elasticity_aware)
    assert torch.all(logcnt.sum(dim=1) == 48)
    assert (back == phy2log)[:, ~dead].float().mean() > 0.5


@pytest.mark.peers
@pytest.mark.skipif(not PEERS.is_dir(), reason="SGLang is not there: make peers")
def test_sglangs_own_code_plans_the_same(monkeypatch):
    for name in ("sglang", "sglang.srt", "sglang.srt.eplb"):  # without what their imports need
        package = types.ModuleType(name)
        package.__path__ = [str(PEERS / name.replace(".", "/"))]
        monkeypatch.setitem(sys.modules, name, package)
    from sglang.srt.eplb import eplb_algorithms as theirs

    # Distinct primes times all counts of replicas: no quotients tie, and float32 sums, as we and
    # DeepSeek have them, are as exact as SGLang's float64.
    primes = [p for p in range(11, 542) if all(p % d for d in range(2, 24))]
    rng = np.random.default_rng(0)
    total = torch.from_numpy(2520 * np.stack([rng.permutation(primes)[:64] for _ in range(100)]))
    steps = torch.stack([total // 3, total - total // 3])
    own = theirs.rebalance_experts
    for algorithm in (theirs.EplbAlgorithm.deepseek, theirs.EplbAlgorithm.deepseek_hierarchical):
        expected = own(steps, 96, 12, 8, 2, algorithm)
        sglang.install("greedy")
        assert theirs.rebalance_experts is not own
        maps = theirs.rebalance_experts(steps, 96, 12, 8, 2, algorithm)
        for ours, other in zip(maps, expected, strict=True):
            assert ours.dtype == other.dtype
        assert torch.equal(maps[0], expected[0])
        assert torch.equal(maps[2], expected[2])
        # Replicas of one expert tie, and torch's sort, which is not stable, orders them at will.
        assert torch.equal(maps[1].sort().values, expected[1].sort().values)
