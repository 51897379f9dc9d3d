"""Text to shards, beside tiktoken's own rate: `gpt-data build` against `encode_ordinary_batch`.

    python -m scripts.bench_tokenize [--megabytes N] [--form txt|jsonl] [--text FILE]
        [--ranks FILE] [--rounds N] [--threads N]

Ours is the whole command in a new process: start, reading, hashing, splitting, encoding, writing,
checking what was written. Theirs is only the time inside `encode_ordinary_batch`, over the same
text, in memory, with the same ranks. Prints medians, their ratio and the peak memory of each.

The text is paragraphs of Python's own library, shuffled anew for each pass over them, or a file of
yours, taken the same way: the same bytes on every machine with the same Python. Without `--ranks`
(a .tiktoken file) the vocabulary is a BPE that is trained here, once, before anything is timed.
"""

import argparse
import json
import os
import random
import re
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from gpt.config import DataConfig
from gpt.corpus import scan
from gpt.ranks import PATTERNS, parse_ranks, train_ranks

FILE_BYTES = 32_000_000
PARAGRAPHS = 40  # in a document of a .jsonl
CALL_CHARS = 32_000_000  # of text in one call of the peer's, whose lists of ids take room
TEXT_CHARS = 100_000  # of each text in such a call


class Run(NamedTuple):
    """One round of one side: seconds, and the most memory that its process held."""

    seconds: float
    peak_bytes: int


def passages(text: Path | None) -> list[str]:
    """The paragraphs that the text is mixed from."""
    if text is not None:
        whole = text.read_text(encoding="utf-8")
    else:
        files = [document for document in scan_texts() if document]
        whole = "\n\n".join(files)
    return [part for part in whole.split("\n\n") if part.strip()]


def scan_texts() -> Iterator[str]:
    corpus = scan(DataConfig(source="python-stdlib"), progress=False)
    yield from corpus.texts(train_only=False)


def write_text(folder: Path, n_bytes: int, form: str, parts: list[str]) -> int:
    """Writes files of a shuffled text into a folder; returns their bytes of text."""
    shuffle = random.Random(0)
    stream = _endless(parts, shuffle)
    written = number = 0
    while written < n_bytes:
        size = 0
        with (folder / f"{number:04d}.{form}").open("w", encoding="utf-8", newline="") as file:
            while size < min(FILE_BYTES, n_bytes - written):
                document = "\n\n".join(next(stream) for _ in range(PARAGRAPHS)) + "\n\n"
                file.write(json.dumps({"text": document}) + "\n" if form == "jsonl" else document)
                size += len(document.encode())
        written, number = written + size, number + 1
    return written


def _endless(parts: list[str], shuffle: random.Random) -> Iterator[str]:
    while True:
        yield from shuffle.sample(parts, len(parts))


def ours(folder: Path, ranks: Path, out: Path) -> Run:
    """`gpt-data build`, whole."""
    command = [
        sys.executable,
        str(Path(sysconfig.get_path("scripts"), "gpt-data")),
        "build",
        "--config",
        str(folder.parent / "config.yaml"),
        f"--data.source={folder}",
        f"--data.dir={out}",
        f"--tokenizer.kind={ranks}",
    ]
    began = time.perf_counter()
    with tempfile.TemporaryFile() as said:
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=said)
        peak = 0
        while process.poll() is None:
            peak = max(peak, _peak_bytes(process.pid))
            time.sleep(0.02)
        seconds = time.perf_counter() - began
        if process.returncode:
            said.seek(0)
            raise SystemExit(said.read().decode())
    return Run(seconds, peak)


def _peak_bytes(pid: int) -> int:
    """The most memory that a process has held; 0 where it has just ended, or without Linux.

    What `wait4` says is at least the peak of the process that started it.
    """
    try:
        status = Path("/proc", str(pid), "status").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return 0
    found = re.search(r"^VmHWM:\s*(\d+) kB", status, re.MULTILINE)
    return 1024 * int(found[1]) if found else 0


def theirs(folder: Path, ranks: Path, threads: int) -> Run:
    """The rate of tiktoken itself, in a process of its own."""
    command = [
        sys.executable, "-m", "scripts.bench_tokenize", "--peer", str(folder),
        "--ranks", str(ranks), "--threads", str(threads),
    ]  # fmt: skip
    seconds, peak = json.loads(subprocess.run(command, check=True, capture_output=True).stdout)
    return Run(seconds, peak)


def peer(folder: Path, ranks: Path, threads: int) -> None:
    """What `theirs` runs: prints the seconds inside tiktoken, and this process's peak memory."""
    import tiktoken

    from gpt.sources import cut_pieces, documents

    encoding = tiktoken.Encoding(
        "peer",
        pat_str=PATTERNS["gpt2"],
        mergeable_ranks=parse_ranks(ranks.read_bytes(), ranks),
        special_tokens={},
    )
    seconds, texts, size = 0.0, list[str](), 0

    def call() -> float:
        began = time.perf_counter()
        encoding.encode_ordinary_batch(texts, num_threads=threads)
        return time.perf_counter() - began

    for document in documents(DataConfig(source=str(folder))):
        for piece in cut_pieces(document.chunks(), TEXT_CHARS):
            texts.append(piece)
            size += len(piece)
            if size >= CALL_CHARS:
                seconds += call()
                texts, size = [], 0
    seconds += call()
    print(json.dumps([seconds, _peak_bytes(os.getpid())]))


def trained_ranks(folder: Path, parts: list[str], size: int) -> Path:
    """A BPE of the text's paragraphs, as a .tiktoken file."""
    from gpt.tokenizer import ranks_tokenizer

    ranks = train_ranks(size - 1, "gpt2", lambda: iter(parts))
    ranks_tokenizer("bpe", ranks, "gpt2", len(ranks)).save(folder)
    return folder / "tokenizer.tiktoken"


def measure(text: Path, ranks: Path, n_bytes: int, rounds: int, threads: int) -> None:
    """Runs both in turns and prints the table."""
    runs: dict[str, list[Run]] = {"ours": [], "tiktoken": []}
    for number in range(rounds):
        with tempfile.TemporaryDirectory(dir=text.parent) as out:
            runs["ours"].append(ours(text, ranks, Path(out)))
        runs["tiktoken"].append(theirs(text, ranks, threads))
        print(*(f"{name} {each[number].seconds:.1f} s" for name, each in runs.items()), sep=", ")
    rates = {}
    for name, each in runs.items():
        rates[name] = n_bytes / 1e6 / statistics.median(run.seconds for run in each)
        peak = max(run.peak_bytes for run in each) / 2**20
        print(f"{name:10}{rates[name]:8.2f} MB/s   peak memory {peak:6.0f} MiB")
    ratios = [a.seconds / b.seconds for a, b in zip(*reversed(runs.values()), strict=True)]
    print(
        f"ours, all included, at {statistics.median(ratios):.2f} times tiktoken's own rate "
        f"({min(ratios):.2f} to {max(ratios):.2f} in {rounds} rounds; {n_bytes / 1e6:,.0f} MB)"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--megabytes", type=float, default=100)
    parser.add_argument("--form", choices=("txt", "jsonl"), default="txt")
    parser.add_argument("--text", type=Path, help="take paragraphs of this file")
    parser.add_argument("--ranks", type=Path, help="a .tiktoken file (default: a BPE of 16,384)")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2, help="of tiktoken's")
    parser.add_argument("--peer", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.peer:
        peer(arguments.peer, arguments.ranks, arguments.threads)
        return
    with tempfile.TemporaryDirectory() as place:
        text = Path(place, "text")
        text.mkdir()
        parts = passages(arguments.text)
        ranks = arguments.ranks or trained_ranks(Path(place, "bpe"), parts, 16_384)
        n_bytes = write_text(text, int(arguments.megabytes * 1e6), arguments.form, parts)
        Path(place, "config.yaml").write_text("model: {context_len: 64}\n", encoding="utf-8")
        measure(text, ranks.resolve(), n_bytes, arguments.rounds, arguments.threads)


if __name__ == "__main__":
    main()
