"""Building blocks of the kernels: a layer in memory, and the blocks that are loaded from it.

A layer is one block of threads. Threads exchange values through memory, which stays in the caches
of a multiprocessor, with a barrier after the stores and one after the loads: Triton cannot index
registers. Blocks are powers of two; padding of packs, positions, pairs, bundles is never chosen.
"""

from collections.abc import Callable
from functools import reduce
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array

from eplb_jax.packing.pair_exchange import marks

AT_ONCE = 4096
"""Numbers in a block: 32 for each of 128 threads, which hold three to five blocks."""

MOST = np.int32(np.iinfo(np.int32).max)

Ref = Any
"""Numbers in memory, flat."""


class Sizes(NamedTuple):
    """Counts; what they are padded to; and how many pairs are a block."""

    windows: int
    capacity: int
    packs: int
    bundles: int
    positions: int
    columns: int
    rows: int
    pairs: int


def call_of(
    kernel: Callable[..., None], sizes: list[int], interpret: bool, *, warps: int
) -> Callable[..., list[Array]]:
    """A call of the kernel with results, and scratch, of these sizes."""
    return pl.pallas_call(
        kernel,
        out_shape=[jax.ShapeDtypeStruct((size,), jnp.int32) for size in sizes],
        interpret=interpret,
        # One stage: nothing is loaded ahead of the stores of the step before.
        compiler_params=plgpu.CompilerParams(num_warps=warps, num_stages=1),
    )


def loop(count: int, step: Callable[[Any, Any], Any], start: Any) -> Any:
    """`lax.fori_loop` from 0, whose index is an int32 whatever the configuration."""
    return lax.fori_loop(0, count, lambda i, x: step(jnp.asarray(i, jnp.int32), x), start)


def _rem(x: Array, y: int) -> Array:
    return lax.rem(x, np.int32(y))


def _div(x: Array, y: int) -> Array:
    return lax.div(x, np.int32(y))


def along_axis(axis: int, count: int) -> Array:
    """0, 1, ... down the rows or along the columns of a block."""
    return lax.broadcasted_iota(jnp.int32, (count, 1) if axis == 0 else (1, count), axis)


def _add(x: Array, axis: int | None = None) -> Array:
    return jnp.sum(x, axis=axis, dtype=jnp.int32)


def _any(x: Array, axis: int) -> Array:
    return jnp.max(x.astype(jnp.int32), axis=axis) > 0


def _first(x: Array, value: Array, among: Array, axis: int | None = None) -> Array:
    """The first entry of `among` whose x has this value."""
    return jnp.min(jnp.where(x == value, among, MOST), axis=axis)


def _apart(one: list[Array], other: list[Array]) -> Array:
    """The distance of packs, as in `pair_exchange`."""
    if len(one) == 1:
        return jnp.abs(one[0] - other[0])
    each = zip(one, other, strict=True)
    squares = [jnp.square(x.astype(jnp.float32) - y.astype(jnp.float32)) for x, y in each]
    return reduce(jnp.add, squares)


class Layer(NamedTuple):
    """The memory of a layer: what is given, the item in every position, and scratch."""

    sizes: Sizes
    labelled: bool
    interpret: bool
    value: Ref  # [windows n]
    label: Ref  # [n]
    to: Ref  # [rounds columns]: where the pack of every rank goes
    first: Ref  # [rows]: the first position of every bundle
    last: Ref
    count: Ref  # [1]: windows with load
    position: Ref  # [positions columns]
    after: Ref  # [windows rows pairs]: what packs weigh without a bundle
    fixed: Ref  # [2 positions pairs]
    visible: Ref  # [columns]

    def barrier(self) -> None:
        """Wait for the other threads, of which an interpreter has none."""
        if not self.interpret:
            plgpu.debug_barrier()

    def item(self, position: Array, pack: Array) -> Array:
        """The item in a position."""
        return self.position[position * self.sizes.columns + pack]

    def put(self, position: Array, pack: Array, item: Array, where: Array | None = None) -> None:
        """Store an item for all threads; all have loaded what they need."""
        plgpu.store(self.position.at[position * self.sizes.columns + pack], item, mask=where)
        self.barrier()

    def values(self, item: Array) -> list[Array]:
        """The loads of items in every window."""
        n = self.sizes.capacity * self.sizes.packs
        return [self.value[t * n + item] for t in range(self.sizes.windows)]

    def loads(self, item: Array) -> list[Array]:
        """The loads of packs."""
        real = along_axis(0, self.sizes.positions) < self.sizes.capacity
        return [_add(jnp.where(real, x, 0), 0) for x in self.values(item)]

    def chosen(self, load: list[Array], window: Array) -> Array:
        """The loads of packs in one window; their sum over windows if there is no such window."""
        visible = reduce(jnp.add, load)
        for t, x in enumerate(load):
            visible = jnp.where(window == t, x, visible)
        return jnp.where(along_axis(1, self.sizes.columns)[0] < self.sizes.packs, visible, -1)

    def among(self, label: Array, pack: Array, *, earlier: bool = False) -> Array:
        """Mask of labels that are in the pack, or in an earlier position than theirs."""
        position = along_axis(0, self.sizes.positions)

        def compare(j: Array, found: Array) -> Array:
            equal = label == self.label[self.item(j, pack)]
            return found | (equal & (j < position) if earlier else equal).astype(jnp.int32)

        found = loop(self.sizes.capacity, compare, jnp.zeros(label.shape, jnp.int32))
        return (found > 0) & (position < self.sizes.capacity)

    def rank(self, i: Array) -> None:
        """Sort the packs into the order of a round."""
        s = self.sizes
        position, pack = along_axis(0, s.positions), along_axis(1, s.columns)[0]
        item = self.item(position, pack[None])
        turn = _rem(i, 2) * (lax.rem(_div(i, 2), self.count[0]) + 1)
        visible = self.chosen(self.loads(item), turn - 1)
        self.visible[pack] = visible
        self.barrier()
        width = max(min(AT_ONCE // s.columns, s.columns), 1)

        def compare(k: Array, rank: Array) -> Array:
            other = k * width + along_axis(1, width)
            load, own, index = self.visible[other], visible[:, None], pack[:, None]
            before = (load > own) | ((load == own) & (other < index))
            return rank + _add(before.astype(jnp.int32), 1)

        rank = loop(s.columns // width, compare, jnp.zeros_like(pack))
        self.put(position, self.to[i * s.columns + rank][None], item)

    def exchange(self, block: Array) -> None:
        """The best exchange in every pair of a block."""
        s, position, bundle = (
            self.sizes,
            along_axis(0, self.sizes.positions),
            along_axis(0, self.sizes.rows),
        )
        pair = along_axis(1, s.pairs)
        a, b = packs = [block * s.pairs + pair + k * (s.packs // 2) for k in range(2)]
        real, sides = a[0] < s.packs // 2, range(2)
        load = [self.loads(self.item(position, x)) for x in packs]
        limit, urgent = _apart(*load), None
        first, last = self.first[bundle], self.last[bundle]
        fixed = [jnp.broadcast_to(bundle >= s.bundles, (s.rows, s.pairs))] * 2
        if self.labelled:
            label = [self.label[self.item(position, x)] for x in packs]
            known = [self.among(label[k], packs[1 - k]) for k in sides]
            goes = [self.among(label[k], packs[k], earlier=True) & ~known[k] for k in sides]
            urgent_a = _any(goes[0], 0)
            urgent = urgent_a, _any(goes[1], 0) & ~urgent_a
            anything = [jnp.full(real.shape, marks(s.windows).anything, jnp.int32)] * s.windows
            anything = _apart(anything, [jnp.zeros_like(x) for x in anything])
            limit = jnp.where(urgent[0] | urgent[1], anything, limit)

            def at(side: int, k: Array) -> Array:
                return (side * s.positions + k) * s.pairs + pair

            for k in sides:
                stays = known[k] | (urgent[k][None] & ~goes[k])
                self.fixed[at(k, position)] = stays.astype(jnp.int32)
            self.barrier()
            for k in sides:
                fixed[k] |= (self.fixed[at(k, first)] | self.fixed[at(k, last)]) > 0

        def after(side: int, never: int) -> list[Array]:
            one, other = (self.values(self.item(k, packs[side])) for k in (first, last))
            extra = jnp.where(first == last, np.int32(marks(s.windows).single), 0)
            gone = [x + jnp.where(first == last, 0, y) for x, y in zip(one, other, strict=True)]
            kept = [x[None] - 2 * y + extra for x, y in zip(load[side], gone, strict=True)]
            return [jnp.where(fixed[side], never, x) for x in kept]

        left = after(0, marks(s.windows).never)
        for t, x in enumerate(after(1, -marks(s.windows).never)):
            self.after[(t * s.rows + bundle) * s.pairs + pair] = x
        self.barrier()

        def against(j: Array, best: tuple[Array, Array]) -> tuple[Array, Array]:
            at = [(t * s.rows + j) * s.pairs + pair for t in range(s.windows)]
            distance = _apart(left, [self.after[x] for x in at])
            return jnp.minimum(best[0], distance), jnp.where(distance < best[0], j, best[1])

        most = MOST if s.windows == 1 else np.float32(np.inf)
        start = jnp.full(left[0].shape, most), jnp.zeros(left[0].shape, jnp.int32)
        least, partner = loop(s.bundles, against, start)
        lowest = jnp.min(least, axis=0)
        one = _first(least, lowest[None], bundle, 0)
        other = _add(jnp.where(bundle == one[None], partner, 0), 0)
        good = real & (lowest < limit)
        swaps = [(k[one], a[0], k[other], b[0]) for k in (self.first, self.last)]
        items = [(self.item(*x[:2]), self.item(*x[2:])) for x in swaps]
        self.barrier()
        # An item that is named twice is stored twice, in the same position.
        for x, (ours, theirs) in zip(swaps, items, strict=True):
            self.put(*x[:2], theirs, good)
            self.put(*x[2:], ours, good)

    def duplicate(self, item: Array, last: Array) -> tuple[Array, Array]:
        """The next duplicate after the last that was tried, and whether there is one."""
        _, capacity, num_packs, *_ = self.sizes
        position, pack = along_axis(0, self.sizes.positions), along_axis(1, self.sizes.columns)
        twice, n = self.among(self.label[item], pack, earlier=True), capacity * num_packs
        ahead = position * num_packs + pack - last - 1
        ahead = jnp.where(ahead < 0, ahead + n, ahead)
        turn = jnp.min(jnp.where(twice & (pack < num_packs), ahead, n))
        return _rem(last + 1 + turn, n), turn < n

    def lower(self, step: Array, last: Array) -> Array:
        """A step of `Peak`; returns the last duplicate that was tried."""
        _, capacity, num_packs, *_ = self.sizes
        position, pack = along_axis(0, self.sizes.positions), along_axis(1, self.sizes.columns)[0]
        item = self.item(position, pack[None])
        load, value = self.loads(item), self.values(item)
        visible = self.chosen(load, lax.rem(step, self.count[0]))
        top = _first(visible, jnp.max(visible), pack)
        known, urgent, only = (pack == top)[None], step < 0, step
        if self.labelled:
            duplicate, found = self.duplicate(item, last)
            urgent, only = found & (_rem(step, 4) < 3), _div(duplicate, num_packs)
            top = jnp.where(urgent, _rem(duplicate, num_packs), top)
            last = jnp.where(urgent, duplicate, last)
            known = self.among(self.label[item], top)
        known |= (position >= capacity) | (pack >= num_packs)[None]
        mine = [_add(jnp.where(pack == top, x, 0)) for x in load]

        def against(out: Array, best: tuple[Array, Array]) -> tuple[Array, Array]:
            own = self.item(out, top)
            moved = [x - y for x, y in zip(self.values(own), value, strict=True)]
            each = zip(mine, load, moved, strict=True)
            cost = reduce(jnp.add, [jnp.maximum(x - z, y[None] + z) for x, y, z in each])
            fixed = known
            if self.labelled:
                same = (self.label[own] == self.label[item]) & (position < capacity)
                fixed |= _any(same, 0)[None] | (urgent & (out != only))
            cost = jnp.where(fixed, MOST, cost)
            return jnp.minimum(best[0], cost), jnp.where(cost < best[0], out, best[1])

        start = jnp.full(item.shape, MOST), jnp.zeros(item.shape, jnp.int32)
        least, out = loop(capacity, against, start)
        by_pack = jnp.min(least, axis=0)
        at = _first(least, by_pack[None], position, 0)
        out = _add(jnp.where(position == at[None], out, 0), 0)
        lowest = jnp.min(by_pack)
        other = _first(by_pack, lowest, pack)

        def of_other(x: Array) -> Array:
            return _add(jnp.where(pack == other, x, 0))

        before = reduce(jnp.add, [jnp.maximum(x, y) for x, y in zip(mine, load, strict=True)])
        good = lowest < jnp.where(urgent, MOST, of_other(before))
        out, at = (of_other(x) for x in (out, at))
        ours, theirs = self.item(out, top), self.item(at, other)
        self.barrier()
        self.put(out, top, theirs, good)
        self.put(at, other, ours, good)
        return last
