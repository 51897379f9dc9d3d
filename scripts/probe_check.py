"""How good the probes are: runs of a known kind, probed at several checkpoints; docs/probes.md.

    python scripts/probe_check.py --text shakespeare=FILE [--out DIR] [--only NAME]...
    python scripts/probe_check.py --text shakespeare=FILE --designs | --orders

Trains each run once and keeps it in DIR (default probe-runs); a run that is there is not trained
again. What is known of a run's rate is measured too: as many steps again as it has done, at its
rate and at twice that, the last fifth in a line down to 0.
"""

import argparse
import math
import os
import shutil
import statistics
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # these models only wait for a second thread

from gpt.configfile import load_config
from gpt.errors import only_warnings
from gpt.report.branches import Bench, Branch, drop
from gpt.report.evidence import paired
from gpt.report.origin import open_bench
from gpt.report.probe import Probe, probe
from gpt.train import train

MOMENTS = (0.4, 0.6, 0.8, 1.0)  # of a run, at which it is probed
ORDERS = 6
COMMON = (
    "eval.max_tokens=40000 eval.sample_tokens=0 checkpoint.keep=1000 log.every_steps=10 "
    "schedule.name=constant tokenizer.kind=bytes data.source=shakespeare"
)
# The runs that the rules were chosen on, besides others like them.
FIRST = f"{COMMON} model.n_layer=2 model.n_head=2 model.n_embd=32 model.context_len=32 "
FIRST += "train.batch_size=16 train.max_steps=1000"
# The runs that they are tried on: other texts, tokenizers, shapes, batches and optimizers.
CODE = f"{COMMON} data.source=python-stdlib tokenizer.kind=bpe tokenizer.vocab_size=512 "
CODE += "model.n_layer=3 model.n_head=3 model.n_embd=48 model.context_len=64 train.batch_size=8 "
CODE += "optimizer.betas=[0.9,0.999] train.max_steps=800"
VERSE = f"{COMMON} tokenizer.kind=chars model.n_layer=2 model.n_head=4 model.n_embd=64 "
VERSE += "model.context_len=32 model.activation=swiglu model.qk_norm=false model.init=gpt2 "
VERSE += "train.batch_size=32 train.max_steps=600"
LITTLE = f"{VERSE} data.source=little model.n_embd=96 train.max_steps=800 optimizer.lr=2e-3"
NARROW = f"{COMMON} model.n_layer=1 model.n_head=1 model.context_len=32 train.batch_size=32 "
NARROW += "train.max_steps=4000"
# Name: what is known of it, and its config.
RUNS = {
    "code-far-too-small": ("rate", f"{CODE} optimizer.lr=1e-4"),
    "code-too-small": ("rate", f"{CODE} optimizer.lr=5e-4"),
    "code-right": ("noise", f"{CODE} optimizer.lr=3e-3"),
    "code-too-large": ("noise", f"{CODE} optimizer.lr=3e-2"),
    "verse-far-too-small": ("rate", f"{VERSE} optimizer.lr=1e-4"),
    "verse-too-small": ("rate", f"{VERSE} optimizer.lr=4e-4"),
    "verse-right": ("noise", f"{VERSE} optimizer.lr=3e-3"),
    "verse-too-large": ("noise", f"{VERSE} optimizer.lr=2e-2"),
    "verse-cosine": ("noise", f"{VERSE} optimizer.lr=4e-3 schedule.name=warmup_cosine"),
    "verse-cosine-small": ("rate", f"{VERSE} optimizer.lr=3e-4 schedule.name=warmup_cosine"),
    "muon-right": ("noise", f"{CODE} optimizer.name=muon optimizer.lr=5e-3"),
    "muon-too-small": ("rate", f"{CODE} optimizer.name=muon optimizer.lr=3e-4"),
    "sgd-too-small": ("rate", f"{VERSE} optimizer.name=sgd optimizer.lr=2e-3"),
    "sgd-too-large": ("noise", f"{VERSE} optimizer.name=sgd optimizer.lr=0.3"),
    "little-text": ("data, in the end", LITTLE),
    "little-text-large-model": ("data, in the end", f"{LITTLE} model.n_layer=4"),
    "narrow-6": ("capacity", f"{NARROW} model.n_embd=6 optimizer.lr=3e-3"),
    "narrow-10": ("capacity", f"{NARROW} model.n_embd=10 optimizer.lr=1e-3"),
}
RATES = (1e-4, 5e-4, 1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2, 3.2e-2)


class Runs:
    """Runs in a folder, each trained when it is first asked for."""

    def __init__(self, out: Path, texts: dict[str, str]) -> None:
        self.out, self.texts = out, texts
        self.texts["little"] = str(out / "little.txt")
        out.mkdir(parents=True, exist_ok=True)
        text = Path(texts["shakespeare"]).read_text(encoding="utf-8")
        Path(self.texts["little"]).write_text(text[:60_000], encoding="utf-8")

    def run(self, name: str, words: str) -> Path:
        values = dict(word.split("=", 1) for word in words.split())
        values["data.source"] = self.texts.get(values["data.source"], values["data.source"])
        steps = int(values["train.max_steps"])
        values |= {"run.name": name, "run.dir": str(self.out), "data.dir": str(self.out / "data")}
        values |= {key: str(steps // 10) for key in ("eval.every_steps", "checkpoint.every_steps")}
        folder = self.out / name
        if not (folder / "checkpoints" / f"step-{steps:08d}").exists():
            with only_warnings():
                train(load_config(None, list(values.items())), title=name)
        return folder


def falling(steps: int, top: float) -> list[float]:
    """The cooldown of the probes."""
    return [top * (1 - math.sqrt((index + 1) / (steps + 1))) for index in range(steps)]


def late(steps: int, cooled: int, top: float) -> list[float]:
    """A rate that holds, and comes down in a line over the last `cooled` steps."""
    line = [top * (1 - (index + 1) / (cooled + 1)) for index in range(cooled)]
    return [top] * (steps - cooled) + line


def branch(bench: Bench, factors: Sequence[float]) -> Branch:
    return bench.branch(factors, lambda: None, lambda _: None)


def gain_of_double(bench: Bench, factors: Sequence[float]) -> float:
    """By how many nats twice the factors end lower than the factors; minus infinity: broke."""
    once, twice = branch(bench, factors), branch(bench, [2 * factor for factor in factors])
    assert once.val is not None
    return -math.inf if twice.val is None else drop(once.val, twice.val).value


def truth(folder: Path) -> float:
    """What twice the rate gains over as many steps again, as a share of the loss."""
    with only_warnings():
        bench = open_bench(folder, 0.2)
    loss = bench.validate(lambda _: None).mean
    return gain_of_double(bench, late(bench.step, bench.step // 5, 1.0)) / loss


@contextmanager
def cut(folder: Path, share: float) -> Iterator[Path]:
    """A copy of a run as it was after a share of its steps."""
    folders = sorted((folder / "checkpoints").glob("step-*"))
    with tempfile.TemporaryDirectory() as place:
        copy = Path(place) / folder.name
        (copy / "checkpoints").mkdir(parents=True)
        for name in ("config.yaml", "metrics.jsonl"):
            shutil.copy(folder / name, copy)
        for each in folders[: round(share * len(folders))]:
            shutil.copytree(each, copy / "checkpoints" / each.name)
        yield copy


def probes(folder: Path, kind: str) -> list[Probe]:
    found = []
    for share in MOMENTS:
        with cut(folder, share) as copy, only_warnings():
            found.append(probe(copy, kind))  # type: ignore[arg-type]
    return found


def counted(found: list[Probe]) -> str:
    counts = Counter(each.verdict.limit.replace("_", " ") for each in found)
    return ", ".join(f"{name} {count}" for name, count in counts.most_common())


def middle(values: Sequence[float]) -> str:
    return f"{statistics.median(values):+.0%}"


def check(runs: Runs, only: Sequence[str]) -> None:
    print("| run | known to be limited by | twice the rate, as long again | cooldown | double |")
    print("| --- | --- | --- | --- | --- |")
    for name, (known, words) in RUNS.items():
        if only and name not in only:
            continue
        folder = runs.run(name, words)
        cooled, double = probes(folder, "cooldown"), probes(folder, "double")
        row = [name, known, f"{truth(folder):+.1%}", counted(cooled), counted(double)]
        print(f"| {' | '.join(row)} |", flush=True)


def designs(runs: Runs) -> None:
    print("| rate | as long again | not cooled | second half cooled | cooled |")
    print("| --- | --- | --- | --- | --- |")
    for rate in RATES:
        folder = runs.run(f"first-{rate:g}", f"{FIRST} optimizer.lr={rate}")
        with only_warnings():
            bench = open_bench(folder, 0.2)
        steps = bench.step // 20
        half = [1.0] * (steps - steps // 2) + falling(steps // 2, 1.0)
        ways = [late(bench.step, bench.step // 5, 1.0), [1.0] * steps, half, falling(steps, 1.0)]
        row = [f"{rate:g}", *(f"{gain_of_double(bench, way):+.4f}" for way in ways)]
        print(f"| {' | '.join(row)} |", flush=True)


def orders(runs: Runs) -> None:
    print("| rate | steps | share that is noise | gain / total | win / total |")
    print("| --- | --- | --- | --- | --- |")
    for rate in RATES[1::2]:
        folder = runs.run(f"first-{rate:g}", f"{FIRST} optimizer.lr={rate}")
        with only_warnings():
            bench = open_bench(folder, 0.2)
        before, first = bench.validate(lambda _: None), bench.next_batch
        for steps in (20, 50, 200):
            shares = []
            for order in range(ORDERS):
                bench.next_batch = first + 1000 * order
                control, cooled, double = (
                    branch(bench, way)
                    for way in ([1.0] * steps, falling(steps, 1.0), falling(steps, 2.0))
                )
                assert control.val and cooled.val and double.val
                total = drop(before, cooled.val).value
                noise = paired(control.losses, cooled.losses).value
                gain, win = drop(control.val, cooled.val).value, drop(cooled.val, double.val).value
                shares.append([noise / total, gain / total, win / total])
            columns = list(zip(*shares, strict=True))
            cells = [f"{statistics.fmean(c):+.2f} ± {statistics.stdev(c):.2f}" for c in columns]
            print(f"| {rate:g} | {steps} | {' | '.join(cells)} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("--text", action="append", required=True, metavar="shakespeare=FILE")
    parser.add_argument("--out", type=Path, default=Path("probe-runs"))
    parser.add_argument("--only", action="append", default=[], metavar="NAME")
    parser.add_argument("--designs", action="store_true", help="which comparison tells the rate")
    parser.add_argument("--orders", action="store_true", help="what the order of batches changes")
    arguments = parser.parse_args()
    runs = Runs(arguments.out, dict(text.split("=", 1) for text in arguments.text))
    if arguments.designs:
        designs(runs)
    elif arguments.orders:
        orders(runs)
    else:
        check(runs, arguments.only)


if __name__ == "__main__":
    main()
