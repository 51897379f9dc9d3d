"""Test 3: resume at every step of 60, for every optimizer, number format and schedule."""

import json
import math
import random
import shutil
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from gpt.config import Config
from gpt.configfile import dump_config
from gpt.metrics import Record, read_metrics
from gpt.plan import Plan
from gpt.rundir import run_path
from gpt.schedule import tolerance
from tests.conftest import tiny_config, write_text
from tests.torture import Torture
from tests.torture.runs import CLOCKS, Command, check_same, check_tidy

STEPS, REWARM_AT = 60, 20
BLOCKS = 10  # cases of a combination: each resumes at 5 or 6 of its steps
OPTIMIZERS = ("sgd", "adam", "adamw", "adafactor", "muon")
SCHEDULES: tuple[dict[str, str], ...] = (
    {"name": "warmup_cosine"},
    {"name": "wsd", "decay_fraction": "0.5"},
    {"name": "wsd", "decay_shape": "linear", "decay_steps": "25"},
    {"name": "linear"},
    {"name": "constant"},
    {"name": "inverse_sqrt"},
    {"name": "polynomial", "power": "2"},
    {"name": "cosine_restarts", "cycles": "3"},
    {"name": "hf_cosine"},
    {"name": "chapter", "cosine_steps": "30", "min_lr": "1e-3"},
    {"name": "warmup_cosine", "rewarm": "yes"},
)
NAN_BATCH, ODD_BATCH = 11, 47  # the first gives no number, the second one that the guard refuses
# A logged step's slope and noise come from it and the step before it, in one process; the noise
# scale is their running mean from the beginning of the log.
PAIRS = {"slope_before", "slope_after", "grad_signal", "grad_noise"}


@dataclass(frozen=True)
class Combination:
    """One run that is resumed at each of its steps.

    `other_batching`: the resumed part works in other micro-batches, without dropout, and its
    numbers may differ by rounding.
    """

    optimizer: str
    dtype: str
    compile: str
    schedule: dict[str, str]
    other_batching: bool = False

    @property
    def word(self) -> str:
        """What to count it as."""
        form = f"{self.dtype} {'compiled' if self.compile == 'on' else 'eager'}"
        return f"{form}, other micro-batches" if self.other_batching else form


def combinations() -> list[Combination]:
    """Uncompiled ones first; the schedules take turns, so that each comes with several others."""
    forms = [(dtype, compile_) for compile_ in ("off", "on") for dtype in ("fp32", "bf16")]
    found = [
        Combination(name, *form, SCHEDULES[i % len(SCHEDULES)])
        for i, (form, name) in enumerate((form, name) for form in forms for name in OPTIMIZERS)
    ]
    fp16 = Combination("adamw", "fp16", "off", SCHEDULES[1])
    other = Combination("adamw", "fp32", "off", SCHEDULES[0], other_batching=True)
    return [*found[:10], fp16, other, *found[10:]]


COMBINATIONS = combinations()


def make_config(shared: Path, folder: Path, combination: Combination, **changes: str) -> Config:
    """Dropout, accumulation of 3, two and a half epochs, a guard; every step is logged."""
    schedule = {f"schedule__{k}": v for k, v in combination.schedule.items() if k != "rewarm"}
    values = {
        "run__name": "run",
        "run__dir": str(folder),
        "data__source": str(shared / "short.txt"),
        "data__dir": str(shared / "data"),
        "optimizer__name": combination.optimizer,
        "optimizer__lr": "1e-2",
        "schedule__warmup_steps": "10",
        "train__max_steps": str(STEPS),
        "train__batch_size": "6",
        "train__micro_batch_size": "2",
        "train__device": "cpu",
        "train__dtype": combination.dtype,
        "train__compile": combination.compile,
        "train__spike_sigma": "4",
        "model__dropout": "0.0" if combination.other_batching else "0.2",
        "eval__every_steps": "16",
        "eval__sample_tokens": "0",
        "checkpoint__every_steps": "25",
        "log__every_steps": "1",
    }
    if combination.optimizer == "muon":
        values["optimizer__adamw_lr"] = "3e-3"  # groups with rates of their own
    if combination.optimizer == "adafactor":
        values["optimizer__lr"] = "3e-2"
    return tiny_config(shared, **(values | schedule | changes))


def trouble(_folder: Path) -> None:
    """In the command's process: a batch without a finite loss, one far off, and a busy scaler."""
    import gpt.build
    import gpt.step
    import gpt.train
    from gpt.batches import Batches

    whole, backward = Batches.batch, gpt.step._backward
    current = [0]

    def batch(self: Batches, step: int, rows: slice | None = None) -> tuple[Tensor, Tensor]:
        current[0] = step
        return whole(self, step, rows)

    def broken(*arguments: object) -> float:
        loss = backward(*arguments)  # type: ignore[arg-type]
        return {NAN_BATCH: math.nan, ODD_BATCH: 20.0}.get(current[0], loss)

    def scaler(device: torch.device, dtype: torch.dtype) -> torch.amp.GradScaler:
        on = dtype == torch.float16
        return torch.amp.GradScaler(device.type, enabled=on, init_scale=2.0**24, growth_interval=7)

    Batches.batch = batch  # type: ignore[method-assign]
    gpt.step._backward = broken
    gpt.build.grad_scaler = scaler
    gpt.train.report = lambda *_: None  # type: ignore[assignment]


def all_but_last(folder: Path) -> None:
    """In the command's process: the commands before it, one after another, and their trouble."""
    from gpt.cli.train import main

    trouble(folder)
    for argv in json.loads((folder / "commands.json").read_text())[:-1]:
        code = main(argv)
        assert code == 0, f"{argv}: exit code {code}"


def train(folder: Path, commands: list[list[str]]) -> None:
    """Runs gpt-train with each of these options, in one new process."""
    (folder / "commands.json").write_text(json.dumps(commands))
    command = Command(["gpt-train", *commands[-1]], folder, patch=all_but_last)
    assert command.wait(100) == 0, command.said[-3000:]


def run_whole(shared: Path, combination: Combination) -> Path:
    """The run that nobody interrupts, with every checkpoint kept; made once in each process."""
    folder = shared / f"whole-{COMBINATIONS.index(combination)}"
    if not (folder / "whole").exists():
        shutil.rmtree(folder, ignore_errors=True)
        if not (shared / "short.txt").exists():
            text = write_text(shared).read_text(encoding="utf-8")
            (shared / "short.txt").write_text(text[:2600], encoding="utf-8")
        folder.mkdir()
        keep = {"checkpoint__every_steps": "1", "checkpoint__keep": "100"}
        whole = make_config(shared, folder, combination, **keep)
        commands = [options_of(whole, folder)]
        if "rewarm" in combination.schedule:
            commands[0] += ["--rate", "rewarm"]
            short = {"train__max_steps": str(REWARM_AT), "run__name": "run"} | keep
            commands.insert(
                0, options_of(make_config(shared, folder, combination, **short), folder, "short")
            )
        train(folder, commands)
        check_whole(make_config(shared, folder, combination), combination)
        (folder / "whole").touch()
    return folder


def check_whole(config: Config, combination: Combination) -> None:
    """Asserts that the run meets what it is for: trouble, epochs, and rates by the closed form."""
    records = read_metrics(run_path(config))
    events = {str(record["event"]) for record in records if record["kind"] == "event"}
    assert {"nonfinite", "spike_skipped"} <= events, f"no trouble in it: {events}"
    assert ("skipped" in events) == (combination.dtype == "fp16"), "the scaler's part"
    assert lines_of(records)[-1]["epoch"] > 2, "it must cross an epoch"
    check_rates(config, records, combination)


def check_rates(config: Config, records: list[Record], combination: Combination) -> None:
    """Asserts that every step used the rate of the closed form, in each group."""
    by_name = {"matrices": config.optimizer.lr, "rest": config.optimizer.lr}
    if combination.optimizer == "muon":
        by_name |= dict.fromkeys(("embeddings", "rest"), 3e-3)
    plans = [(0, Plan.from_config(config, STEPS))]
    if "rewarm" in combination.schedule:
        again = config.model_dump(mode="json")
        again["schedule"]["restart_step"] = REWARM_AT
        plans = [
            (0, Plan.from_config(config, REWARM_AT)),
            (REWARM_AT, Plan.from_config(Config.model_validate(again), STEPS)),
        ]
    for line in lines_of(records):
        step = line["step"] - 1
        plan = next(plan for start, plan in reversed(plans) if step >= start)
        for name, used in line["lrs"].items():
            peak = by_name[name]
            assert abs(used - plan.rate(step, peak)) <= tolerance(plan, peak), (line["step"], name)


def lines_of(records: list[Record]) -> list[Record]:
    """The lines of steps."""
    return [record for record in records if record["kind"] == "train"]


def case(index: int, rng: random.Random, folder: Path) -> str:
    """Goes on from some checkpoints of the whole run to the end, one of them in a new process."""
    shared = folder.parent
    combination, block = COMBINATIONS[index // BLOCKS], index % BLOCKS
    whole_folder = run_whole(shared, combination)
    whole = make_config(shared, whole_folder, combination)
    other = {"train__micro_batch_size": rng.choice(["null", "1", "4"])}
    changes = other if combination.other_batching else {}
    steps = [step for step in range(1, STEPS) if step * 23 % BLOCKS == block]
    rng.shuffle(steps)
    commands = []
    for step in steps:
        config = make_config(shared, folder / str(step), combination, **changes)
        commands += resume(shared, whole, config, step, combination)
    train(folder, commands)
    for step in steps:
        config = make_config(shared, folder / str(step), combination, **changes)
        check_resumed(whole, config, step, combination)
    return combination.word


def resume(
    shared: Path, whole: Config, config: Config, step: int, combination: Combination
) -> list[list[str]]:
    """Makes a run as it was when one checkpoint had just been saved; the options to go on with."""
    source, target, name = run_path(whole), run_path(config), f"step-{step:08d}"
    folder = target.parent
    shutil.copytree(source, target, ignore=shutil.ignore_patterns("step-*"))
    shutil.copytree(source / "checkpoints" / name, target / "checkpoints" / name)
    if "rewarm" not in combination.schedule:
        return [options_of(config, folder)]
    if step > REWARM_AT:
        restart = {"schedule__restart_step": str(REWARM_AT)}
        return [options_of(make_config(shared, folder, combination, **restart), folder)]
    # As it was before: a plan of fewer steps, at whose end the rate then begins anew.
    (target / "rate.json").unlink()
    shutil.copy(source / "checkpoints" / name / "config.yaml", target / "config.yaml")
    short = make_config(shared, folder, combination, train__max_steps=str(REWARM_AT))
    last = [*options_of(config, folder), "--rate", "rewarm"]
    return [last] if step == REWARM_AT else [options_of(short, folder, "short"), last]


def options_of(config: Config, folder: Path, name: str = "") -> list[str]:
    """A config as the options of a command."""
    path = folder / f"{name or config.run.name}.yaml"
    path.write_text(dump_config(config), encoding="utf-8")
    return ["--config", str(path)]


def check_resumed(whole: Config, config: Config, step: int, combination: Combination) -> None:
    """Asserts that a run that was resumed at `step` ended as the whole one."""
    check_tidy(config)
    records, expected = read_metrics(run_path(config)), read_metrics(run_path(whole))
    check_rates(config, records, combination)
    if combination.other_batching:
        check_close(lines_of(expected), lines_of(records))
        return
    check_same(whole, config)
    first = {step + 1, REWARM_AT + 1} if "rewarm" in combination.schedule else {step + 1}
    assert pairs_of(expected, first) == pairs_of(records, first), "slopes or noise differ"


def pairs_of(records: list[Record], without: set[int]) -> list[dict[str, object]]:
    """What the steps told of their slopes and noise; without those that a process began with."""
    return [
        {key: line[key] for key in PAIRS}
        for line in lines_of(records)
        if line["step"] not in without
    ]


def check_close(expected: list[Record], found: list[Record]) -> None:
    """Asserts that two logs differ by rounding alone."""
    assert [line["step"] for line in expected] == [line["step"] for line in found]
    for one, two in zip(expected, found, strict=True):
        assert one.keys() - CLOCKS == two.keys() - CLOCKS
        assert one["lr"] == two["lr"], f"step {one['step']}: another rate"
        assert abs(one["loss"] - two["loss"]) < 1e-3, f"step {one['step']}: {one['loss']}"


TORTURE = Torture(
    title=f"resume at each of {STEPS} steps, {len(COMBINATIONS) * (STEPS - 1):,} resumes: 5 "
    "optimizers x fp32, bf16 x eager, compiled; 11 schedules; dropout, accumulation, epochs, "
    "skipped batches; fp16; other micro-batches",
    promise="weights, optimizer, generators, rates and every logged loss equal the uninterrupted "
    "run's bits (with other micro-batches: up to rounding); the rate equals the closed form",
    full=len(COMBINATIONS) * BLOCKS,
    short=2,
    case=case,
)
