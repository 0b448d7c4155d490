"""`eplb-jax report`: its numbers against metrics and loops, and its page as a browser shows it."""

import base64
import html
import json
import os
import re
import shutil
import subprocess
from html.parser import HTMLParser

import numpy as np
import pytest
from typer.testing import CliRunner

import eplb_jax
from eplb_jax import Topology, cli, formats, metrics
from eplb_jax.cli.drawings import lines, windows_of_point
from eplb_jax.cli.page import Source, page, verdict
from eplb_jax.evaluation.diagnosis import (
    DEEPSEEK,
    KEPT,
    LAST_WINDOW,
    MEMORY,
    NO_BALANCER,
    Costs,
    diagnose,
    in_order,
)

T, L, E, G = 8, 3, 8, 4
SEEN = 6
TOPOLOGY = Topology(G, slots=3, num_nodes=2)
COSTS = Costs(bytes_per_expert=10**6, seconds_per_token=1e-3, bandwidth=1e9, serves=50)
HOSTILE = "<b>&'\".npy"
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")


@pytest.fixture(scope="module")
def load():
    rng = np.random.default_rng(0)
    popularity = rng.lognormal(0, 1, (L, E))
    return rng.multinomial(8000, popularity / popularity.sum(axis=1, keepdims=True), (T, L))


@pytest.fixture(scope="module")
def in_place():
    return np.stack(
        [np.random.default_rng(i).permutation([*range(E), 0, 1, 2, 3]) for i in range(L)]
    )


@pytest.fixture(scope="module")
def with_plan(load, in_place):
    return diagnose(load, TOPOLOGY, in_place, costs=COSTS)


@pytest.fixture(scope="module")
def without_plan(load):
    return diagnose(load, TOPOLOGY)


def history_of(load):
    history = eplb_jax.init_history(L, E)
    for window in load:
        history = eplb_jax.update_history(history, window)
    return history


def mean_imbalance(load, phy2log):
    return float(metrics.balance(load, phy2log, TOPOLOGY).mean_imbalance)


def test_the_new_plan_is_made_from_the_first_windows_and_judged_on_the_last(
    load, in_place, with_plan
):
    d = with_plan
    assert (d.shape, d.seen, d.given) == ((T, L, E), SEEN, True)
    expected = eplb_jax.plan(history_of(load[:SEEN]), TOPOLOGY, previous=in_place)
    np.testing.assert_array_equal(d.new.phy2log, expected.phy2log)
    np.testing.assert_array_equal(d.old.phy2log, in_place)
    for side, plan in (d.before, in_place), (d.after, expected.phy2log):
        balance = metrics.balance(load[SEEN:], plan, TOPOLOGY)
        np.testing.assert_allclose(side.imbalance, balance.imbalance, atol=1e-6)
        assert side.mean_imbalance == pytest.approx(mean_imbalance(load[SEEN:], plan), abs=1e-6)
        relative = balance.gpu_load / balance.gpu_load.mean(axis=2, keepdims=True)
        np.testing.assert_allclose(side.gpu_load, relative, rtol=1e-5)


def test_moves_and_decision(load, in_place, with_plan):
    d = with_plan
    moves = eplb_jax.moves(in_place, d.new, TOPOLOGY)
    for name in moves._fields:
        np.testing.assert_array_equal(getattr(d.moves, name), getattr(moves, name))
    assert d.moves.received.sum() > 0
    assert d.in_turn == sum(
        max(*sent, *received)
        for sent, received in zip(moves.sent.tolist(), moves.received.tolist(), strict=True)
    )
    costs = {"bytes_per_expert": 10**6, "seconds_per_token": 1e-3, "bandwidth": 1e9, "serves": 50}
    expected = eplb_jax.decide(load[SEEN:], in_place, d.new, TOPOLOGY, **costs)
    assert d.known
    assert d.decision[:5] == expected[:5]
    before, after = (
        np.asarray(metrics.gpu_loads(load[SEEN:], x, TOPOLOGY)).max(axis=2).sum()
        for x in (in_place, d.new)
    )
    assert d.saved == pytest.approx(1 - after / before, rel=1e-5)


def test_replays(load, in_place, with_plan):
    d = with_plan
    assert (d.window, d.every) == (4, 1)
    assert list(d.replays) == [NO_BALANCER, KEPT, MEMORY, LAST_WINDOW, DEEPSEEK]
    in_place = eplb_jax.placement_of(in_place)
    plans = {KEPT: in_place, MEMORY: in_place, LAST_WINDOW: in_place, DEEPSEEK: in_place}
    for t in range(d.window, T):
        plans = {
            KEPT: in_place,
            MEMORY: eplb_jax.plan(history_of(load[:t]), TOPOLOGY, previous=plans[MEMORY]),
            LAST_WINDOW: eplb_jax.plan(
                history_of(load[t - 1 : t]), TOPOLOGY, previous=plans[LAST_WINDOW]
            ),
            DEEPSEEK: eplb_jax.plan(load[t - 1], TOPOLOGY, strategy="greedy"),
        }
        for name, plan in plans.items():
            expected = metrics.balance(load[t], plan, TOPOLOGY).imbalance
            result = d.replays[name].imbalance[t - d.window]
            np.testing.assert_allclose(result, expected, atol=1e-6, err_msg=name)
        gpus = load[t].reshape(L, G, 2).sum(axis=2)
        expected = gpus.max(axis=1) / gpus.mean(axis=1) - 1
        np.testing.assert_allclose(
            d.replays[NO_BALANCER].imbalance[t - d.window], expected, atol=1e-6
        )
    assert d.replays[KEPT].moves.sum() == 0
    first = eplb_jax.moves(in_place, eplb_jax.plan(load[3], TOPOLOGY, strategy="greedy"), TOPOLOGY)
    np.testing.assert_array_equal(d.replays[DEEPSEEK].moves[0], first.received.sum(axis=1))


def test_hottest_experts(load, in_place, with_plan):
    share = (load[SEEN:] / load[SEEN:].sum(axis=2, keepdims=True)).mean(axis=0)
    hottest = with_plan.hottest
    shares = sorted(share.ravel().tolist(), reverse=True)
    assert [x.share for x in hottest] == pytest.approx(shares[: len(hottest)])
    for x in hottest:
        assert x.share == pytest.approx(share[x.layer, x.expert])
        assert x.before == in_place[x.layer].tolist().count(x.expert)
        assert x.after == np.asarray(with_plan.new.phy2log)[x.layer].tolist().count(x.expert)


def test_spares(load, with_plan):
    assert [x.slots_per_gpu for x in with_plan.spares] == [2, 3, 4]
    for x in with_plan.spares:
        topology = Topology(G, slots=x.slots_per_gpu, num_nodes=2)
        plan = eplb_jax.plan(history_of(load[:SEEN]), topology)
        expected = metrics.balance(load[SEEN:], plan, topology).mean_imbalance
        assert x.imbalance == pytest.approx(float(expected), abs=1e-6)


def test_without_a_plan_in_place(load, without_plan):
    d = without_plan
    assert list(d.replays) == [NO_BALANCER, MEMORY, LAST_WINDOW, DEEPSEEK]
    gpus = load[SEEN:].reshape(-1, L, G, 2).sum(axis=3)
    expected = gpus.max(axis=2) / gpus.mean(axis=2) - 1
    np.testing.assert_allclose(d.before.imbalance, expected, atol=1e-6)
    old = np.asarray(d.old.phy2log)
    assert old[0].tolist() == [0, 1, -1, 2, 3, -1, 4, 5, -1, 6, 7, -1]
    eplb_jax.placement_of(d.new.phy2log, E)  # complete
    # Every GPU that holds an expert it did not have received it.
    new = np.asarray(d.new.phy2log).reshape(L, G, 3)
    held = old.reshape(L, G, 3)
    received = sum(
        e not in held[layer, gpu] for layer in range(L) for gpu in range(G) for e in new[layer, gpu]
    )
    assert d.moves.received.sum() == received
    assert not d.known
    free = {"bytes_per_expert": 1, "bandwidth": 1.0, "serves": 1e30, "seconds_per_token": 1.0}
    expected = eplb_jax.decide(load[SEEN:], d.old, d.new, TOPOLOGY, **free)
    assert d.decision[:3] == expected[:3]


def test_experts_in_order():
    assert in_order(5, Topology(2, slots=4)).tolist() == [0, 1, 2, -1, 3, 4, -1, -1]
    loads = np.random.default_rng(0).random((1, 5))
    in_slots = metrics.gpu_loads(loads, in_order(5, Topology(3, slots=2))[None], 3)
    np.testing.assert_allclose(in_slots, metrics.gpu_loads_in_order(loads, 3), rtol=1e-6)


def test_few_and_unusable_windows(load):
    with pytest.raises(ValueError, match="trace has 1 window; a report needs one to plan from"):
        diagnose(load[:1], TOPOLOGY)
    with pytest.raises(ValueError, match="GPUs with equally many slots"):
        diagnose(load, Topology(4, slots=[3, 3, 3, 4]))


def test_a_trace_without_load_is_reported(in_place):
    d = diagnose(np.zeros((2, L, E), int), TOPOLOGY, in_place)
    assert (d.seen, d.saved, d.hottest) == (1, 0, ())
    assert verdict(d)[1] == "the balancer proposes no moves: a new plan would hardly be better."
    assert "Nothing moves between GPUs." in page(d, Source("t", "p", None, []))


MEASURE = """<p></p><script>
const frame = document.querySelector("iframe");
frame.onload = () => {
  const page = frame.contentDocument, style = frame.contentWindow.getComputedStyle(page.body);
  const ends = [...page.querySelectorAll("svg[role=img], h2, p, .scroll")].map(
    x => x.getBoundingClientRect().right);
  document.querySelector("p").textContent = JSON.stringify({
    width: page.documentElement.scrollWidth, right: Math.max(...ends),
    page: style.backgroundColor, text: style.color,
  });
};
</script>"""


class Page(HTMLParser):
    """Elements with their attributes, and the text of every section."""

    def __init__(self, text):
        super().__init__()
        self.elements, self.sections, self.open = [], {}, []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        attributes = dict(attrs)
        self.elements.append((tag, attributes))
        if tag in ("td", "th"):
            self.handle_data(" ")
        if tag == "section":
            self.open.append(attributes["id"])
            self.sections[self.open[-1]] = ""

    def handle_endtag(self, tag):
        if tag == "section":
            self.open.pop()

    def handle_data(self, data):
        for name in self.open:
            self.sections[name] += data

    def text(self, name):
        return " ".join(self.sections[name].split())


def source_of(d, layers=None):
    return Source(HOSTILE, HOSTILE if d.given else None, layers, ["made by a test"])


def pages(with_plan, without_plan):
    return [page(d, source_of(d)) for d in (with_plan, without_plan)]


def test_the_page_is_complete_and_escaped(with_plan, without_plan):
    for text in pages(with_plan, without_plan):
        parsed = Page(text)
        assert [*parsed.sections] == [
            *("verdict", "balance", "windows", "experts", "moves", "spares", "terms", "method")
        ]
        tags = [tag for tag, _ in parsed.elements]
        assert not {"script", "link", "iframe", "object"} & {*tags}
        assert "http://" not in text
        assert "https://" not in text
        assert "<b>&'" not in text
        assert html.escape(HOSTILE).replace("&#x27;", "&#39;").replace("&quot;", "&#34;") in text
        ids = [a["id"] for _, a in parsed.elements if "id" in a]
        for tag, attributes in parsed.elements:
            for name in ("src", "href", "xlink:href"):
                assert attributes.get(name, "#").startswith(("#", "data:")), (tag, attributes)
            if attributes.get("href", "").startswith("#"):
                assert attributes["href"][1:] in ids
            if tag == "img":
                assert attributes["alt"]
            if tag == "svg":
                assert attributes.get("aria-label") or attributes["aria-hidden"] == "true"
            if tag == "th":
                assert attributes["scope"] in ("row", "col")
        # Marks of axes are the same wherever they come twice.
        others = [x for x in ids if not re.fullmatch("m[0-9a-f]{10}", x)]
        assert len(others) == len({*others})
        assert tags.count("h1") == 1


def test_the_page_has_the_numbers(with_plan, without_plan):
    d = with_plan
    parsed = Page(page(d, source_of(d, layers=[3, 4, 60])))
    top = parsed.text("verdict")
    assert f"{d.before.mean_imbalance:.0%}".replace("%", "") in top
    assert f"{d.moves.received.sum()} slots" in top
    assert f"of {L * 12}" in top
    assert f"{d.moves.received.sum()} MB" in top
    assert "made from windows 0 to 5 and is judged on windows 6 to 7" in top
    assert "Not known" not in top
    assert "pays after" in top
    worst = int(d.before.imbalance.mean(axis=0).argmax())
    assert f"Most loaded GPU now {[3, 4, 60][worst]} " in parsed.text("balance")
    hot = d.hottest[0]
    assert f"New plan {[3, 4, 60][hot.layer]} {hot.expert} " in parsed.text("experts")
    copies = d.moves.copies.sum(axis=0)
    assert f"stay as they are {copies[0]} " in parsed.text("moves")
    assert f"come from another node {copies[3]} " in parsed.text("moves")
    other = Page(page(without_plan, source_of(without_plan))).text("verdict")
    assert "Not known: the size of an expert (--bytes-per-expert) and the time of a token" in other
    assert "MB" not in other


@pytest.mark.parametrize(
    ("action", "known", "title"),
    [
        ("apply", True, "Move to the new plan"),
        ("apply", False, "The new plan is better"),
        ("keep", True, "Keep the plan in place"),
        ("keep", False, "Keep the plan in place"),
        ("undecided", True, "Keep the plan in place for now"),
    ],
)
def test_verdicts(with_plan, action, known, title):
    d = with_plan._replace(decision=with_plan.decision._replace(action=action), known=known)
    assert verdict(d)[0] == title


def report(*arguments):
    return CliRunner().invoke(cli.main, ["report", *map(str, arguments)])


def write(path, phy2log):
    plan = formats.PlanFile(phy2log, tuple(range(len(phy2log))), E, TOPOLOGY)
    path.write_bytes(formats.write_plan(plan, "eplb-jax"))


@pytest.fixture
def files(tmp_path, load, in_place):
    np.save(tmp_path / HOSTILE, load)
    write(tmp_path / "plan.json", in_place)
    return tmp_path


def test_the_command_and_the_plan_in_its_page(files, with_plan):
    trace, plan, output = files / HOSTILE, files / "plan.json", files / "report.html"
    costs = ["--bytes-per-expert", 10**6, "--seconds-per-token", 1e-3]
    costs += ["--bandwidth", 1e9, "--serves", 50]
    result = report(trace, "--plan", plan, "-o", output, *costs)
    assert result.exit_code == 0, result.output
    assert result.stderr == ""
    title, why = verdict(with_plan)
    assert result.stdout == f"{output}: {title}: {why}\n"
    text = output.read_text()
    assert Page(text).text("moves") == Page(page(with_plan, source_of(with_plan))).text("moves")
    (address,) = re.findall(
        r'download="new_plan.json" href="data:application/json;base64,([^"]+)"', text
    )
    new = json.loads(base64.b64decode(html.unescape(address)))
    assert new["phy2log"] == with_plan.new.phy2log.tolist()
    assert new["source"] == with_plan.moves.source.tolist()
    plan.write_text(json.dumps(new))
    again = report(trace, "--plan", plan, "-o", output)
    assert again.exit_code == 0, again.output
    assert "Keep the plan in place: the balancer proposes no moves" in again.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "give --plan, the plan in place, or --replicas and --gpus without one"),
        (["--plan", "plan.json", "--gpus", 8], "--gpus=8, but the plan in plan.json is for 4"),
        (["--plan", "none.json"], "none.json: No such file"),
        (["--replicas", 7, "--gpus", 4], "num_replicas=7 is not a multiple of num_gpus=4"),
    ],
)
def test_unusable_arguments(files, monkeypatch, arguments, message):
    monkeypatch.chdir(files)
    before = sorted(os.listdir(files))
    result = report(HOSTILE, "-o", "report.html", *arguments)
    assert result.exit_code == 2
    assert message in result.stderr
    assert result.stderr.count("\n") == 1
    assert sorted(os.listdir(files)) == before


@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")
@pytest.mark.parametrize(("scheme", "dark"), [(1, False), (0, True)])
def test_a_browser_shows_it_at_390_pixels(tmp_path, with_plan, scheme, dark):
    inside = html.escape(page(with_plan, source_of(with_plan)))
    outside = tmp_path / "outside.html"
    frame = f'<iframe style="width:390px;height:900px;border:0" srcdoc="{inside}"></iframe>'
    outside.write_text(frame + MEASURE)
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"]
    options += ["--virtual-time-budget=5000"]
    options += [f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom"]
    options += [f"--blink-settings=preferredColorScheme={scheme}", outside.as_uri()]
    shown = subprocess.run([CHROMIUM, *options], capture_output=True, text=True, timeout=60).stdout
    found = json.loads(html.unescape(re.findall(r"<p>(\{.*?\})</p>", shown)[0]))
    assert found["width"] == 390
    assert found["right"] <= 390
    luminance = {x: np.mean([*map(int, re.findall(r"\d+", found[x]))]) for x in ("page", "text")}
    assert (luminance["page"] < 64) == dark
    assert abs(luminance["page"] - luminance["text"]) > 180


def test_a_long_trace_is_drawn_as_means(with_plan):
    imbalance = np.random.default_rng(0).random((200, L))
    long = {MEMORY: with_plan.replays[MEMORY]._replace(imbalance=imbalance)}
    text = lines(long, 0, 150, 200)
    (points,) = re.findall(r'd="(M[^"]*)" clip-path="[^"]*" style="[^"]*--line-3', text)
    assert windows_of_point(200) == 3
    assert len(points.split("L")) == 67
