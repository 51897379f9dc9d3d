"""Published recipes: their figures, and that the usual rates hold every one of them."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpt.config import PRESETS, ModelConfig
from gpt.lr.recipes import RECIPES, recipe_of_preset, table_rate, usual_rates
from gpt.model import parameter_inventory

OPTIMIZERS = ("sgd", "adam", "adamw", "muon", "adafactor")


def test_gpt3_table_is_the_papers():
    rates = {r.name: (r.lr, r.batch_tokens) for r in RECIPES if r.name.startswith("GPT-3")}
    assert rates == {
        "GPT-3 125M": (6e-4, 500_000),
        "GPT-3 350M": (3e-4, 500_000),
        "GPT-3 760M": (2.5e-4, 500_000),
        "GPT-3 1.3B": (2e-4, 1_000_000),
        "GPT-3 2.7B": (1.6e-4, 1_000_000),
        "GPT-3 6.7B": (1.2e-4, 2_000_000),
        "GPT-3 13B": (1e-4, 2_000_000),
        "GPT-3 175B": (6e-5, 3_200_000),
    }


def test_names_are_unique_and_sources_are_given():
    assert len({recipe.name for recipe in RECIPES}) == len(RECIPES)
    assert all(recipe.source for recipe in RECIPES)


@pytest.mark.parametrize("recipe", [r for r in RECIPES if r.preset], ids=lambda r: r.name)
def test_the_preset_of_a_recipe_has_its_size(recipe):
    assert recipe.preset in PRESETS
    vocab_size = 32_000 if recipe.preset.startswith("llama") else 50_257
    rows = parameter_inventory(ModelConfig.model_validate({"preset": recipe.preset}), vocab_size)
    assert sum(row.count for row in rows) == pytest.approx(recipe.parameters, rel=0.03)
    assert recipe_of_preset(recipe.preset) is recipe


def test_no_preset_has_no_recipe():
    assert recipe_of_preset(None) is None
    assert recipe_of_preset("cpu-1m") is None


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda r: r.name)
def test_every_published_rate_is_usual(recipe):
    assert recipe.lr in usual_rates("adamw", recipe.parameters)


def test_the_table_is_hit_and_joined():
    assert table_rate(125e6) == pytest.approx(6e-4)
    assert table_rate(1.3e9) == pytest.approx(2e-4)
    assert table_rate(1e6) == 1e-3
    assert table_rate(1e15) == 6e-5
    between = table_rate((125e6 * 350e6) ** 0.5)
    assert between == pytest.approx((6e-4 * 3e-4) ** 0.5)


@given(st.floats(1e3, 1e12), st.floats(1.0, 1e3), st.sampled_from(OPTIMIZERS))
def test_larger_models_never_bear_more(parameters, factor, optimizer):
    small, large = (usual_rates(optimizer, n) for n in (parameters, parameters * factor))
    assert 0 < small.low < small.high
    assert large.low <= small.low * (1 + 1e-9)
    assert large.high <= small.high * (1 + 1e-9)


@pytest.mark.parametrize(
    ("optimizer", "parameters", "fine", "wrong"),
    [
        ("adamw", 1.3e6, (1e-4, 3e-4, 1e-3, 3e-3, 1e-2), (1e-7, 1e-5, 0.1)),
        ("adamw", 10e6, (3e-4, 1e-3, 3e-3), (1e-5, 0.1)),
        ("adam", 124e6, (1e-4, 3e-4, 6e-4, 3e-3), (1e-6, 1e-2)),
        ("muon", 1.3e6, (1e-3, 1e-2, 3e-2), (3e-4, 1.0)),
        ("muon", 124e6, (1e-3, 2e-2), (1e-4, 0.1)),
        ("sgd", 1e6, (0.01, 0.1, 1.0), (3e-4, 100.0)),
        ("adafactor", 1e6, (1e-3, 1e-2), (3e-4, 1.0)),
    ],
)
def test_usual_rates(optimizer, parameters, fine, wrong):
    usual = usual_rates(optimizer, parameters)
    assert [lr for lr in fine if lr not in usual] == []
    assert [lr for lr in wrong if lr in usual] == []


def test_unknown_optimizer():
    with pytest.raises(ValueError, match="lion"):
        usual_rates("lion", 1e6)
