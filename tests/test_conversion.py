"""Tensors to JAX and back: every kind of tensor is converted exactly, or refused by name."""

import gc
import weakref

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from eplb_torch import conversion, to_jax, to_torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

NARROW = [
    *(torch.bool, torch.uint8, torch.int8, torch.int16, torch.uint16, torch.int32, torch.uint32),
    *(torch.float16, torch.bfloat16, torch.float32, torch.complex64),
    *(torch.float8_e4m3fn, torch.float8_e5m2),
]
WIDE = [torch.int64, torch.uint64, torch.float64, torch.complex128]


def some(shape, dtype=torch.float32):
    return torch.arange(np.prod(shape, dtype=int)).reshape(shape).to(torch.uint8).to(dtype)


def exactly(array):
    """The values in float64 or complex128."""
    array = np.asarray(array)
    return array.astype(complex if array.dtype.kind == "c" else float)


def values(tensor):
    tensor = tensor.detach()
    return tensor.to(torch.complex128 if tensor.is_complex() else torch.float64).numpy()


@pytest.mark.parametrize("shape", [(), (0, 3), (3, 0), (1,), (1, 5), (4, 5)], ids=str)
@pytest.mark.parametrize("dtype", NARROW + WIDE, ids=str)
@pytest.mark.parametrize("by_dlpack", [True, False])
def test_round_trip(dtype, shape, by_dlpack, monkeypatch):
    if not by_dlpack:  # as for pinned memory, or a device that one side does not have

        def refuse(*args, **kwargs):
            raise BufferError

        monkeypatch.setattr(jnp, "from_dlpack", refuse)
        monkeypatch.setattr(torch, "from_dlpack", refuse)
    tensor = some(shape, dtype)
    array = to_jax(tensor)
    assert isinstance(array, jax.Array)
    assert array.shape == shape
    np.testing.assert_array_equal(exactly(array), values(tensor))
    back = to_torch(array)
    assert back.shape == shape
    assert dtype in WIDE or back.dtype == dtype
    np.testing.assert_array_equal(values(back), values(tensor))


@pytest.mark.parametrize("dtype", WIDE, ids=str)
def test_64_bit_types_stay_under_x64(dtype):
    with jax.enable_x64(True):
        assert to_torch(to_jax(some((2, 3), dtype))).dtype == dtype


@pytest.mark.parametrize(
    ("number", "dtype", "becomes"),
    [
        (2**31 - 1, torch.int64, jnp.int32),
        (-(2**31), torch.int64, jnp.int32),
        (2**31, torch.int64, jnp.float32),
        (-(2**31) - 1, torch.int64, jnp.float32),
        (2**40 + 2**20, torch.int64, jnp.float32),
        (2**32 - 1, torch.uint64, jnp.uint32),
        (2**63, torch.uint64, jnp.float32),
    ],
)
def test_large_integers_do_not_wrap(number, dtype, becomes):
    array = to_jax(torch.tensor([0, number], dtype=dtype))
    assert array.dtype == becomes
    np.testing.assert_allclose(exactly(array), [0, number], rtol=2**-24)


VIEWS = {
    "strided": lambda t: t[::2, 1::3],
    "sliced": lambda t: t[:, :2],
    "misaligned": lambda t: t.flatten()[1:],
    "transposed": lambda t: t.T,
    "expanded": lambda t: t[:, :1].expand(-1, 7),
    "zero strides": lambda t: t[0, 0].expand(3, 4),
    "size one, odd strides": lambda t: t.as_strided((3, 1), (1, 7)),
    "channels last": lambda t: t.reshape(1, 2, 3, 4).contiguous(memory_format=torch.channels_last),
    "flipped": lambda t: t.flip(0),
    "permuted": lambda t: t.reshape(2, 3, 4).permute(2, 0, 1),
    "grad": lambda t: t.clone().requires_grad_(),
    "leaf parameter": lambda t: torch.nn.Parameter(t),
    "not a leaf": lambda t: t.clone().requires_grad_() * 2,
    "lazy negation": lambda t: torch._neg_view(t),
    "lazy conjugate": lambda t: torch.complex(t, t).conj(),
    "imaginary part of a conjugate": lambda t: torch.complex(t, t).conj().imag,
    "subclass": lambda t: t.as_subclass(type("Mine", (torch.Tensor,), {})),
}


@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("copy", [False, True])
def test_views(view, copy):
    tensor = VIEWS[view](some((4, 6)))
    expected = values(tensor.as_subclass(torch.Tensor).resolve_conj().resolve_neg())
    np.testing.assert_array_equal(exactly(to_jax(tensor, copy=copy)), expected)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_any_window_of_memory(data):
    """as_strided with any sizes, strides and offset; bytes that are not aligned to the type."""
    shape = data.draw(st.lists(st.integers(0, 4), max_size=4))
    strides = [data.draw(st.integers(0, 5)) for _ in shape]
    start = data.draw(st.integers(0, 9))
    raw = bytearray(np.arange(100, dtype=np.float32).tobytes())
    offset = data.draw(st.integers(0, 3))
    memory = torch.frombuffer(raw[:1] * offset + raw, dtype=torch.float32, offset=offset)
    tensor = memory.as_strided(shape, strides, start)
    np.testing.assert_array_equal(
        np.asarray(to_jax(tensor)), np.array(tensor.tolist(), "f4").reshape(shape)
    )


def test_memory_that_numpy_says_is_read_only():
    values = np.arange(4.0, dtype=np.float32)
    values.flags.writeable = False
    with pytest.warns(UserWarning, match="not writable"):
        tensor = torch.from_numpy(values)
    np.testing.assert_array_equal(to_jax(tensor), values)


def test_inference_mode_and_no_grad():
    with torch.inference_mode():
        made = some((2, 3))
        np.testing.assert_array_equal(to_jax(made), made.numpy())
        assert to_torch(to_jax(made)).is_inference()
    np.testing.assert_array_equal(to_jax(made), made.numpy())
    with torch.no_grad():
        np.testing.assert_array_equal(to_jax(made), made.numpy())


def test_memory_is_shared_where_it_can_be_and_stays_alive():
    tensor = torch.zeros(64)
    array = to_jax(tensor)
    assert array.unsafe_buffer_pointer() == tensor.data_ptr()
    alive = weakref.ref(tensor)
    tensor += 3
    del tensor
    gc.collect()
    assert alive() is None
    np.testing.assert_array_equal(array, np.full(64, 3))
    shared = to_torch(array, copy=False)
    assert shared.data_ptr() == array.unsafe_buffer_pointer()


def test_a_copy_is_a_copy():
    tensor = torch.zeros(64)
    array = to_jax(tensor, copy=True)
    tensor += 1
    np.testing.assert_array_equal(array, np.zeros(64))
    back = to_torch(array)
    back += 5
    np.testing.assert_array_equal(array, np.zeros(64))


@pytest.mark.parametrize("by_dlpack", [True, False])
def test_what_is_not_shared_is_copied_before_the_call_returns(by_dlpack, monkeypatch):
    if not by_dlpack:

        def refuse(*args, **kwargs):
            raise AssertionError("Torch not compiled with CUDA enabled")

        monkeypatch.setattr(jnp, "from_dlpack", refuse)
    for _ in range(3):
        tensor = torch.zeros(2**22 + 16)[by_dlpack:]  # not aligned for JAX, or aligned
        array = to_jax(tensor)
        tensor.fill_(1)
        assert not np.asarray(array).any()


def test_like_says_where():
    array = jnp.arange(3)
    assert to_torch(array, torch.zeros(1)).device == torch.device("cpu")
    assert to_torch(array, torch.device("meta")).is_meta
    to_torch(array, "cpu").fill_(-1)
    np.testing.assert_array_equal(array, [0, 1, 2])
    assert to_torch(array, torch.zeros(1, device="meta"), copy=False).is_meta


def test_arrays_that_dlpack_does_not_know():
    np.testing.assert_array_equal(to_torch(jnp.asarray([1, 7, -8], jnp.int4)), [1, 7, -8])
    np.testing.assert_array_equal(to_torch(jnp.asarray([1, 15], jnp.uint4)), [1, 15])
    sharding = jax.sharding.NamedSharding(
        jax.make_mesh((8,), ("x",), axis_types=(jax.sharding.AxisType.Auto,)),
        jax.sharding.PartitionSpec("x"),
    )
    spread = jax.device_put(jnp.arange(16), sharding)
    np.testing.assert_array_equal(to_torch(spread), np.arange(16))


def fake():
    with FakeTensorMode():
        return torch.ones(3)


def opaque():
    """A wrapper without memory of its own."""

    class Opaque(torch.Tensor):
        @staticmethod
        def __new__(cls):
            return torch.Tensor._make_wrapper_subclass(cls, (3,))

        @classmethod
        def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
            raise NotImplementedError

    return Opaque()


def two(kind):
    parts = [torch.ones(2), torch.ones(3)]
    if kind == "nested":
        return torch.nested.nested_tensor(parts, layout=torch.jagged)
    return torch.sparse_coo_tensor([[0, 1]], parts[0], (4,), check_invariants=False)


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: torch.ones(3, device="meta"), "meta device and holds no values"),
        (fake, "is a FakeTensor, which holds no values"),
        (opaque, "is a Opaque, which holds no values"),
        (lambda: two("sparse"), r"layout is torch.sparse_coo; use to_dense\(\)"),
        (lambda: torch.ones(2, 2).to_mkldnn(), r"use to_dense\(\)"),
        (lambda: two("nested"), "NestedTensor"),
        (lambda: torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.quint8), "dequantize"),
        (lambda: torch.zeros(3, dtype=torch.complex32), "JAX has no dtype complex32"),
        (lambda: [1.0, 2.0], "must be a torch.Tensor, got list"),
        (lambda: np.ones(3), "must be a torch.Tensor, got ndarray"),
    ],
)
def test_what_cannot_be_converted_is_refused(make, message):
    with pytest.raises(TypeError, match=message):
        to_jax(make())


def test_inside_torch_func():
    with pytest.raises(TypeError, match=r"no memory to read, as inside torch\.func"):
        torch.vmap(lambda t: to_torch(to_jax(t)))(torch.ones(2, 3))


def test_arrays_that_cannot_become_tensors():
    with pytest.raises(TypeError, match=r"traced inside jax\.jit"):
        jax.jit(lambda x: to_torch(x) and x)(jnp.ones(2))
    with pytest.raises(TypeError, match=r"array must be a jax\.Array, got ndarray"):
        to_torch(np.ones(2))
    with pytest.raises(TypeError, match=r"random key use jax\.random\.key_data"):
        to_torch(jax.random.key(0))


def test_a_device_that_jax_lacks_goes_through_the_cpu(monkeypatch):
    known = conversion.find_device
    asked = []

    def find(platform, index):
        asked.append(platform)
        return None if len(asked) == 1 else known(platform, index)

    monkeypatch.setattr(conversion, "find_device", find)
    np.testing.assert_array_equal(to_jax(some((2, 3))), some((2, 3)).numpy())
    assert asked == ["cpu", "cpu"]
