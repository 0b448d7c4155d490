"""Faults put into a measured trace are found, and nothing else is."""

import numpy as np
import pytest

import eplb_jax
from eplb_jax import Topology, inspect_loads
from eplb_jax.evaluation.loads import EXAMPLES
from eplb_jax.evaluation.traces import generate

TRACE = eplb_jax.loads.example("gpt_oss_20b")  # [26, 24, 32], 32,768 in every layer
TOPOLOGY = Topology(8, slots=5)


def changed(change, trace=TRACE):
    """A copy of a trace, changed in place."""
    copy = np.array(trace, np.float64)
    change(copy)
    return copy


@pytest.mark.parametrize("name", EXAMPLES)
def test_measured_traces_have_no_findings(name):
    trace = eplb_jax.loads.example(name)
    assert inspect_loads(trace) == ()
    for topology in (1, 2, 8, 32, Topology(8, slots=trace.shape[2] // 4)):
        assert inspect_loads(trace, topology) == ()
    for window in trace:
        assert inspect_loads(window) == ()
    dense = np.concatenate([np.zeros_like(trace[:, :3]), trace], axis=1)
    idle = np.concatenate([dense, np.zeros_like(dense)])
    assert inspect_loads(idle / 7) == ()


@pytest.mark.parametrize("kind", ["stationary", "drift", "topics", "bursts"])
@pytest.mark.parametrize("tokens", [1, 8, 8192])
@pytest.mark.parametrize("skew", [0, 1, 8])
def test_synthetic_traces_have_no_findings(kind, tokens, skew):
    assert inspect_loads(generate(kind, 12, 8, 64, tokens=tokens, skew=skew)) == ()


@pytest.mark.parametrize("growth", [1.5, 2, 8])
def test_traffic_that_grows_is_not_cumulative(growth):
    rng = np.random.default_rng(0)
    parts = growth ** np.arange(4)
    for first in range(len(TRACE) - 3):
        grown = rng.binomial(TRACE[first : first + 4], (parts / parts[-1])[:, None, None])
        assert "cumulative" not in [x.kind for x in inspect_loads(grown)]


def all_in_one(trace):
    trace[4:, 5] = trace[4:].sum(axis=1)
    trace[4:, :5] = trace[4:, 6:] = 0


def one_gpu(trace):
    trace[:, :, :12] = trace[:, :, 16:] = 0


def equal(trace):
    trace[3] = 1
    trace[9] = 1024.0 + np.arange(32) % 2  # tokens dealt out in turn
    trace[9, 0] = 0


def missing_passes(trace):
    trace[6, 7:9] *= 0.95
    trace[6, 9] *= 0.995  # within the tolerance
    trace[8, 2] = 0


def cumulative(trace):
    np.cumsum(trace, axis=0, out=trace)


def read_twice(trace):
    trace[11] = trace[10]
    trace[20] = trace[19] = 0  # nothing is not the same recording


def small(trace):
    trace[13] /= 150
    trace[14] /= 50


def lost_gpu(trace):
    trace[:, :, [4, 5, 6, 7]] = 0


FAULTS = {
    all_in_one: (
        ("one layer", range(4, 26), [5]),
        "100.0 % of windows 4 to 25 is in layer 5 of 24",
    ),
    one_gpu: (("one GPU", range(26), []), "windows 0 to 25 is on the experts of GPU 3 of 8"),
    equal: (("equal counts", [3, 9], []), "equal counts in windows 3, 9, 1 to 1;"),
    missing_passes: (
        ("layer totals", [6, 8], [2, 7, 8]),
        "in windows 6, 8 and layers 2, 7, 8: layer 2 of window 8 has 0, the median layer 32,768;",
    ),
    cumulative: (
        ("cumulative", range(26), []),
        "26 windows, which grow from 786,432 to 2.04472e+07;",
    ),
    read_twice: (("identical windows", [11], []), "every count of window 11 is that of the window"),
    small: (
        ("small windows", [13], []),
        "window 13 of 26: a load of 5,242.88, the median is 786,432",
    ),
}


@pytest.mark.parametrize("fault", FAULTS, ids=lambda x: x.__name__)
def test_faults_are_found_and_nothing_else(fault):
    (kind, windows, layers), message = FAULTS[fault]
    found = inspect_loads(changed(fault), topology=8)
    assert [x.kind for x in found] == [kind]
    assert found[0].windows == tuple(windows)
    assert found[0].layers == tuple(layers)
    assert message in found[0].message
    named = inspect_loads(changed(fault), topology=8, layers=range(3, 27))
    assert named[0].layers == tuple(x + 3 for x in layers)


def test_a_lost_gpu():
    found = {x.kind: x for x in inspect_loads(changed(lost_gpu))}
    assert "experts 4 to 7 of 32" in found["unused experts"].message
    # Its share differs from layer to layer, and so do the totals.
    assert set(found) == {"unused experts", "layer totals"}
    # Unused in some layers only: no sign of anything.
    some = changed(lambda x: x.__setitem__((slice(None), slice(0, 24, 2), 4), 0))
    assert "unused experts" not in [x.kind for x in inspect_loads(some)]


def test_one_gpu_of_an_unknown_number_and_of_a_plan():
    # Without a topology, the smallest block in order: 4 of 32.
    [found] = inspect_loads(changed(one_gpu))
    assert "GPU 3 of 8" in found.message
    plan = eplb_jax.plan(TRACE.sum(axis=0), TOPOLOGY, strategy="greedy")
    counts = np.zeros_like(TRACE)
    for layer, slots in enumerate(np.asarray(plan.phy2log)):
        for expert in slots[10:15]:
            counts[:, layer, expert] = TRACE[:, layer, expert] // list(slots).count(expert)
    for placement in (plan, plan.phy2log):
        kinds = {x.kind: x for x in inspect_loads(counts, TOPOLOGY, placement)}
        assert "on the experts of GPU 2 of 8" in kinds["one GPU"].message
    assert "one GPU" not in [x.kind for x in inspect_loads(counts, TOPOLOGY)]
    # The first plan of a topology: slots 5 to 9 are experts 5 to 9.
    first = changed(lambda x: x.__setitem__((..., np.r_[:5, 10:32]), 0))
    kinds = {x.kind: x for x in inspect_loads(first, TOPOLOGY)}
    assert "GPU 1 of 8" in kinds["one GPU"].message
    # GPUs that hold all experts have all of the load.
    assert inspect_loads(TRACE, Topology(2, slots=32)) == ()


def test_how_many_windows_it_takes():
    counters = changed(cumulative)
    assert [x.kind for x in inspect_loads(counters[:4])] == ["cumulative"]
    assert inspect_loads(counters[:3]) == ()
    two = changed(read_twice)[10:12]
    assert [x.kind for x in inspect_loads(two)] == ["identical windows"]
    assert [x.kind for x in inspect_loads(np.ones((3, 8)))] == ["equal counts"]
    assert [x.kind for x in inspect_loads(np.zeros((3, 8)))] == ["no load"]
    assert inspect_loads([5, 1, 3, 3]) == ()
    assert inspect_loads([[7]]) == ()


def test_arguments_must_fit():
    with pytest.raises(ValueError, match="load at window 0, layer 1, expert 2 is nan"):
        inspect_loads(changed(lambda x: x.__setitem__((0, 1, 2), np.nan)))
    with pytest.raises(ValueError, match="placement needs a topology"):
        inspect_loads(TRACE, placement=[[0]])
    with pytest.raises(ValueError, match=r"\(1, 40\), but load has 24 layers"):
        inspect_loads(TRACE, TOPOLOGY, np.arange(40)[None] % 32)
    with pytest.raises(ValueError, match="topology has 16 slots for 32 experts"):
        inspect_loads(TRACE, Topology(8, slots=2))
    with pytest.raises(ValueError, match="topology=0 is less than 1"):
        inspect_loads(TRACE, 0)
