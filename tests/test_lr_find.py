"""The finder on real tiny models: what it finds, what it leaves alone, what it says."""

import errno
import itertools
import json
import math
import os
import re
import shlex
from pathlib import Path

import pytest
import torch

import gpt.lr.find
import gpt.lr.find_plot
from gpt.build import build_training
from gpt.checkpoint import Training
from gpt.config import Config
from gpt.configfile import dump_config, load_config
from gpt.data import Batches, TokenData, open_data
from gpt.device import rng_state
from gpt.errors import UserError
from gpt.lr.budget import Budget, parse_budget
from gpt.lr.find import Found, RampRun, find
from gpt.lr.find_plot import plot_found
from gpt.lr.trial import LOST_NATS, Laboratory, Trial, starting_weights
from gpt.metrics import read_metrics
from gpt.rundir import run_path
from gpt.step import train_step
from gpt.train import train
from tests.conftest import ConfigMaker
from tests.test_contract import Ended, command


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Found:
    """One search, which several tests look at."""
    from tests.conftest import tiny_config

    config = tiny_config(tmp_path_factory.mktemp("find"), train__max_steps="200")
    return find(config, open_data(config, progress=False), budget_steps=160)


def test_it_finds_a_rate_that_trains_far_better_than_ones_far_off(
    found: Found, make_config: ConfigMaker
) -> None:
    config = make_config(train__max_steps="200")
    assert found.lr is not None
    laboratory = Laboratory(config, open_data(config, progress=False))
    at_pick, far_below, far_above = (
        laboratory.run(lr, 200, 5).loss for lr in (found.lr, found.lr / 30, found.lr * 100)
    )
    assert at_pick < far_below - 0.1
    assert at_pick < far_above - 0.1


def test_it_stays_within_its_budget_and_counts_what_it_spent(found: Found) -> None:
    assert 0 < found.steps <= 160 * 1.02
    assert found.share_of_training == found.steps / 200
    assert found.seconds > 0


def test_the_interval_holds_the_pick(found: Found) -> None:
    assert found.lr is not None
    assert found.interval is not None
    assert found.interval[0] < found.lr < found.interval[1]


def test_the_answer_holds_all_that_was_seen(found: Found) -> None:
    answer = json.loads(json.dumps(found.answer(), allow_nan=False))
    contract = "lr interval reason bracket trials seconds share_of_training"
    assert set(contract.split()) <= set(answer)
    assert {"lr", "loss", "seed"} <= set(answer["bracket"][0])
    assert {"lr", "loss", "seed", "steps"} <= set(answer["trials"][0])
    assert len(answer["bracket"]) == sum(len(ramp.losses) for ramp in found.ramps)
    assert len(answer["trials"]) == sum(len(trials) for _, trials in found.rounds)
    rates = [point["lr"] for point in answer["bracket"] if point["seed"] == found.ramps[0].seed]
    assert rates == sorted(rates)
    assert len({trial["lr"] for trial in answer["trials"]}) >= 3


def test_the_same_search_twice_gives_the_same_answer(make_config: ConfigMaker) -> None:
    config = make_config(train__max_steps="100")
    data = open_data(config, progress=False)
    first, second = (find(config, data, budget_steps=70).answer() for _ in range(2))
    first.pop("seconds"), second.pop("seconds")
    assert first == second


def test_too_small_a_budget_is_no_answer_and_says_what_it_takes(make_config: ConfigMaker) -> None:
    config = make_config(train__max_steps="100")
    found = find(config, open_data(config, progress=False), budget_steps=10)
    assert found.lr is None
    assert found.steps == 0
    assert "10 steps are too few" in found.reason
    assert found.lines()[0].endswith("no answer")


@pytest.mark.parametrize(
    "changes",
    [
        {"train__max_steps": "100", "train__batch_size": "1"},
        {"train__max_steps": "100"},
        {"train__max_steps": "7"},
        {"train__max_steps": "6000", "train__batch_size": "1", "eval__max_tokens": "1000"},
    ],
)
def test_the_budget_that_is_named_is_the_least_that_works(
    changes: dict[str, str], make_config: ConfigMaker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In whole steps, and as the percentage that a user would type."""
    config = make_config(**changes)
    data = open_data(config, progress=False)
    monkeypatch.setattr(Laboratory, "ramp", begun)
    reason = find(config, data, budget_steps=10).reason
    named = re.search(r"the least is (\d+); give --budget (\d+%)", reason)
    assert named, reason
    assert find(config, data, budget_steps=int(named[1]) - 1).reason == reason.replace(
        "10 steps", f"{int(named[1]) - 1} steps"
    )
    typed = parse_budget(named[2]).steps(config, data)
    for budget in (int(named[1]), int(named[1]) + 0.7, typed):
        with pytest.raises(BegunError):
            find(config, data, budget_steps=budget)


class BegunError(Exception):
    """A search goes to work."""


def begun(*arguments: object, **more: object) -> None:
    raise BegunError


def test_a_run_of_three_steps_cannot_be_searched(make_config: ConfigMaker) -> None:
    config = make_config(train__max_steps="3")
    found = find(config, open_data(config, progress=False), budget_steps=10_000)
    assert found.reason == "a run of 3 steps is too short to search; train for 4 or more"
    assert found.steps == 0


def test_a_ramp_that_costs_more_than_planned_is_no_answer(
    make_config: ConfigMaker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As with fp16, whose steps count where they are skipped."""
    ramp = Laboratory.ramp

    def dear(self: Laboratory, low: float, high: float, steps: int, seed: int) -> object:
        self._spend(32)
        return ramp(self, low, high, steps, seed)

    monkeypatch.setattr(Laboratory, "ramp", dear)
    config = make_config(train__max_steps="100")
    found = find(config, open_data(config, progress=False), budget_steps=50)
    assert found.lr is None
    assert "the ramp took 44 steps" in found.reason
    assert "the 6 that are left are too few" in found.reason
    assert "give a larger --budget" in found.reason


@pytest.mark.parametrize("spends", [True, False])
@pytest.mark.parametrize("side", ["below", "above"])
def test_a_best_rate_outside_of_what_was_tried_is_told_by_its_side(
    side: str, spends: bool, make_config: ConfigMaker, monkeypatch: pytest.MonkeyPatch
) -> None:
    def slope(self: Laboratory, lr: float, steps: int, seed: int) -> Trial:
        self._spend(100 if spends else 0)
        return Trial(lr, seed, (40.0,), 20 + (1 if side == "below" else -1) * math.log2(lr))

    monkeypatch.setattr(Laboratory, "run", slope)
    config = make_config(train__max_steps="100")
    found = find(config, open_data(config, progress=False), budget_steps=60)
    assert found.lr is None
    tried = {trial.lr for trial in found.rounds[-1][1]}
    end = min(tried) if side == "below" else max(tried)
    assert f"{end:.2e}; the best rate lies {side} it" in found.reason
    assert ("give a larger --budget" in found.reason) == spends


def test_text_that_teaches_nothing_is_no_answer(make_config: ConfigMaker, tmp_path: Path) -> None:
    """Random bytes, all equally likely, known from the start: no rate is better than another."""
    noise = tmp_path / "noise.txt"
    generator = torch.Generator().manual_seed(0)
    letters = torch.randint(0, 64, (60_000,), generator=generator).tolist()
    noise.write_text("".join(chr(48 + letter) for letter in letters), encoding="utf-8")
    config = make_config(data__source=str(noise), tokenizer__kind="chars", train__max_steps="200")
    found = find(config, open_data(config, progress=False), budget_steps=100)
    assert found.lr is None
    assert any(
        words in found.reason for words in ("did not fall", "best rate lies", "no rate brought")
    )


def frozen(training: Training) -> list[torch.Tensor]:
    """Every tensor and number of a training, as tensors."""
    state = [t.clone() for t in training.model.state_dict().values()]
    for values in training.optimizer.state_dict()["state"].values():
        state += [torch.as_tensor(value).clone() for value in values.values()]
    state += [torch.tensor(group["lr"]) for group in training.optimizer.param_groups]
    state += [p.grad.clone() for p in training.model.parameters() if p.grad is not None]
    state.append(torch.tensor(training.scheduler.state_dict()["last_epoch"]))
    return [*state, *rng_state().values()]


@pytest.mark.parametrize("optimizer", ["adamw", "muon", "sgd"])
def test_a_training_is_bit_for_bit_what_it_was(
    optimizer: str, make_config: ConfigMaker, capsys: pytest.CaptureFixture[str]
) -> None:
    """Weights, gradients, optimizer, schedule, generators, mode; and it goes on as before."""
    config = make_config(
        optimizer__name=optimizer,
        train__max_steps="60",
        model__dropout="0.1",
        train__micro_batch_size="2",
        **({"optimizer__adamw_lr": "3e-3"} if optimizer == "muon" else {}),
    )
    data = open_data(config, progress=False)
    batches = Batches(data.train, config.model.context_len, config.train.batch_size, 1)

    def advance(training: Training, steps: range) -> None:
        for step in steps:
            train_step(training, *batches.batch(step))

    training, _ = build_training(config, data)
    advance(training, range(3))
    before, mode = frozen(training), training.model.training
    found = find(config, data, budget_steps=50, weights=starting_weights(training.model))
    assert found.steps > 30
    for old, new in zip(before, frozen(training), strict=True):
        assert torch.equal(old, new)
    assert training.model.training is mode
    advance(training, range(3, 6))
    twin, _ = build_training(config, data)
    advance(twin, range(6))
    for old, new in zip(frozen(twin), frozen(training), strict=True):
        assert torch.equal(old, new)


def test_given_weights_are_where_the_trials_begin(
    make_config: ConfigMaker, capsys: pytest.CaptureFixture[str]
) -> None:
    config = make_config(train__max_steps="30")
    data: TokenData = open_data(config, progress=False)
    training, _ = build_training(config, data)
    batches = Batches(data.train, config.model.context_len, config.train.batch_size, 1)
    for step in range(25):
        train_step(training, *batches.batch(step))
    fresh = Laboratory(config, data).run(1e-6, 3, 1)
    trained = Laboratory(config, data, weights=starting_weights(training.model)).run(1e-6, 3, 1)
    assert trained.loss < fresh.loss - 0.3


def test_a_ramp_multiplies_every_groups_rate_alike(make_config: ConfigMaker) -> None:
    config = make_config(optimizer__name="muon", optimizer__lr="1e-2", optimizer__adamw_lr="2.5e-3")
    laboratory = Laboratory(config, open_data(config, progress=False))
    training = laboratory._training(config, 1)
    rates = {group["name"]: group["lr"] for group in training.optimizer.param_groups}
    assert rates["matrices"] == pytest.approx(4 * rates["embeddings"])
    rates_seen, trial = laboratory.ramp(1e-5, 1e-1, 9, 1)
    assert rates_seen[0] == pytest.approx(1e-5)
    assert rates_seen[-1] == pytest.approx(1e-1)
    assert len(trial.losses) == 9
    ratios = [b / a for a, b in itertools.pairwise(rates_seen)]
    assert max(ratios) == pytest.approx(min(ratios))


@pytest.mark.parametrize("shuffle", [True, False])
def test_a_trial_is_the_run_itself_when_it_is_as_long(
    shuffle: bool, make_config: ConfigMaker, capsys: pytest.CaptureFixture[str]
) -> None:
    """Same seed, same length: the losses of the training that gpt-train does."""
    config = make_config(data__shuffle=str(shuffle).lower(), log__every_steps="1")
    train(config)
    log = read_metrics(run_path(config))
    losses = [line["loss"] for line in log if line["kind"] == "train"]
    trial = Laboratory(config, open_data(config)).run(config.optimizer.lr, len(losses), 1337)
    assert list(trial.losses) == losses


def test_a_trial_that_breaks_is_infinite(make_config: ConfigMaker) -> None:
    config = make_config(optimizer__name="sgd", train__grad_clip="0", optimizer__weight_decay="0")
    laboratory = Laboratory(config, open_data(config, progress=False))
    trial = laboratory.run(1e3, 12, 1)
    assert trial.loss == math.inf or trial.loss > 10
    assert laboratory.ramp(1e2, 1e3, 12, 1)[1].losses[-1] > trial.losses[0] + LOST_NATS


def test_the_cost_counts_steps_and_a_third_for_evaluated_tokens(make_config: ConfigMaker) -> None:
    config = make_config()
    laboratory = Laboratory(config, open_data(config, progress=False))
    spent: list[float] = []
    laboratory._on_cost = spent.append
    laboratory.run(1e-3, 4, 1)
    tokens = laboratory.eval_tokens(4)
    assert tokens <= 200  # eval.max_tokens
    assert laboratory.steps == pytest.approx(4 + tokens / config.tokens_per_step / 3)
    assert sum(spent) == pytest.approx(laboratory.steps) == laboratory.cost(4)


@pytest.mark.parametrize(
    ("text", "budget"),
    [
        ("15%", Budget(share=0.15)),
        ("0.15", Budget(share=0.15)),
        (" 2 ", Budget(share=2.0)),
        ("90s", Budget(seconds=90.0)),
        ("5min", Budget(seconds=300.0)),
    ],
)
def test_budgets_are_shares_or_times(text: str, budget: Budget) -> None:
    assert parse_budget(text) == budget


@pytest.mark.parametrize(
    "text", ["", "0", "-1", "0%", "nan", "inf", "fast", "5h", "s", "%", "1e999"]
)
def test_nonsense_budgets_are_named(text: str) -> None:
    with pytest.raises(UserError, match="--budget"):
        parse_budget(text)


def test_a_budget_in_seconds_becomes_steps(make_config: ConfigMaker) -> None:
    config = make_config()
    data = open_data(config, progress=False)
    few, many = (Budget(seconds=s).steps(config, data) for s in (0.5, 50.0))
    assert 0 <= few < many
    assert Budget(share=0.5).steps(config, data) == 6


def test_the_picture_shows_what_was_seen(found: Found, tmp_path: Path) -> None:
    png = tmp_path / "deep" / "find.png"
    plot_found(found, "tiny", png)
    assert png.read_bytes().startswith(b"\x89PNG")
    nothing = tmp_path / "nothing.png"
    plot_found(Found(reason="too short", total_steps=10), "tiny", nothing)
    assert 5_000 < nothing.stat().st_size < png.stat().st_size
    plot_found(Found(ramps=[RampRun(1, [1e-3, 1e-2], [5.0, 5.0])], total_steps=10), "level", png)


def test_the_command(make_config: ConfigMaker, tmp_path: Path) -> None:
    file = tmp_path / "tiny.yaml"
    file.write_text(dump_config(make_config(train__max_steps="150")), encoding="utf-8")
    ended = command("gpt-lr", "find", "--config", str(file), "--budget", "60%", "--json", "--apply")
    assert ended.returncode == 0, ended.stderr
    answer = json.loads(ended.stdout)
    folder = tmp_path / "runs" / "tiny-lr-find"
    assert json.loads((folder / "lr_find.json").read_text(encoding="utf-8")) == answer
    assert (folder / "lr_find.png").exists()
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["tiny-lr-find"]
    applied = load_config(tmp_path / "tiny-found.yaml")
    assert applied.optimizer.lr == answer["lr"]
    assert f"gpt-train --config {tmp_path / 'tiny-found.yaml'}" in ended.stderr
    again = command("gpt-lr", "find", "--config", str(file), "--apply")
    assert again.returncode == 2
    assert "is there already" in again.stderr


def test_no_answer_is_a_plain_end(make_config: ConfigMaker, tmp_path: Path) -> None:
    file = tmp_path / "tiny.yaml"
    file.write_text(dump_config(make_config()), encoding="utf-8")
    ended = command("gpt-lr", "find", "--config", str(file), "--apply", str(tmp_path / "x.yaml"))
    assert ended.returncode == 0
    assert "no answer" in ended.stdout
    assert "not applied: no answer" in ended.stderr.splitlines()
    assert not (tmp_path / "x.yaml").exists()
    answer = json.loads((tmp_path / "runs" / "tiny-lr-find" / "lr_find.json").read_text())
    assert answer["lr"] is None
    assert answer["interval"] is None


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--budget", "soon"], "--budget: 'soon'"),
        (["--out", "{file}"], "cannot be made a folder: File exists"),
        (["--out", "{file}/sub"], "cannot be made a folder: Not a directory"),
        (["--out", "{folder}/dangling"], "cannot be made a folder: File exists"),
        (["--out", f"{{folder}}/new/{'x' * 300}"], "cannot be made a folder: File name too long"),
        (["--run.dir", "{file}"], "cannot be made a folder: Not a directory"),
        (["--apply", "{folder}/dangling"], "is there already"),
        (["--apply", "{file}/x.yaml"], "does not exist; make it first"),
        (["--apply", "{folder}/" + "x" * 300], "may have 200 bytes at most"),
        (["--apply", f"{{folder}}/{'x' * 300}/x.yaml"], "File name too long"),
        (["--apply", "{file}"], "is there already"),
        (["--optimizer.lr", "zero"], "optimizer.lr"),
    ],
)
def test_mistakes_end_with_a_line_and_leave_nothing(
    options: list[str],
    words: str,
    make_config: ConfigMaker,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    file = tmp_path / "tiny.yaml"
    file.write_text(dump_config(make_config()), encoding="utf-8")
    (tmp_path / "dangling").symlink_to("nowhere")
    before = sorted(tmp_path.rglob("*"))
    monkeypatch.setattr(gpt.lr.find, "find", begun)
    options = [o.replace("{file}", str(file)).replace("{folder}", str(tmp_path)) for o in options]
    ended = command("gpt-lr", "find", "--config", str(file), *options)
    assert ended.returncode == 2
    (line,) = ended.stderr.splitlines()
    assert line.startswith("error: ")
    assert words in line
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("option", ["--out", "--apply"])
def test_a_folder_that_takes_nothing_is_found_before_the_search(
    option: str, make_config: ConfigMaker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, locked = tmp_path / "tiny.yaml", tmp_path / "locked"
    file.write_text(dump_config(make_config()), encoding="utf-8")
    locked.mkdir()
    monkeypatch.setattr(gpt.lr.find, "find", begun)
    access = os.access  # the tests' own user may write everywhere
    monkeypatch.setattr(os, "access", lambda path, mode: path != locked and access(path, mode))
    wish = locked if option == "--out" else locked / "x.yaml"
    ended = command("gpt-lr", "find", "--config", str(file), option, str(wish))
    assert ended.returncode == 2
    (line,) = ended.stderr.splitlines()
    assert line.startswith(f"error: {option}: {locked} cannot be written")


@pytest.fixture
def answered(monkeypatch: pytest.MonkeyPatch) -> list[Config]:
    """Searches end at once with 0.02; the configs that were searched."""
    searched = []

    def at_once(config: Config, *arguments: object, **more: object) -> Found:
        searched.append(config)
        return Found(lr=0.02, interval=(0.01, 0.04), reason="so it is", total_steps=12)

    monkeypatch.setattr(gpt.lr.find, "find", at_once)
    return searched


def suggested(ended: Ended) -> list[str]:
    """The command that is suggested, as words."""
    assert ended.returncode == 0, ended.stderr
    return shlex.split(ended.stderr.splitlines()[-1].removeprefix("train "))


def test_what_is_suggested_runs_where_the_run_is_there_already(
    answered: list[Config], make_config: ConfigMaker, tmp_path: Path
) -> None:
    config = make_config()
    file = tmp_path / "tiny.yaml"
    file.write_text(dump_config(config), encoding="utf-8")
    find_it = ("gpt-lr", "find", "--config", str(file), "--run.seed", "3")
    assert "--run.name" not in suggested(command(*find_it))
    for name, free in (("tiny", "tiny-found"), ("tiny-found", "tiny-found-2")):
        (tmp_path / "runs" / name).mkdir(parents=True)
        (tmp_path / "runs" / name / "config.yaml").write_text(dump_config(config))
        words = suggested(command(*find_it))
        assert words[-2:] == ["--run.name", free]
        begins = command(*words, "--dry-run")
        assert begins.returncode == 0, begins.stderr
        applied = tmp_path / f"{free}.yaml"
        words = suggested(command(*find_it, "--apply", str(applied)))
        assert words == ["gpt-train", "--config", str(applied)]
        assert load_config(applied).run.name == free
        begins = command(*words, "--dry-run")
        assert begins.returncode == 0, begins.stderr
    assert [path.name for path in (tmp_path / "runs").glob("*-lr-find")] == ["tiny-lr-find"]


def test_a_long_name_is_cut_where_a_character_ends(
    answered: list[Config], make_config: ConfigMaker, tmp_path: Path
) -> None:
    config = make_config(run__name="x" + "é" * 99)
    file = tmp_path / "tiny.yaml"
    file.write_text(dump_config(config), encoding="utf-8")
    (tmp_path / "runs" / config.run.name).mkdir(parents=True)
    (tmp_path / "runs" / config.run.name / "config.yaml").write_text(dump_config(config))
    words = suggested(command("gpt-lr", "find", "--config", str(file)))
    assert words[-1] == "x" + "é" * 96 + "-found"
    assert command(*words, "--dry-run").returncode == 0


@pytest.mark.parametrize("ngram", ["1", "3"])
def test_where_the_pick_is_known_to_be_off_it_says_so(
    ngram: str, answered: list[Config], make_config: ConfigMaker, tmp_path: Path
) -> None:
    file = tmp_path / "tiny.yaml"
    file.write_text(dump_config(make_config(model__ngram=ngram)), encoding="utf-8")
    told = command("gpt-lr", "find", "--config", str(file)).stderr
    assert ("short runs want less rate than long ones" in told) == (ngram == "3")


def test_a_rewarmed_runs_config_is_searched_as_a_new_run(
    answered: list[Config], make_config: ConfigMaker, tmp_path: Path
) -> None:
    file = tmp_path / "tiny.yaml"
    file.write_text(dump_config(make_config(schedule__restart_step="9")), encoding="utf-8")
    find_it = ("gpt-lr", "find", "--config", str(file))
    ended = command(*find_it)
    assert "note     schedule.restart_step 9 is left out" in ended.stderr
    assert answered[0].schedule.restart_step is None
    words = suggested(ended)
    assert words[-2:] == ["--schedule.restart_step", "null"]
    assert command(*words, "--dry-run").returncode == 0
    command(*find_it, "--apply")
    applied = tmp_path / "tiny-found.yaml"
    assert load_config(applied).schedule.restart_step is None
    assert "# schedule.restart_step 9 is left out" in applied.read_text(encoding="utf-8")


@pytest.mark.usefixtures("answered")
@pytest.mark.parametrize("options", [(), ("--json",)])
def test_an_answer_that_cannot_be_written_is_printed(
    options: tuple[str, ...],
    make_config: ConfigMaker,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def full(*arguments: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(gpt.lr.find_plot, "plot_found", full)
    file = tmp_path / "tiny.yaml"
    file.write_text(dump_config(make_config()), encoding="utf-8")
    ended = command("gpt-lr", "find", "--config", str(file), *options)
    assert ended.returncode == 2
    assert "No space left on device; name another folder" in ended.stderr
    assert ("0.02" if options else "lr       0.02\n") in ended.stdout


def test_an_interrupted_search_leaves_nothing(
    make_config: ConfigMaker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "tiny.yaml"
    file.write_text(dump_config(make_config(train__max_steps="150")), encoding="utf-8")
    ramps = []

    def interrupted(self: Laboratory, lr: float, steps: int, seed: int) -> None:
        ramps.append(self.steps)
        raise KeyboardInterrupt

    monkeypatch.setattr(Laboratory, "run", interrupted)
    ended = command("gpt-lr", "find", "--config", str(file), "--apply", "--budget", "60%")
    assert ended.returncode == 130
    assert ramps[0] > 0  # it was at work
    assert not (tmp_path / "runs").exists()
    assert not (tmp_path / "tiny-found.yaml").exists()
