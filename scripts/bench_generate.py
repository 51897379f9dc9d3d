"""Times generation at batch 1: ours, and side by side nanoGPT and transformers where they are.

    python scripts/bench_generate.py --sizes 6x6x384 12x12x768 --nanogpt ../nanoGPT

Random weights, sampling at temperature 0.8, a prompt of one token. Who is timed alternates from
round to round; the figures are medians. Run it on an idle machine and quote ratios of one run.
"""

import argparse
import importlib.util
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from gpt.config import ModelConfig
from gpt.device import DTYPES, set_threads
from gpt.generate import Sampling, complete
from gpt.model import GPT, count_parameters
from gpt.tokenizer import Tokenizer

# Ours is timed with either; the peers are GPT-2 always. Drawn weights, not zeros, in both.
PRESETS: dict[str, dict[str, Any]] = {
    "gpt2": {"preset": "gpt2-124m"},
    "default": {"init": "gpt2"},
}


def main() -> None:
    options = parse()
    set_threads(options.threads)
    threads, load = torch.get_num_threads(), os.getloadavg()[0]
    print(f"{threads} threads, load {load:.1f}, torch {torch.__version__}")
    print(f"{options.tokens} tokens, batch 1, median of {options.rounds} rounds\n")
    print("        size dtype  parameters                  who  ms/token   GB/s      x")
    for size in options.sizes:
        layers, heads, width = (int(number) for number in size.split("x"))
        shape = {"n_layer": layers, "n_head": heads, "n_embd": width}
        for name, preset in PRESETS.items():
            config = ModelConfig(context_len=options.context, **{**preset, **shape})
            for dtype in options.dtypes:
                print(f"our options: {name}")
                compare(size, config, dtype, options)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--sizes", nargs="+", default=["6x6x384"], help="layers x heads x width")
    parser.add_argument("--dtypes", nargs="+", default=["fp32"], choices=list(DTYPES))
    parser.add_argument("--tokens", type=int, default=100)
    parser.add_argument("--context", type=int, default=256)
    parser.add_argument("--vocab", type=int, default=65)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--nanogpt", type=Path, help="folder with nanoGPT's model.py")
    return parser.parse_args()


def compare(size: str, config: ModelConfig, dtype: str, options: argparse.Namespace) -> None:
    """Times everyone on one shape, a round each in turn."""
    torch.manual_seed(0)
    model = GPT(config, options.vocab).to(DTYPES[dtype]).eval()
    runners = {"gpt-infer": ours(model, options.tokens)}
    if options.nanogpt is not None:
        runners["nanoGPT"] = nanogpt(config, dtype, options)
    if importlib.util.find_spec("transformers"):
        runners["transformers"] = transformers(config, dtype, options)
    seconds: dict[str, list[float]] = {name: [] for name in runners}
    for turn in range(options.rounds + 1):  # the first warms up
        for name, run in runners.items():
            start = time.perf_counter()
            run()
            if turn:
                seconds[name].append(time.perf_counter() - start)
    size_bytes = count_parameters(model) * DTYPES[dtype].itemsize
    slowest = max(statistics.median(times) for times in seconds.values())
    for name, times in seconds.items():
        median = statistics.median(times)
        rate = options.tokens / median
        print(
            f"{size:>12} {dtype:>5} {count_parameters(model):>11,} {name:>20} {1000 / rate:>9.2f} "
            f"{rate * size_bytes / 1e9:>6.1f} {slowest / median:>6.2f}"
        )


def ours(model: GPT, tokens: int) -> Callable[[], object]:
    # A byte for each id, and an end token that is never drawn.
    words = [bytes([id_ % 128]) for id_ in range(model.vocab_size)]
    tokenizer = Tokenizer("bench", words, -1, lambda _: np.zeros(1, dtype=np.uint32), {})
    return lambda: complete(model, tokenizer, ["a"], Sampling(seed=0, max_tokens=tokens))


def nanogpt(config: ModelConfig, dtype: str, options: argparse.Namespace) -> Callable[[], object]:
    spec = importlib.util.spec_from_file_location("nanogpt", options.nanogpt / "model.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["nanogpt"] = module
    spec.loader.exec_module(module)
    shape = {"n_layer": config.n_layer, "n_head": config.n_head, "n_embd": config.n_embd}
    sizes = {"block_size": options.context, "vocab_size": options.vocab, "dropout": 0.0}
    model = module.GPT(module.GPTConfig(**shape, **sizes)).to(DTYPES[dtype]).eval()
    start = torch.zeros(1, 1, dtype=torch.long)

    @torch.no_grad()
    def run() -> None:
        model.generate(start, options.tokens, temperature=0.8)

    return run


def transformers(
    config: ModelConfig, dtype: str, options: argparse.Namespace
) -> Callable[[], object]:
    from transformers import GPT2Config, GPT2LMHeadModel

    model = GPT2LMHeadModel(
        GPT2Config(
            vocab_size=options.vocab,
            n_positions=options.context,
            n_embd=config.n_embd,
            n_layer=config.n_layer,
            n_head=config.n_head,
            bos_token_id=0,
            eos_token_id=0,
        )
    )
    model = model.to(DTYPES[dtype]).eval()
    start = torch.zeros(1, 1, dtype=torch.long)
    length = {"min_new_tokens": options.tokens, "max_new_tokens": options.tokens}
    drawing = {"do_sample": True, "temperature": 0.8, "top_k": 0, "pad_token_id": 0}

    @torch.no_grad()
    def run() -> None:
        model.generate(start, attention_mask=torch.ones_like(start), **length, **drawing)

    return run


if __name__ == "__main__":
    main()
