"""The number of slots for engines in which all layers have equally many: memory against balance."""

from collections.abc import Sequence
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from eplb_jax.checks import LoadLike, as_amount, as_count
from eplb_jax.evaluation.slots_curve import as_windows, time_of_spares
from eplb_jax.planning.cost import Cost, curve_of
from eplb_jax.types import Topology


class SlotOption(NamedTuple):
    """A number of slots, and what it costs.

    Attributes:
        slots: Slots of a GPU in every layer.
        batch: Sequences whose KV cache fits beside them, on a GPU.
        step_seconds: Time of a step with that batch; infinite where none fits.
        seconds_per_token: Time of a step over the tokens that it makes, on all GPUs together.
    """

    slots: int
    batch: int
    step_seconds: float
    seconds_per_token: float


class SlotChoice(NamedTuple):
    """The number of slots with the least time per token, and all that were tried."""

    slots: int
    options: tuple[SlotOption, ...]


def choose_slots(
    load: LoadLike,
    judged: LoadLike,
    topology: Topology,
    slots: Sequence[int],
    *,
    cost: Cost,
    experts_per_token: int,
    memory_bytes: int,
    bytes_per_expert: int,
    kv_bytes_per_token: int,
    tokens_per_sequence: float,
    most_sequences: int | None = None,
    other_seconds: float = 0.0,
) -> SlotChoice:
    """The slots of a GPU, the same in every layer, with which decoding takes least time per token.

    A plain model. A slot takes its weights in every layer, and what is left holds KV caches:

        batch = (memory_bytes - L * slots * bytes_per_expert)
                / (kv_bytes_per_token * tokens_per_sequence), rounded down

        seconds per token = (other_seconds + sum over layers of the time of the most loaded GPU)
                            / (batch * G)

    A step makes a token of every sequence, so a layer gets batch * G * experts_per_token tokens in
    it. Its time with so many is that of `slots_curve` with this cost. More slots balance GPUs;
    fewer leave room for a larger batch, over which reading weights and `other_seconds` are shared.
    If time is proportional to tokens alone, memory costs nothing, and most slots win. Scheduling,
    prefill and communication are not in the model, unless in `other_seconds`.

    Args:
        load: Tokens that plans are made from: [L, E] or [T, L, E].
        judged: Windows to judge by, of the same shapes, which plans should not be made from.
        topology: GPUs; their slots and nodes do not matter.
        slots: Slots of a GPU to try, at least E / G each.
        cost: Times in seconds; its tokens_per_step is replaced by that of the batch.
        experts_per_token: Experts that the router chooses for a token.
        memory_bytes: Memory of a GPU for the experts of all layers and the KV cache.
        bytes_per_expert: Size of the weights of an expert of one layer.
        kv_bytes_per_token: Size of the KV cache of a token, of all layers, on its GPU.
        tokens_per_sequence: Mean number of tokens of a sequence in the cache.
        most_sequences: Sequences that there are for a GPU; None: always more than fit.
        other_seconds: Time of a step that neither batch nor slots change: dense layers, launches.

    Returns:
        The number of slots with the least time per token, the smallest of equally good ones, and
        the numbers of each, in the order of `slots`.

    Raises:
        TypeError: An argument is of the wrong kind.
        ValueError: As `slots_curve`; or no number of slots leaves room for a sequence, a number is
            too small, or there are no slots to try.

    Example:
        >>> memory = dict(memory_bytes=100, bytes_per_expert=20, kv_bytes_per_token=1)
        >>> load, cost = [[8, 1, 1, 2]], Cost(per_token=1, per_active_expert=10)
        >>> more = dict(cost=cost, experts_per_token=2, tokens_per_sequence=10, **memory)
        >>> choice = choose_slots(load, load, Topology(2, slots=2), [2, 3], **more)
        >>> choice.slots, [x.batch for x in choice.options]
        (2, [6, 4])

    References:
        CRAFT, 2026 (arXiv:2603.28768): replicas that cost a KV cache more than they gain.
    """
    seen, windows = as_windows(load, judged, topology)
    num_layers, num_experts = seen.shape[1:]
    num_gpus = topology.num_gpus
    if not isinstance(cost, Cost):
        raise TypeError(f"cost must be an eplb_jax.Cost, got {cost!r}")
    least = -(-num_experts // num_gpus)
    tried = [as_count("slots", x, least=least) for x in slots]
    if not tried:
        raise ValueError(f"slots is empty; give numbers to try, of at least {least}")
    if max(tried) > num_experts:
        raise ValueError(
            f"slots={max(tried)}, but there are {num_experts} experts for a GPU to hold; "
            f"nearest: {num_experts}"
        )
    sizes = {"experts_per_token": experts_per_token, "memory_bytes": memory_bytes}
    sizes |= {"bytes_per_expert": bytes_per_expert, "kv_bytes_per_token": kv_bytes_per_token}
    routed, memory, expert_bytes, kv_bytes = (as_count(k, x) for k, x in sizes.items())
    sequence = kv_bytes * as_amount("tokens_per_sequence", tokens_per_sequence)
    if sequence == 0:
        raise ValueError("tokens_per_sequence=0 must be more than 0; nearest: 1")
    other = as_amount("other_seconds", other_seconds)
    limit = None if most_sequences is None else as_count("most_sequences", most_sequences)
    most = max(tried) * num_gpus - num_experts
    total = np.asarray(windows, np.float64).sum(axis=2).mean(axis=0)

    def measure(size: int) -> SlotOption:
        batch = max(int((memory - num_layers * size * expert_bytes) // sequence), 0)
        batch = batch if limit is None else min(batch, limit)
        if batch == 0:
            return SlotOption(size, 0, float("inf"), float("inf"))
        tokens = float(batch * num_gpus * routed)
        spares = jnp.array([size * num_gpus - num_experts], jnp.int32)
        curve = curve_of(cost, tokens)
        time = time_of_spares(seen, windows, spares, curve, num_gpus=num_gpus, most=most)
        steps = np.where(total > 0, total, tokens) / tokens
        step = other + float(np.sum(np.asarray(time, np.float64)[:, 0] / steps))
        return SlotOption(size, batch, step, step / (batch * num_gpus))

    options = tuple(measure(x) for x in tried)
    best = min(options, key=lambda x: (x.seconds_per_token, x.slots))
    if best.batch == 0:
        weights = num_layers * best.slots * expert_bytes
        raise ValueError(
            f"memory_bytes={memory} hold no sequence beside {best.slots} slots in {num_layers} "
            f"layers; nearest: {weights + int(np.ceil(sequence))}"
        )
    return SlotChoice(best.slots, options)
