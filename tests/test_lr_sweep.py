"""Full runs side by side: what is run, what is kept, what is said, and what goes wrong."""

import io
import json
import re
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
from matplotlib.figure import Figure

import gpt.ending
import gpt.lr.sweep
import gpt.train
from gpt.config import Config
from gpt.configfile import dump_config
from gpt.files import locked
from gpt.lr.labels import judge
from gpt.lr.sweep import auto_lrs
from gpt.lr.sweep_plot import plot_sweep
from gpt.metrics import Console, read_metrics
from gpt.train import train
from tests.conftest import ConfigMaker, tiny_config
from tests.test_contract import Ended, command
from tests.test_lr_labels import broken, make_run
from tests.torture.runs import logged

FAST = {"eval__sample_tokens": "0", "train__max_steps": "10", "eval__every_steps": "5"}
RATES = "1e-5,3e-2,1e3"


def write_config(config: Config, folder: Path) -> Path:
    path = folder / f"{config.run.name}.yaml"
    path.write_text(dump_config(config), encoding="utf-8")
    return path


def sweep(config: Path, *arguments: str) -> Ended:
    return command("gpt-lr", "sweep", "--config", str(config), *arguments)


@pytest.fixture
def no_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """No pictures: they take longer than such a run itself."""
    monkeypatch.setattr(gpt.ending, "plot_run", lambda *_: None)
    monkeypatch.setattr(gpt.lr.sweep, "plot_sweep", lambda *_: None)


def trained(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the runs that are really trained from now on."""
    names: list[str] = []

    def note(config: Config, **more: Any) -> None:
        names.append(config.run.name)
        train(config, **more)

    monkeypatch.setattr(gpt.lr.sweep, "train", note)
    return names


@pytest.fixture(scope="module")
def swept(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Ended]:
    """A finished sweep of SGD, which a rate of 1000 without clipping breaks; tests only read it."""
    folder = tmp_path_factory.mktemp("sweep")
    config = tiny_config(folder, optimizer__name="sgd", train__grad_clip="null", **FAST)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gpt.ending, "plot_run", lambda *_: None)
        done = sweep(write_config(config, folder), "--lrs", RATES, "--seeds", "2")
    assert done.returncode == 0, done.stderr
    return folder, done


def test_every_rate_is_labelled_by_what_it_did(swept: tuple[Path, Ended]) -> None:
    folder, done = swept
    out = folder / "runs" / "tiny-sweep"
    answer = json.loads((out / "sweep.json").read_text())
    assert [(run["lr"], run["seed"]) for run in answer["runs"]] == [
        (lr, seed) for lr in (1e-5, 3e-2, 1e3) for seed in (1337, 1338)
    ]
    assert [run["label"] for run in answer["runs"][::2]] == ["too_small", "right", "diverged"]
    assert [run["val_loss"] for run in answer["runs"][4:]] == [None, None]
    assert answer["best"] == 3e-2
    for run in answer["runs"][:4]:
        evals = [r for r in read_metrics(out / run["run"]) if r["kind"] == "eval"]
        assert run["val_loss"] == evals[-1]["val_loss"], "the evaluation at the last step"
        assert evals[-1]["step"] == 10
    assert (out / "sweep.png").stat().st_size > 10_000
    rows = done.stdout.splitlines()
    assert rows[0].split() == ["lr", "seeds", "val", "loss", "best", "step", "label", "evidence"]
    assert [row.split()[0] for row in rows[1:]] == ["1.0e-05", "3.0e-02", "1.0e+03"]
    mean = sum(run["val_loss"] for run in answer["runs"][2:4]) / 2
    assert f"{mean:.4f} ± " in rows[2]
    assert re.search(r"diverged +2 of 2 seeds: (loss|gradient) (inf|nan) at step \d", rows[3])


def test_the_console_has_one_line_a_run_and_the_cost_first(swept: tuple[Path, Ended]) -> None:
    _, done = swept
    lines = [line for line in done.stderr.splitlines() if not line.startswith("warning: ")]
    assert lines[1].startswith("sweep    3 rates x 2 seeds = 6 runs of 10 steps")
    assert lines[2] == "cost     6 runs, 60 steps, 5,760 tokens"
    assert [line.split()[0] for line in lines[3:9]] == [f"{n}/6" for n in range(1, 7)]
    assert "lr 1.0e+03 seed 1337: diverged: " in lines[5]
    assert [line.split()[0] for line in lines[9:]] == [
        "picture",
        "numbers",
        "note",
        "note",
        "try",
        "best",
    ]
    assert "nothing was tried between" in lines[11]


def test_a_run_of_the_sweep_is_the_run_that_gpt_train_does(swept: tuple[Path, Ended]) -> None:
    folder, _ = swept
    changes = {"optimizer__name": "sgd", "optimizer__lr": "3e-2", "train__grad_clip": "null"}
    alone = tiny_config(folder, run__name="alone", run__seed="1338", **changes, **FAST)
    train(alone)
    run = folder / "runs" / "tiny-sweep" / "lr-3.0e-02-seed-1338"
    assert logged(run) == logged(folder / "runs" / "alone")
    kinds = [line["kind"] for line in logged(run)]
    assert (kinds.count("train"), kinds.count("eval"), kinds.count("layers")) == (10, 2, 10)
    for name in ("config.yaml", "tokenizer.json", "checkpoints/step-00000010"):
        assert (run / name).exists(), name


@pytest.mark.usefixtures("no_pictures")
def test_again_repeats_nothing_and_more_only_adds(
    swept: tuple[Path, Ended], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    folder, first = swept
    out = tmp_path / "copy"
    shutil.copytree(folder / "runs" / "tiny-sweep", out)
    names = trained(monkeypatch)
    config = folder / "tiny.yaml"
    again = sweep(config, "--lrs", RATES, "--seeds", "2", "--out", str(out))
    assert names == [], "neither finished nor diverged runs are repeated"
    assert again.stdout == first.stdout
    assert "kept     6 runs done before\n" in again.stderr
    wider = sweep(config, "--lrs", "1e-1,3e-2", "--seeds", "3", "--json", "--out", str(out))
    assert names == [
        "lr-1.0e-01-seed-1337",
        "lr-1.0e-01-seed-1338",
        "lr-3.0e-02-seed-1339",
        "lr-1.0e-01-seed-1339",
    ]
    answer = json.loads(wider.stdout)
    assert len(answer["runs"]) == 10
    assert "kept     2 runs done before; 4 others of this folder counted too\n" in wider.stderr
    assert answer == json.loads((out / "sweep.json").read_text())


@pytest.mark.usefixtures("no_pictures")
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_stopped_sweep_goes_on_in_the_middle_of_a_run(
    number: signal.Signals, code: int, make_config: ConfigMaker, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make_config(checkpoint__every_steps="100", **FAST)
    file = write_config(config, Path(config.run.dir).parent)
    whole = sweep(file, "--lrs", "1e-3,1e-2", "--out", str(file.parent / "whole"))
    step_once, steps = gpt.train.step_once, []

    def step_and_signal(run: Path, training: Any, *rest: Any) -> None:
        steps.append((training.config.optimizer.lr, training.progress.step))
        if len(steps) == 14:  # the fourth step of the second run
            signal.raise_signal(number)
        step_once(run, training, *rest)

    monkeypatch.setattr(gpt.train, "step_once", step_and_signal)
    stopped = sweep(file, "--lrs", "1e-3,1e-2")
    assert stopped.returncode == code
    assert stopped.stdout == ""
    go_on = f"go on with: gpt-lr sweep --config {file} --lrs 1.0e-03,1.0e-02"
    assert stopped.stderr.splitlines()[-1].endswith(go_on)
    assert "stopped  what was trained is kept" in stopped.stderr
    del steps[:]
    done = sweep(*go_on.split("--config ")[1].split())
    assert done.returncode == 0, done.stderr
    assert steps[0] == (1e-2, 4), "it went on after the last step that was done"
    assert len(steps) == 6
    assert done.stdout == whole.stdout
    out = Path(config.run.dir) / "tiny-sweep"
    for name in ("lr-1.0e-03-seed-1337", "lr-1.0e-02-seed-1337"):
        assert logged(out / name) == logged(file.parent / "whole" / name)


@pytest.mark.usefixtures("no_pictures")
def test_a_kill_between_the_end_of_a_run_and_its_entry(
    make_config: ConfigMaker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The sweep dies before it has booked a run, once after a diverged one: nothing is repeated."""
    config = make_config(optimizer__name="sgd", train__grad_clip="null", **FAST)
    file = write_config(config, Path(config.run.dir).parent)
    enter = gpt.lr.sweep.Ledger.enter
    deaths = ["lr-1.0e+03-seed-1337", "lr-1.0e-02-seed-1337"]

    def die_once(ledger: Any, run: Any) -> None:
        if deaths and gpt.lr.sweep.run_name(run.lr, run.seed) == deaths[-1]:
            deaths.pop()
            raise KeyboardInterrupt
        enter(ledger, run)

    monkeypatch.setattr(gpt.lr.sweep.Ledger, "enter", die_once)
    step_once, steps = gpt.train.step_once, []

    def count(run: Path, training: Any, *rest: Any) -> None:
        steps.append(training.config.optimizer.lr)
        step_once(run, training, *rest)

    monkeypatch.setattr(gpt.train, "step_once", count)
    for code in (130, 130, 0):
        assert sweep(file, "--lrs", "1e-2,1e3").returncode == code
    assert steps.count(1e-2) == 10
    broke = next(
        r
        for r in read_metrics(Path(config.run.dir) / "tiny-sweep" / "lr-1.0e+03-seed-1337")
        if r.get("event") == "diverged"
    )
    skipped = config.train.skip_limit
    assert steps.count(1e3) == broke["step"] + 1 + skipped


@pytest.mark.usefixtures("no_pictures")
def test_a_text_that_changes_meanwhile_changes_no_run(
    make_config: ConfigMaker, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    config = make_config(**FAST)
    file = write_config(config, tmp_path)
    one = gpt.lr.sweep._train_one

    def edit_and_train(*rest: Any) -> Any:
        with Path(str(config.data.source)).open("a") as text:
            text.write(" more of it")
        return one(*rest)

    monkeypatch.setattr(gpt.lr.sweep, "_train_one", edit_and_train)
    assert sweep(file, "--lrs", "1e-3,1e-2").returncode == 0
    states = [
        json.loads(path.read_text())["data_fingerprint"]
        for path in (Path(config.run.dir) / "tiny-sweep").rglob("step-00000010/state.json")
    ]
    assert len(states) == 2
    assert len(set(states)) == 1


def test_one_run_of_many_shows_a_bar_and_warnings() -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    for stream, bar in ((Terminal(), "1/2 lr 3.0e-02"), (io.StringIO(), "")):
        with Console(5, stream=stream, title="1/2 lr 3.0e-02 ") as console:
            console.step({"step": 1, "loss": 2.5})
            console.line("saved    somewhere")
            console.line("warning: the disk is full")
        shown = stream.getvalue()
        assert bar in shown
        assert ("2.5000" in shown) == bool(bar)
        assert "saved" not in shown
        assert "warning: the disk is full\n" in shown


def test_another_config_or_other_data_is_refused(
    swept: tuple[Path, Ended], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    folder, _ = swept
    names = trained(monkeypatch)
    config = folder / "tiny.yaml"
    for change, named in (
        (("--model.n_embd", "32"), "model.n_embd: 16 there, 32 now"),
        (("--eval.max_tokens", "100"), "eval.max_tokens: 200 there, 100 now"),
        (("--schedule.min_lr", "1e-4"), "schedule.min_lr: None there, 0.0001 now"),
    ):
        refused = sweep(config, "--lrs", RATES, *change)
        assert refused.returncode == 2
        (line,) = refused.stderr.splitlines()
        assert line.startswith("error: --out: ")
        assert named in line
        assert "choose another --out" in line
    other = tmp_path / "other.txt"
    other.write_text("some other text, long enough to be split and learned from. " * 40)
    refused = sweep(config, "--lrs", RATES, "--data.source", str(other))
    assert refused.returncode == 2
    assert "other data" in refused.stderr.splitlines()[-1]
    assert names == []


@pytest.mark.usefixtures("no_pictures")
def test_another_centre_of_the_grid_is_the_same_sweep(
    swept: tuple[Path, Ended], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    folder, _ = swept
    out = tmp_path / "copy"
    shutil.copytree(folder / "runs" / "tiny-sweep", out)
    names = trained(monkeypatch)
    moved = ("--optimizer.lr", "3e-2", "--run.seed", "1338", "--log.every_steps", "2")
    done = sweep(folder / "tiny.yaml", "--lrs", "3e-2", "--out", str(out), *moved)
    assert done.returncode == 0, done.stderr
    assert names == []


@pytest.mark.usefixtures("no_pictures")
def test_rates_keep_their_ratios_in_the_runs(make_config: ConfigMaker) -> None:
    config = make_config(
        optimizer__name="muon", optimizer__adamw_lr="1e-3", schedule__min_lr="1e-3", **FAST
    )
    file = write_config(config, Path(config.run.dir).parent)
    assert sweep(file).returncode == 0
    out = Path(config.run.dir) / "tiny-sweep"
    found = {}
    for run in json.loads((out / "sweep.json").read_text())["runs"]:
        rates = [r["lr"] for r in read_metrics(out / run["run"]) if r["kind"] == "train"]
        assert rates[0] == pytest.approx(run["lr"])
        assert rates[-1] == pytest.approx(run["lr"] / 10)
        text = (out / run["run"] / "config.yaml").read_text()
        found[run["lr"]] = float(text.partition("adamw_lr: ")[2].split()[0])
    expected = [1e-3, 3.33e-3, 1e-2, 3e-2, 1e-1]
    assert sorted(found) == expected == sorted(auto_lrs(config))
    assert list(found.values()) == pytest.approx([lr / 10 for lr in found])


WRONG = {
    "empty": (("--lrs", ""), "an empty place is no rate"),
    "hole": (("--lrs", "1e-3,,1e-2"), "an empty place is no rate"),
    "text": (("--lrs", "1e-3,fast"), "'fast' is no rate"),
    "negative": (("--lrs", "1e-3,-1e-3"), "-1e-3 is not above 0"),
    "nan": (("--lrs", "nan"), "nan is not above 0"),
    "too large": (("--lrs", "1e-3,1001"), "1001 is not above 0 and at most 1000"),
    "twice": (("--lrs", "1e-3,0.001"), "0.001 is given twice"),
    "no seeds": (("--seeds", "0"), "--seeds 0"),
    "seeds in words": (("--seeds", "two"), "--seeds two"),
    "many": (("--seeds", "201"), "1,005 full runs, at most 1,000"),
    "far too many": (("--seeds", "2000000000000"), "full runs, at most 1,000"),
    "last seed": (("--run.seed", str(2**63 - 1), "--seeds", "2"), "leaves no room"),
    "auto beyond": (("--optimizer.lr", "200"), "optimizer.lr would be 2000"),
    "missing config": (("--config", "nowhere.yaml"), "nowhere.yaml does not exist"),
    "out is a file": (("--out", "words.txt"), "words.txt is a file"),
    "out is a folder": (("--out", "."), "is not a sweep"),
    "out in a file": (("--out", "words.txt/sub"), "words.txt/sub cannot be written"),
    "run.dir is a file": (("--run.dir", "words.txt"), "words.txt/tiny-sweep cannot be written"),
    "out leads nowhere": (("--out", "dangling"), "dangling cannot be written"),
    "long name": (("--out", "x" * 300), "File name too long"),
}


@pytest.mark.parametrize("case", WRONG)
def test_mistakes_are_one_line_and_leave_nothing(
    case: str, make_config: ConfigMaker, tmp_path: Path
) -> None:
    file = write_config(make_config(**FAST), tmp_path)
    (tmp_path / "dangling").symlink_to("nowhere")
    before = sorted(tmp_path.rglob("*"))
    arguments, named = WRONG[case]
    wrong = command("gpt-lr", "sweep", "--config", str(file), *arguments, cwd=tmp_path)
    assert wrong.returncode == 2, wrong.stderr
    (line,) = wrong.stderr.splitlines()
    assert line.startswith("error: ")
    assert named in line
    assert sorted(tmp_path.rglob("*")) == before


def test_a_folder_that_cannot_be_made_is_a_line(make_config: ConfigMaker, tmp_path: Path) -> None:
    """Only making it shows that: until then there is nothing whose limits could be asked."""
    file = write_config(make_config(**FAST), tmp_path)
    wrong = sweep(file, "--out", str(tmp_path / "new" / ("x" * 300)))
    assert wrong.returncode == 2
    assert "File name too long" in wrong.stderr.splitlines()[-1]
    out = tmp_path / "out"
    out.mkdir()
    (out / ".lock").symlink_to("elsewhere")
    wrong = sweep(file, "--out", str(out))
    assert wrong.returncode == 2
    assert f"{out / '.lock'} cannot be written" in wrong.stderr.splitlines()[-1]


def test_a_damaged_ledger_is_named(make_config: ConfigMaker, tmp_path: Path) -> None:
    file = write_config(make_config(**FAST), tmp_path)
    out = tmp_path / "out"
    out.mkdir()
    for text in ('{"runs": [', "{}", "[]", '{"runs": [{}], "config": {}, "data_fingerprint": ""}'):
        (out / "sweep.json").write_text(text)
        wrong = sweep(file, "--out", str(out))
        assert wrong.returncode == 2
        assert "sweep.json is damaged" in wrong.stderr


def test_a_config_that_never_trained_may_be_mended(
    make_config: ConfigMaker, tmp_path: Path
) -> None:
    """The device fails the first time, before any run; the sweep is not bound to that config."""
    config = make_config(**FAST)
    file = write_config(config, tmp_path)
    failed = sweep(file, "--lrs", "1e-2", "--train.device", "cuda:99")
    assert failed.returncode == 2
    out = Path(config.run.dir) / "tiny-sweep"
    assert not out.exists()


def test_a_failure_that_is_no_matter_of_the_rate_ends_the_sweep(
    make_config: ConfigMaker, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make_config(**FAST)
    file = write_config(config, Path(config.run.dir).parent)
    monkeypatch.setattr(gpt.train, "save", lambda *_: False)
    failed = sweep(file, "--lrs", "1e-3,1e-2")
    assert failed.returncode == 2
    assert "could not be saved" in failed.stderr.splitlines()[-1]
    out = Path(config.run.dir) / "tiny-sweep"
    assert json.loads((out / "sweep.json").read_text())["runs"] == []


def test_two_sweeps_cannot_share_a_folder(make_config: ConfigMaker, tmp_path: Path) -> None:
    file = write_config(make_config(**FAST), tmp_path)
    (tmp_path / "out").mkdir()
    with locked(tmp_path / "out" / ".lock", wait=False):
        refused = sweep(file, "--lrs", "1e-2", "--out", str(tmp_path / "out"))
    assert refused.returncode == 2
    assert "is in use by process" in refused.stderr


def test_the_picture_shows_every_run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    drawn: list[Figure] = []
    monkeypatch.setattr(Figure, "savefig", lambda self, path: drawn.append(self))
    runs = [
        make_run(lr, end, seed=s)
        for lr, end in ((1e-4, 3.0), (1e-3, 2.0), (1e-2, 2.6))
        for s in (1, 2)
    ]
    verdict = judge([*runs, broken(0.1)], 3.3)
    plot_sweep(verdict, "tiny", tmp_path / "x.png")
    (figure,) = drawn
    assert figure.get_suptitle() == "tiny: the best rate is 1.0e-03"
    left, right = figure.axes
    curves = [line for line in left.get_lines() if len(line.get_xdata()) > 1]
    assert len(curves) == 7
    assert list(curves[0].get_xdata()) == list(runs[0].train[0])
    legend = [text.get_text() for text in left.get_legend().get_texts()]
    assert legend == [
        "1.0e-04  too small",
        "1.0e-03  right",
        "1.0e-02  too large",
        "1.0e-01  diverged",
    ]
    assert right.get_xscale() == "log"
    mean, *points = right.get_lines()
    assert list(mean.get_xdata()) == [1e-4, 1e-3, 1e-2]
    assert list(mean.get_ydata()) == pytest.approx([3.0, 2.0, 2.6])
    ends = [(point.get_xdata()[0], point.get_ydata()[0]) for point in points]
    assert ends[:6] == [(run.lr, run.val_loss) for run in runs]
    assert ends[6] == (0.1, right.get_ylim()[1]), "a lost run stands at the top"
    (region,) = right.patches
    assert region.get_x() < 1e-3 < region.get_x() + region.get_width() < 1e-2


@pytest.mark.parametrize("lrs", [(1e-3,), (1e-3, 1e-2)])
def test_a_sweep_that_diverged_at_every_rate_can_be_drawn(
    lrs: tuple[float, ...], tmp_path: Path
) -> None:
    plot_sweep(judge([broken(lr) for lr in lrs], 3.3), "dead", tmp_path / "dead.png")
    assert (tmp_path / "dead.png").stat().st_size > 10_000
