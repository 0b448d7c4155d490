"""vLLM's expert-parallel group, on a CPU: `python -m tests.peer_vllm SIZE`.

vLLM plans with the policy that its plug-in loader has loaded, and moves weights over gloo. A slot's
weights say which expert they are of, so that all of them can be checked after every step.
"""

import functools
import os
import sys
import threading
import types
from unittest import mock

import numpy as np
import torch
import vllm.plugins
from eplb_torch.memory import Memory
from eplb_torch.vllm import VARIABLE, EplbPolicy
from vllm.config import EPLBConfig, VllmConfig, set_current_vllm_config
from vllm.distributed import parallel_state
from vllm.distributed.eplb import async_worker, rebalance_execute
from vllm.distributed.eplb.eplb_communicator import create_eplb_communicator
from vllm.distributed.eplb.eplb_state import EplbState
from vllm.distributed.eplb.policy import EPLB_POLICIES, DefaultEplbPolicy
from vllm.model_executor.models.interfaces import MixtureOfExperts

import eplb_jax
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


class NoDevice:
    """Events and streams of a device, which a CPU has not: all work is done when a call returns."""

    def __init__(self, **_):
        pass

    def record(self, stream=None):
        pass

    wait = record

    def synchronize(self):
        pass

    def elapsed_time(self, end):
        return 0.0


class Layer:
    """A layer's weights on this rank."""

    def __init__(self, layer, experts):
        self.weights = weights_of(layer, experts)

    def get_expert_weights(self):
        return self.weights

    def set_eplb_state(self, **_):
        pass


class Model(MixtureOfExperts):
    """What vLLM asks of a mixture-of-experts model; its methods are vLLM's."""

    def __init__(self, size, rank):
        self.num_moe_layers, self.num_expert_groups = LAYERS, GROUPS
        self.num_logical_experts = self.num_routed_experts = EXPERTS
        self.num_local_physical_experts = slots = REPLICAS // size
        self.num_physical_experts = REPLICAS
        self.num_redundant_experts = REPLICAS - EXPERTS
        initial = EplbState.build_initial_global_physical_to_logical_map(
            EXPERTS, self.num_redundant_experts
        )
        local = torch.tensor(initial)[slots * rank : slots * (rank + 1)]
        self.moe_layers = [Layer(layer, local) for layer in range(LAYERS)]


def record(model_state, counts):
    """Add a step's tokens, dealt out over an expert's slots, as vLLM's kernel does on a GPU."""
    for layer in range(LAYERS):
        for expert in range(EXPERTS):
            copies = int(model_state.logical_replica_count[layer, expert])
            slots = model_state.logical_to_physical_map[layer, expert, :copies]
            dealt = (counts[layer, expert] - torch.arange(copies) + copies - 1) // copies
            model_state.expert_load_pass[layer, slots] += dealt.int()


def new_policy():
    """The policy that the environment asks for, with a memory of its own."""
    return type("Fresh", (EplbPolicy,), {"remember": True, "memory": Memory()})


def load_policy():
    """vLLM's loader runs our entry point, which installs a policy that has seen nothing."""
    EPLB_POLICIES["default"] = DefaultEplbPolicy
    for value, ours in (("0", False), ("1", True)):
        os.environ[VARIABLE] = value
        vllm.plugins.plugins_loaded = False
        vllm.plugins.load_general_plugins()
        assert issubclass(EPLB_POLICIES["default"], EplbPolicy) == ours


def check_rearrange(size, rank, parallel, use_async):
    """Two rearrangements by `EplbState.step`: in one step, or in the background, layer by layer."""
    load_policy()
    parallel.eplb_config = EPLBConfig(
        window_size=4, step_interval=4, use_async=use_async, communicator="torch_gloo"
    )
    state = EplbState(parallel, torch.device("cpu"))
    model = Model(size, rank)
    state.add_model(model, types.SimpleNamespace(model="model", compute_hash=lambda: "model"))
    assert issubclass(state.policy, EplbPolicy)
    if use_async:
        # `start_async_worker` runs the same function, after it has set an accelerator.
        run = functools.partial(async_worker.transfer_run_periodically, state, NoDevice())
        threading.Thread(target=run, daemon=True).start()
    (model_state,) = state.model_states.values()
    policy = new_policy()
    old = model_state.physical_to_logical_map.clone()
    topology = eplb_jax.Topology.of_replicas(REPLICAS, GROUPS, 1, size)
    received = []
    # The first rearrangement comes after a quarter of the interval, the next after an interval.
    for steps in (range(1), range(1, 5)):
        load = sum(tokens(step, size).sum(0) for step in steps)
        expected = policy.rebalance_experts(load, REPLICAS, GROUPS, 1, size, old)
        for step in steps:
            record(model_state, tokens(step, size)[rank])
            state.step(log_stats=True)
            assert_weights(model.expert_weights, model_state.physical_to_logical_map, rank)
        while model_state.rebalanced:  # one layer a step, and each is ready for use at once
            state.step(is_dummy=True)
            assert_weights(model.expert_weights, model_state.physical_to_logical_map, rank)
            state.expert_rearrangement_step = 0
        new = model_state.physical_to_logical_map
        assert torch.equal(new, expected)
        assert_same_on_all_ranks(new)
        for layer, expert in np.ndindex(LAYERS, EXPERTS):
            copies = int(model_state.logical_replica_count[layer, expert])
            slots = model_state.logical_to_physical_map[layer, expert]
            assert slots[:copies].tolist() == (new[layer] == expert).nonzero()[:, 0].tolist()
        received.append(eplb_jax.moves(old.numpy(), new.numpy(), topology).received.sum())
        old = new.clone()
    assert received[0] > 0
    # The popularity has changed at step 5 only, so the second plan keeps most of the first.
    assert received[1] < received[0]


def check_scaling(rank):
    """The last of four ranks leaves and comes back, as in vLLM's elastic expert parallelism."""
    model = Model(4, rank)
    weights = [layer.weights for layer in model.moe_layers]
    group = parallel_state.get_eplb_group()
    buffer = [torch.empty_like(x) for x in weights[0]]
    move = functools.partial(
        rebalance_execute.rearrange_expert_weights_inplace,
        expert_weights=weights,
        expert_buffer=buffer,
        ep_group=group.device_group,
        communicator=create_eplb_communicator(group, "torch_gloo", weights, buffer),
    )
    initial = EplbState.build_initial_global_physical_to_logical_map(
        EXPERTS, model.num_redundant_experts
    )
    old = torch.tensor(initial).expand(LAYERS, -1)
    policy, load, fewer = new_policy(), tokens(0, 1)[0], REPLICAS * 3 // 4
    down = policy.rebalance_experts(load, fewer, GROUPS, 1, 3, old)
    move(old, down, rank_mapping={0: 0, 1: 1, 2: 2, 3: -1})
    if rank < 3:
        assert_weights(weights, down, rank)
    else:
        for tensor in (x for layer in weights for x in layer):
            tensor.zero_()  # a new process
    grown = torch.nn.functional.pad(down, (0, REPLICAS - fewer), value=-1)
    up = policy.rebalance_experts(load, REPLICAS, GROUPS, 1, 4, grown)
    move(down, up, rank_mapping={0: 0, 1: 1, 2: 2})
    assert_weights(weights, up, rank)
    assert_same_on_all_ranks(up)


def main(rank, size, store):
    config = VllmConfig()
    parallel = config.parallel_config
    parallel.enable_eplb = True  # which its validation refuses on a CPU
    with (
        set_current_vllm_config(config),
        mock.patch("torch.Event", NoDevice),
        mock.patch("torch.accelerator.current_stream", NoDevice),
        mock.patch("torch.accelerator.set_stream"),
    ):
        parallel_state.init_distributed_environment(size, rank, f"file://{store}", rank, "gloo")
        parallel_state.initialize_model_parallel(size)
        check_rearrange(size, rank, parallel, use_async=False)
        check_rearrange(size, rank, parallel, use_async=True)
        if size == 4:
            check_scaling(rank)
        torch.distributed.barrier()


if __name__ == "__main__":
    run_ranks(main, int(sys.argv[1]))
