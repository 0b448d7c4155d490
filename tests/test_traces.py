import re
from typing import get_args

import numpy as np
import pytest

from eplb_jax.evaluation.traces import Kind, generate

KINDS = get_args(Kind)
MANY = 10**10
"""Number of tokens at which sampling noise is negligible."""


def measured(trace, num_gpus):
    """Balancedness in the order of experts, one layer after another."""
    each = []
    for layer in trace.reshape(-1, trace.shape[2]).tolist():
        size = len(layer) // num_gpus
        gpus = [sum(layer[g * size : (g + 1) * size]) for g in range(num_gpus)]
        each.append(sum(gpus) / num_gpus / max(gpus))
    return sum(each) / len(each)


def water_filled(popularity, top_k):
    """Shares cut to 1 / top_k one after another, the rest in proportion."""
    full = set()
    while True:
        rest = sum(x for i, x in enumerate(popularity) if i not in full)
        left = 1 - len(full) / top_k
        share = [1 / top_k if i in full else x / rest * left for i, x in enumerate(popularity)]
        above = {i for i, x in enumerate(share) if x > 1 / top_k + 1e-12}
        if not above:
            return np.array(share)
        full |= above


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("skew", [0, 1, 4, 64])
@pytest.mark.parametrize(("tokens", "top_k"), [(1, 1), (7, 3), (4096, 8), (5, 16)])
def test_tokens_go_to_distinct_experts(kind, skew, tokens, top_k):
    trace = generate(kind, 4, 3, 16, tokens=tokens, top_k=top_k, skew=skew, seed=3)
    assert trace.shape == (4, 3, 16)
    assert trace.dtype == np.int64
    assert np.all(trace.sum(axis=2) == tokens * top_k)
    assert trace.min() >= 0
    assert trace.max() <= tokens


@pytest.mark.parametrize("kind", KINDS)
def test_a_seed_gives_one_trace(kind):
    first = generate(kind, 4, 3, 16, seed=5)
    np.testing.assert_array_equal(generate(kind, 4, 3, 16, seed=np.int32(5)), first)
    other = generate(kind, 4, 3, 16, seed=6)
    # Another seed is another popularity, not only other noise.
    assert np.corrcoef(first.mean(axis=0).ravel(), other.mean(axis=0).ravel())[0, 1] < 0.5


@pytest.mark.parametrize("skew", [0.3, 1, 2])
def test_skew_is_that_of_log_loads(skew):
    trace = generate("stationary", 1, 40, 256, tokens=MANY, top_k=1, skew=skew)
    assert np.log(trace).std(axis=2).mean() == pytest.approx(skew, rel=0.03)


@pytest.mark.parametrize("skew", [0.5, 1.5, 3])
def test_popularity_is_cut_and_the_others_grow_in_proportion(skew):
    uncut = generate("stationary", 1, 20, 16, tokens=MANY, top_k=1, skew=0.25)[0]
    trace = generate("stationary", 1, 20, 16, tokens=MANY, top_k=6, skew=skew)[0]
    for popularity, load in zip(uncut ** (skew / 0.25), trace, strict=True):
        wanted = water_filled(popularity.tolist(), 6)
        np.testing.assert_allclose(load / load.sum(), wanted, atol=5e-4)


def test_stationary_windows_differ_by_sampling_noise_only():
    def spread(kind):  # chi-square by degrees of freedom
        trace = generate(kind, 24, 6, 48, top_k=4)
        mean = trace.mean(axis=0)
        return np.sum((trace - mean) ** 2 / mean) / (23 * 6 * 47)

    assert spread("stationary") == pytest.approx(1, abs=0.1)
    assert min(spread(kind) for kind in KINDS if kind != "stationary") > 5


def test_drift_is_a_random_walk_of_every_expert():
    trace = generate("drift", 60, 80, 64, tokens=MANY, top_k=1, skew=0.5, change=0.2)
    log = np.log(trace)
    log -= log.mean(axis=2, keepdims=True)
    assert log[0].std() == pytest.approx(0.5, rel=0.03)
    for apart in (1, 4, 16):
        steps = log[apart:] - log[:-apart]
        assert steps.std() == pytest.approx(0.2 * np.sqrt(apart), rel=0.05)
    steps = np.diff(log, axis=0)
    assert abs(np.corrcoef(steps[1:].ravel(), steps[:-1].ravel())[0, 1]) < 0.02
    alike = [np.corrcoef(log[0].ravel(), log[t].ravel())[0, 1] for t in (1, 5, 20, 59)]
    assert alike == sorted(alike, reverse=True)
    assert alike[0] > 0.9
    assert alike[-1] < 0.5


@pytest.mark.parametrize("top_k", [1, 4])
def test_topics_are_mixed_alike_in_all_layers(top_k):
    def sizes(kind):
        trace = generate(kind, 24, 6, 48, topics=3, top_k=top_k)
        return np.linalg.svd(trace.reshape(24, -1) / trace[0, 0].sum(), compute_uv=False)

    values = sizes("topics")
    assert values[2] > 3 * values[3]
    assert values[3] < 1.5 * values[4]
    other = sizes("drift")
    assert other[2] < 3 * other[3]


@pytest.mark.parametrize("change", [0.1, 1])
def test_a_part_of_the_mixture_is_renewed_by_one_topic(change):
    trace = generate("topics", 40, 2, 16, tokens=MANY, top_k=2, topics=3, change=change)
    share = trace.reshape(40, -1) / (MANY * 2)
    renewed = (share[1:] - (1 - change) * share[:-1]) / change
    assert renewed.min() > -1e-3
    apart = np.abs(renewed[:, None] - renewed).max(axis=2)
    different = apart > 1e-2
    assert apart[~different].max() < 1e-3
    assert len(np.unique(different, axis=0)) == 3


def test_bursts_raise_single_experts_for_a_few_windows():
    trace = generate("bursts", 50, 80, 32, tokens=MANY, top_k=1, change=0.05)
    usual = trace / np.median(trace, axis=0)
    factor = usual / np.median(usual, axis=2, keepdims=True)
    raised = factor > 2
    assert np.abs(factor[~raised] - 1).max() < 0.05
    assert factor[raised].min() > 2.95
    assert factor[raised].max() < 8.05
    # Starts now and up to three windows before, whose bursts last long enough.
    calm = np.prod([1 - 0.05 * lasts for lasts in (1, 0.75, 0.5, 0.25)])
    assert raised.any(axis=2).mean() == pytest.approx(1 - calm, abs=0.02)
    assert raised[0].any(axis=1).mean() == pytest.approx(1 - calm, abs=0.1)
    hit = raised.sum(axis=2)
    assert hit[hit > 0].mean() == pytest.approx(2, abs=0.25)
    again = (raised[1:] & raised[:-1]).sum() / raised[:-1].sum()
    assert again == pytest.approx(0.6, abs=0.05)  # 0, 1, 2, 3 of 1, 2, 3, 4


@pytest.mark.parametrize("kind", ["drift", "bursts"])
def test_without_change_a_trace_is_stationary(kind):
    stationary = generate("stationary", 5, 3, 16)
    np.testing.assert_array_equal(generate(kind, 5, 3, 16, change=0), stationary)
    assert np.any(generate(kind, 5, 3, 16) != stationary)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("target", "num_gpus"), [(0.3, None), (0.5, None), (0.6, 8), (0.85, 8)])
def test_balancedness_is_reached(kind, target, num_gpus):
    options = {"balancedness": target, "num_gpus": num_gpus, "top_k": 4}
    trace = generate(kind, 8, 8, 32, **options)
    assert measured(trace, num_gpus or 32) == pytest.approx(target, abs=0.001)
    assert np.all(trace.sum(axis=2) == 8192 * 4)
    np.testing.assert_array_equal(trace, generate(kind, 8, 8, 32, skew=9, **options))


def test_one_small_window_comes_close_too():
    for seed in range(20):
        trace = generate("stationary", 1, 1, 32, tokens=512, top_k=4, balancedness=0.4, seed=seed)
        assert measured(trace, 32) == pytest.approx(0.4, abs=0.01)


@pytest.mark.parametrize(
    ("kind", "target", "num_gpus"),
    [
        ("stationary", 1.0, 32),
        ("stationary", 0.01, 32),
        ("topics", 0.1, 4),
        ("drift", 0.99, 8),
        ("bursts", 1, 32),
    ],
)
def test_the_nearest_balancedness_can_be_reached(kind, target, num_gpus):
    options = {"tokens": 200, "top_k": 4, "num_gpus": num_gpus}
    message = rf"balancedness={float(target)} cannot be reached; nearest: 0\.\d+$"
    with pytest.raises(ValueError, match=message) as caught:
        generate(kind, 4, 4, 32, balancedness=target, **options)
    nearest = float(re.findall(r"[\d.]+$", str(caught.value))[0])
    trace = generate(kind, 4, 4, 32, balancedness=nearest, **options)
    assert measured(trace, num_gpus) == pytest.approx(nearest, abs=0.001)
    # It is as far as one gets with any skew.
    others = [measured(generate(kind, 4, 4, 32, skew=x, **options), num_gpus) for x in (0, 1, 9)]
    assert min(abs(x - target) for x in others) > abs(nearest - target) - 0.001


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "chaos"}, "kind='chaos' is not known; choose one of: stationary, drift, topics"),
        ({"num_windows": 0}, "num_windows=0 is less than 1; nearest: 1"),
        ({"num_layers": 0}, "num_layers=0 is less than 1; nearest: 1"),
        ({"num_experts": -1}, "num_experts=-1 is less than 1; nearest: 1"),
        ({"tokens": 0}, "tokens=0 is less than 1; nearest: 1"),
        ({"tokens": 1 << 60}, "tokens=1152921504606846976 is more than 1125899906842624; nearest"),
        ({"top_k": 17}, "top_k=17 is more than num_experts=16; nearest: 16"),
        ({"num_gpus": 5}, "num_gpus=5 does not divide num_experts=16; nearest: 4, 8"),
        ({"skew": -1}, "skew=-1.0 is not from 0 to 64; nearest: 0"),
        ({"skew": float("nan")}, "skew=nan is not from 0 to 64; nearest: 0"),
        ({"balancedness": float("nan")}, "balancedness=nan is not from 0 to 1; nearest: 0"),
        ({"balancedness": 2}, "balancedness=2.0 is not from 0 to 1; nearest: 1"),
        ({"topics": 0}, "topics=0 is less than 1; nearest: 1"),
        ({"seed": -1}, "seed=-1 is less than 0; nearest: 0"),
        ({"change": 0.1}, "change=0.1 has no meaning for kind='stationary'; nearest: None"),
        ({"kind": "drift", "change": -1}, "change=-1.0 is not from 0 to 64; nearest: 0"),
        ({"kind": "topics", "change": 2}, "change=2.0 is not from 0 to 1; nearest: 1"),
        ({"kind": "bursts", "change": 1.5}, "change=1.5 is not from 0 to 1; nearest: 1"),
    ],
)
def test_numbers_out_of_range(options, message):
    usual = {"kind": "stationary", "num_windows": 2, "num_layers": 2, "num_experts": 16}
    with pytest.raises(ValueError, match=re.escape(message)):
        generate(**usual | options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tokens": 1.5}, "tokens must be an integer, got 1.5"),
        ({"seed": "x"}, "seed must be an integer, got 'x'"),
        ({"skew": "steep"}, "skew must be a number, got 'steep'"),
        ({"balancedness": [1, 2]}, r"balancedness must be a number, got \[1, 2\]"),
    ],
)
def test_arguments_that_are_not_numbers(options, message):
    with pytest.raises(TypeError, match=message):
        generate("stationary", 2, 2, 16, **options)
