"""What may change of the rate where a run goes on, and the record of what has. No torch.

keep      nothing: the run goes on as it was planned
extend    the length
rewarm    the rate, the schedule and the length; the schedule begins anew at the step
override  all that has to do with the rate, as if it had been so from the start

RUN/rate.json holds every change that was accepted, with both values of each key: the last one may
not have reached a checkpoint yet, and of the others the rate's whole course can be told.
"""

import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, get_args

from pydantic import Field, TypeAdapter, ValidationError

from gpt.config import Config, Section
from gpt.errors import UserError
from gpt.files import is_sealed, read_plain, sealed, write_durably

RatePolicy = Literal["keep", "extend", "rewarm", "override"]
POLICIES: tuple[RatePolicy, ...] = get_args(RatePolicy)
RECORD_NAME = "rate.json"
MAX_RECORD_BYTES = 1_000_000
MAX_SHOWN = 4

_LENGTH = r"train\.max_(steps|tokens|epochs)"
_RATE = _LENGTH + r"|schedule\..*|optimizer\.(lr|adamw_lr|lr_batch_size)"
_UPDATE = _RATE + r"|optimizer\.(weight_decay|decay_on|betas|eps|momentum)|train\.grad_clip"
_ACCEPTED = {
    "keep": re.compile(r"(?!)"),
    "extend": re.compile(_LENGTH),
    "rewarm": re.compile(_RATE),
    "override": re.compile(_UPDATE),
}
_IN_WORDS = {
    "extend": "the length (train.max_steps, max_tokens, max_epochs)",
    "rewarm": "lr, schedule and length",
    "override": "lr, schedule, length, weight decay, betas, eps, momentum and grad_clip",
}
RESTART_KEY = "schedule.restart_step"


class KeyChange(NamedTuple):
    """A config key that differs, with both values as JSON has them."""

    key: str
    was: Any
    now: Any


class RateChange(Section):
    """A change of the rate that was accepted: from `step` on, `changed` is in force.

    `changed` holds for each key the value that the checkpoint of that step was made with, and the
    one that the run went on with.
    """

    policy: Literal["extend", "rewarm", "override"]
    step: Annotated[int, Field(ge=1, strict=True)]
    changed: dict[str, tuple[Any, Any]]

    def keys_text(self) -> str:
        """The changed keys in words."""
        pairs = self.changed.items()
        return "; ".join(f"{key} {_text(was)} → {_text(now)}" for key, (was, now) in pairs)

    def done(self, config: Config) -> Config:
        """The config after the change, of the one before it."""
        return with_keys(config, {key: now for key, (_, now) in self.changed.items()})

    def undone(self, config: Config) -> Config:
        """The config before the change, of the one after it."""
        return with_keys(config, {key: was for key, (was, _) in self.changed.items()})


class _Record(Section):
    seal: str
    changes: list[RateChange]


_OLD_RECORD = TypeAdapter(list[RateChange])  # of versions without a seal


def refused_changes(changed: Iterable[KeyChange], policy: RatePolicy) -> list[KeyChange]:
    """Those of the changed keys that a policy does not accept."""
    return [each for each in changed if not _ACCEPTED[policy].fullmatch(each.key)]


def offer(changed: Sequence[KeyChange]) -> str:
    """The policies that would accept all of the changed keys, as one types them; maybe empty."""
    fitting = [p for p in POLICIES if p != "keep" and not refused_changes(changed, p)]
    if len(fitting) > 1:
        return f"--rate {', '.join(fitting[:-1])} or {fitting[-1]}"
    return f"--rate {fitting[0]}" if fitting else ""


def shown(changed: Sequence[KeyChange]) -> str:
    """Changed keys in words; of many only the first ones."""
    words = [f"{key}: {_text(was)} there, {_text(now)} now" for key, was, now in changed]
    words = words[:MAX_SHOWN]
    more = [f"{len(changed) - MAX_SHOWN} more"] if len(changed) > MAX_SHOWN else []
    return "; ".join(words + more)


def _text(value: object) -> str:
    return "null" if value is None else str(value)


def check_changes(
    changed: Sequence[KeyChange],
    policy: RatePolicy,
    *,
    differs: str,
    own: str,
    started: bool = True,
) -> None:
    """Raises UserError, one line, where a policy does not accept all of the changed keys.

    `differs` says in words what has other values, `own` how one goes on without a change;
    `started` whether there is a checkpoint, without which no other policy helps.
    """
    refused = refused_changes(changed, policy)
    if not refused:
        return
    other = offer(changed) if started else ""
    if policy == "keep":
        way = f"go on at a changed rate ({other}), " if other else ""
        raise UserError(
            f"run.name: {differs} ({shown(changed)}); {way}choose another --run.name, or {own}"
        )
    fix = f"say {other}" if other else "no policy takes that into a run: leave it as it was"
    raise UserError(
        f"--rate {policy}: changes {_IN_WORDS[policy]} alone, and {differs} ({shown(refused)}); "
        f"{fix}, or choose another --run.name"
    )


def with_keys(config: Config, values: dict[str, Any]) -> Config:
    """The config with some keys, `section.key`, at other values.

    Raises ValidationError for values, and KeyError for keys, that no config has.
    """
    sections = config.model_dump(mode="json")
    for name, value in values.items():
        section, _, key = name.partition(".")
        if key not in sections[section]:
            raise KeyError(name)
        sections[section][key] = value
    return Config.model_validate(sections)


def read_record(run: Path) -> list[RateChange]:
    """The accepted changes of a run, in the order of their steps; none where nothing changed.

    Raises UserError for a file that is not such a record.
    """
    path = run / RECORD_NAME
    try:
        if path.stat().st_size > MAX_RECORD_BYTES:
            raise _damaged(path, f"over {MAX_RECORD_BYTES:,} bytes")
        content = read_plain(path, MAX_RECORD_BYTES)
        if is_sealed(content) is False:
            raise _damaged(path, "its SHA-256 is not the one in it")
        if is_sealed(content):
            changes = _Record.model_validate_json(content).changes
        else:
            changes = _OLD_RECORD.validate_json(content)
    except FileNotFoundError:
        return []
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); check the disk") from None
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise _damaged(path, f"{where}: {first['msg']}" if where else first["msg"]) from None
    _check_record(path, changes)
    return changes


def _check_record(path: Path, changes: Sequence[RateChange]) -> None:
    steps = [change.step for change in changes]
    if steps != sorted(set(steps)):
        raise _damaged(path, "its steps do not rise")
    for change in changes:
        for key in change.changed:
            if not _ACCEPTED["override"].fullmatch(key):
                raise _damaged(path, f"{key} is no key of the rate")
        try:
            change.done(Config())
            change.undone(Config())
        except (ValidationError, KeyError):
            raise _damaged(path, f"step {change.step} holds values of no config") from None


def write_record(run: Path, changes: Sequence[RateChange]) -> None:
    """Replaces the record, whole or not at all; a run without changes has no file."""
    path = run / RECORD_NAME
    if changes:
        write_durably(path, sealed({"changes": [each.model_dump(mode="json") for each in changes]}))
    else:
        path.unlink(missing_ok=True)


def _damaged(path: Path, reason: str) -> UserError:
    return UserError(
        f"{path}: not the record of a run's changed rates ({reason}); bring it back, or remove it "
        "(a change that has reached no checkpoint yet must then be said again)"
    )
