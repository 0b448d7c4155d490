"""The search engine: candidates, keep the best, refine them, choose one.

Items go by rank, heaviest first. What is drawn at random is shared by all layers (see `orders`).
"""

from functools import partial, reduce
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int32, Key, Num
from numpy.typing import ArrayLike

from eplb_jax.packing.distinct import repeats_in, separate
from eplb_jax.packing.lanes import (
    LOAD_BITS,
    MAX_ITEMS,
    exact_falling_order,
    falling_order,
    fixed_point,
    index_bits,
    inverse,
    loads_of,
    take_rows,
)
from eplb_jax.packing.objective import Objective, best
from eplb_jax.packing.strategy import Strategy, resolve
from eplb_jax.types import Packing
from eplb_jax.validation import (
    LoadLike,
    all_normalised,
    as_count,
    as_key,
    as_labels,
    as_load,
    check_divides,
    fixed_if_none,
    normalised,
    relative,
    sanitised,
)

BLOCK = 1 << 16
"""Items times candidates of a layer that are constructed at once: bounds the memory."""


def balanced_packing(
    weight: LoadLike,
    num_packs: int,
    *,
    strategy: str | Strategy = "auto",
    key: Key[Array, ""] | None = None,
    labels: ArrayLike | Array | None = None,
) -> Packing:
    """Pack n weighted items of every layer into packs of n / num_packs items, loads even.

    Deterministic: the same weights, strategy and key give the same packing, bit for bit. A
    layer's packing does not depend on the other layers. Inside `jax.jit`, NaN and negative
    weights count as zero and infinite ones as the largest float32. n == num_packs gives the
    identity.

    Args:
        weight: [L, n] weights in any unit; anything `jnp.asarray` takes. n is at most 32768.
        num_packs: How many packs; divides n.
        strategy: A name from `eplb_jax.STRATEGIES` or a `Strategy`.
        key: Where the strategy draws at random. None: a fixed key.
        labels: [L, n] whole numbers. Items of a layer with one label, such as replicas of one
            expert, go to distinct packs where exchanges can bring that about; of more than
            num_packs with one label, as few as possible meet.

    Returns:
        The pack of every item, and its place there, each int32 [L, n].

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
    load = as_load(weight, "weight", ("layer", "item"))
    num_packs = as_count("num_packs", num_packs)
    check_size(load.shape[1], num_packs)
    marks = None if labels is None else as_labels(labels, load.shape)
    options = {"num_packs": num_packs, "strategy": resolve(strategy)}
    return _balanced_packing(load, as_key(key), marks, **options)


def check_size(num_items: int, num_packs: int) -> None:
    """Raise ValueError unless so many items can be packed."""
    if num_items > MAX_ITEMS:
        raise ValueError(f"{num_items} items are too many to pack; nearest: {MAX_ITEMS}")
    check_divides("num_packs", num_packs, "number of items", num_items)


@partial(jax.jit, static_argnames=("num_packs", "strategy"))
def _balanced_packing(
    weight: Float[Array, "L n"],
    key: Key[Array, ""] | None,
    labels: Int32[Array, "L n"] | None,
    *,
    num_packs: int,
    strategy: Strategy,
) -> Packing:
    load, pack_key = sanitised(weight), fixed_if_none(key)
    if strategy.distinct:
        load = relative(load)
    if labels is None:
        contents = packs(load, num_packs, strategy, pack_key)
    else:
        labels = jax.vmap(lambda x: _at_most(num_packs, x))(labels)
        together = jnp.argsort(labels, axis=1, stable=True).astype(jnp.int32)
        load, labels = (jnp.take_along_axis(x, together, axis=1) for x in (load, labels))
        contents = jax.vmap(take_rows)(together, packs(load, num_packs, strategy, pack_key, labels))
    capacity = contents.shape[2]
    slot = jax.vmap(inverse)(contents.reshape(weight.shape))
    return Packing(slot // capacity, slot % capacity)


def _at_most(count: int, label: Int32[Array, " n"]) -> Int32[Array, " n"]:
    """Labels that say which of the same items are the same, but for no more than `count` each."""
    n = label.shape[0]
    same = label[:, None] == label
    first = jnp.argmax(same, axis=1).astype(jnp.int32)
    earlier = jnp.sum(same & np.tri(n, k=-1, dtype=bool), axis=1, dtype=jnp.int32)
    return first + n * (earlier // count)


def packs(
    weight: Float[Array, "L n"],
    num_packs: int,
    strategy: Strategy,
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
    draw_key, refine_key = jax.random.split(key)
    drawn = _draw(strategy, draw_key, n)
    if strategy.refinement is None or not strategy.refinement.sees_windows:
        windows = None

    weight = normalised(weight)
    if _keeps_labels(strategy):  # nearly falls, which does for exchanges, in half the time
        order = falling_order(weight.T).T
    else:
        order = exact_falling_order(weight.T).T
    if num_packs == 1:
        return order[:, None]
    if windows is not None:
        windows = all_normalised(windows)
    start = _constructed(jax.vmap(take_rows)(weight, order), num_packs, strategy, drawn)

    def layer(
        contents: Int32[Array, "m c K"],
        weight: Float[Array, " n"],
        order: Int32[Array, " n"],
        label: Int32[Array, " n"] | None,
        windows: Float[Array, "T n"] | None,
    ) -> Int32[Array, "m c"]:
        falling = None if label is None else label[order]
        seen = weight[order] if windows is None else windows[:, order]
        contents = take_rows(order, _refined(contents, seen, strategy, refine_key, falling))
        if label is None or _keeps_labels(strategy):
            return contents
        return separate(contents, weight, label, n if repeats is None else repeats)

    return jax.vmap(layer)(start, weight, order, labels, windows)


def _keeps_labels(strategy: Strategy) -> bool:
    return strategy.refinement is not None and strategy.refinement.keeps_labels


class _Drawn(NamedTuple):
    """The candidates: orders that are the same for all layers, and factors of the sort keys."""

    fixed: Int32[Array, "n K1"]
    noisy: Float[Array, "n K2"]


def _draw(strategy: Strategy, key: Key[Array, ""], num_items: int) -> _Drawn:
    keys = jax.random.split(key, len(strategy.orders))
    drawn = [order.draw(k, num_items) for order, k in zip(strategy.orders, keys, strict=True)]
    fixed = [x for x in drawn if x.dtype == jnp.int32]
    noisy = [x for x in drawn if x.dtype == jnp.float32]
    return _Drawn(
        jnp.concatenate([jnp.zeros((num_items, 0), jnp.int32), *fixed], axis=1),
        jnp.concatenate([jnp.zeros((num_items, 0), jnp.float32), *noisy], axis=1),
    )


def _constructed(
    weight: Float[Array, "L n"], num_packs: int, strategy: Strategy, drawn: _Drawn
) -> Int32[Array, "L m c K"]:
    """The candidates that go on to the refinement, from falling weights."""

    def layer(weight: Float[Array, " n"]) -> Int32[Array, "m c K"]:
        if strategy.keep < strategy.num_candidates:
            kept = best(_scores(weight, num_packs, strategy, drawn), strategy.keep)
            orders = _select(weight, drawn, kept)
        else:
            orders = _orders(weight, drawn)
        return strategy.construction(weight, orders, num_packs).contents

    if strategy.num_candidates > 1:
        return jax.vmap(layer)(weight)
    # One candidate: the layers are the lanes, or every step would work on short rows.
    orders = jax.vmap(lambda weight: _orders(weight, drawn))(weight)[..., 0]
    contents = strategy.construction(weight.T, orders.T, num_packs).contents
    return jnp.moveaxis(contents, -1, 0)[..., None]


def _refined(
    contents: Int32[Array, "m c K"],
    seen: Float[Array, "*T n"],
    strategy: Strategy,
    key: Key[Array, ""],
    label: Int32[Array, " n"] | None,
) -> Int32[Array, "m c"]:
    """The best packing of a layer; `seen` are the weights, or those in windows, to judge it by."""
    if label is not None and _keeps_labels(strategy):
        contents = _uncrowded(contents, label)
    if strategy.refinement is not None:
        contents = strategy.refinement(contents, seen, key, label)
    if strategy.keep == 1:
        return contents[..., 0]
    scores = added_up(strategy.objective, seen, contents)
    if label is not None:
        scores = (repeats_in(label[contents]), *scores)
    return contents[..., best(scores, 1)[0]]


def added_up(
    objective: Objective, seen: Float[Array, "*T n"], contents: Int32[Array, "m c K"]
) -> tuple[Num[Array, " K"], ...]:
    """The objective of every packing, added up over windows."""
    windows = seen.reshape(-1, seen.shape[-1])
    bits = LOAD_BITS - index_bits(len(windows)) if len(windows) > 1 else LOAD_BITS
    units = fixed_point(windows, contents.shape[1], bits)
    scores = [objective(loads_of(x, contents)) for x in units]
    return jax.tree.map(lambda *x: reduce(jnp.add, x), *scores)


def _uncrowded(
    contents: Int32[Array, "m c *K"], label: Int32[Array, " n"]
) -> Int32[Array, "m c *K"]:
    """Packings with few repeats; in place of others, the items dealt out to the packs in turn.

    Items with one label have one weight and follow each other, so that dealing parts them. Where
    most experts have replicas on most GPUs, exchanges could not part them all.
    """
    num_packs, capacity, *lanes = contents.shape
    dealt = jnp.arange(num_packs * capacity, dtype=jnp.int32).reshape(capacity, num_packs).T
    dealt = dealt.reshape(num_packs, capacity, *[1] * len(lanes))
    return jnp.where(repeats_in(label[contents]) > num_packs // 4, dealt, contents)


def _orders(weight: Float[Array, " n"], drawn: _Drawn) -> Int32[Array, "n K"]:
    """The orders of all candidates, the fixed ones first."""
    if drawn.noisy.shape[1] == 0:
        return drawn.fixed
    return jnp.concatenate([drawn.fixed, falling_order(drawn.noisy * weight[:, None])], axis=1)


def _select(
    weight: Float[Array, " n"], drawn: _Drawn, candidates: Int32[Array, " k"]
) -> Int32[Array, "n k"]:
    """The orders of some candidates: made again, so that those of all need not be stored."""
    fixed, noisy = drawn
    num_fixed = fixed.shape[1]
    if noisy.shape[1] == 0:
        return fixed[:, candidates]
    keys = noisy[:, jnp.maximum(candidates - num_fixed, 0)] * weight[:, None]
    if num_fixed == 0:
        return falling_order(keys)
    from_fixed = fixed[:, jnp.minimum(candidates, num_fixed - 1)]
    return jnp.where(candidates < num_fixed, from_fixed, falling_order(keys))


def _scores(
    weight: Float[Array, " n"], num_packs: int, strategy: Strategy, drawn: _Drawn
) -> tuple[Num[Array, " K"], ...]:
    """The objective of every candidate before refinement, block by block."""

    def score(drawn: _Drawn) -> tuple[Num[Array, " k"], ...]:
        constructed = strategy.construction(weight, _orders(weight, drawn), num_packs)
        return strategy.objective(constructed.loads)

    fixed, noisy = drawn
    n, count = noisy.shape
    block = max(1 << (BLOCK // n).bit_length() >> 1, 8)
    whole = count - count % block if count > block else 0
    rest = score(_Drawn(fixed, noisy[:, whole:])) if whole < count or fixed.shape[1] else None
    if whole == 0 and rest is not None:
        return rest
    blocks = jnp.moveaxis(noisy[:, :whole].reshape(n, -1, block), 1, 0)
    scores = lax.map(lambda block: score(_Drawn(fixed[:, :0], block)), blocks)
    scores = jax.tree.map(jnp.ravel, scores)
    if rest is None:
        return scores
    # In the order of the candidates: the fixed ones, the whole blocks, what remained.
    k = fixed.shape[1]
    join = lambda x, y: jnp.concatenate([x[:k], y, x[k:]])  # noqa: E731
    return jax.tree.map(join, rest, scores)
