"""What is said of a run in words, in the terminal and in the page alike."""

from collections.abc import Sequence

from gpt.errors import shown
from gpt.health.finding import Finding
from gpt.metrics import duration
from gpt.report.config_keys import unique_names
from gpt.report.judged import Judged
from gpt.report.summary import Summary

TITLES = {
    "nonfinite": "Numbers that are not finite",
    "wrong_tokenizer": "A tokenizer that does not fit the text",
    "data_leak": "Validation text in the training text",
    "data_duplicate": "Repeated training text",
    "data_order": "Text that comes in an order",
    "stuck_at_chance": "Stuck at guessing",
    "lr_too_large": "Learning rate too large",
    "lr_too_small": "Learning rate too small",
    "dead_layer": "A layer that does not learn",
    "warmup_too_short": "Warmup too short",
    "spike": "A spike of the loss",
    "overfitting": "Overfitting",
    "plateau": "A plateau",
    "no_decay": "A rate that never comes down",
    "throughput": "Slower than it was",
}
COLUMNS: tuple[str, ...] = ("run", "state", "step", "train", "val", "best val")
COLUMNS += ("bits/byte", "peak lr", "time", "findings")
HEALTHY = "healthy, nothing wrong can be seen"


def title(finding: Finding) -> str:
    """What a finding is called."""
    return TITLES.get(finding.id, finding.id.replace("_", " "))


def verdict(judged: Judged) -> str:
    """The outcome in a line."""
    count = len(judged.findings)
    if count:
        return "1 finding" if count == 1 else f"{count} findings, the most important first"
    if judged.standing.state == "waiting" or not judged.coverage.signals:
        return "nothing to judge yet"
    return HEALTHY


def progress(judged: Judged) -> str:
    """Where a run is, in one line."""
    summary = judged.summary
    parts = [f"{shown(judged.name)}: {_where(summary)}"]
    if summary.train_loss is not None:
        parts.append(f"train {summary.train_loss:.4f}")
    if summary.val_loss is not None:
        parts.append(f"val {summary.val_loss:.4f}")
    left = summary.seconds_left
    if left is not None and judged.standing.state == "running":
        parts.append(f"{duration(left)} left")
    parts.append(", ".join(finding.id for finding in judged.findings) or "no findings")
    return "; ".join(parts)


def facts(judged: Judged) -> list[tuple[str, str]]:
    """Label and text of what is known, as far as it is."""
    summary = judged.summary
    rows = [
        ("stands", _where(summary)),
        ("train", _train(summary)),
        ("val", _validation(summary)),
        ("rate", _rate(summary)),
        ("gradient", _gradient(judged)),
        ("speed", _speed(summary)),
    ]
    return [(label, text) for label, text in rows if text]


def side_by_side(runs: Sequence[Judged]) -> list[list[str]]:
    """One row a run, under COLUMNS."""
    names = unique_names([run.history for run in runs])
    rows = []
    for name, run in zip(names, runs, strict=True):
        summary = run.summary
        bits, seconds, peak = summary.val_bpb, summary.seconds, summary.lr_peak
        rows.append(
            [
                name,
                run.standing.state,
                f"{summary.step:,}",
                _loss(summary.train_loss),
                _loss(summary.val_loss),
                _loss(summary.best_val_loss),
                _loss(bits),
                "–" if peak is None else f"{peak:.3g}",
                "–" if seconds is None else duration(seconds),
                ", ".join(finding.id for finding in run.findings) or "none",
            ]
        )
    return rows


def _loss(value: float | None) -> str:
    return "–" if value is None else f"{value:.4f}"


def without_findings(runs: Sequence[Judged], names: Sequence[str]) -> list[str]:
    """The runs in which nothing was found, a line for each outcome."""
    by_outcome: dict[str, list[str]] = {}
    for name, run in zip(names, runs, strict=True):
        if not run.findings:
            by_outcome.setdefault(verdict(run), []).append(name)
    return [f"{outcome}: {', '.join(names)}" for outcome, names in by_outcome.items()]


def signals(judged: Judged) -> list[str]:
    """What the verdict rests on, and what could not be checked, a line each."""
    has = judged.coverage.signals
    lines = [f"judged from {', '.join(has)}"] if has else []
    missing = judged.coverage.unmade_words()
    return lines + ([f"not checked: {missing}"] if missing else [])


def steps_of(finding: Finding) -> str:
    """When a finding holds."""
    if finding.last_step is None:
        return f"from step {finding.first_step:,} on"
    if finding.last_step == finding.first_step:
        return f"at step {finding.first_step:,}"
    return f"steps {finding.first_step:,} to {finding.last_step:,}"


def memory_size(count: float) -> str:
    """Bytes in a unit that fits."""
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= size:
            return f"{count / size:.3g} {unit}"
    return f"{count:.0f} B"


def _where(summary: Summary) -> str:
    parts = [f"step {summary.step:,}"]
    if summary.total_steps:
        parts = [
            f"step {summary.step:,} of {summary.total_steps:,} "
            f"({summary.step / summary.total_steps:.0%})"
        ]
    if summary.tokens is not None:
        parts.append(f"{summary.tokens:,} tokens")
    if summary.epochs is not None:
        parts.append(f"{summary.epochs:,.2f} epochs")
    if summary.seconds is not None:
        parts.append(duration(summary.seconds))
    return ", ".join(parts)


def _train(summary: Summary) -> str:
    if summary.train_loss is None:
        return ""
    window = summary.train_window
    over = f"mean of the last {window:,} logged steps" if window > 1 else "last logged step"
    text = f"{summary.train_loss:.4f} nats/token ({over})"
    if summary.best_train_loss is not None and summary.best_train_step is not None:
        text += f", best {summary.best_train_loss:.4f} at step {summary.best_train_step:,}"
    return text


def _validation(summary: Summary) -> str:
    if summary.val_loss is None:
        return ""
    text = f"{summary.val_loss:.4f} nats/token at step {summary.val_step:,}"
    if summary.best_val_step == summary.val_step:
        text += ", the best"
    else:
        text += f", best {summary.best_val_loss:.4f} at step {summary.best_val_step:,}"
    if summary.val_bpb is not None:
        text += f"; {summary.val_bpb:.4f} bits/byte"
        if summary.best_val_bpb is not None and summary.best_val_bpb < summary.val_bpb:
            text += f", best {summary.best_val_bpb:.4f}"
    return text


def _rate(summary: Summary) -> str:
    if summary.lr_peak is None:
        return ""
    return (
        f"{summary.lr_first:.3g} first, {summary.lr_peak:.3g} at most, at step "
        f"{summary.lr_peak_step:,}, {summary.lr_last:.3g} last"
    )


def _gradient(judged: Judged) -> str:
    summary, config = judged.summary, judged.history.config
    parts = []
    if summary.grad_norm is not None:
        parts.append(f"norm {summary.grad_norm:.3g} in the median")
    if summary.grad_norm_max is not None:
        parts.append(f"{summary.grad_norm_max:.3g} at most, at step {summary.grad_norm_max_step:,}")
    text = ", ".join(parts)
    if summary.clipped_share is not None and config is not None and config.train.grad_clip:
        clipped = f"{summary.clipped_share:.0%} of steps clipped to {config.train.grad_clip:g}"
        text = "; ".join(part for part in (text, clipped) if part)
    return text


def _speed(summary: Summary) -> str:
    parts = []
    if summary.tokens_per_s is not None:
        parts.append(f"{summary.tokens_per_s:,.0f} tokens/s in the median")
    if summary.tokens_per_s_last is not None:
        parts.append(f"{summary.tokens_per_s_last:,.0f} last")
    if summary.memory_bytes is not None:
        parts.append(f"{memory_size(summary.memory_bytes)} of memory at most")
    return ", ".join(parts)
