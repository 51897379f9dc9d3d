"""What the watch costs: seconds of signals, log and diagnosis for each step, as a share of a step.

    python scripts/bench_watch.py [--config FILE] [--data FILE] [--steps N] [--rounds N]

Trains the config's model in turns, with everything and with bare steps, in one process, and prints
the medians of the rounds. Steps that are logged cost more than others; the mean over all counts.
Making the batches, which both have, is told beside it. Options of the config may follow, as for
gpt-train: `--log.every_steps 10`.
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path

from gpt.build import build_training
from gpt.cli.arguments import split_overrides
from gpt.config import Config
from gpt.configfile import load_config
from gpt.data import Batches, open_data
from gpt.device import set_threads
from gpt.malloc import keep_freed_memory
from gpt.record import Recorder
from gpt.step import train_step

WARMUP = 10


def measure(config: Config, run: Path, rounds: int, steps: int) -> None:
    """Trains in turns and prints what was measured."""
    data = open_data(config)
    training, _ = build_training(config, data)
    size = (config.model.context_len, config.train.batch_size, config.run.seed)
    batches = Batches(data.train, *size)
    watched: list[float] = []
    bare: list[float] = []
    own = making = 0.0
    with Recorder(run, training, 4 * rounds * steps, title=" ") as recorder:
        began = time.perf_counter()
        recorder.begin(data)
        start_s = time.perf_counter() - began
        for number in range(-WARMUP, 2 * rounds * steps):
            began = time.perf_counter()
            batch = batches.batch(training.progress.step)
            making += time.perf_counter() - began
            is_watched = number // steps % 2 == 0
            began = time.perf_counter()
            if is_watched:
                recorder.before_step()
                result = train_step(training, *batch, gauge=recorder.gauge)
            else:
                recorder.gauge.forget()
                result = train_step(training, *batch)
            stepped = time.perf_counter()
            training.progress.step += 1
            if is_watched:
                recorder.step(result, batch[0], 0.0, recorder.tick())
            now = time.perf_counter()
            if number >= 0:
                (watched if is_watched else bare).append(now - began)
                own += now - stepped if is_watched else 0.0
    sums = [
        [sum(times[i : i + steps]) for i in range(0, len(times), steps)]
        for times in (watched, bare)
    ]
    shares = [100 * (w / b - 1) for w, b in zip(*sums, strict=True)]
    print(
        f"a bare step {1e3 * statistics.median(bare):.1f} ms; log and diagnosis "
        f"{1e3 * own / len(watched):.3f} ms a step, {100 * own / sum(watched):.2f} % of it"
    )
    print(
        f"everything, round against round: {statistics.median(shares):+.2f} % in the median of "
        f"{len(shares)}, from {min(shares):+.1f} to {max(shares):+.1f} %"
    )
    made = making / (WARMUP + len(watched) + len(bare))
    print(
        f"making a batch {1e3 * made:.3f} ms, {100 * made / statistics.median(bare):.2f} % of a "
        "bare step"
    )
    print(f"once, before the first step: {1e3 * start_s:.0f} ms")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--config", type=Path, default=Path("configs/quickstart.yaml"))
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--data", type=Path, help="take this text instead of the config's")
    arguments, rest = parser.parse_known_args()
    _, overrides = split_overrides(rest)
    if arguments.data:
        overrides = [*overrides, ("data.source", str(arguments.data))]
    set_threads()
    keep_freed_memory()
    with tempfile.TemporaryDirectory() as folder:
        config = load_config(arguments.config, [*overrides, ("run.dir", folder)])
        measure(config, Path(folder), arguments.rounds, arguments.steps)


if __name__ == "__main__":
    main()
