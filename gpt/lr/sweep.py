"""Full runs at several rates, side by side, in one folder; a killed sweep goes on where it stopped.

    OUT/lr-3.0e-04-seed-1337/   a run directory like any other
    OUT/sweep.json              every run that has ended, its label, and the config of them all
    OUT/sweep.png

What the runs show is judged in `labels` and drawn in `sweep_plot`.
"""

import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from gpt.config import Config
from gpt.data import TokenData, open_data
from gpt.datacheck import unigram_entropy
from gpt.device import busy_warning, pick_device
from gpt.errors import Stopped, UserError, only_warnings, say
from gpt.files import HeldError, locked
from gpt.lr.labels import Verdict
from gpt.lr.ledger import LEDGER_NAME, Ledger, check_folder, run_name
from gpt.lr.outcome import Run
from gpt.lr.rates import rate_text, with_lr
from gpt.lr.sweep_plot import plot_sweep
from gpt.metrics import duration, read_metrics
from gpt.rundir import run_path
from gpt.schedule import Plan
from gpt.train import train

AUTO_FACTORS = (1 / 10, 1 / 3, 1, 3, 10)


@dataclass(frozen=True)
class Sweep:
    """What to run. `command` repeats it in a shell, save for the rates."""

    config: Config
    lrs: tuple[float, ...]
    seeds: tuple[int, ...]
    out: Path
    command: str

    def configs(self) -> list[Config]:
        """One run each: seed by seed, so that all rates are seen once before any is repeated."""
        return [self._at(lr, seed) for seed in self.seeds for lr in self.lrs]

    def again(self, lrs: Sequence[float]) -> str:
        """The command that runs these rates in the same folder."""
        return f"{self.command} --lrs {','.join(map(rate_text, lrs))}"

    def _at(self, lr: float, seed: int) -> Config:
        config = with_lr(self.config, lr)
        run = {"name": run_name(lr, seed), "dir": str(self.out), "seed": seed}
        # A checkpoint is there to go on from; with the best one, that makes two for each run.
        return config.model_copy(
            update={
                "run": config.run.model_copy(update=run),
                "checkpoint": config.checkpoint.model_copy(update={"keep": 1}),
            }
        )


def auto_lrs(config: Config) -> tuple[float, ...]:
    """A tenth, a third, one, three and ten times the config's own rate."""
    return tuple(float(f"{config.optimizer.lr * factor:.3g}") for factor in AUTO_FACTORS)


def run_sweep(sweep: Sweep) -> Ledger:
    """Trains every run that has not ended yet, then judges, writes and draws all in the folder.

    Raises UserError for what the user can mend, and Stopped after a signal, once all is saved.
    """
    configs = sweep.configs()
    check_folder(sweep.out, sweep.config)
    pick_device(sweep.config.train.device)
    if busy := busy_warning():
        say(f"warning: {busy}")
    data = open_data(sweep.config)
    total_steps = sweep.config.total_steps(data.train.n_tokens)
    Plan.from_config(sweep.config, total_steps)
    entropy = unigram_entropy(data.train, data.tokenizer.vocab_size)
    with _held(sweep.out), _saying_how_to_go_on(sweep):
        ledger = Ledger.open(sweep.out, sweep.config, data.fingerprint, entropy)
        waiting = [config for config in configs if config.run.name not in ledger.runs]
        _announce(sweep, len(waiting), total_steps, ledger)
        _train_all(waiting, data, ledger)
        plot_sweep(ledger.verdict, sweep.config.run.name, sweep.out / "sweep.png")
    return ledger


def _announce(sweep: Sweep, n_waiting: int, total_steps: int, ledger: Ledger) -> None:
    """What is about to be done, and what it will cost."""
    n_lrs, n_seeds = len(sweep.lrs), len(sweep.seeds)
    steps = n_waiting * total_steps
    tokens = steps * sweep.config.tokens_per_step
    say(
        f"sweep    {_count(n_lrs, 'rate')} x {_count(n_seeds, 'seed')} = "
        f"{_count(n_lrs * n_seeds, 'run')} of {total_steps:,} steps in {sweep.out}"
    )
    wanted = {run_name(lr, seed) for lr in sweep.lrs for seed in sweep.seeds}
    done, others = wanted & set(ledger.runs), set(ledger.runs) - wanted
    kept = [f"{_count(len(done), 'run')} done before"] if done else []
    kept += [f"{_count(len(others), 'other')} of this folder counted too"] if others else []
    if kept:
        say(f"kept     {'; '.join(kept)}")
    say(f"cost     {_count(n_waiting, 'run')}, {steps:,} steps, {tokens:,} tokens")


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def _train_all(waiting: Sequence[Config], data: TokenData, ledger: Ledger) -> None:
    """Trains the runs one by one and enters the end of each in the ledger, with a line for it."""
    start = time.perf_counter()
    for number, config in enumerate(waiting, start=1):
        name = f"lr {rate_text(config.optimizer.lr)} seed {config.run.seed}"
        place = f"{number}/{len(waiting)}".ljust(8)
        began = time.perf_counter()
        run = _train_one(config, data, f"{place} {name} ")
        ledger.enter(run)
        now = time.perf_counter()
        ending = f"diverged: {run.lost}" if run.lost else f"val loss {run.val_loss:.4f}"
        left = (now - start) / number * (len(waiting) - number)
        more = f"; about {duration(left)} left" if number < len(waiting) else ""
        say(f"{place} {name}: {ending}, {duration(now - began)}{more}")


def _train_one(config: Config, data: TokenData, title: str) -> Run:
    """Trains a run to its end, unless it is known to have broken; what became of it."""
    lr, seed, path = config.optimizer.lr, config.run.seed, run_path(config)
    before = Run.from_records(lr, seed, read_metrics(path))
    if before.broke:
        return before
    try:
        with only_warnings():
            train(config, title=title, data=data)
    except UserError:
        after = Run.from_records(lr, seed, read_metrics(path))
        if not after.broke:  # a full disk, say, which is no matter of the rate
            raise
        return after
    return Run.from_records(lr, seed, read_metrics(path))


def report_lines(sweep: Sweep, verdict: Verdict) -> list[str]:
    """What to take from it, and what to type next."""
    lines = [f"picture  {sweep.out / 'sweep.png'}", f"numbers  {sweep.out / LEDGER_NAME}"]
    lines += [f"note     {note}" for note in verdict.notes]
    if verdict.next_lrs:
        lines.append(f"try      {sweep.again(verdict.next_lrs)}")
    if verdict.best is not None:
        best = next(rate for rate in verdict.rates if rate.lr == verdict.best)
        run = min(best.runs, key=lambda run: run.val_loss or 0.0)
        lines.append(f"best     {sweep.out / run_name(run.lr, run.seed)}")
    return lines


@contextmanager
def _held(out: Path) -> Iterator[None]:
    """Makes the folder and holds it: no second sweep can write there."""
    with ExitStack() as stack:
        try:
            out.mkdir(parents=True, exist_ok=True)
            stack.enter_context(locked(out / ".lock", wait=False))
        except HeldError as held:
            raise UserError(
                f"--out: {out} is in use by process {held.holder}; wait for it, or choose another "
                "--out"
            ) from None
        except OSError as error:
            place = error.filename or out
            raise UserError(
                f"--out: {place} cannot be written ({error.strerror}); choose another --out"
            ) from None
        yield


@contextmanager
def _saying_how_to_go_on(sweep: Sweep) -> Iterator[None]:
    try:
        yield
    except (Stopped, KeyboardInterrupt):
        say(f"stopped  what was trained is kept; go on with: {sweep.again(sweep.lrs)}")
        raise
