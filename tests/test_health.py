"""Each finding on a run that has it and on one that nearly has; nothing on runs that are sound."""

import itertools
import math
import shlex
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gpt.config import Config
from gpt.health.diagnose import EXPLAINS, diagnose, verdict
from gpt.health.events import _medians_before
from gpt.health.finding import IDS, Finding
from gpt.health.view import View, centred_mean, theil_sen
from gpt.history import Column, History, Table, history_of
from tests.health_runs import (
    CHANCE,
    FREQUENCIES,
    MATRICES,
    STEPS,
    Line,
    bare,
    config_of,
    cosine,
    evaluations,
    event,
    falling,
    history,
    layers,
    sound,
    steps_of,
)

AT = steps_of()
LAYER_STEPS = range(100, STEPS + 1, 100)


def ids(found: History | list[Line], config: Config | None = None) -> list[str]:
    known = found if isinstance(found, History) else history(found, config)
    return [finding.id for finding in diagnose(known)]


def the(name: str, lines: list[Line], config: Config | None = None) -> Finding:
    """The finding of this name, which has to be there."""
    found = {finding.id: finding for finding in diagnose(history(lines, config))}
    assert name in found, list(found)
    return found[name]


def bump(height: float, start: float, width: float, *, fade: float = 0.0) -> Column:
    """Something to add to a loss: so high from `start` on for `width` steps; or fading away."""
    away = AT - start
    if fade:
        return np.where(away >= 0, height * np.exp(-away / fade), 0.0)
    return np.where((away >= 0) & (away < width), height, 0.0)


def test_a_sound_run_has_no_finding() -> None:
    lines = [*sound(), *layers(LAYER_STEPS)]
    at = np.arange(200, 2001, 200.0)
    lines += evaluations(at, falling(at, noise=0.005) + 0.05)
    lines.append(event(STEPS, "end", how="all 2,000 steps are done"))
    assert ids(lines) == []
    assert verdict(history(lines)) == "healthy: nothing was found"


@pytest.mark.parametrize("step", range(50, STEPS, 150))
def test_a_sound_run_has_no_finding_on_the_way(step: int) -> None:
    whole = history([*sound(), *layers(LAYER_STEPS)])
    assert ids(whole.until(step)) == []


def order(strength: float) -> Column:
    """Noise of which neighbouring lines have `strength` in common."""
    rng = np.random.default_rng(3)
    noise = 0.1 * rng.normal(size=len(AT))
    for index in range(1, len(noise)):
        noise[index] = strength * noise[index - 1] + math.sqrt(1 - strength**2) * noise[index]
    return noise


def overfit(rise: float) -> list[Line]:
    at = np.arange(200, 2001, 200.0)
    losses = falling(at, noise=0.002) + 0.05
    return evaluations(at, np.where(at > 1000, losses[4] + rise * (at - 1000) / 1000, losses))


def flat_from(step: float, *, fall: float = 0.0) -> Column:
    """The usual loss, which stands still from a step on, or falls by `fall` nats to the end."""
    late = np.clip((AT - step) / (STEPS - step), 0, 1)
    curve = falling(AT, noise=0)
    curve = np.where(step > AT, curve, np.interp(step, AT, curve) - fall * late)
    return curve + 0.01 * np.random.default_rng(0).normal(size=len(AT))


def slow(factor: float) -> Column:
    return np.where(AT > 1200, factor, 1.0) * 7e4


CONSTANT = cosine(AT, end=1.0)
CASES: dict[str, tuple[list[Line], list[Line]]] = {
    "nonfinite": (
        [*sound(), event(700, "nonfinite", what="loss", loss=math.nan, cause="batch", batch=700)],
        [*sound(), event(700, "skipped", loss=3.0, scale=1024.0)],
    ),
    "wrong_tokenizer": (
        sound(check={"bytes_per_token": 1.05, "used_share": 0.03}),
        sound(check={"bytes_per_token": 1.05}, vocab_size=257, loss=falling(AT, start=5.55)),
    ),
    "data_leak": (sound(check={"leak_share": 0.4}), sound(check={"leak_share": 0.15})),
    "data_duplicate": (
        sound(check={"duplicate_share": 0.6, "leak_share": 0.6}),
        sound(check={"duplicate_share": 0.3}),
    ),
    "lr_too_large": (
        sound(loss=CHANCE + 0.5 + falling(AT, start=0.3, end=0.0), update_ratio=0.1 + 0 * AT),
        sound(update_ratio=0.04 + 0 * AT),
    ),
    "lr_too_small": (
        sound(
            loss=CHANCE - 1.5 * AT / STEPS,
            slope_after=np.full(len(AT), -0.019),
            update_ratio=1e-5 + 0 * AT,
        ),
        sound(slope_after=np.full(len(AT), -0.006)),
    ),
    "dead_layer": (
        [*sound(), *layers(LAYER_STEPS, grad_norm={MATRICES[2]: 0.0})],
        [*sound(), *layers(LAYER_STEPS, grad_norm={MATRICES[2]: 1e-4})],
    ),
    "spike": (
        sound(loss=falling(AT) + bump(2.0, 1000, 0, fade=40)),
        sound(loss=falling(AT) + bump(0.15, 1000, 30)),
    ),
    "overfitting": ([*sound(), *overfit(0.3)], [*sound(), *overfit(-0.05)]),
    "plateau": (sound(loss=flat_from(400)), sound(loss=flat_from(400, fall=0.4))),
    "throughput": (sound(tokens_per_s=slow(0.3)), sound(tokens_per_s=slow(0.7))),
}


@pytest.mark.parametrize("name", CASES)
def test_a_run_that_has_it_and_one_that_nearly_has(name: str) -> None:
    sick, near = CASES[name]
    assert ids(sick) == [name]
    assert ids(near) == []


@pytest.mark.parametrize("slopes", [{}, {"slope_before": None, "slope_after": None}])
def test_a_loss_that_stays_at_a_guess(slopes: dict[str, None]) -> None:
    noise = 0.005 * np.random.default_rng(2).normal(size=len(AT))
    assert ids(sound(loss=CHANCE + noise, **slopes)) == ["stuck_at_chance"]
    assert "= 8.318" in the("stuck_at_chance", sound(loss=CHANCE + noise, **slopes)).evidence
    low = FREQUENCIES + 2 * np.exp(-AT / 50) + noise
    assert ids(sound(loss=low, **slopes)) == ["stuck_at_chance"]
    assert "frequencies" in the("stuck_at_chance", sound(loss=low, **slopes)).evidence
    assert "stuck_at_chance" not in ids(sound(loss=low - 0.5, **slopes))


def test_a_loss_that_climbs_and_stays_up() -> None:
    up = falling(AT) + 2.0 * np.clip((AT - 800) / 600, 0, 1)
    assert ids(sound(loss=up, slope_after=0.03 + 0 * AT)) == ["lr_too_large"]
    assert "climbs by" in the("lr_too_large", sound(loss=up)).evidence
    back = falling(AT) + 2.0 * np.exp(-(((AT - 900) / 150) ** 2))
    assert "lr_too_large" not in ids(sound(loss=back))


def test_stuck_at_frequencies_with_long_steps_is_the_rate() -> None:
    stays = FREQUENCIES + 0.1 + 0.05 * np.random.default_rng(4).normal(size=len(AT))
    large = sound(loss=stays, update_ratio=0.2 + 0 * AT)
    assert ids(large) == ["lr_too_large"]
    assert "0.2 of their size" in the("lr_too_large", large).evidence


def test_text_in_its_own_order() -> None:
    config = config_of(data__shuffle="false")
    found = the("data_order", sound(loss=falling(AT, noise=0) + order(0.9)), config)
    assert found.numbers["correlation"] > 0.3
    assert ids(sound(loss=falling(AT, noise=0) + order(0.9))) == [], "shuffled"
    harmless = the("data_order", sound(loss=falling(AT, noise=0) + order(0.0)), config)
    assert harmless.numbers["correlation"] < 0.1, "told by the config, measured by the curve"


def test_the_guard_that_is_advised_may_skip() -> None:
    lines = sound(loss=falling(AT) + bump(3.0, 500, 0, fade=20))
    assert "--train.spike_sigma 6 --run.name" in the("spike", lines).next
    forbidden = the("spike", lines, config_of(train__skip_limit="0"))
    assert "--train.spike_sigma 6 --train.skip_limit 5 --run.name" in forbidden.next


def test_an_early_rise_behind_a_short_warmup() -> None:
    config = config_of(schedule__warmup_steps="10")
    rates = cosine(AT, warmup=10)
    rise = sound(loss=falling(AT) + bump(2.5, 40, 0, fade=60), lr=rates)
    assert ids(rise, config) == ["warmup_too_short"]
    assert "10 steps" in the("warmup_too_short", rise, config).evidence
    assert ids(sound(lr=rates), config) == []


def test_a_rate_that_is_never_lowered() -> None:
    config = config_of(schedule__name="constant")
    assert ids(sound(lr=CONSTANT), config) == ["no_decay"]
    half = history(sound(lr=CONSTANT), config).until(STEPS // 2)
    assert ids(half) == [], "it may still come"
    assert ids(sound(lr=cosine(AT, end=0.4)), config_of(schedule__min_lr="1.2e-3")) == []


def test_silent_features_are_a_dead_layer() -> None:
    dead = [*sound(), *layers(LAYER_STEPS, dead_share={"blocks.1": 1.0})]
    assert "blocks.1: 100 %" in the("dead_layer", dead).evidence
    assert ids([*sound(), *layers(LAYER_STEPS, dead_share={"blocks.1": 0.9})]) == []


def test_the_cause_of_broken_numbers_is_the_autopsys() -> None:
    broken = {"what": "gradient", "loss": 3.1, "grad_norm": math.inf, "where": "head.weight"}
    for cause, words in (("rate", "too high"), ("overflow", "fp16"), ("batch", "sound")):
        found = the(
            "nonfinite",
            [*sound(), event(700, "nonfinite", cause=cause, batch=700, rows=[2], **broken)],
        )
        assert words in found.cause
        assert (found.first_step, found.last_step) == (701, 701)
        assert "gradient inf at step 701, batch 700, sequences [2], first in head" in found.evidence
    stopped = [*sound(), *[event(700, "nonfinite", cause="rate", batch=700 + n) for n in range(6)]]
    stopped.append(event(700, "diverged", what="loss", loss=math.nan, cause="rate"))
    found = the("nonfinite", stopped)
    assert found.last_step is None
    assert "6 steps skipped, then the run stopped" in found.evidence
    assert "--optimizer.lr 1.0e-03" in found.next


@pytest.mark.parametrize(
    ("column", "words"), [("others_share", "other processes"), ("major_faults", "swaps")]
)
def test_why_it_is_slow(column: str, words: str) -> None:
    during = {"others_share": 0.6, "major_faults": 5000.0}[column]
    values = np.where(AT > 1200, during, 0.0)
    found = the("throughput", sound(tokens_per_s=slow(0.3), **{column: values}))
    assert words in found.cause
    assert found.first_step == pytest.approx(1210, abs=40)
    back = np.where((AT > 800) & (AT < 1200), 0.3, 1.0) * 7e4
    assert the("throughput", sound(tokens_per_s=back)).last_step == pytest.approx(1190, abs=40)


def test_findings_come_in_order_of_importance_and_say_all_that_they_must() -> None:
    lines = [*sound(tokens_per_s=slow(0.3), check={"leak_share": 0.5}), *overfit(0.4)]
    lines.append(event(3, "nonfinite", what="loss", loss=math.nan, cause="batch", batch=3))
    found = diagnose(history(lines))
    names = [finding.id for finding in found]
    assert names == ["nonfinite", "data_leak", "overfitting", "throughput"]
    for finding in found:
        assert finding.evidence, finding
        assert finding.cause, finding
        assert finding.next, finding
        assert "\n" not in finding.evidence + finding.cause + finding.next
    assert verdict(history(lines)).startswith("nonfinite (from step 4); data_leak (from step 0)")


def test_what_a_finding_explains_is_not_told_besides() -> None:
    lines = [*sound(check={"duplicate_share": 0.9}), *overfit(0.4)]
    assert ids(lines) == ["data_duplicate"]
    assert ids([*sound(), *overfit(0.4)]) == ["overfitting"]
    assert set(EXPLAINS) <= set(IDS)
    for name, others in EXPLAINS.items():
        assert set(others) <= set(IDS)
        assert name not in others
        for other in others:
            assert name not in EXPLAINS.get(other, ()), f"{name} and {other} would both be gone"


@pytest.mark.parametrize("schedule", ["none", "cosine", "decayed"])
@pytest.mark.parametrize("lines", [30, 100, 1000, 5000])
def test_a_bare_log_of_a_sound_run_is_silent(lines: int, schedule: str) -> None:
    for seed in range(10 if lines < 5000 else 1):
        for total, noise, power in ((lines, 0.1, 0.3), (lines * 10, 0.03, 0.5)):
            steps = np.linspace(1, total, lines).round()
            rng = np.random.default_rng(seed)
            losses = 2 + 6.3 * (1 + steps / (0.005 * total)) ** -power
            losses += noise * rng.normal(size=lines)
            shares = steps / total
            rates = {
                "none": None,
                "cosine": cosine(steps, warmup=0.02 * total),
                "decayed": 1e-3 * np.minimum(1, np.minimum(shares / 0.02, (1.01 - shares) / 0.2)),
            }[schedule]
            for vocab_size in (None, 4096):
                assert ids(bare(steps, losses, rates, vocab_size=vocab_size)) == []


def test_bare_logs_of_sick_runs() -> None:
    steps = np.arange(1, 1001.0)
    noise = 0.03 * np.random.default_rng(0).normal(size=1000)
    good = 2 + 6.3 * (1 + steps / 5) ** -0.5 + noise
    flat = bare(steps, CHANCE + 0.1 * noise, vocab_size=4096)
    assert ids(flat) == ["stuck_at_chance"]
    assert ids(bare(steps, good + 3 * np.clip((steps - 500) / 200, 0, 1))) == ["lr_too_large"]
    assert ids(bare(steps, np.where(steps > 700, math.nan, good))) == ["nonfinite"]
    away = np.maximum(steps - 600, 0)
    spiked = bare(steps, good + np.where(steps >= 600, 3 * np.exp(-away / 20), 0))
    assert ids(spiked) == ["spike"]
    (spike,) = diagnose(spiked)
    assert spike.first_step == pytest.approx(600, abs=3)
    assert spike.last_step is not None
    assert ids(bare(steps, good, 1e-3 * np.minimum(1, steps / 50))) == ["no_decay"]
    at = np.arange(100, 1001, 100.0)
    val = np.where(at > 400, 2.9 + 0.5 * (at - 400) / 600, 2 + 6.3 * (1 + at / 5) ** -0.5)
    evals = Table({"step": at, "val_loss": val})
    assert ids(bare(steps, good, evals=evals)) == ["overfitting"]
    speed = np.where(steps > 600, 0.3, 1.0) * 5e4
    slowed = bare(steps, good)
    slowed.train.columns["tokens_per_s"] = speed
    assert ids(slowed) == ["throughput"]
    for finding in diagnose(slowed) + diagnose(spiked) + diagnose(flat):
        assert "None" not in finding.next, finding


ODD = [math.nan, math.inf, -math.inf, 1e308, -1e308, 0.0, 1e-320]


@pytest.mark.parametrize("lines", [0, 1, 2, 3, 4, 40])
@pytest.mark.parametrize("value", ODD)
def test_odd_logs_raise_nothing(value: float, lines: int) -> None:
    steps = np.arange(1.0, lines + 1)
    odd = np.full(lines, value)
    for name in ("loss", "lr", "tokens_per_s", "slope_before", "grad_norm", "step"):
        known: dict[str, Any] = {"loss": np.full(lines, 3.0), "step": steps, "lr": odd}
        known[name] = odd
        columns = Table(known)
        none = Table({"step": np.empty(0)})
        if name != "step" or math.isfinite(value):
            verdict(History("odd", "csv", columns, none, none))
            verdict(History("odd", "csv", columns, Table({"step": steps, "val_loss": odd}), none))


NUMBERS = st.one_of(
    st.floats(allow_nan=True, allow_infinity=True), st.floats(0, 12), st.sampled_from(ODD)
)
NAMES = ["loss", "lr", "grad_norm", "loss_mean", "loss_max", "slope_before", "slope_after"]
NAMES += ["update_ratio", "clipped_share", "tokens_per_s", "time_s", "epoch", "step_time_s"]


@st.composite
def logs(draw: st.DrawFn) -> list[Line]:
    """Lines with any numbers, in any order of steps, with what else a log may hold."""
    count = draw(st.integers(0, 60))
    names = draw(st.lists(st.sampled_from(NAMES), unique=True))
    base = draw(st.sampled_from(["any", "falling", "flat"]))
    lines: list[Line] = []
    for number in range(count):
        line: Line = {"kind": "train", "step": number * draw(st.sampled_from([0, 1, 1, 7]))}
        for name in names:
            line[name] = draw(NUMBERS) if base == "any" else 8 / (1 + (base == "falling") * number)
        lines.append(line)
    for step in draw(st.lists(st.integers(0, 10**6), max_size=6)):
        lines.append({"kind": "eval", "step": step, "val_loss": draw(NUMBERS)})
        lines.append(
            {"kind": "layers", "step": step, "grad_norm": {n: draw(NUMBERS) for n in MATRICES}}
            | {"dead_share": {"blocks.0": draw(NUMBERS)}}
        )
    if draw(st.booleans()):
        lines.append(event(0, "run", total_steps=draw(st.integers(0, 10**9)), vocab_size=4096))
        lines.append(event(0, "data_check", unigram_entropy=draw(st.floats(0, 9))))
    return lines


@settings(max_examples=60)
@given(lines=logs(), own=st.booleans())
def test_any_log_raises_nothing(lines: list[Line], own: bool) -> None:
    known = history_of(lines, config_of() if own else None)
    found = diagnose(known)
    verdict(known.until(3))
    assert {finding.id for finding in found} <= set(IDS)


def test_smoothing_and_slopes() -> None:
    values = 3 - 0.01 * np.arange(200.0)
    assert centred_mean(values) == pytest.approx(values)
    slope, low, high = theil_sen(np.arange(200.0), values)
    assert (slope, low, high) == pytest.approx((-0.01, -0.01, -0.01))
    rng = np.random.default_rng(0)
    held = 0
    for _ in range(100):
        noisy = values + 0.3 * rng.normal(size=200)
        _, low, high = theil_sen(np.arange(200.0), noisy)
        held += low <= -0.01 <= high
    assert 88 <= held <= 100
    sigma = View(bare(np.arange(1, 201.0), values + 0.3 * rng.normal(size=200))).sigma
    assert sigma == pytest.approx(0.3, rel=0.2)


def test_a_step_that_comes_twice_has_no_slope_of_its_own() -> None:
    twice = np.repeat(np.arange(50.0), 2)
    assert theil_sen(twice, 3 - 0.1 * twice) == pytest.approx((-0.1, -0.1, -0.1))
    assert theil_sen(np.ones(9), np.arange(9.0)) == (0, -math.inf, math.inf)


def test_medians_of_what_came_before_are_numpys():
    values = np.random.default_rng(0).normal(size=90).round(1)
    expected = [np.median(values[: max(1, count)]) for count in range(90)]
    assert _medians_before(values).tolist() == expected


def windows_of(steps: Column, losses: Column) -> dict[str, Column]:
    """What is logged at `steps` of a loss for each step: mean and highest since the line before."""
    ends = steps.astype(int)
    parts = list(itertools.pairwise([0, *ends]))
    return {
        "loss": losses[ends - 1],
        "loss_mean": np.array([losses[start:end].mean() for start, end in parts]),
        "loss_max": np.array([losses[start:end].max() for start, end in parts]),
    }


@pytest.mark.parametrize("share", [0.01, 0.02])
@pytest.mark.parametrize(("total", "every"), [(5000, 10), (5000, 50), (20_000, 100)])
def test_noise_of_single_steps_is_no_jump(total: int, every: int, share: float) -> None:
    steps = steps_of(total, every)
    rates = cosine(steps, warmup=share * total)
    config = config_of(
        train__max_steps=str(total), schedule__warmup_steps=str(round(share * total))
    )
    for seed in range(3):
        noisy = falling(np.arange(1, total + 1.0), noise=0.15, seed=seed)
        lines = sound(steps=steps, lr=rates, **windows_of(steps, noisy))
        assert ids(history(lines, config)) == []


def test_a_jump_within_a_line_stands_out_of_that_noise() -> None:
    total = 5000
    steps, every_step = steps_of(total, 50), np.arange(1, total + 1.0)
    losses = falling(every_step, noise=0.15)
    losses[60:75] += 4
    config = config_of(train__max_steps=str(total), schedule__warmup_steps="50")
    lines = sound(steps=steps, lr=cosine(steps, warmup=50), **windows_of(steps, losses))
    assert ids(history(lines, config)) == ["warmup_too_short"]


@pytest.mark.parametrize("kind", ["normal", "lognormal"])
@pytest.mark.parametrize("noise", [0.1, 0.4])
def test_noisy_lines_of_single_steps_are_no_climb(kind: str, noise: float) -> None:
    steps = np.arange(1, 3001.0)
    rates = 2e-5 * np.minimum(1, steps / 90) * (1 - steps / 3001)
    for seed in range(6):
        drawn = np.random.default_rng(seed).normal(0, noise, len(steps))
        level = 1.1 + 0.4 * np.exp(-steps / 300)
        losses = level + drawn if kind == "normal" else level * np.exp(drawn)
        assert ids(bare(steps, losses, rates, total_steps=3000)) == []


def test_a_long_log_with_a_line_a_step_is_silent() -> None:
    steps = np.arange(1, 20_001.0)
    losses = falling(steps, start=10.9, noise=0.1)
    assert ids(bare(steps, losses, cosine(steps, warmup=1), total_steps=20_000)) == []


def test_a_log_that_begins_late_tells_nothing_of_its_beginning() -> None:
    steps = np.arange(100_000, 110_001, 50.0)
    losses = 2.8 - 0.01 * np.linspace(0, 1, len(steps))
    losses += 0.002 * np.random.default_rng(0).normal(size=len(steps))
    assert ids(bare(steps, losses, np.full(len(steps), 2e-4), total_steps=500_000)) == []
    assert ids(bare(steps, losses)) == []


def test_a_rate_on_its_way_down_is_no_rate_that_is_never_lowered() -> None:
    steps = np.arange(10, 3001, 10.0)
    rates = cosine(np.arange(10, 10_001, 10.0), warmup=200)[: len(steps)]
    losses = falling(np.arange(10, 10_001, 10.0))[: len(steps)]
    assert ids(bare(steps, losses, rates)) == []
    level = np.minimum(1e-3, 1e-3 * steps / 200)
    level[-1] = math.nan
    (found,) = diagnose(bare(steps, losses, level))
    assert (found.id, found.numbers["end_share"]) == ("no_decay", 1)


def test_a_longer_warmup_can_be_typed() -> None:
    steps = steps_of()
    losses = falling(steps) + np.where((steps > 40) & (steps < 100), 3.0, 0)
    config = config_of(schedule__warmup_steps="null", schedule__warmup_fraction="0.02")
    (found,) = diagnose(history(sound(steps=steps, loss=losses), config))
    assert found.id == "warmup_too_short"
    words = shlex.split(found.next)[3:]
    typed = dict(zip((word.removeprefix("--") for word in words[::2]), words[1::2], strict=True))
    assert typed["schedule.warmup_fraction"] == "null"


def test_one_enormous_loss_leaves_the_others_means() -> None:
    values = np.full(100, 5.0)
    values[50] = 1e20
    means = centred_mean(values)
    np.testing.assert_allclose(means[[0, 30, -1]], 5.0)
