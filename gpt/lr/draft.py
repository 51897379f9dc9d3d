"""A config under change: each key's way with its arithmetic, and the check of what comes out."""

from dataclasses import dataclass, field
from typing import Any

from pydantic import ValidationError

from gpt.config import MOST_NAME_BYTES, Config, contradictions
from gpt.errors import UserError


def from_first_step(config: Config) -> Config:
    """The config of a new run, whose schedule does not begin anew in its middle."""
    schedule = config.schedule.model_copy(update={"restart_step": None})
    return config.model_copy(update={"schedule": schedule})


def other_name(name: str, ending: str) -> str:
    """A run's name with an ending, cut to what a name may have."""
    kept = name.encode()[: MOST_NAME_BYTES - len(ending.encode())]
    return kept.decode(errors="ignore") + ending


@dataclass(frozen=True)
class Change:
    """One key's way: what it was, what it is, how that was calculated, and who says so."""

    key: str
    before: Any
    after: Any
    arithmetic: str
    source: str


@dataclass
class Draft:
    """A config under change."""

    values: dict[str, Any]
    changes: list[Change] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def set(self, key: str, after: object, arithmetic: str, source: str) -> None:
        """Gives a key another value, and notes why; nothing for the value that it has."""
        section, _, name = key.partition(".")
        before = self.values[section][name]
        if after != before:
            self.values[section][name] = after
            self.changes.append(Change(key, before, after, arithmetic, source))

    def checked(self) -> Config:
        """The config; UserError for what no config can be."""
        try:
            config = Config.model_validate(self.values)
        except ValidationError as error:
            raise UserError(
                *(
                    f"{'.'.join(str(part) for part in e['loc'][:2])}: would be {e['input']!r} "
                    f"({e['msg']}); scale less"
                    for e in error.errors()
                )
            ) from None
        problems = [f"{found.keys[0]}: {found.message}" for found in contradictions(config)]
        if problems:
            raise UserError(*problems)
        return config
