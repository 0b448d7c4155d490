"""What the processes of the engines in `make peers` share."""

import tempfile

import numpy as np
import torch

LAYERS, EXPERTS, REPLICAS, GROUPS = 3, 16, 24, 4


def weights_of(layer, experts):
    """Two tensors, as of the projections of a layer, that differ between layers and experts."""
    values = 16 * layer + experts
    up = values[:, None] + torch.arange(5) / 8
    down = values[:, None, None] + torch.arange(6).reshape(2, 3)
    return [up.to(torch.bfloat16), down.to(torch.uint8)]


def tokens(step, size):
    """The tokens of a step for every expert, [size, 3, 16]: what each rank routes."""
    rng = np.random.default_rng(step)
    popularity = np.random.default_rng(step // 5).permutation(np.geomspace(400, 4, EXPERTS))
    return torch.from_numpy(rng.poisson(popularity, (size, LAYERS, EXPERTS)))


def assert_weights(weights, maps, rank):
    """Every slot of this rank holds the weights of the expert that the map names."""
    assert int(maps.min()) >= 0
    for layer, tensors in enumerate(weights):
        slots = len(tensors[0])
        local = maps[layer, slots * rank : slots * (rank + 1)]
        for held, named in zip(tensors, weights_of(layer, local), strict=True):
            assert torch.equal(held, named), (layer, local)


def assert_same_on_all_ranks(maps):
    gathered = [torch.empty_like(maps) for _ in range(torch.distributed.get_world_size())]
    torch.distributed.all_gather(gathered, maps.contiguous())
    assert all(torch.equal(x, maps) for x in gathered)


def run_ranks(main, size):
    """Call main(rank, size, store) in forked processes; store is a file to be."""
    with tempfile.TemporaryDirectory() as folder:
        arguments = size, f"{folder}/store"
        torch.multiprocessing.start_processes(main, arguments, size, start_method="fork")
