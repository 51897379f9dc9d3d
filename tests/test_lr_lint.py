"""Each rule of the lint: it speaks of the mistake, and is quiet for what people do and publish."""

import math
import re
from pathlib import Path

import pytest

from gpt.build import expected_vocab_size
from gpt.config import Config, contradictions
from gpt.configfile import load_config
from gpt.lr.findings import Facts, Finding
from gpt.lr.lint import lint, unchecked
from gpt.lr.recipes import RECIPES
from gpt.model import parameter_inventory
from gpt.plan import Plan

ROOT = Path(__file__).parents[1]
CONTRACT_IDS = [
    "warmup_too_long",
    "peak_not_reached",
    "floor_above_peak",
    "lr_far_from_size",
    "lr_for_other_optimizer",
    "lr_for_other_batch",
    "coupled_decay",
    "decay_range",
    "betas_for_batch",
    "dtype_unsupported",
    "context_longer_than_documents",
    "many_epochs",
    "cosine_overrun",
]
BASE = {
    "model.preset": "cpu-1m",
    "optimizer.name": "adamw",
    "optimizer.lr": "1e-3",
    "optimizer.weight_decay": "0.1",
    "schedule.warmup_steps": "100",
    "train.max_steps": "2000",
    "train.batch_size": "32",
    "train.dtype": "fp32",
}
ENOUGH = Facts(1_300_000, train_tokens=20_000_000, documents=5_000, device="cpu", has_bf16=True)


def config_with(**changes: str | None) -> Config:
    values = BASE | {key.replace("__", "."): value for key, value in changes.items()}
    given = [(key, value) for key, value in values.items() if value is not None]
    return load_config(None, given, for_lint=True)


def findings(facts: Facts = ENOUGH, **changes: str | None) -> list[Finding]:
    config = config_with(**changes)
    plan = Plan.from_config(config, config.total_steps(facts.train_tokens or 1), strict=False)
    found = lint(config, plan, facts)
    for one in found:
        assert one.id in CONTRACT_IDS
        assert all((one.message, one.remedy, one.source))
        assert "\n" not in one.message + one.remedy + one.source
    return found


def ids(facts: Facts = ENOUGH, **changes: str | None) -> list[str]:
    return [finding.id for finding in findings(facts, **changes)]


def facts(**changes: object) -> Facts:
    return Facts(**{**vars(ENOUGH), **changes})  # type: ignore[arg-type]


def test_a_sound_config_is_quiet():
    assert ids() == []


MISTAKES = {
    "warmup of a tenth": ("warmup_too_long", {"schedule__warmup_steps": "200"}),
    "warmup beyond the end": ("warmup_too_long", {"schedule__warmup_steps": "3000"}),
    "half of a short run": (
        "warmup_too_long",
        {"schedule__warmup_steps": "20", "train__max_steps": "40"},
    ),
    "a fraction": (
        "warmup_too_long",
        {"schedule__warmup_steps": None, "schedule__warmup_fraction": "0.3"},
    ),
    "warmup to the end": ("peak_not_reached", {"schedule__warmup_steps": "2000"}),
    "warmup past the end": ("peak_not_reached", {"schedule__warmup_steps": "4000"}),
    "a fraction to the end": (
        "peak_not_reached",
        {"schedule__warmup_steps": None, "schedule__warmup_fraction": "1"},
    ),
    "wsd to the end": (
        "peak_not_reached",
        {"schedule__name": "inverse_sqrt", "schedule__warmup_steps": "2000"},
    ),
    "floor above": ("floor_above_peak", {"schedule__min_lr": "1e-2"}),
    "AdamW at 0.1": ("lr_far_from_size", {"optimizer__lr": "0.1"}),
    "AdamW at 1e-7": ("lr_far_from_size", {"optimizer__lr": "1e-7"}),
    "SGD at 1e-9": ("lr_far_from_size", {"optimizer__name": "sgd", "optimizer__lr": "1e-9"}),
    "AdamW part of muon": (
        "lr_far_from_size",
        {"optimizer__name": "muon", "optimizer__lr": "1e-2", "optimizer__adamw_lr": "0.5"},
    ),
    "SGD at 3e-4": ("lr_for_other_optimizer", {"optimizer__name": "sgd", "optimizer__lr": "3e-4"}),
    "Adam at 0.1": ("lr_for_other_optimizer", {"optimizer__name": "adam", "optimizer__lr": "0.1"}),
    "AdamW at SGD's": ("lr_for_other_optimizer", {"optimizer__lr": "0.1"}),
    "Muon at 3e-4": (
        "lr_for_other_optimizer",
        {"optimizer__name": "muon", "optimizer__lr": "3e-4"},
    ),
    "Adafactor at 3e-4": (
        "lr_for_other_optimizer",
        {"optimizer__name": "adafactor", "optimizer__lr": "3e-4"},
    ),
    "another batch": ("lr_for_other_batch", {"optimizer__lr_batch_size": "512"}),
    "coupled": ("coupled_decay", {"optimizer__name": "adam"}),
    "coupled, little": (
        "coupled_decay",
        {"optimizer__name": "adam", "optimizer__weight_decay": "0.01"},
    ),
    "coupled, SGD": ("coupled_decay", {"optimizer__name": "sgd", "optimizer__lr": "0.1"}),
    "decay 1": ("decay_range", {"optimizer__weight_decay": "1.0"}),
    "decay 5": ("decay_range", {"optimizer__weight_decay": "5", "optimizer__name": "muon"}),
    "short memory, small batch": ("betas_for_batch", {"train__batch_size": "1"}),
    "memory as long as the run": (
        "betas_for_batch",
        {
            "optimizer__betas": "[0.9, 0.999]",
            "train__max_steps": "300",
            "schedule__warmup_steps": "9",
        },
    ),
    "long memory, large batch": (
        "betas_for_batch",
        {"optimizer__betas": "[0.9, 0.999]", "train__batch_size": "4096"},
    ),
    "betas the wrong way round": ("betas_for_batch", {"optimizer__betas": "[0.95, 0.9]"}),
    "chapter's T_max": (
        "cosine_overrun",
        {"schedule__name": "chapter", "schedule__min_lr": "1e-5"},
    ),
    "T_max far too long": (
        "cosine_overrun",
        {"schedule__name": "chapter", "schedule__cosine_steps": "100000"},
    ),
    "T_max too short": (
        "cosine_overrun",
        {"schedule__name": "chapter", "schedule__cosine_steps": "900"},
    ),
    "fp16 on a CPU": ("dtype_unsupported", {"train__dtype": "fp16"}),
}


def test_a_schedule_that_begins_anew_is_judged_by_what_is_left():
    """Of 2,000 steps 400 are left: 100 of warmup are a quarter of them, and 20 are sound."""
    restart = {"schedule__restart_step": "1600"}
    (found,) = findings(**restart, schedule__warmup_steps="100")
    assert found.id == "warmup_too_long"
    assert "25 % of the restart's 400" in found.message
    assert "--train.max_steps 3600" in found.remedy
    assert ids(**restart, schedule__warmup_steps="20") == []
    assert "peak_not_reached" in ids(**restart, schedule__warmup_steps="400")
    chapter = {"schedule__name": "chapter", "schedule__cosine_steps": "100"}
    found, *_ = findings(**restart, **chapter, schedule__warmup_steps="20")
    assert found.id == "cosine_overrun"
    assert "at its floor at step 1,720" in found.message


@pytest.mark.parametrize("case", MISTAKES)
def test_a_mistake_is_found(case):
    expected, changes = MISTAKES[case]
    enough = facts(train_tokens=10**9) if case == "long memory, large batch" else ENOUGH
    assert expected in ids(enough, **changes)


SOUND = {
    "5 % of warmup": {"schedule__warmup_steps": "100"},
    "no warmup": {"schedule__warmup_steps": "0"},
    "20 steps of 600": {"schedule__warmup_steps": "20", "train__max_steps": "600"},
    "a tenth of a very short run": {"schedule__warmup_steps": "6", "train__max_steps": "60"},
    "floor at the peak": {"schedule__min_lr": "1e-3"},
    "AdamW 3e-4": {"optimizer__lr": "3e-4"},
    "AdamW 3e-3": {"optimizer__lr": "3e-3"},
    "AdamW 1e-2": {"optimizer__lr": "1e-2"},
    "muon": {"optimizer__name": "muon", "optimizer__lr": "1e-2"},
    "muon with AdamW's own": {
        "optimizer__name": "muon",
        "optimizer__lr": "1e-2",
        "optimizer__adamw_lr": "3e-3",
    },
    "SGD 0.1": {
        "optimizer__name": "sgd",
        "optimizer__lr": "0.1",
        "optimizer__weight_decay": "1e-4",
    },
    "SGD 1": {"optimizer__name": "sgd", "optimizer__lr": "1", "optimizer__weight_decay": "0"},
    "adafactor": {"optimizer__name": "adafactor", "optimizer__lr": "1e-2"},
    "adam without decay": {"optimizer__name": "adam", "optimizer__weight_decay": "0"},
    "adam with L2": {"optimizer__name": "adam", "optimizer__weight_decay": "1e-5"},
    "no decay": {"optimizer__weight_decay": "0"},
    "the same batch": {"optimizer__lr_batch_size": "32"},
    "betas of PyTorch": {"optimizer__betas": "[0.9, 0.999]"},
    "betas alike": {"optimizer__betas": "[0.95, 0.95]"},
    "small batch, long memory": {"train__batch_size": "1", "optimizer__betas": "[0.9, 0.999]"},
    "T_max as it should be": {"schedule__name": "chapter", "schedule__cosine_steps": "1900"},
    "T_max to the last step": {"schedule__name": "chapter", "schedule__cosine_steps": "1899"},
    "hf_cosine": {"schedule__name": "hf_cosine"},
    "wsd": {"schedule__name": "wsd"},
    "constant": {"schedule__name": "constant"},
    "inverse_sqrt": {"schedule__name": "inverse_sqrt"},
    "bf16 on a CPU with it": {"train__dtype": "bf16"},
    "muP": {"model__mup_base_width": "64"},
}  # fmt: skip


@pytest.mark.parametrize("case", SOUND)
def test_a_sound_choice_is_quiet(case):
    assert ids(**SOUND[case]) == []


def test_messages_name_value_and_remedy():
    (warmup,) = findings(schedule__warmup_steps="200")
    assert "200 steps is 10 % of the run's 2,000" in warmup.message
    assert "--schedule.warmup_steps 50" in warmup.remedy
    assert ids(schedule__warmup_steps="50") == []
    (batch,) = findings(optimizer__lr_batch_size="512")
    assert "512" in batch.message
    assert (
        "--optimizer.lr 2.5e-04 --optimizer.lr_batch_size 32" in batch.remedy
    )  # 1e-3 x sqrt(1/16)
    sgd = {"optimizer__name": "sgd", "optimizer__lr": "1", "optimizer__weight_decay": "0"}
    (batch,) = findings(optimizer__lr_batch_size="64", **sgd)
    assert "linear rule makes it 0.5" in batch.message
    (overrun,) = findings(schedule__name="chapter")
    assert "T_max is 2,000 steps, the run has 1,900" in overrun.message
    assert "--schedule.cosine_steps 1900" in overrun.remedy


@pytest.mark.parametrize("case", MISTAKES)
def test_a_remedy_mends_its_finding(case):
    """Each first option of a remedy, taken by its word, ends the finding."""
    expected, changes = MISTAKES[case]
    enough = facts(train_tokens=10**9) if case == "long memory, large batch" else ENOUGH
    found = next(one for one in findings(enough, **changes) if one.id == expected)
    first = found.remedy.partition(", or ")[0]
    options = re.findall(r'--([\w.]+) ("[^"]+"|[^\s,]+)', first)
    assert options, found.remedy
    mended = {key.replace(".", "__"): value.strip('"') for key, value in options}
    assert expected not in ids(enough, **(changes | mended))


@pytest.mark.parametrize(
    ("length", "longer"),
    [
        ({}, "--train.max_steps 4000"),
        ({"max_steps": None, "max_tokens": str(2000 * 8192)}, "--train.max_tokens 32768000"),
        ({"max_steps": None, "max_epochs": "0.8192"}, "--train.max_epochs 1.64"),
        ({"max_tokens": str(10**9), "max_epochs": "9"}, "--train.max_steps 4000"),
        ({"max_tokens": str(2000 * 8192)}, None),
    ],
)
def test_a_longer_run_is_named_by_the_limit_that_ends_it(
    length: dict[str, str | None], longer: str | None
) -> None:
    limits = {f"train__{key}": value for key, value in length.items()}
    warmup = {"schedule__warmup_steps": "200"}
    (found,) = findings(**warmup, **limits)
    _, _, offered = found.remedy.partition(", or a longer run: ")
    assert offered == (longer or "")
    if longer is not None:
        key, value = longer.removeprefix("--train.").split()
        assert ids(**warmup, **(limits | {f"train__{key}": value})) == []


def test_no_longer_run_is_offered_where_it_changes_nothing():
    fraction = {"schedule__warmup_steps": None, "schedule__warmup_fraction": "0.3"}
    (found,) = findings(**fraction)
    assert found.remedy == "--schedule.warmup_fraction 0.02"
    config = config_with(schedule__warmup_steps="200", train__max_epochs="50")
    unread = Facts(1_300_000)
    (found,) = lint(config, Plan.from_config(config, 2000), unread)
    assert found.remedy == "--schedule.warmup_steps 50", "epochs of a text not read yet"


FLOORS = {
    "lr_for_other_optimizer": {"optimizer__lr": "1", "schedule__min_lr": "0.1"},
    "lr_far_from_size": {"optimizer__lr": "0.1", "schedule__min_lr": "0.01"},
    "lr_for_other_batch": {"optimizer__lr_batch_size": "512", "schedule__min_lr": "5e-4"},
}


@pytest.mark.parametrize("expected", FLOORS)
def test_a_remedy_for_the_rate_takes_the_floor_along(expected):
    """It is refused where the floor stays above it."""
    given = FLOORS[expected]
    found = next(one for one in findings(**given) if one.id == expected)
    first = found.remedy.partition(", or ")[0]
    mended = {
        key.replace(".", "__"): value for key, value in re.findall(r"--([\w.]+) (\S+)", first)
    }
    config = config_with(**(given | mended))
    assert not list(contradictions(config))
    before = config_with(**given)
    ratio = before.min_lr / before.optimizer.lr
    assert config.min_lr / config.optimizer.lr == pytest.approx(ratio, rel=5e-3)
    assert ids(**(given | mended)) == []


def test_a_published_rates_remedy_takes_the_floor_along():
    gpt2 = {"model__preset": "gpt2-124m", "optimizer__lr": "6e-4", "schedule__min_lr": "3e-4"}
    (found,) = findings(facts(parameters=124_000_000, train_tokens=10**9, documents=10**5), **gpt2)
    assert found.id == "lr_for_other_batch"
    assert found.remedy.startswith("--optimizer.lr 1.5e-04 --schedule.min_lr 7.5e-05, or ")


def test_a_remedy_for_muon_means_the_rate_that_is_wrong():
    """A rate of its own beside a wrong one is right as it is, and judged by itself."""
    own = {"optimizer__name": "muon", "optimizer__adamw_lr": "3e-3"}
    (found,) = findings(**own, optimizer__lr="3e-4")
    assert found.id == "lr_for_other_optimizer"
    assert "adamw_lr" not in found.remedy
    (found,) = findings(**(own | {"optimizer__adamw_lr": "0.5"}), optimizer__lr="1e-2")
    assert found.remedy.startswith("--optimizer.adamw_lr ")
    assert "--optimizer.lr " not in found.remedy
    both = own | {"optimizer__lr": "1e-2", "optimizer__lr_batch_size": "128"}
    (found,) = findings(**both)
    assert found.remedy == (
        "--optimizer.lr 5.0e-03 --optimizer.adamw_lr 1.5e-03 --optimizer.lr_batch_size 32"
    )


def test_a_published_rate_at_another_batch():
    gpt2 = {"model__preset": "gpt2-124m", "optimizer__lr": "6e-4"}
    facts_124m = facts(parameters=124_000_000, train_tokens=10**9, documents=10**5)
    (found,) = findings(facts_124m, **gpt2)
    assert found.id == "lr_for_other_batch"
    assert "1/15 of" in found.message
    assert "--optimizer.lr 1.5e-04, or " in found.remedy
    assert ids(facts_124m, **gpt2, train__batch_size="480") == []
    assert ids(facts_124m, **gpt2, train__batch_size="128") == []  # within a factor of four
    assert ids(facts_124m, **(gpt2 | {"optimizer__lr": "3e-4"})) == []  # a rate of one's own
    shrunk = gpt2 | {"model__n_embd": "192", "model__n_layer": "4"}
    assert ids(facts(parameters=12_000_000, train_tokens=10**9), **shrunk) == []


def test_epochs():
    steps = 2000 * 32 * 256

    def text_for(epochs: int) -> Facts:
        return facts(train_tokens=steps // epochs, documents=1)

    assert ids(text_for(15)) == []
    (found,) = findings(text_for(40))
    assert found.id == "many_epochs"
    assert found.message.startswith("40.0 epochs")
    assert "--model.dropout 0.2" in found.remedy
    assert ids(text_for(40), model__dropout="0.2") == []
    (found,) = findings(text_for(200))
    assert found.remedy == "more text, --train.max_epochs 4", "dropout would not be enough"
    assert ids(text_for(200), model__dropout="0.2") == ["many_epochs"]
    # Text that is read many times bears stronger decay.
    assert ids(text_for(10), optimizer__weight_decay="1") == []
    assert ids(text_for(10), optimizer__weight_decay="5") == ["decay_range"]


def test_documents():
    short = facts(documents=20_000_000 // 50)
    (found,) = findings(short)
    assert found.id == "context_longer_than_documents"
    assert "--model.context_len 64" in found.remedy
    assert ids(facts(documents=1)) == []
    assert ids(facts(documents=20_000_000 // 250)) == []


def test_dtype():
    assert ids(facts(device="cuda"), train__dtype="fp16") == []
    assert ids(facts(device="cuda", has_bf16=False), train__dtype="bf16") == ["dtype_unsupported"]
    assert ids(facts(device="cpu", has_bf16=False), train__dtype="bf16") == ["dtype_unsupported"]
    assert ids(facts(device="mps", has_bf16=None), train__dtype="bf16") == []
    assert ids(facts(device="cpu", has_bf16=False), train__dtype="auto") == []


def test_what_is_not_known_is_not_judged():
    nothing = Facts(1_300_000)
    assert ids(nothing, train__dtype="fp16", optimizer__weight_decay="1") == []
    config = config_with(train__dtype="fp16", optimizer__weight_decay="1")
    assert unchecked(config, nothing) == [
        "dtype_unsupported",
        "decay_range",
        "many_epochs",
        "context_longer_than_documents",
    ]
    assert unchecked(config_with(), ENOUGH) == []
    assert ids(nothing, optimizer__weight_decay="9") == ["decay_range"]


def test_mup_judges_the_rate_at_its_base():
    large = facts(parameters=7_000_000_000, train_tokens=10**9, documents=10**4)
    wide = {"optimizer__lr": "3e-3", "model__n_embd": "4096", "model__n_head": "32"}
    assert ids(large, **wide) == ["lr_far_from_size"]
    assert ids(large, **wide, model__mup_base_width="128") == []


def test_beside_muon_tables_bear_a_higher_rate_than_a_whole_model():
    muon = {"optimizer__name": "muon", "optimizer__lr": "2e-2"}
    assert ids(**muon, optimizer__adamw_lr="3e-2") == []
    assert ids(**muon, optimizer__adamw_lr="8e-2") == ["lr_far_from_size"]
    assert "lr_far_from_size" in ids(optimizer__lr="3e-2")


def test_the_chapters_floor_is_one_rate_for_all_groups():
    changes = {"schedule__name": "chapter", "schedule__cosine_steps": "1900"}
    muon = {"optimizer__name": "muon", "optimizer__lr": "1e-2", "optimizer__adamw_lr": "1e-3"}
    assert ids(**changes, **muon) == []
    assert ids(**changes, **muon, schedule__min_lr="2e-3") == ["floor_above_peak"]


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.name)
def test_published_recipes_are_quiet(recipe):
    context = next(n for n in (2048, 256, 64) if recipe.batch_tokens % n == 0 or n == 64)
    batch = max(1, round(recipe.batch_tokens / context))
    total = (recipe.total_tokens or 3e9) / (batch * context)
    beta1, beta2 = recipe.betas or (0.9, 0.999)
    changes = {
        "model__preset": recipe.preset,
        "model__context_len": str(context),
        "model__dropout": str(recipe.dropout),
        "optimizer__lr": str(recipe.lr),
        "optimizer__weight_decay": str(recipe.weight_decay),
        "optimizer__betas": f"[{beta1}, {beta2}]",
        "train__batch_size": str(batch),
        "train__max_steps": str(round(total)),
        "schedule__warmup_steps": str(round(recipe.warmup_tokens / (batch * context))),
    }
    text = math.ceil(round(total) * batch * context / recipe.epochs)
    known = Facts(round(recipe.parameters), text, max(1, text // 2000), "cuda", has_bf16=True)
    assert ids(known, **changes) == []


# Text that such a run is made for: tokens to train on, and the mean document.
TEXTS = {
    "smoke": (14_000, 14_000),
    "shakespeare-nanogpt-cpu": (1_003_854, 1_003_854),
    "speed-shakespeare-cpu": (1_003_854, 1_003_854),
    "speed-shakespeare-gpu-loss": (411_000, 411_000),
    "shakespeare-nanogpt-gpu": (1_003_854, 1_003_854),
    "quickstart": (3_300_000, 5_500),
    "chapter-gpt2": (1_000_000_000, 90_000),
    "tinyllama-1.1b": (950_000_000_000, 1_100),
}
WRONG = {
    "too-small": {"lr_far_from_size"},
    "too-large": {"lr_for_other_optimizer", "lr_far_from_size"},
    "no-warmup": set(),
    "chapter-as-written": {"warmup_too_long", "cosine_overrun"},
}
SHIPPED = sorted((ROOT / "configs").glob("*.yaml"))


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_shipped_configs(path):
    config = load_config(path)
    rows = parameter_inventory(config.model, expected_vocab_size(config.tokenizer))
    default = (3_300_000, 5_500) if config.data.source == "python-stdlib" else (10**12, 1_200)
    tokens, document = TEXTS.get(path.stem, default)
    known = Facts(sum(r.count for r in rows), tokens, tokens // document, "cpu", has_bf16=True)
    plan = Plan.from_config(config, config.total_steps(tokens), strict=False)
    found = {finding.id for finding in lint(config, plan, known)}
    assert found == WRONG.get(path.stem, set())
    assert (path.stem in WRONG) == ("Wrong on purpose" in path.read_text(encoding="utf-8"))


def test_each_rule_of_the_contract_has_a_mistake():
    tested = {expected for expected, _ in MISTAKES.values()}
    assert set(CONTRACT_IDS) - tested == {"many_epochs", "context_longer_than_documents"}
