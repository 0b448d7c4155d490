"""`balanced_packing`: the public entry to the search."""

from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32, Key
from numpy.typing import ArrayLike

from eplb_jax.arrays import along, relative, sanitise, take_rows
from eplb_jax.checks import (
    LoadLike,
    as_count,
    as_key,
    as_labels,
    as_load,
    check_divides,
    fixed_if_none,
)
from eplb_jax.packing.duplicates import bound_labels
from eplb_jax.packing.search import packs
from eplb_jax.packing.searches import Search, resolve_search
from eplb_jax.packing.sorting import MAX_ITEMS, inverse
from eplb_jax.sharding import by_layers
from eplb_jax.types import Packing


def balanced_packing(
    weight: LoadLike,
    num_packs: int,
    *,
    strategy: str | Search = "auto",
    key: Key[Array, ""] | None = None,
    labels: ArrayLike | Array | None = None,
) -> Packing:
    """Pack n weighted items into packs of n / num_packs items with balanced loads.

    Deterministic: the same weights, strategy and key give the same packing, bit for bit, and the
    packing of a layer does not depend on the other layers. Inside `jax.jit`, NaN and negative
    weights count as zero and infinite ones as the largest float32. n == num_packs gives the
    identity.

    Args:
        weight: [L, n] weights in any unit; anything `jnp.asarray` takes. n is at most 32768.
        num_packs: m; divides n.
        strategy: A name from `eplb_jax.STRATEGIES` or a `Strategy`.
        key: For strategies that draw at random. None: a fixed key.
        labels: [L, n] integers. Items of a layer with one label, such as replicas of one expert,
            go to distinct packs where exchanges can achieve that; of more than num_packs items
            with one label, as few as possible share a pack.

    Returns:
        The pack of every item, and its position in that pack, each int32 [L, n].

    Raises:
        TypeError: An argument is of the wrong kind.
        ValueError: num_packs does not divide n, the strategy is not known, `weight` is not
            [L, n], labels have another shape, or a weight is NaN, infinite or negative.

    Example:
        >>> packing = balanced_packing([[8, 1, 6, 3, 5, 4]], 3)
        >>> packing.pack_index.tolist(), packing.rank_in_pack.tolist()
        ([[1, 1, 0, 0, 2, 2]], [[0, 1, 0, 1, 0, 1]])

    References:
        DeepSeek-AI, EPLB (github.com/deepseek-ai/EPLB): the function of this name.
    """
    load = as_load(weight, "weight", ("layer", "item"), least_axes=2)
    num_packs = as_count("num_packs", num_packs)
    check_size(load.shape[1], num_packs)
    marks = None if labels is None else as_labels(labels, load.shape)
    options = {"num_packs": num_packs, "strategy": resolve_search(strategy)}
    return _balanced_packing(load, as_key(key), marks, **options)


def check_size(num_items: int, num_packs: int) -> None:
    """Raise ValueError unless so many items can be packed."""
    if num_items > MAX_ITEMS:
        raise ValueError(f"{num_items} items are too many to pack; nearest: {MAX_ITEMS}")
    check_divides("num_packs", num_packs, "number of items", num_items)


@by_layers
@partial(jax.jit, static_argnames=("num_packs", "strategy"))
def _balanced_packing(
    weight: Float[Array, "L n"],
    key: Key[Array, ""] | None,
    labels: Int32[Array, "L n"] | None,
    *,
    num_packs: int,
    strategy: Search,
) -> Packing:
    load, pack_key = sanitise(weight), fixed_if_none(key)
    if strategy.distinct:
        load = relative(load)
    if labels is None:
        contents = packs(load, num_packs, strategy, pack_key)
    else:
        labels = jax.vmap(lambda x: bound_labels(x, num_packs))(labels)
        by_label = jnp.argsort(labels, axis=1, stable=True).astype(jnp.int32)
        load, labels = (along(x, by_label, 1) for x in (load, labels))
        contents = packs(load, num_packs, strategy, pack_key, labels)
        contents = jax.vmap(take_rows)(by_label, contents)
    capacity = contents.shape[2]
    slot = jax.vmap(inverse)(contents.reshape(weight.shape))
    return Packing(slot // capacity, slot % capacity)
