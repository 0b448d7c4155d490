"""The replica nearest to every GPU."""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec
from jaxtyping import Array, Int32

from eplb_jax.checks import LoadLike
from eplb_jax.planning.placement import as_placement, first_positions
from eplb_jax.sharding import spec_of, under_auto
from eplb_jax.types import Placement, Topology, check_topology

_NEVER = 2**31 - 1


def nearest_replica(placement: Placement | LoadLike, topology: Topology) -> Int32[Array, "*L E G"]:
    """The slot to which every GPU sends the tokens of an expert: that of the nearest replica.

    It is on the same GPU, else on the same node, else anywhere; of several, on the GPU to which the
    fewest GPUs send so far, which balances loads if all GPUs route alike. A second replica on one
    GPU gets no tokens.

    Args:
        placement: The plan, or its phy2log, [L, R] or [R].
        topology: GPUs, slots and nodes; as many slots as the plan has.

    Raises:
        TypeError: An argument is of the wrong kind.
        ValueError: The plan is invalid or has another number of slots.

    Example:
        >>> nearest_replica([0, 3, 0, 3, 1, 2], Topology(3, slots=2))[0].tolist()
        [0, 2, 0]
    """
    plan = as_placement(placement, "placement")
    check_topology(topology, plan.phy2log.shape[-1])
    nearest = partial(_nearest, num_experts=plan.logcnt.shape[-1], topology=topology)
    return under_auto(nearest, PartitionSpec(*spec_of(plan.phy2log)[:-1]), plan.phy2log)


@partial(jax.jit, static_argnames=("num_experts", "topology"))
def _nearest(
    phy2log: Int32[Array, "*L R"], *, num_experts: int, topology: Topology
) -> Int32[Array, "*L E G"]:
    num_gpus, size = topology.num_gpus, topology.slots_per_gpu
    gpus = jnp.arange(num_gpus, dtype=jnp.int32)
    node = gpus // topology.gpus_per_node
    same_node = node[:, None] == node[None]
    # Among equals, every expert prefers another GPU.
    number = (gpus[None] + jnp.arange(num_experts, dtype=jnp.int32)[:, None]) % num_gpus

    def table(phy2log: Int32[Array, " R"]) -> Int32[Array, "E G"]:
        place = first_positions(phy2log, num_experts, num_gpus)
        held = place < size
        on_node = jnp.any(held[:, None] & same_node[None], axis=2)

        def choose(step: Array, chosen: _Chosen) -> _Chosen:
            # First the GPUs whose node has the expert; then the others, which can choose freely.
            gpu, far = step % num_gpus, step >= num_gpus
            mine = ~held[:, gpu] & (on_node[:, gpu] != far)
            near = held & (same_node[gpu] | far)[None]
            taken = jnp.where(near, chosen.clients * num_gpus + number, _NEVER)
            best = jnp.argmin(taken, axis=1).astype(jnp.int32)
            to = chosen.to.at[:, gpu].set(jnp.where(mine, best, chosen.to[:, gpu]))
            client = mine[:, None] & (gpus[None] == best[:, None])
            return _Chosen(chosen.clients + client.astype(jnp.int32), to)

        start = _Chosen(held.astype(jnp.int32), jnp.broadcast_to(gpus[None], held.shape))
        to = lax.fori_loop(0, 2 * num_gpus, choose, start).to
        return jnp.take_along_axis(gpus[None] * size + place, to, axis=1)

    return jnp.vectorize(table, signature="(r)->(e,g)")(phy2log)


class _Chosen(NamedTuple):
    """The number of GPUs that send to every GPU's replica, and the GPU that each sends to."""

    clients: Int32[Array, "E G"]
    to: Int32[Array, "E G"]
