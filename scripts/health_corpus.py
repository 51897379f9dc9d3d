"""Trains small runs with known faults, and sound ones; then says how well `diagnose` tells them.

    python scripts/health_corpus.py make DIR [--only NAME] [--text FILE]
    python scripts/health_corpus.py judge DIR [--part tuned|apart|all] [--columns step,loss,lr]

`make` trains every case that DIR does not hold yet (about 15 minutes on one core). Every third
case of a kind is kept apart: no rule or limit was chosen with a look at those.
`judge` prints the confusion matrix, and when a run that goes on would have been told: a finding is
in time if it comes before a quarter of the steps from where the fault begins to the run's end.
"""

import argparse
import json
import math
import multiprocessing
import os
import random
import shutil
import signal
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gpt.history import History

os.environ.setdefault("OMP_NUM_THREADS", "1")

HEALTHY = "healthy"
GPT2 = {
    "position": "learned",
    "norm": "layernorm",
    "activation": "gelu_tanh",
    "bias": "true",
    "tie_embeddings": "true",
    "qk_norm": "false",
    "init": "gpt2",
}
LLAMA = {"activation": "swiglu", "qk_norm": "false", "init": "gpt2"}
SHAPES = [(2, 2, 32, 32), (2, 4, 64, 64), (3, 2, 48, 48), (2, 2, 64, 32), (4, 4, 64, 32)]


@dataclass
class Case:
    """A run to make: its expected first finding, config values, and what is done to it."""

    name: str
    expected: str
    values: dict[str, str]
    text: str = "stdlib"
    begin: float = 0.0  # where the fault begins, as a share of the run; nan: at the best evaluation
    inject: Callable[[Any, int], None] | None = field(default=None)
    apart: bool = False


def base(index: int, steps: int, **more: str) -> dict[str, str]:
    """A small run whose shape, batch, log interval and seed vary with the index."""
    layers, heads, width, context = SHAPES[index % len(SHAPES)]
    values = {
        "tokenizer.kind": ("bytes", "bpe")[index % 2],
        "tokenizer.vocab_size": str((512, 1024)[index // 2 % 2]),
        "model.n_layer": str(layers),
        "model.n_head": str(heads),
        "model.n_embd": str(width),
        "model.context_len": str(context),
        "train.max_steps": str(steps),
        "train.batch_size": str((8, 16, 12)[index % 3]),
        "eval.every_steps": str(max(10, steps // 12)),
        "eval.max_tokens": "12000",
        "eval.sample_tokens": "0",
        "checkpoint.every_steps": str(steps),
        "checkpoint.keep": "1",
        "log.every_steps": str((1, 5, 10)[index % 3]),
        "run.seed": str(100 + index),
        "schedule.warmup_fraction": "0.04",
    }
    style = (None, GPT2, LLAMA)[index % 3]
    for key, value in (style or {}).items():
        values[f"model.{key}"] = value
    return values | {key.replace("__", "."): value for key, value in more.items()}


GOOD = {"adamw": "3e-3", "adam": "3e-3", "muon": "1e-2", "adafactor": "3e-2", "sgd": "0.3"}


def optimizer(name: str, factor: float = 1.0) -> dict[str, str]:
    """An optimizer at a good rate for these sizes, times a factor."""
    decay = "0.0" if name in ("sgd", "adam") else "0.1"
    rate = f"{float(GOOD[name]) * factor:.3g}"
    return {
        "optimizer__name": name,
        "optimizer__lr": rate,
        "optimizer__weight_decay": decay,
    }


def cases(round_number: int = 1) -> Iterator[Case]:
    """All of them; the index moves shapes, data and seeds, and the round moves the index.

    Every third case of the first round is kept apart, and all of the later ones.
    """
    index = 1000 * (round_number - 1)
    counts: Counter[str] = Counter()

    def take(expected: str, steps: int, tag: str, **more: Any) -> Case:
        nonlocal index
        index += 1
        known = {key: more.pop(key) for key in ("text", "begin", "inject") if key in more}
        counts[expected] += 1
        name = f"{expected}-{tag}-{index:03d}"
        apart = round_number > 1 or counts[expected] % 3 == 0
        return Case(name, expected, base(index, steps, **more), apart=apart, **known)

    yield from healthy_cases(take)
    yield from rate_cases(take)
    yield from course_cases(take)
    yield from data_cases(take)
    yield from broken_cases(take)


def healthy_cases(take: Callable[..., Case]) -> Iterator[Case]:
    """Sound runs over optimizers, schedules, lengths, texts."""
    for round_ in range(5):
        for name in ("adamw", "muon", "adam", "adafactor", "sgd"):
            if name == "sgd" and round_ > 1:
                continue
            schedule = ("warmup_cosine", "wsd", "linear", "hf_cosine", "polynomial")[round_]
            steps = (400, 250, 600, 150, 800)[(round_ + len(name)) % 5]
            more = {"schedule__name": schedule}
            if schedule != "hf_cosine":
                more["schedule__min_lr"] = "0"
            if round_ == 4:
                more["model__dropout"] = "0.1"
            yield take(HEALTHY, steps, f"{name}-{schedule}", **optimizer(name), **more)
    for factor in (0.4, 0.6, 1.6, 2.0):
        yield take(HEALTHY, 500, f"adamw-x{factor}", **optimizer("adamw", factor))
    yield take(HEALTHY, 40, "short", **optimizer("adamw"))
    yield take(HEALTHY, 80, "short", **optimizer("muon"))
    yield take(HEALTHY, 500, "adamw-x1.3", **optimizer("adamw", 1.3))


def rate_cases(take: Callable[..., Case]) -> Iterator[Case]:
    """Rates far from where they should be."""
    small = [("adamw", 1 / 50), ("adamw", 1 / 300), ("adamw", 1 / 3000), ("adamw", 1 / 100)]
    small += [("muon", 1 / 100), ("muon", 1 / 1000), ("adam", 1 / 60), ("adam", 1 / 1000)]
    small += [("sgd", 1 / 300), ("sgd", 1 / 3000), ("adafactor", 1 / 200), ("adamw", 1 / 30)]
    for number, (name, factor) in enumerate(small):
        steps = (300, 500)[number % 2]
        yield take("lr_too_small", steps, f"{name}-{factor:.2g}", **optimizer(name, factor))
    large = [("adamw", 30), ("adamw", 100), ("adamw", 300), ("adam", 50), ("adam", 200)]
    large += [("muon", 60), ("muon", 200), ("sgd", 60), ("sgd", 300), ("adamw", 60)]
    for number, (name, factor) in enumerate(large):
        steps = (300, 500)[number % 2]
        yield take("lr_too_large", steps, f"{name}-x{factor}", **optimizer(name, factor))


def course_cases(take: Callable[..., Case]) -> Iterator[Case]:
    """Faults of the rate's course, overfitting, plateaus, dead layers, spikes."""
    for name in ("adamw", "muon", "adamw", "adam", "adafactor"):
        more = optimizer(name) | {"schedule__name": "constant"}
        yield take("no_decay", 500, name, begin=0.8, **more)
    yield take("no_decay", 500, "floor", begin=0.8, **optimizer("adamw"), schedule__min_lr="2.9e-3")
    for number, name in enumerate(("adamw", "muon", "adam", "adamw", "adamw")):
        yield take(
            "overfitting",
            900,
            name,
            text=f"tiny{number}",
            begin=math.nan,
            **optimizer(name, 1.5) | {"model__n_embd": "64", "model__n_head": "4"},
        )
    for number, name in enumerate(("adamw", "muon", "adam", "adamw", "muon")):
        # Half a percent to four percent better with a warmup of 30 steps, measured.
        more = optimizer(name, (3.3, 10, 5, 4, 12)[number])
        more |= {"schedule__warmup_fraction": "0", "schedule__min_lr": "0"}
        more |= {f"model__{key}": value for key, value in GPT2.items()}
        more |= {"train__grad_clip": "null", "model__tie_embeddings": "false"}
        more |= {"model__n_layer": "4", "model__n_embd": "64", "model__n_head": "4"}
        more |= {"optimizer__betas": "[0.9, 0.999]", "tokenizer__kind": "bytes"}
        more |= {"model__init_std": "0.1" if name == "muon" else "0.02"}
        yield take("warmup_too_short", 500, "gpt2", **more)
    for number, name in enumerate(("adamw", "muon", "adamw", "adam")):
        yield take("plateau", 900, name, text=f"cycle{number}", begin=0.1, **optimizer(name))
    for name in ("adamw", "adam", "adamw", "adamw"):
        more = optimizer(name) | {"model__init": "gpt2", "model__init_std": "1e-7"}
        more |= {"model__activation": "relu2", "model__norm_eps": "1e-3"}
        yield take("dead_layer", 400, name, **more)
    for share in (0.4, 0.5, 0.6, 0.7):
        more = optimizer("adamw")
        yield take("spike", 500, f"{share}", begin=share, inject=Spike(share), **more)


def data_cases(take: Callable[..., Case]) -> Iterator[Case]:
    """Faults of the text and of the machine."""
    for number, name in enumerate(("adamw", "muon", "adamw", "adam")):
        letters = optimizer(name) | {"tokenizer__kind": "bytes"}
        yield take("stuck_at_chance", 400, name, text=f"noise{number}", **letters)
        yield take("data_duplicate", 400, name, text=f"repeat{number}", **optimizer(name))
        yield take("data_leak", 400, name, text=f"leak{number}", **optimizer(name))
        ranks = {"tokenizer__kind": "RANKS"}
        yield take("wrong_tokenizer", 300, name, text="chinese", **optimizer(name), **ranks)
        yield take("data_order", 400, name, **optimizer(name), data__shuffle="false")
    for share in (0.4, 0.5, 0.6):
        yield take(
            "throughput", 700, f"{share}", begin=share, inject=Hog(share), **optimizer("adamw")
        )


def broken_cases(take: Callable[..., Case]) -> Iterator[Case]:
    """Numbers that stop being finite."""
    for factor in (300, 3000):
        more = optimizer("sgd", factor) | {"train__grad_clip": "null", "model__qk_norm": "false"}
        yield take("nonfinite", 300, "rate", **more)
    for number in range(2):
        more = optimizer("adamw") | {"train__dtype": "fp16", "model__activation": "relu2"}
        more |= {"model__init": "gpt2", "model__init_std": "1", "model__n_layer": "1"}
        more |= {"model__qk_norm": "false", "model__n_embd": "512", "model__n_head": "2"}
        more |= {"model__n_hidden": ("8192", "12288")[number], "model__norm": "rmsnorm"}
        yield take("nonfinite", 120, "fp16", **more)
    yield take("plateau", 900, "words", text="words", begin=0.1, **optimizer("adamw"))
    for share in (0.3, 0.6):
        yield take(
            "nonfinite", 300, "batch", begin=share, inject=Poison(share), **optimizer("adamw")
        )


@dataclass
class Spike:
    """Some batches of noise at a multiple of the rate, from a share of the run on."""

    share: float

    def __call__(self, step_module: Any, total: int) -> None:
        import torch

        original, first = step_module.train_step, int(self.share * total)

        def train_step(training: Any, inputs: Any, targets: Any, **more: Any) -> Any:
            step = training.progress.step
            if first <= step < first + 4:
                generator = torch.Generator().manual_seed(step)
                ids = training.model.vocab_size
                inputs = torch.randint(0, ids, inputs.shape, generator=generator)
                targets = torch.randint(0, ids, targets.shape, generator=generator)
                for group in training.optimizer.param_groups:
                    group["lr"] *= 3
            return original(training, inputs, targets, **more)

        step_module.train_step = train_step


@dataclass
class Poison:
    """Gradients that are not numbers, from a share of the run on, for good."""

    share: float

    def __call__(self, step_module: Any, total: int) -> None:
        original, first = step_module._backward, int(self.share * total)

        def backward(training: Any, inputs: Any, targets: Any) -> float:
            loss: float = original(training, inputs, targets)
            if training.progress.step >= first:
                training.model.head.weight.grad[0, 0] = math.nan
            return loss

        step_module._backward = backward


@dataclass
class Hog:
    """Other processes on all cores, from a share of the run on."""

    share: float

    def __call__(self, step_module: Any, total: int) -> None:
        original, first = step_module.train_step, int(self.share * total)
        started: list[Any] = []

        def train_step(training: Any, *batch: Any, **more: Any) -> Any:
            if training.progress.step >= first and not started:
                for _ in range(3 * (os.cpu_count() or 1)):
                    hog = multiprocessing.get_context("fork").Process(target=_spin, daemon=True)
                    hog.start()
                    started.append(hog)
            return original(training, *batch, **more)

        step_module.train_step = train_step


def _spin() -> None:
    while True:
        pass


def write_texts(folder: Path, extra: Path | None) -> dict[str, str]:
    """The texts by name, made from Python's own library or drawn at random."""
    folder.mkdir(parents=True, exist_ok=True)
    lib = Path(os.__file__).parent
    modules = sorted(lib.glob("*.py"), key=lambda path: path.name)
    texts = {"stdlib": "python-stdlib", "chinese": str(folder / "chinese.txt")}
    if extra is not None:
        texts["extra"] = str(extra)
    chinese = Path(__file__).parent.parent / "README.zh-CN.md"
    han = [c for c in chinese.read_text(encoding="utf-8") if "一" <= c <= "鿿"]
    rng = random.Random(5)
    (folder / "chinese.txt").write_text(
        "\n".join("".join(rng.choices(han, k=60)) + "。" for _ in range(2000)), encoding="utf-8"
    )
    words = ["the", "cat", "sat", "on", "a", "mat", "and", "ran", "far", "off", "with", "him"]
    (folder / "words.txt").write_text(
        "\n".join(" ".join(rng.choices(words, k=rng.randint(4, 20))) for _ in range(20_000))
    )
    texts["words"] = str(folder / "words.txt")
    for number in range(5):
        body = modules[10 + 7 * number].read_text(encoding="utf-8", errors="ignore")
        rng = random.Random(number)
        small = body[: 5_000 + 1_000 * number]
        letters = "abcdefghijklmnopqrstuvwxyz \n"
        weights = [1 + (3 * k) % 11 for k in range(len(letters))]
        noise = "".join(rng.choices(letters, weights, k=300_000))
        cycle = "".join(f"{k % 10}{'abc'[k % 3]}{rng.choice('xy')}" for k in range(60_000))
        one = "\n".join(p.read_text(encoding="utf-8", errors="ignore") for p in modules[:40])
        texts |= {
            f"tiny{number}": _put(folder, f"tiny{number}", small),
            f"noise{number}": _put(folder, f"noise{number}", noise),
            f"cycle{number}": _put(folder, f"cycle{number}", cycle),
            f"repeat{number}": _put(folder, f"repeat{number}", one[:40_000] + small * 40),
            f"leak{number}": _put(folder, f"leak{number}", one[:400_000] + one[50_000:80_000]),
        }
    return texts


def _put(folder: Path, name: str, text: str) -> str:
    path = folder / f"{name}.txt"
    path.write_text(text, encoding="utf-8")
    return str(path)


def make(out: Path, only: str | None, extra: Path | None, round_number: int = 1) -> None:
    """Trains what is missing, a process a run, one after the other."""
    texts = write_texts(out / "texts", extra)
    for number, case in enumerate(cases(round_number)):
        if round_number > 1 and number % 2:
            continue  # half of them
        run = out / "runs" / case.name
        if (run / "expected.json").exists() or (only and only not in case.name):
            continue
        shutil.rmtree(run, ignore_errors=True)
        process = multiprocessing.get_context("fork").Process(
            target=make_one, args=(case, out, texts)
        )
        process.start()
        process.join()
        print(case.name, process.exitcode, flush=True)


def make_one(case: Case, out: Path, texts: dict[str, str]) -> None:
    """Trains one case in this process."""
    import gpt.step
    import gpt.train
    from gpt.configfile import load_config
    from gpt.errors import UserError

    os.setpgrp()
    values = case.values | {
        "run.name": case.name,
        "run.dir": str(out / "runs"),
        "data.dir": str(out / "data"),
        "data.source": texts[case.text],
    }
    if values["tokenizer.kind"] == "RANKS":
        values["tokenizer.kind"] = str(ranks_file(out))
    config = load_config(None, list(values.items()))
    if case.inject is not None:
        case.inject(gpt.step, config.total_steps(0))
        gpt.train.train_step = gpt.step.train_step
    try:
        sys.stderr = open(os.devnull, "w")  # noqa: PTH123, SIM115
        gpt.train.train(config)
    except UserError as error:
        print(f"  {error}", file=sys.stdout, flush=True)
    run = out / "runs" / case.name
    shutil.rmtree(run / "checkpoints", ignore_errors=True)
    begin = case.begin if math.isfinite(case.begin) else "best"
    (run / "expected.json").write_text(
        json.dumps({"expected": case.expected, "begin": begin, "apart": case.apart})
    )
    os.killpg(0, signal.SIGKILL)  # and whatever was started beside goes with it


def ranks_file(out: Path) -> Path:
    """A BPE trained on Python's library, to be used on another language."""
    path = out / "tokenizer" / "tokenizer.tiktoken"
    if not path.exists():
        from gpt.configfile import load_config
        from gpt.data import make_tokenizer

        keys = [("tokenizer.kind", "bpe"), ("tokenizer.vocab_size", "2048")]
        _, tokenizer = make_tokenizer(load_config(None, keys), progress=False)
        path.parent.mkdir(parents=True, exist_ok=True)
        tokenizer.save(path.parent)
    return path


@dataclass
class Verdict:
    """What `diagnose` made of one run."""

    name: str
    expected: str
    found: list[str]
    told: float | None  # share of the wasted steps after which the finding came
    early: list[str]  # what was told on the way, in order


def as_foreign(history: "History", columns: list[str]) -> "History":
    """The same run as a log of another program would tell it: a table and the evaluations."""
    from gpt.history import History, Table

    known = history.train.columns
    return History(
        name=history.name,
        source="csv",
        train=Table({name: known[name] for name in columns if name in known}),
        evals=history.evals,
        layers=Table.from_records([]),
    )


def judge_one(run: Path, columns: list[str]) -> Verdict:
    """The run's first finding, and when it would have been told."""
    from gpt.health.diagnose import diagnose
    from gpt.history import read_run

    known = json.loads((run / "expected.json").read_text())
    history = read_run(run)
    if columns:
        history = as_foreign(history, columns)
    last = history.total_steps or history.last_step
    begin = known["begin"]
    if begin == "best":
        evals = history.evals
        begin_step = float(evals["step"][int(evals["val_loss"].argmin())])
    else:
        begin_step = begin * last
    told, early = None, []
    steps = sorted({0, *map(int, history.train["step"]), *(int(e["step"]) for e in history.events)})
    stride = max(1, len(steps) // 100)
    for step in steps[::stride]:
        for finding in diagnose(history.until(step)):
            if finding.id not in early:
                early.append(finding.id)
            if finding.id == known["expected"] and told is None:
                told = max(0.0, step - begin_step) / max(1.0, last - begin_step)
    found = [finding.id for finding in diagnose(history)]
    return Verdict(run.name, known["expected"], found, told, early)


def judge(out: Path, part: str, columns: list[str], *, verbose: bool) -> None:
    """Prints the confusion matrix of a part, and what was late."""
    verdicts = []
    for run in sorted((out / "runs").iterdir()):
        if not (run / "metrics.jsonl").exists() or not (run / "expected.json").exists():
            continue
        apart = json.loads((run / "expected.json").read_text())["apart"]
        if part != "all" and apart != (part == "apart"):
            continue
        verdicts.append(judge_one(run, columns))
    matrix = Counter((v.expected, (v.found or [HEALTHY])[0]) for v in verdicts)
    names = sorted({name for pair in matrix for name in pair})
    print(f"part {part}: rows are what was wrong, columns the first finding")
    for name in names:
        row = {other: matrix[name, other] for other in names if matrix[name, other]}
        if row:
            print(f"{name:18}", "  ".join(f"{other} {count}" for other, count in row.items()))
    faulty = [v for v in verdicts if v.expected != HEALTHY]
    right = [v for v in faulty if v.found[:1] == [v.expected]]
    in_time = [v for v in right if v.told is not None and v.told <= 0.25]
    sound = [v for v in verdicts if v.expected == HEALTHY]
    silent = [v for v in sound if not v.found and not v.early]
    print(
        f"first finding right: {len(right)} of {len(faulty)}; of these in time: {len(in_time)}; "
        f"sound runs without any finding, on the way or at the end: {len(silent)} of {len(sound)}"
    )
    if verbose:
        for v in verdicts:
            fine = v in in_time or v in silent
            if not fine:
                print(f"  {v.name}: found {v.found}, told at {v.told}, on the way {v.early}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("what", choices=("make", "judge", "list"))
    parser.add_argument("dir", type=Path)
    parser.add_argument("--only")
    parser.add_argument("--text", type=Path)
    parser.add_argument("--part", choices=("tuned", "apart", "all"), default="all")
    parser.add_argument("--round", type=int, default=1, help="make: 2 and up, other runs")
    parser.add_argument(
        "--columns", help="judge: what is left of the log, as step,loss,lr; and the evaluations"
    )
    parser.add_argument("--verbose", action="store_true")
    arguments = parser.parse_args()
    if arguments.what == "list":
        counts = Counter((case.expected, case.apart) for case in cases())
        for (expected, apart), count in sorted(counts.items()):
            print(expected, "apart" if apart else "tuned", count)
    elif arguments.what == "make":
        make(arguments.dir, arguments.only, arguments.text, arguments.round)
    else:
        judge(
            arguments.dir,
            arguments.part,
            arguments.columns.split(",") if arguments.columns else [],
            verbose=arguments.verbose,
        )


if __name__ == "__main__":
    main()
