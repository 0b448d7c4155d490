"""Time of a call from torch against the same call in JAX, and a check of CUDA tensors.

python benchmarks/torch_calls.py

Plans DeepSeek-V3-0324, 58 x 256 experts into 288 slots on 32 GPUs, from a JAX array, from NumPy
counts and from a torch tensor, and prints the median time of each and the median difference from
the first. If torch and JAX both have a GPU, also with CUDA tensors: whether results equal the CPU's
with every combination of devices and on another stream, the time, and the GPU memory that JAX uses.
"""

import statistics
import time
from collections.abc import Callable, Mapping

import eplb_torch
import jax
import jax.numpy as jnp
import numpy as np
import torch

import eplb_jax

COUNTS = 288, 8, 4, 32
ROUNDS = 200


def side_by_side(calls: Mapping[str, Callable[[], object]], rounds: int = ROUNDS) -> None:
    """Print the median time of each call and of its difference from the first in the same round."""
    names = list(calls)
    times = {name: np.empty(rounds) for name in names}
    for call in calls.values():
        call()
        call()
    for i in range(rounds):
        turn = i % len(names)
        for name in names[turn:] + names[:turn]:
            start = time.perf_counter()
            calls[name]()
            times[name][i] = time.perf_counter() - start
    first = times[names[0]]
    for name in names:
        more = statistics.median(times[name] - first) * 1e6
        print(f"    {name:28} {statistics.median(times[name]) * 1e3:8.2f} ms {more:+8.0f} us")


def cpu(counts: torch.Tensor, strategy: str) -> None:
    load = jnp.asarray(counts.float().numpy())

    def in_jax(weight: jax.Array | np.ndarray) -> object:
        return jax.block_until_ready(
            eplb_jax.rebalance_experts(weight, *COUNTS, policy="global", strategy=strategy)
        )

    def in_torch() -> object:
        return eplb_torch.rebalance_experts(counts, *COUNTS, policy="global", strategy=strategy)

    print(f"{strategy}, on the CPU")
    side_by_side(
        {
            "JAX array": lambda: in_jax(load),
            "NumPy int64 counts": lambda: in_jax(counts.numpy()),
            "torch int64 counts": in_torch,
        }
    )


def gpu(counts: torch.Tensor) -> None:
    on_gpu = counts.cuda()
    expected = eplb_torch.rebalance_experts(counts, *COUNTS)
    stream = torch.cuda.Stream()
    routes = {
        "CUDA tensor, on the CPU": lambda: eplb_torch.rebalance_experts(on_gpu, *COUNTS),
        "CUDA tensor, on the GPU": lambda: eplb_torch.rebalance_experts(
            on_gpu, *COUNTS, device="cuda"
        ),
        "CPU tensor, on the GPU": lambda: eplb_torch.rebalance_experts(
            counts, *COUNTS, device="cuda"
        ),
    }
    print("auto, CUDA")
    for name, route in routes.items():
        plan = route()
        same = all(torch.equal(x.cpu(), y) for x, y in zip(plan, expected, strict=True))
        print(f"    {name:28} as on the CPU: {same}, result on {plan[0].device}")
    with torch.cuda.stream(stream):
        late = torch.zeros_like(on_gpu)
        torch.cuda._sleep(100_000_000)
        late += on_gpu
        plan = eplb_torch.rebalance_experts(late, *COUNTS, device="cuda")
        same = torch.equal(plan[0].cpu(), expected[0])
    print(f"    written late on a stream     as on the CPU: {same}")
    shared = eplb_torch.to_jax(on_gpu.float())
    print(f"    to_jax of a CUDA tensor is on {shared.device}")
    side_by_side(routes)
    free, total = torch.cuda.mem_get_info()
    taken = total - free - torch.cuda.memory_reserved()
    print(f"    used outside torch's pool: {taken / 2**20:.0f} of {total / 2**20:.0f} MiB")


def main() -> None:
    counts = torch.from_numpy(eplb_jax.loads.example().sum(axis=0))
    print(f"torch {torch.__version__}, jax {jax.__version__}, 58 x 256 -> 288 / 32, global")
    if torch.cuda.is_available():
        eplb_torch.preload(counts.shape, *COUNTS)  # before JAX starts and reserves GPU memory
        if jax.default_backend() == "gpu":
            gpu(counts)
    for strategy in ("greedy", "auto"):
        cpu(counts, strategy)


if __name__ == "__main__":
    main()
