"""Made-up runs for the diagnosis: a sound one, of which each test changes what it is about."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from gpt.config import Config
from gpt.configfile import load_config
from gpt.history import Column, History, Table, history_of

Line = dict[str, Any]
STEPS, VOCAB = 2000, 4096
CHANCE, FREQUENCIES = math.log(VOCAB), 6.2
MATRICES = [f"blocks.{block}.{part}.weight" for block in range(2) for part in ("attn.wq", "mlp.up")]


def steps_of(total: int = STEPS, every: int = 10) -> Column:
    """The steps that are logged: the first, and each `every` of them."""
    return np.unique([1, *range(every, total + 1, every)]).astype(float)


def falling(
    steps: Column, *, end: float = 2.4, start: float = CHANCE, noise: float = 0.03, seed: int = 0
) -> Column:
    """A power law from `start` towards `end`, with noise, in nats per token."""
    losses: Column = end + (start - end) * (1 + steps / (0.005 * steps[-1])) ** -0.5
    return losses + noise * np.random.default_rng(seed).normal(size=len(steps))


def cosine(steps: Column, *, peak: float = 3e-3, warmup: float = 100, end: float = 0.1) -> Column:
    """A warmup and a cosine down to a share of the peak."""
    shares = np.clip((steps - warmup) / (steps[-1] - warmup), 0, 1)
    rates: Column = np.minimum(1, steps / warmup) * (
        end + (1 - end) * (0.5 + 0.5 * np.cos(np.pi * shares))
    )
    return peak * rates


def config_of(**changes: str) -> Config:
    values = {"run.name": "made-up", "train.max_steps": str(STEPS), "optimizer.lr": "3e-3"}
    values |= {"schedule.warmup_steps": "100", "schedule.min_lr": "3e-4"}
    values |= {key.replace("__", "."): value for key, value in changes.items()}
    return load_config(None, list(values.items()))


def event(step: float, name: str, **values: object) -> Line:
    return {"kind": "event", "step": int(step), "event": name, **values}


def sound(
    *,
    steps: Column | None = None,
    check: dict[str, float] | None = None,
    vocab_size: int = VOCAB,
    **columns: Any,
) -> list[Line]:
    """The log of a run in which nothing is wrong; a column that is None is not logged."""
    steps = steps_of() if steps is None else steps
    rng = np.random.default_rng(1)
    lr = cosine(steps)
    known: dict[str, Any] = {
        "loss": falling(steps),
        "lr": lr,
        "grad_norm": 0.5 * np.exp(0.2 * rng.normal(size=len(steps))),
        "update_ratio": 2.0 * lr,
        "slope_before": np.full(len(steps), -0.02),
        "slope_after": -0.002 + 0.002 * rng.normal(size=len(steps)),
        "clipped_share": np.zeros(len(steps)),
        "tokens_per_s": 7e4 * (1 + 0.03 * rng.normal(size=len(steps))),
        "others_share": np.full(len(steps), 0.02),
        "epoch": steps / steps[-1],
    }
    known |= columns
    checked = {"unigram_entropy": FREQUENCIES, "duplicate_share": 0.02, "leak_share": 0.01}
    checked |= {"bytes_per_token": 3.4, "used_share": 0.98} | (check or {})
    lines = [
        event(0, "run", total_steps=int(steps[-1]), vocab_size=vocab_size),
        event(0, "data_check", **checked),
    ]
    for index, step in enumerate(steps):
        values = {name: float(v[index]) for name, v in known.items() if v is not None}
        lines.append({"kind": "train", "step": int(step), **values})
    return lines


def layers(steps: Sequence[float], **figures: dict[str, float]) -> list[Line]:
    """Lines of what goes on layer by layer, all alike; healthy where nothing else is said."""
    known = {"grad_norm": dict.fromkeys(MATRICES, 0.1)}
    known["dead_share"] = {"blocks.0": 0.01, "blocks.1": 0.02}
    for name, values in figures.items():
        known[name] = known[name] | values
    return [{"kind": "layers", "step": int(step), **known} for step in steps]


def evaluations(steps: Column, losses: Column) -> list[Line]:
    pairs = zip(steps, losses, strict=True)
    return [{"kind": "eval", "step": int(step), "val_loss": float(loss)} for step, loss in pairs]


def history(lines: list[Line], config: Config | None = None) -> History:
    return history_of(lines, config or config_of(), name="made-up")


def bare(steps: Column, losses: Column, lr: Column | None = None, **more: Any) -> History:
    """What a CSV of another program gives: steps and losses, maybe rates."""
    columns = {"step": steps, "loss": losses} | ({} if lr is None else {"lr": lr})
    evals = more.pop("evals", Table({"step": np.empty(0)}))
    layer = Table({"step": np.empty(0)})
    return History("made-up", "csv", Table(columns), evals, layer, **more)
