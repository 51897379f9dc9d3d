"""How the best rate falls with the length of the run: what `gpt-lr find` carries its answer by.

For each case, trainings of T/64 ... T steps, each with its whole schedule, at rates two times
apart; the best rate of each length is the middle of its valley. The power is the slope of its
logarithm between a length and T.

    python scripts/lr_horizon.py --text shakespeare=FILE --text chinese=FILE [--case NAME]...

Resumable as lr_regret.py is, whose cases are others; `--table` prints the results as Markdown.
"""

import math

from lr_regret import (
    ADAM,
    DIVERGED,
    GPT2,
    LLAMA,
    MUON,
    SGD,
    Ledger,
    case,
    chosen_cases,
    parser,
)

from gpt.lr.decide import minimum
from gpt.lr.trial import Laboratory

SHARES = (64, 32, 16, 8, 1)
SEEDS = 2
ADAM_999 = f"{ADAM} optimizer.betas=[0.9,0.999]"
CASES = {
    "adamw": case("shakespeare", "2x2x32x32", 8, 600),
    "adamw, GPT-2": case("python", "2x2x48x32", 8, 400, GPT2, "schedule.warmup_fraction=0.05"),
    "muon": case("chinese", "2x2x32x32", 8, 400, MUON),
    "sgd": case("python", "1x2x48x32", 4, 800, SGD),
    "adamw, GPT-2, deep": case("shakespeare", "4x2x32x32", 16, 300, GPT2),
    "adamw, constant": case("shakespeare", "1x2x32x32", 4, 1600, "schedule.name=constant"),
    "adam, LLaMA": case("chinese", "2x2x32x32", 8, 500, LLAMA, ADAM_999),
    "adafactor": case("shakespeare", "2x2x32x32", 8, 600, "optimizer.name=adafactor"),
}
START = {"sgd": -3.0, "adafactor": -5.0}


def walk(laboratory: Laboratory, ledger: Ledger, name: str, steps: int, start: float) -> None:
    """Runs rates two times apart, up and down, until the loss is well above the lowest."""
    for seed in range(SEEDS):
        done = {r["octave"]: r["loss"] for r in ledger.of(str(steps), name) if r["seed"] == seed}

        def at(octave: float, seed: int = seed, done: dict[float, float] = done) -> float:
            if octave not in done:
                loss = laboratory.run(2**octave, steps, seed).loss
                done[octave] = loss if math.isfinite(loss) else DIVERGED
                record = {"octave": octave, "seed": seed, "loss": done[octave]}
                ledger.add({"kind": str(steps), "case": name, **record})
            return done[octave]

        at(start)
        for sign in (1, -1):
            octave = start + sign
            while abs(octave - start) <= 8 and at(octave) < min(done.values()) + 0.2:
                octave += sign


def table(ledger: Ledger) -> list[str]:
    """Markdown: the best rate at each length of each case, and the power from there to the end."""
    lines = ["| case | steps: best rate (power to the last) |", "| --- | --- |"]
    for name in CASES:
        kinds = {int(r["kind"]) for r in ledger.records if r["case"] == name}
        best = {}
        for steps in sorted(kinds):
            losses: dict[float, list[float]] = {}
            for record in ledger.of(str(steps), name):
                losses.setdefault(record["octave"], []).append(record["loss"])
            best[steps] = minimum(losses).octave
        cells = []
        for steps, octave in best.items():
            octaves = math.log2(max(best) / steps)
            power = f" ({(octave - best[max(best)]) / octaves:.2f})" if octaves else ""
            cells.append(f"{steps}: {2**octave:.2g}{power}")
        lines.append(f"| {name} | {', '.join(cells)} |")
    return lines


def main() -> None:
    """Runs what is missing, or prints the table."""
    arguments = parser(__doc__, CASES, "lr-horizon.jsonl").parse_args()
    ledger = Ledger(arguments.out)
    if arguments.table:
        print("\n".join(table(ledger)))
        return
    for name, config, data in chosen_cases(arguments, CASES):
        laboratory = Laboratory(config, data)
        start = START.get(config.optimizer.name, -7.0)
        for share in reversed(SHARES):
            steps = max(5, round(laboratory.total_steps / share))
            walk(laboratory, ledger, name, steps, start)
        print(name, flush=True)


if __name__ == "__main__":
    main()
