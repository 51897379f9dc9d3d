"""Test 14: a long run that saves, evaluates and writes all the time: nothing grows but its log."""

import itertools
import json
import os
import random
import shutil
import statistics
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from gpt.config import Config
from gpt.metrics import METRICS_NAME, read_metrics
from gpt.rundir import checkpoint_folders, run_path
from tests.conftest import tiny_config
from tests.torture import Torture
from tests.torture.runs import Command, check_tidy, write_config

STRETCH, STRETCHES, KEEP = 10_000, 10, 3
WARM = 4_500  # steps of a process before its memory is looked at: its watch holds all it will
MOST_GROWTH = 2**20  # bytes in STRETCH steps
MOST_SLOWDOWN = 1.25  # of a step's CPU time, from the first stretch to any later one
LOG_LINES, MOST_RESUME_S = 100_000, 30.0
PAGE = os.sysconf("SC_PAGE_SIZE")
TICK = os.sysconf("SC_CLK_TCK")


def make_config(shared: Path, folder: Path, steps: int) -> Config:
    """A save every 50 steps, a line every other one, evaluations and samples."""
    return tiny_config(
        shared,
        run__dir=str(folder),
        run__name="long",
        optimizer__lr="1e-3",
        schedule__name="constant",
        train__max_steps=str(steps),
        train__spike_sigma="6",
        train__device="cpu",
        train__batch_size="2",
        model__n_layer="1",
        eval__every_steps="100",
        eval__max_tokens="64",
        eval__sample_tokens="3",
        checkpoint__every_steps="50",
        checkpoint__keep=str(KEEP),
        log__every_steps="2",
    )


@dataclass(frozen=True)
class Sample:
    """What a process holds at one instant."""

    step: int
    memory: int
    descriptors: int
    threads: int
    cpu_s: float


def without_report(_folder: Path) -> None:
    """In the command's process: the picture and the page at the end read the whole log."""
    import gpt.train

    gpt.train.report = lambda *_: None  # type: ignore[assignment]


def watch(command: Command, run: Path, timeout_s: float) -> list[Sample]:
    """Looks at a process ten times a second until it ends."""
    samples = []
    end = time.monotonic() + timeout_s
    while command.process.is_alive():
        assert time.monotonic() < end, command.said[-2000:]
        with suppress(OSError, IndexError, ValueError):  # it has just ended, or not begun
            samples.append(look(command.pid, last_step(run)))
        check_kept(run)
        time.sleep(0.1)
    assert command.wait() == 0, command.said[-3000:]
    return samples


def look(pid: int, step: int) -> Sample:
    """Reads /proc."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return Sample(
        step=step,
        memory=int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * PAGE,
        descriptors=len(list(Path(f"/proc/{pid}/fd").iterdir())),
        threads=int(fields[17]),
        cpu_s=(int(fields[11]) + int(fields[12])) / TICK,
    )


def last_step(run: Path) -> int:
    """The step of the log's last whole line."""
    with (run / METRICS_NAME).open("rb") as file:
        file.seek(max(0, file.seek(0, os.SEEK_END) - 8192))
        return int(json.loads(file.read().splitlines()[-2])["step"])


def check_kept(run: Path) -> None:
    """Asserts that never more is kept than the newest, the best, and one that has just come."""
    names = [path.name for path in checkpoint_folders(run)]
    assert len(names) <= KEEP + 2, f"kept: {names}"


def case(index: int, rng: random.Random, folder: Path) -> str:
    """Case 0: a short run with a huge log behind it; others: a stretch of one long run."""
    shared = folder.parent
    if index == 0:
        return long_log(shared, folder)
    long = shared / "long-run"
    for number in range(1, index + 1):  # those before it, if they have not run here
        if not (long / f"samples-{number}.json").exists():
            long.mkdir(exist_ok=True)
            config = make_config(shared, long, number * STRETCH)
            extend = ["--rate", "extend"] if number > 1 else []
            argv = ["gpt-train", "--config", str(write_config(config, long)), *extend]
            samples = watch(Command(argv, long, patch=without_report), run_path(config), 1200)
            seconds_a_step = check_samples(samples)
            (long / f"samples-{number}.json").write_text(json.dumps(seconds_a_step))
    first, now = (float((long / f"samples-{number}.json").read_text()) for number in (1, index))
    assert now < MOST_SLOWDOWN * first, f"{1e3 * now:.2f} ms of CPU a step, {1e3 * first:.2f} first"
    check_end(make_config(shared, long, index * STRETCH), index * STRETCH)
    return f"{STRETCH:,} steps more"


def check_samples(samples: list[Sample]) -> float:
    """Asserts that a process holds no more at its end; returns the CPU seconds of a step."""
    begin = samples[0].step
    warm = [sample for sample in samples if sample.step >= begin + WARM]
    assert len(warm) > 40, f"only {len(warm)} looks"
    growth = slope([s.step for s in warm], [s.memory for s in warm]) * STRETCH
    assert growth < MOST_GROWTH, f"{growth / 2**20:.2f} MB more in {STRETCH:,} steps"
    for name in ("descriptors", "threads"):
        # A file that is being saved is open for a moment, and those of a process that ends no more.
        parts = [warm[i * len(warm) // 4 : (i + 1) * len(warm) // 4] for i in range(4)]
        usual = [statistics.median_low(getattr(s, name) for s in part) for part in parts]
        assert max(usual) == min(usual), f"{name}: {usual}"
    early, late = quickest(warm[: len(warm) // 2]), quickest(warm[len(warm) // 2 :])
    assert late < MOST_SLOWDOWN * early, f"{1e3 * early:.2f}, then {1e3 * late:.2f} ms a step"
    return quickest(warm)


def quickest(samples: list[Sample], parts: int = 8) -> float:
    """CPU seconds a step in the best part of a time; other work only adds to them."""
    ends = [samples[i * (len(samples) - 1) // parts] for i in range(parts + 1)]
    return min(
        (b.cpu_s - a.cpu_s) / (b.step - a.step)
        for a, b in itertools.pairwise(ends)
        if b.step > a.step
    )


def slope(steps: list[int], values: list[int]) -> float:
    """Growth a step: the median over pairs, which no single jump moves (Theil-Sen)."""
    every = max(1, len(steps) // 300)
    points = list(zip(steps, values, strict=True))[::every]
    return statistics.median(
        (b - a) / (t - s) for i, (s, a) in enumerate(points) for t, b in points[i + 1 :] if t > s
    )


def check_end(config: Config, steps: int) -> None:
    """Asserts what is left: K checkpoints and the best, and every line once."""
    run = run_path(config)
    check_tidy(config)
    state = json.loads((checkpoint_folders(run)[-1] / "state.json").read_text())
    best = f"step-{state['progress']['best_step']:08d}"
    newest = {f"step-{step:08d}" for step in range(steps, steps - KEEP * 50, -50)}
    kept = {path.name for path in checkpoint_folders(run)}
    assert best in kept, f"{best} is not among {kept}"
    assert kept - newest <= {best} or len(kept - {best}) <= KEEP, f"kept: {sorted(kept)}"
    logged = [record["step"] for record in read_metrics(run) if record["kind"] == "train"]
    assert logged == sorted({1, *range(2, steps + 1, 2)}), "lines are missing, or there twice"


def long_log(shared: Path, folder: Path) -> str:
    """A run goes on at once though 100,000 lines lie behind it, and does not hold them."""
    config = make_config(shared, folder, 100)
    argv = ["gpt-train", "--config", str(write_config(config, folder))]
    command = Command(argv, folder, patch=without_report)
    small = watch(command, run_path(config), 60)
    log = run_path(config) / METRICS_NAME
    lines = log.read_bytes().splitlines(keepends=True)
    middle = [line for line in lines if b'"train"' in line]
    with log.open("wb") as file:
        file.writelines(lines[:3])
        for i in range(LOG_LINES):
            file.write(middle[i * len(middle) // LOG_LINES])
        file.writelines(lines[3:])
    longer = make_config(shared, folder, 400)
    argv = ["gpt-train", "--config", str(write_config(longer, folder)), "--rate", "extend"]
    begun = time.monotonic()
    command = Command(argv, folder, patch=without_report)
    large = watch(command, run_path(longer), 120)
    took = time.monotonic() - begun
    # The last look may find a process that has just ended, and holds nothing.
    more = max(each.memory for each in large) - max(each.memory for each in small)
    assert more < log.stat().st_size / 2, f"{more / 2**20:.0f} MB more"
    assert took < MOST_RESUME_S, f"300 steps after {LOG_LINES:,} lines took {took:.1f} s"
    shutil.rmtree(run_path(config))
    return f"goes on after {LOG_LINES:,} lines"


TORTURE = Torture(
    title=f"one run of {STRETCH * STRETCHES:,} steps that saves every 50, evaluates every 100 and "
    "writes a line every other step; and a resume behind 100,000 lines",
    promise=f"less than 1 MB more in {STRETCH:,} steps, no descriptor, thread or CPU time more; "
    "never more than K checkpoints and the best; every line once",
    full=1 + STRETCHES,
    short=1,
    case=case,
    timeout_s=2400,
    alone=True,
)
