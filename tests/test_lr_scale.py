"""A config at another batch, width, depth or length: golden arithmetic, and a copy that loads."""

import json
import math
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpt.config import Config
from gpt.configfile import dump_config, load_config
from gpt.errors import UserError
from gpt.lr.rules import horizon_rate, scaled_beta2, scaled_decay, scaled_rate
from gpt.lr.scale import Scaled, scale
from tests.conftest import ConfigMaker, tiny_config
from tests.test_contract import command

ratios = st.floats(1e-4, 1e4)


def values(scaled: Scaled) -> dict[str, object]:
    return {change.key: change.after for change in scaled.changes}


def test_golden_formulas() -> None:
    assert scaled_rate(3e-4, 4, "sqrt") == pytest.approx(6e-4)
    assert scaled_rate(3e-4, 4, "linear") == pytest.approx(1.2e-3)
    assert scaled_rate(3e-4, 1 / 16, "sqrt") == pytest.approx(7.5e-5)
    assert scaled_beta2(0.0, 0.95, 4) == pytest.approx(0.95**4)
    assert scaled_beta2(0.9, 0.95, 1 / 512) == pytest.approx(0.9999, abs=1e-5)
    assert scaled_beta2(0.9, 0.95, 100) == 0.9
    assert scaled_beta2(0.99, 0.95, 2) == pytest.approx(0.95), "never above where it was"
    assert scaled_beta2(0.9, 0.95, 1e-9) < 1
    assert scaled_decay(0.1, batch_ratio=4, lr_ratio=2, tokens_ratio=1) == pytest.approx(0.2)
    assert scaled_decay(0.1, batch_ratio=1, lr_ratio=1, tokens_ratio=10) == pytest.approx(0.01)
    assert horizon_rate(1e-3, 10) == pytest.approx(1e-3 * 10**-0.32)
    assert horizon_rate(1e-3, 2) == pytest.approx(8.011e-4, rel=1e-4)


@given(beta2=st.floats(0.5, 0.9999), ratio=st.floats(0.01, 100))
def test_beta2_keeps_its_half_life_in_tokens(beta2: float, ratio: float) -> None:
    after = scaled_beta2(0.0, beta2, ratio)
    if 0 < after < 1 - 1e-7:
        assert math.log(2) / -math.log(after) * ratio == pytest.approx(
            math.log(2) / -math.log(beta2), rel=1e-6
        )


@given(batch=ratios, lr=ratios, tokens=ratios)
def test_decay_keeps_the_timescale(batch: float, lr: float, tokens: float) -> None:
    after = scaled_decay(0.1, batch_ratio=batch, lr_ratio=lr, tokens_ratio=tokens)
    assert batch / (lr * after * tokens) == pytest.approx(1 / 0.1)


def test_batch_for_adamw(make_config: ConfigMaker) -> None:
    config = make_config(
        train__max_steps="1000",
        schedule__warmup_steps="100",
        schedule__min_lr="1e-3",
        train__micro_batch_size="3",
    )
    scaled = scale(config, batch=24)
    assert values(scaled) == {
        "train.batch_size": 24,
        "train.max_steps": 250,
        "schedule.warmup_steps": 25,
        "optimizer.lr": 0.02,
        "schedule.min_lr": 0.002,
        "optimizer.betas": (0.9, 0.9),
        "optimizer.weight_decay": 0.2,
    }
    after = scaled.config
    assert after.tokens_per_step * after.total_steps(0) == 1000 * config.tokens_per_step
    assert any("0.814506" in change.arithmetic for change in scaled.changes), "β₂ = 0.95^4"


def test_a_smaller_batch_keeps_the_micro_batch_within_it(make_config: ConfigMaker) -> None:
    scaled = scale(make_config(train__micro_batch_size="3"), batch=2)
    assert scaled.config.train.micro_batch_size == 2
    assert scaled.config.optimizer.betas[1] == pytest.approx(0.95 ** (1 / 3))


def test_batch_for_sgd_is_linear_and_leaves_the_rest(make_config: ConfigMaker) -> None:
    config = make_config(optimizer__name="sgd", optimizer__weight_decay="1e-4")
    scaled = scale(config, batch=12)
    assert scaled.config.optimizer.lr == pytest.approx(0.02)
    assert scaled.config.optimizer.weight_decay == 1e-4
    assert scaled.config.optimizer.betas == config.optimizer.betas
    assert any("weight_decay stays" in note for note in scaled.notes)


@pytest.mark.parametrize(("rule", "lr"), [("linear", 0.04), ("sqrt", 0.02), ("none", 0.01)])
def test_the_rule_can_be_chosen(rule: str, lr: float, make_config: ConfigMaker) -> None:
    for name in ("sgd", "adamw"):
        scaled = scale(make_config(optimizer__name=name), batch=24, rule=rule)  # type: ignore[arg-type]
        assert scaled.config.optimizer.lr == pytest.approx(lr)


def test_the_batch_that_lr_was_chosen_at_counts(make_config: ConfigMaker) -> None:
    scaled = scale(make_config(optimizer__lr_batch_size="24"), batch=6)
    assert scaled.config.optimizer.lr == pytest.approx(0.01 / 2)
    assert scaled.config.optimizer.lr_batch_size is None
    assert scaled.config.train.max_steps == 12
    longer = scale(make_config(optimizer__lr_batch_size="24"), tokens=12 * 6 * 16 * 2)
    assert longer.config.optimizer.lr_batch_size == 24


def test_limits_in_tokens_and_epochs_stay(make_config: ConfigMaker) -> None:
    config = make_config(
        train__max_steps="null", train__max_tokens="96000", schedule__warmup_steps="100"
    )
    scaled = scale(config, batch=12)
    assert scaled.config.train == config.train.model_copy(update={"batch_size": 12})
    assert scaled.config.schedule.warmup_steps == 50


@pytest.mark.parametrize(
    ("length", "schedule", "batch", "lengths"),
    [
        ({"max_steps": "10"}, {"warmup_steps": "3", "decay_steps": "7"}, 12, (2, 3)),
        ({"max_tokens": "960"}, {"warmup_steps": "3", "decay_steps": "7"}, 12, (2, 3)),
        ({"max_steps": "10"}, {"warmup_steps": "3", "decay_fraction": "0.7"}, 12, (1, 4)),
        ({"max_steps": "10"}, {"warmup_fraction": "0.3", "decay_steps": "7"}, 12, (2, 3)),
        ({"max_steps": "10"}, {"warmup_steps": "9", "decay_steps": "1"}, 60, (0, 1)),
        ({"max_steps": "10"}, {"warmup_steps": "2", "decay_steps": "6"}, 12, (1, 3)),
    ],
)
def test_a_warmup_and_a_tail_that_were_both_rounded_up_fit(
    length: dict[str, str],
    schedule: dict[str, str],
    batch: int,
    lengths: tuple[int, int],
    make_config: ConfigMaker,
) -> None:
    limits = {"train__max_steps": "null"} | {f"train__{key}": v for key, v in length.items()}
    given = {f"schedule__{key}": value for key, value in schedule.items()}
    config = make_config(schedule__name="wsd", **limits, **given)
    after = scale(config, batch=batch).config
    total = after.total_steps(0)
    assert (after.warmup_steps(total), after.decay_steps(total)) == lengths
    assert sum(lengths) <= total


def test_a_rewarmed_run_is_scaled_as_a_new_one(make_config: ConfigMaker) -> None:
    config = make_config(schedule__restart_step="9")
    for sizes in ({"batch": 12}, {"width": 32}):
        scaled = scale(config, **sizes)
        assert scaled.config.schedule.restart_step is None
        assert values(scaled)["schedule.restart_step"] is None
        assert any("began anew at step 9" in note for note in scaled.notes)
    assert scale(config, batch=12).config.train.max_steps == 6


def test_length(make_config: ConfigMaker) -> None:
    config = make_config(train__max_steps="1000", schedule__warmup_steps="100")
    scaled = scale(config, tokens=96_000 * 10)
    assert scaled.config.train.max_steps == 10_000
    assert scaled.config.schedule.warmup_steps == 1000
    factor = 10**-0.32
    assert scaled.config.optimizer.lr == pytest.approx(0.01 * factor, rel=1e-5)
    assert scaled.config.optimizer.weight_decay == pytest.approx(0.1 / factor / 10, rel=1e-4)
    assert scaled.config.optimizer.betas == (0.9, 0.95)
    both = scale(config, batch=24, tokens=96_000 * 10).config
    assert both.train.max_steps == 2500
    assert both.optimizer.lr == pytest.approx(0.02 * factor, rel=1e-5)
    assert both.optimizer.weight_decay == pytest.approx(0.1 * 4 / (2 * factor * 10), rel=1e-4)
    left = scale(config, tokens=96_000 * 10, rule="none").config
    assert left.optimizer.lr == 0.01
    assert left.optimizer.weight_decay == pytest.approx(0.01)


def test_length_of_an_unknown_text(make_config: ConfigMaker) -> None:
    config = make_config(train__max_steps="null", train__max_epochs="2")
    with pytest.raises(UserError, match="gpt-data build"):
        scale(config, tokens=1000)


def test_width_by_mup(make_config: ConfigMaker) -> None:
    config = make_config(model__n_head="4", model__n_kv_head="2", model__n_hidden="50")
    scaled = scale(config, width=64)
    assert values(scaled) == {
        "model.mup_base_width": 16,
        "model.n_embd": 64,
        "model.n_head": 16,
        "model.n_kv_head": 8,
        "model.n_hidden": 200,
    }
    assert scaled.config.model.head_dim == config.model.head_dim
    assert scaled.config.optimizer == config.optimizer, "lr is the base's"
    again = scale(scaled.config, width=32).config.model
    assert (again.mup_base_width, again.width_ratio) == (16, 2)
    text = " ".join(scaled.effects)
    assert "matrices: lr 0.01 x 0.25 = 0.0025, weight_decay 0.1 x 4 = 0.4" in text


def test_width_where_heads_must_grow(make_config: ConfigMaker) -> None:
    model = scale(make_config(), width=20).config.model
    assert (model.n_head, model.head_dim, model.mup_base_head_dim) == (2, 10, 8)
    with pytest.raises(UserError, match="not divisible"):
        scale(make_config(), width=21)
    with pytest.raises(UserError, match="take a width"):
        scale(make_config(model__n_head="4", model__n_kv_head="2"), width=20)


def test_depth_by_completep(make_config: ConfigMaker) -> None:
    scaled = scale(make_config(model__preset="cpu-1m"), depth=6)
    model = scaled.config.model
    assert (model.n_layer, model.mup_base_depth, model.mup_base_width) == (6, 2, 16)
    assert model.preset is None
    assert (model.width_ratio, model.depth_ratio) == (1, 3)
    assert any("residual branches / 3" in effect for effect in scaled.effects)


def test_muon_shows_each_parts_own_rate(make_config: ConfigMaker) -> None:
    config = make_config(optimizer__name="muon", optimizer__adamw_lr="0.002")
    effects = " ".join(scale(config, width=64).effects)
    assert "matrices: lr 0.01 x 0.5 = 0.005" in effects
    assert "embeddings: lr 0.002," in effects
    assert scale(config, batch=24).config.optimizer.adamw_lr == pytest.approx(0.004)


def test_the_size_that_it_has_changes_nothing(make_config: ConfigMaker) -> None:
    config = make_config()
    scaled = scale(config, batch=6, width=16, depth=2)
    assert scaled.changes == ()
    assert scaled.config == config


@pytest.mark.parametrize(
    ("optimizer", "sizes", "message"),
    [
        ("adafactor", {"batch": 12}, "no rule is known for adafactor"),
        ("adafactor", {"width": 32}, "no rule for adafactor"),
        ("adam", {"width": 32}, "no rule for adam's weight_decay"),
        ("sgd", {"depth": 4}, "no rule for sgd"),
        ("adamw", {}, "--batch N, --width N, --depth N or --tokens N"),
        ("adamw", {"width": 10**6}, "model.n_embd: would be 1000000"),
        ("adamw", {"depth": 10**6}, "model.n_layer: would be 1000000"),
    ],
)
def test_what_cannot_be(
    optimizer: str, sizes: dict[str, int], message: str, make_config: ConfigMaker
) -> None:
    with pytest.raises(UserError, match=message):
        scale(make_config(optimizer__name=optimizer), **sizes)


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    path = tmp_path / "tiny.yaml"
    path.write_text(dump_config(tiny_config(tmp_path)), encoding="utf-8")
    return path


def test_apply_writes_exactly_the_config_and_the_changes(tiny: Path) -> None:
    shown = command("gpt-lr", "scale", "--config", str(tiny), "--batch", "24", "--apply")
    assert shown.returncode == 0, shown.stderr
    target = tiny.with_name("tiny-scaled.yaml")
    before, after = load_config(tiny), load_config(target)
    expected = scale(before, batch=24).config.model_dump()
    expected["run"]["name"] = "tiny-scaled"
    assert after == Config.model_validate(expected)
    text = target.read_text(encoding="utf-8")
    assert "#   optimizer.lr: 0.01 -> 0.02 (0.01 x √4 = 0.02)" in text
    assert str(target) in shown.stderr
    again = command("gpt-lr", "scale", "--config", str(tiny), "--batch", "2", "--apply")
    assert again.returncode == 2
    assert "is there already" in again.stderr
    assert target.read_text(encoding="utf-8") == text


def test_apply_to_a_named_file_and_overrides(tiny: Path) -> None:
    target = tiny.with_name("wide.yaml")
    options = ("--width", "64", "--apply", str(target), "--optimizer.lr", "0.005")
    assert command("gpt-lr", "scale", "--config", str(tiny), *options).returncode == 0
    after = load_config(target)
    assert (after.model.n_embd, after.model.mup_base_width, after.optimizer.lr) == (64, 16, 0.005)


def test_the_scaled_runs_name_is_no_longer_than_names_may_be(tmp_path: Path) -> None:
    path = tmp_path / "tiny.yaml"
    path.write_text(dump_config(tiny_config(tmp_path, run__name="x" + "é" * 99)), encoding="utf-8")
    shown = command("gpt-lr", "scale", "--config", str(path), "--batch", "24", "--apply")
    assert shown.returncode == 0, shown.stderr
    assert load_config(tmp_path / "tiny-scaled.yaml").run.name == "x" + "é" * 96 + "-scaled"


def test_the_arithmetic_is_printed_with_its_source(tiny: Path) -> None:
    shown = command("gpt-lr", "scale", "--config", str(tiny), "--batch", "24").stdout
    for text in ("0.01 x √4 = 0.02", "2205.10287", "2507.07101", "2405.13698", "12 x 6 / 24 = 3"):
        assert text in shown
    found = json.loads(
        command("gpt-lr", "scale", "--config", str(tiny), "--batch", "24", "--json").stdout
    )
    assert found["changes"]["optimizer.lr"] == pytest.approx(0.02)
    assert all(set(step) >= {"key", "before", "after", "source"} for step in found["steps"])


@pytest.mark.parametrize(
    "options",
    [
        (),
        ("--batch", "0"),
        ("--batch", "-3"),
        ("--batch", "many"),
        ("--batch", "2.5"),
        ("--tokens", "nan"),
        ("--tokens", "1e30"),
        ("--width", "17"),
        ("--rule", "cubic", "--batch", "8"),
        ("--batch", "8", "--apply", "no/such/folder/x.yaml"),
        ("--batch", "8", "--apply", "x" * 300),
        ("--batch", "8", "--apply", f"{'x' * 300}/x.yaml"),
    ],
)
def test_bad_options(options: tuple[str, ...], tiny: Path) -> None:
    result = command("gpt-lr", "scale", "--config", str(tiny), *options, cwd=tiny.parent)
    assert result.returncode == 2, result.stderr
    assert "error: " in result.stderr
    assert "Traceback" not in result.stderr
    assert sorted(tiny.parent.glob("*.yaml")) == [tiny]


def test_large_counts_may_be_written_short(tiny: Path) -> None:
    for text in ("96e3", "96_000", "96000"):
        result = command("gpt-lr", "scale", "--config", str(tiny), "--tokens", text, "--json")
        assert json.loads(result.stdout)["changes"]["train.max_steps"] == 1000
