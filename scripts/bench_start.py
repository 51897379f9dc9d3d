"""What a start costs: from the command to its help, to the text's shards, to the first step.

    python -m scripts.bench_start [--config FILE] [--data FILE] [--rounds N] [--whole]

Each figure is the median of processes started anew, one after another. The first start finds no
shards and builds them, the second finds them. `--whole` also trains the config to its end and says
where its time went. Options of the config may follow, as for gpt-train: `--train.max_steps 20`.
"""

import argparse
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

COMMAND = Path(sysconfig.get_path("scripts"), "gpt-train")
# What a line that gpt-train prints begins with, and what has been done by then.
MARKS = {"data: ": "text is shards", "run  ": "model is built", "step 1/": "first step is done"}
Line = tuple[float, str]


def seconds(command: Sequence[object]) -> float:
    began = time.perf_counter()
    subprocess.run([*map(str, command)], check=True, capture_output=True)
    return time.perf_counter() - began


def lines_of(command: Sequence[object], until: str = "") -> list[Line]:
    """What a command prints for people, each line with its second; ends it at a line `until`."""
    began = time.perf_counter()
    lines: list[Line] = []
    with subprocess.Popen(
        [*map(str, command)], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stderr is not None
        for line in process.stderr:
            lines.append((time.perf_counter() - began, line))
            if until and line.startswith(until):
                process.kill()
                break
        process.stderr.close()
    if process.returncode and not until:
        raise SystemExit("".join(line for _, line in lines))
    return [*lines, (time.perf_counter() - began, "")]


def marks(lines: Sequence[Line]) -> dict[str, float]:
    """When what was done; SystemExit where a run ended before its first step."""
    found = {
        name: next((second for second, line in lines if line.startswith(mark)), None)
        for mark, name in MARKS.items()
    }
    if None in found.values():
        raise SystemExit("".join(line for _, line in lines))
    return {name: second for name, second in found.items() if second is not None}


def shares(lines: Sequence[Line]) -> dict[str, float]:
    """Seconds of a whole run by what they went to: each until the line that says it is done."""
    of = {
        "data: ": "start and text to shards",
        "run  ": "model, optimizer, checks",
        "step ": "steps",
        "eval ": "evaluations",
        "sample ": "samples",
        "saved ": "checkpoints",
        "end ": "steps",
        "": "picture, report, end",
    }
    spent = dict.fromkeys(of.values(), 0.0)
    before, ended = 0.0, False
    for second, line in lines:
        name = next((of[mark] for mark in of if mark and line.startswith(mark)), None)
        ended = ended or line.startswith("end ")
        if name is None and not (ended and not line):
            continue
        spent[name or of[""]] += second - before
        before = second
    return spent


def table(rounds: int, rows: dict[str, Callable[[], float]]) -> None:
    for name, measure in rows.items():
        times = [measure() for _ in range(rounds)]
        print(f"{name:44}{statistics.median(times):6.2f} s  ({min(times):.2f} to {max(times):.2f})")


def starts(options: Sequence[str], rounds: int) -> None:
    """Starts a run `rounds` times without its shards, and as often with them."""
    for what in ("shards are made", "shards are there"):
        found: list[dict[str, float]] = []
        with tempfile.TemporaryDirectory() as kept:
            for number in range(rounds + (what == "shards are there")):
                with tempfile.TemporaryDirectory() as fresh:
                    place = kept if what == "shards are there" else fresh
                    command = [COMMAND, *options, f"--run.dir={fresh}/runs", f"--data.dir={place}"]
                    lines = lines_of(command, "step 1/")
                if number or what == "shards are made":
                    found.append(marks(lines))
        for name in MARKS.values():
            times = [each[name] for each in found]
            print(
                f"{name + ', ' + what:44}{statistics.median(times):6.2f} s  "
                f"({min(times):.2f} to {max(times):.2f})"
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--config", type=Path, default=Path("configs/quickstart.yaml"))
    parser.add_argument("--data", type=Path, help="take this text instead of the config's")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--whole", action="store_true", help="also train to the end")
    arguments, more = parser.parse_known_args()
    options = ["--config", str(arguments.config), *more]
    if arguments.data:
        options += [f"--data.source={arguments.data}"]
    python = sys.executable
    table(
        arguments.rounds,
        {
            "gpt-train --help": lambda: seconds([COMMAND, "--help"]),
            "python, doing nothing": lambda: seconds([python, "-c", ""]),
            "python, importing torch": lambda: seconds([python, "-c", "import torch"]),
        },
    )
    starts(options, arguments.rounds)
    if arguments.whole:
        with tempfile.TemporaryDirectory() as place:
            command = [COMMAND, *options, f"--run.dir={place}/runs", f"--data.dir={place}/data"]
            spent = shares(lines_of(command))
        total = sum(spent.values())
        print(f"whole run, {total:.1f} s:")
        for name, each in spent.items():
            print(f"  {name:42}{each:6.2f} s  {100 * each / total:5.1f} %")


if __name__ == "__main__":
    main()
