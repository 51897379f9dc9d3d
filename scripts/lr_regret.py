"""How good is `gpt-lr find`? Its picks against full trainings at a grid of rates, case by case.

For each case: full trainings at rates a factor of sqrt(2) apart over several seeds, a pick by the
finder, full trainings at the pick, and the picks of published rules on the finder's own ramps.
Regret is the mean final validation loss at a pick over that of the best rate of the grid.

    python scripts/lr_regret.py --text shakespeare=FILE --text chinese=FILE [--case NAME]...

Cases whose text is not given are left out. What is done is appended to --out, so that a run that
was stopped goes on; `--table` prints the results as Markdown.
"""

import argparse
import json
import math
import os
import statistics
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")  # two cases side by side beat two threads

from lr_rules import RULES, STEPS, stopped

from gpt.config import Config
from gpt.configfile import load_config
from gpt.data import TokenData, open_data
from gpt.device import set_threads
from gpt.lr.find import DEFAULT_RAMP, RAMP, find
from gpt.lr.trial import Laboratory
from gpt.malloc import keep_freed_memory

SEEDS = 3
SHARE = 0.15
GRID = 0.5  # octaves
DIVERGED = 20.0  # nats: what a training that broke down counts as

GPT2 = (
    "model.position=learned model.norm=layernorm model.activation=gelu_tanh model.bias=true "
    "model.tie_embeddings=true model.qk_norm=false model.init=gpt2"
)
SGD = "optimizer.name=sgd optimizer.weight_decay=0"
ADAM = "optimizer.name=adam optimizer.weight_decay=0"
MUON = "optimizer.name=muon"
LLAMA = "model.norm=rmsnorm model.activation=swiglu model.qk_norm=false model.init=gpt2"


def case(text: str, shape: str, batch: int, steps: int, *more: str) -> str:
    """A case in one line: layers x heads x width x context, and whatever differs."""
    layers, heads, width, context = shape.split("x")
    return " ".join(
        [
            f"text={text} model.n_layer={layers} model.n_head={heads} model.n_embd={width}",
            f"model.context_len={context} train.batch_size={batch} train.max_steps={steps}",
            *more,
        ]
    )


# None of these was looked at while the finder was built.
CASES = {
    "adamw-sh": case("shakespeare", "2x2x48x32", 8, 500),
    "adamw-py": case("python", "2x4x64x32", 8, 400),
    "adamw-zh": case("chinese", "3x2x32x32", 8, 500),
    "gpt2-sh": case("shakespeare", "2x2x32x32", 8, 600, GPT2),
    "gpt2-py-wide": case("python", "1x4x96x32", 8, 400, GPT2),
    "gpt2-zh-deep": case("chinese", "6x2x32x32", 4, 500, GPT2),
    "llama-sh": case("shakespeare", "2x2x48x32", 4, 800, LLAMA, "schedule.name=linear"),
    "llama-py": case("python", "2x2x32x64", 8, 400, LLAMA, "optimizer.weight_decay=0.01"),
    "adamw-batch-2": case("shakespeare", "2x2x32x32", 2, 1500),
    "adamw-batch-32": case("python", "2x2x32x32", 32, 250),
    "adamw-wsd": case("chinese", "2x2x32x32", 8, 600, "schedule.name=wsd"),
    "adamw-hf": case("shakespeare", "2x2x64x32", 8, 400, "schedule.name=hf_cosine"),
    "adamw-constant": case("python", "2x2x32x32", 8, 600, "schedule.name=constant"),
    "adamw-accumulate": case("chinese", "2x2x48x32", 8, 400, "train.micro_batch_size=4"),
    "adam-sh": case(
        "shakespeare", "2x2x48x32", 8, 500, "optimizer.name=adam optimizer.weight_decay=0"
    ),
    "muon-sh": case("shakespeare", "2x2x48x32", 8, 400, MUON),
    "muon-py-two-rates": case(
        "python",
        "2x2x32x32",
        8,
        400,
        MUON,
        "optimizer.lr=1e-2 optimizer.adamw_lr=3e-3",
    ),
    "muon-zh-linear": case(
        "chinese", "2x2x32x32", 16, 300, "optimizer.name=muon schedule.name=linear"
    ),
    "sgd-sh": case(
        "shakespeare", "2x2x32x32", 8, 800, "optimizer.name=sgd optimizer.weight_decay=0"
    ),
    "sgd-zh": case("chinese", "1x2x48x32", 8, 600, SGD),
    "adafactor-py": case("python", "2x2x48x32", 8, 400, GPT2, "optimizer.name=adafactor"),
}


def read_case(words: str, texts: dict[str, str], folder: str) -> Config | None:
    """The config of a case; None if its text was not given."""
    pairs = dict(word.split("=", 1) for word in words.split())
    text = pairs.pop("text")
    if text not in texts:
        return None
    common = {
        "data.source": texts[text],
        "data.dir": f"{folder}/data",
        "tokenizer.kind": "chars" if text == "shakespeare" else "bpe",
        "tokenizer.vocab_size": "512",
        "eval.max_tokens": "30000",
        "train.device": "cpu",
    }
    return load_config(None, list((common | pairs).items()))


class Ledger:
    """Full trainings that were done: appended to a file as they end, read back at the start."""

    def __init__(self, path: Path) -> None:
        self.path = path
        lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
        self.records: list[dict[str, Any]] = [json.loads(line) for line in lines]

    def add(self, record: dict[str, Any]) -> None:
        self.records.append(record)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")

    def of(self, kind: str, name: str) -> Iterator[dict[str, Any]]:
        return (r for r in self.records if r["kind"] == kind and r["case"] == name)


class Grid:
    """The final losses of one case's full trainings, by half octave and seed, run when asked."""

    def __init__(self, name: str, config: Config, data: TokenData, ledger: Ledger) -> None:
        self.name, self.config, self.data, self.ledger = name, config, data, ledger
        self.losses = {(r["lr"], r["seed"]): r["loss"] for r in ledger.of("full", name)}

    def loss(self, lr: float, seed: int) -> float:
        if (lr, seed) not in self.losses:
            laboratory = Laboratory(self.config, self.data)
            trial = laboratory.run(lr, laboratory.total_steps, self.config.run.seed + seed)
            loss = trial.loss if math.isfinite(trial.loss) else DIVERGED
            self.ledger.add(
                {"kind": "full", "case": self.name, "lr": lr, "seed": seed, "loss": loss}
            )
            self.losses[lr, seed] = loss
        return self.losses[lr, seed]

    def mean(self, lr: float, seeds: int = SEEDS) -> float:
        return statistics.mean(self.loss(lr, seed) for seed in range(seeds))

    def best(self) -> tuple[float, float]:
        """The best rate of the grid and its mean loss.

        One seed finds the valley two octaves wide, then every half octave in it is run with all
        seeds, and further on either side until the loss is 2 % above the lowest.
        """
        start = 0.25 if self.config.optimizer.name == "sgd" else 2.0**-8
        octave = math.log2(start)
        while self.loss(2 ** (octave + 1), 0) < self.loss(2**octave, 0):
            octave += 1
        while self.loss(2 ** (octave - 1), 0) < self.loss(2**octave, 0):
            octave -= 1
        means = {octave: self.mean(2**octave)}
        for sign in (1, -1):
            here = octave + sign * GRID
            means[here] = self.mean(2**here)
            while means[here] < 1.02 * min(means.values()) and abs(here - octave) < 6:
                here += sign * GRID
                means[here] = self.mean(2**here)
        best = min(means, key=means.__getitem__)
        return 2**best, means[best]


def compare(name: str, grid: Grid) -> None:
    """Everything about one case that is not in the ledger yet."""
    config, data, ledger = grid.config, grid.data, grid.ledger
    best, lowest = grid.best()
    if not list(ledger.of("pick", name)):
        total = Laboratory(config, data).total_steps
        found = find(config, data, budget_steps=SHARE * total)
        record = {"lr": found.lr, "interval": found.interval, "reason": found.reason}
        share = {"share": found.share_of_training, "seconds": found.seconds}
        ledger.add({"kind": "pick", "case": name, **record, **share})
    (pick,) = ledger.of("pick", name)
    if pick["lr"] is not None:
        grid.mean(pick["lr"])
    if not list(ledger.of("rules", name)):
        laboratory = Laboratory(config, data)
        rates, trial = laboratory.ramp(*RAMP.get(config.optimizer.name, DEFAULT_RAMP), STEPS, 1337)
        ramp = stopped(rates, trial.losses)
        picks = {rule: float(choose(*ramp)) for rule, choose in RULES.items()}
        ledger.add({"kind": "rules", "case": name, **picks})
    (rules,) = ledger.of("rules", name)
    for rule in RULES:
        grid.loss(snapped(rules[rule]), 0)
    print(name, f"best {best:.2e} ({lowest:.4f}), pick {pick['lr']}", flush=True)


def snapped(lr: float) -> float:
    """The nearest rate of the grid."""
    return float(2 ** (round(math.log2(lr) / GRID) * GRID))


def table(ledger: Ledger) -> list[str]:
    """Markdown: a line a case, then how often each rule was within 1 % and 3 %."""
    lines = [
        "| case | steps | best rate | its loss | pick | interval | regret | cost |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    regrets: dict[str, list[float]] = {"gpt-lr find": [], **{rule: [] for rule in RULES}}
    for name in CASES:
        pick, rules = (next(ledger.of(kind, name), None) for kind in ("pick", "rules"))
        if pick is None or rules is None:
            continue
        ends: dict[float, dict[int, float]] = {}
        for record in ledger.of("full", name):
            ends.setdefault(record["lr"], {})[record["seed"]] = record["loss"]
        means = {lr: statistics.mean(v.values()) for lr, v in ends.items() if len(v) == SEEDS}
        needed = {snapped(rules[rule]) for rule in RULES}
        if not needed <= set(ends) or (pick["lr"] is not None and pick["lr"] not in means):
            continue  # still under way
        best = min((lr for lr in means if lr == snapped(lr)), key=means.__getitem__)
        steps = CASES[name].partition("train.max_steps=")[2].split()[0]
        row = f"| {name} | {steps} | {best:.2g} | {means[best]:.4f} |"
        cost = f"{100 * pick['share']:.0f} % |"
        if pick["lr"] is None:
            lines.append(f"{row} no answer | | | {cost}")
        else:
            regret = 100 * (means[pick["lr"]] / means[best] - 1)
            regrets["gpt-lr find"].append(regret)
            low, high = pick["interval"]
            lines.append(
                f"{row} {pick['lr']:.2g} | {low:.2g}–{high:.2g} | {regret:+.2f} % | {cost}"
            )
        for rule in RULES:
            same_seed = ends[best][0]
            regrets[rule].append(100 * (ends[snapped(rules[rule])][0] / same_seed - 1))
    lines += [
        "",
        "| rule | cases | median regret | within 1 % | within 3 % | worst |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for rule, values in regrets.items():
        if values:
            within = " | ".join(str(sum(v <= limit for v in values)) for limit in (1, 3))
            lines.append(
                f"| {rule} | {len(values)} | {statistics.median(values):.2f} % | {within} | "
                f"{max(values):.1f} % |"
            )
    return lines


def parser(description: str | None, cases: dict[str, str], out: str) -> argparse.ArgumentParser:
    """The options that the experiments of the finder share."""
    options = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawTextHelpFormatter
    )
    options.add_argument("--text", action="append", default=[], metavar="NAME=FILE")
    options.add_argument("--case", action="append", choices=list(cases))
    options.add_argument("--out", type=Path, default=Path(out))
    options.add_argument("--table", action="store_true", help="print what is there, run nothing")
    return options


def chosen_cases(
    arguments: argparse.Namespace, cases: dict[str, str]
) -> Iterator[tuple[str, Config, TokenData]]:
    """The cases that were asked for and whose text was given, ready to train on one thread."""
    texts = {"python": "python-stdlib", **dict(text.split("=", 1) for text in arguments.text)}
    set_threads()
    keep_freed_memory()
    with tempfile.TemporaryDirectory() as folder:
        for name in arguments.case or list(cases):
            config = read_case(cases[name], texts, folder)
            if config is not None:
                yield name, config, open_data(config, progress=False)


def main() -> None:
    """Runs what is missing, or prints the table."""
    options = parser(__doc__, CASES, "lr-regret.jsonl")
    options.add_argument("--grid-only", action="store_true", help="only the grid, no finder")
    arguments = options.parse_args()
    ledger = Ledger(arguments.out)
    if arguments.table:
        print("\n".join(table(ledger)))
        return
    for name, config, data in chosen_cases(arguments, CASES):
        grid = Grid(name, config, data, ledger)
        if arguments.grid_only:
            print(name, *grid.best(), flush=True)
        else:
            compare(name, grid)


if __name__ == "__main__":
    main()
