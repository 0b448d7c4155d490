"""The contract of SGLang, on stubs; `test_peers.py` runs SGLang itself."""

import enum
import types
from importlib.metadata import entry_points

import eplb_torch
import pytest
import torch
from eplb_torch import sglang

from tests import torch_oracle
from tests.engines import COUNTS, LOAD, modules
from tests.helpers import QUICK

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


def test_sglang_loads_the_plugin_by_its_entry_point(monkeypatch):
    eplb = modules(monkeypatch, sglang__srt__eplb={})
    eplb.eplb_algorithms = types.SimpleNamespace(rebalance_experts=None)
    (plugin,) = (x for x in entry_points(group="sglang.srt.plugins") if x.name == "eplb_torch")
    register = plugin.load()
    for value in ("", "0"):
        monkeypatch.setenv(sglang.VARIABLE, value)
        register()
        assert eplb.eplb_algorithms.rebalance_experts is None
    monkeypatch.setenv(sglang.VARIABLE, "greedy")
    register()
    maps = eplb.eplb_algorithms.rebalance_experts(LOAD, 48, 6, 4, 2, "deepseek_hierarchical")
    expected = torch_oracle.rebalance_experts(LOAD, *COUNTS)
    assert all(torch.equal(x, y) for x, y in zip(maps, expected, strict=True))
    monkeypatch.setenv(sglang.VARIABLE, "fastest")
    with pytest.raises(ValueError, match=r"EPLB_TORCH_SGLANG=fastest: .* choose one of: auto"):
        register()


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
