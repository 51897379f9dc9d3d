"""`gpt-lr plan`: the inventory, the costs, the rate in three forms, the findings, and mistakes."""

import csv
import itertools
import json
import time
from collections.abc import Callable
from pathlib import Path

import matplotlib.figure
import pytest
import torch
from matplotlib import image

from gpt.cli.lr_plan import page
from gpt.config import ModelConfig
from gpt.configfile import dump_config, load_config
from gpt.data import open_data
from gpt.errors import Stopped, UserError
from gpt.lr.plan import RunPlan, make_plan
from gpt.lr.plan_files import draw_png, drawn_steps
from gpt.metrics import read_metrics
from gpt.model import GPT, count_parameters, flops_per_token, parameter_inventory
from gpt.plan import Plan
from gpt.ratepolicy import with_keys
from gpt.room import Room
from gpt.train import train
from tests.conftest import ConfigMaker
from tests.test_contract import Ended, command
from tests.test_resume import stop_at

PlanCommand = Callable[..., Ended]


@pytest.fixture
def plan_command(make_config: ConfigMaker, tmp_path: Path) -> PlanCommand:
    """Runs `gpt-lr plan` on a tiny config in this test's folder."""
    config = tmp_path / "tiny.yaml"
    config.write_text(dump_config(make_config(schedule__warmup_steps="0")), encoding="utf-8")
    return lambda *arguments: command("gpt-lr", "plan", "--config", str(config), *arguments)


ARCHITECTURES = list(
    itertools.product(
        ("learned", "rotary"),
        ("layernorm", "rmsnorm"),
        ("gelu", "swiglu", "relu2"),
        (True, False),
        (True, False),
        (None, 2),
        (None, 24),
    )
)


def test_the_inventory_is_what_is_counted_for_every_architecture():
    for position, norm, activation, bias, tie, n_kv_head, n_hidden in ARCHITECTURES:
        shape = ModelConfig(
            n_layer=2,
            n_head=4,
            n_embd=16,
            context_len=8,
            position=position,
            norm=norm,
            activation=activation,
            bias=bias,
            tie_embeddings=tie,
            n_kv_head=n_kv_head,
            n_hidden=n_hidden,
        )
        with torch.device("meta"):
            model = GPT(shape, 33)
        rows = parameter_inventory(shape, 33)
        assert sum(row.count for row in rows) == count_parameters(model), shape


def test_json_follows_the_contract(plan_command, make_config):
    data = open_data(make_config())
    ended = plan_command("--json")
    assert ended.returncode == 0, ended.stderr
    plan = json.loads(ended.stdout)
    assert set(plan) >= {
        "parameters",
        "tokens_per_step",
        "epochs",
        "memory_bytes",
        "flops_per_step",
        "findings",
    }
    config = make_config()
    assert plan["parameters"]["total"] == sum(row["count"] for row in plan["parameters"]["rows"])
    assert set(plan["parameters"]["rows"][0]) == {"name", "formula", "count"}
    assert plan["tokens_per_step"] == 6 * 16
    assert plan["epochs"] == pytest.approx(12 * 96 / data.train.n_tokens)
    assert plan["flops_per_step"] == 96 * flops_per_token(config.model, 257)
    assert plan["process_bytes"] > plan["memory_bytes"]
    assert plan["memory_bytes"] == max(
        plan["memory"]["weights"] + plan["memory"]["optimizer"] + plan["memory"]["activations"],
        sum(plan["memory"].values()) - plan["memory"]["activations"],
    )
    assert plan["seconds_per_step"] is None
    assert 0 < plan["rough_seconds"] < 3600
    assert plan["open"] == []
    assert plan["unchecked"] == []
    (group,) = plan["schedule"]["rates"].values()
    assert group["peak"] == {"step": 0, "lr": 1e-2}


def test_findings_have_their_four_fields(plan_command):
    plan = json.loads(plan_command("--json", "--optimizer.lr", "0.1").stdout)
    assert {finding["id"] for finding in plan["findings"]} == {
        "lr_far_from_size",
        "lr_for_other_optimizer",
    }
    assert all(set(f) == {"id", "message", "remedy", "source"} for f in plan["findings"])


@pytest.mark.parametrize(
    "name", ["warmup_cosine", "wsd", "linear", "constant", "hf_cosine", "chapter"]
)
def test_csv_is_the_rate_of_every_step(plan_command, make_config, tmp_path, name):
    options = ("--schedule.name", name, "--schedule.warmup_steps", "3", "--train.max_steps", "40")
    ended = plan_command("--csv", str(tmp_path / "rate.csv"), *options)
    assert ended.returncode == 0, ended.stderr
    assert (tmp_path / "rate.csv").read_text().startswith("step,lr\n0,")
    with (tmp_path / "rate.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [int(row["step"]) for row in rows] == list(range(40))
    config = make_config(schedule__name=name, schedule__warmup_steps="3", train__max_steps="40")
    schedule = Plan.from_config(config, 40)
    for row in rows:
        exact = schedule.rate(int(row["step"]), 1e-2)
        assert float(row["lr"]) == pytest.approx(exact, rel=1e-10, abs=1e-14)
    assert float(rows[3]["lr"]) == pytest.approx(1e-2, rel=1e-12)


def test_csv_has_a_column_for_each_group_of_its_own_rate(plan_command, tmp_path):
    muon = ("--optimizer.name", "muon", "--optimizer.adamw_lr", "2e-3")
    plan_command("--csv", str(tmp_path / "rate.csv"), *muon)
    with (tmp_path / "rate.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == ["step", "lr", "lr_embeddings"]
    for row in rows:
        assert float(row["lr_embeddings"]) == pytest.approx(0.2 * float(row["lr"]))


def test_a_warmup_beyond_the_run_is_shown_and_not_refused(plan_command, tmp_path):
    options = ("--schedule.warmup_steps", "20", "--csv", str(tmp_path / "rate.csv"))
    ended = plan_command("--json", *options)
    assert ended.returncode == 0, ended.stderr
    plan = json.loads(ended.stdout)
    assert [finding["id"] for finding in plan["findings"]][:2] == [
        "warmup_too_long",
        "peak_not_reached",
    ]
    rows = (tmp_path / "rate.csv").read_text().splitlines()[1:]
    assert len(rows) == 12
    assert float(rows[-1].split(",")[1]) < 1e-2
    (rates,) = plan["schedule"]["rates"].values()
    assert rates["peak"]["step"] == 11


def test_a_floor_above_the_peak_is_shown_and_not_refused(plan_command):
    ended = plan_command("--json", "--schedule.min_lr", "0.02")
    assert ended.returncode == 0, ended.stderr
    plan = json.loads(ended.stdout)
    assert plan["findings"][0]["id"] == "floor_above_peak"
    (rates,) = plan["schedule"]["rates"].values()
    assert rates["peak"] == rates["end"] == {"step": 11, "lr": 0.02}


def test_both_are_refused_by_training(make_config):
    for changes in ({"schedule__warmup_steps": "20"}, {"schedule__min_lr": "0.02"}):
        with pytest.raises(UserError):
            make_config(**changes)


def test_the_page_says_it_all(plan_command, make_config):
    open_data(make_config())
    ended = plan_command("--optimizer.lr", "0.1")
    assert ended.returncode == 0, ended.stderr
    shown = ended.stdout
    for word in (
        "V·d",
        "layers·4·d²",
        "counted in the model",
        "6 x 16 = 96 tokens",
        "epochs",
        "floating-point operations",
        "gradients",
        "optimizer",
        "activations",
        "lint     lr_far_from_size: lr 0.1 is",
        "→ --optimizer.lr",
        "source: ",
    ):
        assert word in shown, word
    assert "\x1b" not in shown
    assert "nothing looks wrong" in plan_command().stdout


def test_the_plot_fits_and_is_readable(make_config):
    plan = make_plan(make_config(schedule__warmup_steps="3", train__max_steps="40"))
    for width in (20, 40, 60, 100, 300):
        lines = list(page(plan, width))
        drawing = [line for line in lines if "┤" in line or "│" in line or "|" in line]
        assert all(len(line) <= max(width, 30) for line in drawing)
        assert bool(drawing) == (width >= 30)
        if drawing:
            assert any("0.01┤" in line or "0.01+" in line for line in drawing)


def test_a_run_whose_rate_is_always_0_is_drawn(plan_command, capfd):
    options = ("--schedule.name", "hf_cosine", "--schedule.warmup_steps", "1")
    ended = plan_command(*options, "--train.max_steps", "1")
    assert ended.returncode == 0, ended.stderr
    assert "0.01┤" in ended.stdout
    assert "plotext" not in ended.stdout + ended.stderr + "".join(capfd.readouterr())


def test_a_plain_terminal_gets_plain_characters(make_config, monkeypatch):
    class Plain:
        encoding = "ascii"

    plan = make_plan(make_config(schedule__warmup_steps="3", train__max_steps="40"))
    monkeypatch.setattr("sys.stdout", Plain())
    from gpt.cli.lr_plan import _plot

    text = "\n".join(_plot(plan, 60))
    assert text.isascii()
    assert text.count("*") > 20


def drawn(plan: RunPlan, png: Path, monkeypatch: pytest.MonkeyPatch) -> matplotlib.figure.Figure:
    kept: list[matplotlib.figure.Figure] = []
    real = matplotlib.figure.Figure.savefig

    def savefig(self: matplotlib.figure.Figure, *args: object, **kwargs: object) -> None:
        kept.append(self)
        real(self, *args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(matplotlib.figure.Figure, "savefig", savefig)
    draw_png(plan, png)
    return kept[0]


def test_the_picture_holds_the_rate_and_its_phases(make_config, tmp_path, monkeypatch):
    config = make_config(
        schedule__name="wsd",
        schedule__warmup_steps="10",
        train__max_steps="100",
        optimizer__name="muon",
        optimizer__adamw_lr="2e-3",
    )
    plan = make_plan(config)
    figure = drawn(plan, tmp_path / "rate.png", monkeypatch)
    (axes,) = figure.axes
    curves = [line for line in axes.get_lines() if len(line.get_xdata()) > 2]
    assert len(curves) == 2
    for curve, peak in zip(curves, (1e-2, 2e-3), strict=True):
        for step, rate in zip(curve.get_xdata(), curve.get_ydata(), strict=True):
            assert rate == plan.schedule.rate(int(step), peak)
    assert [text.get_text() for text in axes.texts] == ["warmup", "stable", "decay"]
    marks = sorted(float(line.get_xdata()[0]) for line in axes.get_lines() if line not in curves)
    assert marks == [10, 80]
    assert image.imread(tmp_path / "rate.png").shape[1] > 900


def test_drawn_steps_hold_the_ends_of_every_phase():
    schedule = Plan("wsd", 600_000, 2000, 0.1, 0.0, decay_steps=120_000)
    steps = list(drawn_steps(schedule))
    assert {0, 1999, 2000, 479_999, 480_000, 599_999} <= set(steps)
    assert len(steps) < 2100
    assert list(drawn_steps(Plan("constant", 1, 0, 0.1, 0.0))) == [0]


def test_text_that_is_not_tokenized_stays_so(plan_command, tmp_path):
    before = sorted(tmp_path.rglob("*"))
    ended = plan_command("--json")
    assert ended.returncode == 0, ended.stderr
    plan = json.loads(ended.stdout)
    assert plan["epochs"] is None
    assert "gpt-data build" in plan["open"][0]
    assert plan["unchecked"] == ["many_epochs", "context_longer_than_documents"]
    assert sorted(tmp_path.rglob("*")) == before
    assert "epochs open" in plan_command().stdout


def test_a_run_is_planned_before_its_text_is_there(plan_command):
    plan = json.loads(plan_command("--json", "--data.source", "not/there").stdout)
    assert plan["epochs"] is None
    assert "not/there does not exist" in plan["open"][0]


def test_length_in_epochs_needs_the_text(plan_command, make_config):
    ended = plan_command("--train.max_steps", "null", "--train.max_epochs", "2")
    assert ended.returncode == 2
    assert "gpt-data build" in ended.stderr
    with_limit = plan_command("--json", "--train.max_epochs", "2")
    assert json.loads(with_limit.stdout)["steps"] == 12
    data = open_data(make_config())
    ended = plan_command("--json", "--train.max_steps", "null", "--train.max_epochs", "2")
    assert json.loads(ended.stdout)["steps"] == -(-2 * data.train.n_tokens // 96)


def test_epochs_speak_when_the_text_is_there(plan_command, make_config):
    open_data(make_config())
    plan = json.loads(plan_command("--json", "--train.max_steps", "20000").stdout)
    assert plan["epochs"] > 40
    assert "many_epochs" in {finding["id"] for finding in plan["findings"]}


@pytest.mark.parametrize(
    ("kind", "size", "is_open"),
    [
        ("bytes", 257, False),
        ("gpt2", 50257, False),
        ("o200k_base", 200_000, False),
        ("chars", 256, True),
    ],
)
def test_the_vocabulary_before_the_text_is_read(make_config, kind, size, is_open):
    plan = make_plan(make_config(tokenizer__kind=kind))
    assert plan.vocab_size == size
    assert any("number of characters" in point for point in plan.open_points) == is_open


def test_a_device_that_is_not_here(plan_command):
    if torch.cuda.device_count() > 7:
        pytest.skip("this machine has that device")
    ended = plan_command("--json", "--train.device", "cuda:7", "--train.dtype", "bf16")
    assert ended.returncode == 0, ended.stderr
    plan = json.loads(ended.stdout)
    assert "cuda:7" in plan["open"][-1]
    assert "dtype_unsupported" in plan["unchecked"]


def test_a_step_that_does_not_fit_is_not_a_device_that_is_not_here(plan_command, monkeypatch):
    options = ("--train.device", "cpu", "--train.compile", "off", "--train.dtype", "auto")
    free = plan_command(*options).stdout
    monkeypatch.setattr("gpt.fits.room", lambda device: Room(1e5))
    shown = plan_command(*options).stdout
    assert "not in this machine" not in shown
    assert "\ndevice   cpu\n" in shown
    for line in free.splitlines():
        if line.startswith(("dtype ", "compile ", "memory ")):
            assert line in shown.splitlines()
    (line,) = [line for line in shown.splitlines() if line.startswith("refused ")]
    assert line.startswith("refused  gpt-train would not begin here: model.")
    assert "of memory, and 0 MB are free on cpu" in line
    plan = json.loads(plan_command("--json", *options).stdout)
    assert plan["warnings"] == [line]
    assert "dtype_unsupported" not in plan["unchecked"]


def test_what_speaks_against_the_machine_is_shown(plan_command, make_config, monkeypatch):
    need = make_plan(make_config()).memory.total
    monkeypatch.setattr("gpt.fits.room", lambda device: Room(1.2 * need))
    shown = plan_command("--train.device", "cpu", "--train.compile", "off").stdout
    assert "\nwarning: a step needs about " in shown
    assert "\ndevice   cpu, " in shown
    assert "refused " not in shown


def test_a_compiler_that_is_missing_is_not_a_device_that_is_not_here(plan_command, monkeypatch):
    monkeypatch.setenv("CXX", "no-compiler")
    shown = plan_command("--train.device", "cpu", "--train.compile", "on").stdout
    assert "\nrefused  gpt-train would not begin here: train.compile: on asked for" in shown
    assert "\ndevice   cpu\n" in shown
    assert "\ncompile " not in shown


def test_measured_time_is_of_real_steps(make_config, monkeypatch):
    taken = []
    real = make_plan.__globals__["train_step"]

    def train_step(*arguments: object) -> object:
        taken.append(arguments)
        time.sleep(0.5 if len(taken) <= 2 else 0.02)  # the first are slower
        return real(*arguments)

    monkeypatch.setitem(make_plan.__globals__, "train_step", train_step)
    counted = []
    plan = make_plan(make_config(), measure_steps=3, on_step=lambda: counted.append(1))
    assert len(taken) == len(counted) == 5  # two to warm up
    assert plan.seconds_per_step is not None
    assert 0.02 < plan.seconds_per_step < 0.3
    assert plan.as_json()["seconds"] == plan.seconds_per_step * 12


def test_measuring_says_the_time(plan_command):
    shown = plan_command("--measure", "1").stdout
    assert "s a step" in shown


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (("--measure", "0"), "--measure 0"),
        (("--measure", "many"), "--measure many"),
        (("--csv", "not/there/rate.csv"), "not/there/rate.csv"),
        (("--png", "not/there/rate.png"), "not/there/rate.png"),
        (("--optimizer.lr", "fast"), "optimizer.lr"),
        (("--model.n_head", "3"), "not divisible"),
        (("--schedule.name", "cosine_restarts", "--schedule.cycles", "7"), "do not fit"),
        (("--train.compile", "maybe"), "train.compile"),
    ],
)
def test_mistakes_are_one_line(plan_command, options, named):
    ended = plan_command(*options)
    assert ended.returncode == 2, ended.stderr
    errors = [line for line in ended.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert named in errors[0]
    assert "Traceback" not in ended.stderr


def test_training_prints_the_lint(make_config, tmp_path):
    config = tmp_path / "tiny.yaml"
    config.write_text(dump_config(make_config()), encoding="utf-8")
    arguments = ("--config", str(config), "--optimizer.lr", "0.1", "--optimizer.name", "adam")
    dry = command("gpt-train", *arguments, "--dry-run")
    assert "lint     coupled_decay: weight_decay 0.1 is meant for adamw" in dry.stdout
    ended = command("gpt-train", *arguments)
    assert ended.returncode == 0, ended.stderr
    lines = [line for line in ended.stderr.splitlines() if line.startswith("lint ")]
    assert [line.split()[1] for line in lines] == [
        "lr_for_other_optimizer:",
        "lr_far_from_size:",
        "coupled_decay:",
    ]
    assert all(" → --optimizer." in line for line in lines)
    quiet = command("gpt-train", "--config", str(config), "--run.name", "quiet")
    assert "lint " not in quiet.stderr


# A run that goes on at another rate --------------------------------------------------------------


@pytest.fixture
def run_command(make_config: ConfigMaker, tmp_path: Path) -> PlanCommand:
    """Runs `gpt-lr plan` on the config of a run of 12 steps that stopped at step 6."""
    config = make_config(
        model__n_layer="1",
        optimizer__name="muon",
        optimizer__adamw_lr="2e-3",
        schedule__warmup_steps="3",
        eval__every_steps="100",
    )
    with pytest.MonkeyPatch.context() as patch:
        stop_at(patch, [5])
        with pytest.raises(Stopped):
            train(config)
    saved = str(tmp_path / "runs" / "tiny" / "config.yaml")
    return lambda *arguments: command("gpt-lr", "plan", "--config", saved, *arguments)


REWARM = ("--rate", "rewarm", "--train.max_steps", "20", "--optimizer.lr", "4e-3")


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_the_csv_is_what_a_run_with_changed_rates_really_used(run_command, tmp_path):
    """To the last bit: drawn before, used, and drawn after, with three changes on the way."""
    saved = str(tmp_path / "runs" / "tiny" / "config.yaml")
    changes = (
        REWARM,
        ("--rate", "override", "--optimizer.adamw_lr", "1e-3", "--train.max_steps", "24"),
        ("--rate", "extend", "--train.max_steps", "30"),
    )
    for change in changes:
        ended = run_command(*change, "--csv", str(tmp_path / "before.csv"))
        assert ended.returncode == 0, ended.stderr
        assert command("gpt-train", "--config", saved, *change).returncode == 0
        used = [r["lr"] for r in read_metrics(tmp_path / "runs" / "tiny") if r["kind"] == "train"]
        rows = rows_of(tmp_path / "before.csv")
        assert [float(row["lr"]) for row in rows] == used
    assert len(used) == 30
    ended = run_command("--csv", str(tmp_path / "after.csv"))
    assert ended.returncode == 0, ended.stderr
    assert (tmp_path / "after.csv").read_text() == (tmp_path / "before.csv").read_text()
    assert float(rows[5]["lr_embeddings"]) == pytest.approx(0.2 * float(rows[5]["lr"]))
    assert float(rows[24]["lr_embeddings"]) == pytest.approx(0.25 * float(rows[24]["lr"]))
    words = ["changed  rewarm at step 6", "changed  override at step 20", "extend at step 24"]
    assert all(word in ended.stdout for word in words)
    assert "policy " not in ended.stdout


def test_the_page_and_its_json_say_the_policy(run_command):
    shown = run_command(*REWARM).stdout
    (line,) = [line for line in shown.splitlines() if line.startswith("policy ")]
    assert "rewarm from step 6 on: " in line
    assert " after (matrices), " in line
    assert "optimizer.lr 0.01 → 0.004" in line
    assert "first 0.001 at step 0, peak 0.01 at step 3, end 0.0004 at step 19" in shown
    assert "warmup 0-2, decay 3-5, warmup 6-8, decay 9-19" in shown
    plan = json.loads(run_command(*REWARM, "--json").stdout)
    schedule = plan["schedule"]
    assert plan["steps"] == 20
    assert schedule["policy"]["step"] == 6
    assert schedule["policy"]["policy"] == "rewarm"
    old = Plan("warmup_cosine", 12, 3, 0.1, 0.1).rate(6, 1e-2)
    assert schedule["policy"]["lr_before"] == pytest.approx(old)
    assert schedule["policy"]["lr_after"] == pytest.approx(4e-4)
    assert schedule["policy"]["changed"]["schedule.restart_step"] == [None, 6]
    assert schedule["earlier"] == []
    assert [phase["first_step"] for phase in schedule["phases"]] == [0, 3, 6, 9]


def test_a_policy_is_drawn_for_another_step(run_command, tmp_path):
    for step in (2, 6, 9, 12):
        ended = run_command(*REWARM, "--at", str(step), "--csv", str(tmp_path / "rate.csv"))
        assert ended.returncode == 0, ended.stderr
        assert f"rewarm from step {step} on" in ended.stdout
        rates = [float(row["lr"]) for row in rows_of(tmp_path / "rate.csv")]
        old = Plan("warmup_cosine", 12, 3, 0.1, 0.1)
        new = Plan("warmup_cosine", 20, 3, 0.1, 0.1, origin=step)
        expected = [old.rate(s, 1e-2) for s in range(step)]
        expected += [new.rate(s, 4e-3) for s in range(step, 20)]
        assert rates == pytest.approx(expected)


def test_an_accepted_change_that_no_checkpoint_has_is_drawn(run_command, tmp_path, monkeypatch):
    """Killed before its first save: the run goes on so, and may be changed again."""

    def killed(*arguments: object) -> None:
        raise ZeroDivisionError

    saved = str(tmp_path / "runs" / "tiny" / "config.yaml")
    monkeypatch.setattr("gpt.train.step_once", killed)
    with pytest.raises(ZeroDivisionError):
        command("gpt-train", "--config", saved, *REWARM)
    assert "policy   rewarm from step 6 on" in run_command().stdout
    longer = ("--rate", "extend", "--train.max_steps", "30")
    shown = run_command(*longer).stdout
    assert "policy   extend from step 6 on" in shown
    shown = run_command(*longer, "--at", "10").stdout
    assert "changed  rewarm at step 6" in shown
    assert "policy   extend from step 10 on" in shown
    assert "warmup 6-8, decay 9-9, decay 10-29" in shown


def test_the_picture_of_a_policy(run_command, tmp_path, monkeypatch):
    config = load_config(tmp_path / "runs" / "tiny" / "config.yaml")
    changed = with_keys(config, {"optimizer.lr": 4e-3, "train.max_steps": 20})
    plan = make_plan(changed, rate="override")
    (axes,) = drawn(plan, tmp_path / "rate.png", monkeypatch).axes
    dashed = [line for line in axes.get_lines() if line.get_linestyle() == "--"]
    assert len(dashed) == 2
    old = Plan("warmup_cosine", 12, 3, 0.1, 0.1)
    assert list(dashed[0].get_xdata()) == list(range(6, 12))
    assert list(dashed[0].get_ydata()) == [old.rate(step, 1e-2) for step in range(6, 12)]
    curve = next(line for line in axes.get_lines() if len(line.get_xdata()) == 20)
    new = Plan("warmup_cosine", 20, 3, 0.1, 0.1)
    assert list(curve.get_ydata()[6:]) == [new.rate(step, 4e-3) for step in range(6, 20)]
    for width in (40, 100):
        assert any("┤" in line for line in page(plan, width))


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (("--rate", "rewarm", "--run.name", "new"), "new holds no checkpoint"),
        (("--rate", "keep", "--run.name", "new"), "new holds no checkpoint"),
        (("--rate", "keep", "--optimizer.lr", "1e-3"), "(--rate rewarm or override)"),
        (("--rate", "extend", "--optimizer.lr", "1e-3"), "say --rate rewarm or override"),
        (("--rate", "override", "--model.n_layer", "2"), "model.n_layer: 1 there, 2 now"),
        (("--rate", "extend", "--train.max_steps", "6"), "all 6 steps of the run are done"),
        (("--at", "5"), "give --rate extend, rewarm or override too"),
        (("--rate", "keep", "--at", "5"), "give --rate extend, rewarm or override too"),
        (("--rate", "rewarm", "--at", "0"), "--at 0: "),
        (("--rate", "rewarm", "--at", "x"), "--at x: "),
        ((*REWARM, "--at", "13"), "--at 13: by the plan that it has had so far, the run ends at"),
        (("--rate", "rewarm", "--at", "12"), "cannot begin anew at step 12 of a run of 12"),
        (("--schedule.restart_step", "4"), "schedule.restart_step: step 4"),
    ],
)
def test_mistakes_with_a_policy_are_one_line(run_command, options, named):
    ended = run_command(*options)
    assert ended.returncode == 2, ended.stderr
    errors = [line for line in ended.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert named in errors[0]
    assert "Traceback" not in ended.stderr


def test_without_a_policy_a_run_in_the_way_changes_nothing(run_command):
    """The plan of a config is that of a new run, be its name taken or not."""
    taken = run_command("--optimizer.lr", "1e-3", "--json")
    free = run_command("--optimizer.lr", "1e-3", "--run.name", "free", "--json")
    assert taken.returncode == 0, taken.stderr
    assert taken.stdout == free.stdout
