import json
from importlib import resources

import numpy as np
import pytest

from eplb_jax import loads

LOAD = np.arange(6).reshape(2, 3)


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


@pytest.mark.parametrize("load", [LOAD, np.stack([LOAD, LOAD + 1])], ids=["[L, E]", "[T, L, E]"])
def test_every_kind_of_file(tmp_path, load):
    names = "load.npz", "other.npz", "load.npy", "list.json", "load.json"
    paths = {name: tmp_path / name for name in names}
    np.savez(paths["load.npz"], load=load, window=["a", "b"])
    np.savez(paths["other.npz"], counts=load)
    np.save(paths["load.npy"], load)
    paths["list.json"].write_text(json.dumps(load.tolist()))
    paths["load.json"].write_text(json.dumps({"model": "x", "load": load.tolist()}))
    for path in paths.values():
        np.testing.assert_array_equal(loads.read(path), load, err_msg=path.name)


def test_a_table_is_one_window(tmp_path):
    path = tmp_path / "load.csv"
    path.write_text("0,1,2\n3,4,5\n")
    np.testing.assert_array_equal(loads.read(str(path)), LOAD)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("load.txt", b"", "unknown kind of file; use one of: .npz, .npy, .json, .csv"),
        ("load.json", b"[[1, 2", "not a readable .json file of loads"),
        ("load.json", b"[[1, 2], [3]]", "not a readable .json file of loads"),
        ("load.json", b'{"weights": []}', "no 'load' among weights"),
        ("load.json", b'[["a"]]', "expected numbers of the shape"),
        ("load.json", b"[1, 2]", r"got int64 of the shape \(2,\)"),
        ("load.json", b"[]", r"of the shape \(0,\)"),
        ("load.json", b"\xff\xfe", "not a readable .json file"),
        ("load.csv", b"1,2\n3\n", "not a readable .csv file of loads"),
        ("load.csv", b"a,b\n1,2\n", "could not convert string to float: 'a'"),
        ("load.npy", b"nonsense", "not a readable .npy file of loads"),
        ("load.npz", b"PK\x03\x04 broken", "not a readable .npz file of loads"),
        ("load.npz", b"", "not a readable .npz file of loads"),
    ],
)
def test_unusable_files(tmp_path, name, content, message):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message) as caught:
        loads.read(path)
    assert str(path) in str(caught.value)


def test_missing_files_and_several_arrays(tmp_path):
    with pytest.raises(ValueError, match="No such file"):
        loads.read(tmp_path / "none.npy")
    np.savez(tmp_path / "load.npz", a=LOAD, b=LOAD)
    with pytest.raises(ValueError, match="no array is named 'load' among a, b"):
        loads.read(tmp_path / "load.npz")
