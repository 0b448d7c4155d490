"""The replica nearest to every GPU."""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Int32

from eplb_jax.checks import as_count, check_divides
from eplb_jax.planning.placement import first_positions
from eplb_jax.sharding import by_layers
from eplb_jax.types import Placement

_NEVER = 2**31 - 1


def nearest(placement: Placement, num_gpus: int, num_nodes: int = 1) -> Int32[Array, "*L E G"]:
    """The slot to which every GPU sends the tokens of an expert: the nearest replica.

    That on the same GPU; else one on the same node; else any: of several the one that fewest GPUs
    send to so far. So tokens are as even as that allows where every GPU routes alike. A second
    replica on one GPU gets no tokens.

    Args:
        placement: The plan, of all layers or of one.
        num_gpus: G; divides R.
        num_nodes: N; divides G.

    Raises:
        ValueError: Numbers do not divide.

    Example:
        >>> import eplb_jax
        >>> plan = eplb_jax.rebalance_experts([[90, 30, 20, 10]], 6, 1, 1, 3)
        >>> plan.phy2log.tolist(), nearest(plan, 3)[0, 0].tolist()
        ([[0, 3, 0, 3, 1, 2]], [0, 2, 0])
    """
    num_gpus, num_nodes = as_count("num_gpus", num_gpus), as_count("num_nodes", num_nodes)
    check_divides("num_gpus", num_gpus, "number of slots", placement.phy2log.shape[-1])
    check_divides("num_nodes", num_nodes, "num_gpus", num_gpus)
    if placement.logcnt.ndim == 1:
        placement = Placement(*(x[None] for x in placement))
        return _nearest(placement, num_gpus=num_gpus, num_nodes=num_nodes)[0]
    return _nearest(placement, num_gpus=num_gpus, num_nodes=num_nodes)


@by_layers
@partial(jax.jit, static_argnames=("num_gpus", "num_nodes"))
def _nearest(placement: Placement, *, num_gpus: int, num_nodes: int) -> Int32[Array, "L E G"]:
    num_experts = placement.logcnt.shape[-1]
    gpus = jnp.arange(num_gpus, dtype=jnp.int32)
    same_node = (gpus[:, None] // (num_gpus // num_nodes)) == gpus // (num_gpus // num_nodes)
    # Of equals the first from another GPU on for every expert.
    number = (gpus + jnp.arange(num_experts, dtype=jnp.int32)[:, None]) % num_gpus

    def table(phy2log: Int32[Array, " R"]) -> Int32[Array, "E G"]:
        place = first_positions(phy2log, num_experts, num_gpus)
        size = phy2log.size // num_gpus
        held = place < size
        on_node = jnp.any(held[:, None] & same_node, axis=2)

        def choose(step: Array, dealt: _Dealt) -> _Dealt:
            # Nodes first, then those from elsewhere, who have the choice.
            gpu, far = step % num_gpus, step >= num_gpus
            mine = ~held[:, gpu] & (on_node[:, gpu] != far)
            near = held & (same_node[gpu] | far)
            taken = jnp.where(near, dealt.clients * num_gpus + number, _NEVER)
            best = jnp.argmin(taken, axis=1).astype(jnp.int32)
            clients = dealt.clients + (mine[:, None] & (gpus == best[:, None])).astype(jnp.int32)
            return _Dealt(clients, dealt.to.at[:, gpu].set(jnp.where(mine, best, dealt.to[:, gpu])))

        start = _Dealt(held.astype(jnp.int32), jnp.broadcast_to(gpus, held.shape))
        to = lax.fori_loop(0, 2 * num_gpus, choose, start).to
        return jnp.take_along_axis(gpus * size + place, to, axis=1)

    return jax.vmap(table)(placement.phy2log)


class _Dealt(NamedTuple):
    """Carry of `nearest`: how many GPUs send to every replica's, and where each one sends."""

    clients: Int32[Array, "E G"]
    to: Int32[Array, "E G"]
