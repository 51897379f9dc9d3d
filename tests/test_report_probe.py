"""Probes of real tiny runs: what they compare, what they leave alone, what they conclude."""

import hashlib
import json
import math
import shlex
import shutil
from dataclasses import replace
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import gpt.report.branches
import gpt.report.origin
from gpt.checkpoint import restore_checkpoint
from gpt.config import Config
from gpt.configfile import dump_config, load_config
from gpt.data import open_data
from gpt.device import rng_state
from gpt.errors import UserError, run_command
from gpt.files import locked
from gpt.history import history_of
from gpt.metrics import read_metrics
from gpt.plan import Plan
from gpt.report.branches import Bench, Difference, Losses, drop, mean_loss
from gpt.report.evidence import Evidence, _first_gap, _past_losses, paired, share_of_noise
from gpt.report.limits import Limit, Remedy, judge
from gpt.report.origin import is_judgeable, open_bench
from gpt.report.probe import probe
from gpt.report.remedies import Standing, next_command
from gpt.rundir import run_path
from gpt.step import NonFiniteError, train_step
from gpt.train import train
from tests.conftest import ConfigMaker, tiny_config

STEADY = {"schedule__name": "constant", "schedule__warmup_fraction": "0"}
QUIET = {"log__every_steps": "10", "eval__every_steps": "20", "eval__sample_tokens": "0"}


def trained(config: Config) -> Path:
    train(config)
    return run_path(config)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("probe")


@pytest.fixture(scope="module")
def run(folder: Path) -> Path:
    """A run of 60 steps at one rate, which no test may change."""
    changes = QUIET | STEADY | {"train__max_steps": "60", "checkpoint__every_steps": "20"}
    return trained(tiny_config(folder, **changes))


@pytest.fixture(scope="module")
def cosine(folder: Path) -> Path:
    """A run of 40 steps whose rate rises for 10 and comes down, every checkpoint kept."""
    changes = QUIET | {"run__name": "cosine", "train__max_steps": "40", "checkpoint__keep": "9"}
    changes |= {"checkpoint__every_steps": "5", "schedule__warmup_steps": "8"}
    return trained(tiny_config(folder, **changes))


@pytest.fixture
def copy(run: Path, tmp_path: Path) -> Path:
    """A copy of the run that a test may change."""
    return Path(shutil.copytree(run, tmp_path / "copy"))


@pytest.fixture
def bench(run: Path) -> Bench:
    return open_bench(run, 0.5)


def everything(folder: Path) -> dict[str, tuple[str, int]]:
    """Content and time of each file, time of each folder."""
    return {
        str(path): (
            hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "",
            path.stat().st_mtime_ns,
        )
        for path in [folder, *folder.rglob("*")]
    }


def nothing(*_: object) -> None:
    pass


def test_the_run_is_only_read_even_while_another_process_holds_it(run: Path) -> None:
    before, generators = everything(run), rng_state()["cpu"]
    with locked(run / ".lock", wait=False):
        held = everything(run)
        found = probe(run, "double", 8)
        assert everything(run) == held
    assert set(everything(run)) == set(before)
    assert torch.equal(rng_state()["cpu"], generators)
    assert found.checkpoint == run / "checkpoints" / "step-00000060"


@pytest.mark.parametrize(
    "changes",
    [
        {"model__dropout": "0.2"},
        {"optimizer__name": "muon", "train__micro_batch_size": "2"},
        {"optimizer__name": "sgd", "optimizer__lr": "0.1", "data__shuffle": "false"},
    ],
)
def test_the_unchanged_branch_is_the_run_going_on_bit_for_bit(
    changes: dict[str, str], make_config: ConfigMaker
) -> None:
    changes = changes | STEADY | {"run__name": "short", "train__max_steps": "12"}
    changes |= {"eval__every_steps": "20", "eval__sample_tokens": "0"}
    short = trained(make_config(**changes))
    longer = trained(make_config(**changes | {"run__name": "long", "train__max_steps": "20"}))
    logged = [line["loss"] for line in read_metrics(longer) if line["kind"] == "train"][12:]
    bench = open_bench(short, 0.5)
    broken_off = bench.branch([3.0] * 5, nothing, nothing)
    control = bench.branch([1.0] * 8, nothing, nothing)
    assert list(control.losses) == logged
    assert broken_off.losses[0] == control.losses[0]
    assert broken_off.losses[1:] != control.losses[1:5]
    evals = [line["val_loss"] for line in read_metrics(longer) if line["kind"] == "eval"]
    assert control.val is not None
    assert control.val.mean == pytest.approx(evals[-1], rel=1e-6)


def test_batches_that_the_run_passed_over_are_passed_over(bench: Bench, run: Path) -> None:
    plain = bench.branch([1.0] * 3, nothing, nothing)
    training = bench._training
    restore = bench.folder
    training.progress.skipped_batches = 1
    later = Bench(restore, training, bench.data, bench.plan)
    assert later.next_batch == bench.next_batch + 1
    assert plain.losses != later.branch([1.0] * 3, nothing, nothing).losses


def test_the_validation_text_is_the_runs_own_in_enough_blocks(bench: Bench, run: Path) -> None:
    losses = bench.validate(nothing)
    last = [line for line in read_metrics(run) if line["kind"] == "eval"][-1]
    assert losses.tokens.sum() == last["val_tokens"]
    assert losses.mean == pytest.approx(last["val_loss"], rel=1e-6)
    assert len(losses.tokens) == 200 // 16  # windows: fewer than the blocks wished for


def test_what_it_says_and_that_programs_can_read_it(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = probe(run, "double")
    told = capsys.readouterr()
    assert told.out == ""
    assert "double of" in told.err
    assert "3 x 20 steps and 4 evaluations, about" in told.err
    answer = json.loads(json.dumps(found.json(), allow_nan=False))
    assert answer["steps"] == 20
    assert set(answer["val_loss"]) == {"checkpoint", "control", "cooled", "double"}
    assert answer["win"]["value"] == pytest.approx(
        answer["val_loss"]["cooled"] - answer["val_loss"]["double"], abs=1e-9
    )
    assert answer["gain"]["value"] == pytest.approx(
        answer["val_loss"]["control"] - answer["val_loss"]["cooled"], abs=1e-9
    )
    assert [len(losses) for losses in answer["train_loss"].values()] == [20, 20, 20]
    assert len({losses[0] for losses in map(tuple, answer["train_loss"].values())}) == 1
    lines = found.lines()
    words = [line.split()[0] for line in lines]
    assert {"probe", "val", "gain", "double", "verdict", "next", "cost"} <= set(words)
    assert all(len(line) <= 100 for line in lines if not line.startswith("next"))
    assert found.lines()[-1].startswith("cost     60 steps and 4 evaluations")


def test_a_cooldown_has_two_branches(run: Path) -> None:
    answer = probe(run, "cooldown", 8).json()
    assert set(answer["val_loss"]) == {"checkpoint", "control", "cooled"}
    assert answer["win"] is None
    assert answer["steps"] == 8


def test_far_too_small_a_rate_and_far_too_large_a_one(make_config: ConfigMaker) -> None:
    changes = QUIET | STEADY | {"train__max_steps": "60"}
    small = trained(make_config(run__name="small", optimizer__lr="2e-4", **changes))
    assert probe(small, "cooldown").verdict.limit == "rate"
    assert probe(small, "double").verdict.limit == "rate"
    large = trained(make_config(run__name="large", optimizer__lr="0.2", **changes))
    assert probe(large, "double").verdict.limit != "rate"


def test_twice_the_rate_may_break_and_the_rate_itself_too(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    limit = 1.2

    def fragile(training, *batch):
        if training.optimizer.param_groups[0]["lr"] > limit * 1e-2:
            raise NonFiniteError("loss", math.nan, math.nan)
        return train_step(training, *batch)

    monkeypatch.setattr(gpt.report.branches, "train_step", fragile)
    found = probe(run, "double", 8)
    assert found.evidence is not None
    assert found.verdict.limit != "rate"
    assert "broke after 0 steps cooled down to 0 from twice the rate" in "\n".join(found.lines())
    json.dumps(found.json(), allow_nan=False)
    limit = 0.99
    found = probe(run, "double", 8)
    assert found.verdict.limit == "noise"
    assert "too high" in found.verdict.reasons[0]
    assert found.next.startswith("gpt-lr find")
    json.dumps(found.json(), allow_nan=False)


def test_interrupted_it_leaves_nothing(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    before, generators = everything(run), rng_state()["cpu"]
    calls = []

    def interrupted(*arguments):
        calls.append(1)
        if len(calls) > 3:
            raise KeyboardInterrupt
        return train_step(*arguments)

    monkeypatch.setattr(gpt.report.branches, "train_step", interrupted)
    assert run_command(lambda _: nothing(probe(run, "cooldown", 8)), []) == 130
    assert everything(run) == before
    assert torch.equal(rng_state()["cpu"], generators)


def message(run: Path, kind: str = "cooldown", steps: int | None = None) -> str:
    """The one line that a probe fails with."""
    with pytest.raises(UserError) as error:
        probe(run, kind, steps)
    assert len(error.value.lines) == 1
    return str(error.value)


def test_runs_that_cannot_be_probed_are_told_apart(run: Path, tmp_path: Path) -> None:
    assert "does not exist" in message(tmp_path / "none")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "trainer_state.json").write_text("{}")
    assert "no run of gpt-train" in message(tmp_path / "other")
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / "config.yaml").write_text("{}")
    assert "holds no checkpoint yet" in message(tmp_path / "new")
    assert "8 or more" in message(run, "cooldown", 3)


def keep(run: Path, *steps: int) -> None:
    """Leaves only these checkpoints."""
    for path in (run / "checkpoints").glob("step-*"):
        if int(path.name[-8:]) not in steps:
            shutil.rmtree(path)


def test_a_rate_that_has_come_down_is_probed_where_it_was_higher(
    cosine: Path, tmp_path: Path
) -> None:
    assert probe(cosine, "cooldown", 8).step == 20
    found = probe(cosine, "double", 8)
    assert (found.step, found.newest) == (30, 40)
    assert "the run stands at 40; since then its rate came down" in found.lines()[1]
    last = Path(shutil.copytree(cosine, tmp_path / "last"))
    keep(last, 5, 35, 40)
    assert "has already come down to 14% of its peak at step 35" in message(last)
    assert "--checkpoint.keep" in message(last)
    keep(last, 5)
    assert "after its warmup, which ends at step 8" in message(last)


def test_a_rate_by_the_root_of_the_steps_is_never_too_low() -> None:
    plan = Plan("inverse_sqrt", 1000, 10, 0.1, 0.0)
    assert plan.factor(900) < 0.2
    assert is_judgeable(plan, 900, 0.5)
    assert not is_judgeable(plan, 9, 0.5)


def test_the_text_must_be_the_runs_own_though_its_shards_suffice(
    make_config: ConfigMaker, text_file: Path
) -> None:
    config = make_config(**QUIET, **STEADY)
    folder = trained(config)
    text_file.write_text("quite another text " * 500)
    assert probe(folder, "cooldown", 8).step == 12
    open_data(config, progress=False)  # makes the shards anew
    assert "trained on other data" in message(folder)


def test_a_damaged_checkpoint_is_passed_over(
    copy: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    weights = copy / "checkpoints" / "step-00000060" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"x")
    assert probe(copy, "cooldown", 8).step == 40
    assert "SHA-256" in capsys.readouterr().err
    for path in (copy / "checkpoints").rglob("model.safetensors"):
        path.unlink()
    assert "is whole" in message(copy)


def test_a_checkpoint_that_is_dropped_meanwhile_is_replaced_by_another(
    copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dropped: list[Path] = []

    def dropping(checkpoint, training):
        if len(dropped) < 2:
            dropped.append(checkpoint)
            checkpoint.rename(checkpoint.with_name(f".tmp-drop-{checkpoint.name}"))
            if len(dropped) == 2:
                load_file(checkpoint / "optimizer.safetensors")
        restore_checkpoint(checkpoint, training)

    monkeypatch.setattr(gpt.report.origin, "restore_checkpoint", dropping)
    assert probe(copy, "cooldown", 8).step == 20
    assert [path.name[-2:] for path in dropped] == ["60", "40"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="the device is there")
def test_a_device_that_is_not_here_is_named(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def on_cuda(path):
        config = load_config(path)
        return config.model_copy(
            update={"train": config.train.model_copy(update={"device": "cuda:0"})}
        )

    monkeypatch.setattr(gpt.report.origin, "load_config", on_cuda)
    assert "trains on cuda:0, which this machine does not have" in message(run)


def test_a_run_that_drops_all_of_them_is_named(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpt.report.origin, "_choose", lambda *_: None)
    assert "dropped 8 checkpoints" in message(run)


def test_a_difference_is_paired_and_weighted_by_tokens() -> None:
    tokens = np.array([10.0, 10.0, 5.0])
    above = Losses(np.array([30.0, 20.0, 20.0]), tokens)
    below = Losses(np.array([29.0, 19.0, 19.5]), tokens)
    fall = drop(above, below)
    assert fall.value == pytest.approx(0.1)
    assert fall.error == pytest.approx(0, abs=1e-9)  # each block fell by as much a token
    assert mean_loss(above).value == pytest.approx(70 / 25)
    assert mean_loss(above).error > 0.3
    generator = np.random.default_rng(1)
    many = np.full(400, 8.0)
    noisy = Losses(8.0 * generator.normal(2, 0.5, 400), many)
    assert mean_loss(noisy).error == pytest.approx(0.5 / 20, rel=0.1)
    one = Losses(np.array([1.0]), np.array([2.0]))
    assert drop(one, one).error == math.inf
    assert not drop(one, one).is_above(-1.0)


def test_training_losses_are_paired_over_the_second_half() -> None:
    above, below = [9.0, 9.0, 3.0, 2.0], [1.0, 1.0, 2.9, 1.8]
    assert paired(above, below).value == pytest.approx(0.15)
    assert paired(above, below).error == pytest.approx(0.05)
    assert share_of_noise(above, below, Difference(0.3, 0.0)) == pytest.approx(0.5)
    assert math.isnan(share_of_noise(above, below, Difference(-0.1, 0.0)))


# A run at a good rate, which goes down all the time.
SOUND = Evidence(
    steps=50,
    step=1000,
    total_steps=1000,
    rate_share=1.0,
    optimizer="adamw",
    val=2.0,
    drift=Difference(0.01, 0.002),
    total=Difference(0.05, 0.002),
    gain=Difference(0.04, 0.006),
    noise_share=0.8,
    win=Difference(-0.006, 0.002),
    train_win=Difference(-0.006, 0.002),
    gap=Difference(0.01, 0.01),
    epochs=0.5,
    rise=0.0,
    fall=0.03,
)
OVER = {"gap": Difference(0.3, 0.02), "epochs": 5.0}
FLAT = {"total": Difference(0.012, 0.002), "fall": 0.004}


@pytest.mark.parametrize(
    ("changes", "limit", "said"),
    [
        ({}, "noise", "higher"),
        ({"win": None, "train_win": None}, "noise", "80% of what"),
        ({"win": Difference(-0.001, 0.002)}, "noise", "no difference"),
        ({"win": Difference(-math.inf, math.inf)}, "noise", "breaks"),
        ({"optimizer": "sgd"}, "noise", "With SGD"),
        ({"step": 5000}, "noise", "so short"),
        ({"win": Difference(0.006, 0.002), "noise_share": 0.1}, "rate", "lower"),
        ({"win": Difference(0.006, 0.002)}, "rate", "noise as well"),
        ({"win": Difference(0.006, 0.002), "total_steps": 9000}, "rate", "for now"),
        ({"win": Difference(0.003, 0.002), "noise_share": 0.1}, "not_decided", "More steps"),
        ({"win": None, "noise_share": 0.2}, "not_decided", "--probe double"),
        (
            {"win": None, "noise_share": -1.0, "gain": Difference(-0.02, 0.002)},
            "rate",
            "costs 0.0200",
        ),
        ({"total": Difference(-0.01, 0.01), "noise_share": math.nan}, "not_decided", "not"),
        ({"gain": Difference(0.01, 0.006)}, "noise", "higher"),
        ({"gain": Difference(0.01, 0.006), "win": None}, "not_decided", "not sure"),
        ({"noise_share": 0.4}, "noise", "40% of what"),
        ({"noise_share": 0.4, "win": Difference(-0.003, 0.002)}, "not_decided", "no difference"),
        ({"drift": Difference(0.3, 0.01), "win": Difference(0.1, 0.01)}, "not_decided", "hides"),
        (FLAT, "capacity", "fell by 0.4%"),
        (FLAT | {"fall": None}, "noise", ""),
        (FLAT | {"rate_share": 0.3}, "noise", ""),
        (FLAT | {"win": None}, "noise", ""),
        (FLAT | {"optimizer": "sgd"}, "noise", "With SGD"),
        (OVER, "data", "5.0 passes"),
        (OVER | {"epochs": 0.9}, "noise", ""),
        (OVER | {"gap": Difference(0.3, 0.2)}, "noise", ""),
        ({"gap": Difference(0.04, 0.01), "epochs": 5.0, "rise": 0.05}, "data", "it rises"),
    ],
)
def test_what_speaks_for_which_limit(changes: dict[str, object], limit: Limit, said: str) -> None:
    verdict = judge(replace(SOUND, **changes))
    assert verdict.limit == limit
    assert said in " ".join(verdict.reasons)


@pytest.mark.parametrize(
    "schedule",
    [
        {"schedule__name": "constant"},
        {"schedule__name": "inverse_sqrt", "schedule__warmup_steps": "2"},
        {"schedule__name": "chapter", "schedule__cosine_steps": "99999"},
        {"schedule__name": "warmup_cosine"},
        {"schedule__name": "constant", "train__max_steps": "null", "train__max_epochs": "4"},
    ],
)
@pytest.mark.parametrize("remedy", get_args(Remedy))
@pytest.mark.parametrize("newest", [8, 1000])
def test_the_next_command_is_one_that_can_be_typed(
    schedule: dict[str, str], remedy: Remedy, newest: int, make_config: ConfigMaker, tmp_path: Path
) -> None:
    changes = {"train__max_steps": "1000", "optimizer__name": "muon", "optimizer__adamw_lr": "1e-3"}
    config = make_config(**changes | schedule)
    plan = Plan.from_config(config, config.total_steps(20_000))
    words = shlex.split(next_command(Standing(tmp_path, config, plan, newest), remedy, 20))
    assert words[0] in ("gpt-train", "gpt-lr", "gpt-report")
    if words[0] != "gpt-train":
        return
    given = [(key[2:], value) for key, value in zip(words[3::2], words[4::2], strict=True)]
    changed = [pair for pair in given if pair[0] != "rate"]
    (tmp_path / "config.yaml").write_text(dump_config(config))
    after = load_config(tmp_path / "config.yaml", changed)
    Plan.from_config(after, after.total_steps(20_000))
    goes_on = Path(after.run.dir) / after.run.name == tmp_path
    assert goes_on != (remedy in ("larger", "regularise"))
    if remedy == "decay" and schedule.get("schedule__name") != "warmup_cosine":
        assert ("rate", "rewarm") in given
        assert after.total_steps(20_000) > newest


def test_what_lies_between_both_texts_from_the_start_is_no_overfitting() -> None:
    steps = range(10, 101, 10)
    train = [
        {"kind": "train", "step": s, "epoch": s / 50, "loss": 2.0 if s < 50 else 1.5} for s in steps
    ]
    evals = [{"kind": "eval", "step": s, "val_loss": 2.3} for s in (40, 80)]
    history = history_of([*train, *evals])
    assert _first_gap(history) == pytest.approx(0.3)
    assert _first_gap(history_of(train)) == 0.0
    assert _past_losses(history, 100) == (2.3, None)
    assert _past_losses(history, 80) == (2.3, 2.3)
