"""Runs the torture tests and keeps their record: `python -m scripts.torture --test 2 --count 50`.

Each call goes on after the cases that the record already holds of the same code, so that parts add
up; `--case N` runs one case again, alone, and records nothing. What the record holds of other code
stays in it, with its date and commit, until that test is whole again.
"""

import argparse
import faulthandler
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from multiprocessing import get_context
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # the cases of tiny models run side by side

from tests.torture import MODULES, SEED, Torture, load, random_of

ROOT = Path(__file__).resolve().parent.parent
RECORD = ROOT / "docs" / "torture.jsonl"
TABLE = ROOT / "docs" / "torture.md"
BEGIN, END = "<!-- results -->", "<!-- end of results -->"


@dataclass
class Part:
    """Some cases of one test, run in one go. `code` names what was tortured, and by what."""

    test: int
    first: int
    count: int
    seed: int
    code: str
    commit: str
    date: str
    seconds: float
    machine: str
    told: dict[str, int] = field(default_factory=dict)
    failed: list[int] = field(default_factory=list)


@dataclass(frozen=True)
class Outcome:
    """How one case ended: a word, or what was broken."""

    case: int
    told: str
    broken: str = ""


def main() -> int:
    """Runs what was asked for; 1 if a promise was broken."""
    arguments = _parser().parse_args()
    if arguments.table:
        write_table()
        return 0
    chosen = [arguments.test] if arguments.test else list(MODULES)
    failures = 0
    for number in chosen:
        torture = load(number)
        if arguments.case is not None:
            cases = range(arguments.case, arguments.case + (arguments.count or 1))
        else:
            first = 0 if arguments.again else done_until(number, arguments.seed)
            cases = range(first, min(torture.full, first + (arguments.count or torture.full)))
        if not cases:
            print(f"test {number}: all {torture.full:,} cases are in the record for this code")
            continue
        part = run(number, torture, cases, arguments)
        failures += len(part.failed)
        if arguments.case is None:
            with RECORD.open("a", encoding="utf-8") as file:
                file.write(json.dumps(asdict(part), ensure_ascii=False) + "\n")
            write_table()
    return 1 if failures else 0


def run(number: int, torture: Torture, cases: range, arguments: argparse.Namespace) -> Part:
    """Runs the cases, side by side in processes of their own, and says how each broke."""
    seed, jobs = arguments.seed, 1 if torture.alone else arguments.jobs
    print(
        f"test {number}: {torture.title}; cases {cases.start:,} to {cases.stop - 1:,}, seed {seed}"
    )
    start, told, failed = time.perf_counter(), Counter[str](), []
    at = time.perf_counter()
    for i, outcome in enumerate(outcomes(number, cases, seed, jobs), 1):
        if outcome.broken:
            failed.append(outcome.case)
            again = f"make torture TEST={number} CASE={outcome.case}"
            print(f"  case {outcome.case} broke a promise ({again}):\n{outcome.broken}")
        else:
            told[outcome.told] += 1
        if time.perf_counter() - at > 20:
            at = time.perf_counter()
            print(f"  {i:,} of {len(cases):,} cases, {len(failed)} failed", flush=True)
    seconds = time.perf_counter() - start
    print(f"  {len(cases) - len(failed):,} of {len(cases):,} held, in {seconds:.0f} s")
    for word, n in told.most_common():
        print(f"    {n:6,} {word}")
    return Part(
        test=number,
        first=cases.start,
        count=len(cases),
        seed=seed,
        code=code_of(number),
        commit=_commit(),
        date=datetime.now(UTC).strftime("%Y-%m-%d"),
        seconds=round(seconds, 1),
        machine=f"{os.cpu_count()} cores, {sys.platform}, Python {sys.version.split()[0]}",
        told=dict(told),
        failed=sorted(failed),
    )


def outcomes(number: int, cases: range, seed: int, jobs: int) -> Iterator[Outcome]:
    """Runs cases in `jobs` processes; each prepares once and takes every `jobs`th case."""
    size = max(1, min(200, len(cases) // (4 * jobs)))
    parts = [cases[i : i + size] for i in range(0, len(cases), size)]
    with ProcessPoolExecutor(jobs, get_context("spawn")) as pool:
        for done in as_completed(pool.submit(_run_cases, number, part, seed) for part in parts):
            yield from done.result()


_shared: dict[int, Path] = {}


def _run_cases(number: int, cases: range, seed: int) -> list[Outcome]:
    torture = load(number)
    if number not in _shared:
        _shared[number] = Path(tempfile.mkdtemp(prefix=f"torture-{number}-"))
        import atexit

        atexit.register(shutil.rmtree, _shared[number], ignore_errors=True)
        if torture.prepare is not None:
            torture.prepare(_shared[number])
    return [
        _run_case(torture, case, random_of(seed, number, case), _shared[number]) for case in cases
    ]


def _run_case(torture: Torture, case: int, rng: random.Random, shared: Path) -> Outcome:
    folder = shared / f"case-{case}"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    before = signal.signal(signal.SIGALRM, _hung)
    signal.setitimer(signal.ITIMER_REAL, torture.timeout_s)
    faulthandler.dump_traceback_later(torture.timeout_s + 30, exit=True)
    try:
        told = torture.case(case, rng, folder)
        return Outcome(case, told) if told else Outcome(case, "", "the case said nothing")
    except BaseException:  # whatever it is, the other cases go on
        return Outcome(case, "", traceback.format_exc())
    finally:
        faulthandler.cancel_dump_traceback_later()
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
        shutil.rmtree(folder, ignore_errors=True)


def _hung(number: int, frame: object) -> None:
    raise TimeoutError("the case hangs")


def code_of(number: int) -> str:
    """A hash of the code that is tortured, and of this test of it, as they lie here."""
    digest = hashlib.sha256()
    tests = [ROOT / "tests" / "torture" / f"{name}.py" for name in (MODULES[number], "runs")]
    for path in sorted([*(ROOT / "gpt").rglob("*.py"), *tests]):
        digest.update(f"{path.relative_to(ROOT)}\0".encode() + path.read_bytes())
    return digest.hexdigest()[:12]


def done_until(number: int, seed: int) -> int:
    """The first case that the record does not hold, of this code and seed."""
    until, code = 0, code_of(number)
    for part in sorted(read_record(), key=lambda part: part.first):
        if (part.test, part.code, part.seed) == (number, code, seed) and part.first <= until:
            until = max(until, part.first + part.count)
    return until


def read_record() -> list[Part]:
    """All parts, in the order they were run."""
    if not RECORD.exists():
        return []
    return [Part(**json.loads(line)) for line in RECORD.read_text(encoding="utf-8").splitlines()]


def write_table() -> None:
    """Puts the results of the record into docs/torture.md, between its two marks."""
    rows = [
        "| # | test | cases | held | date | commit | minutes |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    parts = read_record()
    for number in MODULES:
        torture = load(number)
        mine = [part for part in parts if part.test == number]
        if not mine:
            rows.append(f"| {number} | {torture.title} | 0 of {torture.full:,} | | | | |")
            continue
        # The newest code of which all cases were run; where there is none, the newest.
        codes = list(dict.fromkeys(part.code for part in reversed(mine)))
        whole = [code for code in codes if covered(mine, code) >= torture.full]
        code = (whole or codes)[0]
        chosen = [part for part in mine if part.code == code]
        broken = {case for part in chosen for case in part.failed}
        cases = covered(mine, code)
        rows.append(
            f"| {number} | {torture.title} | {cases:,} of {torture.full:,} "
            f"| {cases - len(broken):,} | {chosen[-1].date} | {chosen[-1].commit} "
            f"| {sum(part.seconds for part in chosen) / 60:.1f} |"
        )
    text = TABLE.read_text(encoding="utf-8")
    before, rest = text.split(BEGIN)
    after = rest.split(END)[1]
    TABLE.write_text("\n".join([before + BEGIN, *rows, END + after]), encoding="utf-8")


def covered(parts: list[Part], code: str) -> int:
    """How many different cases were run of this code."""
    return len({i for p in parts if p.code == code for i in range(p.first, p.first + p.count)})


def _commit() -> str:
    git = ["git", "-C", str(ROOT)]
    head = subprocess.run([*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
    changed = subprocess.run(
        [*git, "status", "--porcelain", "gpt", "tests/torture"], capture_output=True, text=True
    )
    return (head.stdout.strip() or "unknown") + ("+" if changed.stdout.strip() else "")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m scripts.torture", description=__doc__)
    add = parser.add_argument
    add("--test", type=int, choices=list(MODULES), help="one test alone (default: all)")
    add("--count", type=int, help="so many further cases (default: all that are left)")
    add("--case", type=int, help="this case alone, without a record (with --count: from it on)")
    add("--again", action="store_true", help="from the first case on, whatever the record holds")
    add("--seed", type=int, default=SEED, help=f"of all cases (default: {SEED})")
    add("--jobs", type=int, default=os.cpu_count() or 1, help="processes (default: one a core)")
    add("--table", action="store_true", help="only write the table of docs/torture.md again")
    return parser


if __name__ == "__main__":
    sys.exit(main())
