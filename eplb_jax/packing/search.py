"""The search engine: candidates, keep the best, refine them, choose one.

Items are sorted by descending weight. A lane is a candidate of a layer: all candidates of the first
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

from eplb_jax.arrays import LOAD_BITS, along, index_bits, loads_of, look_up
from eplb_jax.packing.duplicates import count_duplicates, separate
from eplb_jax.packing.items import Items, items_of, with_bits
from eplb_jax.packing.objectives import Objective, best
from eplb_jax.packing.searches import Search
from eplb_jax.packing.sorting import descending_order, exact_descending_order

BLOCK = 1 << 18
"""Items times lanes that are searched at once: 1 MB an array, which fits in caches."""

_Found = TypeVar("_Found")


def packs(
    weight: Float[Array, "L n"],
    num_packs: int,
    search: Search,
    key: Key[Array, ""],
    labels: Int32[Array, "L n"] | None = None,
    max_duplicates: int | None = None,
    windows: Float[Array, "L T n"] | None = None,
) -> Int32[Array, "L m c"]:
    """The items of every pack of every layer.

    Args:
        weight: Nonnegative weights, by which packings are constructed.
        num_packs: m; divides n.
        search: How to search.
        key: What random draws come from.
        labels: Items with one label are consecutive, and at most num_packs.
        max_duplicates: Maximum number of items with the label of an earlier one; None: n.
        windows: Weights in T windows, which refinements that use windows balance instead.
    """
    num_layers, n = weight.shape
    capacity = n // num_packs
    if capacity == 1:
        identity = jnp.arange(n, dtype=jnp.int32)[:, None]
        return jnp.broadcast_to(identity, (num_layers, n, 1))
    if num_layers == 0:
        return jnp.zeros((0, num_packs, capacity), jnp.int32)
    refinement = search.refinement
    keeps_labels = refinement is not None and refinement.keeps_labels
    if windows is not None:
        uses_windows = refinement is not None and refinement.uses_windows
        windows = jnp.moveaxis(windows, 0, -1) if uses_windows else None
    items = items_of(weight.T, num_packs, None if labels is None else labels.T, windows)
    with jax.named_scope("sorted"):
        # Exchanges need no exact order, which takes twice as long.
        order = (descending_order if keeps_labels else exact_descending_order)(items.weight)
    if num_packs == 1:
        return order.T[:, None]

    contents = look_up(order, _search(items.take(order), num_packs, search, key))
    contents = jnp.moveaxis(contents, -1, 0)
    if labels is None or keeps_labels:
        return contents
    steps = n if max_duplicates is None else max_duplicates
    with jax.named_scope("separate"):
        return jax.vmap(lambda x, y, z: separate(x, y, z, steps))(contents, items.units.T, labels)


class _Drawn(NamedTuple):
    """The candidates: orders that are the same for all layers, and factors of the sort keys."""

    fixed: Int32[Array, "n K1"]
    noisy: Float[Array, "n K2"]


def _draw(search: Search, key: Key[Array, ""], num_items: int) -> _Drawn:
    keys = jax.random.split(key, len(search.orders))
    drawn = [order.draw(k, num_items) for order, k in zip(search.orders, keys, strict=True)]
    fixed = [x for x in drawn if x.dtype == jnp.int32]
    noisy = [x for x in drawn if x.dtype == jnp.float32]
    return _Drawn(
        jnp.concatenate([jnp.zeros((num_items, 0), jnp.int32), *fixed], axis=1),
        jnp.concatenate([jnp.zeros((num_items, 0), jnp.float32), *noisy], axis=1),
    )


class _Finished(NamedTuple):
    """Refined packings, and the numbers by which they are compared."""

    contents: Int32[Array, "m c L k"]
    scores: tuple[Num[Array, "L k"], ...]


def _search(
    items: Items, num_packs: int, search: Search, key: Key[Array, ""]
) -> Int32[Array, "m c L"]:
    """The packing that the search finds for every layer."""
    n, num_layers = items.weight.shape
    draw_key, refine_key = jax.random.split(key)
    drawn = _draw(search, draw_key, n)

    def by_layer(x: Array, orders: Array) -> Array:
        return x.reshape(*x.shape[:-1], *orders.shape[1:])

    def finish(orders: Int32[Array, "n L k"]) -> _Finished:
        of_lanes = items.repeat(orders.shape[2])
        with jax.named_scope("start"):
            start = search.construction(of_lanes, orders.reshape(n, -1), num_packs).contents
        contents, scores = _refine(start, of_lanes, search, refine_key)
        return jax.tree.map(lambda x: by_layer(x, orders), _Finished(contents, scores))

    def score(drawn: _Drawn) -> tuple[Num[Array, "L k"], ...]:
        orders = _orders(items.weight, drawn)
        of_lanes = items.repeat(orders.shape[2])
        with jax.named_scope("start"):
            built = search.construction(of_lanes, orders.reshape(n, -1), num_packs)
        return jax.tree.map(lambda x: by_layer(x, orders), search.objective(built.loads))

    if search.keep < search.num_candidates:
        scores = _in_blocks(score, drawn, num_layers)
        kept = jax.vmap(lambda *x: best(x, search.keep))(*scores)
        end = finish(_select(items.weight, drawn, kept))
    else:
        end = _in_blocks(lambda x: finish(_orders(items.weight, x)), drawn, num_layers)
    if search.keep == 1:
        return end.contents[..., 0]
    chosen = jax.vmap(lambda *x: best(x, 1)[0])(*end.scores)
    return along(end.contents, chosen[None, None, :, None], 3)[..., 0]


def _refine(
    contents: Int32[Array, "m c lanes"], items: Items, search: Search, key: Key[Array, ""]
) -> tuple[Int32[Array, "m c lanes"], tuple[Num[Array, " lanes"], ...]]:
    """The packing of every lane after the refinement, and its scores if several are compared."""
    refinement = search.refinement
    if refinement is not None:
        if refinement.keeps_labels and items.label is not None:
            contents = _distribute_if_crowded(contents, items.label)
        visible = items if refinement.keeps_labels else items._replace(label=None)
        with jax.named_scope("exchanges"):
            contents = refinement(contents, visible, key)
    if search.keep == 1:
        return contents, ()
    scores = score_windows(search.objective, items.windows, contents)
    if items.label is not None:
        scores = (count_duplicates(look_up(items.label, contents)), *scores)
    return contents, scores


def score_windows(
    objective: Objective, windows: Int32[Array, "T n K"], contents: Int32[Array, "m c K"]
) -> tuple[Num[Array, " K"], ...]:
    """The objective of every packing, summed over windows."""
    # The same for any few windows, of which some may be empty.
    bits = LOAD_BITS - index_bits(max(len(windows), 32)) if len(windows) > 1 else LOAD_BITS
    scores = [objective(loads_of(x, contents)) for x in with_bits(windows, bits)]
    return jax.tree.map(lambda *x: reduce(jnp.add, x), *scores)


def _distribute_if_crowded(
    contents: Int32[Array, "m c K"], label: Int32[Array, "n K"]
) -> Int32[Array, "m c K"]:
    """Packings with few duplicates; in place of others, the items assigned to packs in turn.

    Items with one label have one weight and are consecutive, so that gives them distinct packs.
    Where most experts have replicas on most GPUs, exchanges could not separate them all.
    """
    num_packs, capacity, _ = contents.shape
    in_turn = jnp.arange(num_packs * capacity, dtype=jnp.int32).reshape(capacity, num_packs).T
    crowded = count_duplicates(look_up(label, contents)) > num_packs // 4
    return jnp.where(crowded, in_turn[..., None], contents)


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
    """What `search` finds, candidates last and in their order, a block of them at a time."""
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
