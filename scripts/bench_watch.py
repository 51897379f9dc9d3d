"""What the watch costs: seconds of signals, log and diagnosis for each step, as a share of a step.

    python scripts/bench_watch.py [--config FILE] [--steps N] [--rounds N]

Trains the config's model in turns, with everything and with bare steps, in one process, and prints
the medians of the rounds. Steps that are logged cost more than others; the mean over all counts.
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path

from gpt.build import build_training
from gpt.configfile import load_config
from gpt.data import Batches, open_data
from gpt.device import keep_freed_memory, set_threads
from gpt.record import Recorder
from gpt.step import train_step

WARMUP = 10


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--config", type=Path, default=Path("configs/quickstart.yaml"))
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    set_threads()
    keep_freed_memory()
    with tempfile.TemporaryDirectory() as folder:
        config = load_config(arguments.config, [("run.dir", folder)])
        data = open_data(config)
        training, plan = build_training(config, data)
        batches = Batches(
            data.train, config.model.context_len, config.train.batch_size, config.run.seed
        )
        run = Path(folder)
        with Recorder(
            run, training, 10 * arguments.rounds * arguments.steps, title=" "
        ) as recorder:
            began = time.perf_counter()
            recorder.begin(data)
            start_s = time.perf_counter() - began
            watched, bare, own = [], [], []
            for number in range(-WARMUP, 2 * arguments.rounds * arguments.steps):
                progress = training.progress
                batch = batches.batch(progress.step)
                with_all = number < 0 or number // arguments.steps % 2 == 0
                began = time.perf_counter()
                if with_all:
                    recorder.before_step()
                    result = train_step(training, *batch, gauge=recorder.gauge)
                else:
                    recorder.gauge.forget()
                    result = train_step(training, *batch)
                middle = time.perf_counter()
                progress.step += 1
                if with_all:
                    recorder.step(result, batch[0], 0.0, recorder.tick())
                now = time.perf_counter()
                if number >= 0:
                    (watched if with_all else bare).append(now - began)
                    if with_all:
                        own.append(now - middle)
        n = arguments.steps
        rounds = [
            (sum(watched[i : i + n]), sum(bare[i : i + n])) for i in range(0, len(watched), n)
        ]
        share = statistics.median(w / b - 1 for w, b in rounds)
        print(f"{arguments.config}: a bare step {1e3 * statistics.median(bare):.1f} ms")
        print(
            f"log and diagnosis {1e3 * sum(own) / len(own):.3f} ms a step, "
            f"{100 * sum(own) / sum(watched):.2f} % of it"
        )
        print(
            f"everything, round against round: {100 * share:+.2f} % (median of {len(rounds)}, "
            f"from {100 * min(w / b - 1 for w, b in rounds):+.1f} to "
            f"{100 * max(w / b - 1 for w, b in rounds):+.1f} %)"
        )
        print(f"once, before the first step: {1e3 * start_s:.0f} ms")


if __name__ == "__main__":
    main()
