"""Times generation beside transformers, nanoGPT and llama.cpp, whichever are there.

    python scripts/bench_generate.py [--work decode small prefill batch] [--rounds N]
        [--nanogpt FOLDER] [--gguf DTYPE=FILE ...]

Random weights in each one's own layout, greedy, peers in turns, medians of one run. `--make-gguf
FILE --gguf-type f32|bf16|f16|q8_0` writes GPT-2 124M with such weights for llama.cpp (it needs the
package `gguf`); llama.cpp is timed through `llama_cpp` (the package `llama-cpp-python`), with
`--gguf fp32=FILE bf16=FILE int8=FILE`. Run it on an idle machine, and quote ratios of one run.
"""

import argparse
import importlib.util
import os
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from gpt import pages
from gpt.config import ModelConfig
from gpt.decode import Decoder, KVCache
from gpt.device import set_threads
from gpt.generate import Sampling, complete
from gpt.malloc import keep_freed_memory
from gpt.model import GPT
from gpt.quantize import pack
from gpt.tokenizer import Tokenizer

Run = Callable[[], object]
TYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "int8": torch.int8}
LARGE: dict[str, Any] = {"preset": "gpt2-124m"}
SMALL: dict[str, Any] = {"n_layer": 6, "n_head": 6, "n_embd": 384, "context_len": 256}
# 32 prompts of 8 to 128 tokens, in an order of no meaning.
LENGTHS = [8 + 37 * row % 121 for row in range(32)]
PREFILL = 512


def main() -> None:
    options = parse()
    if options.make_gguf is not None:
        make_gguf(options.make_gguf, options.gguf_type)
        return
    set_threads(options.threads)
    keep_freed_memory()
    threads, load = torch.get_num_threads(), os.getloadavg()[0]
    print(f"{threads} threads, load {load:.1f}, torch {torch.__version__}")
    print(f"median of {options.rounds} rounds, after one to warm up; x: times the slowest\n")
    print(f"{'work':>22} {'weights':>7} {'who':>14}  tokens/s      x", flush=True)
    for name in options.work:
        {"decode": decode, "small": small, "prefill": prefill, "batch": batch}[name](options)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    works = ["decode", "small", "prefill", "batch"]
    parser.add_argument("--work", nargs="+", default=works, choices=works)
    parser.add_argument("--dtypes", nargs="+", default=list(TYPES), choices=list(TYPES))
    parser.add_argument("--tokens", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--nanogpt", type=Path, help="folder with nanoGPT's model.py")
    parser.add_argument("--gguf", nargs="+", default=[], metavar="DTYPE=FILE")
    parser.add_argument("--make-gguf", type=Path, metavar="FILE")
    parser.add_argument("--gguf-type", default="f32", choices=["f32", "bf16", "f16", "q8_0"])
    options = parser.parse_args()
    options.gguf = dict(one.split("=", 1) for one in options.gguf)
    return options


def decode(options: argparse.Namespace) -> None:
    """GPT-2 124M, one row, from a prompt of one token."""
    sizes = {"vocab_size": 50257, "block_size": 1024}
    for dtype in options.dtypes:
        runners = {"gpt-infer": ours(LARGE, 50257, dtype, options.tokens)}
        if dtype != "int8":
            runners["transformers"] = transformers(LARGE, sizes, dtype, options.tokens)
        if options.nanogpt is not None and dtype == "fp32":
            runners["nanoGPT"] = nanogpt(LARGE, sizes, options)
        if dtype in options.gguf:
            runners["llama.cpp"] = llama(options.gguf[dtype]).decode(options.tokens)
        compare("decode 124M", dtype, runners, options.tokens, options.rounds)


def small(options: argparse.Namespace) -> None:
    """10.6M parameters, one row: both ways to shape such a model, with our defaults and GPT-2's."""
    sizes = {"vocab_size": 65, "block_size": 256}
    for dtype in options.dtypes:
        runners = {
            "gpt-infer": ours({**SMALL, "init": "gpt2"}, 65, dtype, options.tokens),
            "same as GPT-2": ours({**LARGE, **SMALL}, 65, dtype, options.tokens),
        }
        if dtype != "int8":
            runners["transformers"] = transformers(SMALL, sizes, dtype, options.tokens)
        compare("decode 10.6M", dtype, runners, options.tokens, options.rounds)


def prefill(options: argparse.Namespace) -> None:
    """From 512 tokens of a prompt to the logits of the next, GPT-2 124M."""
    ids = [37 * place % 50000 for place in range(PREFILL)]
    for dtype in options.dtypes:
        decoder = Decoder(built(LARGE, 50257, dtype))

        @torch.inference_mode()
        def run(decoder: Decoder = decoder) -> None:
            cache = KVCache(decoder.model, 1, PREFILL)
            cache.fill(decoder.model, 0, ids[:-1])
            decoder.next_logits([ids[-1]], cache)

        runners: dict[str, Run] = {"gpt-infer": run}
        if dtype in options.gguf:
            runners["llama.cpp"] = llama(options.gguf[dtype]).prefill(ids)
        compare(f"prefill of {PREFILL}, 124M", dtype, runners, PREFILL, options.rounds)


def batch(options: argparse.Namespace) -> None:
    """32 prompts of mixed lengths, 124M, the same number of new tokens each."""
    prompts = [" ".join(str(37 * place % 50000) for place in range(n)) for n in LENGTHS]
    rounds, tokens = min(options.rounds, 3), options.tokens
    sampling = Sampling(temperature=0, max_tokens=tokens)
    for dtype in options.dtypes:
        decoder = Decoder(built(LARGE, 50257, dtype))
        runners: dict[str, Run] = {}
        runners["gpt-infer"] = partial(complete, decoder, numbers(50257), prompts, sampling)
        if dtype != "int8":
            runners["transformers"] = transformers_batch(dtype, tokens)
        compare("32 prompts, 124M", dtype, runners, tokens * len(LENGTHS), rounds)


def compare(work: str, dtype: str, runners: dict[str, Run], tokens: int, rounds: int) -> None:
    """Times everyone, a round each in turn."""
    seconds: dict[str, list[float]] = {name: [] for name in runners}
    for turn in range(rounds + 1):
        for name, run in runners.items():
            start = time.perf_counter()
            run()
            if turn:
                seconds[name].append(time.perf_counter() - start)
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    slowest = max(medians.values())
    for name, median in medians.items():
        rate = tokens / median
        print(f"{work:>22} {dtype:>7} {name:>14} {rate:>9.1f} {slowest / median:>6.2f}", flush=True)


def built(shape: dict[str, Any], vocab_size: int, dtype: str) -> GPT:
    """A model with random weights, as `gpt-infer` prepares it."""
    torch.manual_seed(0)
    model = GPT(ModelConfig(**shape), vocab_size).eval()
    pages.move(model.parameters())
    return model if dtype == "fp32" else pack(model, TYPES[dtype])


def numbers(vocab_size: int) -> Tokenizer:
    """A tokenizer for texts of ids in digits, whose end token is never drawn."""
    words = [bytes([id_ % 128]) for id_ in range(vocab_size)]

    def encode(text: str) -> np.ndarray[Any, np.dtype[np.uint32]]:
        return np.array([int(word) for word in text.split()], dtype=np.uint32)

    return Tokenizer("bench", words, -1, encode, {})


def ours(shape: dict[str, Any], vocab_size: int, dtype: str, tokens: int) -> Run:
    decoder, tokenizer = Decoder(built(shape, vocab_size, dtype)), numbers(vocab_size)
    sampling = Sampling(temperature=0, max_tokens=tokens)
    return lambda: complete(decoder, tokenizer, ["5"], sampling)


def nanogpt(shape: dict[str, Any], sizes: dict[str, int], options: argparse.Namespace) -> Run:
    spec = importlib.util.spec_from_file_location("nanogpt", options.nanogpt / "model.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["nanogpt"] = module
    spec.loader.exec_module(module)
    config = ModelConfig(**shape)
    layers = {"n_layer": config.n_layer, "n_head": config.n_head, "n_embd": config.n_embd}
    model = module.GPT(module.GPTConfig(**layers, **sizes, dropout=0.0)).eval()
    start = torch.zeros(1, 1, dtype=torch.long)

    @torch.no_grad()
    def run() -> None:
        model.generate(start, options.tokens, top_k=1)

    return run


def hugging_face(shape: dict[str, Any], sizes: dict[str, int], dtype: str) -> Any:
    from transformers import GPT2Config, GPT2LMHeadModel

    config = ModelConfig(**shape)
    layers = {"n_layer": config.n_layer, "n_head": config.n_head, "n_embd": config.n_embd}
    size = {"vocab_size": sizes["vocab_size"], "n_positions": sizes["block_size"]}
    model = GPT2LMHeadModel(GPT2Config(**layers, **size, bos_token_id=0, eos_token_id=0))
    return model.to(TYPES[dtype]).eval()


def transformers(shape: dict[str, Any], sizes: dict[str, int], dtype: str, tokens: int) -> Run:
    model = hugging_face(shape, sizes, dtype)
    start = torch.zeros(1, 1, dtype=torch.long)
    length = {"min_new_tokens": tokens, "max_new_tokens": tokens, "pad_token_id": 0}

    @torch.no_grad()
    def run() -> None:
        model.generate(start, attention_mask=torch.ones_like(start), do_sample=False, **length)

    return run


def transformers_batch(dtype: str, tokens: int) -> Run:
    """The same prompts in one batch, padded on the left as its manual says."""
    model = hugging_face(LARGE, {"vocab_size": 50257, "block_size": 1024}, dtype)
    ids = torch.zeros(len(LENGTHS), max(LENGTHS), dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, n in enumerate(LENGTHS):
        ids[row, -n:], mask[row, -n:] = 37 * torch.arange(n) % 50000, 1
    length = {"min_new_tokens": tokens, "max_new_tokens": tokens, "pad_token_id": 0}

    @torch.no_grad()
    def run() -> None:
        model.generate(ids, attention_mask=mask, do_sample=False, **length)

    return run


class llama:  # noqa: N801 (llama.cpp's own name)
    """llama.cpp on a GGUF file, with as many threads as ours."""

    def __init__(self, file: str) -> None:
        from llama_cpp import Llama

        threads = {"n_threads": torch.get_num_threads(), "n_threads_batch": torch.get_num_threads()}
        size = {"n_ctx": 1024, "n_batch": PREFILL, "n_ubatch": PREFILL}
        self.model = Llama(file, **size, **threads, verbose=False)

    def decode(self, tokens: int) -> Run:
        def run() -> None:
            self.model.reset()
            token = 5
            for _ in range(tokens):
                self.model.eval([token])
                token = int(self.logits().argmax())

        return run

    def prefill(self, ids: list[int]) -> Run:
        def run() -> None:
            self.model.reset()
            self.model.eval([id_ % 256 for id_ in ids])

        return run

    def logits(self) -> Any:
        vocab_size = self.model.n_vocab()
        return np.ctypeslib.as_array(self.model._ctx.get_logits(), shape=(vocab_size,))


def describe(file: Any, config: ModelConfig, vocab_size: int) -> None:
    """Writes the shape, and a tokenizer that llama.cpp accepts and nobody uses."""
    file.add_context_length(config.context_len)
    file.add_embedding_length(config.n_embd)
    file.add_feed_forward_length(4 * config.n_embd)
    file.add_block_count(config.n_layer)
    file.add_head_count(config.n_head)
    file.add_layer_norm_eps(1e-5)
    file.add_tokenizer_model("gpt2")
    file.add_tokenizer_pre("gpt-2")
    file.add_token_list([f"[{number}]" for number in range(vocab_size)])
    file.add_token_types([1] * vocab_size)
    file.add_token_merges(["a b"])
    file.add_bos_token_id(vocab_size - 1)
    file.add_eos_token_id(vocab_size - 1)


def make_gguf(path: Path, kind: str) -> None:
    """GPT-2 124M with random weights, in llama.cpp's own format and tensor names."""
    import gguf

    form = gguf.GGMLQuantizationType[kind.upper()]
    config, vocab_size, draw = ModelConfig(**LARGE), 50257, np.random.default_rng(0)
    width = config.n_embd
    file = gguf.GGUFWriter(path, "gpt2")
    describe(file, config, vocab_size)

    def add(name: str, *shape: int, plain: bool = False) -> None:
        values = (draw.standard_normal(shape) * 0.02).astype(np.float32)
        if len(shape) == 1:
            values[:] = name.endswith("weight")
        if plain or len(shape) == 1 or kind == "f32":
            file.add_tensor(name, values)
        else:
            file.add_tensor(name, gguf.quants.quantize(values, form), raw_dtype=form)

    add("token_embd.weight", vocab_size, width)
    add("position_embd.weight", config.context_len, width, plain=True)
    layers = {"attn_qkv": (3 * width, width), "attn_output": (width, width)}
    layers |= {"ffn_up": (4 * width, width), "ffn_down": (width, 4 * width)}
    norms = ["output_norm"]
    for block in range(config.n_layer):
        norms += [f"blk.{block}.attn_norm", f"blk.{block}.ffn_norm"]
        for name, shape in layers.items():
            add(f"blk.{block}.{name}.weight", *shape)
            add(f"blk.{block}.{name}.bias", shape[0])
    for name in norms:
        add(f"{name}.weight", width)
        add(f"{name}.bias", width)
    file.write_header_to_file()
    file.write_kv_data_to_file()
    file.write_tensors_to_file()
    file.close()
    print(f"{path}: {path.stat().st_size / 1e6:,.0f} MB")


if __name__ == "__main__":
    main()
