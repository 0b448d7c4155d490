"""`eplb-jax plan` and `generate`, run in this process; and files that commands must not harm."""

import importlib
import json
import os
import threading

import numpy as np
import pytest
from typer.testing import CliRunner

import eplb_jax
from eplb_jax import Topology, cli, traces
from eplb_jax.files import write_whole

COUNTS = ["--replicas", "16", "--groups", "4", "--nodes", "2", "--gpus", "8"]


def invoke(*arguments):
    return CliRunner().invoke(cli.main, [*map(str, arguments)])


def run(*arguments):
    return invoke("plan", *arguments)


@pytest.fixture
def load(tmp_path):
    path = tmp_path / "load.npy"
    rng = np.random.default_rng(0)
    np.save(path, rng.multinomial(6000, rng.dirichlet(np.full(12, 3)), (2, 3)))
    return path


@pytest.mark.parametrize("total", [False, True])
def test_plan_prints_writes_and_draws(load, tmp_path, total):
    output, plot = tmp_path / "plan.json", tmp_path / "plan.png"
    options = ["--strategy", "greedy", *["--sum"] * total]
    result = run(load, *COUNTS, "-o", output, "--plot", plot, *options)
    assert result.exit_code == 0, result.output
    windows = ", mean over 2 windows" * (not total)
    assert f"3 layers x 12 experts{windows}\n" in without_spaces(result.stdout)
    assert "policy: hierarchical, as 2 nodes divide 4 groups\n" in result.stdout
    assert "planned in" in result.stdout
    written = json.loads(output.read_text())
    assert written["made"] == {
        "load": str(load),
        "num_replicas": 16,
        "num_groups": 4,
        "num_nodes": 2,
        "num_gpus": 8,
        "policy": "hierarchical",
        "strategy": "greedy",
        "seed": 0,
        "total": total,
        "eplb_jax": eplb_jax.__version__,
    }
    counts = np.load(load)
    counts = counts.sum(axis=0) if total else counts
    topology = Topology.of_replicas(16, 8, 2, 4)
    plan = eplb_jax.plan(counts, topology, strategy="greedy")
    found = eplb_jax.formats.read_plan(output)
    np.testing.assert_array_equal(found.phy2log, plan.phy2log)
    assert (found.topology, found.layers) == (topology, (0, 1, 2))
    assert written["logcnt"] == plan.logcnt.tolist()
    most = int(plan.logcnt.max())
    assert written["log2phy"] == plan.log2phy[:, :, :most].tolist()
    after = eplb_jax.metrics.balance(counts, plan, topology)
    assert written["balancedness"] == pytest.approx(float(after.mean_balancedness), abs=1e-6)
    assert f"{after.mean_balancedness:.4f}" in result.stdout
    by_layer = np.asarray(after.imbalance).reshape(-1, 3).mean(axis=0)
    assert f"{by_layer.argmax()}, {by_layer.max():.2%}" in result.stdout
    assert plot.read_bytes().startswith(b"\x89PNG")
    assert sorted(os.listdir(tmp_path)) == ["load.npy", "plan.json", "plan.png"]


def without_spaces(text):
    return "".join(line.rstrip() + "\n" for line in text.splitlines())


def test_windows_are_planned_for_or_their_sum(tmp_path):
    windows = np.random.default_rng(1).integers(1, 1000, (2, 4, 8))
    windows[1] *= 9
    path, output = tmp_path / "load.npy", tmp_path / "plan.json"
    np.save(path, windows)
    written = {}
    for options, load in ((), windows), (("--sum",), windows.sum(axis=0)):
        sizes = ["--replicas", 8, "--gpus", 2, "--strategy", "greedy_swap"]
        assert run(path, *sizes, "-o", output, *options).exit_code == 0
        written[options] = json.loads(output.read_text())["phy2log"]
        expected = eplb_jax.plan(load, Topology(2, slots=4), strategy="greedy_swap")
        assert written[options] == expected.phy2log.tolist()
    assert written[()] != written[("--sum",)]


def test_before_is_a_layout_without_replicas(tmp_path):
    path = tmp_path / "load.csv"
    for loads, balanced in ("4,0,2,2", "1.0000"), ("1,1,1,1,1", "0.8333"):
        path.write_text(loads)
        result = run(path, "--replicas", 6, "--gpus", 2, "--strategy", "greedy")
        (row,) = (x for x in result.stdout.splitlines() if "balancedness" in x)
        assert row.split("│")[2].strip() == balanced


def test_a_slower_second_call_is_no_negative_time(load, monkeypatch):
    seconds = iter([0, 1, 1, 4])  # the first call takes 1 s, the second 3 s
    monkeypatch.setattr("eplb_jax.evaluation.replay.perf_counter", lambda: next(seconds))
    result = run(load, *COUNTS, "--strategy", "greedy")
    assert "compiled in 0.00 s, planned in 3000.0 ms" in result.stdout


def test_layers_without_load_can_be_drawn(tmp_path):
    path = tmp_path / "load.csv"
    path.write_text("0,0,0,0\n1,2,3,4\n")
    plot = tmp_path / "plan.svg"
    result = run(path, "--replicas", 6, "--gpus", 2, "--strategy", "greedy", "--plot", plot)
    assert result.exit_code == 0, result.output
    assert "<svg" in plot.read_text()


def test_a_policy_that_was_asked_for_is_not_explained(load):
    result = run(load, *COUNTS, "--strategy", "greedy", "--policy", "global")
    assert result.exit_code == 0, result.output
    assert "policy:" not in result.stdout


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
        (["--replicas", 8, "--gpus", 8], "topology has 8 slots for 12 experts; nearest: slots=2"),
        (["--replicas", 16], "give --replicas and --gpus, or --previous, a plan in place"),
        (
            ["--replicas", 16, "--gpus", 8, "--nodes", 3],
            "num_nodes=3 does not divide num_gpus=8; nearest: 2, 4",
        ),
        ([*COUNTS, "--seed", 1 << 70], "--seed=1180591620717411303424 must be from 0 to 2^63 - 1"),
        ([*COUNTS, "--active", "0-8"], "--active has GPU 8; GPUs are numbered 0 to 7"),
        ([*COUNTS, "--active", "all"], "--active='all' is not a list of numbers such as 0-5,7"),
        ([*COUNTS, "--to", "torch"], "--to=torch cannot be written; choose one of: eplb-jax"),
        ([*COUNTS, "-o", "plan.png"], "plan.png: the suffix '.png' names no format of plans"),
        ([*COUNTS, "--plot", "plan.txt"], "plan.txt: unknown kind of picture; use one of: .png"),
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
    assert "layer 1, expert 1 is nan" in result.stderr


def test_debug_shows_where_an_error_comes_from(tmp_path):
    result = invoke("--debug", "plan", tmp_path / "none.npz", *COUNTS)
    assert isinstance(result.exception, ValueError)
    assert "none.npz: No such file" in str(result.exception)


def test_errors_of_the_library_itself_are_not_hidden(load, monkeypatch):
    def broken(*args, **kwargs):
        raise TypeError("a bug")

    module = importlib.import_module("eplb_jax.cli.plan")  # `cli.plan` is the function
    monkeypatch.setattr(module, "make_plan", broken)
    with pytest.raises(TypeError, match="a bug"):
        CliRunner().invoke(cli.main, ["plan", str(load), *COUNTS], catch_exceptions=False)


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "plan.json"
    path.write_text("old")

    def fail(file):
        file.write(b"half")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        write_whole(path, fail)
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["plan.json"]


@pytest.mark.parametrize("option", ["-o", "--json", "--plot"])
def test_an_input_is_not_overwritten(load, tmp_path, option):
    before = load.read_bytes()
    (tmp_path / "link.json").symlink_to(load)
    (tmp_path / "link.png").symlink_to(load)
    for path in (load, tmp_path / f"link.{'png' if option == '--plot' else 'json'}"):
        result = run(load, *COUNTS, option, path)
        assert result.exit_code == 2
        assert "is read and would be overwritten" in result.stderr
    assert load.read_bytes() == before


def test_links_and_pipes_stay_what_they_are(load, tmp_path):
    target, link, pipe = (tmp_path / name for name in ("target.json", "link.json", "pipe.json"))
    target.write_text("old")
    target.chmod(0o600)
    link.symlink_to(target.name)
    options = [*COUNTS, "--strategy", "greedy"]
    assert run(load, *options, "-o", link).exit_code == 0
    assert link.is_symlink()
    assert target.stat().st_mode & 0o777 == 0o600
    os.mkfifo(pipe)
    received = []
    reader = threading.Thread(target=lambda: received.append(pipe.read_text()))
    reader.start()
    assert run(load, *options, "-o", pipe).exit_code == 0
    reader.join(10)
    assert pipe.is_fifo()
    result = run(load, *options, "-o", "-")
    assert received == [result.stdout.rstrip("\n")] == [target.read_text()]
    assert "balancedness" in result.stderr
    assert not os.path.exists("-")


def test_a_bundled_load_by_its_name():
    result = run("gpt_oss_20b", "--replicas", 32, "--gpus", 32, "--strategy", "greedy")
    assert result.exit_code == 0, result.output
    assert "24 layers x 32 experts" in result.stdout


@pytest.mark.parametrize("name", ["trace.npz", "trace.npy"])
def test_generate_writes_a_trace(tmp_path, name):
    path = tmp_path / name
    sizes = ["--windows", 4, "--layers", 2, "--experts", 8, "--gpus", 4, "--tokens", 64]
    draws = ["--top-k", 2, "--skew", 0.5, "--change", 0.2, "--seed", 3]
    result = invoke("generate", "drift", "-o", path, *sizes, *draws)
    assert result.exit_code == 0, result.output
    load = eplb_jax.formats.read(path).load
    options = {"tokens": 64, "top_k": 2, "skew": 0.5, "change": 0.2, "num_gpus": 4, "seed": 3}
    np.testing.assert_array_equal(load, traces.generate("drift", 4, 2, 8, **options))
    gpus = load.reshape(4, 2, 4, 2).sum(axis=3)
    balanced = (gpus.mean(axis=2) / gpus.max(axis=2)).mean()
    assert "4 windows x 2 layers x 8 experts" in result.stdout
    assert result.stdout.endswith(f"4 GPUs: {balanced:.3f}\n")


@pytest.mark.parametrize(
    ("kind", "name", "message"),
    [
        ("drift", "trace.csv", "trace.csv: unknown kind of file; use one of: .npz, .npy"),
        ("wave", "trace.npy", "kind='wave' is not known; choose one of: stationary, drift"),
        ("large", "trace.npy", "25600.0 GB are wanted, and the machine has"),
    ],
)
def test_unusable_arguments_of_generate(tmp_path, kind, name, message):
    sizes = ["--windows", 4, "--layers", 2, "--experts", 8]
    if kind == "large":
        kind, sizes = "drift", ["--windows", 10**6, "--layers", 100, "--experts", 8000]
    result = invoke("generate", kind, "-o", tmp_path / name, *sizes)
    assert result.exit_code == 2
    assert message in result.stderr
    assert os.listdir(tmp_path) == []
