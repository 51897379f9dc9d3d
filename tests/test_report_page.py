"""The report's page: what is in it, that nothing in a run can break it, that it can be opened."""

import base64
import hashlib
import html
import json
import math
import re
import shutil
import subprocess
import time
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gpt.errors import UserError
from gpt.health.finding import Finding
from gpt.history import History, Table, history_of
from gpt.report.charts import loss_range, run_charts
from gpt.report.comparison_page import comparison_charts
from gpt.report.judged import judge
from gpt.report.marks import Mark, place_marks
from gpt.report.markup import data_block, table, tag
from gpt.report.page import page, write_report
from gpt.report.sketch import sketch
from gpt.report.thin import MOST_POINTS, thin
from tests.report_runs import FINDINGS, config_of, demo, event, records, write_run

CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
HOSTILE = """</script></style></textarea>-->
<img src=x onerror="document.documentElement.dataset.pwned=1">
<script>document.documentElement.dataset.pwned = 1</script>\ud800\x00" onload='x' <b>&amp;${x}`"""


class Page(HTMLParser):
    """The page's elements, text outside of scripts, and whether tags are closed as opened."""

    VOID = ("meta", "input", "br")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.scripts: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, name: str, attributes: list[tuple[str, str | None]]) -> None:
        self.elements.append((name, dict(attributes)))
        if name not in self.VOID:
            self.open.append(name)

    def handle_endtag(self, name: str) -> None:
        assert self.open.pop() == name

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] in ("script", "style"):
            self.scripts.append(data)
        else:
            self.text += data

    def named(self, name: str) -> list[dict[str, str | None]]:
        return [attributes for found, attributes in self.elements if found == name]

    @property
    def data(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(next(s for s in self.scripts if '"figures"' in s[:20]))
        return found


@pytest.fixture(scope="module")
def demo_page() -> str:
    return page([judge(demo(), FINDINGS)])


def test_everything_that_was_logged_has_its_part(demo_page: str) -> None:
    read = Page(demo_page)
    assert list(read.data["figures"]) == [
        *("loss", "rate", "gradient", "update", "slope", "adam", "noise", "update-ratio-map"),
        *("grad-norm-map", "attn-logit-max", "rms", "dead-share", "speed", "memory", "cpu"),
    ]
    headings = re.findall(r"<h2[^>]*>([^<]*)</h2>", demo_page)
    assert headings == [
        *("Verdict", "Numbers", "Curves", "Samples", "Evaluations", "Config", "Environment"),
        "Events and notes",
    ]
    for finding in FINDINGS:
        assert finding.evidence in read.text
        assert finding.next in read.text
    assert "f2000(x):" in read.text
    assert "clipped above 1" in json.dumps(read.data)


def test_parts_without_data_are_left_out() -> None:
    history = history_of([{"kind": "train", "step": step, "loss": 3.0 / step} for step in (1, 2)])
    text = page([judge(history, [])])
    read = Page(text)
    assert list(read.data["figures"]) == ["loss"]
    assert re.findall(r"<h2[^>]*>([^<]*)</h2>", text) == ["Verdict", "Numbers", "Curves"]
    assert "✓ healthy" in read.text
    assert len(page([judge(history_of([]), [])])) < 50_000, "nothing to draw, nothing to draw with"


def test_findings_lead_to_their_marks(demo_page: str) -> None:
    read = Page(demo_page)
    links = [link for link in read.named("a") if "data-mark" in link]
    # The second and the third begin so close together that they share a mark.
    assert [link["href"] for link in links] == ["#mark-1", "#mark-2", "#mark-2"]
    identifiers = {attributes.get("id") for _, attributes in read.elements}
    assert {"mark-1", "mark-2", "finding-1", "finding-3"} <= identifiers
    marks = read.data["figures"]["loss"]["data"][-1]
    assert marks["meta"] == "marks"
    assert marks["x"] == [1200, 1600]
    assert marks["text"] == ["1", "2, 3"]
    for name, figure in read.data["figures"].items():
        upright = [s for s in figure["layout"]["shapes"] if s.get("yref") == "paper"]
        assert [shape["x0"] for shape in upright] == [1200, 1600], name


def test_links_and_identifiers_are_sound(demo_page: str) -> None:
    read = Page(demo_page)
    identifiers = [attributes["id"] for _, attributes in read.elements if "id" in attributes]
    assert len(identifiers) == len(set(identifiers))
    for link in read.named("a"):
        assert (link["href"] or "").removeprefix("#") in identifiers
    for _, attributes in read.elements:
        if "aria-labelledby" in attributes:
            assert attributes["aria-labelledby"] in identifiers


def test_charts_can_be_understood_without_seeing_or_scripts(demo_page: str) -> None:
    read = Page(demo_page)
    charts = [a for _, a in read.elements if a.get("class") == "chart"]
    assert len(charts) == len(read.data["figures"])
    assert all(chart["role"] == "img" and len(chart["aria-label"] or "") > 30 for chart in charts)
    pictures = [a for name, a in read.elements if name == "svg"]
    assert len(pictures) == len(charts) - 2, "all but the heat maps"
    assert demo_page.count("<noscript>") == 3, "one a heat map, and one in the head"


def test_the_page_asks_for_nothing_and_runs_its_own_scripts_alone(demo_page: str) -> None:
    read = Page(demo_page)
    policy = next(m["content"] for m in read.named("meta") if m.get("http-equiv")) or ""
    assert policy.startswith("default-src 'none'; ")
    assert "http" not in policy
    allowed = set(re.findall(r"'sha256-([^']+)'", policy))
    scripts = re.findall(r"<script>(.*?)</script>", demo_page, re.DOTALL)
    assert len(scripts) == len(allowed) == 2
    for script in scripts:
        digest = hashlib.sha256(script.encode()).digest()
        assert base64.b64encode(digest).decode() in allowed
    rest = demo_page.replace(scripts[0], "")
    assert not re.search(r"https?:", rest)
    assert not {"link", "img", "iframe", "object", "embed", "base", "form"} & {
        name for name, _ in read.elements
    }
    assert not any("src" in attributes for _, attributes in read.elements)


def hostile() -> tuple[History, list[Finding]]:
    """A run whose every text tries to get out of its place."""
    lines = [
        *records(steps=200),
        event(200, "sample", prompt=HOSTILE, text=HOSTILE),
        event(200, HOSTILE, reason=HOSTILE),
        {"kind": "layers", "step": 200, "update_ratio": {HOSTILE: 0.1}, "rms": {HOSTILE: 1.0}},
        {"kind": "train", "step": 201, "loss": 2.0, "lrs": {HOSTILE: 0.1}},
    ]
    config = config_of(data__source=re.sub("[\ud800\0\n]", "", HOSTILE))
    history = history_of(lines, config, name=HOSTILE)
    history = History(**{**history.__dict__, "notes": (HOSTILE,)})
    return history, [Finding(HOSTILE, 100, HOSTILE, HOSTILE, HOSTILE)]


@pytest.mark.parametrize("count", [1, 2])
def test_text_of_a_run_stays_text(count: int) -> None:
    history, findings = hostile()
    text = page([judge(history, findings)] * count, notes=[HOSTILE])
    read = Page(text)
    assert not {"img", "textarea"} & {name for name, _ in read.elements}
    assert not any(name.startswith("on") for _, a in read.elements for name in a)
    assert len(re.findall(r"<script>", text)) == 2
    assert '<img src=x onerror="document' in read.text, "shown as it was written"
    text.encode()
    # plotly reads tags in its texts: they are escaped there once more.
    written = json.dumps(read.data["figures"])
    assert not re.search(r"<(?!br>|/?extra>)", written)


def test_markup_escapes_what_is_not_markup() -> None:
    assert tag("p", "<b>", tag("b", "&"), title='"x', hidden=True, id=None) == (
        '<p title="&quot;x" hidden>&lt;b&gt;<b>&amp;</b></p>'
    )
    assert "</td>" in table(["a"], [["<i>", "</td>"]])
    assert "&lt;/td&gt;" in table(["a"], [["<i>", "</td>"]])
    block = data_block("x", {"a": "</script><!--"})
    assert block.count("<") == 2
    assert json.loads(block[block.index(">") + 1 : block.rindex("<")]) == {"a": "</script><!--"}


def test_figures_are_plotly_figures() -> None:
    graph_objects = pytest.importorskip("plotly.graph_objects")
    charts = run_charts(demo(), FINDINGS)
    charts += comparison_charts([judge(demo("a"), []), judge(demo("b", seed=1), [])])
    for chart in charts:
        graph_objects.Figure(chart.figure)  # raises for any name or value that plotly has not


ODD: dict[str, list[dict[str, Any]]] = {
    "nothing": [],
    "only events": [event(0, "run", total_steps=10), event(1, "skipped", loss=math.nan)],
    "one step": [{"kind": "train", "step": 1, "loss": 5.0, "lr": 1e-3, "grad_norm": 1.0}],
    "one evaluation": [{"kind": "eval", "step": 0, "val_loss": 5.0}],
    "nan everywhere": [
        {"kind": kind, "step": step}
        | dict.fromkeys(("loss", "lr", "grad_norm", "val_loss", "val_bpb", "time_s"), math.nan)
        for step in (1, 2, 3)
        for kind in ("train", "eval")
    ],
    "infinite": [
        {"kind": "train", "step": 1, "loss": 5.0, "update_ratio": math.inf, "grad_norm": math.inf},
        {"kind": "train", "step": 2, "loss": math.inf, "update_ratio": 0.0, "grad_norm": 0.0},
    ],
    "huge": [
        {"kind": "train", "step": step, "loss": 10.0 ** (30 * step), "lr": 1e-300}
        for step in range(1, 11)
    ],
    "negative and constant": [
        {"kind": "train", "step": step, "loss": -2.0, "tokens_per_s": 0.0} for step in range(1, 40)
    ],
    "empty layers": [
        {"kind": "train", "step": 1, "loss": 1.0},
        {"kind": "layers", "step": 1, "update_ratio": {}, "rms": {"blocks.0": math.nan}},
        {"kind": "layers", "step": 2, "update_ratio": {"a": 0.0, "b": math.inf}},
    ],
    "other types": [
        {"kind": "train", "step": 1, "loss": 1.0, "lr": "fast", "grad_norm": None, "lrs": [1, 2]},
        event(1, "sample"),
        event(1, "sample", prompt=None, text=5),
        {"kind": "event"},
    ],
}


@pytest.mark.parametrize("case", ODD)
def test_no_run_is_too_odd_for_a_page(case: str, tmp_path: Path) -> None:
    run = write_run(tmp_path / "odd", ODD[case])
    write_report(run, run / "report.html")
    text = (run / "report.html").read_text(encoding="utf-8")
    read = Page(text)
    for chart in read.data["figures"].values():
        assert all(trace["x"] for trace in chart["data"])
    history = history_of(ODD[case])
    last = Finding("nonfinite", 2, "nan", "rate", "gpt-lr find")
    Page(page([judge(history, [last])]))
    Page(page([judge(history, []), judge(demo(), [])]))


def test_a_sample_without_a_word_is_seen() -> None:
    lines = [event(step, "sample", prompt="", text=text) for step, text in enumerate(("", " \n"))]
    text = Page(page([judge(history_of(lines), [])])).text
    assert "(nothing)" in text
    assert "(white space)" in text


def test_no_log_no_page(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="does not exist"):
        write_report(tmp_path / "none", tmp_path / "report.html")


def test_a_run_without_steps_lost_to_a_crash(tmp_path: Path) -> None:
    run = write_run(tmp_path / "torn", records(steps=200))
    with (run / "metrics.jsonl").open("a") as log:
        log.write('{"kind": "train", "step": 201, "lo')
    write_report(run, run / "report.html")


def test_the_page_reloads_while_a_run_goes_on() -> None:
    live = Page(page([judge(demo(), [])], reload_s=5))
    assert live.data["reload_s"] == 5
    assert {"http-equiv": "refresh", "content": "5"} in live.named("meta")
    assert Page(page([judge(demo(), [])])).data["reload_s"] is None


def test_thinning_keeps_what_stands_out() -> None:
    steps = np.arange(1, 100_001, dtype=float)
    values = np.sin(steps / 5000)
    values[[7, 31_337, 77_777]] = 50.0, -50.0, np.nan
    short, kept = thin(steps, values)
    assert len(short) <= MOST_POINTS + 2
    assert {1.0, 8.0, 31_338.0, 100_000.0} <= set(short.tolist())
    assert np.isfinite(kept).all()
    assert (np.diff(short) > 0).all()
    assert (short <= 100).sum() >= 50, "the first steps can be seen on a logarithmic axis"
    same = thin(steps[:100], values[:100])
    assert len(same[0]) == 100


def test_a_long_log_makes_a_page_that_opens_fast() -> None:
    count = 100_000
    rng = np.random.default_rng(0)
    names = ("loss", "lr", "grad_norm", "update_ratio", "tokens_per_s", "adam_rms", "time_s")
    columns = {name: 1 + rng.random(count) for name in names}
    train = Table({"step": np.arange(1, count + 1, dtype=float), **columns})
    rows = {f"update_ratio/blocks.{block}.x": rng.random(2000) + 1e-3 for block in range(400)}
    layers = Table({"step": np.arange(2000, dtype=float), **rows})
    evals = Table({"step": np.arange(5000, dtype=float), "val_loss": rng.random(5000)})
    samples = tuple(event(step, "sample", text="x" * 50) for step in range(500))
    history = History("long", "csv", train, evals, layers, samples)
    start = time.perf_counter()
    text = page([judge(history, [])])
    took = time.perf_counter() - start
    own = text[: text.index("<script>")]
    assert len(own) < 1_500_000
    assert "200 of 5,000 are shown" in own
    assert "40 of 500 are shown" in own
    assert took < 10, took


def test_a_parameter_that_is_known_in_lines_that_are_left_out_is_in_no_map() -> None:
    none = Table.from_records([])
    steps = np.arange(1.0, 302)
    rare = np.where(steps == 2, 1.0, math.nan)
    columns = {"update_ratio/a": np.ones(301), "update_ratio/b": rare, "grad_norm/b": rare}
    history = History("x", "csv", none, none, Table({"step": steps, **columns}))
    (chart,) = run_charts(history, [])
    assert chart.id == "update-ratio-map"
    assert chart.summary == "at the end from 1 (a) to 1 (a)"


def test_near_marks_are_one() -> None:
    found = [Finding("spike", step, "", "", "") for step in (50, 10, 12, 1000)]
    assert place_marks(found, 1000) == [Mark((2, 3), 10), Mark((1,), 50), Mark((4,), 1000)]
    assert place_marks([], 0) == []


def test_the_loss_axis_shows_the_run_and_not_one_outlier() -> None:
    losses = np.concatenate([[9.0], np.linspace(6, 2, 400)])
    losses[200] = 1e6
    low, high = loss_range(losses, np.array([2.1])) or (0, 0)
    assert low < 2
    assert 9 < high < 10
    chart = next(iter(run_charts(line_history(losses), [])))
    assert "1 value lies above the frame" in chart.about
    assert loss_range(np.array([math.nan])) is None


def line_history(losses: np.ndarray) -> History:
    steps = np.arange(1, len(losses) + 1, dtype=float)
    empty = Table.from_records([])
    return History("x", "csv", Table({"step": steps, "loss": losses}), empty, empty)


def test_a_still_picture_is_drawn_inside_its_frame() -> None:
    chart = next(iter(run_charts(demo(), FINDINGS)))
    picture = sketch(chart.figure, "loss")
    assert picture is not None
    numbers = re.findall(r'd="M([\d. L]+)"', picture)
    assert len(numbers) == 3
    for line in numbers:
        for point in line.split("L"):
            x, y = map(float, point.split())
            assert 0 <= x <= 520
            assert 0 <= y <= 240


MEASURE = """
(async () => {
  const root = document.documentElement, all = (what) => [...document.querySelectorAll(what)];
  const pause = (ms) => new Promise((resolve) => setTimeout(resolve, ms));
  const drawn = async () => { while (!root.dataset.drawn) await pause(20); await pause(100); };
  await drawn();
  const marks = all(".js-plotly-plot").map((b) => b.querySelectorAll(".shapelayer path").length);
  const first = getComputedStyle(document.body).backgroundColor;
  delete root.dataset.drawn;
  document.getElementById("theme").click();
  await drawn();
  const second = getComputedStyle(document.body).backgroundColor;
  const box = document.getElementById("chart-loss");
  const before = box?.layout.yaxis.type;
  box?.closest("figure").querySelector("[data-axis=y]")?.click();
  await pause(100);
  all("a[data-mark]")[0]?.click();
  await pause(100);
  parent.postMessage(JSON.stringify({
    id: ID, errors: root.dataset.errors ?? "", pwned: root.dataset.pwned ?? "",
    charts: all(".chart").length, drawn: Number(root.dataset.drawn), marks,
    svgs: all(".js-plotly-plot").filter((each) => each.querySelector("svg.main-svg")).length,
    scroll: root.scrollWidth, inner: innerWidth, images: all("img").length,
    themes: [first, second], types: [before, box?.layout.yaxis.type],
    hover: all(".hoverlayer text").map((each) => each.textContent).join(" "),
    legend: all("#chart-loss .legendtext").map((each) => each.textContent),
  }), "*");
})();
"""


def measured(folder: Path, pages: dict[str, tuple[str, int]]) -> dict[str, dict[str, Any]]:
    """What a browser says of pages, each in a frame of a width; one browser for all."""
    frames = []
    for name, (text, width) in pages.items():
        script = MEASURE.replace("ID", json.dumps(name))
        digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
        text = text.replace("script-src ", f"script-src 'sha256-{digest}' ", 1)
        text = text.replace("</body>", f"<script>{script}</script></body>")
        (folder / f"{name}.html").write_text(text, encoding="utf-8")
        frames.append(f'<iframe src="{name}.html" width="{width}" height="800"></iframe>')
    collect = 'addEventListener("message", (e) => document.body.append(e.data + "\\n"));'
    outer = folder / "frames.html"
    outer.write_text(f"<body><script>{collect}</script>{''.join(frames)}")
    arguments = [
        *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
        *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
        *("--window-size=1400,900", "--virtual-time-budget=60000", "--dump-dom"),
    ]
    shown = subprocess.run(
        [str(CHROMIUM), *arguments, f"--user-data-dir={folder / 'profile'}", outer.as_uri()],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    ).stdout
    lines = [line for line in shown.splitlines() if '"errors"' in line]
    found = [
        json.loads(html.unescape(line[line.index("{") : line.rindex("}") + 1])) for line in lines
    ]
    return {each["id"]: each for each in found}


@pytest.mark.skipif(CHROMIUM is None, reason="needs chromium")
def test_a_browser_draws_the_pages(tmp_path: Path, demo_page: str) -> None:
    history, findings = hostile()
    runs = [judge(demo("a <b>bold</b> & 'name'"), []), judge(demo("other", seed=1), [])]
    pages = {
        "narrow": (demo_page, 360),
        "wide": (demo_page, 1280),
        "hostile": (page([judge(history, findings)]), 360),
        "several": (page(runs), 360),
    }
    found = measured(tmp_path, pages)
    assert set(found) == set(pages)
    for name, seen in found.items():
        assert seen["errors"] == "", name
        assert seen["pwned"] == "", name
        assert seen["images"] == 0, name
        assert seen["charts"] == seen["drawn"] == seen["svgs"] > 5, name
        assert seen["inner"] == pages[name][1]
        assert seen["scroll"] <= seen["inner"], name
        assert len(set(seen["themes"])) == 2, "the switch changes the colours"
        assert seen["types"][1] == "log", "the switch makes the axis logarithmic"
    assert found["wide"]["charts"] == 15
    assert all(count >= 2 for count in found["wide"]["marks"])
    assert "spike" in found["wide"]["hover"]
    assert found["several"]["legend"] == ["a <b>bold</b> & 'name'", "other"]
