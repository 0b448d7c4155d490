"""The benchmark that measures the cost of a replica."""

import numpy as np

from benchmarks import expert_cost
from tests.helpers import assert_within, noisy


def test_the_benchmark_sees_tiles_and_says_where_there_are_none():
    sizes = [np.where(np.arange(8) < a, n, 0) for n in expert_cost.TOKENS for a in (2, 4, 8)]
    load = np.array(sizes)[:, None]
    for tile in 1, 32:
        rounded = np.ceil(load / tile).sum(axis=(1, 2)) * tile
        seconds = noisy(1e-5 + 1e-7 * rounded + 2e-6 * (load > 0).sum(axis=(1, 2)), 0.01)
        fit, clear = expert_cost.fit(load, seconds, expert_cost.TILES)
        assert (fit.tile, clear) == (tile, tile > 1)
        assert_within(fit, per_token=1e-7, per_active_expert=2e-6)


def test_the_benchmark_prints_a_cost(capsys):
    tokens = ["--tokens", "1", "8", "64", "256"]
    expert_cost.main(["--backend", "torch", "--hidden", "64", "--budget", "0.01", *tokens])
    shown = capsys.readouterr().out
    assert "| 256 |" in shown
    assert "eplb_jax.Cost(per_token=" in shown or "no cost: " in shown
