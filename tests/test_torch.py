"""DeepSeek's functions on torch tensors, as its callers use them."""

import eplb_torch as eplb
import jax
import numpy as np
import pytest
import torch
from eplb_torch import vllm

import eplb_jax
from tests import torch_oracle
from tests.helpers import QUICK, lognormal, measured
from tests.test_plan import README_LOAD, README_PLAN

COUNTS = 48, 4, 2, 8
LOAD = torch.from_numpy(lognormal(3, 32))
OLD = torch.arange(48).repeat(3, 1) % 32


def assert_equal(ours, theirs):
    for one, other in zip(ours, theirs, strict=True):
        assert one.dtype == torch.int64
        assert torch.equal(one, other)


def test_the_example_of_deepseeks_readme():
    weight = torch.tensor(README_LOAD)
    phy2log, log2phy, logcnt = eplb.rebalance_experts(weight, 16, 4, 2, 8, strategy="greedy")
    assert phy2log.tolist() == README_PLAN
    assert_equal((phy2log, log2phy, logcnt), torch_oracle.rebalance_experts(weight, 16, 4, 2, 8))
    by_name = eplb.rebalance_experts(
        weight=weight, num_replicas=16, num_groups=4, num_nodes=2, num_gpus=8, strategy="greedy"
    )
    assert_equal(by_name, (phy2log, log2phy, logcnt))


def many_loads(num_layers, num_experts, seed):
    """Layers without ties: lognormal, uniform, distinct counts, nearly one hot."""
    rng = np.random.default_rng(seed)
    kinds = [
        rng.lognormal(sigma=rng.uniform(0.2, 2), size=num_experts),
        rng.uniform(size=num_experts),
        rng.permutation(20 * num_experts)[:num_experts] + 1,
        np.where(np.arange(num_experts) == 3, 1000, 1) * rng.uniform(1, 2, num_experts),
    ]
    rows = [
        kinds[i % 4] * rng.uniform(1, 9) if i % 4 != 2 else rng.permutation(kinds[2])
        for i in range(num_layers)
    ]
    return torch.from_numpy(np.stack(rows)).float()


@pytest.mark.parametrize(
    "shape",
    [
        (32, 48, 4, 2, 8),
        (32, 48, 3, 2, 8),
        (24, 24, 1, 1, 4),
        (30, 60, 6, 3, 6),
        (64, 96, 8, 4, 16),
    ],
)
def test_greedy_is_deepseeks_plan_in_1000_random_layers(shape):
    num_experts, *counts = shape
    weight = many_loads(200, num_experts, 0)
    ours = eplb.rebalance_experts(weight, *counts, strategy="greedy")
    assert_equal(ours, torch_oracle.rebalance_experts(weight, *counts))


def test_greedy_is_deepseeks_in_every_function():
    weight = many_loads(40, 32, 9)
    assert_equal(
        eplb.balanced_packing(weight, 8, strategy="greedy"),
        torch_oracle.balanced_packing(weight, 8),
    )
    assert_equal(eplb.balanced_packing(weight, 32), torch_oracle.balanced_packing(weight, 32))
    assert_equal(eplb.replicate_experts(weight, 48), torch_oracle.replicate_experts(weight, 48))
    assert_equal(
        eplb.rebalance_experts_hierarchical(weight, *COUNTS, strategy="greedy"),
        torch_oracle.rebalance_experts_hierarchical(weight, *COUNTS),
    )


def test_greedy_on_measured_counts():
    counts = torch.from_numpy(eplb_jax.loads.example().sum(axis=0)[::6])
    for groups in (8, 1):
        ours = eplb.rebalance_experts(counts, 288, groups, 4, 32, strategy="greedy")
        assert_equal(ours, torch_oracle.rebalance_experts(counts, 288, groups, 4, 32))


@pytest.mark.parametrize("policy", ["global", "hierarchical"])
def test_a_plan_is_the_plan_of_eplb_jax(policy):
    options = {"policy": policy, "strategy": "restarts"}
    phy2log, log2phy, logcnt = eplb.rebalance_experts(LOAD, *COUNTS, **options, seed=3)
    plan = eplb_jax.rebalance_experts(LOAD.numpy(), *COUNTS, **options, key=jax.random.key(3))
    np.testing.assert_array_equal(phy2log, plan.phy2log)
    np.testing.assert_array_equal(logcnt, plan.logcnt)
    most = log2phy.shape[2]
    assert most == logcnt.max()
    np.testing.assert_array_equal(log2phy, plan.log2phy[:, :, :most])
    for tensor in (phy2log, log2phy, logcnt):
        assert tensor.is_contiguous()
    default = eplb.rebalance_experts(LOAD, *COUNTS, **options)
    assert not torch.equal(phy2log, default[0])
    assert_equal(eplb.rebalance_experts(LOAD, *COUNTS, **options, seed=0), default)


@pytest.mark.parametrize(
    "way", [{"split": "flexible"}, {"cost": eplb_jax.Cost(0, 1, tokens_per_step=64)}]
)
def test_plans_for_a_split_and_for_a_cost(way):
    load = torch.arange(1.0, 9).repeat(2, 1)
    phy2log, log2phy, logcnt = eplb.rebalance_experts(load, 12, 1, 1, 4, strategy="greedy", **way)
    plan = eplb_jax.rebalance_experts(load.numpy(), 12, 1, 1, 4, strategy="greedy", **way)
    np.testing.assert_array_equal(phy2log, plan.phy2log)
    np.testing.assert_array_equal(log2phy, plan.log2phy[:, :, : log2phy.shape[2]])
    assert (phy2log < 0).any() == ("cost" in way)
    assert logcnt.sum() == (phy2log >= 0).sum()


def test_auto_is_better_than_greedy():
    counts = torch.from_numpy(measured().astype(np.float32)[::6])
    most = []
    for strategy in ("greedy", "auto"):
        pack, _ = eplb.balanced_packing(counts, 32, strategy=strategy)
        loads = torch.zeros(len(counts), 32).scatter_add_(1, pack, counts)
        most.append((loads.amax(dim=1) / loads.mean(dim=1)).mean())
    assert most[1] - 1 < 0.3 * (most[0] - 1)


@pytest.mark.parametrize(
    "dtype",
    [
        torch.int64,
        torch.int32,
        torch.uint8,
        torch.uint16,
        torch.float64,
        torch.float16,
        torch.bfloat16,
    ],
    ids=str,
)
def test_any_dtype_is_the_same_load(dtype):
    counts = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (3, 32)))
    expected = eplb.rebalance_experts(counts.float(), *COUNTS)
    assert_equal(eplb.rebalance_experts(counts.to(dtype), *COUNTS), expected)


def test_views_and_large_counts_are_the_same_load():
    expected = eplb.rebalance_experts(LOAD, *COUNTS)
    counts = LOAD.double().mul(2**30).long()
    kept = counts.clone()
    assert_equal(
        eplb.rebalance_experts(counts * 2**20, *COUNTS), eplb.rebalance_experts(counts, *COUNTS)
    )
    assert torch.equal(counts, kept)
    wide = torch.stack([LOAD, LOAD], dim=2)
    views = [wide[..., 0], LOAD.T.contiguous().T, LOAD.clone().requires_grad_()]
    for view in views:
        assert_equal(eplb.rebalance_experts(view, *COUNTS), expected)
    one = LOAD[:1].expand(3, -1)
    assert_equal(
        [x[2] for x in eplb.rebalance_experts(one, *COUNTS)[::2]],
        [x[0] for x in eplb.rebalance_experts(LOAD, *COUNTS)[::2]],
    )
    for mode in (torch.inference_mode, torch.no_grad):
        with mode():
            assert_equal(eplb.rebalance_experts(LOAD.clone(), *COUNTS), expected)


def test_zero_layers():
    maps = eplb.rebalance_experts(torch.zeros(0, 32), *COUNTS)
    assert [x.shape for x in maps] == [(0, 48), (0, 32, 1), (0, 32)]


def test_results_are_the_callers_to_change():
    load = LOAD.clone()
    first = eplb.rebalance_experts(load, *COUNTS)
    kept = [x.clone() for x in first]
    pack = eplb.balanced_packing(load, 32)  # the identity, which is a constant of the program
    kept_pack = [x.clone() for x in pack]
    for x in (*first, *pack):
        x.fill_(-7)
    assert torch.equal(load, LOAD)
    assert_equal(eplb.rebalance_experts(load, *COUNTS), kept)
    assert_equal(eplb.balanced_packing(load, 32), kept_pack)
    again = eplb.rebalance_experts(load, *COUNTS)
    load.fill_(0)
    assert_equal(again, kept)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: eplb.rebalance_experts(LOAD, 50, 4, 2, 8), ValueError, "nearest: 48, 56"),
        (lambda: eplb.rebalance_experts(torch.ones(1, 256), 256, 1, 1, 6), ValueError,
         "num_replicas=256 is not a multiple of num_gpus=6; nearest: 258$"),
        (lambda: eplb.rebalance_experts(LOAD, *COUNTS, previous="x"), TypeError,
         "previous must hold integers"),
        (lambda: eplb.rebalance_experts(LOAD, *COUNTS, previous=torch.rand(3, 48)), TypeError,
         "previous must hold integers, got dtype float32"),
        (lambda: eplb.rebalance_experts(LOAD, *COUNTS, previous=OLD.to("meta")), TypeError,
         "previous cannot be converted to JAX: it is on the meta device"),
        (lambda: eplb.rebalance_experts(LOAD, *COUNTS, previous=OLD.to_sparse()), TypeError,
         r"previous cannot be converted to JAX: its layout is torch.sparse_coo"),
        (lambda: eplb.rebalance_experts(LOAD, *COUNTS, previous=OLD[0].tolist()), ValueError,
         r"previous must have the shape .*\(3, 48\)"),
        (lambda: eplb.rebalance_experts(LOAD, *COUNTS, device="tpu:3"), ValueError,
         "device='tpu:3' is not known to JAX; choose one of: cpu:0"),
        (lambda: eplb.rebalance_experts(LOAD, *COUNTS, device="cpu:x"), ValueError, "'cpu:x'"),
        (lambda: eplb.rebalance_experts(LOAD, *COUNTS, strategy="x"), ValueError, "choose one"),
        (lambda: eplb.rebalance_experts(LOAD.log(), *COUNTS), ValueError,
         "weight at layer 0, expert 1 is -"),
        (lambda: eplb.rebalance_experts(LOAD[0], *COUNTS), ValueError, r"got \(32,\)"),
        (lambda: eplb.rebalance_experts(LOAD.to(torch.complex64), *COUNTS), TypeError,
         "weight must hold real numbers, got dtype complex64"),
        (lambda: eplb.rebalance_experts(LOAD.to("meta"), *COUNTS), TypeError,
         "weight cannot be converted to JAX: it is on the meta device"),
        (lambda: eplb.balanced_packing(LOAD.tolist(), 8), TypeError,
         "weight must be a torch.Tensor, got list"),
        (lambda: eplb.rebalance_experts_hierarchical(LOAD, 48, 1, 2, 8), ValueError,
         "num_nodes=2 does not divide num_groups=1; nearest: 1"),
    ],
)  # fmt: skip
def test_bad_input_is_named(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_devices_are_named_in_any_way():
    expected = eplb.replicate_experts(LOAD, 48)
    for device in ("cpu", "cpu:0", torch.device("cpu"), jax.devices()[0]):
        assert_equal(eplb.replicate_experts(LOAD, 48, device=device), expected)
    elsewhere = eplb.replicate_experts(LOAD, 48, device=jax.devices()[5])
    assert_equal(elsewhere, expected)


def test_after_preload_nothing_compiles(caplog):
    with torch.device("meta"):  # as while a model is being built
        eplb.preload((5, 32), *COUNTS, strategy=QUICK)
    old = OLD[:1].expand(5, -1)
    policy = type("Policy", (vllm.EplbPolicy,), {"strategy": QUICK, "max_moves": 16})
    with jax.log_compiles():
        for seed in range(2):
            load = torch.from_numpy(lognormal(5, 32, seed=seed))
            for limits in ({}, {"previous": old}, {"previous": old, "max_moves": 3}):
                eplb.rebalance_experts(load, *COUNTS, strategy=QUICK, seed=seed, **limits)
            eplb.rebalance_experts(load.long(), *COUNTS, strategy=QUICK)
            eplb.rebalance_experts(
                load, *COUNTS, strategy=QUICK, previous=old.numpy(), move_penalty=0.01
            )
            policy.rebalance_experts(load, *COUNTS, old.int())
        assert "Compiling" not in caplog.text
        eplb.replicate_experts(load, 33)
        assert "Compiling" in caplog.text  # other compilations are logged


def test_preload_checks_limits():
    with pytest.raises(ValueError, match="max_moves=-1 is less than 0"):
        eplb.preload((3, 32), *COUNTS, strategy="greedy", max_moves=-1)


@pytest.mark.parametrize(
    "kind",
    [
        lambda x: x.tolist(),
        lambda x: x.numpy(),
        lambda x: x.numpy().astype(np.uint8),
        lambda x: x.int(),
        lambda x: x.to(torch.uint16),
        lambda x: x.T.contiguous().T,
        lambda x: x.as_subclass(type("Mine", (torch.Tensor,), {})),
    ],
)
def test_previous_may_be_any_map_of_integers(kind):
    options = {"strategy": "greedy"}
    expected = eplb.rebalance_experts(LOAD, *COUNTS, **options, previous=OLD)
    assert_equal(eplb.rebalance_experts(LOAD, *COUNTS, **options, previous=kind(OLD)), expected)


def test_the_global_policy_needs_no_nodes():
    plan = eplb.rebalance_experts(LOAD, 48, 4, 3, 8, strategy="greedy")
    assert_equal(plan, eplb.rebalance_experts(LOAD, 48, 1, 1, 8, strategy="greedy"))
