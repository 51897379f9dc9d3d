"""The finder on real tiny models: what it finds, what it leaves alone, what it says."""

import itertools
import json
import math
from pathlib import Path

import pytest
import torch

from gpt.build import build_training
from gpt.checkpoint import Training
from gpt.configfile import dump_config, load_config
from gpt.data import Batches, TokenData, open_data
from gpt.device import rng_state
from gpt.errors import UserError
from gpt.lr.budget import Budget, parse_budget
from gpt.lr.find import Found, find
from gpt.lr.find_plot import plot_found
from gpt.lr.trial import LOST_NATS, Laboratory, starting_weights
from gpt.metrics import read_metrics
from gpt.rundir import run_path
from gpt.step import train_step
from gpt.train import train
from tests.conftest import ConfigMaker
from tests.test_contract import command


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
    needed = int(found.reason.split(" % of")[0].split()[-1])
    again = find(config, open_data(config, progress=False), budget_steps=needed)
    assert again.steps > 0


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
        words in found.reason for words in ("did not fall", "lies beyond", "no rate brought")
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
    assert not (tmp_path / "x.yaml").exists()
    answer = json.loads((tmp_path / "runs" / "tiny-lr-find" / "lr_find.json").read_text())
    assert answer["lr"] is None
    assert answer["interval"] is None


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--budget", "soon"], "--budget: 'soon'"),
        (["--out", "{file}"], "is a file"),
        (["--apply", "{file}"], "is there already"),
        (["--optimizer.lr", "zero"], "optimizer.lr"),
    ],
)
def test_mistakes_end_with_a_line(
    options: list[str], words: str, make_config: ConfigMaker, tmp_path: Path
) -> None:
    file = tmp_path / "tiny.yaml"
    file.write_text(dump_config(make_config()), encoding="utf-8")
    options = [option.replace("{file}", str(file)) for option in options]
    ended = command("gpt-lr", "find", "--config", str(file), *options)
    assert ended.returncode == 2
    assert words in ended.stderr
    assert "Traceback" not in ended.stderr


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
