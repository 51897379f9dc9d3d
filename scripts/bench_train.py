"""Times optimizer steps of gpt-train beside nanoGPT's and transformers', same shapes, in turns.

    python scripts/bench_train.py --nanogpt DIR [--work 124M 10.6M 0.8M] [--turns 5]

DIR is a checkout of nanoGPT (github.com/karpathy/nanoGPT); without it transformers is the peer. In
each turn every program has a process of its own, which takes some steps to warm up and then times
single steps on random ids: forward, backward, clip, update. `tokens/s` is that of the median step
of all turns, `best` of the fastest, which other work on the machine disturbs least; memory is the
most that a process ever held. `gpt-train` is what its default settings choose for a run of
--run-steps, `gpt-train lean` what they choose beside the two settings for little memory (LEAN);
nanoGPT is timed as documented for a CPU, and with torch.compile and (where the CPU multiplies bf16)
autocast turned on by hand. Quote ratios of one run on an idle machine.
"""

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

WARMUP = 2
GEMM_SIZE, GEMM_TIMES = 2048, 10


@dataclass(frozen=True)
class Work:
    """Shapes of one comparison, and how many steps a turn times."""

    layers: int
    width: int
    heads: int
    vocab: int
    context: int
    batch: int
    steps: int

    @property
    def tokens(self) -> int:
        return self.batch * self.context


WORKS = {
    "124M": Work(12, 768, 12, vocab=50_304, context=256, batch=4, steps=2),
    "10.6M": Work(6, 384, 6, vocab=65, context=256, batch=16, steps=5),
    "0.8M": Work(4, 128, 4, vocab=65, context=64, batch=12, steps=60),
}
# Adafactor keeps no average of each weight; what is inside a block is computed twice.
LEAN = {
    "optimizer.name": "adafactor",
    "optimizer.lr": 1e-2,
    "train.activation_checkpointing": "true",
}
Step = Callable[[], object]


def ours(work: Work, options: argparse.Namespace) -> tuple[Step, str]:
    """gpt-train's own step, with the gauge that it keeps; `mode` is lean, or what compile is."""
    import torch

    from gpt.build import assemble_without_text, choose
    from gpt.configfile import load_config
    from gpt.device import compile_blocks, set_threads
    from gpt.gauges import Gauge
    from gpt.malloc import keep_freed_memory
    from gpt.plan import Plan
    from gpt.schedule import build_scheduler
    from gpt.step import train_step

    lean = options.mode == "lean"
    values: dict[str, object] = {
        "model.preset": "gpt2-124m",
        "model.bias": "false",
        "model.activation": "gelu",
        "model.n_layer": work.layers,
        "model.n_head": work.heads,
        "model.n_embd": work.width,
        "model.context_len": work.context,
        "train.batch_size": work.batch,
        "train.device": "cpu",
        "train.compile": "auto" if lean else options.mode,
        "optimizer.lr": 6e-4,
        **(LEAN if lean else {}),
    }
    config = load_config(None, [(key, str(value)) for key, value in values.items()])
    set_threads()
    keep_freed_memory(not config.train.activation_checkpointing)
    choices = choose(config, work.vocab, options.run_steps)
    training = assemble_without_text(config, work.vocab, choices.device, choices.dtype)
    plan = Plan.from_config(config, options.run_steps)
    training.scheduler = build_scheduler(training.optimizer, plan)
    if choices.compile:
        compile_blocks(training.model.blocks)
    gauge = Gauge(training.model, training.optimizer)
    ids = torch.randint(work.vocab, (2, work.batch, work.context))

    def step() -> None:
        gauge.watch(full=False, first=False)
        train_step(training, ids[0], ids[1], gauge=gauge)

    how = "compiled" if choices.compile else "eager"
    return step, f"{str(choices.dtype).removeprefix('torch.')}, {how}"


def peer_step(model: Any, loss_of: Step, optimizer: Any) -> Step:
    """The step of a plain training loop, as nanoGPT's train.py takes it."""
    import torch

    def step() -> None:
        loss_of().backward()  # type: ignore[attr-defined]
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def nanogpt(work: Work, options: argparse.Namespace) -> tuple[Step, str]:
    sys.path.insert(0, str(options.nanogpt))
    import torch
    from model import GPT, GPTConfig  # type: ignore[import-not-found]

    from gpt.device import autocast, cpu_has_bf16

    by_hand = options.mode == "on"
    dtype = torch.bfloat16 if by_hand and cpu_has_bf16() else torch.float32
    shape = {"n_layer": work.layers, "n_head": work.heads, "n_embd": work.width}
    sizes = {"vocab_size": work.vocab, "block_size": work.context, "dropout": 0.0}
    model = GPT(GPTConfig(bias=False, **sizes, **shape))
    optimizer = model.configure_optimizers(0.1, 6e-4, (0.9, 0.95), "cpu")
    if by_hand:
        model = torch.compile(model)
    ids = torch.randint(work.vocab, (2, work.batch, work.context))

    def loss() -> object:
        with autocast(torch.device("cpu"), dtype):
            return model(ids[0], ids[1])[1]

    label = f"{str(dtype).removeprefix('torch.')}, {'compiled' if by_hand else 'eager'}"
    return peer_step(model, loss, optimizer), label


def transformers(work: Work, _: argparse.Namespace) -> tuple[Step, str]:
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    shape = {"n_layer": work.layers, "n_head": work.heads, "n_embd": work.width}
    sizes = {"vocab_size": work.vocab, "n_positions": work.context}
    dropout = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    ends = {"bos_token_id": 0, "eos_token_id": 0}
    model = GPT2LMHeadModel(GPT2Config(**shape, **sizes, **dropout, **ends)).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=6e-4, betas=(0.9, 0.95))
    ids = torch.randint(work.vocab, (work.batch, work.context))
    step = peer_step(model, lambda: model(input_ids=ids, labels=ids).loss, optimizer)
    return step, "float32, eager"


def gemm_rate() -> dict[str, object]:
    """GFLOP/s of one large square product, in the format that gpt-train would choose."""
    import torch

    from gpt.device import pick_dtype, set_threads

    set_threads()
    dtype, _ = pick_dtype("auto", torch.device("cpu"), 10**9)
    a, b = (torch.randn(GEMM_SIZE, GEMM_SIZE).to(dtype) for _ in range(2))
    seconds = timed(lambda: a @ b, GEMM_TIMES)[1]
    rate = 2 * GEMM_SIZE**3 / statistics.median(seconds) / 1e9
    return {"rate": rate, "dtype": str(dtype).removeprefix("torch.")}


def timed(step: Step, times: int) -> tuple[float, list[float]]:
    """Seconds of the first step, and of each after the warm-up."""
    seconds = []
    for _ in range(WARMUP + times):
        start = time.perf_counter()
        step()
        seconds.append(time.perf_counter() - start)
    return seconds[0], seconds[WARMUP:]


# Who is timed: the name in the table, the function, the mode.
PROGRAMS: dict[str, tuple[Callable[..., tuple[Step, str]], str]] = {
    "gpt-train": (ours, "auto"),
    "gpt-train eager": (ours, "off"),
    "gpt-train compiled": (ours, "on"),
    "gpt-train lean": (ours, "lean"),
    "nanoGPT": (nanogpt, "off"),
    "nanoGPT by hand": (nanogpt, "on"),
    "transformers": (transformers, "off"),
}


def work_off(options: argparse.Namespace) -> dict[str, object]:
    """What one process measures."""
    import torch

    from gpt.device import peak_memory_bytes

    if options.worker == "gemm":
        return gemm_rate()
    torch.manual_seed(1337)
    work = WORKS[options.work[0]]
    build, options.mode = PROGRAMS[options.worker]
    with contextlib.redirect_stdout(sys.stderr):
        step, label = build(work, options)
        first, seconds = timed(step, work.steps)
    peak = peak_memory_bytes(torch.device("cpu"))
    return {"label": label, "first": first, "seconds": seconds, "peak": peak}


def in_own_process(name: str, work: str) -> dict[str, Any]:
    """Starts this script for one measurement; what an earlier turn compiled is still kept."""
    command = [sys.executable, *sys.argv, "--worker", name, "--work", work]
    found = subprocess.run(command, check=False, capture_output=True, text=True)
    if found.returncode:
        sys.exit(f"{name}: {found.stderr[-2000:]}")
    answer: dict[str, Any] = json.loads(found.stdout.splitlines()[-1])
    return answer


def compare(name: str, options: argparse.Namespace) -> None:
    """Prints the table of one work."""
    work = WORKS[name]
    programs = [who for who in options.who if options.nanogpt or not who.startswith("nanoGPT")]
    found: dict[str, list[dict[str, Any]]] = {who: [] for who in programs}
    gemm = []
    for turn in range(options.turns):
        gemm.append(in_own_process("gemm", name))
        for who in programs:
            found[who].append(in_own_process(who, name))
            step = statistics.median(found[who][-1]["seconds"])
            print(f"turn {turn + 1}  {who:20} {step * 1e3:9.1f} ms/step", file=sys.stderr)
    rate = statistics.median(each["rate"] for each in gemm)
    print(
        f"\n{name}: {work.layers} layers, {work.width} wide, vocabulary {work.vocab:,}, "
        f"{work.batch} x {work.context} tokens a step, medians of {options.turns} turns; "
        f"GEMM {rate:.0f} GFLOP/s ({gemm[0]['dtype']})"
    )
    print("| who | how | tokens/s | x | best | x | GFLOP/s | of GEMM | peak MB | x | first step |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |")
    flops = flops_of_a_token(work)
    base: tuple[float, float, float] | None = None
    peers = [who for who in ("nanoGPT", "transformers") if who in programs]
    for who in sorted(programs, key=lambda who: who not in peers[:1]):
        turns = found[who]
        seconds = [s for each in turns for s in each["seconds"]]
        speed, best = work.tokens / statistics.median(seconds), work.tokens / min(seconds)
        peak = statistics.median(each["peak"] for each in turns) / 1e6
        first = statistics.median(each["first"] for each in turns)
        base = base or (speed, peak, best)
        rates = f"{speed * flops / 1e9:.0f} | {speed * flops / 1e9 / rate:.0%}"
        print(
            f"| {who} | {turns[0]['label']} | {speed:,.0f} | {speed / base[0]:.2f} | {best:,.0f} | "
            f"{best / base[2]:.2f} | {rates} | {peak:,.0f} | {peak / base[1]:.2f} | {first:.1f} s |"
        )


def flops_of_a_token(work: Work) -> int:
    """What training on a token takes, of everyone's GPT-2."""
    from gpt.config import ModelConfig
    from gpt.model import flops_per_token

    shape = {"n_layer": work.layers, "n_head": work.heads, "n_embd": work.width}
    return flops_per_token(ModelConfig(context_len=work.context, **shape), work.vocab)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--nanogpt", type=Path, metavar="DIR", help="a checkout of nanoGPT")
    parser.add_argument("--work", nargs="+", default=list(WORKS), choices=list(WORKS))
    parser.add_argument("--who", nargs="+", default=list(PROGRAMS), choices=list(PROGRAMS))
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--run-steps", type=int, default=2000, help="length that auto decides by")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        print(json.dumps(work_off(options)))
        return
    print(f"load {os.getloadavg()[0]:.1f}, {sys.version.split()[0]}", file=sys.stderr)
    for name in options.work:
        compare(name, options)


if __name__ == "__main__":
    main()
