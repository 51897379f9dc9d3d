"""What each finding says to do next: one whole command that fits the run, or words."""

import shlex
from pathlib import Path

import numpy as np
import pytest

from gpt.cli.arguments import split_overrides
from gpt.configfile import load_config
from gpt.health.advice import probe_command, train_command
from gpt.health.diagnose import diagnose
from gpt.history import history_of, read_run
from tests.health_runs import (
    CHANCE,
    STEPS,
    Line,
    config_of,
    evaluations,
    event,
    falling,
    history,
    layers,
    sound,
    steps_of,
)
from tests.report_runs import write_run

AT = steps_of()
EVALUATED = np.arange(200, 2001, 200.0)
RISING = np.interp(EVALUATED, [200, 800, 2000], [4.0, 3.0, 4.0])
NOISE = 0.005 * np.random.default_rng(0).normal(size=len(AT))


def broken(cause: str, *, stopped: bool = False) -> list[Line]:
    lines = [*sound(), event(700, "nonfinite", what="loss", cause=cause, batch=700)]
    return [*lines, event(700, "diverged", what="loss", cause=cause)] if stopped else lines


SICK = {
    "stuck_at_chance": sound(loss=CHANCE + NOISE),
    "plateau": sound(loss=np.maximum(falling(AT, noise=0), 3.2) + NOISE),
    "overfitting": [*sound(), *evaluations(EVALUATED, RISING)],
    "dead_layer": [*sound(), *layers(range(100, STEPS + 1, 100), dead_share={"blocks.1": 1.0})],
    "spike": sound(loss=falling(AT) + np.where(AT == 1000, 3.0, 0.0)),
    "wrong_tokenizer": sound(check={"bytes_per_token": 1.05, "used_share": 0.03}),
    "nonfinite (overflow)": broken("overflow"),
    "nonfinite (rate)": broken("rate", stopped=True),
    "nonfinite (batch)": broken("batch", stopped=True),
}


def next_of(name: str, found: list[Line], run: Path | None) -> str:
    """What to do next, of a run in a folder, or of one that is being trained."""
    if run is not None:
        write_run(run, found, config_of())
    known = read_run(run) if run is not None else history(found)
    advice = {finding.id: finding.next for finding in diagnose(known)}
    return advice[name.split()[0]]


@pytest.mark.parametrize("name", SICK)
@pytest.mark.parametrize("live", [True, False])
def test_a_command_is_whole(name: str, live: bool, tmp_path: Path) -> None:
    run = Path("runs/made-up") if live else tmp_path / "a run"
    text = next_of(name, SICK[name], None if live else run)
    program, *words = shlex.split(text, comments=True)
    config = str(run / "config.yaml")
    match program:
        case "gpt-report":
            assert words == [str(run), "--probe", "cooldown"]
        case "gpt-data":
            assert words == ["info", f"$(gpt-data build --config {shlex.quote(config)})"]
        case "gpt-train":
            rest, overrides = split_overrides(words)
            assert rest[:2] == ["--config", config]
            load_config(None if live else Path(config), overrides)
        case _:
            pytest.fail(text)


@pytest.mark.parametrize("name", SICK)
def test_without_a_config_there_are_words(name: str) -> None:
    found = diagnose(history_of(SICK[name]))
    (advice,) = [finding.next for finding in found if finding.id == name.split()[0]]
    assert advice
    assert not advice.startswith("gpt-")
    assert "None" not in advice


def test_a_batch_that_stopped_the_run_needs_leave_to_skip(tmp_path: Path) -> None:
    limit = config_of().train.skip_limit
    live = next_of("nonfinite", SICK["nonfinite (batch)"], None)
    assert live.startswith(
        f"gpt-train --config runs/made-up/config.yaml --train.skip_limit {2 * limit + 1} # "
    )
    moved = shlex.split(next_of("nonfinite", SICK["nonfinite (batch)"], tmp_path / "moved"))
    assert moved[5:9] == ["--run.dir", str(tmp_path), "--run.name", "moved"]


def test_a_new_run_has_no_step_to_begin_anew_from() -> None:
    known = history(sound(), config_of(schedule__restart_step="5"))
    assert train_command(known, name="x").endswith(
        "--run.name made-up-x --schedule.restart_step null"
    )
    assert "restart_step" not in train_command(known)


def test_a_probe_by_its_place() -> None:
    assert probe_command(history(sound()), "double") == "gpt-report runs/made-up --probe double"
    assert probe_command(history_of(sound()), "cooldown") == ""
