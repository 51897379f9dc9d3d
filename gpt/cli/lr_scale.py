"""The command `gpt-lr scale`: a config at another batch, width, depth or length, step by step."""

import argparse
import math
import textwrap
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gpt.errors import UserError, json_line, say

if TYPE_CHECKING:
    from gpt.config import Config
    from gpt.configfile import Override
    from gpt.lr.scale import Scaled

WIDTH = 100
MOST = 10**18


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the command's options."""
    parser.add_argument("--config", type=Path, required=True, metavar="FILE", help="YAML config")
    parser.add_argument(
        "--batch",
        metavar="N",
        help="sequences an optimizer step (train.batch_size). The run keeps its tokens; the scale "
        "starts from optimizer.lr_batch_size, if that is given",
    )
    parser.add_argument("--width", metavar="N", help="model.n_embd, with muP's keys set")
    parser.add_argument("--depth", metavar="N", help="model.n_layer, with CompleteP's keys set")
    parser.add_argument("--tokens", metavar="N", help="length of the whole run; 2e9 is understood")
    parser.add_argument(
        "--rule",
        choices=("auto", "linear", "sqrt", "none"),
        default="auto",
        help="how lr follows the batch; auto: linear for sgd, sqrt for adam, adamw and muon; none: "
        "lr stays, also with --tokens",
    )
    parser.add_argument(
        "--apply",
        type=Path,
        nargs="?",
        const=Path(),
        metavar="FILE",
        help="write the scaled config as a copy; default NAME-scaled.yaml beside the config",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object instead")


def run(arguments: argparse.Namespace, overrides: Sequence["Override"]) -> None:
    """Scales, prints, and writes the copy if one is wished for."""
    from gpt.configfile import free_copy, load_config

    config = load_config(arguments.config, overrides)
    sizes = {
        name: _number(f"--{name}", getattr(arguments, name))
        for name in ("batch", "width", "depth", "tokens")
    }
    target = (
        None if arguments.apply is None else free_copy(arguments.apply, arguments.config, "scaled")
    )

    from gpt.lr.scale import scale

    scaled = scale(config, **sizes, rule=arguments.rule)
    if arguments.json:
        print(json_line(as_json(scaled)))
    else:
        print("\n".join(page(scaled)))
    if target is not None:
        _write(scaled, target)


def as_json(scaled: "Scaled") -> dict[str, Any]:
    """What `--json` prints: the steps in order, and each changed key with its last value."""
    return {
        "changes": {change.key: change.after for change in scaled.changes},
        "steps": [vars(change) for change in scaled.changes],
        "effects": list(scaled.effects),
        "notes": list(scaled.notes),
    }


def page(scaled: "Scaled") -> Iterator[str]:
    """The steps as lines, each with its arithmetic and source."""
    if not scaled.changes:
        yield "nothing changes: the config has that size already"
    for change in scaled.changes:
        yield f"{change.key}: {_value(change.before)} → {_value(change.after)}"
        yield f"    {change.arithmetic}"
        yield f"    {change.source}"
    if scaled.effects:
        yield "with these keys the model and its optimizer do, by themselves:"
        yield from (f"    {effect}" for effect in scaled.effects)
    for note in scaled.notes:
        yield from textwrap.wrap(
            f"note: {note}", WIDTH, subsequent_indent="      ", break_on_hyphens=False
        )


def _value(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.8g}"
    if isinstance(value, tuple):
        return f"[{', '.join(map(_value, value))}]"
    return "null" if value is None else str(value)


def _number(option: str, text: str | None) -> int | None:
    """A whole number above 0; `2e9` and `1_000` are such."""
    if text is None:
        return None
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not (1 <= number <= MOST and number == int(number)):
        raise UserError(
            f"{option} {text}: not a whole number from 1 on; say for example {option} 64"
        )
    return int(text) if text.isdecimal() else int(number)


def _write(scaled: "Scaled", target: Path) -> None:
    """Writes the config, every default spelled out, with what was changed above it."""
    from gpt.configfile import dump_config
    from gpt.files import write_durably

    config = _renamed(scaled.config)
    lines = ["# Made by gpt-lr scale. Changed:"]
    for change in scaled.changes:
        values = f"{_value(change.before)} -> {_value(change.after)}"
        lines.append(f"#   {change.key}: {values} ({change.arithmetic})")
    lines.append(f"#   run.name: {scaled.config.run.name} -> {config.run.name}")
    body = dump_config(config).partition("\n")[2]
    try:
        write_durably(target, "\n".join([*lines, body]))
    except OSError as error:
        raise UserError(
            f"--apply: {target} cannot be written: {error.strerror}; name another file"
        ) from None
    say(f"wrote {target}: its run is {config.run.name}, so that no run directory is mixed up")


def _renamed(config: "Config") -> "Config":
    """The config under another run name."""
    from gpt.lr.draft import other_name

    run = config.run.model_copy(update={"name": other_name(config.run.name, "-scaled")})
    return config.model_copy(update={"run": run})
