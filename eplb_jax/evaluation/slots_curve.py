"""The time of every layer against its number of spare slots, for all numbers in one sweep."""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int32

from eplb_jax.arrays import first_equal, fixed_point, normalise, pick, rows
from eplb_jax.checks import LoadLike, as_count, as_load
from eplb_jax.packing.exchange import BITS, BITS_OF_SQUARES, State
from eplb_jax.packing.pair_exchange import Pairs
from eplb_jax.packing.peak_exchange import Peak
from eplb_jax.packing.sorting import descending_order
from eplb_jax.planning.cost import Cost, Curve, curve_of, time_loads
from eplb_jax.planning.forecast import Forecast, forecast_of
from eplb_jax.planning.replication import replicate
from eplb_jax.types import Topology, check_topology

_ROUNDS, _MORE_ROUNDS = 4, 12
"""Rounds of exchanges in all pairs of GPUs, for one window and for several."""

_PEAKS = 4
"""Exchanges of the most loaded GPU with any other, after them."""

_AT_ONCE = 8
"""Numbers of spares that are planned for at once: their arrays stay in caches."""


def slots_curve(
    load: LoadLike,
    judged: LoadLike,
    topology: Topology,
    most_spares: int,
    *,
    cost: Cost | None = None,
) -> Float[Array, "L r"]:
    """The time of every layer with 0, 1, ... `most_spares` spare slots.

    A step waits for the most loaded GPU of every layer, so the time of a layer is the load of that
    GPU. For every number of spares a quick plan is made from `load`, for its windows as by `plan`:
    greedy replica counts, replicas to GPUs by descending load, a few exchanges. GPUs have equally
    many slots, or one less where E plus the spares is no multiple of G. The plan is measured on
    `judged`, which it does not see. O(r (E + r) G) a layer, in one program.

    `plan` balances `load` better, by 0.1 % of the mean where there are spares for it; on other
    windows that is less than their noise. Nodes and groups are not considered.

    Args:
        load: What plans are made from: [L, E] or [T, L, E] tokens, the oldest window first.
        judged: Windows to measure on, [L, E] or [T, L, E].
        topology: GPUs; their slots and nodes do not matter.
        most_spares: r - 1, the largest number of spare slots of a layer, over all GPUs.
        cost: What a replica costs; None: its tokens.

    Returns:
        Tokens of the most loaded GPU, or its time in the unit of `cost`, mean over judged windows:
        float32 [L, most_spares + 1]. Plans and windows have noise: a curve need not descend.

    Raises:
        TypeError: An argument is of the wrong kind.
        ValueError: Shapes differ, a load is NaN, infinite or negative, there are more spares than
            E (G - 1), or GPUs are not equal.

    Example:
        >>> slots_curve([[8, 1, 1, 2]], [[9, 1, 1, 1]], Topology(2, slots=2), 2).tolist()
        [[10.0, 6.5, 6.0]]
    """
    seen, judged_load = as_windows(load, judged, topology)
    most = as_count("most_spares", most_spares, least=0)
    useful = seen.shape[2] * (topology.num_gpus - 1)
    if most > useful:
        raise ValueError(
            f"most_spares={most}, but {seen.shape[2]} experts have at most {useful} more replicas "
            f"on {topology.num_gpus} GPUs; nearest: {useful}"
        )
    spares = jnp.arange(most + 1, dtype=jnp.int32)
    curve = None if cost is None else curve_of(cost)
    return time_of_spares(seen, judged_load, spares, curve, num_gpus=topology.num_gpus, most=most)


def as_windows(
    load: LoadLike, judged: LoadLike, topology: Topology
) -> tuple[Float[Array, "S L E"], Float[Array, "T L E"]]:
    """Both loads as windows of the same layers and experts, for equal GPUs.

    Raises:
        TypeError: An argument is of the wrong kind.
        ValueError: They have other shapes or invalid loads, or GPUs are not equal.
    """
    check_topology(topology)
    _ = topology.slots_per_gpu  # raises where GPUs differ
    both = []
    for name, value in (("load", load), ("judged", judged)):
        array = jnp.asarray(as_load(value, name, least_axes=2))
        both.append(array if array.ndim == 3 else array[None])
    if both[0].shape[1:] != both[1].shape[1:]:
        raise ValueError(
            f"judged must have the layers and experts of load, {both[0].shape[1:]}, got "
            f"{both[1].shape[1:]}"
        )
    return both[0], both[1]


@partial(jax.jit, static_argnames=("num_gpus", "most"))
def time_of_spares(
    load: Float[Array, "S L E"],
    judged: Float[Array, "T L E"],
    spares: Int32[Array, " k"],
    curve: Curve | None,
    *,
    num_gpus: int,
    most: int,
) -> Float[Array, "L k"]:
    """`slots_curve` for some numbers of spares, all of them at most `most`."""
    num_experts = load.shape[2]
    forecast = forecast_of(load, summed=False)
    peak = forecast.load if forecast.above is None else forecast.load + forecast.above
    first = replicate(peak, num_experts + most, num_gpus).phy2log[:, num_experts:].T
    more = first[:, None] == rows(num_experts, peak.T)[None]
    count = jnp.cumsum(more.astype(jnp.int32), axis=0, dtype=jnp.int32) + 1
    count = jnp.concatenate([jnp.ones((1, *count.shape[1:]), jnp.int32), count])
    judged = judged.transpose(0, 2, 1)
    tokens, unit = _in_tokens(load, forecast)

    def time(tokens: Float[Array, "T E L"], count: Int32[Array, "E L"]) -> Float[Array, "T E L"]:
        """The time of a replica of every expert."""
        if curve is not None:
            counts = jnp.broadcast_to(count, tokens.shape).swapaxes(1, 2)
            tokens = time_loads(tokens.swapaxes(1, 2), counts, curve).swapaxes(1, 2)
        return tokens / count[None].astype(jnp.float32)

    def of_number(spares: Int32[Array, ""]) -> Float[Array, " L"]:
        counts = count[spares]
        weight = time(tokens, counts) * unit
        used = num_experts + spares
        expert = _plan(weight[0], weight[1:], counts, used, num_gpus, num_experts + most)
        empty = jnp.zeros((len(judged), expert.shape[0], judged.shape[2]), jnp.float32)
        each = jnp.concatenate([time(judged, counts), empty], axis=1)
        slots = expert.reshape(-1, expert.shape[2])
        by_slot = jax.vmap(lambda x: pick(x, slots))(each)
        by_gpu = jnp.sum(by_slot.reshape(len(judged), *expert.shape), axis=1)
        return jnp.mean(jnp.max(by_gpu, axis=1), axis=0)

    return lax.map(of_number, spares, batch_size=_AT_ONCE).T


def _in_tokens(
    load: Float[Array, "S L E"], forecast: Forecast
) -> tuple[Float[Array, "T E L"], Float[Array, "T 1 L"]]:
    """The expected window and those to balance, in tokens, and what theirs weigh."""
    if forecast.windows is None:
        tokens = jnp.concatenate([load, load]).transpose(0, 2, 1)
        return tokens, jnp.ones_like(tokens[:, :1])
    windows = jnp.concatenate([forecast.load[:, None], forecast.windows], axis=1)
    windows = windows.transpose(1, 2, 0)
    unit = jnp.sum(windows, axis=1, keepdims=True)
    mean = jnp.sum(jnp.mean(load, axis=0), axis=1)[None, None]
    return windows / jnp.where(unit > 0, unit, 1) * mean, unit / jnp.maximum(mean, 1)


class _Filled(NamedTuple):
    """The load of every GPU, its number of replicas and the expert of the last one."""

    load: Float[Array, "G L"]
    held: Int32[Array, "G L"]
    last: Int32[Array, "G L"]


def _plan(
    weight: Float[Array, "E L"],
    windows: Float[Array, "T E L"],
    count: Int32[Array, "E L"],
    used: Int32[Array, ""],
    num_gpus: int,
    most: int,
) -> Int32[Array, "c G L"]:
    """The expert in every slot of a quick plan; E and more in empty ones.

    Empty slots are numbered from the last of a GPU, so those that all GPUs have are the same
    "experts" everywhere: exchanges, which keep replicas of an expert on distinct GPUs, never give
    a GPU two empty slots more than another.

    Args:
        weight: Of a replica of every expert, as expected.
        windows: The same in the windows to balance.
        count: Replicas of every expert.
        used: Number of slots that hold one.
        num_gpus: G.
        most: The largest number of slots that any plan uses.
    """
    num_experts, num_layers = weight.shape
    weight = normalise(weight, 0)
    capacity = -(-most // num_gpus)
    size = -(-used // num_gpus)
    whole = num_gpus - (size * num_gpus - used)  # GPUs with `size` replicas; the others one less
    order = descending_order(weight)
    repeat = partial(jnp.repeat, total_repeat_length=most)
    expert = jax.vmap(repeat, -1, -1)(order, pick(count, order))
    gpus = rows(num_gpus, weight)

    def place(
        filled: _Filled, item: tuple[Array, Array, Array]
    ) -> tuple[_Filled, tuple[Array, Array]]:
        number, expert, weight = item
        full = jnp.sum(filled.held == size, axis=0, dtype=jnp.int32)
        room = filled.held < jnp.where(full < whole, size, size - 1)[None]
        # Replicas of one expert come one after the other.
        cost = jnp.where(filled.last == expert[None], filled.load + 1e6, filled.load)
        cost = jnp.where(room, cost, jnp.inf)
        gpu = first_equal(cost, jnp.min(cost, axis=0))
        here = (gpus == gpu[None]) & (number < used)
        position = jnp.max(jnp.where(here, filled.held, -1), axis=0)
        after = _Filled(
            jnp.where(here, filled.load + weight[None], filled.load),
            filled.held + here.astype(jnp.int32),
            jnp.where(here, expert[None], filled.last),
        )
        return after, (gpu, position)

    none = jnp.zeros((num_gpus, num_layers), jnp.int32)
    start = _Filled(none.astype(jnp.float32), none, none - 1)
    items = jnp.arange(most, dtype=jnp.int32), expert, pick(weight, expert)
    _, (gpu, position) = lax.scan(place, start, items)
    position = jnp.where(position < 0, capacity, position)  # dropped
    empty = jnp.arange(num_experts, num_experts + capacity, dtype=jnp.int32)[:, None, None]
    contents = jnp.broadcast_to(empty, (capacity, num_gpus, num_layers))
    layer = jnp.broadcast_to(jnp.arange(num_layers, dtype=jnp.int32), gpu.shape)
    contents = contents.at[position, gpu, layer].set(expert, mode="drop")
    bits = BITS if len(windows) == 1 else BITS_OF_SQUARES
    units = fixed_point(normalise(windows, (0, 1)), capacity, bits)
    units = jnp.pad(units, ((0, 0), (0, capacity), (0, 0)))
    return jax.vmap(_exchange, -1, -1)(contents, units)


def _exchange(expert: Int32[Array, "c G"], units: Int32[Array, "T n"]) -> Int32[Array, "c G"]:
    """The plan of a layer after a few exchanges."""
    state, key = State(units[:, expert], expert, expert), jax.random.key(0)
    rounds = _ROUNDS if len(units) == 1 else _MORE_ROUNDS
    for step in (Pairs(rounds, two=False), Peak(_PEAKS)):
        state = step.improve(state, key, labelled=True)
    return state.item
