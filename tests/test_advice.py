"""What is advised for traffic whose answer is known, and the command."""

import json

import numpy as np
import pytest

import eplb_jax
from eplb_jax import Cost, Topology
from tests.test_cli_plans import error, run

SIZES = np.array([900, 500, 100, 100, 100, 100, 100, 100])
TOPOLOGY = Topology(2, slots=5)


def traffic(sizes, windows=12, seed=0):
    return np.random.default_rng(seed).poisson(sizes, (windows, 2, len(sizes)))


def named(advice):
    return {x.question: x.choices[x.chosen].name for x in advice.answers}


def test_steady_traffic_wants_one_plan():
    advice = eplb_jax.advise(traffic(SIZES), TOPOLOGY)
    assert advice.rebalance
    assert advice.windows == 9
    assert named(advice)["windows from plan to plan"] == "only one plan"
    slots = advice.answers[0].choices
    assert [x.name for x in slots] == ["4 (0 spare in a layer)", "5 (2 spare in a layer)"]
    mean, alone = 1 / 2, (900 + 500 + 200) / 2000
    assert slots[1].time == pytest.approx(mean / alone, rel=0.03)
    assert advice.time == pytest.approx(advice.answers[-1].choices[0].time)


def test_equal_loads_want_no_balancer():
    cost = Cost(1, 300, tokens_per_step=64)
    advice = eplb_jax.advise(traffic(np.full(8, 100)), Topology(2, slots=4), cost=cost)
    assert not advice.rebalance
    assert [x.question for x in advice.answers][:2] == ["slots of a GPU", "past windows"]


def test_where_reads_cost_no_spares_are_advised():
    reads = Cost(0, 1, tokens_per_step=64)
    advice = eplb_jax.advise(traffic(SIZES), TOPOLOGY, cost=reads)
    assert named(advice)["slots of a GPU"].startswith("4 ")


def test_errors():
    with pytest.raises(ValueError, match="3 windows; advice needs at least 4"):
        eplb_jax.advise(traffic(SIZES, 3), TOPOLOGY)
    with pytest.raises(ValueError, match="slots=3 is less than 4"):
        eplb_jax.advise(traffic(SIZES), TOPOLOGY, slots=[3])


def test_the_command(tmp_path, monkeypatch):
    """By a cost; and by measured seconds that do not follow the load, which needs no replay."""
    monkeypatch.chdir(tmp_path)
    trace = traffic(SIZES, 24)
    np.save("trace.npy", trace)
    cost = ("--seconds-per-active-expert", 1e-3, "--seconds-per-token", 1e-6)
    told = run("advise", "trace.npy", "--gpus", 2, "--slots", "4-5", *cost, "--json", "-")
    content = json.loads(told.stdout)
    assert told.stderr.splitlines()[-1].startswith("plan once: 0.")
    assert content["rebalance"]
    assert content["windows"] == 18
    assert [x["name"][0] for x in content["answers"][0]["choices"]] == ["4", "5"]

    run("plan", "trace.npy", "--replicas", 10, "--gpus", 2, "-o", "plan.json")
    rng = np.random.default_rng(0)
    np.savetxt("seconds.txt", 80 * (1 + rng.normal(0, 5e-4, 24)))
    told = run(
        *("advise", "trace.npy", "--gpus", 2, "--seconds", "seconds.txt"),
        *("--previous", "plan.json"),
    )
    assert told.stdout.startswith("do not rebalance: measured time")
    assert "together" in error("advise", "trace.npy", "--gpus", 2, "--seconds", "seconds.txt")
