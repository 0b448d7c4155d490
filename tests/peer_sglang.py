"""SGLang's expert-parallel group, on a CPU: `python -m tests.peer_sglang SIZE`.

SGLang counts tokens, plans with the function that our plug-in has installed, and moves weights over
gloo. A slot's weights say which expert they are of, so that all of them can be checked.
"""

import importlib.abc
import importlib.machinery
import os
import sys
import types
from unittest import mock

import eplb_torch.sglang
import numpy as np
import torch
import torch._inductor.compile_fx
import transformers

from tests.ranks import (
    EXPERTS,
    GROUPS,
    LAYERS,
    REPLICAS,
    assert_same_on_all_ranks,
    assert_weights,
    run_ranks,
    tokens,
    weights_of,
)


class _Anything(type):
    def __getattr__(cls, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return cls


class Unused(metaclass=_Anything):
    """A class, function, decorator or type of a package that is not installed."""

    def __init__(self, *_, **__):
        pass

    def __call__(self, *_, **__):
        return self


class NotInstalled(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Packages that SGLang's files import and that nothing here runs.

    Triton compiles for GPUs, and is 1 GB; PyPI's torchvision does not load with a torch for CPUs.
    torch and transformers, which would use them, have been imported without.
    """

    def find_spec(self, fullname, path=None, target=None):
        if fullname.partition(".")[0] in ("triton", "torchvision"):
            return importlib.machinery.ModuleSpec(fullname, self, is_package=True)
        return None

    def create_module(self, spec):
        return types.ModuleType(spec.name)

    def exec_module(self, module):
        module.__getattr__ = lambda name: getattr(Unused, name)


sys.meta_path.append(NotInstalled())

# ruff: noqa: E402  SGLang finds what is not installed only from here on.
from sglang.srt.configs.model_config import ModelImpl
from sglang.srt.elastic_ep.elastic_ep import ElasticEPStateManager
from sglang.srt.eplb import eplb_algorithms, expert_distribution
from sglang.srt.eplb.eplb_manager import EPLBManager
from sglang.srt.eplb.expert_location import (
    ExpertLocationMetadata,
    compute_initial_expert_location_metadata,
    set_global_expert_location_metadata,
)
from sglang.srt.eplb.expert_location_updater import ExpertLocationUpdater
from sglang.srt.models import registry  # noqa: F401  it imports all models: once, before the fork
from sglang.srt.plugins import load_plugins
from sglang.srt.runtime_context import get_context, get_exec, get_parallel


class Model:
    """A DeepSeek-V3 of three layers: what SGLang asks of it, and its weights on this rank."""

    def __init__(self, location, rank):
        slots = location.num_local_physical_experts
        local = location.physical_to_logical_map[:, slots * rank : slots * (rank + 1)]
        self.routed_experts_weights_of_layer = {
            layer: weights_of(layer, local[layer]) for layer in range(LAYERS)
        }

    def weights(self):
        return self.routed_experts_weights_of_layer.values()


def model_config():
    hf_config = transformers.DeepseekV3Config(
        num_hidden_layers=LAYERS,
        n_routed_experts=EXPERTS,
        n_group=GROUPS,
        architectures=["DeepseekV3ForCausalLM"],
    )
    return types.SimpleNamespace(
        hf_config=hf_config, quantization=None, model_impl=ModelImpl.SGLANG
    )


def record(recorder, location, step, counts):
    """A step's tokens, dealt out over an expert's slots, go the way of a forward pass's."""
    with recorder.with_forward_pass(step, None):
        for layer, expert in np.ndindex(LAYERS, EXPERTS):
            slots = location.logical_to_all_physical(layer, expert)
            chosen = torch.tensor(slots)[torch.arange(counts[layer, expert]) % len(slots)]
            with recorder.with_current_layer(layer):
                recorder.on_select_experts(chosen[:, None])


def check_same_plans_as_sglang():
    """The strategy "greedy" makes SGLang's own plans, where no loads tie.

    Loads are distinct primes times all numbers of replicas, so no quotients tie, and float32 sums,
    as we and DeepSeek have them, are as exact as SGLang's float64.
    """
    primes = [p for p in range(11, 542) if all(p % d for d in range(2, 24))]
    rng = np.random.default_rng(0)
    total = torch.from_numpy(2520 * np.stack([rng.permutation(primes)[:64] for _ in range(100)]))
    steps = torch.stack([total // 3, total - total // 3])
    own = eplb_algorithms.rebalance_experts
    names = eplb_algorithms.EplbAlgorithm
    with mock.patch.object(eplb_algorithms, "rebalance_experts"):
        for algorithm in (names.deepseek, names.deepseek_hierarchical):
            expected = own(steps, 96, 12, 8, 2, algorithm)
            eplb_torch.sglang.install("greedy")
            maps = eplb_algorithms.rebalance_experts(steps, 96, 12, 8, 2, algorithm)
            for ours, other in zip(maps, expected, strict=True):
                assert ours.dtype == other.dtype
            assert torch.equal(maps[0], expected[0])
            assert torch.equal(maps[2], expected[2])
            # Replicas of an expert tie, and torch's sort, which is not stable, orders them at will.
            assert torch.equal(maps[1].sort().values, expected[1].sort().values)


def check_rebalance(size, rank):
    """Two rebalancings by `EPLBManager`, a layer after every forward pass."""
    before = eplb_algorithms.rebalance_experts
    with mock.patch.dict(os.environ, {eplb_torch.sglang.VARIABLE: "1"}):
        load_plugins()  # SGLang's own loader of plug-ins
    assert eplb_algorithms.rebalance_experts is not before
    config = model_config()
    location = compute_initial_expert_location_metadata(config, rank)
    set_global_expert_location_metadata(location)
    recorder = expert_distribution.ExpertDistributionRecorder.init_new(location, rank)
    expert_distribution.set_global_expert_distribution_recorder(recorder)
    model = Model(location, rank)
    updater = ExpertLocationUpdater()
    manager = EPLBManager(
        model_config=config,
        get_model=lambda: model,
        get_expert_location_updater=lambda: updater,
        get_expert_backup_client=lambda: None,
        get_weight_updater=mock.Mock,
    )
    step = 0
    for rebalancing in range(2):
        old = location.physical_to_logical_map.clone()
        planner = mock.Mock(wraps=eplb_algorithms.rebalance_experts)
        with mock.patch.object(eplb_algorithms, "rebalance_experts", planner):
            while not planner.called:
                record(recorder, location, step, tokens(step, size)[rank])
                manager.on_forward_pass_end()
                step += 1
        arguments = planner.call_args.kwargs
        load = arguments["tokens_per_expert"]
        assert load.shape == (4, LAYERS, EXPERTS)
        assert torch.equal(load.sum(0), sum(tokens(x, size).sum(0) for x in range(step - 4, step)))
        for _ in range(LAYERS):  # and each is ready for use at once
            assert_weights(model.weights(), location.physical_to_logical_map, rank)
            manager.on_forward_pass_end()
        new = location.physical_to_logical_map
        assert_weights(model.weights(), new, rank)
        assert_same_on_all_ranks(new)
        assert_listed(location)
        assert not torch.equal(new, old)
        if rebalancing == 1:  # it has started from the map in place
            alone, *_ = eplb_torch.sglang.rebalance_experts(**arguments, strategy="greedy")
            assert (new != old).sum() < (alone != old).sum()


def assert_listed(location):
    """The slots of every expert are those that hold it."""
    for layer, expert in np.ndindex(LAYERS, EXPERTS):
        holding = (location.physical_to_logical_map[layer] == expert).nonzero()[:, 0].tolist()
        assert sorted(location.logical_to_all_physical(layer, expert)) == holding


def check_static_dispatch(rank):
    """Every rank sends to a slot of its own where it has one."""
    with get_exec().moe.override(ep_dispatch_algorithm="static"):
        location = ExpertLocationMetadata.init_by_eplb(model_config(), tokens(0, 1)[0])
    assert_listed(location)
    maps, chosen = location.physical_to_logical_map, location.logical_to_rank_dispatch_physical_map
    assert torch.equal(maps.gather(1, chosen), torch.arange(EXPERTS).expand(LAYERS, -1))
    slots = location.num_local_physical_experts
    own = maps[:, None, slots * rank : slots * (rank + 1)] == torch.arange(EXPERTS)[:, None]
    assert torch.equal(chosen // slots == rank, own.any(dim=2))


def check_dead_rank(size):
    """Slots of a rank that SGLang's mask, which has room for more ranks, calls dead."""
    state = ElasticEPStateManager._build_state(ep_size=size + 2, device=torch.device("cpu"))
    state.active_ranks[size - 1 :] = 0
    with (
        mock.patch.object(ElasticEPStateManager, "_instance", state),
        get_exec().moe.override(eplb_algorithm="elasticity_aware"),
    ):
        location = ExpertLocationMetadata.init_by_eplb(model_config(), tokens(0, 1)[0])
    live = location.num_local_physical_experts * (size - 1)
    assert (location.physical_to_logical_map[:, live:] == 0).all()
    assert location.logical_to_all_physical_map.max() < live
    assert (location.logical_to_all_physical_map_num_valid >= 1).all()


def main(rank, size, store):
    torch.distributed.init_process_group("gloo", f"file://{store}", rank=rank, world_size=size)
    fields = {
        "device": "cpu",
        "tp_size": size,
        "ep_size": size,
        "nnodes": size // 2,
        "ep_num_redundant_experts": REPLICAS - EXPERTS,
        "enable_eplb": True,
        "eplb_rebalance_num_iterations": 4,
        "eplb_rebalance_layers_per_chunk": 1,
        "expert_distribution_recorder_buffer_size": 4,
        "expert_distribution_recorder_mode": "stat",
    }
    with (
        get_context().override_server_args(**fields),
        get_parallel().override(tp_rank=rank, moe_ep_rank=rank),
        mock.patch("torch.cpu.empty_cache", create=True),
        mock.patch.object(expert_distribution, "get_device", return_value="cpu"),
    ):
        check_rebalance(size, rank)
        check_static_dispatch(rank)
        if size > 2:
            check_dead_rank(size)


if __name__ == "__main__":
    run_ranks(main, int(sys.argv[1]))
    check_same_plans_as_sglang()  # last, as JAX must start after the fork
