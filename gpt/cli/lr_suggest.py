"""The command `gpt-lr suggest`: published estimates of the rate, never one without the others."""

import argparse
import shlex
import textwrap
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from gpt.errors import json_line

if TYPE_CHECKING:
    from gpt.configfile import Override
    from gpt.lr.suggest import Estimate, Suggestions

WIDTH = 100


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the command's options."""
    parser.add_argument("--config", type=Path, required=True, metavar="FILE", help="YAML config")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead")


def run(arguments: argparse.Namespace, overrides: Sequence["Override"]) -> None:
    """Estimates, and prints."""
    from gpt.configfile import load_config

    config = load_config(arguments.config, overrides, for_lint=True)
    from gpt.lr.suggest import suggest

    suggestions = suggest(config)
    if arguments.json:
        print(json_line(suggestions.as_json()))
    else:
        words = [word for name, value in overrides for word in (f"--{name}", value)]
        find = shlex.join(["gpt-lr", "find", "--config", str(arguments.config), *words])
        print("\n".join(page(suggestions, find)))


def page(suggestions: "Suggestions", find: str) -> Iterator[str]:
    """The estimates as lines, the spread last, and with it the command that measures instead."""
    size = suggestions.size
    tokens = "open" if size.tokens is None else f"{size.tokens:,}"
    yield (
        f"parameters {size.parameters:,}, without embeddings and head {size.matrices:,}; "
        f"tokens {tokens}, {size.batch_tokens:,} a step"
    )
    for estimate in suggestions.estimates:
        yield ""
        yield from _entry(estimate)
    if suggestions.notes:
        yield ""
    for note in suggestions.notes:
        yield from _wrapped(f"note: {note}", "      ")
    yield ""
    yield from _wrapped(_verdict(suggestions), "")
    yield f"measure  {find}"


def _wrapped(text: str, indent: str) -> list[str]:
    """Lines of a readable width; a path or a command's name stays whole."""
    return textwrap.wrap(
        text, WIDTH, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False
    )


def _entry(estimate: "Estimate") -> Iterator[str]:
    lr = "none" if estimate.lr is None else f"{estimate.lr:.1e}"
    yield f"{lr:>8}  {estimate.source}"
    yield f"{'':10}{estimate.formula}"
    where = {None: "", True: "  EXTRAPOLATED: this run is outside", False: "  this run is inside"}
    yield f"{'':10}range: {estimate.range}{where[estimate.extrapolated]}"
    if estimate.batch_tokens is not None:
        yield f"{'':10}its batch for this run: {estimate.batch_tokens:,} tokens a step"


def _verdict(suggestions: "Suggestions") -> str:
    """The last words: how far the estimates are apart."""
    if suggestions.spread is None:
        return "spread: none, since no source fits this optimizer"
    low, high = suggestions.spread
    known = [estimate for estimate in suggestions.estimates if estimate.lr is not None]
    outside = [_short(estimate) for estimate in known if estimate.extrapolated]
    named = "all inside their ranges"
    if outside:
        named = f"{len(outside)} of them extrapolated ({', '.join(outside)}), which can be far off"
    return (
        f"spread: {low:.1e} to {high:.1e}, a factor of {high / low:.3g}, over {len(known)} "
        f"sources, {named}. They hold for Adam and AdamW with a falling rate, mostly a cosine, at "
        "their authors' text, batch and vocabulary; gpt-lr find measures on yours"
    )


def _short(estimate: "Estimate") -> str:
    """The source's first words."""
    return estimate.source.partition(",")[0].partition(" (")[0].removesuffix("'s models")
