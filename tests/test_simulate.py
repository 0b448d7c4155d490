"""`eplb-jax simulate` against loops over windows, layers and slots."""

import json
import os
from importlib.metadata import version

import numpy as np
import pytest
from typer.testing import CliRunner

import eplb_jax
from eplb_jax import Topology, cli

TOPOLOGY = Topology(4, slots=2)


@pytest.fixture
def trace(tmp_path):
    path = tmp_path / "trace.npy"
    np.save(path, np.random.default_rng(1).multinomial(3000, np.arange(1, 7) / 21, (7, 2)))
    return path


def simulate(trace, *arguments):
    options = ["--replicas", 8, "--gpus", 4, "--window", 3, "--memory", 0, "--strategy", "greedy"]
    options += arguments
    return CliRunner().invoke(cli.main, ["simulate", *map(str, [trace, *options])])


def imbalance_of(load, phy2log):
    """By loops: [layers]."""
    result = []
    for loads, slots in zip(load.tolist(), np.asarray(phy2log).tolist(), strict=True):
        per_slot = [loads[e] / slots.count(e) for e in slots]
        gpus = [per_slot[i] + per_slot[i + 1] for i in range(0, len(slots), 2)]
        result.append(max(gpus) / (sum(gpus) / len(gpus)) - 1)
    return result


def moved(old, new):
    """By loops: [layers]."""
    old, new = np.asarray(old).reshape(-1, 4, 2), np.asarray(new).reshape(-1, 4, 2)
    return [
        sum(e not in x for x, y in zip(*gpus, strict=True) for e in y)
        for gpus in zip(old, new, strict=True)
    ]


def replayed(load, every, plan_from):
    plans, imbalance, moves = [], [], []
    for t in range(3, len(load)):
        if (t - 3) % every == 0:
            plans.append(plan_from(load[t - 3 : t], plans[-1] if plans else None))
            if len(plans) > 1:
                moves.append(moved(plans[-2].phy2log, plans[-1].phy2log))
        imbalance.append(imbalance_of(load[t], plans[-1].phy2log))
    return np.array(imbalance), np.array(moves)


def kept(past, placed):
    return eplb_jax.plan(past, TOPOLOGY, strategy="greedy", previous=placed)


def anew(past, placed):
    return eplb_jax.plan(past, TOPOLOGY, strategy="greedy")


def deepseek(past, placed):
    return eplb_jax.plan(past[-1], TOPOLOGY, strategy="greedy")


def in_order(load):
    """Experts 0 1, 2, 3 4 and 5 on a GPU each."""
    gpus = np.stack([load[..., i:j].sum(axis=-1) for i, j in ((0, 2), (2, 3), (3, 5), (5, 6))])
    return gpus.max(axis=0) / gpus.mean(axis=0) - 1


@pytest.mark.parametrize(
    ("arguments", "every", "plan", "seed"),
    [
        ([], 1, kept, None),
        (["--no-keep"], 1, anew, None),
        (["--every", 2, "--shuffle", 5], 2, kept, 5),
    ],
)
def test_simulated_numbers(trace, tmp_path, arguments, every, plan, seed):
    path = tmp_path / "out.json"
    result = simulate(trace, *arguments, "--json", path)
    assert result.exit_code == 0, result.output
    assert result.stderr == ""
    load, order = np.load(trace), np.arange(7)
    if seed is not None:
        order = np.random.default_rng(seed).permutation(7)
        load = load[order]
    written = json.loads(path.read_text())
    assert written["windows"] == order[3:].tolist()
    assert written["shape"] == [7, 2, 6]
    assert written["versions"]["eplb-jax"] == version("eplb-jax")
    assert written["arguments"]["every"] == every
    assert written["arguments"]["shuffle"] == seed
    assert written["arguments"]["strategy"] == ["greedy"]
    assert "plot" not in written["arguments"]
    lines = [" ".join(line.split()) for line in result.stdout.splitlines()]
    expected = {
        "greedy": replayed(load, every, plan),
        "deepseek, last window": replayed(load, every, deepseek),
        "no balancer": (in_order(load[3:]), np.zeros((0, 2))),
    }
    assert [row["name"] for row in written["results"]] == list(expected)
    for row in written["results"]:
        imbalance, moves = expected[row["name"]]
        np.testing.assert_allclose(row["imbalance"], imbalance, atol=1e-6)
        tokens = load[3:].sum(axis=2)
        lost = (imbalance * tokens).sum() / tokens.sum()
        assert row["time_lost"] == pytest.approx(lost, rel=1e-5)
        assert row["imbalance_mean"] == pytest.approx(imbalance.mean(), rel=1e-5)
        assert row["imbalance_p95"] == pytest.approx(np.percentile(imbalance, 95), rel=1e-5)
        assert row["imbalance_worst"] == pytest.approx(imbalance.max(), rel=1e-5)
        shown = [
            f"{lost:.2%}",
            f"{imbalance.mean():.2%}",
            f"{np.percentile(imbalance, 95):.1%}",
            f"{imbalance.max():.1%}",
        ]
        if row["name"] == "no balancer":
            assert row["moves_mean"] is row["moves_share"] is row["plan_ms"] is None
        else:
            np.testing.assert_array_equal(row["moves"], moves)
            assert row["moves_mean"] == pytest.approx(moves.mean())
            assert row["moves_share"] == pytest.approx(moves.mean() / 8)
            assert row["plan_ms"] == pytest.approx(np.median(row["plan_seconds"]) * 1e3, abs=1e-3)
            assert len(row["plan_seconds"]) == -(-4 // every)
            shown += [f"{moves.mean() / 8:.1%}"]
            shown += [f"{row['plan_ms']:.1f}", f"{row['compile_s']:.1f}"]
        assert " ".join([row["name"], *shown]) in lines


def test_simulation_is_drawn_and_json_goes_to_stdout(trace, tmp_path):
    plot = tmp_path / "out.png"
    arguments = ["--strategy", "greedy_swap", "--plot", plot, "--json", "-", "--max-moves", 1]
    result = simulate(trace, *arguments)
    assert result.exit_code == 0, result.output
    results = json.loads(result.stdout)["results"]
    names = ["greedy", "greedy_swap", "deepseek, last window", "no balancer"]
    assert [row["name"] for row in results] == names
    assert all(name in result.stderr for name in names)
    for row in results[:2]:
        assert np.max(row["moves"]) <= 1
    assert plot.read_bytes().startswith(b"\x89PNG")
    assert sorted(os.listdir(tmp_path)) == ["out.png", "trace.npy"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--window", 7], "window=7 leaves nothing to measure in 7 windows; nearest: 6"),
        (["--gpus", 3], "num_replicas=8 is not a multiple of num_gpus=3; nearest: 6, 9"),
        (["--strategy", "fastest"], "strategy='fastest' is not known; choose one of"),
        (["--no-keep", "--max-moves", 3], "max_moves=3 needs keep=True"),
        (["--no-keep", "--move-penalty", 0.1], "move_penalty=0.1 needs keep=True"),
        (["--move-penalty", -1], "move_penalty=-1.0 must be finite and not negative"),
        (["--plot", "plot.doc"], "plot.doc: unknown kind of picture; use one of: .png, .svg"),
        (["--json", "/no/such/folder/out.json"], "the folder /no/such/folder does not exist"),
    ],
)
def test_unusable_arguments_of_simulate(trace, arguments, message):
    result = simulate(trace, *arguments)
    assert result.exit_code == 2
    assert result.stderr.startswith("eplb-jax: error: ")
    assert message in result.stderr
    assert result.stderr.count("\n") == 1


def test_what_more_slots_are_worth(trace):
    result = simulate(trace, "--spares", "3")
    assert result.exit_code == 0, result.output
    load, topology = np.load(trace), Topology(4, slots=3)
    (row,) = (x.split("│") for x in result.stdout.splitlines() if x.startswith("│"))
    assert [x.strip() for x in row[1:3]] == ["3", "6"]
    for cell, split in ((3, None), (4, "flexible")):
        (point,) = eplb_jax.spares_curve(load[:6], load[6:], topology, [3], split=split)
        assert row[cell].strip() == f"{point.imbalance:.2%}"


def test_a_load_without_windows_is_no_trace(tmp_path):
    path = tmp_path / "load.csv"
    path.write_text("1,2,3,4\n")
    result = simulate(path)
    assert result.exit_code == 2
    assert "load.csv has one window, of the shape (1, 4); a trace is [windows" in result.stderr
