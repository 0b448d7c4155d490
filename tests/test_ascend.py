"""The contract of vllm-ascend's policies."""

import logging

import numpy as np
import pytest
from eplb_torch import ascend
from eplb_torch.memory import Options

from tests.engines import modules
from tests.helpers import lognormal

LAYERS, GPUS, SLOTS, EXPERTS = 3, 8, 6, 32
QUICK = Options(strategy="fast", remember=False)


def table_of(rng):
    """Every expert once, and spare slots that hold another expert than the rest of their GPU."""
    first = np.arange(EXPERTS).reshape(GPUS, 4)
    spare = (first[:, :2] + 4) % EXPERTS
    return np.stack([rng.permuted(np.hstack([first, spare]), axis=1) for _ in range(LAYERS)])


@pytest.fixture
def table():
    return table_of(np.random.default_rng(0))


def workload(table, seed=0, windows=None):
    """The tokens of every slot: those of its expert, over its replicas."""
    load = lognormal(LAYERS, EXPERTS, seed=seed) * 1000
    count = np.stack([np.bincount(x.ravel(), minlength=EXPERTS) for x in table])
    each = np.stack([(load[i] / count[i])[table[i]] for i in range(LAYERS)])
    return (each if windows is None else np.stack([each] * windows)), load


def imbalance(table, load):
    count = np.stack([np.bincount(x.ravel(), minlength=EXPERTS) for x in table])
    gpus = np.stack([(load[i] / count[i])[table[i]].sum(axis=1) for i in range(len(table))])
    return gpus.max(axis=1) / gpus.mean(axis=1) - 1


def test_a_new_table_meets_what_the_engine_checks(table):
    each, load = workload(table)
    changed, layers, new = ascend.EplbPolicy(options=QUICK).rebalance_experts(table, each)
    assert changed
    assert new.shape == table.shape
    assert new.dtype == np.int64
    for old_layer, layer in zip(table, new, strict=True):
        assert set(layer.ravel()) == set(range(EXPERTS))
        for old_gpu, gpu in zip(old_layer, layer, strict=True):
            assert len(set(gpu)) == SLOTS  # no expert twice on a GPU
            stays = np.isin(gpu, old_gpu)
            np.testing.assert_array_equal(gpu[stays], old_gpu[stays])  # nor another slot on it
    before, after = imbalance(table, load), imbalance(new, load)
    assert np.all(after < before / 4)
    gain = (before - after) / (new != table).sum(axis=(1, 2))
    assert sorted(layers) == list(range(LAYERS))
    assert np.all(np.diff(gain[layers]) <= 1e-6)


def test_the_same_load_again_changes_nothing(table):
    policy = ascend.EplbPolicy(options=QUICK)
    each, load = workload(table)
    new = policy.rebalance_experts(table, each)[2]
    count = np.stack([np.bincount(x.ravel(), minlength=EXPERTS) for x in new])
    again = np.stack([(load[i] / count[i])[new[i]] for i in range(LAYERS)])
    changed, layers, same = policy.rebalance_experts(new, again)
    assert not changed
    assert layers.size == 0
    np.testing.assert_array_equal(same, new)


@pytest.mark.parametrize("num_gpus", [7, 9])
def test_ranks_that_leave_or_come(table, num_gpus):
    each, load = workload(table, windows=2)  # as policy 3, which keeps several
    policy = ascend.EplbPolicy(options=Options(strategy="fast"))
    policy.set_new_ep_size(num_gpus)
    # vllm-ascend hands on a table that is already as wide as the larger number of ranks.
    wide = np.pad(table, ((0, 0), (0, max(num_gpus - GPUS, 0)), (0, 0)), constant_values=-1)
    changed, layers, new = policy.rebalance_experts(wide, each)
    assert changed
    np.testing.assert_array_equal(layers, np.arange(LAYERS))
    assert new.shape == (LAYERS, num_gpus, SLOTS)
    assert np.all(imbalance(new, load) < 0.05)
    kept = min(num_gpus, GPUS)
    assert np.mean(new[:, :kept] == table[:, :kept]) > 0.4


def test_an_invalid_load_keeps_the_table(table, caplog):
    each, _ = workload(table)
    with caplog.at_level(logging.WARNING):
        changed, layers, same = ascend.EplbPolicy(options=QUICK).rebalance_experts(
            table, each * np.nan
        )
    assert (changed, layers.size) == (False, 0)
    np.testing.assert_array_equal(same, table)
    assert "the old table stays" in caplog.text
    with pytest.raises(ValueError, match=r"\(3, 8, 6\) and expert_workload of the shape \(3, 8, 5"):
        ascend.EplbPolicy(options=QUICK).rebalance_experts(table, each[..., :5])


def test_install(monkeypatch):
    class PolicyFactory:
        @staticmethod
        def generate_policy(policy_type):
            raise NotImplementedError

    modules(
        monkeypatch,
        vllm_ascend__eplb__core__policy__policy_factory={"PolicyFactory": PolicyFactory},
    )
    ascend.install(options=QUICK)
    for arguments in ((3,), (1, object())):  # of newer and older releases
        assert isinstance(PolicyFactory.generate_policy(*arguments), ascend.EplbPolicy)
