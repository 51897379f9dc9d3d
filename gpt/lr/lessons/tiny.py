"""The tiny GPT of the lessons: real text, real model, real steps, a second or two a run.

The text is a part of the interpreter's own library, read into memory. Nothing is written anywhere.
"""

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from gpt.batches import Batches, eval_batches
from gpt.checkpoint import Training
from gpt.config import (
    Config,
    DataConfig,
    ModelConfig,
    OptimizerConfig,
    RunConfig,
    ScheduleConfig,
    TokenizerConfig,
    TrainConfig,
)
from gpt.device import grad_scaler
from gpt.model import GPT
from gpt.optim import build_optimizer
from gpt.schedule import Plan, build_scheduler
from gpt.shards import Split
from gpt.sources import documents
from gpt.step import NonFiniteError, cross_entropy_sum, train_step
from gpt.tokenizer import Tokenizer, build_tokenizer

CPU = torch.device("cpu")
TEXT_BYTES = 400_000
LONGEST_FILE_BYTES = 30_000  # so that both sides hold many files
VAL_TOKENS = 8192
# GPT-2's design, with an output layer of its own, as the chapter counts it.
GPT2_STYLE = ModelConfig(
    n_layer=2,
    n_head=2,
    n_embd=32,
    context_len=32,
    position="learned",
    norm="layernorm",
    activation="gelu_tanh",
    bias=True,
    tie_embeddings=False,
    qk_norm=False,
    init="gpt2",
)
CONSTANT = ScheduleConfig(name="constant", warmup_steps=0, warmup_fraction=None)


@dataclass(frozen=True)
class Text:
    """Bytes as tokens: what to train on, and what to validate on."""

    train: Split
    val: Split
    tokenizer: Tokenizer


@dataclass(frozen=True)
class Run:
    """One training run: the loss of each step before its update, and the validation loss after.

    A run whose numbers broke has fewer losses, and an infinite validation loss.
    """

    losses: tuple[float, ...]
    val_loss: float


@functools.cache
def open_text() -> Text:
    """The first files of Python's library, long ones left out; each eighth is for validation."""
    tokenizer = build_tokenizer(TokenizerConfig(kind="bytes"), tuple)
    end = np.array([tokenizer.eot_id], dtype=np.uint32)
    sides: tuple[list[np.ndarray], list[np.ndarray]] = ([], [])
    number = size = 0
    for document in documents(DataConfig()):
        ids = tokenizer.encode("".join(document.pieces()))
        if len(ids) > LONGEST_FILE_BYTES:
            continue
        number += 1
        sides[number % 8 == 0].extend((ids, end))
        size += len(ids)
        if size >= TEXT_BYTES:
            break
    train, val = (_split(side) for side in sides)
    return Text(train, val, tokenizer)


def _split(parts: list[np.ndarray]) -> Split:
    ids = np.concatenate(parts).astype(np.uint16)
    n_documents = len(parts) // 2
    ends = np.array([len(ids)], dtype=np.int64)
    return Split(len(ids), len(ids) - n_documents, n_documents, [ids], ends)


def tiny_config(
    optimizer: OptimizerConfig,
    n_steps: int,
    *,
    batch_size: int = 16,
    schedule: ScheduleConfig = CONSTANT,
    model: ModelConfig = GPT2_STYLE,
    seed: int = 1337,
) -> Config:
    """The config of one run: fp32, no clipping, so that nothing but the rate holds it together."""
    return Config(
        run=RunConfig(seed=seed),
        tokenizer=TokenizerConfig(kind="bytes"),
        model=model,
        optimizer=optimizer,
        schedule=schedule,
        train=TrainConfig.model_validate(
            {
                "max_steps": n_steps,
                "batch_size": batch_size,
                "grad_clip": None,
                "device": "cpu",
                "dtype": "fp32",
            }
        ),
    )


def build_tiny(config: Config) -> Training:
    """Model, optimizer and schedule at step 0; the global random state stays as it was."""
    text = open_text()
    assert config.train.max_steps is not None
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.run.seed)
        model = GPT(config.model, text.tokenizer.vocab_size)
    optimizer = build_optimizer(model, config.optimizer, device=CPU)
    return Training(
        config=config,
        tokenizer=text.tokenizer,
        model=model,
        optimizer=optimizer,
        scheduler=build_scheduler(optimizer, Plan.from_config(config, config.train.max_steps)),
        scaler=grad_scaler(CPU, torch.float32),
        dtype=torch.float32,
        data_fingerprint="lessons",
    )


def train_tiny(training: Training, after_step: Callable[[int], None] | None = None) -> Run:
    """Trains to the end of the schedule; `after_step` is told how many steps are done."""
    config = training.config
    assert config.train.max_steps is not None
    batches = Batches(
        open_text().train, config.model.context_len, config.train.batch_size, config.run.seed
    )
    losses = []
    for step in range(config.train.max_steps):
        try:
            losses.append(train_step(training, *batches.batch(step)).loss)
        except NonFiniteError:
            return Run(tuple(losses), math.inf)
        if after_step is not None:
            after_step(step + 1)
    val_loss = loss_on(training.model, *val_batch(config.model.context_len))
    return Run(tuple(losses), val_loss if math.isfinite(val_loss) else math.inf)


def run_tiny(config: Config) -> Run:
    """Builds and trains."""
    return train_tiny(build_tiny(config))


def val_batch(context_len: int, tokens: int = VAL_TOKENS) -> tuple[Tensor, Tensor]:
    """The same windows of the validation text each time: ids and targets, each (B, T)."""
    batches = eval_batches(open_text().val, context_len, tokens // context_len, tokens)
    return next(iter(batches))


@torch.no_grad()
def loss_on(model: GPT, inputs: Tensor, targets: Tensor) -> float:
    """Mean loss in nats per token over one batch."""
    model.eval()
    return float(cross_entropy_sum(model(inputs), targets)) / targets.numel()
