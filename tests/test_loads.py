import json

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


@pytest.mark.parametrize("windows", [False, True])
@pytest.mark.parametrize("kind", ["npz", "npz, other name", "npy", "json", "json object", "csv"])
def test_every_kind_of_file(tmp_path, kind, windows):
    load = np.stack([LOAD, LOAD + 1]) if windows else LOAD
    path = tmp_path / f"load.{kind.split(',')[0].split()[0]}"
    if kind == "npz":
        np.savez(path, load=load, window=["a", "b"])
    elif kind == "npz, other name":
        np.savez(path, counts=load)
    elif kind == "npy":
        np.save(path, load)
    elif kind == "json":
        path.write_text(json.dumps(load.tolist()))
    elif kind == "json object":
        path.write_text(json.dumps({"model": "x", "load": load.tolist()}))
    elif windows:
        pytest.skip("a .csv file holds one window")
    else:
        path.write_text("0,1,2\n3,4,5\n")
    np.testing.assert_array_equal(loads.read(path), load)


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
