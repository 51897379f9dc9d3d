"""A run in a few numbers: where it got, its losses, its rate, how it went."""

from dataclasses import asdict, dataclass

import numpy as np

from gpt.history import Column, History, Table, finite

# Logged steps: the mean of more would lag behind a loss that still falls.
_MOST_AVERAGED = 100


@dataclass(frozen=True)
class Summary:
    """Numbers of a run; None where there is no finite one.

    Losses are nats per token, of a log in other units whatever it has. `train_loss` is the mean of
    the last `train_window` logged steps, `best_train_loss` the lowest such mean, and its step the
    last of those. Gradient norm and speed are medians; `clipped_share` is of all steps.
    """

    step: int
    total_steps: int | None
    tokens: int | None
    epochs: float | None
    seconds: float | None
    train_loss: float | None
    train_window: int
    best_train_loss: float | None
    best_train_step: int | None
    val_loss: float | None
    val_step: int | None
    best_val_loss: float | None
    best_val_step: int | None
    val_bpb: float | None
    best_val_bpb: float | None
    lr_first: float | None
    lr_peak: float | None
    lr_peak_step: int | None
    lr_last: float | None
    grad_norm: float | None
    grad_norm_max: float | None
    grad_norm_max_step: int | None
    clipped_share: float | None
    tokens_per_s: float | None
    tokens_per_s_last: float | None
    memory_bytes: int | None

    def record(self) -> dict[str, float | int | None]:
        """The numbers by name."""
        return asdict(self)

    @property
    def seconds_left(self) -> float | None:
        """By the pace so far; None where it cannot be told."""
        if self.total_steps is None or self.seconds is None or not self.step:
            return None
        return max(0, self.total_steps - self.step) * self.seconds / self.step


def summarize(history: History) -> Summary:
    """The numbers of a run as far as its log goes."""
    train, evals = history.train, history.evals
    steps, losses = finite(train["step"], train["loss"])
    window = min(_MOST_AVERAGED, max(1, len(losses) // 20))
    means = _running_mean(losses, window)
    best = int(means.argmin()) if len(means) else None
    val_steps, val_losses = finite(evals["step"], evals["val_loss"])
    lowest = int(val_losses.argmin()) if len(val_losses) else None
    bits = finite(evals["step"], evals["val_bpb"])[1]
    rate_steps, rates = finite(train["step"], train["lr"])
    name = "grad_norm_max" if "grad_norm_max" in train else "grad_norm"
    norm_steps, norms = finite(train["step"], train[name])
    speeds = finite(train["step"], train["tokens_per_s"])[1]
    tokens, memory = _last(train["tokens"]), _largest(train["memory_bytes"])
    return Summary(
        step=history.last_step,
        total_steps=history.total_steps,
        tokens=None if tokens is None else int(tokens),
        epochs=_last(train["epoch"]),
        seconds=_last(train["time_s"]),
        train_loss=_last(means),
        train_window=window,
        best_train_loss=None if best is None else float(means[best]),
        best_train_step=None if best is None else int(steps[best + window - 1]),
        val_loss=_last(val_losses),
        val_step=int(val_steps[-1]) if len(val_steps) else None,
        best_val_loss=None if lowest is None else float(val_losses[lowest]),
        best_val_step=None if lowest is None else int(val_steps[lowest]),
        val_bpb=_last(bits),
        best_val_bpb=float(bits.min()) if len(bits) else None,
        lr_first=float(rates[0]) if len(rates) else None,
        lr_peak=_largest(rates),
        lr_peak_step=int(rate_steps[rates.argmax()]) if len(rates) else None,
        lr_last=_last(rates),
        grad_norm=_median(train["grad_norm"]),
        grad_norm_max=_largest(norms),
        grad_norm_max_step=int(norm_steps[norms.argmax()]) if len(norms) else None,
        clipped_share=clipped_share(train),
        tokens_per_s=_median(speeds),
        tokens_per_s_last=_last(speeds),
        memory_bytes=None if memory is None else int(memory),
    )


def clipped_share(train: Table) -> float | None:
    """The share of all steps whose gradient was clipped; each line stands for those before it."""
    shares = train["clipped_share"] if "clipped_share" in train else train["clipped"]
    known = np.isfinite(shares)
    if not known.any():
        return None
    weights = np.diff(train["step"], prepend=0)[known]
    total = float(weights.sum())
    return float((shares[known] * weights).sum() / total) if total > 0 else None


def _running_mean(values: Column, window: int) -> Column:
    """Means of `window` values that follow one another, each summed alone.

    In a sum of all, what comes after one enormous value would be lost.
    """
    if len(values) < window:
        return np.empty(0)
    means: Column = np.lib.stride_tricks.sliding_window_view(values, window).mean(axis=1)
    return means


def _last(values: Column) -> float | None:
    known = values[np.isfinite(values)]
    return float(known[-1]) if len(known) else None


def _largest(values: Column) -> float | None:
    known = values[np.isfinite(values)]
    return float(known.max()) if len(known) else None


def _median(values: Column) -> float | None:
    known = values[np.isfinite(values)]
    return float(np.median(known)) if len(known) else None
