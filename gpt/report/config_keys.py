"""The config keys in which runs differ, and what runs have in common by them."""

import re
from collections.abc import Iterable, Sequence
from typing import Any

from gpt.history import History

Keys = dict[str, Any]

# What says nothing about how a run learns.
_ASIDE = re.compile(
    r"run\.(name|dir)|log\..*|checkpoint\..*|data\.dir|model\.preset|eval\.(sample_.*|patience|every_steps)"
)
BATCHES = re.compile(
    r"data\.(?!dir).*|tokenizer\..*|model\.context_len|train\.batch_size|run\.seed"
)
VALIDATION = re.compile(r"data\.(?!dir).*|tokenizer\..*|model\.context_len|eval\.max_tokens")
TOKENS = re.compile(r"tokenizer\..*")


def unique_names(histories: Iterable[History]) -> list[str]:
    """The runs' names; where two are the same, with their folder, and if need be a number."""
    runs = list(histories)
    plain = [history.name for history in runs]
    names: list[str] = []
    for history, name in zip(runs, plain, strict=True):
        unique = name
        if plain.count(name) > 1 and history.path is not None:
            unique = f"{history.path.resolve().parent.name}/{name}"
        number = 2
        while unique in names:
            unique, number = f"{name} ({number})", number + 1
        names.append(unique)
    return names


def keys_of(history: History) -> Keys:
    """The config's values by `section.key`, those that matter; empty for a log without a config."""
    if history.config is None:
        return {}
    sections = history.config.model_dump(mode="json")
    return {
        f"{section}.{key}": value
        for section, values in sections.items()
        for key, value in values.items()
        if not _ASIDE.fullmatch(f"{section}.{key}")
    }


def differing_keys(keys: Sequence[Keys]) -> dict[str, tuple[Any, ...]]:
    """The keys whose values are not all the same; None for a run without a config."""
    known = [values for values in keys if values]
    names = dict.fromkeys(name for values in known for name in values)
    return {
        name: tuple(values.get(name) for values in keys)
        for name in names
        if any(values.get(name) != known[0].get(name) for values in known)
    }


def same_keys(first: Keys, second: Keys, which: re.Pattern[str]) -> bool | None:
    """Whether all keys of a kind are the same; None where a config is unknown."""
    if not first or not second:
        return None
    return all(
        first.get(name) == second.get(name)
        for name in first.keys() | second.keys()
        if which.fullmatch(name)
    )


def seed_of(values: Keys) -> int:
    """The run's seed; 0 for a run without a config."""
    return int(values.get("run.seed", 0))
