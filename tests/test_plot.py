"""The picture of a run: what is drawn, and that anything a run can hold can be drawn."""

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
from matplotlib import image

from gpt.errors import UserError
from gpt.metrics import METRICS_NAME
from gpt.plot import curve, plot_run, smooth


def make_run(folder: Path, steps: int, *, evals: bool = True, bits: bool = True) -> Path:
    folder.mkdir(exist_ok=True)
    lines = []
    for step in range(10, 10 * steps + 1, 10):
        loss = 4 + 4 * math.exp(-step / 200) + 0.1 * math.sin(step)
        lines.append({"kind": "train", "step": step, "loss": loss, "lr": 1e-3 / (1 + step)})
        if evals and step % 50 == 0:
            record = {"kind": "eval", "step": step, "val_loss": loss + 0.1}
            lines.append(record | ({"val_bpb": (loss + 0.1) / 2.5} if bits else {}))
    (folder / METRICS_NAME).write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def size(png: Path) -> tuple[int, ...]:
    return image.imread(png).shape[:2]


@pytest.mark.parametrize(
    ("steps", "evals", "bits"),
    [(1, False, False), (1, True, True), (30, True, False), (30, True, True)],
)
def test_a_run_becomes_a_picture(tmp_path, steps, evals, bits):
    run = make_run(tmp_path / "run", steps, evals=evals, bits=bits)
    png = tmp_path / "docs" / "loss.png"
    plot_run(run, png)
    height, width = size(png)
    assert 900 <= width <= 2000
    assert 500 <= height <= 1200


def test_the_picture_shows_both_panels(tmp_path, monkeypatch):
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    drawn: list[Figure] = []
    monkeypatch.setattr(FigureCanvasAgg, "print_png", lambda self, _: drawn.append(self.figure))
    plot_run(make_run(tmp_path / "quickstart", 30), tmp_path / "x.png")
    (figure,) = drawn
    upper, lower = figure.axes
    assert upper.get_ylabel() == "loss (nats per token)"
    assert lower.get_ylabel() == "learning rate"
    assert lower.get_xlabel() == "optimizer step"
    labels = [text.get_text() for text in upper.get_legend().get_texts()]
    assert labels == ["train, each logged step", "train, smoothed", "validation"]
    raw, smoothed, val = upper.get_lines()
    assert list(raw.get_xdata()) == list(smoothed.get_xdata()) == list(range(10, 301, 10))
    assert list(val.get_xdata()) == [50, 100, 150, 200, 250, 300]
    (secondary,) = upper.child_axes
    assert secondary.get_ylabel() == "bits per byte"
    title = figure.get_suptitle()
    assert title.startswith("quickstart: step 300, train loss ")
    assert "bits per byte" in title


def test_a_dead_run_can_be_drawn(tmp_path):
    run = make_run(tmp_path / "run", 20)
    with (run / METRICS_NAME).open("a") as file:
        for step in (210, 220):
            record = {
                "kind": "train",
                "step": step,
                "loss": "NaN",
                "lr": 0.0,
                "grad_norm": "Infinity",
            }
            file.write(json.dumps(record) + "\n")
        file.write('{"kind": "eval", "step": 220, "val_loss": "NaN", "val_bpb": "NaN"}\n{"torn')
    plot_run(run, tmp_path / "x.png")
    assert size(tmp_path / "x.png")


def test_a_run_without_steps(tmp_path):
    with pytest.raises(UserError, match="no training steps"):
        plot_run(tmp_path, tmp_path / "x.png")
    assert not (tmp_path / "x.png").exists()


def test_curve_takes_finite_numbers_of_one_kind():
    records = [
        {"kind": "train", "step": 1, "loss": 2.0},
        {"kind": "eval", "step": 1, "loss": 9.0},
        {"kind": "train", "step": 2, "loss": math.nan},
        {"kind": "train", "step": 3},
        {"kind": "train", "loss": 1.0},
        {"kind": "train", "step": 4, "loss": 1.0},
    ]
    assert curve(records, "train", "loss") == ([1, 4], [2.0, 1.0])


def test_smoothing_keeps_lines_and_takes_noise_away():
    line = [3.0 - 0.01 * step for step in range(200)]
    assert smooth(range(200), line) == pytest.approx(line)
    noise = [(-1.0) ** step for step in range(400)]
    assert max(abs(value) for value in smooth(range(400), noise)[50:350]) < 0.1
    assert smooth([1], [2.0]) == [2.0]


def test_from_the_shell(tmp_path):
    run = make_run(tmp_path / "run", 5)
    root = Path(__file__).parents[1]

    def plot(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-W", "error", "-m", "gpt.plot", *arguments]
        return subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)

    done = plot(str(run), str(tmp_path / "mine.png"))
    assert (done.returncode, done.stdout) == (0, "")
    assert (tmp_path / "mine.png").exists()
    wrong = plot()
    assert wrong.returncode == 2
    assert wrong.stderr == "error: usage: python -m gpt.plot RUN [PNG]\n"
