"""Every module imports only from layers below its own."""

import ast
from pathlib import Path

import pytest

GPT = Path(__file__).parents[1] / "gpt"

LESSONS = ["update_rule", "one_step", "regimes", "landscape", "optimizers"]
LESSONS += ["decay", "schedules", "warmup", "batch"]
LAYERS = [
    {"errors", "malloc"},
    {"config", "configfile", "files", "parts", "foreign.lines", "foreign.names"},
    {"trackers", "eager_optim", "attention", "dropout", "gelu", "linear", "textplot"}
    | {"lr", "lr.rates"},
    {
        "device",
        "headloss",
        "ranks",
        "room",
        "tokenizer",
        "model",
        "plan",
        "ratepolicy",
        "course",
        "shapes",
        "schedule",
        "metrics",
        "sources",
        "corpus",
        "signals",
        "pace",
        "sampling",
        "pages",
    },
    {"clibrary"},
    {"int8_c"},
    {"packed"},
    {"products", "quantize"},
    {"attention_c"},
    {"kvcache"},
    {"onerow"},
    {"onerow_c"},
    {"shards", "batches", "data", "optim", "decode", "generate", "plot", "history", "health"}
    | {"saved"}
    | {"health.finding", "report", "gauges", "machine"},
    {"foreign.sheet", "manifest"},
    {"foreign.steps", "foreign.tables", "foreign.objects", "foreign.console", "foreign.events"}
    | {"health.advice", "health.view", "tensors"},
    {"foreign.assemble"} | {f"health.{name}" for name in ("events", "learning", "rates", "texts")},
    {"ahead", "datacheck", "foreign", "health.diagnose"},
    {"health.watch"},
    {"report.config_keys", "report.coverage", "report.intervals", "report.markup"}
    | {"report.standing", "report.summary", "report.thin"},
    {"report.figures", "report.judged", "report.seeds"},
    {"report.compare", "report.marks", "report.sketch", "report.watch", "report.words"},
    {"report.answer", "report.charts", "report.sections"},
    {"report.comparison_page", "report.terminal_plot"},
    {"report.page", "report.terminal"},
    {"checkpoint"},
    {"guard"},
    {"rundir", "step", "lr.findings", "lr.recipes"},
    {"lr.lint", "lr.lint_optimizer", "lr.memory", "resume", "autopsy"},
    {"fits", "heldout"},
    {"record", "build"},
    {"broken", "infer", "ending"},
    {"train"},
    # The learning-rate desk: its arithmetic and small trainings, its tools, what they draw.
    {"lr.bracket", "lr.decide", "lr.draft", "lr.outcome", "lr.plan_start"}
    | {"lr.rules", "lr.size", "lr.trial", "lr.lessons.words", "lr.lessons.tiny"},
    {"lr.budget", "lr.find", "lr.labels", "lr.ledger", "lr.plan", "lr.resize", "lr.scale"}
    | {"lr.suggest", "lr.lessons.picture", "lr.lessons.side_by_side"},
    {"lr.find_plot", "lr.plan_files", "lr.sweep_plot", "lr.sweep"}
    | {f"lr.lessons.{name}" for name in LESSONS},
    {"lr.lessons", "report.branches"},
    {"report.evidence", "report.origin"},
    {"report.limits"},
    {"report.remedies"},
    {"report.probe"},
    {"cli.arguments", "cli.threads"},
    {"cli", "cli.train", "cli.infer", "cli.data", "cli.lr", "cli.report"}
    | {f"cli.lr_{name}" for name in ("plan", "find", "sweep", "suggest", "scale", "lessons")},
]
LAYER = {name: number for number, names in enumerate(LAYERS) for name in names}
# Within one layer, a part may stand on another; each pair is listed, so that none is by accident.
WITHIN = {
    ("configfile", "config"),
    ("configfile", "files"),
    ("tokenizer", "ranks"),
    ("sources", "tokenizer"),
    ("corpus", "sources"),
    ("batches", "shards"),
    ("data", "shards"),
    ("data", "batches"),
    ("generate", "decode"),
    ("course", "plan"),
    ("course", "ratepolicy"),
    ("schedule", "plan"),
    ("schedule", "shapes"),
    ("lr.lint", "lr.lint_optimizer"),
    ("lr.ledger", "lr.labels"),
    ("lr.scale", "lr.resize"),
    ("lr.sweep", "lr.sweep_plot"),
}
MODULES = {
    ".".join(path.relative_to(GPT).with_suffix("").parts).removesuffix(".__init__"): path
    for path in GPT.rglob("*.py")
    if path != GPT / "__init__.py"
}


def imported(path: Path) -> set[str]:
    """The modules of gpt that a file imports, anywhere in it."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import"
            assert node.module is not None
            names.add(node.module)
            # `from gpt import model` names modules too.
            if node.module in ("gpt", "gpt.cli", "gpt.lr", "gpt.lr.lessons", "gpt.report"):
                names |= {f"{node.module}.{alias.name}" for alias in node.names}
    found = {name.removeprefix("gpt.") for name in names if name.startswith("gpt.")}
    return {name for name in found if name in MODULES or name in LAYER}


def test_every_module_has_a_layer():
    assert set(MODULES) == set(LAYER), "list new modules in LAYERS, and remove old ones"
    assert sum(len(names) for names in LAYERS) == len(LAYER), "a module stands in two layers"


@pytest.mark.parametrize("name", sorted(MODULES))
def test_imports_go_down(name):
    for other in imported(MODULES[name]):
        below = LAYER[other] < LAYER[name]
        assert below or (name, other) in WITHIN, f"{name} imports {other}"


def test_the_test_sees_imports(tmp_path):
    file = tmp_path / "x.py"
    file.write_text(
        "import gpt.model\nfrom gpt import data\ndef f():\n    from gpt.step import train_step\n"
        "import torch\nfrom gpt import __version__\n"
    )
    assert imported(file) == {"model", "data", "step"}


@pytest.mark.parametrize("name", ["config", "configfile", "errors"])
def test_reading_a_config_needs_no_torch(name):
    tree = ast.parse(MODULES[name].read_text(encoding="utf-8"))
    names = {
        alias.name
        for node in ast.walk(tree)
        if isinstance(node, ast.Import)
        for alias in node.names
    }
    names |= {node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert not {found.partition(".")[0] for found in names} & {"torch", "numpy", "matplotlib"}
