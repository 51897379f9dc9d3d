"""The diagnosis while a run goes on: which findings begin, which end."""

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any, NamedTuple

from gpt.config import Config
from gpt.health.diagnose import diagnose
from gpt.health.finding import Finding
from gpt.history import HistoryLog
from gpt.metrics import Record

LOOKS = 100  # over a whole run; one takes some milliseconds
UNREAD = ("sample", "finding")  # events that no rule asks for, and that come without end
MOST_ROWS = 2048  # held of a log; a longer one is looked at as if it were written less often


class News(NamedTuple):
    """A finding that begins, or one that has ended."""

    finding: Finding
    begins: bool


class Watch:
    """Holds what a run has written, and looks at it now and then.

    A finding is told once when it begins and once when it ends; one that comes back is told again
    only after it has been away for as many looks as it was there, so that a run on the border
    between well and unwell does not flood the console.
    """

    def __init__(
        self, name: str, config: Config, total_steps: int, records: Iterable[Record]
    ) -> None:
        """Takes what an earlier process of the run has written."""
        self._log = HistoryLog(config, name=name, most=MOST_ROWS)
        self._present: dict[str, Finding] = {}
        for record in records:
            self.add(record)
            _note_told(record, self._present)
        self._every = max(1, total_steps // LOOKS)
        self._next = 0
        self._quiet: dict[str, int] = {}

    def add(self, record: Mapping[str, Any]) -> None:
        """Takes a line of the log."""
        if record.get("event") not in UNREAD:
            self._log.add(record)

    def look(self, step: int, *, now: bool = False) -> list[News]:
        """What has begun and ended since the last look; looks LOOKS times in a run, or `now`."""
        if step < self._next and not now:
            return []
        self._next = step + self._every
        found = {finding.id: finding for finding in diagnose(self._log.history())}
        news = []
        for name, finding in found.items():
            if name not in self._present and step >= self._quiet.get(name, 0):
                self._present[name] = finding
                news.append(News(finding, begins=True))
        for name in [name for name in self._present if name not in found]:
            finding = replace(self._present.pop(name), last_step=step)
            self._quiet[name] = 2 * step - min(step, finding.first_step)
            news.append(News(finding, begins=False))
        return news


def _note_told(record: Record, present: dict[str, Finding]) -> None:
    """Keeps the findings that were told the beginning of, and not the end."""
    if record.get("kind") != "event" or record.get("event") != "finding":
        return
    name, first = str(record.get("id")), record.get("first_step")
    if record.get("state") == "end":
        present.pop(name, None)
    else:
        present[name] = Finding(
            id=name,
            first_step=int(first) if isinstance(first, int | float) else 0,
            evidence=str(record.get("evidence", "")),
            cause=str(record.get("cause", "")),
            next=str(record.get("next", "")),
        )
