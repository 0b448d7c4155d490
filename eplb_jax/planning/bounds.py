"""A lower bound on the maximum GPU load of any plan."""

from functools import partial
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float
from numpy.typing import ArrayLike

from eplb_jax.checks import LoadLike, as_load
from eplb_jax.packing.bounds import bound_of_layer
from eplb_jax.planning.cost import Cost, Curve, curve_of, time_loads
from eplb_jax.planning.gpus import as_speed
from eplb_jax.planning.replication import replicate
from eplb_jax.sharding import spec_of, under_auto
from eplb_jax.types import Topology, check_experts, check_topology

_HALVINGS = 20
"""Bisection steps."""

_A_LITTLE_LESS = 1 - 1e-6
"""Factor of replica counts before they are rounded up, so that rounding errors add none."""


class _Between(NamedTuple):
    """The test of `plan_bound` fails below, and passes above."""

    below: Float[Array, ""]
    above: Float[Array, ""]


def plan_bound(
    load: LoadLike,
    topology: Topology,
    *,
    split: Literal["flexible"] | None = None,
    speed: ArrayLike | Array | None = None,
    cost: Cost | None = None,
) -> Float[Array, "*L"]:
    """A lower bound on the maximum GPU load of any plan, whatever its replica counts.

    With GPUs that differ it is of load / speed: what all GPUs take if it is the same for each, or
    the largest replica of the best counts on the fastest GPU, whichever is more.

    With spare slots it is the least T that passes this test. In a plan of maximum load T, no
    replica is above T - f, where f is the least load of the other c - 1 slots of its GPU. So an
    expert of load w has at least ceil(w / (T - f)) replicas, and there must be enough slots. The s
    slots left over could all be its own, so none of its replicas is below
    w / (ceil(w / (T - f)) + s), and the `packing_bound` of such replicas must not exceed T. Such
    replicas for f = 0 give f. Without spare slots it is `packing_bound`.

    Args:
        load: [E], [L, E] or [T, L, E] loads in any unit.
        topology: GPUs and slots, at least E in total; nodes and groups are ignored.
        split: "flexible": of any plan under any split, which is the mean GPU load or the largest
            replica of the best counts. None: replicas share the load of an expert equally.
        speed: Of every GPU, [G]; None: equal.
        cost: What tokens and active experts cost: the bound is that of the time of a GPU in a
            window, whether slots are used or not. It is the least T for which there are counts
            whose replicas take at most T each, fit in the slots, and take at most G T in total.
            None: tokens.

    Returns:
        The bound of every layer (and window), in the unit of the load, or of load / speed, or of
        the cost.

    Raises:
        TypeError: An argument is of the wrong kind.
        ValueError: There are fewer slots than experts, `load` has another shape, a load is NaN,
            infinite or negative, or `cost` is given with `split` or `speed`.

    Example:
        >>> plan_bound([[90, 30, 20, 10]], Topology(3, slots=2)).tolist()
        [50.0]
    """
    array = as_load(load, "load")
    check_topology(topology)
    check_experts(topology, array.shape[-1])
    if cost is not None:
        if split is not None or speed is not None:
            raise ValueError("cost takes no split and no speed; nearest: without these")
        most = min(topology.num_gpus, topology.num_replicas - array.shape[-1] + 1)
        numbers = {"num_replicas": topology.num_replicas, "num_gpus": topology.num_gpus}
        return _time_bound(jnp.asarray(array), curve_of(cost), most=most, **numbers)
    bound = partial(_plan_bound, num_replicas=topology.num_replicas, num_gpus=topology.num_gpus)
    if split is not None or speed is not None or not isinstance(topology.slots, int):
        takes = jnp.asarray(np.array(topology.slots_of_gpu) > 0)
        speeds = as_speed(speed, topology)
        speeds = jnp.where(takes, 1.0 if speeds is None else speeds, 0)
        return _bound_of_gpus(jnp.asarray(array), speeds, num_replicas=topology.num_replicas)
    return under_auto(bound, PartitionSpec(*spec_of(array)[:-1]), array)


@partial(jax.jit, static_argnames=("num_replicas", "num_gpus"))
def _plan_bound(
    load: Float[Array, "*L E"], *, num_replicas: int, num_gpus: int
) -> Float[Array, "*L"]:
    if num_replicas == load.shape[-1]:
        bound = partial(bound_of_layer, num_packs=num_gpus)
    else:
        bound = partial(_plan_bound_of_layer, num_replicas=num_replicas, num_gpus=num_gpus)
    return jnp.vectorize(bound, signature="(e)->()")(load)


@partial(jax.jit, static_argnames=("most", "num_replicas", "num_gpus"))
def _time_bound(
    load: Float[Array, "*L E"], curve: Curve, *, most: int, num_replicas: int, num_gpus: int
) -> Float[Array, "*L"]:
    def of_layer(load: Float[Array, " E"]) -> Float[Array, ""]:
        count = jnp.arange(1, most + 1, dtype=jnp.int32)
        loads = jnp.broadcast_to(load, (most, load.shape[0]))
        counts = jnp.broadcast_to(count[:, None], loads.shape)
        work = time_loads(loads, counts, curve)  # [count, E]
        time = work / counts.astype(jnp.float32)
        least_work = lax.cummin(work, axis=0, reverse=True)

        def halve(_: Array | int, between: _Between) -> _Between:
            middle = (between.below + between.above) / 2
            above = jnp.sum(time > middle, axis=0, dtype=jnp.int32)  # the counts that are too few
            total = jnp.take_along_axis(least_work, jnp.minimum(above, most - 1)[None], axis=0)
            passed = jnp.all(above < most) & (jnp.sum(above + 1, dtype=jnp.int32) <= num_replicas)
            passed &= jnp.sum(total) <= num_gpus * middle
            return _Between(
                jnp.where(passed, between.below, middle), jnp.where(passed, middle, between.above)
            )

        below = jnp.sum(least_work[0]) / num_gpus
        above = jnp.maximum(below, jnp.max(time[0])) * (1 + 1e-6)
        return lax.fori_loop(0, _HALVINGS, halve, _Between(below * (1 - 1e-6), above)).below

    return jnp.vectorize(of_layer, signature="(e)->()")(load)


@partial(jax.jit, static_argnames="num_replicas")
def _bound_of_gpus(
    load: Float[Array, "*L E"], speed: Float[Array, " G"], *, num_replicas: int
) -> Float[Array, "*L"]:
    def of_layer(load: Float[Array, " E"]) -> Float[Array, ""]:
        counts = replicate(load[None], num_replicas, len(speed)).logcnt[0].astype(load.dtype)
        return jnp.maximum(jnp.sum(load) / jnp.sum(speed), jnp.max(load / counts) / jnp.max(speed))

    return jnp.vectorize(of_layer, signature="(e)->()")(load)


def _plan_bound_of_layer(
    load: Float[Array, " E"], num_replicas: int, num_gpus: int
) -> Float[Array, ""]:
    counts = replicate(load[None], num_replicas).logcnt[0]
    mean = jnp.sum(load) / num_gpus
    below = jnp.maximum(mean, jnp.max(load / counts.astype(load.dtype)))

    def smallest_replicas(limit: Float[Array, ""]) -> tuple[Float[Array, " R"], Array]:
        """Replicas no larger than in any plan with none above a limit, and whether there is one."""
        least = jnp.ceil(load / jnp.where(limit > 0, limit, jnp.inf) * _A_LITTLE_LESS)
        least = jnp.maximum(least, 1).astype(jnp.int32)
        over = num_replicas - jnp.sum(least, dtype=jnp.int32)
        share = load / (least + jnp.maximum(over, 0)).astype(load.dtype)
        replicas = jnp.repeat(share, least, total_repeat_length=num_replicas)
        spare = jnp.arange(num_replicas, dtype=jnp.int32) >= num_replicas - over
        return jnp.where(spare, jnp.min(share), replicas), (over >= 0) & (limit > 0)

    def possible(maximum: Float[Array, ""]) -> Array:
        replicas, _ = smallest_replicas(maximum)
        others = jnp.sum(jnp.sort(replicas)[: num_replicas // num_gpus - 1])
        replicas, enough = smallest_replicas(maximum - others)
        return enough & (bound_of_layer(replicas, num_gpus) <= maximum)

    def halve(_: Array | int, between: _Between) -> _Between:
        middle = (between.below + between.above) / 2
        passed = possible(middle)
        return _Between(
            jnp.where(passed, between.below, middle), jnp.where(passed, middle, between.above)
        )

    end = lax.fori_loop(0, _HALVINGS, halve, _Between(below, 2 * below))
    return jnp.where(possible(below * (1 + 1e-6)), below, end.below)
