from importlib import resources

import numpy as np
import pytest

from eplb_jax import loads


def test_the_bundled_load():
    load = loads.example()
    assert load.shape == (2, 58, 256)
    assert load.dtype == np.int64
    # Every token is routed to 8 experts in every layer, so all layers hold the same total.
    totals = load.sum(axis=2)
    assert np.all(totals == totals[:, :1])
    assert np.all(totals % 8 == 0)
    skew = load.max(axis=2) / load.mean(axis=2)
    assert 5 < skew.mean() < 10


@pytest.mark.parametrize(
    ("name", "shape", "top_k", "total", "hottest", "last"),
    [  # Counted in the sources of the traces.
        ("deepseek_v3_0324", (2, 58, 256), 8, 1489753664, ((0, 25, 182), 1057755), 20432),
        ("deepseek_v2_lite", (32, 26, 64), 6, 5111808, ((24, 10, 4), 789), 162),
        ("gpt_oss_20b", (26, 24, 32), 4, 20447232, ((24, 23, 18), 7498), 6914),
        ("gpt_oss_20b_decode", (31, 24, 32), 4, 20258976, ((0, 10, 10), 8638), 2022),
    ],
)
def test_bundled_traces_are_their_sources(name, shape, top_k, total, hottest, last):
    load = loads.example(name)
    assert load.shape == shape
    assert load.dtype == np.int64
    assert load.sum() == total
    assert (np.unravel_index(load.argmax(), shape), load.max()) == hottest
    assert load[-1, -1, -1] == last
    totals = load.sum(axis=2, keepdims=True)
    assert np.all(totals == totals[:, :1])
    assert np.all(totals % top_k == 0)
    assert np.all(load <= totals // top_k)  # the experts of a token are distinct


def test_bundled_files_name_source_and_licence():
    for name in loads.EXAMPLES:
        path = resources.files("eplb_jax.evaluation").joinpath("data", f"{name}.npz")
        with path.open("rb") as file, np.load(file) as data:
            assert len(data["window"]) == len(data["load"])
            repository, commit = str(data["source"]).split(" @")
            assert repository in loads.example.__doc__
            assert commit in loads.example.__doc__
            assert str(data["licence"]) in ("MIT", "Apache-2.0")


def test_an_unknown_name():
    message = "name='gpt' is not known; choose one of: deepseek_v3_0324, deepseek_v2_lite, gpt_oss"
    with pytest.raises(ValueError, match=message):
        loads.example("gpt")
