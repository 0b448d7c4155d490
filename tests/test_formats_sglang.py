"""What SGLang's recorder, sglang-jax and EasyDeL write, and what they read."""

import json

import numpy as np
import pytest
import torch

from eplb_jax import formats
from eplb_jax.formats import PlanFile

LAYERS, EXPERTS, DENSE = 5, 6, [0]
RNG = np.random.default_rng(0)
COUNT = RNG.integers(1, 90, (4, LAYERS, EXPERTS))
COUNT[:, DENSE] = 0
MAP = np.array([RNG.permutation([*range(EXPERTS), 0, 3]) for _ in range(LAYERS)])


def stat(path, rows):
    """As the recorder saves it: a circular buffer on the GPU, with the rank and a mean."""
    buffer = torch.from_numpy(rows.astype(np.int32))
    content = {"rank": 0, "logical_count": buffer, "average_utilization_rate_over_window": None}
    torch.save(content, path)


def test_a_buffer_that_is_not_full(tmp_path):
    path = tmp_path / "expert_distribution_recorder_17.5.pt"
    stat(path, np.concatenate([COUNT, np.zeros_like(COUNT)]))
    for source in (path, tmp_path):
        found = formats.read(source)
        np.testing.assert_array_equal(found.load, COUNT[:, 1:])
        assert (found.layers, found.num_layers) == ((1, 2, 3, 4), LAYERS)
        assert found.notes[0] == "4 rows at the end of the buffer were not written"
        assert found.notes[1] == "layers without load are left out, as dense layers have none: 0"


def test_a_buffer_that_may_be_rotated(tmp_path):
    path = tmp_path / "dump.pt"
    stat(path, np.roll(COUNT, 1, axis=0))
    found = formats.read(path)
    np.testing.assert_array_equal(found.load, np.roll(COUNT, 1, axis=0)[:, 1:])
    assert "the file does not say which is" in found.notes[0]
    stat(path, np.zeros_like(COUNT))
    with pytest.raises(ValueError, match="none of the 4 rows of the buffer was written"):
        formats.read(path)


def passes(folder, time="17.5", ranks=2, modes=None):
    """Dumps of per_token: every rank counts the tokens that it sent, in any order of passes."""
    slots = RNG.integers(0, 50, (ranks, 3, LAYERS, MAP.shape[1]))
    slots[:, :, DENSE] = 0
    for rank in range(ranks):
        records = [
            {
                "forward_pass_id": 7 + i,
                "rank": rank,
                "gatherer_key": "primary",
                "global_physical_count": torch.from_numpy(slots[rank, i]).int(),
                **({} if modes is None else {"forward_mode": modes[rank][i], "input_ids": [5, 6]}),
            }
            for i in (2, 0, 1)
        ]
        content = {"records": records, "last_physical_to_logical_map": torch.from_numpy(MAP)}
        torch.save(content, folder / f"expert_distribution_recorder_{time}_{rank}.pt")
    load = np.zeros((3, LAYERS, EXPERTS), int)
    for layer in range(LAYERS):
        for slot, expert in enumerate(MAP[layer]):
            load[:, layer, expert] += slots[:, :, layer, slot].sum(axis=0)
    return load[:, 1:]


def test_ranks_are_added_up_by_the_number_of_the_pass(tmp_path):
    load = passes(tmp_path, modes=[[1, 2, 2], [1, 2, 1]])
    found = formats.read(tmp_path)
    np.testing.assert_array_equal(found.load, load)
    np.testing.assert_array_equal(found.phy2log, MAP[1:])
    assert found.phases == ("prefill", "decode", "")
    assert "if experts were rebalanced while recording" in found.notes[1]
    plan = formats.read_plan(tmp_path)
    np.testing.assert_array_equal(plan.phy2log, MAP[1:])
    assert plan.layers == (1, 2, 3, 4)


def test_one_rank_or_two_times_in_a_folder(tmp_path):
    passes(tmp_path)
    one = tmp_path / "expert_distribution_recorder_17.5_1.pt"
    found = formats.read(one)
    assert "only rank 1 is counted" in found.notes[-1]
    assert found.phases == ()
    passes(tmp_path, time="18.25")
    with pytest.raises(ValueError, match=r"dumps of 2 times, 17\.5 to 18\.25; keep those of one"):
        formats.read(tmp_path)


@pytest.mark.parametrize("kind", ["json", "pt", "npy", "bare npy"])
def test_expert_locations(tmp_path, kind):
    content = {"physical_to_logical_map": MAP.tolist()}
    path = tmp_path / "location"
    if kind == "json":
        path.write_text(json.dumps(content))
    elif kind == "pt":
        torch.save({"physical_to_logical_map": torch.from_numpy(MAP)}, path)
    else:  # sglang-jax
        with path.open("wb") as file:
            np.save(file, MAP if kind == "bare npy" else np.array(content, object))
    found = formats.read_plan(path)
    np.testing.assert_array_equal(found.phy2log, MAP)
    assert (found.format, found.num_experts, found.num_layers) == ("sglang", EXPERTS, LAYERS)
    with pytest.raises(ValueError, match="map"):
        formats.read(path)


def initial_location(path):
    """As SGLang reads the file: what it holds is passed on by keywords, and every row is used."""

    def init_by_mapping(physical_to_logical_map):
        rows = torch.tensor(physical_to_logical_map)
        counts = [torch.bincount(row, minlength=EXPERTS) for row in rows]  # fails on -1
        assert all((count > 0).all() for count in counts)
        return rows

    return init_by_mapping(**json.loads(path.read_text()))


def test_a_written_location_has_a_row_for_every_layer_of_the_model(tmp_path):
    plan = PlanFile(MAP[1:4], (1, 2, 4), EXPERTS, None, 6)
    path = tmp_path / "location.json"
    path.write_bytes(formats.write_plan(plan, "sglang"))
    rows = initial_location(path).numpy()
    assert rows.shape == (6, 8)
    np.testing.assert_array_equal(rows[[1, 2, 4]], MAP[1:4])
    np.testing.assert_array_equal(rows[0], [0, 1, 2, 3, 4, 5, 0, 1])
    path.write_bytes(formats.write_plan(plan._replace(num_layers=None), "sglang"))
    assert len(initial_location(path)) == 5
    dead = plan._replace(phy2log=np.where(np.arange(8) == 7, -1, [*range(6), 0, 1])[None])
    with pytest.raises(ValueError, match="no slot may be empty"):
        formats.write_plan(dead._replace(layers=(1,)), "sglang")
    with pytest.raises(ValueError, match="layer 4 of a model of 4 layers"):
        formats.write_plan(plan._replace(num_layers=4), "sglang")


def test_counts_to_plan_from(tmp_path):
    np.savez_compressed(  # EasyDeL
        tmp_path / "run.npz", logical_count=COUNT, physical_to_logical_map=MAP
    )
    found = formats.read(tmp_path / "run.npz")
    np.testing.assert_array_equal(found.load, COUNT[:, 1:])
    np.testing.assert_array_equal(found.phy2log, MAP[1:])
    np.testing.assert_array_equal(formats.read_plan(tmp_path / "run.npz").phy2log, MAP)
    path = tmp_path / "counts.json"
    path.write_text(json.dumps({"logical_count": COUNT[0].tolist()}))
    np.testing.assert_array_equal(formats.read(path).load, COUNT[:1, 1:])
    path.write_text(json.dumps({"logical_count": COUNT[0, 1].tolist()}))  # sglang-jax
    np.testing.assert_array_equal(formats.read(path).load, COUNT[:1, 1:2])
    with pytest.raises(ValueError, match="logical_count, which SGLang plans from, and no map"):
        formats.read_plan(path)


@pytest.mark.parametrize("name", ["map.json", "map.npy", "map.csv"])
def test_a_map_is_not_planned_as_loads(tmp_path, name):
    path = tmp_path / name
    if name == "map.npy":
        np.save(path, MAP)
    else:
        rows = MAP.tolist()
        text = json.dumps(rows) if name == "map.json" else "\n".join(str(x)[1:-1] for x in rows)
        path.write_text(text)
    with pytest.raises(ValueError, match=r"map of experts 0 to 5|holds a map, not loads|may be"):
        formats.read(path)
    np.testing.assert_array_equal(
        formats.read(path, "table" if ".csv" in name else "array").load[0], MAP
    )
