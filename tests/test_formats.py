"""Files of plain arrays and tables, plan files of this project, and files that are neither."""

import json
import os
import pickle
import struct
import zipfile

import numpy as np
import pytest

from eplb_jax import Topology, formats
from eplb_jax.formats import PlanFile

LOAD = np.arange(1, 7).reshape(2, 3)
PLAN = PlanFile(np.array([[0, 1, 2, 0], [2, 1, 0, 1]]), (3, 5), 3, Topology(2, slots=2), 7)


@pytest.mark.parametrize("load", [LOAD, np.stack([LOAD, LOAD + 1])], ids=["[L, E]", "[T, L, E]"])
def test_every_kind_of_array(tmp_path, load):
    names = "load.npz", "other.npz", "load.npy", "list.json", "load.json", "float16.npy"
    paths = {name: tmp_path / name for name in names}
    np.savez(paths["load.npz"], load=load, window=["a", "b"])
    np.savez(paths["other.npz"], counts=load)
    np.save(paths["load.npy"], load)
    np.save(paths["float16.npy"], load.astype(np.float16))
    paths["list.json"].write_text(json.dumps(load.tolist()))
    paths["load.json"].write_text(json.dumps({"model": "x", "load": load.tolist()}))
    for path in paths.values():
        found = formats.read(path)
        np.testing.assert_array_equal(found.load, np.atleast_3d(load).reshape(-1, 2, 3), path.name)
        assert found.load.dtype == (np.float64 if "float" in path.name else np.int64)
        assert (found.layers, found.format) == ((0, 1), "array")


@pytest.mark.parametrize(
    ("text", "expected", "layers"),
    [
        ("1,2,3\n4,5,6\n", [LOAD], (0, 1)),
        ("1;2;3\n4;5;6\n", [LOAD], (0, 1)),
        ("layer,e0,e1,e2\n7,4,5,6\n3,1,2,3\n", [LOAD[::-1]], (7, 3)),
        ("e0,e1,e2\n1,2,3\n4,5,6\n", [LOAD], (0, 1)),
        (
            "window,layer,e0,e1,e2\n1,0,1,2,3\n1,4,4,5,6\n0,0,0,0,0\n0,4,9,9,9\n",
            [[[0, 0, 0], [9, 9, 9]], LOAD],
            (0, 4),
        ),
    ],
)
def test_a_line_for_every_layer(tmp_path, text, expected, layers):
    path = tmp_path / "load.csv"
    path.write_text(text)
    found = formats.read(path)
    np.testing.assert_array_equal(found.load, expected)
    assert (found.layers, found.format) == (layers, "table")


@pytest.mark.parametrize("header", [True, False])
@pytest.mark.parametrize("windows", [1, 2])
def test_triples(tmp_path, header, windows):
    load = np.random.default_rng(0).integers(1, 99, (windows, 3, 8))
    rows = [(t, 4 + i, e, n) for (t, i, e), n in np.ndenumerate(load) if (i, e) != (1, 7)]
    names = "step,layer_id,expert_id,count"
    if windows == 1:
        rows, names = [row[1:] for row in rows], names[5:]
    path = tmp_path / "load.csv"
    lines = [names] * header + [",".join(map(str, row)) for row in rows]
    path.write_text("\n".join(lines))
    found = formats.read(path)
    load[:, 1, 7] = 0
    np.testing.assert_array_equal(found.load, load)
    assert (found.layers, found.format) == ((4, 5, 6), "triples")
    assert f"{windows} of {load.size} counts are not in the file" in found.notes[0]
    assert "expert 7 is the last one seen" in found.notes[1]


def test_three_columns_of_loads_are_no_triples(tmp_path):
    path = tmp_path / "load.csv"
    path.write_text("0,0,5\n0,0,6\n")
    np.testing.assert_array_equal(formats.read(path).load, [[[0, 0, 5], [0, 0, 6]]])
    path.write_text("layer,expert,count\n0,0,5\n0,0,6\n")
    with pytest.raises(ValueError, match="layer 0, expert 0 has several lines"):
        formats.read(path)


def test_a_plan_file_is_read_back_and_its_hash_checked(tmp_path):
    path = tmp_path / "plan.json"
    path.write_bytes(formats.write_plan(PLAN, "eplb-jax"))
    found = formats.read_plan(path)
    np.testing.assert_array_equal(found.phy2log, PLAN.phy2log)
    assert found[1:5] == PLAN[1:5]
    content = json.loads(path.read_text())
    for key, value, message in (
        ("phy2log", [[0, 1, 2, 0], [2, 1, 0, 2]], "hash does not fit"),
        ("layers", [3, 6], "hash does not fit"),
        ("version", 2, "version 2 is not known; this reads 1"),
    ):
        path.write_text(json.dumps(content | {key: value}))
        with pytest.raises(ValueError, match=message):
            formats.read_plan(path)
    with pytest.raises(ValueError, match=r"holds a plan .* not loads"):
        formats.read(path)
    del content["topology"]
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"plan\.json is not a file of eplb-jax"):
        formats.read_plan(path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"phy2log": np.array([[0, 1, 1, 0]] * 2)}, "layer 3 has no slot for expert 2"),
        ({"phy2log": np.array([[0, 1, 2, 3]] * 2)}, "names expert 3 of 3"),
        ({"layers": (3,)}, "1 layer numbers for 2 layers"),
        ({"topology": None}, "needs the topology"),
    ],
)
def test_plans_that_are_not_written(change, message):
    with pytest.raises(ValueError, match=message):
        formats.write_plan(PLAN._replace(**change), "eplb-jax")
    with pytest.raises(ValueError, match="format='array' cannot be written; choose one of: eplb-j"):
        formats.write_plan(PLAN, "array")


def npy(shape, dtype="<i8"):
    """A header that promises an array, and no data."""
    head = f"{{'descr': '{dtype}', 'fortran_order': False, 'shape': {shape}, }}".ljust(117) + "\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(head)) + head.encode()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("load.txt", b"", "is empty"),
        ("load.txt", b"no loads", "of no known format: text"),
        ("load.json", b"[[1, 2", "is not valid JSON"),
        ("load.json", b"[" * 10_000 + b"]" * 10_000, "nested too deeply"),
        ("load.json", b"[[1, 2], [3]]", "read as array: .*inhomogeneous"),
        ("load.json", b'{"weights": []}', "no known format: json with the keys weights"),
        ("load.json", b'[["a"]]', "expected numbers of the shape"),
        ("load.json", b"[1, 2]", r"got int64 of the shape \(2,\)"),
        ("load.json", b"[]", r"of the shape \(0,\)"),
        ("load.json", b"\xff\xfe", "neither text nor a file of arrays"),
        ("load.json", b"[[1, -2]]", "window 0, layer 0, expert 1 is -2; loads must be finite"),
        ("load.csv", b"1,2\n3\n", "its lines have 1 to 2 cells"),
        ("load.csv", b"a,b\n1,c\n", "could not convert string to float: 'c'"),
        ("load.csv", b"window,layer,e0\n0,0,1\n1,0,1\n1,1,1\n", "3 lines for 2 windows of 2 lay"),
        ("load.npy", b"\x93NUMPY nonsense", "cannot be read"),
        ("load.npy", npy((1 << 40, 1 << 10)), "promises 9007199254740992 bytes, but it has 128"),
        ("load.npz", b"PK\x03\x04 broken", "cannot be read: File is not a zip file"),
    ],
)
def test_unusable_files(tmp_path, name, content, message):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message) as caught:
        formats.read(path)
    assert str(path) in str(caught.value)


def test_archives_without_loads(tmp_path):
    path = tmp_path / "load.npz"
    np.savez(path, a=LOAD, b=LOAD)
    with pytest.raises(ValueError, match="no known format: npz with the keys a, b"):
        formats.read(path)
    with pytest.raises(ValueError, match="no array is named 'load' among a, b"):
        formats.read(path, "array")
    np.savez(path)
    with pytest.raises(ValueError, match="it holds no array"):
        formats.read(path)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("load.npy", npy((1 << 40, 1 << 10)))
    with pytest.raises(ValueError, match="load: its header promises"):
        formats.read(path)


def test_sums_that_would_wrap(tmp_path):
    path = tmp_path / "load.npy"
    np.save(path, np.full((3, 1, 2), 1 << 61))
    with pytest.raises(ValueError, match=r"add up to more than 2\^63 tokens"):
        formats.read(path)
    np.save(path, np.full((2, 1, 2), 60_000, np.float16))
    assert formats.read(path).load.sum() == 4 * 60_000


def test_objects_in_arrays_run_nothing(tmp_path):
    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "made"),)

    path = tmp_path / "load.npy"
    np.save(path, np.array(Evil(), object))
    with pytest.raises(ValueError, match="mkdir in a file of arrays"):
        formats.read(path)
    path.write_bytes(pickle.dumps(Evil()))
    with pytest.raises(ValueError, match="cannot be read"):
        formats.read(path)
    assert not (tmp_path / "made").exists()


def test_what_is_not_a_file(tmp_path):
    with pytest.raises(ValueError, match=r"none\.npy: No such file"):
        formats.read(tmp_path / "none.npy")
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    with pytest.raises(ValueError, match="pipe is not a regular file"):
        formats.read(pipe)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="no known format: a folder of 0 files"):
        formats.read(tmp_path / "empty")
    np.save(tmp_path / "load.npy", LOAD)
    with pytest.raises(ValueError, match="format='vlm' is not known; choose one of: eplb-jax"):
        formats.read(tmp_path / "load.npy", "vlm")
