"""Draws one real run for each finding, from the corpus that health_corpus.py makes.

    python scripts/health_pictures.py DIR [--out docs/health]

Takes the first run of each kind whose first finding is the right one.
"""

import argparse
import json
from pathlib import Path

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from gpt.health.diagnose import diagnose
from gpt.health.finding import Finding
from gpt.health.view import View
from gpt.history import read_run
from gpt.plot import FAINT, INK, RATE, TRAIN, VAL


def draw(run: Path, finding: Finding | None, png: Path) -> None:
    """Loss, rate, or what else shows the finding best, with a mark where it begins."""
    view = View(read_run(run))
    figure = Figure(figsize=(4.2, 2.3), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    rate = axes.twinx()
    rate.fill_between(view.steps, view.lr, color=RATE, alpha=0.15, linewidth=0)
    rate.set_ylim(0, 1.15 * float(np.nanmax(view.lr)))
    rate.set_yticks([])
    rate.spines[:].set_visible(False)
    axes.set_zorder(rate.get_zorder() + 1)
    axes.patch.set_visible(False)
    if finding is not None and finding.id == "throughput":
        axes.plot(view.steps, view.column("tokens_per_s"), color=TRAIN, linewidth=1.2)
        axes.set_ylabel("tokens/s", fontsize=8)
        axes.set_ylim(bottom=0)
    else:
        axes.plot(view.steps, view.loss, color=TRAIN, alpha=0.3, linewidth=0.7)
        axes.plot(view.steps, view.smooth, color=TRAIN, linewidth=1.5)
        evals = view.history.evals
        axes.plot(evals["step"], evals["val_loss"], color=VAL, linestyle="--", linewidth=1.3)
        for level, name in ((view.history.chance, "ln V"), (view.ignorance, "frequencies")):
            if level is not None:
                axes.axhline(level, color=INK, linewidth=0.6, linestyle=":")
                axes.annotate(name, (view.total, level), fontsize=6, ha="right", va="bottom")
        axes.set_ylabel("loss", fontsize=8)
        top = float(np.nanmax(view.smooth))
        if top > 3 * view.start_loss:
            axes.set_yscale("log")
    if finding is not None:
        axes.axvline(finding.first_step, color=INK, linewidth=1, linestyle="-.")
    axes.set_xlim(0, view.total)
    axes.tick_params(labelsize=7)
    axes.grid(color=FAINT, linewidth=0.5)
    axes.spines[["top", "right"]].set_visible(False)
    png.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(png)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("dir", type=Path)
    parser.add_argument("--out", type=Path, default=Path("docs/health"))
    arguments = parser.parse_args()
    done: set[str] = set()
    for known in sorted((arguments.dir / "runs").glob("*/expected.json")):
        expected = json.loads(known.read_text())["expected"]
        if expected in done or not (known.parent / "metrics.jsonl").exists():
            continue
        findings = diagnose(read_run(known.parent))
        first = findings[0] if findings else None
        if (first.id if first else "healthy") == expected:
            draw(known.parent, first, arguments.out / f"{expected}.png")
            print(f"{expected}: {known.parent.name}: {first.evidence if first else 'nothing'}")
            done.add(expected)


if __name__ == "__main__":
    main()
