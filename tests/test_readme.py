"""What the READMEs claim is true, and both languages claim the same."""

import re
from pathlib import Path

import pytest

from gpt.config import PRESETS
from gpt.configfile import load_config
from gpt.errors import UserError
from tests.test_contract import command

ROOT = Path(__file__).parent.parent
READMES = ("README.md", "README.zh-CN.md")


def text(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def blocks(name: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", text(name), re.DOTALL)


@pytest.mark.parametrize("name", READMES)
def test_every_file_named_exists(name: str) -> None:
    found = re.findall(
        r"\b(?:gpt|configs|scripts|docs|tests)/[\w./-]+\.(?:py|yaml|json|png)", text(name)
    )
    found += re.findall(r"\]\(((?!http)[^)]+)\)", text(name))
    assert len(found) > 12
    headings = {f"#{heading.lower()}" for heading in re.findall(r"(?m)^## (\S+)$", text(name))}
    for path in found:
        assert path in headings if path.startswith("#") else (ROOT / path).exists(), path


@pytest.mark.parametrize("name", READMES)
def test_every_module_is_on_the_tour(name: str) -> None:
    (tour,) = [block for block in blocks(name, "text") if "gpt/model.py" in block]
    named = set(re.findall(r"(\w+)\.py", tour))
    assert named == {path.stem for path in (ROOT / "gpt").glob("*.py")} - {"__init__"}


@pytest.mark.parametrize("name", READMES)
def test_presets_are_those_that_exist(name: str) -> None:
    named = set(re.findall(r"\b(?:gpt2|gpt3|llama|cpu)-[\d.]+[mb]\b", text(name)))
    assert named == set(PRESETS)


@pytest.mark.parametrize("name", READMES)
def test_the_config_shown_is_valid_and_says_the_defaults(name: str, tmp_path: Path) -> None:
    (shown,) = blocks(name, "yaml")
    path = tmp_path / "shown.yaml"
    path.write_text(shown, encoding="utf-8")
    config = load_config(path)
    assert config.schedule.warmup_steps == 100
    assert config.optimizer == load_config(None).optimizer
    assert config.model == load_config(None).model


@pytest.mark.parametrize("name", READMES)
def test_the_errors_shown_are_what_is_printed(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (shown,) = [block for block in blocks(name, "text") if "error: my.yaml" in block]
    monkeypatch.chdir(tmp_path)
    lines = [""] * 5 + ["  n_layr: 3", "", "  n_head: 4", "  n_embd: 130"]
    lines[4] = "model:"
    Path("my.yaml").write_text("\n".join(lines), encoding="utf-8")
    with pytest.raises(UserError) as error:
        load_config(Path("my.yaml"))
    assert [f"error: {line}" for line in error.value.lines] == shown.splitlines()


def test_options_named_exist() -> None:
    desk = [("gpt-lr", name) for name in ("plan", "find", "sweep", "suggest", "scale", "lessons")]
    data = [("gpt-data", name) for name in ("build", "info")]
    for words in (("gpt-train",), ("gpt-infer",), *data, *desk):
        rows = text("README.md").splitlines()
        row = next(line for line in rows if line.startswith(f"| `{' '.join(words)}"))
        offered = command(*words, "--help").stdout
        for option in re.findall(r"--[a-z][a-z-]+(?!\.)\b", row.replace("--section.key", "")):
            assert option in offered, (words, option)


def test_make_targets_named_exist() -> None:
    makefile = text("Makefile")
    for name in READMES:
        for block in blocks(name, "sh"):
            for target in re.findall(r"^make (\w+)", block, re.MULTILINE):
                assert re.search(rf"^{target}:", makefile, re.MULTILINE), target


def test_both_languages_show_the_same() -> None:
    ours, theirs = text("README.md"), text("README.zh-CN.md")
    for language in ("sh", "yaml"):
        english = [re.sub(r"\s*#.*", "", block) for block in blocks("README.md", language)]
        chinese = [re.sub(r"\s*#.*", "", block) for block in blocks("README.zh-CN.md", language)]
        assert english == chinese
    assert ours.count("\n## ") == theirs.count("\n## ")
    assert ours.count("\n| ") == theirs.count("\n| ")
    numbers = r"\d+(?:[.,]\d+)+"
    assert sorted(re.findall(numbers, ours)) == sorted(re.findall(numbers, theirs))
