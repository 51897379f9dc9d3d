"""No module of the package can execute what it reads."""

import ast
from pathlib import Path

import pytest

GPT = Path(__file__).parents[1] / "gpt"
MODULES = sorted(GPT.rglob("*.py"))
# Modules that load code or objects of any kind from bytes.
FORBIDDEN_MODULES = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "marshal"}
FORBIDDEN_MODULES |= {"shelve", "runpy", "code", "torch.distributed.checkpoint"}
FORBIDDEN_CALLS = {"eval", "exec", "compile", "__import__"}
# Names of modules on which some attributes are as bad.
FORBIDDEN_ATTRIBUTES = {
    "torch": {"load", "jit.load", "hub.load", "package"},
    "yaml": {"load_all", "unsafe_load", "full_load", "unsafe_load_all", "full_load_all"}
    | {"UnsafeLoader", "FullLoader", "Loader", "CLoader", "add_constructor"},
    "numpy": {"load", "loadtxt", "genfromtxt"},
    "np": {"load", "loadtxt", "genfromtxt"},
    "os": {"system", "popen", "execv", "execve"},
    "subprocess": {"getoutput", "getstatusoutput"},
    "importlib": {"import_module", "reload"},
    "pd": {"read_pickle"},
}
# They import one of their own parts, by a name that stands in a table of theirs.
ALLOWED = {"cli/lr.py": ["importlib.import_module"]}
ALLOWED |= {"lr/lessons/__init__.py": ["importlib.import_module"]}
TRUSTED_WORDS = {"trust_remote_code", "allow_pickle", "shell", "weights_only"}


def problems(tree: ast.AST) -> list[str]:
    """What in a module could execute data; empty for all of ours."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [a.name for a in node.names if _forbidden_module(a.name)]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            found += [name for name in [node.module, *names] if _forbidden_module(name)]
            bad = FORBIDDEN_ATTRIBUTES.get(node.module, set())
            found += [f"{node.module}.{a.name}" for a in node.names if a.name in bad]
        elif isinstance(node, ast.Attribute) and not isinstance(node.ctx, ast.Store):
            head, _, rest = ast.unparse(node).partition(".")
            if rest in FORBIDDEN_ATTRIBUTES.get(head, set()):
                found.append(f"{head}.{rest}")
        elif isinstance(node, ast.Call):
            if isinstance(node.func, ast.Name) and node.func.id in FORBIDDEN_CALLS:
                found.append(node.func.id)
            if ast.unparse(node.func) == "yaml.load":
                found += ["yaml.load"]
            found += [f"{word.arg}=" for word in node.keywords if word.arg in TRUSTED_WORDS]
    return found


def _forbidden_module(name: str) -> bool:
    return any(name == bad or name.startswith(f"{bad}.") for bad in FORBIDDEN_MODULES)


@pytest.mark.parametrize("path", MODULES, ids=[str(p.relative_to(GPT)) for p in MODULES])
def test_nothing_executes_what_it_reads(path: Path):
    allowed = ALLOWED.get(path.relative_to(GPT).as_posix(), [])
    assert problems(ast.parse(path.read_text(encoding="utf-8"))) == allowed


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from pickle import loads",
        "import torch\ntorch.load('x')",
        "import torch\ntorch.load('x', weights_only=True)",
        "from torch import load",
        "import torch.distributed.checkpoint as dcp",
        "from torch.distributed import checkpoint",
        "import yaml\nyaml.load(text, Loader=yaml.SafeLoader)",
        "import yaml\nx = yaml.FullLoader",
        "import numpy as np\nnp.load('x')",
        "eval(text)",
        "def f():\n    exec(text)",
        "import subprocess\nsubprocess.run('ls', shell=True)",
        "import os\nos.system('ls')",
        "AutoModel.from_pretrained(name, trust_remote_code=True)",
        "import importlib\nimportlib.import_module(name)",
    ],
)
def test_the_test_sees(source: str):
    assert problems(ast.parse(source))


def test_model_eval_is_another_thing():
    assert problems(ast.parse("model.eval()\nre.compile('a')\nmodel.compile()")) == []
