"""The command `gpt-infer`: a prompt in, text out. Imports torch only when work begins."""

import argparse
import io
import sys
from collections.abc import Sequence
from pathlib import Path

from gpt.cli.arguments import Parser
from gpt.cli.threads import wait_briefly_if_busy
from gpt.errors import UserError, run_command

MAX_PROMPT_BYTES = 64 * 2**20
MAX_PROMPTS = 100_000

EPILOG = """\
The prompt is echoed, then the text follows as it is generated. Several prompts or samples: each
begins with a line such as `--- prompt 1/2, sample 1/3 ---`. An empty prompt begins a new document.
Beyond the model's context the oldest quarter of the tokens slides out."""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit code."""
    return run_command(_infer, argv)


def _infer(argv: Sequence[str]) -> None:
    arguments = _parser().parse_args(argv)
    prompts = _prompts(arguments)
    if arguments.samples < 1:
        raise UserError(f"--samples {arguments.samples}: must be >= 1; 1 is the default")
    if isinstance(sys.stdout, io.TextIOWrapper):  # text in any language, whatever the locale
        sys.stdout.reconfigure(encoding="utf-8", errors="replace")

    wait_briefly_if_busy()
    from gpt.generate import Sampling
    from gpt.infer import Request, infer

    sampling = Sampling(
        temperature=arguments.temperature,
        top_k=arguments.top_k,
        top_p=arguments.top_p,
        min_p=arguments.min_p,
        repetition_penalty=arguments.repetition_penalty,
        seed=arguments.seed,
        max_tokens=arguments.max_tokens,
        stop=tuple(arguments.stop),
    )
    infer(
        Request(
            prompts=prompts,
            sampling=sampling,
            samples=arguments.samples,
            run=arguments.run,
            checkpoint=arguments.checkpoint,
            device=arguments.device,
            dtype=arguments.dtype,
            quantize=arguments.quantize,
            as_json=arguments.json,
            stats=arguments.stats,
        )
    )


def _prompts(arguments: argparse.Namespace) -> list[str] | None:
    """The prompts, or None for the interactive mode."""
    if arguments.interactive and sys.stdin is not None:
        return None
    if arguments.prompt == "-":
        if sys.stdin is None:
            raise UserError(
                "--prompt -: stdin is closed; pipe a text into it, or give --prompt TEXT"
            )
        return [_decode(sys.stdin.buffer.read(MAX_PROMPT_BYTES + 1), "stdin").removesuffix("\n")]
    if arguments.prompt is not None:
        return [arguments.prompt]
    if arguments.prompts is not None:
        return _read_prompts(arguments.prompts)
    if sys.stdin is not None and sys.stdin.isatty():
        return None
    raise UserError(
        "no prompt, and no terminal to ask for one; give --prompt TEXT, --prompt - to read stdin, "
        "or --prompts FILE"
    )


def _read_prompts(path: Path) -> list[str]:
    try:
        with path.open("rb") as file:
            data = file.read(MAX_PROMPT_BYTES + 1)
    except OSError as error:
        raise UserError(
            f"--prompts: {path} cannot be read: {error.strerror}; give a text file"
        ) from None
    lines = _decode(data, f"--prompts {path}").removesuffix("\n").split("\n")
    if not data:
        raise UserError(f"--prompts: {path} is empty; give one prompt a line")
    if len(lines) > MAX_PROMPTS:
        raise UserError(f"--prompts: {path}: {len(lines):,} lines; give at most {MAX_PROMPTS:,}")
    return [line.removesuffix("\r") for line in lines]


def _decode(data: bytes, source: str) -> str:
    if len(data) > MAX_PROMPT_BYTES:
        limit = MAX_PROMPT_BYTES // 2**20
        raise UserError(f"{source}: more than {limit} MiB; give at most that")
    return data.decode("utf-8-sig", "replace")


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="gpt-infer",
        description="Continues a text with a trained model.",
        epilog=EPILOG,
    )
    what = parser.add_argument_group("what to continue").add_mutually_exclusive_group()
    add = what.add_argument
    add("--prompt", metavar="TEXT", help="the text to continue; - reads it from stdin")
    add("--prompts", type=Path, metavar="FILE", help="one prompt a line, generated as a batch")
    add(
        "--interactive",
        action="store_true",
        help="ask for prompts one by one (default on a terminal without --prompt)",
    )
    which = parser.add_argument_group("which model").add_mutually_exclusive_group()
    add = which.add_argument
    add("--run", type=Path, metavar="DIR", help="a run's best checkpoint (default: newest run)")
    add("--checkpoint", type=Path, metavar="DIR", help="this checkpoint: RUN/checkpoints/step-...")
    _add_sampling(parser)
    add = parser.add_argument_group("how it runs and what it prints").add_argument
    add("--device", default="auto", help="auto, cpu, cuda, cuda:N or mps (default: auto)")
    add(
        "--dtype",
        default="auto",
        choices=("auto", "fp32", "bf16", "fp16"),
        help="format of the weights; auto (default): fp32, on a GPU bf16 if it has it",
    )
    add(
        "--quantize",
        choices=("int8",),
        help="weights in 8 bits (CPU): a quarter of the memory is read a token; what it costs in "
        "loss is measured and printed to stderr",
    )
    add(
        "--json",
        action="store_true",
        help="one object a sample: prompt, text, tokens (ids), "
        "finish_reason (length, stop, or end: the model ended the document)",
    )
    add("--stats", action="store_true", help="tokens/s to stderr")
    return parser


def _add_sampling(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("how tokens are drawn").add_argument
    add("--max-tokens", type=int, default=200, metavar="N", help="tokens a sample (default: 200)")
    add(
        "--temperature",
        type=float,
        default=0.8,
        metavar="T",
        help="0: always the likeliest token; 1: as the model says (default: 0.8)",
    )
    add("--top-k", type=int, metavar="K", help="only the K likeliest tokens (default: no limit)")
    add(
        "--top-p",
        type=float,
        metavar="P",
        help="only the fewest tokens with this much probability, above 0 to 1 (default: no limit)",
    )
    add(
        "--min-p",
        type=float,
        metavar="P",
        help="only tokens at least P times as likely as the likeliest, 0 to 1 (default: no limit)",
    )
    add(
        "--repetition-penalty",
        type=float,
        default=1.0,
        metavar="R",
        help="above 1: tokens that occurred become less likely (default: 1, off)",
    )
    add(
        "--stop",
        action="append",
        default=[],
        metavar="TEXT",
        help="end before this text; may be given several times",
    )
    add("--samples", type=int, default=1, metavar="N", help="texts a prompt (default: 1)")
    add("--seed", type=int, metavar="S", help="the same texts each time (default: new ones)")
