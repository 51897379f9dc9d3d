"""The book of a sweep, sweep.json: which runs have ended, how, and under which config."""

import json
import math
from functools import cached_property
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from gpt.config import Config
from gpt.errors import UserError
from gpt.files import check_writable, write_durably
from gpt.lr.labels import Verdict, judge
from gpt.lr.outcome import Run
from gpt.lr.rates import rate_text, with_lr
from gpt.metrics import read_metrics
from gpt.rundir import changed_keys

LEDGER_NAME = "sweep.json"
# A single run may change these on the way, but then its final loss compares with no other's.
COMPARABLE_KEYS = ("eval.max_tokens", "eval.patience", "train.dtype", "train.max_time_s")


def run_name(lr: float, seed: int) -> str:
    """The name of a run in the sweep's folder."""
    return f"lr-{rate_text(lr)}-seed-{seed}"


class Ledger:
    """The runs of a sweep that have ended, by name; on disk after each of them."""

    def __init__(
        self, out: Path, config: Config, fingerprint: str, entropy: float, runs: dict[str, Run]
    ) -> None:
        """Takes the data's fingerprint, and its unigram entropy in nats per token."""
        self._out, self._config = out, config
        self._fingerprint, self._entropy = fingerprint, entropy
        self.runs = runs

    @classmethod
    def open(cls, out: Path, config: Config, fingerprint: str, entropy: float) -> "Ledger":
        """The folder's ledger, or a new one; an ended run whose folder is gone counts no more.

        Raises UserError if the runs there have learned from other data.
        """
        written = _read(out)
        runs = {}
        if written is not None and _has_runs(out):
            if written["data_fingerprint"] != fingerprint:
                raise UserError(
                    f"--out: {out} is a sweep over other data (text, tokenizer or split have "
                    "changed), and its losses compare with no others; choose another --out"
                )
            for row in written["runs"]:
                run = Run.from_records(row["lr"], row["seed"], read_metrics(out / row["run"]))
                if run.train[0] or run.broke:
                    runs[row["run"]] = run
        ledger = cls(out, config, fingerprint, entropy, runs)
        ledger._write()
        return ledger

    def enter(self, run: Run) -> None:
        """Adds a run that has ended."""
        self.runs[run_name(run.lr, run.seed)] = run
        self.__dict__.pop("verdict", None)
        self._write()

    @cached_property
    def verdict(self) -> Verdict:
        """What the runs show so far."""
        return judge(self.runs.values(), self._entropy)

    def answer(self) -> dict[str, Any]:
        """All of it as plain values: what `--json` prints and sweep.json holds."""
        verdict = self.verdict
        return {
            "runs": [
                {
                    "lr": run.lr,
                    "seed": run.seed,
                    "val_loss": run.val_loss,
                    "label": verdict.label_of(run),
                    "best_step": run.best[0] if run.best else None,
                    "best_val_loss": run.best[1] if run.best else None,
                    "run": run_name(run.lr, run.seed),
                }
                for rate in verdict.rates
                for run in rate.runs
            ],
            "best": verdict.best,
            "rates": [
                {
                    "lr": rate.lr,
                    "label": rate.label,
                    "evidence": rate.evidence,
                    "val_loss": None if rate.diverged else rate.mean,
                    "spread": None if rate.diverged else rate.spread,
                }
                for rate in verdict.rates
            ],
            "tolerance": verdict.tolerance if math.isfinite(verdict.tolerance) else None,
            "unigram_entropy": self._entropy,
            "notes": list(verdict.notes),
            "next_lrs": list(verdict.next_lrs),
            "data_fingerprint": self._fingerprint,
            "config": self._config.model_dump(mode="json"),
        }

    def _write(self) -> None:
        text = json.dumps(self.answer(), indent=1, ensure_ascii=False, allow_nan=False)
        write_durably(self._out / LEDGER_NAME, text + "\n")


def check_folder(out: Path, config: Config) -> None:
    """Raises UserError where a sweep of this config cannot start or go on; touches nothing."""
    try:
        if out.exists() and not out.is_dir():
            raise UserError(f"--out: {out} is a file; choose another")
        is_taken = out.is_dir() and any(child.name != ".lock" for child in out.iterdir())
    except OSError as error:
        raise UserError(
            f"--out: {out} cannot be written ({error.strerror}); choose another --out"
        ) from None
    check_writable("--out", out)
    written = _read(out)
    if written is None:
        if is_taken:
            raise UserError(f"--out: {out} exists and is not a sweep; choose another")
        return
    before = Config.model_validate(written["config"])
    changed = [f"{key}: {was} there, {now} now" for key, was, now in _changed(before, config)]
    if changed and _has_runs(out):
        more = f"; {len(changed) - 4} more" if len(changed) > 4 else ""
        raise UserError(
            f"--out: {out} is a sweep of another config ({'; '.join(changed[:4])}{more}); choose "
            "another --out, or remove that folder"
        )


def _changed(before: Config, now: Config) -> list[tuple[str, Any, Any]]:
    """What differs between two sweeps, beside the rate itself and the first seed."""
    lr = now.optimizer.lr
    same_seed = before.run.model_copy(update={"seed": now.run.seed})
    before = with_lr(before.model_copy(update={"run": same_seed}), lr)
    now = with_lr(now, lr)
    changed: list[tuple[str, Any, Any]] = [*changed_keys(before, now)]
    for name in COMPARABLE_KEYS:
        section, key = name.split(".")
        was, value = (getattr(getattr(config, section), key) for config in (before, now))
        if was != value:
            changed.append((name, was, value))
    return changed


def _has_runs(out: Path) -> bool:
    """Whether any run has begun there."""
    return any(out.glob("lr-*-seed-*/config.yaml"))


def _read(out: Path) -> dict[str, Any] | None:
    """The ledger's content; None if there is none. Raises UserError if it cannot be one."""
    path = out / LEDGER_NAME
    try:
        written = json.loads(path.read_text(encoding="utf-8"))
        Config.model_validate(written["config"])
        named = isinstance(written["data_fingerprint"], str) and all(
            run_name(float(row["lr"]), int(row["seed"])) == row["run"] for row in written["runs"]
        )
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError, KeyError, TypeError, ValidationError):
        named = False
    if not named:
        raise UserError(f"--out: {path} is damaged; choose another --out, or remove that folder")
    assert isinstance(written, dict)
    return written
