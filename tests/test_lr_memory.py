"""The memory estimate against what torch's allocator reports of a real step."""

import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from gpt.checkpoint import Training
from gpt.config import Config, TokenizerConfig
from gpt.configfile import load_config
from gpt.device import DTYPES, grad_scaler
from gpt.gauges import Gauge
from gpt.lr.memory import PROCESS_BYTES, LiveBytes, estimate_memory, optimizer_bytes
from gpt.model import GPT
from gpt.optim import build_optimizer
from gpt.plan import Plan
from gpt.schedule import build_scheduler
from gpt.step import train_step
from gpt.tokenizer import build_tokenizer

ROOT = Path(__file__).parents[1]
VOCAB = 300
CPU = torch.device("cpu")
GPT2 = {
    "model.position": "learned",
    "model.norm": "layernorm",
    "model.activation": "gelu_tanh",
    "model.bias": "true",
    "model.tie_embeddings": "true",
    "model.qk_norm": "false",
}
LLAMA = {"model.activation": "swiglu", "model.qk_norm": "false", "model.n_kv_head": "2"}
SMALL_BATCH = {"train.batch_size": "1", "model.context_len": "16"}


def config_with(changes: dict[str, str]) -> Config:
    base = {
        "model.n_layer": "2",
        "model.n_head": "4",
        "model.n_embd": "64",
        "model.context_len": "64",
        "train.batch_size": "8",
        "train.dtype": "fp32",
    }
    return load_config(None, list((base | changes).items()))


def training_of(config: Config) -> tuple[Training, Gauge]:
    torch.manual_seed(1)
    model = GPT(config.model, VOCAB)
    model.recompute = config.train.activation_checkpointing
    optimizer = build_optimizer(model, config.optimizer, device=CPU)
    dtype = DTYPES[config.train.dtype]
    training = Training(
        config=config,
        tokenizer=build_tokenizer(TokenizerConfig(kind="bytes"), tuple),
        model=model,
        optimizer=optimizer,
        scheduler=build_scheduler(optimizer, Plan.from_config(config, 100)),
        scaler=grad_scaler(CPU, dtype),
        dtype=dtype,
        data_fingerprint="",
    )
    return training, Gauge(model, optimizer)


def real_peak(config: Config) -> int:
    """Bytes at the highest moment of a second step, from the allocator's own events."""
    training, gauge = training_of(config)
    model, optimizer = training.model, training.optimizer
    shape = (config.train.batch_size, config.model.context_len)

    def step() -> None:
        rows = torch.randint(VOCAB, shape)
        gauge.watch(full=True, first=True)
        train_step(training, rows, rows.clone(), gauge=gauge)

    step()
    gauge.forget()  # what it keeps for the next step would be freed within the profile
    model.zero_grad(set_to_none=True)
    state = [
        t for values in optimizer.state.values() for t in values.values() if torch.is_tensor(t)
    ]
    resting = [*model.parameters(), *model.buffers(), *state]
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        step()
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    assert events
    live = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    return peak + sum(tensor.numel() * tensor.element_size() for tensor in resting)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        GPT2,
        GPT2 | {"model.dropout": "0.1"},
        LLAMA,
        LLAMA | {"train.dtype": "bf16", "model.dropout": "0.1"},
        GPT2 | {"train.dtype": "bf16"},
        {"train.micro_batch_size": "2"},
        {"train.micro_batch_size": "3"},
        SMALL_BATCH,
        SMALL_BATCH | {"optimizer.name": "sgd", "optimizer.lr": "0.1"},
        SMALL_BATCH | {"optimizer.name": "muon"},
        SMALL_BATCH | {"optimizer.name": "adafactor"},
        SMALL_BATCH | {"optimizer.name": "adafactor", "model.ngram": "2"},
        {"model.mup_base_width": "32"},
        GPT2 | {"train.activation_checkpointing": "true", "model.dropout": "0.1"},
    ],
    ids=lambda changes: ",".join(f"{k.partition('.')[2]}={v}" for k, v in changes.items()),
)
def test_within_five_percent_of_the_allocator(changes):
    config = config_with(changes)
    estimate = estimate_memory(config, VOCAB, DTYPES[config.train.dtype])
    assert estimate.total == pytest.approx(real_peak(config), rel=0.05)


@pytest.mark.parametrize("name", ["sgd", "adam", "adamw", "muon", "adafactor"])
@pytest.mark.parametrize("momentum", ["0.9", "0"])
def test_optimizer_state_is_counted(name, momentum):
    config = config_with({"optimizer.name": name, "optimizer.momentum": momentum})
    model = GPT(config.model, VOCAB)
    optimizer = build_optimizer(model, config.optimizer, device=CPU)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    held = sum(
        value.numel() * value.element_size()
        for values in optimizer.state.values()
        for value in values.values()
        if torch.is_tensor(value) and value.numel() > 1  # not the step counters
    )
    assert optimizer_bytes(model, config) == held


def test_weights_and_gradients():
    config = config_with({"model.tie_embeddings": "true"})
    model = GPT(config.model, VOCAB)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    estimate = estimate_memory(config, VOCAB, torch.float32)
    assert estimate.gradients == 4 * parameters
    assert estimate.weights == 4 * (parameters + sum(b.numel() for b in model.buffers()))


@pytest.mark.parametrize("tokens", ["1", "2"])
def test_a_single_token_has_a_memory(tokens):
    changes = {"model.tie_embeddings": "true", "model.context_len": tokens}
    config = config_with(changes | {"train.batch_size": "2", "train.micro_batch_size": "1"})
    assert estimate_memory(config, VOCAB, torch.float32).activations > 0


@pytest.mark.parametrize("vocab_size", [257, 50_257])
def test_a_batch_of_millions_is_estimated_at_once(vocab_size):
    """In bf16 its attention, and with a large vocabulary its loss, come in thousands of parts."""
    config = config_with({"train.batch_size": "3_000_000"})
    started = time.process_time()
    estimate = estimate_memory(config, vocab_size, torch.bfloat16)
    assert time.process_time() - started < 5
    assert estimate.activations > 3_000_000 * config.model.context_len * config.model.n_embd


def test_smaller_micro_batches_hold_less():
    whole, parts = (
        estimate_memory(config_with(changes), VOCAB, torch.float32)
        for changes in ({}, {"train.micro_batch_size": "2"})
    )
    assert parts.activations < 0.5 * whole.activations
    assert parts.weights == whole.weights


def test_checkpointed_activations_are_few_and_a_large_vocabulary_is_never_there_at_once():
    """Per layer one stream instead of all that is inside; 8,192 tokens x 60,000 ids is 1.97 GB."""
    shape = {"model.n_layer": "12", "train.batch_size": "32", "model.context_len": "256"}
    kept, recomputed = (
        estimate_memory(config_with(shape | more), VOCAB, torch.float32)
        for more in ({}, {"train.activation_checkpointing": "true"})
    )
    assert recomputed.activations < 0.3 * kept.activations
    large = estimate_memory(config_with(shape), 60_000, torch.float32)
    assert large.activations < kept.activations + large.gradients + 0.2e9


def test_nothing_is_allocated_for_a_large_model():
    """15 GB of weights, and as much for each of gradients and averages."""
    config = config_with(
        {"model.preset": "llama-1.1b", "model.n_layer": "2", "model.n_embd": "16384"}
    )
    estimate = estimate_memory(config, 32_000, torch.bfloat16)
    assert estimate.weights > 15e9
    assert estimate.optimizer == 2 * estimate.gradients


def test_live_bytes_follows_births_and_ends():
    kept = torch.zeros(10)
    with LiveBytes() as live:
        live.ignore([kept])
        first = torch.zeros(1000)
        view = first[10:]
        second = first + 1
        assert live.live == live.peak == 8000
        del first
        assert live.live == 8000  # the view still holds it
        del view
        assert live.live == 4000
        del second
        kept.add_(1)
    assert (live.live, live.peak) == (0, 8000)


TRAINS = """
import json, sys, torch
from pathlib import Path
from gpt.device import peak_memory_bytes
from gpt.malloc import keep_freed_memory
from tests.test_lr_memory import SIZED, VOCAB, train_steps
keep_freed_memory()
train_steps(SIZED, 3)
print(peak_memory_bytes(torch.device("cpu")))
"""
SIZED = {"model.n_embd": "256", "model.context_len": "128", "train.batch_size": "32"}


def train_steps(changes: dict[str, str], steps: int) -> None:
    config = config_with(changes)
    training, gauge = training_of(config)
    for _ in range(steps):
        rows = torch.randint(VOCAB, (config.train.batch_size, config.model.context_len))
        train_step(training, rows, rows.clone(), gauge=gauge)


@pytest.mark.skipif(sys.platform != "linux", reason="measured with glibc")
def test_the_process_is_as_large_as_said():
    found = subprocess.run(
        [sys.executable, "-c", TRAINS], capture_output=True, text=True, cwd=ROOT, check=True
    )
    estimate = estimate_memory(config_with(SIZED), VOCAB, torch.float32)
    assert estimate.process - estimate.total == PROCESS_BYTES
    assert int(found.stdout) == pytest.approx(estimate.process, rel=0.25)
