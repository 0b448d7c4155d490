import json
import os
from importlib.metadata import version

import numpy as np
import pytest
from typer.testing import CliRunner

import eplb_jax
from eplb_jax import cli, traces
from eplb_jax.cli.files import write_whole
from eplb_jax.cli.plan import _unplanned

COUNTS = ["--replicas", "16", "--groups", "4", "--nodes", "2", "--gpus", "8"]


def invoke(*arguments):
    return CliRunner().invoke(cli.main, [*map(str, arguments)])


def run(*arguments):
    return invoke("plan", *arguments)


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
    before = _unplanned(np.asarray([[4, 0, 2, 2]]), 2)
    assert before.gpu_load.tolist() == [[4, 4]]
    assert _unplanned(np.ones((1, 5)), 2).gpu_load.tolist() == [[3, 2]]


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
        write_whole(path, fail)
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["plan.json"]


def test_a_bundled_load_by_its_name():
    result = run("gpt_oss_20b", "--replicas", 32, "--gpus", 32, "--strategy", "greedy")
    assert result.exit_code == 0, result.output
    assert "24 layers x 32 experts" in result.stdout


SIZES = 8, 1, 1, 4


@pytest.fixture
def trace(tmp_path):
    path = tmp_path / "trace.npy"
    np.save(path, np.random.default_rng(1).integers(1, 1000, (7, 2, 6)))
    return path


def simulate(trace, *arguments):
    return invoke(
        *("simulate", trace, "--replicas", 8, "--gpus", 4, "--window", 3),
        *("--strategy", "greedy", *arguments),
    )


def imbalance_of(load, phy2log):
    """By loops: [layers]."""
    result = []
    for loads, slots in zip(load.tolist(), np.asarray(phy2log).tolist(), strict=True):
        per_slot = [loads[e] / slots.count(e) for e in slots]
        gpus = [per_slot[i] + per_slot[i + 1] for i in range(0, len(slots), 2)]
        result.append(max(gpus) / (sum(gpus) / len(gpus)) - 1)
    return result


def fetched(old, new):
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
                moves.append(fetched(plans[-2].phy2log, plans[-1].phy2log))
        imbalance.append(imbalance_of(load[t], plans[-1].phy2log))
    return np.array(imbalance), np.array(moves)


def kept(past, placed):
    return eplb_jax.rebalance_experts(past, *SIZES, strategy="greedy", previous=placed)


def anew(past, placed):
    return eplb_jax.rebalance_experts(past, *SIZES, strategy="greedy")


def deepseek(past, placed):
    return eplb_jax.rebalance_experts(past[-1], *SIZES, strategy="greedy")


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
        assert row["imbalance_mean"] == pytest.approx(imbalance.mean())
        assert row["imbalance_p95"] == pytest.approx(np.percentile(imbalance, 95))
        assert row["imbalance_worst"] == pytest.approx(imbalance.max())
        shown = [
            f"{imbalance.mean() * 100:.2f}",
            f"{np.percentile(imbalance, 95) * 100:.1f}",
            f"{imbalance.max() * 100:.1f}",
        ]
        if row["name"] == "no balancer":
            assert row["moves_mean"] is row["moves_share"] is row["plan_ms"] is None
        else:
            np.testing.assert_array_equal(row["moves"], moves)
            assert row["moves_mean"] == pytest.approx(moves.mean())
            assert row["moves_share"] == pytest.approx(moves.mean() / 8)
            assert row["plan_ms"] == pytest.approx(np.median(row["plan_seconds"]) * 1e3, abs=1e-3)
            assert len(row["plan_seconds"]) == -(-4 // every)
            shown += [f"{moves.mean():.1f}", f"{moves.mean() / 8 * 100:.1f}"]
            shown += [f"{row['plan_ms']:.1f}", f"{row['compile_s']:.1f}"]
        assert " ".join([row["name"], *shown]) in lines


def test_simulation_is_drawn_and_json_goes_to_stdout(trace, tmp_path):
    plot = tmp_path / "out.png"
    arguments = ["--strategy", "fast", "--plot", plot, "--json", "-", "--max-moves", 1]
    result = simulate(trace, *arguments)
    assert result.exit_code == 0, result.output
    results = json.loads(result.stdout)["results"]
    names = ["greedy", "fast", "deepseek, last window", "no balancer"]
    assert [row["name"] for row in results] == names
    assert all(name in result.stderr for name in names)
    for row in results[:2]:
        assert np.max(row["moves"]) <= 1
    assert plot.read_bytes().startswith(b"\x89PNG")
    assert sorted(os.listdir(tmp_path)) == ["out.png", "trace.npy"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--window", 7], "window=7 leaves none of the 7 windows to measure; nearest: 6"),
        (["--gpus", 3], "num_replicas=8 is not a multiple of num_gpus=3; nearest: 6, 9"),
        (["--strategy", "fastest"], "strategy='fastest' is not known; choose one of"),
        (["--no-keep", "--max-moves", 3], "max_moves=3 needs keep"),
        (["--no-keep", "--price", 0.1], "price=0.1 needs keep"),
        (["--price", -1], "price=-1.0 must be finite and not negative"),
        (["--plot", "plot.doc"], "plot.doc: unknown kind of picture; use .png, .svg or .pdf"),
        (["--json", "/no/such/folder/out.json"], "the folder /no/such/folder does not exist"),
    ],
)
def test_unusable_arguments_of_simulate(trace, arguments, message):
    result = simulate(trace, *arguments)
    assert result.exit_code == 2
    assert result.stderr.startswith("eplb-jax: error: ")
    assert message in result.stderr
    assert result.stderr.count("\n") == 1


def test_a_load_without_windows_is_no_trace(tmp_path):
    path = tmp_path / "load.csv"
    path.write_text("1,2,3,4\n")
    result = simulate(path)
    assert result.exit_code == 2
    assert "load.csv has the shape (1, 4); a trace is [windows, layers, experts]" in result.stderr


@pytest.mark.parametrize("name", ["trace.npz", "trace.npy"])
def test_generate_writes_a_trace(tmp_path, name):
    path = tmp_path / name
    sizes = ["--windows", 4, "--layers", 2, "--experts", 8, "--gpus", 4, "--tokens", 64]
    draws = ["--top-k", 2, "--skew", 0.5, "--change", 0.2, "--seed", 3]
    result = invoke("generate", "drift", "-o", path, *sizes, *draws)
    assert result.exit_code == 0, result.output
    load = eplb_jax.loads.read(path)
    options = {"tokens": 64, "top_k": 2, "skew": 0.5, "change": 0.2, "num_gpus": 4, "seed": 3}
    np.testing.assert_array_equal(load, traces.generate("drift", 4, 2, 8, **options))
    gpus = load.reshape(4, 2, 4, 2).sum(axis=3)
    even = (gpus.mean(axis=2) / gpus.max(axis=2)).mean()
    assert "4 windows x 2 layers x 8 experts" in result.stdout
    assert result.stdout.endswith(f"4 GPUs: {even:.3f}\n")


@pytest.mark.parametrize(
    ("kind", "name", "message"),
    [
        ("drift", "trace.csv", "trace.csv: unknown kind of file; use one of: .npz, .npy"),
        ("wave", "trace.npy", "kind='wave' is not known; choose one of: stationary, drift"),
    ],
)
def test_unusable_arguments_of_generate(tmp_path, kind, name, message):
    sizes = ["--windows", 4, "--layers", 2, "--experts", 8]
    result = invoke("generate", kind, "-o", tmp_path / name, *sizes)
    assert result.exit_code == 2
    assert message in result.stderr
    assert os.listdir(tmp_path) == []
