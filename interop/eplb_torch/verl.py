"""verl: a placement of experts for its training and rollout, as a strategy file calls it.

In the file that `actor_rollout_ref.rollout.eplb_strategy_file_path` names:

    from eplb_torch.verl import eplb_strategy
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

import eplb_jax
from eplb_jax import Topology


def eplb_strategy(
    history_loads: Sequence[Mapping[Any, Mapping[Any, float]]], eplb_config: Any
) -> dict[str, Any]:
    """Place every expert once, equally many on each device, for the next step.

    Args:
        history_loads: For every step, oldest first, the load of layers and experts:
            ``{layer: {expert: load}}``, numbers or their decimal strings; what is missing is 0.
        eplb_config: `num_experts`, `device_count` and `strategy_version`, as a mapping or as
            attributes.

    Returns:
        verl's strategy: the experts of every device, layer by layer.

    Raises:
        ValueError: There is no load, device_count does not divide num_experts, or an expert is
            none.

    Example:
        >>> config = {"num_experts": 4, "device_count": 2, "strategy_version": 1}
        >>> strategy = eplb_strategy([{"0": {"0": 9, "1": 8, "2": 1}}], config)
        >>> [x["device_expert"] for x in strategy["layer_list"][0]["device_list"]]
        [[0, 3], [1, 2]]

    References:
        verl's interface of user policies, `eplb_strategy(history_loads, eplb_config)`.
    """

    def option(name: str, default: Any = None) -> Any:
        if isinstance(eplb_config, Mapping):
            return eplb_config.get(name, default)
        return getattr(eplb_config, name, default)

    num_experts, devices = option("num_experts"), option("device_count")
    layers = sorted({int(layer) for step in history_loads for layer in step})
    if not layers:
        raise ValueError("history_loads must hold the load of a layer, got none")
    topology = Topology.of_replicas(num_experts, devices)
    load = np.zeros((len(history_loads), len(layers), num_experts), np.float64)
    for t, step in enumerate(history_loads):
        for layer, experts in step.items():
            for expert, tokens in experts.items():
                if not 0 <= int(expert) < num_experts:
                    raise ValueError(
                        f"history_loads has expert {expert} in layer {layer} of step {t}; "
                        f"experts are numbered 0 to {num_experts - 1}"
                    )
                load[t, layers.index(int(layer)), int(expert)] = tokens
    phy2log = np.asarray(eplb_jax.plan(load, topology).phy2log)
    of_device = np.sort(phy2log.reshape(len(layers), devices, -1), axis=2).tolist()
    layer_list = [
        {
            "layer_id": layer,
            "device_list": [
                {"device_id": i, "device_expert": experts} for i, experts in enumerate(each)
            ],
        }
        for layer, each in zip(layers, of_device, strict=True)
    ]
    version = option("strategy_version", 1)
    return {
        "strategy_version": version,
        "moe_layer_count": len(layers),
        "layer_list": layer_list,
    }
