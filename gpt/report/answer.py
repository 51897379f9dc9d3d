"""The report for programs: one JSON object, strictly valid."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from gpt.errors import json_line
from gpt.report.compare import compare
from gpt.report.judged import Judged


def answer(runs: Sequence[Judged], probe: Mapping[str, Any] | None = None) -> str:
    """The object as one line: of one run its own, of several `runs` and `comparison`.

    A number that is not finite is a string, as in metrics.jsonl; one that does not exist is null.
    """
    if len(runs) == 1:
        told = run_answer(runs[0])
        if probe is not None:
            told["probe"] = dict(probe)
    else:
        comparison = compare([run.history for run in runs])
        told = {
            "runs": [
                {**run_answer(run), "name": name}
                for run, name in zip(runs, comparison.names, strict=True)
            ],
            "comparison": comparison.record(),
        }
    return json_line(strict(told))


def run_answer(judged: Judged) -> dict[str, Any]:
    """What is said of one run."""
    coverage = judged.coverage
    return {
        "healthy": not judged.findings,
        "findings": [asdict(finding) for finding in judged.findings],
        "final": judged.summary.record(),
        "name": judged.name,
        "source": judged.history.source,
        "state": judged.standing.state,
        "go_on": judged.standing.go_on or None,
        "judged_from": list(coverage.signals),
        "not_checked": [asdict(unmade) for unmade in coverage.unmade],
        "notes": list(judged.history.notes),
    }


def strict(value: Any) -> Any:  # noqa: ANN401 (whatever JSON can hold, and numpy's numbers)
    """The value with non-finite numbers as text, since JSON has none."""
    if isinstance(value, Mapping):
        return {str(key): strict(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [strict(inner) for inner in value]
    if value is None or isinstance(value, str | bool | int):
        return value
    number = float(value)
    if math.isfinite(number):
        return number
    return "NaN" if math.isnan(number) else "Infinity" if number > 0 else "-Infinity"
