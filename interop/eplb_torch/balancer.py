"""The balancer of `eplb_jax` as an object that keeps its state, for PyTorch callers."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
import torch

import eplb_jax
from eplb_jax import Proposal, Topology
from eplb_torch.backend import compute_device, untraced
from eplb_torch.conversion import as_map, as_previous, as_weight
from eplb_torch.eplb import Device


class Balancer:
    """Observe loads, propose plans, commit them: `eplb_jax.balancer` on torch tensors.

    The first proposal compiles; later ones compile nothing.

    Example:
        >>> balancer = Balancer(1, 4, Topology(3, slots=2))
        >>> balancer.observe(torch.tensor([[10, 20, 30, 90]]))
        >>> proposal = balancer.propose()
        >>> proposal.reasons(), balancer.commit(proposal)[0]
        (['better'], tensor([[3, 2, 2, 3, 0, 1]]))
    """

    def __init__(
        self,
        num_layers: int,
        num_experts: int,
        topology: Topology,
        *,
        plan: Any = None,
        previous_gpus: Sequence[int] | None = None,
        device: Device = None,
        **options: Any,
    ) -> None:
        """Start with a plan in place.

        Args:
            num_layers: L.
            num_experts: E.
            topology: GPUs, slots, nodes and groups.
            plan: [L, R], the expert in every slot; None: experts in the order of slots.
            previous_gpus: For every GPU the number that it has in `plan`, -1 for a new one.
            device: Where to compute; None: the CPU.
            **options: As of `eplb_jax.balancer`.

        Raises:
            TypeError: An argument is of the wrong kind.
            ValueError: As `eplb_jax.balancer` and its `init`, or JAX has no such device.
        """
        self._device = compute_device(device)
        self._balancer = eplb_jax.balancer(topology, **options)
        with jax.default_device(self._device):
            gpus = None if previous_gpus is None else tuple(previous_gpus)
            old = as_previous(plan)
            init = self._balancer.init
            self.state = init(num_layers, num_experts, plan=old, previous_gpus=gpus)

    @untraced
    def observe(self, load: torch.Tensor) -> None:
        """Add one step: [L, E] tokens of every expert.

        Raises:
            TypeError: It holds no real numbers.
            ValueError: It has another shape, or a load is NaN, infinite or negative.
        """
        with jax.default_device(self._device):
            counts = np.asarray(as_weight(load, compute_device("cpu")))
            self.state = self._balancer.observe(self.state, counts)

    @untraced
    def propose(self, *, active: Any = None, speed: Any = None) -> Proposal:
        """The next plan and what it is worth, as `eplb_jax.Balancer.propose`.

        Raises:
            ValueError: Live GPUs have too few slots, or `active` or `speed` has another shape.
        """
        with jax.default_device(self._device):
            return self._balancer.propose(
                self.state, active=as_previous(active), speed=as_previous(speed)
            )

    @untraced
    def commit(
        self, proposal: Proposal, layers: Any = None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Put a proposal in place, or some of its layers, [L], and return the plan in place.

        Returns:
            The expert in every slot, [L, R]; the slots of every expert, [L, E, X] padded with -1;
            the number of replicas of every expert, [L, E]. Each int64, on the CPU.
        """
        self.state = self._balancer.commit(self.state, proposal, as_previous(layers))
        return self.plan

    @property
    def plan(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The maps of the plan in place, int64 on the CPU."""
        phy2log, log2phy, logcnt = self.state.plan
        like = torch.empty(0, device="cpu")
        width = int(np.asarray(logcnt).max(initial=1))
        return as_map(phy2log, like), as_map(log2phy, like, width), as_map(logcnt, like)

    def state_dict(self) -> dict[str, torch.Tensor]:
        """The state as tensors, for `torch.save`."""
        leaves = jax.tree.leaves(self.state)
        return {str(i): torch.from_numpy(np.array(x)) for i, x in enumerate(leaves)}

    def load_state_dict(self, state: Mapping[str, torch.Tensor]) -> None:
        """Take a state of `state_dict`, of a balancer of the same shapes.

        Raises:
            ValueError: It is of other shapes.
        """
        leaves, tree = jax.tree.flatten(self.state)
        new = [np.asarray(state[str(i)]) for i in range(len(leaves)) if str(i) in state]
        got, wanted = [x.shape for x in new], [x.shape for x in leaves]
        if got != wanted:
            raise ValueError(f"state must have the shapes {wanted}, got {got}")
        with jax.default_device(self._device):
            self.state = jax.tree.unflatten(tree, [jax.numpy.asarray(x) for x in new])
