"""The rate where a run goes on: what each policy takes, and that interrupted = uninterrupted."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import gpt.train
from gpt.config import Config
from gpt.configfile import dump_config, load_config
from gpt.errors import Stopped, UserError
from gpt.metrics import read_metrics
from gpt.plan import Plan
from gpt.ratepolicy import (
    POLICIES,
    KeyChange,
    RateChange,
    RatePolicy,
    offer,
    read_record,
    refused_changes,
    with_keys,
    write_record,
)
from gpt.train import train
from tests.conftest import ConfigMaker
from tests.test_contract import command
from tests.test_resume import final_state, logged, stop_at

Maker = Callable[..., Config]
QUICK = {
    "model__n_layer": "1",
    "model__dropout": "0.1",
    "schedule__warmup_steps": "2",
    "eval__every_steps": "100",
    "eval__sample_tokens": "0",
}
STOP = 6


@pytest.fixture
def quick(make_config: ConfigMaker) -> Maker:
    """A run of 12 steps that saves every 4; arguments change its values."""
    return lambda **changes: make_config(**(QUICK | changes))


def run_of(config: Config) -> Path:
    return Path(config.run.dir) / config.run.name


def own(config: Config, name: str = "") -> Config:
    """What `gpt-train --config runs/NAME/config.yaml` reads."""
    run = Path(config.run.dir) / (name or config.run.name)
    return load_config(run / "config.yaml")


def stopped_run(config: Config, monkeypatch: pytest.MonkeyPatch, step: int = STOP) -> None:
    """Trains to the end of a step, and saves there."""
    stop_at(monkeypatch, [step - 1])
    with pytest.raises(Stopped):
        train(config)
    monkeypatch.undo()


def copied(config: Config, name: str) -> Config:
    """The same run under another name."""
    other = config.model_copy(update={"run": config.run.model_copy(update={"name": name})})
    shutil.copytree(run_of(config), run_of(other))
    (run_of(other) / "config.yaml").write_text(dump_config(other), encoding="utf-8")
    return other


def damage(checkpoint: Path) -> None:
    weights = bytearray((checkpoint / "model.safetensors").read_bytes())
    weights[-5] ^= 1
    (checkpoint / "model.safetensors").write_bytes(weights)


def rates(config: Config) -> list[Any]:
    return [record["lr"] for record in logged(config) if record["kind"] == "train"]


def policy_events(config: Config) -> list[dict[str, Any]]:
    return [r for r in read_metrics(run_of(config)) if r.get("event") == "rate_policy"]


def killed_at(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    """The process dies while the step is in the making, without a save."""
    step_once = gpt.train.step_once

    def step_or_die(run, training, *rest):  # type: ignore[no-untyped-def]
        if training.progress.step == step:
            raise ZeroDivisionError
        step_once(run, training, *rest)

    monkeypatch.setattr(gpt.train, "step_once", step_or_die)


# Interrupted = uninterrupted, after each policy --------------------------------------------------

MUON = {"optimizer__name": "muon", "model__n_embd": "32", "model__mup_base_width": "16"}
CHAPTER = {"schedule__name": "chapter", "schedule__min_lr": "1e-3", "schedule__cosine_steps": "4"}
CASES: dict[str, tuple[RatePolicy, dict[str, str], dict[str, str]]] = {
    "longer": ("extend", {}, {"train__max_steps": "16"}),
    "in tokens": ("extend", {}, {"train__max_steps": "null", "train__max_tokens": "1500"}),
    "longer, wsd": ("extend", {"schedule__name": "wsd"}, {"train__max_steps": "16"}),
    "anew": ("rewarm", {}, {}),
    "anew, otherwise": (
        "rewarm",
        {"optimizer__name": "adam", "optimizer__weight_decay": "0"},
        {
            "optimizer__lr": "3e-3",
            "schedule__name": "wsd",
            "schedule__decay_fraction": "0.5",
            "train__max_steps": "16",
        },
    ),
    "anew, as the chapter has it": ("rewarm", CHAPTER, {"schedule__start_factor": "0.2"}),
    "anew, adafactor": ("rewarm", {"optimizer__name": "adafactor"}, {"optimizer__lr": "2e-2"}),
    "lower": ("override", {}, {"optimizer__lr": "1e-3"}),
    # Groups are in another order once the rate of muon's AdamW part is not lr.
    "muon's AdamW, under muP": ("override", MUON, {"optimizer__adamw_lr": "2e-3"}),
    "every knob": (
        "override",
        {},
        {
            "optimizer__lr": "2e-2",
            "optimizer__weight_decay": "0.3",
            "optimizer__decay_on": "all",
            "optimizer__betas": "[0.8, 0.99]",
            "optimizer__eps": "1e-5",
            "train__grad_clip": "0.05",
            "train__max_steps": "14",
            "schedule__name": "polynomial",
            "schedule__power": "2",
            "schedule__warmup_steps": "8",
        },
    ),
    "momentum": (
        "override",
        {"optimizer__name": "sgd", "optimizer__momentum": "0"},
        {"optimizer__momentum": "0.9", "optimizer__lr": "3e-2"},
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_interrupted_equals_uninterrupted_and_the_rates_are_right(
    case: str, quick: Maker, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Once accepted, the run's own config goes on exactly, also after a kill without a save."""
    policy, before, after = CASES[case]
    whole = quick(run__name="whole", **before)
    stopped_run(whole, monkeypatch)
    parts = copied(whole, "parts")
    capsys.readouterr()
    train(quick(run__name="whole", **(before | after)), rate=policy)
    check_rates(whole, policy, capsys.readouterr().err)
    killed_at(monkeypatch, 8)
    with pytest.raises(ZeroDivisionError):
        train(quick(run__name="parts", **(before | after)), rate=policy)
    monkeypatch.undo()
    stop_at(monkeypatch, [8, 10])
    for _ in range(2):
        with pytest.raises(Stopped):
            train(own(parts))
    train(own(parts))
    last = own(whole).total_steps(0)
    assert final_state(whole, last) == final_state(parts, last)
    assert logged(whole) == logged(parts)
    assert own(whole).schedule == own(parts).schedule
    if policy == "rewarm":
        assert own(whole).schedule.restart_step == STOP


def check_rates(before: Config, policy: RatePolicy, said: str) -> None:
    """They are the old plan's until the policy sets in, and then the new one's."""
    now = own(before)
    old, new = Plan.from_config(before, 12), Plan.from_config(now, now.total_steps(0))
    (event,) = policy_events(before)
    peak, new_peak = before.optimizer.lr, now.optimizer.lr
    if now.model.mup_base_width:  # the hidden matrices, first in order and logged from then on
        new_peak = peak / 2**0.5
        assert event["lr_before"] == pytest.approx(old.rate(STOP, new_peak))
        assert event["lrs_after"]["rest"] == pytest.approx(new.rate(STOP, 2e-3))
    else:
        assert event["lr_before"] == pytest.approx(old.rate(STOP, peak))
    expected = [old.rate(step, peak) for step in range(STOP)]
    expected += [new.rate(step, new_peak) for step in range(STOP, new.total_steps)]
    assert rates(before) == pytest.approx(expected, rel=1e-9)
    assert (event["step"], event["policy"]) == (STOP, policy)
    assert event["lr_after"] == pytest.approx(expected[STOP])
    assert event["lrs_after"].keys() == event["lrs_before"].keys()
    changed = {key: value for key, (_, value) in event["changed"].items()}
    assert dump_config(with_keys(before, changed)) == dump_config(now)
    (line,) = [line for line in said.splitlines() if line.startswith("policy ")]
    assert f"{policy} from step {STOP} on" in line
    assert f"{event['lr_before']:.2e} before, {event['lr_after']:.2e} after" in line


def test_override_is_as_if_it_had_been_so_from_the_start(
    quick: Maker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Schedule and groups end in the very state of a run that had this config all along."""
    changes = {"optimizer__lr": "2e-3", "schedule__warmup_steps": "4", "schedule__min_lr": "1e-4"}
    stopped_run(quick(), monkeypatch)
    train(quick(**changes), rate="override")
    train(quick(run__name="fresh", **changes))
    (_, ours), (_, fresh) = (final_state(quick(run__name=name), 12) for name in ("tiny", "fresh"))
    assert ours["scheduler"] == fresh["scheduler"]
    assert ours["optimizer"] == fresh["optimizer"]


def test_rewarm_has_its_warmup_and_ends_at_its_floor(
    quick: Maker, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = quick(schedule__min_lr="1e-3")
    stopped_run(config, monkeypatch)
    train(quick(schedule__min_lr="1e-3", train__max_steps="16"), rate="rewarm")
    used = rates(config)[STOP:]
    assert used[:3] == pytest.approx([1e-3, 5.5e-3, 1e-2])
    assert used[-1] == pytest.approx(1e-3)


def test_a_finished_run_is_trained_longer_and_changed_again_and_again(quick: Maker) -> None:
    train(quick())
    train(quick(train__max_steps="16"), rate="extend")
    train(quick(train__max_steps="20", optimizer__lr="5e-3"), rate="rewarm")
    rewarmed = own(quick())
    assert rewarmed.schedule.restart_step == 16
    train(
        with_keys(rewarmed, {"optimizer.weight_decay": 0.0, "train.max_steps": 22}),
        rate="override",
    )
    assert [(c.policy, c.step) for c in read_record(run_of(quick()))] == [
        ("extend", 12),
        ("rewarm", 16),
        ("override", 20),
    ]
    assert own(quick()).schedule.restart_step == 16
    assert [event["policy"] for event in policy_events(quick())] == ["extend", "rewarm", "override"]
    steps = [record["step"] for record in logged(quick()) if record["kind"] == "train"]
    assert steps == list(range(1, 23))


# Damaged checkpoints, kills, hands --------------------------------------------------------------


@pytest.mark.parametrize("policy", ["extend", "rewarm", "override"])
def test_an_older_checkpoint_has_the_change_from_its_own_step_on(
    policy: RatePolicy,
    quick: Maker,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Accepted at step 6, whose checkpoint is lost: the same as accepted at step 4."""
    changes = {"train__max_steps": "16", "checkpoint__keep": "9"}
    if policy != "extend":
        changes["optimizer__lr"] = "3e-3"
    config = quick()
    stopped_run(config, monkeypatch)
    direct = copied(config, "direct")
    stop_at(monkeypatch, [8])
    with pytest.raises(Stopped):
        train(quick(**changes), rate=policy)
    monkeypatch.undo()
    for step in (6, 8, 9):
        for run in (config, direct):
            checkpoint = run_of(run) / "checkpoints" / f"step-{step:08d}"
            if checkpoint.exists():
                damage(checkpoint)
    train(quick(run__name="direct", **changes), rate=policy)
    capsys.readouterr()
    train(own(config))
    said = capsys.readouterr().err
    assert "was changed at step 6" in said
    assert "counts from step 4 now" in said
    assert f"{policy} from step 4 on" in said
    assert final_state(config, 16) == final_state(direct, 16)
    assert logged(config) == logged(direct)
    assert [c.step for c in read_record(run_of(config))] == [4]
    assert own(config).schedule.restart_step == (4 if policy == "rewarm" else None)
    (event,) = policy_events(config)
    assert event["step"] == 4


def test_a_damaged_checkpoint_after_the_change_costs_nothing(
    quick: Maker, monkeypatch: pytest.MonkeyPatch
) -> None:
    stopped_run(quick(), monkeypatch)
    train(quick(optimizer__lr="3e-3"), rate="rewarm")
    before = final_state(quick(), 12), logged(quick())
    damage(run_of(quick()) / "checkpoints" / "step-00000012")
    train(own(quick()))  # from step 8, which was saved under the new plan
    assert (final_state(quick(), 12), logged(quick())) == before
    assert [c.step for c in read_record(run_of(quick()))] == [STOP]


def test_a_change_can_be_changed_before_it_was_ever_saved(
    quick: Maker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second one counts from the checkpoint that there is, and the first never was."""
    config = quick()
    stopped_run(config, monkeypatch)
    direct = copied(config, "direct")
    killed_at(monkeypatch, 7)
    with pytest.raises(ZeroDivisionError):
        train(quick(optimizer__lr="1e-1"), rate="override")
    with pytest.raises(ZeroDivisionError):
        train(with_keys(own(config), {"train.max_steps": 16}), rate="extend")
    monkeypatch.undo()
    assert [c.policy for c in read_record(run_of(config))] == ["extend"]
    train(with_keys(own(config), {"optimizer.lr": 2e-3}), rate="override")
    train(quick(run__name="direct", optimizer__lr="2e-3", train__max_steps="16"), rate="override")
    assert own(config).optimizer == own(direct).optimizer
    assert final_state(config, 16) == final_state(direct, 16)


def test_a_change_that_was_never_saved_can_be_taken_back(
    quick: Maker, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = quick()
    stopped_run(config, monkeypatch)
    plain = copied(config, "plain")
    train(plain)
    killed_at(monkeypatch, 7)
    with pytest.raises(ZeroDivisionError):
        train(quick(optimizer__lr="1e-1"), rate="override")
    monkeypatch.undo()
    train(config, rate="override")
    assert "takes back what no checkpoint was made with yet" in capsys.readouterr().err
    assert read_record(run_of(config)) == []
    assert final_state(config, 12) == final_state(plain, 12)


def test_a_kill_while_the_change_is_written_leaves_the_run_as_it_was_planned(
    quick: Maker, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = quick()
    stopped_run(config, monkeypatch)
    change = RateChange(policy="override", step=STOP, changed={"optimizer.lr": (1e-2, 1e-3)})
    write_record(run_of(config), [change])
    train(config)
    assert read_record(run_of(config)) == []
    assert rates(config)[-1] == pytest.approx(1e-3)  # the floor of the plan that it had


def test_the_runs_config_changed_by_hand_is_refused(
    quick: Maker, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = quick()
    stopped_run(config, monkeypatch)
    saved = run_of(config) / "config.yaml"
    by_hand = quick(optimizer__weight_decay="0.5")
    saved.write_text(dump_config(by_hand), encoding="utf-8")
    with pytest.raises(UserError) as error:
        train(own(config))
    assert "is not what the run's checkpoint of step 6 was made with" in str(error.value)
    assert "optimizer.weight_decay: 0.1 there, 0.5 now" in str(error.value)
    assert "say --rate override, or copy" in str(error.value)
    train(own(config), rate="override")
    assert read_record(run_of(config))[0].changed == {"optimizer.weight_decay": (0.1, 0.5)}


@pytest.mark.parametrize(
    "knob",
    [
        {"optimizer__weight_decay": "0.9"},
        {"optimizer__decay_on": "all"},
        {"optimizer__betas": "[0.5, 0.95]"},
        {"optimizer__eps": "1e-2"},
        {"train__grad_clip": "0.01"},
    ],
)
def test_every_knob_of_the_update_takes_effect(
    knob: dict[str, str], short_run: Maker, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = short_run()
    plain = copied(config, "plain")
    stopped_run(plain, monkeypatch, STOP + 1)
    stop_at(monkeypatch, [STOP])
    with pytest.raises(Stopped):
        train(short_run(**knob), rate="override")
    assert final_state(config, STOP + 1)[0] != final_state(plain, STOP + 1)[0]


def test_fp16_with_its_scaler_is_changed_exactly(
    quick: Maker, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = quick(train__dtype="fp16")
    stopped_run(whole, monkeypatch)
    parts = copied(whole, "parts")
    changes = {"train__dtype": "fp16", "optimizer__lr": "2e-3"}
    train(quick(**changes), rate="rewarm")
    stop_at(monkeypatch, [8])
    with pytest.raises(Stopped):
        train(quick(run__name="parts", **changes), rate="rewarm")
    train(own(parts))
    assert final_state(whole, 12) == final_state(parts, 12)


@pytest.mark.parametrize("optimizer", ["sgd", "adam", "adamw", "adafactor", "muon"])
def test_a_change_that_means_the_same_is_the_same_run(
    optimizer: str, quick: Maker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Averages, step counters, generators and the schedule's own state are all carried over."""
    config = quick(optimizer__name=optimizer)
    stopped_run(config, monkeypatch)
    plain = copied(config, "plain")
    train(plain)
    same = {"optimizer.lr_batch_size": 6, "schedule.min_lr": config.min_lr}
    train(with_keys(config, same), rate="override")
    assert len(read_record(run_of(config))) == 1
    assert final_state(config, 12) == final_state(plain, 12)
    assert logged(config) == logged(plain)


# What is refused ---------------------------------------------------------------------------------


def everything(run: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    ("policy", "changes", "words"),
    [
        (
            "keep",
            {"optimizer__lr": "2e-2"},
            ["0.01 there, 0.02 now", "(--rate rewarm or override)"],
        ),
        ("keep", {"train__max_steps": "16"}, ["(--rate extend, rewarm or override)"]),
        ("keep", {"optimizer__betas": "[0.8, 0.9]"}, ["(--rate override)"]),
        ("extend", {"optimizer__lr": "2e-2"}, ["changes the length", "say --rate rewarm or"]),
        ("extend", {"train__max_steps": "6"}, ["all 6 steps of the run are done", "max_steps"]),
        (
            "rewarm",
            {"optimizer__weight_decay": "0"},
            ["weight_decay: 0.1 there", "--rate override"],
        ),
        ("rewarm", {"train__max_steps": "6"}, ["cannot begin anew at step 6 of a run of 6"]),
        (
            "rewarm",
            {"schedule__warmup_steps": "7"},
            ["a warmup of 7 steps does not fit into the 6 steps from 6 on"],
        ),
        ("override", {"schedule__restart_step": "7"}, ["step 7 is after step 6", "--rate rewarm"]),
        *(
            (policy, change, [named, "no policy takes that"])
            for policy in ("extend", "rewarm", "override")
            for change, named in (
                ({"model__n_layer": "2"}, "model.n_layer: 1 there, 2 now"),
                ({"train__batch_size": "5"}, "train.batch_size: 6 there, 5 now"),
                ({"run__seed": "1"}, "run.seed: 1337 there, 1 now"),
                ({"optimizer__name": "muon"}, "optimizer.name: adamw there, muon now"),
                ({"model__context_len": "8", "data__val_fraction": "0.2"}, "data.val_fraction"),
            )
        ),
    ],
)
def test_what_a_policy_does_not_take_is_one_line_and_writes_nothing(
    policy: RatePolicy, changes: dict[str, str], words: list[str], short_run: Maker
) -> None:
    config = short_run()
    before = everything(run_of(config))
    with pytest.raises(UserError) as error:
        train(short_run(**changes), rate=policy)
    assert len(error.value.lines) == 1
    for word in words:
        assert word in str(error.value)
    assert everything(run_of(config)) == before


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run that was stopped at step 6; tests take copies."""
    return tmp_path_factory.mktemp("kept")


@pytest.fixture
def short_run(kept: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Maker:
    """A run that was stopped at step 6, trained once for all tests."""
    from tests.conftest import tiny_config

    def make(folder: Path, **changes: str) -> Config:
        values = QUICK | {"data__source": str(kept / "words.txt"), "data__dir": str(kept / "data")}
        return tiny_config(folder, **(values | changes))

    if not (kept / "runs").exists():
        tiny_config(kept)  # writes the text
        stopped_run(make(kept), monkeypatch)
    shutil.copytree(kept / "runs", tmp_path / "runs")
    config = make(tmp_path)
    (run_of(config) / "config.yaml").write_text(dump_config(config), encoding="utf-8")
    return lambda **changes: make(tmp_path, **changes)


@pytest.mark.parametrize("policy", ["extend", "rewarm", "override"])
def test_a_policy_needs_a_checkpoint(policy: RatePolicy, quick: Maker, short_run: Maker) -> None:
    with pytest.raises(UserError, match=f"--rate {policy}: .*tiny holds no checkpoint"):
        train(quick(run__name="tiny", run__dir=str(Path(quick().run.dir) / "new")), rate=policy)
    config = short_run()
    for checkpoint in (run_of(config) / "checkpoints").glob("step-*"):
        damage(checkpoint)
    before = everything(run_of(config))
    with pytest.raises(UserError, match=r"tiny: none of its \d checkpoints is whole"):
        train(short_run(train__max_steps="20"), rate=policy)
    assert everything(run_of(config)) == before


def test_a_new_run_begins_at_step_0(quick: Maker) -> None:
    with pytest.raises(UserError, match=r"schedule\.restart_step: .*restart_step null"):
        train(quick(schedule__restart_step="3"))
    assert not run_of(quick()).exists()


def test_a_policy_that_changes_nothing_says_so_and_goes_on(
    short_run: Maker, capsys: pytest.CaptureFixture[str]
) -> None:
    config = short_run()
    train(short_run(log__every_steps="2"), rate="override")
    assert "override changes nothing" in capsys.readouterr().err
    assert not (run_of(config) / "rate.json").exists()
    assert policy_events(config) == []
    assert len(rates(config)) == STOP + 3


def test_rewarm_said_twice_is_once(short_run: Maker, monkeypatch: pytest.MonkeyPatch) -> None:
    config = short_run()
    killed_at(monkeypatch, 7)
    for _ in range(2):
        with pytest.raises(ZeroDivisionError):
            train(short_run(), rate="rewarm")
    assert [c.step for c in read_record(run_of(config))] == [STOP]


# The commands ------------------------------------------------------------------------------------


def test_the_commands_line_and_its_dry_run(short_run: Maker) -> None:
    config = short_run()
    saved = str(run_of(config) / "config.yaml")
    arguments = ("--config", saved, "--rate", "override", "--optimizer.lr", "1e-3")
    before = everything(run_of(config))
    dry = command("gpt-train", *arguments, "--dry-run")
    assert dry.returncode == 0, dry.stderr
    assert everything(run_of(config)) == before
    ended = command("gpt-train", *arguments)
    assert ended.returncode == 0, ended.stderr
    (line,) = [line for line in dry.stdout.splitlines() if line.startswith("policy ")]
    assert line in ended.stderr
    assert "optimizer.lr 0.01 → 0.001" in line
    assert command("gpt-train", "--config", saved).returncode == 0
    for option in ((), ("--dry-run",)):
        ended = command("gpt-train", "--config", saved, "--train.batch_size", "3", *option)
        assert ended.returncode == 2
        assert "run.name: " in ended.stderr


def test_a_dry_run_before_the_text_is_tokenized(
    short_run: Maker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The length in epochs is open then, unless the text is small, and the rates with it."""
    monkeypatch.setattr("gpt.build.SMALL_BYTES", 1000)
    saved = str(run_of(short_run()) / "config.yaml")
    arguments = ["--config", saved, "--dry-run", "--data.dir", str(tmp_path / "empty")]
    dry = command("gpt-train", *arguments, "--rate", "extend", "--train.max_steps", "20")
    old, new = (Plan("warmup_cosine", steps, 2, 0.1, 0.1).rate(6, 1e-2) for steps in (12, 20))
    assert f"extend from step 6 on: {old:.2e} before, {new:.2e} after" in dry.stdout
    epochs = ["--rate", "extend", "--train.max_steps", "null", "--train.max_epochs", "2"]
    dry = command("gpt-train", *arguments, *epochs)
    assert dry.returncode == 0, dry.stderr
    assert "the rates are open until the text is tokenized" in dry.stdout


# The parts ---------------------------------------------------------------------------------------


def changes_of(*keys: str) -> list[KeyChange]:
    return [KeyChange(key, 1, 2) for key in keys]


def test_each_policy_takes_what_the_one_before_it_does() -> None:
    keys = [f"{s}.{k}" for s, values in Config().model_dump().items() for k in values]
    taken = [
        {key for key in keys if not refused_changes(changes_of(key), policy)} for policy in POLICIES
    ]
    assert taken[0] == set()
    assert taken[1] == {"train.max_steps", "train.max_tokens", "train.max_epochs"}
    assert taken[1] < taken[2] < taken[3]
    assert {key for key in taken[2] - taken[1] if not key.startswith("schedule.")} == {
        "optimizer.lr",
        "optimizer.adamw_lr",
        "optimizer.lr_batch_size",
    }
    assert {key for key in keys if key.startswith("optimizer.")} - taken[3] == {"optimizer.name"}


def test_offers() -> None:
    assert offer(changes_of("train.max_steps")) == "--rate extend, rewarm or override"
    assert offer(changes_of("train.max_steps", "optimizer.lr")) == "--rate rewarm or override"
    assert offer(changes_of("train.grad_clip")) == "--rate override"
    assert offer(changes_of("train.grad_clip", "model.n_layer")) == ""


def test_a_record_comes_back_as_it_was(tmp_path: Path) -> None:
    changes = [
        RateChange(policy="extend", step=4, changed={"train.max_steps": (12, None)}),
        RateChange(policy="override", step=9, changed={"optimizer.betas": ([0.9, 0.95], [0, 0.5])}),
    ]
    assert read_record(tmp_path) == []
    write_record(tmp_path, changes)
    read = read_record(tmp_path)
    assert read == changes
    after = read[1].done(Config())
    assert after.optimizer.betas == (0.0, 0.5)
    assert read[1].undone(after) == Config()
    write_record(tmp_path, [])
    assert list(tmp_path.iterdir()) == []


def entry(**changes: object) -> dict[str, object]:
    return {"policy": "override", "step": 4, "changed": {"optimizer.lr": [0.1, 0.2]}} | changes


@pytest.mark.parametrize(
    "content",
    [
        "",
        "{",
        "{}",
        json.dumps([entry(policy="keep")]),
        json.dumps([entry(step=0)]),
        json.dumps([entry(step="4")]),
        json.dumps([entry(step=4.0)]),
        json.dumps([entry(more=1)]),
        json.dumps([entry(changed={"optimizer.lr": [0.1]})]),
        json.dumps([entry(changed={"optimizer.lr": [0.1, "fast"]})]),
        json.dumps([entry(changed={"optimizer.lr": [0.1, -1]})]),
        json.dumps([entry(changed={"schedule.nothing": [1, 2]})]),
        json.dumps([entry(changed={"model.n_layer": [1, 2]})]),
        json.dumps([entry(changed={"run.dir": ["a", "../../etc"]})]),
        json.dumps([entry(step=4), entry(step=4)]),
        json.dumps([entry(step=8), entry(step=4)]),
        "[" * 100_000,
        " " * 1_000_001,
    ],
)
def test_a_record_that_is_none_is_one_line(content: str, tmp_path: Path) -> None:
    (tmp_path / "rate.json").write_text(content, encoding="utf-8")
    with pytest.raises(UserError, match=r"rate\.json: not the record") as error:
        read_record(tmp_path)
    assert len(str(error.value).splitlines()) == 1
