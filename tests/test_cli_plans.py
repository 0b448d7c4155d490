"""Commands that read plans: `plan --previous`, `moves`, `decide`, `balance`, `convert`."""

import json

import numpy as np
import pytest
from typer.testing import CliRunner

import eplb_jax
from eplb_jax import Topology, cli, formats
from eplb_jax.formats import PlanFile

LAYERS, EXPERTS, TOPOLOGY = (2, 3, 5), 12, Topology(4, slots=4, num_nodes=2)
RNG = np.random.default_rng(0)
LOAD = RNG.multinomial(9000, RNG.dirichlet(np.ones(EXPERTS), 3), (4, 3)).astype(float)


def run(*arguments):
    result = CliRunner().invoke(cli.main, [*map(str, arguments)])
    assert result.exit_code == 0, result.stderr
    return result


def error(*arguments):
    result = CliRunner().invoke(cli.main, [*map(str, arguments)])
    assert result.exit_code == 2, result.output
    assert result.stderr.splitlines()[-1].startswith("eplb-jax: error: ")
    return result.stderr


@pytest.fixture(scope="module")
def old():
    return eplb_jax.plan(LOAD[0], TOPOLOGY, strategy="greedy", policy="global")


@pytest.fixture
def files(tmp_path, monkeypatch, old):
    """load.npz with layer numbers, and old.json, a plan for its first window."""
    monkeypatch.chdir(tmp_path)
    np.savez("load.npz", load=LOAD, layers=LAYERS)
    write("old.json", np.asarray(old.phy2log))
    return tmp_path


def write(name, phy2log, layers=LAYERS):
    with open(name, "wb") as file:
        plan = PlanFile(phy2log, layers, EXPERTS, TOPOLOGY)
        file.write(formats.write_plan(plan, "eplb-jax"))


def test_the_next_plan_starts_from_the_one_in_place(files, old):
    options = ["--max-moves", 2, "--strategy", "fast", "-o", "new.json"]
    run("plan", "load.npz", "--previous", "old.json", *options)
    new = formats.read_plan("new.json")
    limits = {"previous": old, "max_moves": 2}
    expected = eplb_jax.plan(LOAD, TOPOLOGY, policy="global", strategy="fast", **limits)
    np.testing.assert_array_equal(new.phy2log, expected.phy2log)
    assert (new.layers, new.topology) == (LAYERS, TOPOLOGY)
    result = run("moves", "old.json", "new.json", "--bytes-per-expert", 10, "--json", "-")
    told = json.loads(result.stdout)
    transfers = eplb_jax.moves(old, new.phy2log, TOPOLOGY)
    assert told["received_bytes"] == (10 * transfers.received.sum(axis=0)).tolist()
    assert told["sent_bytes"] == (10 * transfers.sent.sum(axis=0)).tolist()
    weights = np.asarray(old.phy2log).copy()
    for move in told["moves"]:  # what an engine does with the list
        layer = LAYERS.index(move["layer"])
        assert old.phy2log[layer, move["from_slot"]] == move["expert"]
        weights[layer, move["slot"]] = move["expert"]
    np.testing.assert_array_equal(weights, new.phy2log)
    assert f"{len(told['moves']) / 48:.1%} of 48 slots change" in result.stderr
    listed = run("moves", "old.json", "new.json", "--list").stdout.splitlines()
    assert len(listed[listed.index("layer,slot,expert,from_slot,reach") :]) == 1 + len(
        told["moves"]
    )


def test_dead_gpus_and_layers_that_only_one_side_has(files, old):
    write("old.json", np.asarray(old.phy2log)[:2], LAYERS[:2])
    options = ["--strategy", "fast", "-o", "new.json"]
    result = run("plan", "load.npz", "--previous", "old.json", "--active", "0,2-3", *options)
    new = formats.read_plan("new.json")
    assert new.layers == LAYERS
    assert np.all(new.phy2log[:, 4:8] == -1)
    assert all(set(range(EXPERTS)) <= set(x) for x in new.phy2log)
    assert "no plan for the layers 5 of the loads" in result.stderr
    told = json.loads(
        run("moves", "old.json", "new.json", "--active", "0,2,3", "--json", "-").stdout
    )
    assert told["layers"] == [2, 3]
    for move in told["moves"]:
        assert not 4 <= move["from_slot"] < 8
        assert (move["reach"] == "storage") == (move["from_slot"] == -1)
    # A layer of which nothing was seen keeps its plan.
    np.savez("load.npz", load=LOAD[:, 1:], layers=LAYERS[1:])
    write("old.json", np.asarray(old.phy2log))
    run("plan", "load.npz", "--previous", "old.json", *options)
    new = formats.read_plan("new.json")
    assert new.layers == LAYERS
    np.testing.assert_array_equal(new.phy2log[0], old.phy2log[0])


def test_decide_judges_as_the_function_does(files, old):
    new = eplb_jax.plan(LOAD, TOPOLOGY, policy="global", strategy="greedy")
    write("new.json", np.asarray(new.phy2log))
    costs = {"bytes_per_expert": 1000, "bandwidth": 1e6, "seconds_per_token": 1e-3, "serves": 10}
    options = [x for k, v in costs.items() for x in (f"--{k.replace('_', '-')}", v)]
    told = run("decide", "load.npz", "old.json", "new.json", *options, "--json", "-")
    answer = eplb_jax.decide(LOAD, old, new, TOPOLOGY, **costs)
    content = json.loads(told.stdout)
    assert content["action"] == answer.action
    assert told.stderr.startswith(f"{answer.action}: ")
    assert content["gain"] == pytest.approx(answer.gain)
    assert content["cost"] == pytest.approx(answer.cost)
    assert content["order"] == [LAYERS[x] for x in answer.order]


def test_decide_by_measured_seconds_and_by_a_cost(files, old):
    new = eplb_jax.plan(LOAD, TOPOLOGY, policy="global", strategy="greedy")
    write("new.json", np.asarray(new.phy2log))
    costs = {"bytes_per_expert": 1000, "bandwidth": 1e6, "serves": 10}
    options = [x for k, v in costs.items() for x in (f"--{k.replace('_', '-')}", v)]
    command = ["decide", "load.npz", "old.json", "new.json", *options, "--json", "-"]
    with open("seconds.txt", "w") as file:
        file.write("0.5\n0.5\n0.5\n0.5\n")
    told = run(*command, "--seconds", "seconds.txt")
    assert told.stderr.startswith("keep: measured time does not follow the load")
    assert json.loads(told.stdout)["gain"] == 0
    units = {"tile": 8, "tokens_per_step": 120}
    tiles = [x for k, v in units.items() for x in (f"--{k.replace('_', '-')}", v)]
    told = run(*command, "--seconds-per-active-expert", 1e-3, *tiles)
    cost = eplb_jax.Cost(0, 1e-3, **units)
    answer = eplb_jax.decide(LOAD, old, new, TOPOLOGY, cost=cost, **costs)
    assert json.loads(told.stdout)["gain"] == pytest.approx(answer.gain)
    assert "give either --seconds, or" in error(*command)
    np.savez("seconds.npz", seconds=np.ones(4))
    assert "seconds.npz holds npz" in error(*command, "--seconds", "seconds.npz")


def test_balance_of_a_plan_and_without(files, old):
    told = run("balance", "load.npz", "--plan", "old.json", "--top", 2, "--json", "-")
    content = json.loads(told.stdout)
    balance = eplb_jax.metrics.balance(LOAD, old, TOPOLOGY)
    by_layer = np.asarray(balance.imbalance).mean(axis=0)
    np.testing.assert_allclose(content["imbalance"], by_layer, rtol=1e-6)
    np.testing.assert_allclose(content["gpu_load"], np.mean(balance.gpu_load, axis=0), rtol=1e-6)
    assert content["balancedness"] == pytest.approx(float(balance.mean_balancedness))
    most = np.asarray(balance.gpu_load).argmax(axis=2)
    np.testing.assert_allclose(content["most_loaded"], np.bincount(most.ravel(), minlength=4) / 12)
    share = LOAD.sum(axis=0) / LOAD.sum(axis=(0, 2))[:, None]
    layer, expert = np.unravel_index(share.argmax(), share.shape)
    assert content["hottest_experts"][0]["layer"] == LAYERS[layer]
    assert content["hottest_experts"][0]["expert"] == expert
    assert len(content["hottest_experts"]) == 2
    assert f"│ {LAYERS[by_layer.argmax()]} " in told.stderr
    none = json.loads(run("balance", "load.npz", "--gpus", 4, "--json", "-").stdout)
    gpus = LOAD.reshape(4, 3, 4, 3).sum(axis=3)
    np.testing.assert_allclose(none["imbalance"], (gpus.max(2) / gpus.mean(2) - 1).mean(0), 1e-5)


def test_balance_under_the_map_that_a_recording_holds(files, old):
    np.savez("run.npz", logical_count=LOAD, physical_to_logical_map=old.phy2log)
    content = json.loads(run("balance", "run.npz", "--gpus", 4, "--json", "-").stdout)
    balance = eplb_jax.metrics.balance(LOAD, old, TOPOLOGY)
    by_layer = np.asarray(balance.imbalance).mean(axis=0)
    np.testing.assert_allclose(content["imbalance"], by_layer, rtol=1e-6)
    assert "run.npz does not say how many GPUs" in error("balance", "run.npz")


@pytest.mark.parametrize("name", ["copy.npz", "copy.csv"])
def test_loads_are_converted_with_their_layers(files, name):
    run("convert", "load.npz", "-o", name)
    found = formats.read(name)
    np.testing.assert_array_equal(found.load, LOAD)
    assert found.layers == LAYERS


def test_windows_are_merged_by_phase(files):
    phases = ["prefill", "decode", "decode", "prefill", "decode"]
    load = np.arange(5 * 2 * 4).reshape(5, 2, 4) + 1
    np.savez("passes.npz", load=load, phases=phases)
    run("convert", "passes.npz", "-o", "new.npz", "--merge", 2, "--layers", "8,4", "--experts", 6)
    found = formats.read("new.npz")
    merged = [load[0] + load[3], load[1] + load[2], load[4]]
    np.testing.assert_array_equal(found.load[..., :4], merged)
    assert found.load.shape == (3, 2, 6)
    assert (found.layers, found.phases) == ((8, 4), ("prefill", "decode", "decode"))
    message = error("convert", "passes.npz", "-o", "new.npz", "--layers", "3-6")
    assert "--layers=3-6 has 4 numbers for 2 layers" in message
    assert "use one of: .npz, .csv, .json, .yaml" in error("convert", "passes.npz", "-o", "new.txt")


def test_a_converted_plan_may_get_other_layers(files, old):
    run("convert", "old.json", "-o", "new.json", "--layers", "7-9", "--model-layers", 10)
    found = formats.read_plan("new.json")
    np.testing.assert_array_equal(found.phy2log, old.phy2log)
    assert (found.layers, found.num_layers) == ((7, 8, 9), 10)


def test_what_does_not_fit(files, old):
    small = PlanFile(np.arange(8).reshape(1, 8), (2,), 8, Topology(4, slots=2))
    (files / "small.json").write_bytes(formats.write_plan(small, "eplb-jax"))
    write("other.json", np.asarray(old.phy2log), (7, 8, 9))
    plan = ["plan", "load.npz", "--previous"]
    assert "small.json has 8 experts, but the loads have 12" in error(*plan, "small.json")
    message = error(*plan, "other.json")
    assert (
        "other.json has layers 7, 8, 9, and the loads have 2, 3, 5; eplb-jax convert --layers gives"
        in message
    )
    assert "for 4" in error(*plan, "old.json", "--gpus", 8)
    assert "old.json is read and would be over" in error(*plan, "old.json", "-o", "old.json")
    assert "load.npz, read as array: it holds loads, but no map" in error(*plan, "load.npz")
    assert "16 slots and small.json has 8" in error("moves", "old.json", "small.json")
    assert "holds a plan (eplb-jax" in error("balance", "old.json", "--gpus", 4)
    assert "give --plan, or --gpus" in error("balance", "load.npz")
