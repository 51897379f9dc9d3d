"""What training programs print: `step 10/500 | loss 3.2 | lr 3e-4`, in whatever dialect.

A line counts if it names a step and a number that we know. Of lines without a step, those with a
validation loss count for the step before, and Hugging Face's `{'loss': 3.2, ...}` for the one that
the progress bar beside it shows.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from gpt.foreign.lines import parse_number
from gpt.foreign.names import Meaning, meaning
from gpt.foreign.sheet import Sheet

# Longer lines are text, or a program's own source.
_LONGEST = 4096
_MOST_BARS = 8
_LARGEST_STEP = 10**15
_ESCAPES = re.compile(r"\x1b(?:\[[0-9;:?]*[ -/]*[@-~]|\][^\x07\x1b]*(?:\x07|\x1b\\)?|[@-Z\\^_])")
# Words of which a line that tells anything has one; looked for in small letters.
_TELLING = ("loss", "|", "bpb", "byte", "perplexity", "ppl", "trl:", "tel:", "val", "nll", "entro")
_FACTUAL = ("vocab", "max_", "total_steps", "total opt", "iterations", "train_iters", "tokens per")
_GAPS = re.compile(r"\s{3,}")
_NUMBER = (
    r"[-+]?(?:(?:\d{1,3}(?:,\d{3})+(?:\.\d+)?|\d+(?:\.\d*)?|\.\d+)(?:[eE][-+]?\d+)?"
    r"|nan\b|inf(?:inity)?\b)"
)
_PAIR = re.compile(
    r"(?<![\w./-])(?P<key>[A-Za-z_](?:[\w/.()%-]| (?! )){0,60}?)"
    r"(?:[\"']?\s*[:=]\s*[\"']?|\s+)"
    rf"(?P<value>{_NUMBER})(?:\s?/\s*(?P<total>\d[\d,]*)(?![\w.]))?"
    r"[\"']?\s?(?P<unit>ms|us|µs|s|sec|secs|m|min|h|k|K|M)?(?![\w.]*\w)",
    re.IGNORECASE,
)
_BAR = re.compile(r"\|\s*(\d{1,12})/(\d{1,12})\s*\[")
_BRACKET = re.compile(r"\[\s*(\d{1,12})\s*/\s*(\d{1,12})(?=[\s\]])")
# Numbers whose unit is their only name. The unit is looked for first, the number before it then.
_BARE = (
    ("tokens_per_s", re.compile(r"\s*tok(?:en)?s?\s?/\s?s", re.IGNORECASE), 1.0),
    ("mfu", re.compile(r"%\s?(?:\w+\s)?MFU"), 1.0),
    ("step_time_s", re.compile(r"(?<=\d)\s?ms\b"), 1e-3),
)
_LAST_NUMBER = re.compile(rf"(?:^|[\s|(])\s*({_NUMBER})$", re.IGNORECASE)
_RANK = re.compile(r"\[(?:rank|default)(\d+)\]")
_VALIDATING = re.compile(r"(?<![\w./])(?:validation|validate|eval|evaluation|val)(?![\w./])", re.I)
_NANOGPT = re.compile(r"(?:iter \d+: loss |step \d+: train loss \S+, val loss )")
# Lines of an evaluation, whose training loss is another than the step's: nanoGPT's and ours.
_BESIDE = re.compile(r"(?:step \d+: train loss \S+, val loss |eval \d+/\d+ )")
_BITS = re.compile(r"\s*bits/byte")
# Said before the name of a number by those who log with dates and levels.
_PREAMBLE = re.compile(
    r"^.*(?:\s-|\b(?:INFO|DEBUG|WARNING|root|at|end of|after|tok/s|ms|it/s|[GM]i?B))\s", re.I
)
_UNIT_SECONDS = {"us": 1e-6, "µs": 1e-6, "ms": 1e-3, "s": 1.0, "sec": 1.0, "secs": 1.0}
_UNIT_SECONDS |= {"m": 60.0, "min": 60.0, "h": 3600.0}
_THOUSANDS = {"k": 1e3, "M": 1e6}
_MEASURES = ("loss", "ppl", "val_loss", "val_ppl", "val_bpb")

_TOTAL = re.compile(
    r"(?:max_iters|max_steps|total_steps|num_iterations|train_iters|total optimization steps"
    r"|number of iterations[a-z :]*?)[\"']?\s*[|:=]+\s*(\d[\d,_]*)(?![\d.])",
    re.IGNORECASE,
)
_VOCABULARY = re.compile(
    r"(?<!padded_)vocab[_ ]?size(?: V)?(?: of GPT-2 to)?[\"']?\s*[|:= ]\s*(\d[\d,_]*)", re.I
)
_TOKENS = re.compile(r"tokens per iteration(?: will be)?:\s*(\d[\d,_]*)", re.IGNORECASE)


class ConsoleReader:
    """Takes the numbers of console lines, one after the other."""

    def __init__(self) -> None:
        """Nothing was read yet."""
        self.sheet = Sheet()
        self.nanogpt = False
        self._loose = Sheet()  # lines that name no step, for a log in which none does
        self._rank: str | None = None
        self._bars: dict[int, int] = {}
        self._validation: float | None = None

    def read(self, lines: Iterable[str]) -> Sheet:
        """The sheet of a whole log."""
        for line in lines:
            small = line[:_LONGEST].lower()
            telling, factual = (any(map(small.__contains__, w)) for w in (_TELLING, _FACTUAL))
            if telling or factual:
                # Long gaps say no more than short ones, and cost the searches below much.
                line = _GAPS.sub("  ", _ESCAPES.sub("", line[:_LONGEST]))
            if telling:
                self._line(line)
            if factual:
                self._facts(line)
        if not any(column.meaning.name in _MEASURES for column in self.sheet.columns.values()):
            self._loose.vocab_size = self.sheet.vocab_size
            self._loose.total_steps = self.sheet.total_steps
            return self._loose
        return self.sheet

    def _line(self, line: str) -> None:
        if self._of_another_process(line):
            return
        bar = self._bar(line)
        if "train_runtime" in line:
            return  # Hugging Face's summary of the whole training
        self.nanogpt = self.nanogpt or _NANOGPT.match(line) is not None
        row = _Row(line)
        self._drop_repeated(row)
        if not row.measured:
            return
        if row.has_step:
            self._add(self.sheet, row)
        elif bar is not None and row.has_train_loss and not _validates(line[: bar.start()]):
            self._by_bar(row, {int(bar[2]): int(bar[1])})
        elif "{'" in line or '{"' in line:
            self._by_bar(row, self._bars)
        elif " = " not in line:  # that would be a line of source
            if not row.has_train_loss:
                self._add(self.sheet, row)
            self._add(self._loose, row)

    def _drop_repeated(self, row: _Row) -> None:
        """Takes off a validation loss that is only shown again, as progress bars do."""
        shown = next((value for _, meant, value in row.cells if meant.name == "val_loss"), None)
        if shown is not None and shown == self._validation and row.has_train_loss:
            row.cells = [cell for cell in row.cells if cell[1].name != "val_loss"]
        self._validation = self._validation if shown is None else shown

    def _of_another_process(self, line: str) -> bool:
        """Whether torchrun marked the line as one of another process than the first that spoke."""
        rank = _RANK.match(line)
        if rank is None:
            return False
        self._rank = self._rank or rank[1]
        return rank[1] != self._rank

    def _bar(self, line: str) -> re.Match[str] | None:
        bar = _BAR.search(line)
        if bar is not None and (int(bar[2]) in self._bars or len(self._bars) < _MOST_BARS):
            self._bars[int(bar[2])] = int(bar[1])
        return bar

    def _by_bar(self, row: _Row, bars: dict[int, int]) -> None:
        """Adds a line whose step one of the progress bars shows; which one, the whole log tells."""
        for total, done in bars.items():
            spelled = f"bar of {total}"
            self.sheet.add_meant(spelled, Meaning("step", "row", 50), done)
            self.sheet.totals[spelled] = total
        self._add(self.sheet if bars else self._loose, row)

    def _add(self, sheet: Sheet, row: _Row) -> None:
        for spelled, meant, value in row.cells:
            sheet.add_meant(spelled, meant, value)
        sheet.totals |= row.totals
        sheet.add(())

    def _facts(self, line: str) -> None:
        for pattern, note in (
            (_TOTAL, self.sheet.note_total),
            (_VOCABULARY, self.sheet.note_vocabulary),
            (_TOKENS, self._note_tokens),
        ):
            found = pattern.search(line)
            number = parse_number(found[1]) if found is not None else None
            if number is not None:
                note(number)

    def _note_tokens(self, tokens: float) -> None:
        self.sheet.tokens_per_step = int(tokens)


class _Row:
    """The numbers of one line."""

    def __init__(self, line: str) -> None:
        self.cells: list[tuple[str, Meaning, float]] = []
        self.totals: dict[str, int] = {}
        for found in _PAIR.finditer(line):
            self._pair(found)
        self._bare(line)
        names = {meant.name for _, meant, _ in self.cells}
        if (
            "loss" in names
            and not names & {"val_loss", "val_bpb"}
            and _validates(line)
            and "train" not in line.lower()
        ):
            self.cells = [_validated(cell) for cell in self.cells if _of_validation(cell)]
        elif {"val_loss", "loss"} <= names and _BESIDE.match(line):
            self.cells = [_beside(cell) for cell in self.cells]
        names = {meant.name for _, meant, _ in self.cells}
        self.has_step = "step" in names
        self.has_train_loss = bool(names & {"loss", "ppl"})
        self.measured = bool(names & {*_MEASURES, "train_loss"})

    def _pair(self, found: re.Match[str]) -> None:
        unit = found["unit"] or ""
        unit = unit if unit == "M" else unit.lower()
        key = found["key"].strip()
        meant = _meaning(key, unit, counted=found["total"] is not None)
        value = parse_number(found["value"])
        if meant is None or value is None:
            return
        if meant.name in ("step_time_s", "time_s"):
            value *= _UNIT_SECONDS.get(unit, meant.scale) / meant.scale
        elif unit:
            if unit not in _THOUSANDS:
                return  # `val: 3 ms` is no loss
            value *= _THOUSANDS[unit]
        if found["total"] is not None and meant.name == "step":
            total = parse_number(found["total"])
            if total is not None and total < _LARGEST_STEP:
                self.totals[key] = int(total)
        self.cells.append((key, meant, value))

    def _bare(self, line: str) -> None:
        """Numbers whose unit is their only name."""
        names = {meant.name for _, meant, _ in self.cells}
        for name, unit, scale in _BARE:
            value = _number_before(unit, line) if name not in names else None
            if value is not None:
                self.cells.append((name, Meaning(name, "train", 30), value * scale))
        bits = _number_before(_BITS, line) if _validates(line) else None
        if bits is not None:
            self.cells.append(("val bits/byte", Meaning("val_bpb", "eval"), bits))
        if "step" not in names and (found := _BRACKET.search(line)):
            self.cells.append(("[n/m]", Meaning("step", "row", 40), float(found[1])))
            self.totals["[n/m]"] = int(found[2])


def _number_before(unit: re.Pattern[str], line: str) -> float | None:
    """The number that stands right before the first such unit, unless something names it."""
    found = unit.search(line)
    if found is None:
        return None
    number = _LAST_NUMBER.search(line, max(0, found.start() - 30), found.start())
    return parse_number(number[1]) if number is not None else None


def _meaning(key: str, unit: str, *, counted: bool) -> Meaning | None:
    """What a key means, with what a console says before it taken off; `counted`: it is `n/m`."""
    if counted and key.lower() == "eval":
        return Meaning("step", "row", 30)
    found = meaning(key)
    if found is not None:
        return found
    bare = re.sub(r"\([^)]*\)", "", _PREAMBLE.sub("", key)).strip()
    if bare == "time":  # seconds would be of a step or of the whole run, who knows
        return Meaning("step_time_s", "train", 30) if unit == "ms" else None
    return meaning(bare) if bare != key else None


def _validates(line: str) -> bool:
    """Whether a line speaks of validation."""
    return "val" in line.lower() and _VALIDATING.search(line) is not None


def _only_validates(line: str) -> bool:
    return _validates(line) and "train" not in line.lower()


def _of_validation(cell: tuple[str, Meaning, float]) -> bool:
    """Whether a cell of a line on validation can be kept: its speed is not the training's."""
    return cell[1].place != "train" or cell[1].name in ("loss", "ppl")


def _validated(cell: tuple[str, Meaning, float]) -> tuple[str, Meaning, float]:
    """A cell of a line that speaks of validation alone."""
    spelled, meant, value = cell
    name = {"loss": "val_loss", "ppl": "val_ppl"}.get(meant.name)
    return (f"val {spelled}", Meaning(name, "eval", meant.rank), value) if name else cell


def _beside(cell: tuple[str, Meaning, float]) -> tuple[str, Meaning, float]:
    spelled, meant, value = cell
    if meant.name != "loss":
        return cell
    return f"eval/{spelled}", Meaning("train_loss", "eval", meant.rank), value
