import json
import os

import numpy as np
import pytest
from typer.testing import CliRunner

import eplb_jax
from eplb_jax import cli

COUNTS = ["--replicas", "16", "--groups", "4", "--nodes", "2", "--gpus", "8"]


def run(*arguments):
    return CliRunner().invoke(cli.main, ["plan", *map(str, arguments)])


@pytest.fixture
def load(tmp_path):
    path = tmp_path / "load.npy"
    rng = np.random.default_rng(0)
    np.save(path, rng.integers(1, 1000, (2, 3, 12)))
    return path


def test_plan_prints_writes_and_draws(load, tmp_path):
    output, plot = tmp_path / "plan.json", tmp_path / "plan.png"
    result = run(load, *COUNTS, "-o", output, "--plot", plot, "--strategy", "greedy")
    assert result.exit_code == 0, result.output
    assert "3 layers x 12 experts" in result.stdout
    assert "planned in" in result.stdout
    written = json.loads(output.read_text())
    counts = np.load(load).sum(axis=0)
    plan = eplb_jax.rebalance_experts(counts, 16, 4, 2, 8, strategy="greedy")
    assert written["phy2log"] == plan.phy2log.tolist()
    assert written["logcnt"] == plan.logcnt.tolist()
    most = int(plan.logcnt.max())
    assert written["log2phy"] == plan.log2phy[:, :, :most].tolist()
    after = eplb_jax.metrics.balance(counts, plan, 8)
    assert written["balancedness"] == pytest.approx(float(after.mean_balancedness), abs=1e-6)
    assert f"{after.mean_balancedness:.4f}" in result.stdout
    assert plot.read_bytes().startswith(b"\x89PNG")
    assert sorted(os.listdir(tmp_path)) == ["load.npy", "plan.json", "plan.png"]


def test_before_is_a_layout_without_replicas():
    before = cli._unplanned(np.asarray([[4, 0, 2, 2]]), 2)
    assert before.gpu_load.tolist() == [[4, 4]]
    assert cli._unplanned(np.ones((1, 5)), 2).gpu_load.tolist() == [[3, 2]]


def test_layers_without_load_can_be_drawn(tmp_path):
    path = tmp_path / "load.csv"
    path.write_text("0,0,0,0\n1,2,3,4\n")
    plot = tmp_path / "plan.svg"
    result = run(path, "--replicas", 6, "--gpus", 2, "--plot", plot)
    assert result.exit_code == 0, result.output
    assert "<svg" in plot.read_text()


def test_the_seed_decides(load, tmp_path):
    plans = []
    for seed in (1, 1, 2):
        output = tmp_path / "plan.json"
        arguments = ["--replicas", 24, "--gpus", 4, "--strategy", "two_swap", "--seed", seed]
        assert run(load, *arguments, "-o", output).exit_code == 0
        plans.append(json.loads(output.read_text())["phy2log"])
    assert plans[0] == plans[1]
    assert plans[0] != plans[2]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--replicas", 17, "--gpus", 8],
            "num_replicas=17 is not a multiple of num_gpus=8; nearest: 16, 24",
        ),
        (["--replicas", 8, "--gpus", 8], "num_replicas=8 is less than 12; nearest: 16"),
        (
            [*COUNTS, "--strategy", "fastest"],
            "strategy='fastest' is not known; choose one of: auto, fast",
        ),
        ([*COUNTS, "--policy", "local"], "policy='local' is not known; choose one of"),
        ([*COUNTS, "-o", "/no/such/folder/plan.json"], "the folder /no/such/folder does not exist"),
    ],
)
def test_unusable_arguments(load, tmp_path, arguments, message):
    result = run(load, *arguments)
    assert result.exit_code == 2
    assert result.stderr.startswith("eplb-jax: error: ")
    assert message in result.stderr
    assert result.stderr.count("\n") == 1
    assert os.listdir(tmp_path) == ["load.npy"]


def test_unusable_load(tmp_path):
    result = run(tmp_path / "none.npz", *COUNTS)
    assert result.exit_code == 2
    assert "none.npz: No such file" in result.stderr
    bad = tmp_path / "bad.csv"
    bad.write_text("1,2,3,4\n1,nan,3,4\n")
    result = run(bad, "--replicas", 8, "--gpus", 2)
    assert result.exit_code == 2
    assert "at layer 1, expert 1 is nan" in result.stderr


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "plan.json"
    path.write_text("old")

    def fail(file):
        file.write(b"half")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        cli._write_whole(path, fail)
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["plan.json"]
