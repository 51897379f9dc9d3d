"""Published estimates of the rate: their arithmetic, their ranges, and never one alone."""

import json
import math
import shlex
from pathlib import Path

import pytest

from gpt.configfile import dump_config
from gpt.lr.size import measure_run
from gpt.lr.suggest import (
    CEREBRAS,
    Estimate,
    chapter,
    deepseek,
    from_table,
    kaplan,
    porian,
    step_law,
    suggest,
)
from gpt.model import GPT, count_parameters
from tests.conftest import ConfigMaker
from tests.test_contract import command

N, D = 10_600_000, 82_000_000


def test_golden_values() -> None:
    assert kaplan(N).lr == pytest.approx(9.817e-4, rel=1e-3)
    assert deepseek(6 * N, D).lr == pytest.approx(3.382e-3, rel=1e-3)
    assert step_law(N, D).lr == pytest.approx(4.714e-3, rel=1e-3)
    assert porian(N).lr == pytest.approx(1.094e-2, rel=5e-3)
    assert step_law(1_000_000_000, 100_000_000_000).lr == pytest.approx(
        1.79 * 1e9**-0.713 * 1e11**0.307
    )


def test_golden_batches() -> None:
    assert step_law(10**9, 10**11).batch_tokens == pytest.approx(0.58 * 1e11**0.571, abs=1)
    assert deepseek(6 * 10**9, 10**9).batch_tokens == pytest.approx(0.292 * 6e18**0.3271, abs=1)
    assert porian(10**8).batch_tokens == pytest.approx(0.7576 * 1e8**0.703, abs=1)
    assert kaplan(N).batch_tokens is None


@pytest.mark.parametrize(
    ("inside", "below", "above"),
    [
        (kaplan(10**6), kaplan(700), kaplan(2 * 10**9)),
        (deepseek(10**8, 10**10), deepseek(10**6, 10**10), deepseek(10**10, 10**10)),
        (step_law(5 * 10**8, 10**10), step_law(10**8, 10**10), step_law(5 * 10**8, 10**12)),
        (porian(10**8), porian(10**7), porian(10**9)),
        (chapter(10**8), chapter(10**7), chapter(10**12)),
        *[tuple(from_table(n, CEREBRAS, "x") for n in (10**9, 10**8, 10**11))],
    ],
)
def test_extrapolation_is_flagged(inside: Estimate, below: Estimate, above: Estimate) -> None:
    flags = [estimate.extrapolated for estimate in (inside, below, above)]
    assert flags == [False, True, True]


def test_a_table_is_straight_in_logarithms_and_flat_outside() -> None:
    table = ((1e8, 4e-4), (1e10, 1e-4))
    assert from_table(10**9, table, "x").lr == pytest.approx(2e-4)
    assert from_table(10**8, table, "x").lr == pytest.approx(4e-4)
    assert from_table(10**7, table, "x").lr == 4e-4
    assert from_table(10**11, table, "x").lr == 1e-4


def test_the_chapters_bands() -> None:
    small, middle = chapter(124_000_000), chapter(1_100_000_000)
    assert (small.low, small.high) == (3e-4, 1e-3)
    assert (middle.low, middle.high) == (1e-4, 3e-4)
    assert small.lr == pytest.approx(math.sqrt(3e-7))


def test_kaplan_has_no_rate_where_its_line_is_below_zero() -> None:
    assert kaplan(2 * 10**10).lr is None


def test_sizes_are_counted_as_the_sources_do(make_config: ConfigMaker) -> None:
    config = make_config(model__tie_embeddings="true", model__position="learned")
    size, _ = measure_run(config)
    model = GPT(config.model, 257)
    assert size.parameters == count_parameters(model)
    blocks = [p.numel() for name, p in model.named_parameters() if "blocks" in name and p.ndim > 1]
    assert size.matrices == sum(blocks) == 12 * 2 * 16 * 16
    assert size.with_head == size.matrices + 257 * 16
    # 72·layers·d² + 12·layers·d·context, as DeepSeek writes it.
    assert size.flops_per_token == 72 * 2 * 16**2 + 12 * 2 * 16 * 16
    assert size.tokens == 12 * 6 * 16
    assert size.batch_tokens == 6 * 16


def test_no_text_is_read_and_nothing_is_written(make_config: ConfigMaker, tmp_path: Path) -> None:
    config = make_config(data__source="nowhere.txt", tokenizer__kind="bpe")
    before = sorted(tmp_path.rglob("*"))
    suggestions = suggest(config)
    assert suggestions.size.parameters > 4096 * 16
    assert sorted(tmp_path.rglob("*")) == before


def test_epochs_of_an_unknown_text_leave_estimates_open(make_config: ConfigMaker) -> None:
    suggestions = suggest(make_config(train__max_steps="null", train__max_epochs="3"))
    assert suggestions.size.tokens is None
    open_ones = [estimate for estimate in suggestions.estimates if estimate.lr is None]
    assert len(open_ones) == 2
    assert all(estimate.extrapolated is None for estimate in open_ones)
    assert any("gpt-data build" in note for note in suggestions.notes)


@pytest.mark.parametrize("name", ["adam", "adamw", "muon"])
def test_the_spread_spans_all_estimates(name: str, make_config: ConfigMaker) -> None:
    suggestions = suggest(make_config(optimizer__name=name))
    rates = [estimate.lr for estimate in suggestions.estimates if estimate.lr is not None]
    assert len(rates) == 8
    assert suggestions.spread is not None
    low, high = suggestions.spread
    each_has = [(each.low, each.lr, each.high) for each in suggestions.estimates]
    ends = [rate for rates_of in each_has for rate in rates_of if rate is not None]
    assert (low, high) == (min(ends), max(ends))
    assert (name == "muon") == any("for muon no source" in note for note in suggestions.notes)


@pytest.mark.parametrize("name", ["sgd", "adafactor"])
def test_no_source_fits_other_optimizers(name: str, make_config: ConfigMaker) -> None:
    suggestions = suggest(make_config(optimizer__name=name))
    assert suggestions.estimates == ()
    assert suggestions.as_json()["spread"] == [None, None]
    assert any("no source fits" in note for note in suggestions.notes)


def test_mup_is_pointed_out(make_config: ConfigMaker) -> None:
    with_mup = suggest(make_config(model__mup_base_width="8"))
    assert any("muP" in note for note in with_mup.notes)
    assert not any("muP" in note for note in suggest(make_config()).notes)


def test_the_command_ends_with_the_spread(make_config: ConfigMaker, tmp_path: Path) -> None:
    path = tmp_path / "tiny.yaml"
    path.write_text(dump_config(make_config()), encoding="utf-8")
    shown = command("gpt-lr", "suggest", "--config", str(path))
    assert shown.returncode == 0, shown.stderr
    last = shown.stdout.split("\n\n")[-1].replace("\n", " ")
    assert last.startswith("spread: ")
    assert "extrapolated (" in last
    assert f"measure  gpt-lr find --config {path}" in last
    answer = command("gpt-lr", "suggest", "--config", str(path), "--json")
    found = json.loads(answer.stdout)
    assert len(found["estimates"]) == 8
    for estimate in found["estimates"]:
        assert set(estimate) >= {"source", "formula", "range", "lr", "extrapolated"}
        assert f"{estimate['lr']:.1e}" in shown.stdout
    assert found["spread"][0] < found["spread"][1]


def test_the_command_that_measures_can_be_typed(make_config: ConfigMaker, tmp_path: Path) -> None:
    path = tmp_path / "my own" / f"{'long-' * 20}tiny.yaml"
    path.parent.mkdir()
    path.write_text(dump_config(make_config()), encoding="utf-8")
    options = ("--config", str(path), "--optimizer.betas", "[0.9, 0.99]")
    shown = command("gpt-lr", "suggest", *options).stdout.splitlines()[-1]
    assert shlex.split(shown) == ["measure", "gpt-lr", "find", *options]


def test_a_config_that_is_not_there() -> None:
    missing = command("gpt-lr", "suggest", "--config", "configs/quikstart.yaml")
    assert missing.returncode == 2
    assert "did you mean configs/quickstart.yaml?" in missing.stderr
