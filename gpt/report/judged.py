"""One run, read and judged: what every form of the report is made from."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from gpt.errors import UserError
from gpt.health.diagnose import diagnose
from gpt.health.finding import Finding
from gpt.history import History, read_run
from gpt.metrics import METRICS_NAME
from gpt.report.coverage import Coverage, coverage
from gpt.report.standing import Standing, standing
from gpt.report.summary import Summary, summarize


@dataclass(frozen=True)
class Judged:
    """A run's history with what was made of it."""

    history: History
    findings: Sequence[Finding]
    standing: Standing
    summary: Summary
    coverage: Coverage

    @property
    def name(self) -> str:
        """How to call the run."""
        return self.history.name


def judge(history: History, findings: Sequence[Finding] | None = None) -> Judged:
    """Puts a history through the diagnosis, unless the findings are given."""
    return Judged(
        history=history,
        findings=diagnose(history) if findings is None else findings,
        standing=standing(history),
        summary=summarize(history),
        coverage=coverage(history),
    )


def open_history(path: Path) -> History:
    """The history of a run directory, or of a log that another program wrote.

    Raises UserError where there is neither.
    """
    if not path.exists():
        raise UserError(f"{path}: does not exist; give a run directory (runs/NAME) or a log file")
    log = path / METRICS_NAME
    if log.is_file() and not log.stat().st_size:
        return read_run(path)  # begun, and nothing is written yet
    if has_not_begun(path):
        raise UserError(
            f"{path}: has not begun, there is no {METRICS_NAME} yet; --watch waits for it"
        )
    from gpt.foreign import read_log

    return read_log(path)


def has_not_begun(path: Path) -> bool:
    """Whether this is a run directory of ours that nothing was logged in."""
    return (path / "config.yaml").is_file() and not (path / METRICS_NAME).exists()
