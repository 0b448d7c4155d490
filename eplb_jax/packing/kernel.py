"""All exchanges of a layer in one kernel on a GPU, and greedy in another.

What is here finds the packings of the plain forms, bit for bit. Those stay the default: XLA makes
several kernels of every step, which take longer to launch than to run.

A layer is one block of threads. What one thread hands to another goes through memory, which the
caches of a multiprocessor hold, with a barrier after the stores and one after the loads: Triton
cannot index registers. Its blocks are powers of two, hence packs, places, pairs and bundles are
padded, and what is padded is never chosen.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial, reduce
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Float, Int32, Key

from eplb_jax.packing.construction import Constructed, _contents
from eplb_jax.packing.exchange import (
    _ANYTHING,
    _NEVER,
    _SINGLE,
    Exchanges,
    Pairs,
    State,
    _bundles,
    columns,
    schedule,
)
from eplb_jax.packing.lanes import fixed_point, index_bits, look_up
from eplb_jax.packing.portfolio import Peak

_AT_ONCE = 4096
"""So many numbers are a block: 32 for each of 128 threads, which hold three to five blocks."""

_MOST = np.int32(np.iinfo(np.int32).max)
_FULL = 1 << 30

_Ref = Any
"""Numbers in memory, flat."""


@dataclass(frozen=True)
class InKernel(Exchanges):
    """`pairs` and then `peak`, in one kernel for all layers and candidates.

    Finds the packings of ``pairs`` followed by ``peak`` bit for bit, for any number of packs,
    places and windows, with labels and without; `Portfolio` takes these steps but for packs of
    three to five. To be had through a strategy:
    ``dataclasses.replace(STRATEGIES["auto"], refinement=InKernel(Pairs(8), Peak(8)))``.

    Only for CUDA, by Pallas and Triton. On other platforms lowering raises a ValueError;
    ``interpret=True`` runs everywhere, and is for tests.

    Not yet run on a GPU, so there are no timings. A layer is a block of 128 threads. For 288
    items in 32 packs on sm_90 Triton 3.9 and ptxas take FIGURES

    With several windows squares from 2 ** 24 on are rounded, and otherwise where a compiler fuses
    multiplications with additions: on a GPU that may tip a tie, as it may in the plain form.
    """

    pairs: Pairs
    peak: Peak
    interpret: bool = False

    def improve(self, state: State, key: Key[Array, ""], *, labelled: bool) -> State:
        """Exchange in all pairs, then lighten the heaviest pack."""
        del key
        windows, capacity, packs = state.value.shape
        if packs < 2:
            return state
        bundles = _bundles(capacity, two=self.pairs.two)
        count, up = len(bundles[0]), pl.next_power_of_2
        pairs = min(max(_AT_ONCE // (up(count) * up(windows)), 1), up(packs // 2))
        s = _Sizes(windows, capacity, packs, count, up(capacity), up(packs), up(count), pairs)
        first, last = (np.pad(bundles[k], (0, s.rows - count)) for k in (0, -1))
        to = np.tile(np.arange(s.columns, dtype=np.int32), (max(self.pairs.rounds, 1), 1))
        to[: self.pairs.rounds, :packs] = np.argsort(schedule(packs, self.pairs.rounds), axis=1)

        scratch = s.windows * s.rows * pairs, 2 * s.places * pairs, s.columns
        kernel = partial(_all_steps, s, self, labelled)
        call = _call(kernel, [s.places * s.columns, *scratch], self.interpret, warps=4)
        given = state.value.ravel(), state.label.ravel(), to.ravel(), first, last
        place = call(*map(jnp.asarray, given))[0].reshape(s.places, s.columns)
        flat = jax.tree.map(lambda x: x.reshape(*x.shape[:-2], -1), state)
        return State(*(columns(x, place[:capacity, :packs]) for x in flat))


class _Sizes(NamedTuple):
    """Counts; what they are padded to; and how many pairs are a block."""

    windows: int
    capacity: int
    packs: int
    bundles: int
    places: int
    columns: int
    rows: int
    pairs: int


def _call(
    kernel: Callable[..., None], sizes: list[int], interpret: bool, *, warps: int
) -> Callable[..., list[Array]]:
    return pl.pallas_call(
        kernel,
        out_shape=[jax.ShapeDtypeStruct((size,), jnp.int32) for size in sizes],
        interpret=interpret,
        # One stage: nothing is loaded ahead of the stores of the step before.
        compiler_params=plgpu.CompilerParams(num_warps=warps, num_stages=1),
    )


def _all_steps(sizes: _Sizes, steps: InKernel, labelled: bool, *refs: _Ref) -> None:
    """The kernel."""
    layer = _Layer(sizes, labelled, steps.interpret, *refs)
    place, pack = _along(0, sizes.places), _along(1, sizes.columns)
    real = (place < sizes.capacity) & (pack < sizes.packs)
    layer.put(place, pack, jnp.where(real, place * sizes.packs + pack, 0))

    def round_of(i: Array, _: None) -> None:
        layer.rank(i)
        _loop(pl.cdiv(sizes.packs // 2, sizes.pairs), lambda k, _: layer.exchange(k), None)

    _loop(steps.pairs.rounds, round_of, None)
    _loop(steps.peak.steps, layer.lighten, jnp.int32(-1))


def _loop(count: int, step: Callable[[Any, Any], Any], start: Any) -> Any:
    return lax.fori_loop(np.int32(0), np.int32(count), step, start)


def _along(axis: int, count: int) -> Array:
    """0, 1, ... down the rows or along the columns of a block."""
    return lax.broadcasted_iota(jnp.int32, (count, 1) if axis == 0 else (1, count), axis)


def _add(x: Array, axis: int | None = None) -> Array:
    return jnp.sum(x, axis=axis, dtype=jnp.int32)


def _any(x: Array, axis: int) -> Array:
    return jnp.max(x.astype(jnp.int32), axis=axis) > 0


def _first(x: Array, value: Array, among: Array, axis: int | None = None) -> Array:
    """The first of some numbers beside which a value stands."""
    return jnp.min(jnp.where(x == value, among, _MOST), axis=axis)


def _apart(one: list[Array], other: list[Array]) -> Array:
    """How far apart packs are, as in `exchange`."""
    if len(one) == 1:
        return jnp.abs(one[0] - other[0])
    each = zip(one, other, strict=True)
    squares = [jnp.square(x.astype(jnp.float32) - y.astype(jnp.float32)) for x, y in each]
    return reduce(jnp.add, squares)


class _Layer(NamedTuple):
    """The memory of a layer: what is given, the item in every place, and scratch."""

    sizes: _Sizes
    labelled: bool
    interpret: bool
    value: _Ref  # [windows n]
    label: _Ref  # [n]
    to: _Ref  # [rounds columns]: where the pack of every rank goes
    first: _Ref  # [rows]: the first place of every bundle
    last: _Ref
    place: _Ref  # [places columns]
    after: _Ref  # [windows rows pairs]: what packs weigh without a bundle
    barred: _Ref  # [2 places pairs]
    seen: _Ref  # [columns]

    def barrier(self) -> None:
        """Wait for the other threads, of which an interpreter has none."""
        if not self.interpret:
            plgpu.debug_barrier()

    def item(self, place: Array, pack: Array) -> Array:
        """What lies there."""
        return self.place[place * self.sizes.columns + pack]

    def put(self, place: Array, pack: Array, item: Array, where: Array | None = None) -> None:
        """Lay it there, for all threads; all have loaded what they need."""
        plgpu.store(self.place.at[place * self.sizes.columns + pack], item, mask=where)
        self.barrier()

    def values(self, item: Array) -> list[Array]:
        """The loads of items in every window."""
        n = self.sizes.capacity * self.sizes.packs
        return [self.value[t * n + item] for t in range(self.sizes.windows)]

    def loads(self, item: Array) -> list[Array]:
        """The loads of packs."""
        real = _along(0, self.sizes.places) < self.sizes.capacity
        return [_add(jnp.where(real, x, 0), 0) for x in self.values(item)]

    def chosen(self, load: list[Array], window: Array) -> Array:
        """The loads of packs in one window, or all of them where there is none such."""
        seen = reduce(jnp.add, load)
        for t, x in enumerate(load):
            seen = jnp.where(window == t, x, seen)
        return jnp.where(_along(1, self.sizes.columns)[0] < self.sizes.packs, seen, -1)

    def among(self, label: Array, pack: Array, *, earlier: bool = False) -> Array:
        """Which labels lie in their pack, or in earlier places than theirs."""
        place = _along(0, self.sizes.places)

        def compare(j: Array, found: Array) -> Array:
            equal = label == self.label[self.item(j, pack)]
            return found | (equal & (j < place) if earlier else equal).astype(jnp.int32)

        found = _loop(self.sizes.capacity, compare, jnp.zeros(label.shape, jnp.int32))
        return (found > 0) & (place < self.sizes.capacity)

    def rank(self, i: Array) -> None:
        """Put the packs in the order of a round."""
        s = self.sizes
        place, pack = _along(0, s.places), _along(1, s.columns)[0]
        item = self.item(place, pack[None])
        turn = jnp.where(lax.rem(i, 2) == 1, lax.rem(lax.div(i, 2), s.windows), -1)
        seen = self.chosen(self.loads(item), turn)
        self.seen[pack] = seen
        self.barrier()
        width = max(min(_AT_ONCE // s.columns, s.columns), 1)

        def compare(k: Array, rank: Array) -> Array:
            other = k * width + _along(1, width)
            load, own, index = self.seen[other], seen[:, None], pack[:, None]
            before = (load > own) | ((load == own) & (other < index))
            return rank + _add(before.astype(jnp.int32), 1)

        rank = _loop(s.columns // width, compare, jnp.zeros_like(pack))
        self.put(place, self.to[i * s.columns + rank][None], item)

    def exchange(self, block: Array) -> None:
        """The best exchange in every pair of a block."""
        s, place, bundle = self.sizes, _along(0, self.sizes.places), _along(0, self.sizes.rows)
        pair = _along(1, s.pairs)
        a, b = packs = [block * s.pairs + pair + k * (s.packs // 2) for k in range(2)]
        real, sides = a[0] < s.packs // 2, range(2)
        load = [self.loads(self.item(place, x)) for x in packs]
        limit, urgent = _apart(*load), None
        first, last = self.first[bundle], self.last[bundle]
        barred = [jnp.broadcast_to(bundle >= s.bundles, (s.rows, s.pairs))] * 2
        if self.labelled:
            label = [self.label[self.item(place, x)] for x in packs]
            known = [self.among(label[k], packs[1 - k]) for k in sides]
            goes = [self.among(label[k], packs[k], earlier=True) & ~known[k] for k in sides]
            urgent_a = _any(goes[0], 0)
            urgent = urgent_a, _any(goes[1], 0) & ~urgent_a
            anything = [jnp.full(real.shape, _ANYTHING, jnp.int32)] * s.windows
            anything = _apart(anything, [jnp.zeros_like(x) for x in anything])
            limit = jnp.where(urgent[0] | urgent[1], anything, limit)
            at = lambda side, k: (side * s.places + k) * s.pairs + pair  # noqa: E731
            for k in sides:
                stays = known[k] | (urgent[k][None] & ~goes[k])
                self.barred[at(k, place)] = stays.astype(jnp.int32)
            self.barrier()
            for k in sides:
                barred[k] |= (self.barred[at(k, first)] | self.barred[at(k, last)]) > 0

        def after(side: int, never: int) -> list[Array]:
            one, other = (self.values(self.item(k, packs[side])) for k in (first, last))
            extra = jnp.where(first == last, _SINGLE, 0)
            gone = [x + jnp.where(first == last, 0, y) for x, y in zip(one, other, strict=True)]
            kept = [x[None] - 2 * y + extra for x, y in zip(load[side], gone, strict=True)]
            return [jnp.where(barred[side], never, x) for x in kept]

        left = after(0, _NEVER)
        for t, x in enumerate(after(1, -_NEVER)):
            self.after[(t * s.rows + bundle) * s.pairs + pair] = x
        self.barrier()

        def against(j: Array, best: tuple[Array, Array]) -> tuple[Array, Array]:
            at = [(t * s.rows + j) * s.pairs + pair for t in range(s.windows)]
            length = _apart(left, [self.after[x] for x in at])
            return jnp.minimum(best[0], length), jnp.where(length < best[0], j, best[1])

        most = _MOST if s.windows == 1 else np.float32(np.inf)
        start = jnp.full(left[0].shape, most), jnp.zeros(left[0].shape, jnp.int32)
        least, partner = _loop(s.bundles, against, start)
        lowest = jnp.min(least, axis=0)
        one = _first(least, lowest, bundle, 0)
        other = _add(jnp.where(bundle == one, partner, 0), 0)
        good = real & (lowest < limit)
        swaps = [(k[one], a[0], k[other], b[0]) for k in (self.first, self.last)]
        items = [(self.item(*x[:2]), self.item(*x[2:])) for x in swaps]
        self.barrier()
        # An item that is named twice is put twice, in the same place.
        for x, (ours, theirs) in zip(swaps, items, strict=True):
            self.put(*x[:2], theirs, good)
            self.put(*x[2:], ours, good)

    def repeat(self, item: Array, last: Array) -> tuple[Array, Array]:
        """The next repeat after the last that was looked at, and whether there is one."""
        _, capacity, num_packs, *_ = self.sizes
        place, pack = _along(0, self.sizes.places), _along(1, self.sizes.columns)
        twice, n = self.among(self.label[item], pack, earlier=True), capacity * num_packs
        ahead = place * num_packs + pack - last - 1
        ahead = jnp.where(ahead < 0, ahead + n, ahead)
        turn = jnp.min(jnp.where(twice & (pack < num_packs), ahead, n))
        return lax.rem(last + 1 + turn, n), turn < n

    def lighten(self, step: Array, last: Array) -> Array:
        """A step of `Peak`; the last repeat that was looked at."""
        windows, capacity, num_packs, *_ = self.sizes
        place, pack = _along(0, self.sizes.places), _along(1, self.sizes.columns)[0]
        item = self.item(place, pack[None])
        load, value = self.loads(item), self.values(item)
        seen = self.chosen(load, lax.rem(step, windows))
        heaviest = _first(seen, jnp.max(seen), pack)
        known, urgent, only = (pack == heaviest)[None], step < 0, step
        if self.labelled:
            repeat, found = self.repeat(item, last)
            urgent, only = found & (lax.rem(step, 4) < 3), lax.div(repeat, num_packs)
            heaviest = jnp.where(urgent, lax.rem(repeat, num_packs), heaviest)
            last = jnp.where(urgent, repeat, last)
            known = self.among(self.label[item], heaviest)
        known |= (place >= capacity) | (pack >= num_packs)[None]
        mine = [_add(jnp.where(pack == heaviest, x, 0)) for x in load]

        def against(out: Array, best: tuple[Array, Array]) -> tuple[Array, Array]:
            own = self.item(out, heaviest)
            moved = [x - y for x, y in zip(self.values(own), value, strict=True)]
            each = zip(mine, load, moved, strict=True)
            cost = reduce(jnp.add, [jnp.maximum(x - z, y[None] + z) for x, y, z in each])
            barred = known
            if self.labelled:
                same = (self.label[own] == self.label[item]) & (place < capacity)
                barred |= _any(same, 0)[None] | (urgent & (out != only))
            cost = jnp.where(barred, _MOST, cost)
            return jnp.minimum(best[0], cost), jnp.where(cost < best[0], out, best[1])

        start = jnp.full(item.shape, _MOST), jnp.zeros(item.shape, jnp.int32)
        least, out = _loop(capacity, against, start)
        by_pack = jnp.min(least, axis=0)
        at = _first(least, by_pack[None], place, 0)
        out = _add(jnp.where(place == at[None], out, 0), 0)
        lowest = jnp.min(by_pack)
        other = _first(by_pack, lowest, pack)
        of_other = lambda x: _add(jnp.where(pack == other, x, 0))  # noqa: E731
        before = reduce(jnp.add, [jnp.maximum(x, y) for x, y in zip(mine, load, strict=True)])
        good = lowest < jnp.where(urgent, _MOST, of_other(before))
        out, at = of_other(out), of_other(at)
        ours, theirs = self.item(out, heaviest), self.item(at, other)
        self.barrier()
        self.put(out, heaviest, theirs, good)
        self.put(at, other, ours, good)
        return last


@dataclass(frozen=True)
class GreedyInKernel:
    """`quantised_greedy`, a construction, in one kernel for all lanes, bit for bit.

    A lane is one warp that holds the packs in its registers. See `InKernel` for platforms.
    """

    interpret: bool = False

    def __call__(
        self, weight: Float[Array, "..."], order: Int32[Array, "n *K"], num_packs: int
    ) -> Constructed:
        """Place the items of every lane in its order."""
        n, *lanes = order.shape
        low = index_bits(n // num_packs + 1) + index_bits(num_packs)
        steps = look_up((fixed_point(weight, n // num_packs, 30 - low) << low) + 1, order)
        sizes = [n, pl.next_power_of_2(num_packs)]
        call = _call(partial(_greedy, n, num_packs), sizes, self.interpret, warps=1)
        pack_index, state = jax.vmap(call, -1, -1)(steps.reshape(n, -1))
        loads = (state[:num_packs] & (_FULL - 1)) >> low
        pack_index = pack_index.reshape(n, *lanes)
        contents = _contents(pack_index, order, num_packs)
        return Constructed(contents, loads.reshape(num_packs, *lanes))


def _greedy(n: int, num_packs: int, steps: _Ref, pack_index: _Ref, state: _Ref) -> None:
    """The kernel: see `quantised_greedy` for what a state is."""
    item_bits, pack_bits = index_bits(n // num_packs + 1), index_bits(num_packs)
    pack = _along(1, pl.next_power_of_2(num_packs))[0]

    def place(i: Array, state: Array) -> Array:
        lightest = jnp.min(state)
        after = lightest + steps[i]
        full = (after & ((1 << item_bits) - 1)) == n // num_packs
        pack_index[i] = (lightest >> item_bits) & ((1 << pack_bits) - 1)
        return jnp.where(state == lightest, jnp.where(full, after | _FULL, after), state)

    # What is padded is never the lightest.
    state[pack] = _loop(n, place, jnp.where(pack < num_packs, pack << item_bits, _MOST))
