"""The diagnosis while a run goes on: which findings begin, which end."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, NamedTuple

from gpt.config import Config
from gpt.health.diagnose import diagnose
from gpt.health.finding import Finding
from gpt.history import HistoryLog
from gpt.metrics import Record

LOOKS = 100  # over a whole run; one takes some milliseconds


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

    def __init__(self, name: str, config: Config, total_steps: int, records: list[Record]) -> None:
        """Takes what an earlier process of the run has written."""
        self._log = HistoryLog(config, name=name)
        for record in records:
            self._log.add(record)
        self._every = max(1, total_steps // LOOKS)
        self._next = 0
        self._present = _told(records)
        self._quiet: dict[str, int] = {}

    def add(self, record: Mapping[str, Any]) -> None:
        """Takes a line of the log."""
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


def _told(records: list[Record]) -> dict[str, Finding]:
    """The findings that an earlier process told the beginning of, and not the end."""
    present: dict[str, Finding] = {}
    for record in records:
        if record.get("kind") != "event" or record.get("event") != "finding":
            continue
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
    return present
