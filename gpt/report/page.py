"""The report as one HTML file that needs nothing else: no network, no other file.

What is shown of a run is text from outside: `markup` escapes it, and the page's policy lets no
script run but its own.
"""

import base64
import hashlib
import re
from collections.abc import Sequence
from functools import cache
from importlib.resources import files
from pathlib import Path

from gpt.files import write_durably
from gpt.history import History
from gpt.report import sections
from gpt.report.charts import run_charts
from gpt.report.comparison_page import comparison_charts, comparison_sections
from gpt.report.figures import DARK, Chart
from gpt.report.judged import Judged, judge, open_history
from gpt.report.markup import Html, data_block, tag


def write_report(run: Path, html: Path) -> None:
    """Reads a run directory or log, judges it, and writes the page.

    Raises UserError where there is no log, or the page cannot be written.
    """
    write_page(html, [judge(open_history(run))])


def write_page(
    path: Path, runs: Sequence[Judged], *, reload_s: float | None = None, notes: Sequence[str] = ()
) -> None:
    """Writes the page about one run, or several side by side; see `page`."""
    text = page(runs, reload_s=reload_s, notes=notes)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_durably(path, text.encode("utf-8", errors="replace"))


def page(
    runs: Sequence[Judged], *, reload_s: float | None = None, notes: Sequence[str] = ()
) -> str:
    """The page as text.

    With `reload_s` it reloads itself after so many seconds, for a run that is still going. `notes`
    are shown beside the verdict, such as what a probe found.
    """
    one = runs[0] if len(runs) == 1 else None
    charts = run_charts(one.history, one.findings) if one else comparison_charts(runs)
    parts = _about_one(one, charts, notes) if one else comparison_sections(runs, charts, notes)
    title = one.name if one else " · ".join(run.name for run in runs)
    data = {
        "figures": {chart.id: chart.figure for chart in charts},
        "dark": DARK,
        "reload_s": reload_s,
    }
    scripts = [_plotly()] if charts else []
    scripts.append(_resource("page.js"))
    head = tag(
        "head",
        tag("meta", charset="utf-8"),
        tag("meta", http_equiv="Content-Security-Policy", content=_policy(scripts)),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("meta", name="referrer", content="no-referrer"),
        _without_script(reload_s),
        tag("title", f"{title} – training report"),
        Html(f"<style>{_resource('page.css')}</style>"),
    )
    body = tag(
        "body",
        _header(title, one),
        _contents(parts),
        tag("main", *parts),
        tag("footer", "Made by gpt-report from the run's log."),
        data_block("data", data),
        *(Html(f"<script>{script}</script>") for script in scripts),
    )
    return f"<!doctype html>\n{tag('html', head, body, lang='en')}\n"


def _about_one(run: Judged, charts: Sequence[Chart], notes: Sequence[str]) -> list[Html]:
    history: History = run.history
    linked = any(chart.id == "loss" for chart in charts)
    verdict = [sections.verdict(run, linked=linked), *(tag("pre", note) for note in notes)]
    return sections.joined(
        [
            sections.section("verdict", "Verdict", *verdict),
            sections.section("numbers", "Numbers", sections.numbers(run)),
            sections.section("curves", "Curves", sections.charts(charts)) if charts else None,
            sections.samples(history),
            sections.evaluations(history),
            sections.config(history),
            sections.environment(history),
            sections.events(history),
        ]
    )


def _header(title: str, one: Judged | None) -> Html:
    button = tag("button", "Dark", id="theme", type="button", hidden=True)
    about = None
    if one is not None:
        about = tag("p", one.standing.words)
    return tag("header", tag("div", tag("h1", title), about), button)


def _contents(parts: Sequence[Html]) -> Html:
    """Links to the page's sections."""
    found = [re.search(r'<h2 id="([a-z-]+)-title">([^<]*)</h2>', part) for part in parts]
    links = [tag("a", Html(match.group(2)), href=f"#{match.group(1)}") for match in found if match]
    return tag("nav", *links, aria_label="sections")


def _policy(scripts: Sequence[str]) -> str:
    """What a browser may load for this page: nothing; and run: these scripts."""
    hashes = [
        f"'sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}'"
        for script in scripts
    ]
    return (
        f"default-src 'none'; script-src {' '.join(hashes)}; style-src 'unsafe-inline'; "
        "img-src data: blob:; base-uri 'none'; form-action 'none'"
    )


def _without_script(reload_s: float | None) -> Html:
    """Where no script runs: still pictures take the room that they need, and the page reloads."""
    again = tag("meta", http_equiv="refresh", content=f"{reload_s:g}") if reload_s else None
    return tag("noscript", tag("style", ".chart { min-height: 0 !important; }"), again)


@cache
def _plotly() -> str:
    """The script that draws, out of the installed package."""
    from plotly.offline import get_plotlyjs  # type: ignore[import-untyped]

    script: str = get_plotlyjs()
    assert "</script" not in script.lower()
    return script


def _resource(name: str) -> str:
    return (files("gpt.report") / name).read_text(encoding="utf-8")
