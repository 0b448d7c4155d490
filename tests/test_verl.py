"""The contract of verl's user policies."""

import types

import numpy as np
import pytest
from eplb_torch.verl import eplb_strategy

CONFIG = {"num_experts": 16, "device_count": 4, "strategy_version": 3}


def steps(count=3):
    """Sparse loads of layers 2 and 7, with string keys as in JSON."""
    rng = np.random.default_rng(0)
    load = rng.integers(0, 100, (count, 2, 16))
    return [
        {
            str(n): {str(e): int(x) for e, x in enumerate(row) if x}
            for n, row in zip((7, 2), step, strict=True)
        }
        for step in load
    ], load[:, ::-1]


def test_every_expert_is_on_one_device_and_loads_are_balanced():
    history, load = steps()
    strategy = eplb_strategy(history, types.SimpleNamespace(**CONFIG))
    assert (strategy["strategy_version"], strategy["moe_layer_count"]) == (3, 2)
    assert [x["layer_id"] for x in strategy["layer_list"]] == [2, 7]
    for layer, of_layer in zip(strategy["layer_list"], load.sum(axis=0), strict=True):
        devices = layer["device_list"]
        assert [x["device_id"] for x in devices] == [0, 1, 2, 3]
        placed = [x["device_expert"] for x in devices]
        assert sorted(np.ravel(placed).tolist()) == list(range(16))
        assert {len(x) for x in placed} == {4}
        loads = np.array([of_layer[x].sum() for x in placed])
        assert loads.max() / loads.mean() < 1.1
    assert eplb_strategy(history, CONFIG) == strategy


@pytest.mark.parametrize(
    ("history", "config", "message"),
    [
        ([], CONFIG, "must hold the load of a layer"),
        ([{"0": {"16": 1}}], CONFIG, "expert 16 in layer 0 of step 0; .* 0 to 15"),
        ([{"0": {"1": 1}}], CONFIG | {"device_count": 5}, "not a multiple of num_gpus=5"),
    ],
)
def test_errors(history, config, message):
    with pytest.raises(ValueError, match=message):
        eplb_strategy(history, config)
