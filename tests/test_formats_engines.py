"""What vLLM, TensorRT-LLM, vllm-ascend, MindIE and verl write, and what they read."""

import json

import numpy as np
import pytest
import torch
import yaml
from safetensors.numpy import save_file

from eplb_jax import Topology, formats
from eplb_jax.formats import PlanFile
from eplb_jax.formats.vllm import read_log

RNG = np.random.default_rng(0)
MAP = np.array([[0, 1, 2, 0], [2, 0, 1, 1]])  # 2 layers, 2 GPUs of 2 slots, 3 experts
PLAN = PlanFile(MAP, (3, 7), 3, Topology(2, slots=2))


def lines(path, *records):
    path.write_text("\n".join(json.dumps(x) for x in records))


def stats(load, p2l_map, step=7):
    record = {"record_type": "eplb_load_stats", "version": 1, "step": step, "num_ranks": 2}
    record |= {"num_layers": 2, "expert_load": load, "p2l_map": p2l_map}
    return record | {"tokens": [[5, 3], [2, 6]]}


def test_vllm_statistics_are_read_through_the_map_of_each_record(tmp_path):
    other = MAP[:, ::-1]
    loads = RNG.integers(0, 50, (2, 2, 4))
    path = tmp_path / "stats.jsonl"
    first = {"record_type": "eplb_load_meta", "num_redundant_experts": 1}
    both = (stats(loads[0].tolist(), MAP.tolist()), stats(loads[1].tolist(), other.tolist(), 8))
    lines(path, first, {"record_type": "session_metadata"}, *both)
    found = formats.read(path)
    expected = np.zeros((2, 2, 3), int)
    for window, phy2log in enumerate((MAP, other)):
        for layer in range(2):
            np.add.at(expected[window, layer], phy2log[layer], loads[window, layer])
    np.testing.assert_array_equal(found.load, expected)
    np.testing.assert_array_equal(found.phy2log, other)
    assert (found.num_gpus, found.format) == (2, "vllm")
    plan = formats.read_plan(path)
    np.testing.assert_array_equal(plan.phy2log, other)
    assert plan.topology == Topology(2, slots=2)


def test_vllm_mapping(tmp_path):
    path = tmp_path / "mapping.jsonl"
    path.write_bytes(formats.write_plan(PLAN, "vllm"))
    (record,) = (json.loads(x) for x in path.read_text().splitlines())
    assert record == {
        "record_type": "eplb_initial_mapping",
        "version": 1,
        "num_redundant_experts": 1,
        "num_slots": 4,
        "initial_global_assignments": {"3": [0, 1, 2, 0], "7": [2, 0, 1, 1]},
    }
    found = formats.read_plan(path)
    np.testing.assert_array_equal(found.phy2log, MAP)
    assert (found.layers, found.num_experts) == ((3, 7), 3)
    with pytest.raises(ValueError, match="no record of type eplb_load_stats"):
        formats.read(path)


def test_vllm_lists_and_models(tmp_path):
    path = tmp_path / "map.json"
    path.write_bytes(formats.write_plan(PLAN, "vllm-map"))
    assert json.loads(path.read_text()) == MAP.tolist()
    np.testing.assert_array_equal(formats.read_plan(path).phy2log, MAP)
    path.write_text("[0, 1, 2, 0]")
    found = formats.read_plan(path)
    np.testing.assert_array_equal(found.phy2log, MAP[:1])
    assert found.notes == ("one map, for all layers",)
    models = {"HYV4ForCausalLM": {"physical_to_logical_map": MAP.tolist()}}
    path.write_text(json.dumps({"version": 2, "model_maps": models}))
    np.testing.assert_array_equal(formats.read_plan(path).phy2log, MAP)
    path.write_text(json.dumps({"version": 2, "model_maps": models | {"HYV4MTP": {}}}))
    with pytest.raises(ValueError, match="maps of 2 models: HYV4ForCausalLM, HYV4MTP; keep one"):
        formats.read_plan(path)


def test_vllm_expert_map_of_local_slots(tmp_path):
    local = np.full((2, 2, 3), -1, np.int32)
    for layer in range(2):
        for slot, expert in enumerate(MAP[layer]):
            local[layer, slot // 2, expert] = slot % 2
    torch.save(torch.from_numpy(local[:1]), tmp_path / "expert_map.pth")
    found = formats.read_plan(tmp_path / "expert_map.pth")
    np.testing.assert_array_equal(found.phy2log, MAP[:1])
    assert found.topology == Topology(2, slots=2)


def test_vllm_log_lines_are_no_loads(tmp_path):
    text = "".join(
        f"INFO 11-27 EPLB step: {step} for model m: avg_tokens=812.00, max_tokens={most}, "
        f"balancedness={812 / most:.4f}, steps until the next rearrangement: 88\nother line\n"
        for step, most in ((12, 900), (13, 1000))
    )
    found = read_log(text)
    assert (found.model, found.step.tolist(), found.most.tolist()) == (
        *(("m", "m"), [12, 13], [900, 1000]),
    )
    np.testing.assert_allclose(found.balancedness, found.mean / found.most, atol=1e-4)
    path = tmp_path / "server.log"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"2 lines of a log, mean balancedness 0\.8571; they do"):
        formats.read(path)


def test_tensorrt_statistics(tmp_path):
    counts = RNG.integers(0, 90, (2, 3, 2, 4)).astype(np.int32)  # rank, iteration, layer, expert
    (tmp_path / "meta_info.json").write_text('{"num_experts": 4, "num_experts_per_token": 2}')
    for rank in range(2):
        named = {
            f"{98 + i}_{layer}": counts[rank, i, j]
            for i in range(3)
            for j, layer in enumerate((3, 10))
        }
        save_file(named, tmp_path / f"rank{rank}.safetensors")
        other = np.zeros((4, 4), np.int32)
        save_file({"98_3": other}, tmp_path / f"cooccurrence_rank{rank}.safetensors")
        save_file({"98_3": other}, tmp_path / f"token_selected_experts_rank{rank}.safetensors")
    found = formats.read(tmp_path)
    np.testing.assert_array_equal(found.load, counts.sum(axis=0))  # 98, 99, 100: not as text
    assert (found.layers, found.notes) == ((3, 10), ())
    save_file({"98_3": counts[1, 0, 0]}, tmp_path / "rank1.safetensors")
    note = "5 counts of an iteration and layer are not in the files of all ranks"
    assert formats.read(tmp_path).notes == (note,)
    (tmp_path / "meta_info.json").write_text('{"num_experts": 5}')
    with pytest.raises(ValueError, match=r"counts of 4 experts, but meta_info\.json has"):
        formats.read(tmp_path)


def test_tensorrt_configuration(tmp_path):
    path = tmp_path / "moe.yaml"
    path.write_bytes(formats.write_plan(PLAN, "tensorrt-llm"))
    content = yaml.safe_load(path.read_text())
    assert content == {
        "num_slots": 4,
        "ep_size": 2,
        "layer_updates_per_iter": 0,
        "initial_global_assignments": {3: [0, 1, 2, 0], 7: [2, 0, 1, 1]},
    }
    found = formats.read_plan(path)
    np.testing.assert_array_equal(found.phy2log, MAP)
    assert (found.layers, found.topology) == ((3, 7), Topology(2, slots=2))
    path.write_text(path.read_text().replace("num_slots: 4", "num_slots: 6"))
    with pytest.raises(ValueError, match="num_slots is 6, but the map has"):
        formats.read_plan(path)


def load_of_ascend(path):
    """As vllm-ascend reads the file: devices by position, layers by index."""
    content = json.loads(path.read_text())
    rows = [[x["device_expert"] for x in row["device_list"]] for row in content["layer_list"]]
    assert content["moe_layer_count"] == len(rows)
    return np.array(rows), content["layer_list"]


def test_ascend_maps(tmp_path):
    path = tmp_path / "expert_map.json"
    path.write_bytes(formats.write_plan(PLAN, "ascend"))
    devices, rows = load_of_ascend(path)
    np.testing.assert_array_equal(devices, MAP.reshape(2, 2, 2))
    assert [x["layer_id"] for x in rows] == [0, 1]
    assert {x["device_count"] for x in rows} == {2}
    found = formats.read_plan(path)
    np.testing.assert_array_equal(found.phy2log, MAP)
    assert (found.topology, found.format) == (Topology(2, slots=2), "ascend")
    content = json.loads(path.read_text())
    devices = content["layer_list"][0]["device_list"]
    devices[0], devices[1] = devices[1], devices[0]  # the id does not count, but the position
    path.write_text(json.dumps(content))
    np.testing.assert_array_equal(formats.read_plan(path).phy2log[0], [2, 0, 0, 1])
    del content["layer_list"][0]["device_list"][1]
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match="read as ascend: devices hold"):
        formats.read_plan(path)
    dead = PLAN._replace(phy2log=np.array([[0, 1, 2, -1]]), layers=(0,))
    for name in ("ascend", "vllm", "vllm-map", "tensorrt-llm"):
        with pytest.raises(ValueError, match="some hold -1"):
            formats.write_plan(dead, name)


def test_mindie_counters_are_cumulative(tmp_path):
    layers, devices, slots = 2, 11, 2
    counts = RNG.integers(0, 90, (4, layers, devices, slots)).cumsum(axis=0)
    counts[3] = counts[2] * 0 + 5  # a restart
    for device in range(devices):
        rows = counts[:, :, device].reshape(-1, slots)
        text = "\n".join(",".join(map(str, row)) for row in rows)
        (tmp_path / f"decode_{device}.csv").write_text(text)
        (tmp_path / f"decode_topk_{device}.csv").write_text("1,2,3\n")
    with pytest.raises(ValueError, match=r"model_gen_config\.json with num_moe_layers must be in"):
        formats.read(tmp_path)
    config = tmp_path / "model_gen_config.json"
    config.write_text(json.dumps({"num_moe_layers": layers, "num_of_experts": devices * slots}))
    found = formats.read(tmp_path)
    wanted = counts.reshape(4, layers, -1)  # device 2 before device 10
    np.testing.assert_array_equal(found.load[:2], np.diff(wanted[:3], axis=0))
    np.testing.assert_array_equal(found.load[2], wanted[3])
    assert found.phases == ("decode",) * 3
    assert found.notes == ("1 windows of decode begin at a reset of the counters",)
    config.write_text(json.dumps({"num_moe_layers": layers, "num_of_experts": 20}))
    with pytest.raises(ValueError, match="11 devices of 2 slots for 20 experts: which expert"):
        formats.read(tmp_path)
    phy2log = np.array([RNG.permutation([*range(20), 0, 1]) for _ in range(layers)])
    plan = PlanFile(phy2log, (0, 1), 20, Topology(devices, slots=slots))
    (tmp_path / "map.json").write_bytes(formats.write_plan(plan, "ascend"))
    named = {"num_moe_layers": layers, "eplb_expert_map_file": "/home/x/map.json"}
    config.write_text(json.dumps(named))
    found = formats.read(tmp_path)
    assert found.load.shape == (3, layers, 20)
    first = np.diff(wanted, axis=0)[0, 0]
    np.testing.assert_array_equal(found.load[0, 0], np.bincount(phy2log[0], first))


def test_verl(tmp_path):
    path = tmp_path / "load.json"
    history = [{"0": {"0": 1, "1": 2}}, {"0": {"1": 3}, "1": {"2": 4}}]
    content = {"metadata": {"steps": [1, 2]}, "num_experts": 4, "sample_count": 2}
    path.write_text(json.dumps(content | {"history_loads": history, "aggregated_load": {}}))
    found = formats.read(path)
    expected = [[[1, 2, 0, 0], [0, 0, 0, 0]], [[0, 3, 0, 0], [0, 0, 4, 0]]]
    np.testing.assert_array_equal(found.load, expected)
    plan = PlanFile(np.array([[0, 3, 1, 2]]), (5,), 4, Topology(2, slots=2))
    path.write_bytes(formats.write_plan(plan, "verl"))
    content = json.loads(path.read_text())
    assert content == {
        "strategy_version": 1,
        "moe_layer_count": 1,
        "layer_list": [
            {
                "layer_id": 5,
                "device_list": [
                    {"device_id": 0, "device_expert": [0, 3]},
                    {"device_id": 1, "device_expert": [1, 2]},
                ],
            }
        ],
    }
    found = formats.read_plan(path)
    np.testing.assert_array_equal(found.phy2log, plan.phy2log)
    assert (found.layers, found.format) == ((5,), "verl")
    with pytest.raises(ValueError, match="verl places every expert once, but the plan has 4 slots"):
        formats.write_plan(PLAN, "verl")


def test_adrs_lightllm_and_lmdeploy(tmp_path):
    load = RNG.integers(100, 900, (3, 2, 6)).tolist()
    path = tmp_path / "expert-load.json"
    path.write_text(json.dumps({"load_history": [{"logical_expert_load": x} for x in load]}))
    np.testing.assert_array_equal(formats.read(path).load, load)
    path.write_text(json.dumps(load[0]))  # LMDeploy's statistics
    np.testing.assert_array_equal(formats.read(path).load, load[:1])
    path.write_text(json.dumps({"redundancy_expert_num": 1, "default": [0], "3": [226]}))
    with pytest.raises(ValueError, match="experts that every GPU holds beside its own"):
        formats.read_plan(path)
