"""The search engine: candidates, keep the best, refine them, choose one.

Items go by rank, heaviest first. A lane is a candidate of a layer: all candidates of the first
layer, then those of the second, and so on. What is drawn at random is shared by all layers (see
`orders`).
"""

from collections.abc import Callable
from functools import reduce
from typing import NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int32, Key, Num

from eplb_jax.arrays import (
    LOAD_BITS,
    along,
    fixed_point,
    index_bits,
    loads_of,
    look_up,
    normalise,
    normalise_windows,
)
from eplb_jax.packing.duplicates import repeats_in, separate
from eplb_jax.packing.objectives import Objective, best
from eplb_jax.packing.searches import Search
from eplb_jax.packing.sorting import descending_order, exact_descending_order

BLOCK = 1 << 18
"""Items times lanes that are searched at once: a megabyte an array, which caches hold."""

_Found = TypeVar("_Found")


def packs(
    weight: Float[Array, "L n"],
    num_packs: int,
    strategy: Search,
    key: Key[Array, ""],
    labels: Int32[Array, "L n"] | None = None,
    repeats: int | None = None,
    windows: Float[Array, "L T n"] | None = None,
) -> Int32[Array, "L m c"]:
    """The items of every pack of every layer.

    Items with one of the `labels` follow each other and are num_packs at most; `repeats` items at
    most, n if not given, have the label of an earlier one. Construction goes by `weight`, and so
    does all else but where `windows` are given and the refinement sees them.
    """
    num_layers, n = weight.shape
    if n == num_packs:
        identity = jnp.arange(n, dtype=jnp.int32)[:, None]
        return jnp.broadcast_to(identity, (num_layers, n, 1))
    if num_layers == 0:
        return jnp.zeros((0, num_packs, n // num_packs), jnp.int32)
    refinement = strategy.refinement
    keeps_labels = refinement is not None and refinement.keeps_labels
    weight = normalise(weight)
    with jax.named_scope("sorted"):
        # What nearly falls does for exchanges, in half the time.
        order = (descending_order if keeps_labels else exact_descending_order)(weight.T)
    if num_packs == 1:
        return order.T[:, None]

    falling = look_up(weight.T, order)
    label = None if labels is None else look_up(labels.T, order)
    seen = falling
    if refinement is not None and refinement.sees_windows:
        seen = falling[None]
        if windows is not None:
            windows = jnp.moveaxis(normalise_windows(windows), 0, -1)
            seen = jax.vmap(lambda x: look_up(x, order))(windows)
    found = _found(_Items(falling, seen, label), num_packs, strategy, key)
    contents = jnp.moveaxis(look_up(order, found), -1, 0)
    if labels is None or keeps_labels:
        return contents
    steps = n if repeats is None else repeats
    with jax.named_scope("separate"):
        return jax.vmap(lambda x, y, z: separate(x, y, z, steps))(contents, weight, labels)


class _Items(NamedTuple):
    """The items of every layer, heaviest first.

    `seen` are the weights that refined packings are judged by: the same, or those of windows.
    """

    weight: Float[Array, "n L"]
    seen: Float[Array, "*T n L"]
    label: Int32[Array, "n L"] | None

    def lanes(self, candidates: int) -> "_Items":
        """The same with so many lanes for a layer."""
        if candidates == 1:
            return self
        return jax.tree.map(lambda x: jnp.repeat(x, candidates, axis=-1), self)


class _Drawn(NamedTuple):
    """The candidates: orders that are the same for all layers, and factors of the sort keys."""

    fixed: Int32[Array, "n K1"]
    noisy: Float[Array, "n K2"]


def _draw(strategy: Search, key: Key[Array, ""], num_items: int) -> _Drawn:
    keys = jax.random.split(key, len(strategy.orders))
    drawn = [order.draw(k, num_items) for order, k in zip(strategy.orders, keys, strict=True)]
    fixed = [x for x in drawn if x.dtype == jnp.int32]
    noisy = [x for x in drawn if x.dtype == jnp.float32]
    return _Drawn(
        jnp.concatenate([jnp.zeros((num_items, 0), jnp.int32), *fixed], axis=1),
        jnp.concatenate([jnp.zeros((num_items, 0), jnp.float32), *noisy], axis=1),
    )


def _found(
    items: _Items, num_packs: int, strategy: Search, key: Key[Array, ""]
) -> Int32[Array, "m c L"]:
    """The packing that the strategy finds for every layer."""
    n, num_layers = items.weight.shape
    draw_key, refine_key = jax.random.split(key)
    drawn = _draw(strategy, draw_key, n)

    def constructed(orders: Int32[Array, "n L k"]) -> Int32[Array, "m c lanes"]:
        weight = items.lanes(orders.shape[2]).weight
        with jax.named_scope("start"):
            return strategy.construction(weight, orders.reshape(n, -1), num_packs).contents

    def finished(orders: Int32[Array, "n L k"]) -> _Finished:
        of_lanes = items.lanes(orders.shape[2])
        contents, scores = _refined(constructed(orders), of_lanes, strategy, refine_key)
        apart = lambda x: x.reshape(*x.shape[:-1], *orders.shape[1:])  # noqa: E731
        return _Finished(apart(contents), jax.tree.map(apart, scores))

    def scored(drawn: _Drawn) -> tuple[Num[Array, "L k"], ...]:
        orders = _orders(items.weight, drawn)
        weight = items.lanes(orders.shape[2]).weight
        with jax.named_scope("start"):
            built = strategy.construction(weight, orders.reshape(n, -1), num_packs)
        scores = strategy.objective(built.loads)
        return jax.tree.map(lambda x: x.reshape(num_layers, -1), scores)

    if strategy.keep < strategy.num_candidates:
        scores = _in_blocks(scored, drawn, num_layers)
        kept = jax.vmap(lambda *x: best(x, strategy.keep))(*scores)
        end = finished(_select(items.weight, drawn, kept))
    else:
        end = _in_blocks(lambda x: finished(_orders(items.weight, x)), drawn, num_layers)
    if strategy.keep == 1:
        return end.contents[..., 0]
    chosen = jax.vmap(lambda *x: best(x, 1)[0])(*end.scores)
    return along(end.contents, chosen[None, None, :, None], 3)[..., 0]


class _Finished(NamedTuple):
    """Refined packings, and the numbers by which they are compared."""

    contents: Int32[Array, "m c L k"]
    scores: tuple[Num[Array, "L k"], ...]


def _refined(
    contents: Int32[Array, "m c lanes"], items: _Items, strategy: Search, key: Key[Array, ""]
) -> tuple[Int32[Array, "m c lanes"], tuple[Num[Array, " lanes"], ...]]:
    """The packing of every lane after the refinement, and its scores if several are compared."""
    refinement, label = strategy.refinement, items.label
    if refinement is not None:
        if not refinement.keeps_labels:
            label = None
        if label is not None:
            contents = _uncrowded(contents, label)
        with jax.named_scope("exchanges"):
            contents = refinement(contents, items.seen, key, label)
    if strategy.keep == 1:
        return contents, ()
    windows = items.seen.reshape(-1, *items.weight.shape)
    scores = added_up(strategy.objective, windows, contents)
    if items.label is not None:
        scores = (repeats_in(look_up(items.label, contents)), *scores)
    return contents, scores


def added_up(
    objective: Objective, seen: Float[Array, "T n K"], contents: Int32[Array, "m c K"]
) -> tuple[Num[Array, " K"], ...]:
    """The objective of every packing, added up over windows."""
    bits = LOAD_BITS - index_bits(len(seen)) if len(seen) > 1 else LOAD_BITS
    units = fixed_point(seen, contents.shape[1], bits)
    scores = [objective(loads_of(x, contents)) for x in units]
    return jax.tree.map(lambda *x: reduce(jnp.add, x), *scores)


def _uncrowded(
    contents: Int32[Array, "m c K"], label: Int32[Array, "n K"]
) -> Int32[Array, "m c K"]:
    """Packings with few repeats; in place of others, the items dealt out to the packs in turn.

    Items with one label have one weight and follow each other, so that dealing parts them. Where
    most experts have replicas on most GPUs, exchanges could not part them all.
    """
    num_packs, capacity, _ = contents.shape
    dealt = jnp.arange(num_packs * capacity, dtype=jnp.int32).reshape(capacity, num_packs).T
    crowded = repeats_in(look_up(label, contents)) > num_packs // 4
    return jnp.where(crowded, dealt[..., None], contents)


def _orders(weight: Float[Array, "n L"], drawn: _Drawn) -> Int32[Array, "n L K"]:
    """The orders of all candidates, the fixed ones first."""
    fixed, noisy = drawn
    orders = jnp.broadcast_to(fixed[:, None], (*weight.shape, fixed.shape[1]))
    if noisy.shape[1] == 0:
        return orders
    return jnp.concatenate([orders, _by_key(noisy[:, None] * weight[:, :, None])], axis=2)


def _by_key(keys: Float[Array, "n L K"]) -> Int32[Array, "n L K"]:
    return descending_order(keys.reshape(len(keys), -1)).reshape(keys.shape)


def _select(
    weight: Float[Array, "n L"], drawn: _Drawn, candidates: Int32[Array, "L k"]
) -> Int32[Array, "n L k"]:
    """The orders of some candidates: made again, so that those of all need not be stored."""
    fixed, noisy = drawn
    num_fixed = fixed.shape[1]
    if noisy.shape[1] == 0:
        return fixed[:, candidates]
    keys = noisy[:, jnp.maximum(candidates - num_fixed, 0)] * weight[:, :, None]
    if num_fixed == 0:
        return _by_key(keys)
    from_fixed = fixed[:, jnp.minimum(candidates, num_fixed - 1)]
    return jnp.where(candidates < num_fixed, from_fixed, _by_key(keys))


def _in_blocks(search: Callable[[_Drawn], _Found], drawn: _Drawn, num_layers: int) -> _Found:
    """What `search` finds, candidates last and in their order, some of them at a time."""
    n = len(drawn.fixed)
    block = max(1 << (BLOCK // max(n * num_layers, 1)).bit_length() >> 1, 8)
    whole = [x.shape[1] // block * block if x.shape[1] > block else 0 for x in drawn]
    rest = _Drawn(*(x[:, k:] for x, k in zip(drawn, whole, strict=True)))

    def in_turn(kind: str, orders: Array) -> _Found:
        none = _Drawn(*(x[:, :0] for x in drawn))
        blocks = jnp.moveaxis(orders.reshape(n, -1, block), 1, 0)
        found = lax.map(lambda x: search(none._replace(**{kind: x})), blocks)
        return jax.tree.map(lambda x: jnp.moveaxis(x, 0, -2).reshape(*x.shape[1:-1], -1), found)

    fixed = [in_turn("fixed", drawn.fixed[:, : whole[0]])] if whole[0] else []
    noisy = [in_turn("noisy", drawn.noisy[:, : whole[1]])] if whole[1] else []
    if any(x.shape[1] for x in rest):
        last, k = search(rest), rest.fixed.shape[1]
        fixed.append(jax.tree.map(lambda x: x[..., :k], last))
        noisy.append(jax.tree.map(lambda x: x[..., k:], last))
    return jax.tree.map(lambda *x: jnp.concatenate(x, axis=-1), *fixed, *noisy)
