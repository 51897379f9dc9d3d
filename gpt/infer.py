"""Inference, from top to bottom: checkpoint, prompt, tokens, text.

    prompt --tokenizer--> ids --model--> logits --sampling--> next id --tokenizer--> text
                           ^                                     |
                           +-------------------------------------+

This page opens the checkpoint and shows what comes out; the loop itself is `generate`.
"""

import io
import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from gpt import pages
from gpt.checkpoint import load_for_inference
from gpt.decode import Decoder
from gpt.device import DTYPES, pick_device, pick_dtype, set_threads
from gpt.errors import UserError, json_line, say, say_errors, shown
from gpt.fits import memory_for_inference
from gpt.generate import Piece, Sampling, generate
from gpt.heldout import held_out
from gpt.malloc import keep_freed_memory
from gpt.model import GPT, count_parameters
from gpt.quantize import cost_of, halves_pay, linear_bytes, pack
from gpt.rundir import find_checkpoint
from gpt.tokenizer import Tokenizer, clean_text


@dataclass(frozen=True)
class Request:
    """What `gpt-infer` was asked for."""

    prompts: list[str] | None
    """Texts to continue; None: ask for them one by one."""
    sampling: Sampling
    samples: int = 1
    run: Path | None = None
    checkpoint: Path | None = None
    device: str = "auto"
    dtype: str = "auto"
    quantize: str | None = None
    as_json: bool = False
    stats: bool = False


def infer(request: Request) -> None:
    """Loads the checkpoint and continues the prompts on stdout. Raises UserError."""
    device = pick_device(request.device, "--device")
    check_quantize(request, device)
    set_threads()
    folder = find_checkpoint(request.run, request.checkpoint)
    with memory_for_inference(folder, device):
        model, tokenizer = load_for_inference(folder, device)
        if device.type == "cpu":
            keep_freed_memory()
        if request.quantize is None:
            model = in_dtype(model, request.dtype, device)
        else:
            model = quantized(model, tokenizer, folder, request.prompts or [])
        decoder = Decoder(model)
        if request.prompts is None:
            interact(decoder, tokenizer, request)
        else:
            answer(decoder, tokenizer, request, request.prompts)


def check_quantize(request: Request, device: torch.device) -> None:
    """Refuses what quantized weights cannot be combined with."""
    if request.quantize is None:
        return
    if request.quantize != "int8":
        raise UserError(f"--quantize: {request.quantize!r} is not known; int8 is")
    if request.dtype not in ("auto", "fp32"):
        raise UserError(
            f"--dtype {request.dtype} with --quantize int8: the weights have one format; leave one "
            "of them out (int8 keeps in fp32 what is not a weight)"
        )
    if device.type != "cpu":
        raise UserError(
            f"--quantize int8: products in int8 are for the CPU, and this is {device}; add "
            "--device cpu, or leave --quantize out"
        )


def in_dtype(model: GPT, wish: str, device: torch.device) -> GPT:
    """The model with its weights in the format asked for; a CPU packs halves (see `packed`)."""
    dtype = inference_dtype(wish, device, model)
    if dtype == torch.float32 and device.type == "cpu":
        pages.move(model.parameters())
        return model
    if device.type != "cpu" or not halves_pay(dtype):
        return model.to(dtype)
    return pack(model.to(dtype).float(), dtype)


def inference_dtype(wish: str, device: torch.device, model: GPT) -> torch.dtype:
    """The format that the weights are converted to; auto: fp32 except on a GPU."""
    if wish not in ("auto", *DTYPES):
        raise UserError(f"--dtype: {wish!r} is not one of auto, {', '.join(DTYPES)}")
    if wish == "auto" and device.type != "cuda":
        return torch.float32
    return pick_dtype(wish, device, count_parameters(model))[0]


def quantized(model: GPT, tokenizer: Tokenizer, folder: Path, prompts: list[str]) -> GPT:
    """The model in int8; says what that spares and what it costs in loss."""
    packed = pack(model, torch.int8)
    before, after = (linear_bytes(one) / 1e6 for one in (model, packed))
    weights = f"{after:,.1f} MB of weights a token instead of {before:,.1f} MB"
    batches, source = held_out(model, tokenizer, folder, prompts)
    if batches:
        cost = cost_of(model, packed, batches)
        loss = f"loss {cost.loss:+.4f} ± {cost.error:.4f} nats/token on {cost.n_tokens:,} {source}"
    else:
        loss = f"loss not measured: {source}"
    say(f"int8     {weights}; {loss}")
    return packed


def answer(decoder: Decoder, tokenizer: Tokenizer, request: Request, prompts: list[str]) -> None:
    """Generates for all prompts and shows the rows in order, each as it comes."""
    start, tokens = time.perf_counter(), 0
    pieces = generate(decoder, tokenizer, prompts, request.sampling, request.samples)
    for piece in show(pieces, prompts, request):
        if piece.completion is not None:
            tokens += len(piece.completion.tokens)
    if request.stats:
        seconds = time.perf_counter() - start
        say(f"{tokens} tokens in {seconds:.2f} s: {tokens / seconds:.1f} tokens/s")
        if decoder.slower_because:
            say(f"note: one row at a time would be quicker, but {decoder.slower_because}")


def show(pieces: Iterable[Piece], prompts: list[str], request: Request) -> Iterator[Piece]:
    """Prints the pieces of all rows and passes them on.

    Rows are generated side by side, and printed one after the other: the first one that is not
    finished streams, later ones wait. More than one row: each begins with a line that names it.
    """
    waiting: dict[tuple[int, int], list[Piece]] = {}
    at, begun = (0, 0), False
    for piece in pieces:
        waiting.setdefault((piece.prompt_index, piece.sample), []).append(piece)
        finished = True
        while finished:
            finished = False
            for ready in waiting.pop(at, []):
                if request.as_json:
                    _print_json(ready)
                else:
                    begun = begun or _begin(at, prompts, request)
                    _print_piece(ready)
                finished = ready.completion is not None
            if finished:
                prompt, sample = at
                last = sample + 1 == request.samples
                at, begun = (prompt + 1, 0) if last else (prompt, sample + 1), False
        yield piece


def _begin(key: tuple[int, int], prompts: list[str], request: Request) -> bool:
    """Prints what stands before a continuation: the row's name if there are several, the prompt."""
    (prompt, sample), several = key, []
    if len(prompts) > 1:
        several.append(f"prompt {prompt + 1}/{len(prompts)}")
    if request.samples > 1:
        several.append(f"sample {sample + 1}/{request.samples}")
    if several:
        print(f"--- {', '.join(several)} ---")
    print(_for_reader(clean_text(prompts[prompt])), end="", flush=True)
    return True


def _print_piece(piece: Piece) -> None:
    print(_for_reader(piece.text), end="\n" if piece.completion else "", flush=True)


def _for_reader(text: str) -> str:
    """Text as it is into a file or a pipe, to a terminal without what would control it."""
    return shown(text) if sys.stdout.isatty() else text


def _print_json(piece: Piece) -> None:
    if piece.completion is not None:
        row = {
            "prompt": clean_text(piece.completion.prompt),
            "text": piece.completion.text,
            "tokens": piece.completion.tokens,
            "finish_reason": piece.completion.finish_reason,
        }
        print(json_line(row), flush=True)


def interact(decoder: Decoder, tokenizer: Tokenizer, request: Request) -> None:
    """Reads a prompt, continues it, and again, until `:q` or the end of the input.

    Ctrl-C stops a generation, or drops a half-typed prompt. A mistake costs its line only.
    """
    at_terminal = sys.stdin.isatty()
    if at_terminal:
        import readline  # noqa: F401 (gives input() its line editing and history)

        say("A prompt a line; Ctrl-C stops a text, :q or Ctrl-D ends.")
    elif isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(encoding="utf-8", errors="replace")
    while True:
        try:
            prompt = input("> " if at_terminal else "")
            if prompt.strip() == ":q":
                return
            answer(decoder, tokenizer, request, [prompt])
        except EOFError:
            return
        except KeyboardInterrupt:
            print(flush=True)
        except UserError as error:
            say_errors(error.lines)
