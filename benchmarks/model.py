"""A small mixture-of-experts transformer in plain JAX, whose experts lie in the slots of a plan.

Bytes in, logits of the next byte out. Its mesh has one axis, "expert", over which sequences lie as
well as slots; all else is on every device. Experts have weights [L, R, ...] in slot order. What a
plan asks of a model stands in `_on_device`: the router chooses experts, `to_physical` makes slots
of them, and from there on a slot is what an expert would be without a plan. The balancing loss and
the loads that plans are made from are of experts, and know nothing of slots.

No token is dropped, so outputs are those of any other plan, to the order of float sums.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Float, Int, Int32, Key, PyTree

import eplb_jax
from eplb_jax import runtime
from eplb_jax.runtime import Choice

AXIS = "expert"
BYTES = 256
BLOCK = 32
"""Rows of a block, which all go through one slot."""

Weights = Mapping[str, Array]


@dataclass(frozen=True)
class Model:
    """Sizes, and how replicas are chosen."""

    layers: int = 4
    width: int = 64
    heads: int = 4
    hidden: int = 128
    experts: int = 32
    top_k: int = 2
    context: int = 128
    choice: Choice = "round_robin"


class Routed(NamedTuple):
    """What the routers of a step did.

    Attributes:
        load: Tokens routed to every expert.
        gpu_load: Tokens that every device got.
        unevenness: The balancing loss of Switch Transformer: 1 where experts are balanced.
    """

    load: Int32[Array, "L E"]
    gpu_load: Int32[Array, "L G"]
    unevenness: Float[Array, ""]


def mesh_of_devices() -> Mesh:
    """Up to eight GPUs where there are several, else eight devices of the CPU."""
    jax.config.update("jax_num_cpu_devices", 8)
    devices = jax.devices() if jax.device_count() > 1 else jax.devices("cpu")
    jax.config.update("jax_default_device", devices[0])
    return Mesh(devices[: min(8, 1 << len(devices).bit_length() - 1)], (AXIS,))


def contiguous(model: Model) -> eplb_jax.Placement:
    """Expert e in slot e, no replicas: a model without a balancer."""
    ids = jnp.broadcast_to(
        jnp.arange(model.experts, dtype=jnp.int32), (model.layers, model.experts)
    )
    return eplb_jax.Placement(ids, ids[..., None], jnp.ones_like(ids))


def initial(model: Model, seed: int = 0) -> dict[str, Any]:
    """Weights on the host, as a checkpoint has them: one row per expert, [L, E, ...]."""
    L, D, F, E = model.layers, model.width, model.hidden, model.experts
    rng = np.random.default_rng(seed)

    def drawn(*shape: int) -> np.ndarray:
        return rng.standard_normal(shape, np.float32) / np.sqrt(shape[-2], dtype=np.float32)

    shared = {
        "embedding": drawn(BYTES, D),
        "position": drawn(model.context, D),
        "qkv": drawn(L, D, 3 * D),
        "attended": drawn(L, D, D),
        "router": drawn(L, D, E),
        "logits": drawn(D, BYTES),
        "before_attention": np.ones((L, D), np.float32),
        "before_experts": np.ones((L, D), np.float32),
        "before_logits": np.ones(D, np.float32),
    }
    return {"shared": shared, "experts": {"up": drawn(L, E, D, F), "down": drawn(L, E, F, D)}}


def replicas_equal(experts: PyTree[Array], plan: eplb_jax.Placement) -> bool:
    """Whether all slots of an expert have the same rows, bit for bit."""
    layer = np.arange(len(plan.phy2log))[:, None]
    first = np.asarray(plan.log2phy)[layer, np.asarray(plan.phy2log), 0]
    return all(
        np.array_equal(x, x[layer, first]) for x in map(np.asarray, jax.tree.leaves(experts))
    )


def forward(
    params: Mapping[str, Weights],
    tokens: Int[Array, "B S"],
    plan: eplb_jax.Placement,
    key: Key[Array, ""],
    *,
    model: Model,
    mesh: Mesh,
) -> tuple[Float[Array, "B S bytes"], Routed]:
    """Logits of the next byte, and what the routers did.

    Args:
        params: "shared" weights, and "experts" in the slots of the plan.
        tokens: Sequences of bytes, at most `context` long.
        plan: Of all layers.
        key: For the choice "random".
        model: Sizes.
        mesh: Devices along one axis.
    """
    shared, experts = params["shared"], params["experts"]
    names = "qkv", "attended", "router", "before_attention", "before_experts"
    per_layer = {name: shared[name] for name in names}
    near = (
        runtime.nearest_replica(
            plan, eplb_jax.Topology.of_replicas(plan.phy2log.shape[1], mesh.size)
        )
        if model.choice == "nearest"
        else None
    )
    keys = jax.random.split(key, model.layers)

    def layer(x: Array, of: tuple) -> tuple[Array, Routed]:
        weights, experts, plan, near, key = of
        x = x + _attention(_normed(x, weights["before_attention"]), weights, model.heads)
        y, routed = _mixture(
            _normed(x, weights["before_experts"]).reshape(-1, model.width),
            *(weights["router"], experts, plan, near, key),
            model=model,
            mesh=mesh,
        )
        return x + y.reshape(x.shape), routed

    x = shared["embedding"][tokens] + shared["position"][None, : tokens.shape[1]]
    x, routed = lax.scan(layer, x, (per_layer, experts, plan, near, keys))
    routed = routed._replace(unevenness=jnp.mean(routed.unevenness))
    return _normed(x, shared["before_logits"]) @ shared["logits"], routed


def _normed(x: Array, scale: Array) -> Array:
    return (
        x
        * lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + 1e-6)
        * jnp.broadcast_to(scale, x.shape)
    )


def _attention(x: Float[Array, "B S D"], weights: Weights, heads: int) -> Float[Array, "B S D"]:
    qkv = (x @ weights["qkv"]).reshape(*x.shape[:2], 3, heads, -1)
    q, k, v = (qkv[:, :, i] for i in range(3))
    return (
        jax.nn.dot_product_attention(q, k, v, is_causal=True).reshape(x.shape) @ weights["attended"]
    )


def _mixture(
    x: Float[Array, "tokens D"],
    router: Float[Array, "D E"],
    experts: PyTree[Float[Array, "R ..."]],
    plan: eplb_jax.Placement,
    near: Int32[Array, "E G"] | None,
    key: Key[Array, ""],
    *,
    model: Model,
    mesh: Mesh,
) -> tuple[Float[Array, "tokens D"], Routed]:
    """A layer of experts."""
    score = jax.nn.softmax(x @ router)
    gate, ids = lax.top_k(score, model.top_k)
    gate = gate / jnp.sum(gate, axis=-1, keepdims=True)
    over, everywhere = PartitionSpec(AXIS), PartitionSpec()
    y, load, gpu_load = jax.shard_map(
        partial(_on_device, model=model),
        mesh=mesh,
        in_specs=(over, over, over, over, everywhere, everywhere, everywhere),
        out_specs=(over, everywhere, over),
    )(x, gate, ids, experts, plan, near, key)
    share = load.astype(x.dtype) / ids.size
    unevenness = model.experts * jnp.sum(share * jnp.mean(score, axis=0))
    return y, Routed(load, gpu_load, unevenness)


def _on_device(
    x: Float[Array, "tokens D"],
    gate: Float[Array, "tokens k"],
    ids: Int32[Array, "tokens k"],
    experts: Weights,
    plan: eplb_jax.Placement,
    near: Int32[Array, "E G"] | None,
    key: Key[Array, ""],
    *,
    model: Model,
) -> tuple[Float[Array, "tokens D"], Int32[Array, " E"], Int32[Array, " 1"]]:
    """This device's tokens through the slots of all devices.

    Every device sees all tokens, takes those of its slots, and hands back its part of the sums.
    None is dropped: there is room for all, should one device get all.
    """
    me, num_slots = lax.axis_index(AXIS), experts["up"].shape[0]
    load = runtime.expert_counts(ids, model.experts, axis_name=AXIS)
    shares = None
    if model.choice == "shares":
        topology = eplb_jax.Topology(lax.axis_size(AXIS), num_slots)
        shares = runtime.split_load(load, plan, topology)
    slots = runtime.to_physical(
        *(ids, plan, model.choice),
        key=jax.random.fold_in(key, me),
        table=near,
        gpu=me,
        shares=shares,
        axis_name=AXIS,
    )
    x, gate, slots = (lax.all_gather(a, AXIS, tiled=True) for a in (x, gate, slots))
    mine = slots // num_slots == me
    slots = jnp.where(mine, slots % num_slots, num_slots)
    gpu_load = jnp.sum(mine, dtype=jnp.int32)
    # Twice the mean is nearly always enough, and computes a quarter of all pairs on 8 devices.
    # Recomputed backwards, as `cond` hands on what either branch would keep.
    share = 2 * slots.size // lax.axis_size(AXIS)
    some, every = (jax.checkpoint(partial(_grouped, room=room)) for room in (share, slots.size))
    y = lax.cond(gpu_load <= share, some, every, x, slots, gate, experts)
    return lax.psum_scatter(y, AXIS, tiled=True), load, gpu_load[None]


def _grouped(
    x: Float[Array, "N D"],
    slots: Int32[Array, "N k"],
    gate: Float[Array, "N k"],
    experts: Weights,
    room: int,
) -> Float[Array, "N D"]:
    """Every token's sum over its slots on this device, with room for so many token-slot pairs.

    Pairs are sorted by slot and cut into blocks of one slot each: `lax.ragged_dot` would take
    every row through every slot on a CPU.
    """
    num_slots, k = experts["up"].shape[0], slots.shape[1]
    slots, gate = slots.reshape(-1), gate.reshape(-1)
    pairs = jnp.argsort(slots, stable=True)
    count = jnp.zeros(num_slots, jnp.int32).at[slots].add(1, mode="drop")
    blocks = -(-count // BLOCK)
    ends = jnp.cumsum(blocks)
    block = jnp.arange(-(-room // BLOCK) + num_slots, dtype=jnp.int32)
    slot = jnp.minimum(jnp.searchsorted(ends, block, side="right"), num_slots - 1)
    number = (
        BLOCK * (block - (ends - blocks)[slot])[:, None] + jnp.arange(BLOCK, dtype=jnp.int32)[None]
    )
    used = number < count[slot, None]
    pair = pairs[jnp.where(used, (jnp.cumsum(count) - count)[slot, None] + number, 0)]
    rows = jnp.where(used[..., None], x[pair // k], 0)
    hidden = jax.nn.gelu(jnp.einsum("bnd,bdf->bnf", rows, experts["up"][slot]))
    out = jnp.einsum("bnf,bfd->bnd", hidden, experts["down"][slot])
    out = out * jnp.where(used, gate[pair], 0)[..., None]
    return jnp.zeros_like(x).at[pair // k].add(out)
