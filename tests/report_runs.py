"""Made-up runs for the report's tests: every signal that a log can hold, and a run directory."""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from gpt.config import Config
from gpt.configfile import dump_config, load_config
from gpt.health.finding import Finding
from gpt.history import History, history_of

PARTS = ("attn.wq", "attn.wk", "attn.wv", "attn.wo", "mlp.up", "mlp.down")
FINDINGS = [
    Finding(
        "spike",
        first_step=1200,
        evidence="the loss rose by 2.2 nats within 10 steps, 36 times its usual scatter",
        cause="a batch far from the rest met a rate that was too high for it",
        next="gpt-train --config runs/demo/config.yaml --optimizer.lr 1.5e-3 "
        "--optimizer.betas '[0.9, 0.95]' --run.name demo-lower-lr",
        last_step=1260,
        numbers={"rise": 2.2, "worst": math.inf},
    ),
    Finding(
        "overfitting",
        first_step=1600,
        evidence="validation loss rose from 2.68 to 2.75 while training loss fell",
        cause="the model has seen the text 4 times",
        next="gpt-train --config runs/demo/config.yaml --model.dropout 0.1 --run.name demo-dropout",
    ),
    Finding(
        "throughput",
        first_step=1610,
        evidence="44,000 tokens/s where 74,000 are usual",
        cause="another program took the processor",
        next="top",
    ),
]


def records(
    steps: int = 2000, every: int = 10, blocks: int = 2, seed: int = 0, shift: float = 0.0
) -> list[dict[str, Any]]:
    """The lines of a run's log; `shift` is added to every loss."""
    rng = np.random.default_rng(seed)
    names = ["embed.weight", "head.weight"]
    names += [f"blocks.{block}.{part}.weight" for block in range(blocks) for part in PARTS]
    lines: list[dict[str, Any]] = [
        event(0, "run", total_steps=steps, vocab_size=4096, device="cpu", torch="2.13.0"),
        event(0, "data_check", unigram_entropy=6.2, duplicate_share=0.01, leak_share=0.0),
    ]
    for step in [1, *range(every, steps + 1, every)]:
        factor = min(1, step / 100) * (0.55 + 0.45 * math.cos(math.pi * step / steps))
        typical = shift + 2.4 + 5.9 * math.exp(-step / 180)
        lines.append(train_line(step, typical, factor, rng))
        if step % (steps // 20) == 0:
            lines.append(layers_line(step, names, blocks, rng))
        if step % (steps // 10) == 0:
            loss = typical + 0.1
            lines.append(
                {"kind": "eval", "step": step, "val_loss": loss, "val_bpb": loss / 2.4}
                | {"train_loss": typical, "val_tokens": 204_800}
            )
            lines.append(event(step, "sample", prompt="def ", text=f"f{step}(x):\n    return x\n"))
    lines.append(event(steps, "end"))
    return lines


def train_line(
    step: int, typical: float, factor: float, rng: np.random.Generator
) -> dict[str, Any]:
    norm = 0.5 + abs(rng.normal(0, 0.3))
    return {
        "kind": "train",
        "step": step,
        "tokens": step * 8192,
        "epoch": step * 8192 / 3e6,
        "loss": typical + rng.normal(0, 0.06),
        "lr": 3e-3 * factor,
        "lrs": {"matrices": 3e-3 * factor, "vectors": 1e-3 * factor},
        "grad_norm": norm,
        "grad_norm_max": 1.4 * norm,
        "clipped": norm > 1,
        "clipped_share": float(norm > 1),
        "update_ratio": 1e-2 * factor,
        "adam_rms": 0.8 + 0.1 * rng.normal(),
        "slope_before": -0.02 * factor,
        "slope_after": -0.004 * factor + 0.003 * rng.normal(),
        "noise_scale": 20_000 + 30 * step,
        "tokens_per_s": 74_000 + 3000 * rng.normal(),
        "time_s": 0.11 * step,
        "memory_bytes": 1_200_000_000,
        "cpu_share": 0.9,
        "others_share": 0.01,
    }


def layers_line(
    step: int, names: Sequence[str], blocks: int, rng: np.random.Generator
) -> dict[str, Any]:
    return {
        "kind": "layers",
        "step": step,
        "update_ratio": {name: 1e-2 * math.exp(0.4 * rng.normal()) for name in names},
        "grad_norm": {name: 0.1 * math.exp(0.4 * rng.normal()) for name in names},
        "rms": {f"blocks.{block}": 1.0 + block for block in range(blocks)},
        "attn_logit_max": {f"blocks.{block}": 4.0 + step / 300 for block in range(blocks)},
        "dead_share": {f"blocks.{block}": 0.02 * block for block in range(blocks)},
    }


def event(step: int, name: str, **values: object) -> dict[str, Any]:
    return {"kind": "event", "step": step, "event": name, **values}


def config_of(name: str = "demo", **changes: str) -> Config:
    values = {"run.name": name, "train.max_steps": "2000", "tokenizer.kind": "bytes"}
    values |= {key.replace("__", "."): value for key, value in changes.items()}
    return load_config(None, list(values.items()))


def demo(name: str = "demo", **changes: Any) -> History:
    """A history with every signal."""
    return history_of(records(**changes), config_of(), name=name)


def write_run(run: Path, lines: Sequence[dict[str, Any]], config: Config | None = None) -> Path:
    """A run directory with these lines in its log."""
    run.mkdir(parents=True, exist_ok=True)
    text = dump_config(config or config_of(run.name))
    (run / "config.yaml").write_text(text, encoding="utf-8")
    log = "".join(json.dumps(line) + "\n" for line in lines)
    (run / "metrics.jsonl").write_text(log, encoding="utf-8")
    return run
