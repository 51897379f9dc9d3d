"""Test 11: files of a stranger who means harm, handed to every command that reads files.

Whoever spoils a file also makes the manifest true of it. Nothing may be executed, nothing outside
of the run be written, memory and time stay bounded, and the end be one line that says why.
"""

import os
import random
import re
import resource
import time
from collections.abc import Sequence
from pathlib import Path

from tests.conftest import tiny_config
from tests.torture import Torture
from tests.torture import hostile_checkpoints as _checkpoints
from tests.torture import hostile_logs as _logs
from tests.torture.hostile import ATTACKS, Scene, copy
from tests.torture.runs import Command, run, write_config

assert _checkpoints, _logs  # they list their attacks

MOST_MEMORY = 1_500_000_000
MOST_CPU_S = 5.0
LONGEST_LINE = 2000
_TICKS = os.sysconf("SC_CLK_TCK")
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")


def prepare(shared: Path) -> None:
    """A sound run of a trained BPE, so that every kind of file is there; a payload that works."""
    config = tiny_config(
        shared,
        run__name="evil",
        run__dir=str(shared / "base" / "runs"),
        data__dir=str(shared / "base" / "data"),
        tokenizer__kind="bpe",
        tokenizer__vocab_size="270",
        train__device="cpu",
        train__compile="off",
    )
    (shared / "sound").mkdir()
    trained = run(["gpt-train", "--config", str(write_config(config, shared / "sound"))], shared)
    assert trained.process.exitcode == 0, trained.said
    import pickle

    scene = Scene(shared, shared, shared, shared, random.Random(0))
    pickle.loads(scene.payload()).close()
    assert scene.canary.exists(), "the payload is a dud"
    scene.canary.unlink()


def case(index: int, rng: random.Random, folder: Path) -> str:
    """Spoils a copy of the run and lets the commands meet it."""
    attack = ATTACKS[index % len(ATTACKS)]
    scene = _scene(folder, rng)
    before = _listing(scene.outside)
    wanted = attack.spoil(scene)
    commands = [wanted] if isinstance(wanted[0], str) else wanted
    codes = set()
    for number, command in enumerate(commands):
        place = folder / f"command-{number}"
        place.mkdir()
        codes.add(_meet(list(command), place, attack.codes))
    assert not scene.canary.exists(), f"{attack.name}: the payload ran"
    assert _listing(scene.outside) == before, f"{attack.name}: wrote outside of the run"
    ends = {0: "read as data", 2: "refused", 3: "read as data"}
    return f"{attack.kind}: {'/'.join(sorted({ends[code] for code in codes}))}"


def _scene(folder: Path, rng: random.Random) -> Scene:
    shared = folder.parent
    copy(shared / "base", folder / "base")
    (folder / "outside").mkdir()
    (folder / "outside" / "victim").write_text("precious\n")
    (folder / "config.yaml").write_bytes((shared / "sound" / "evil.yaml").read_bytes())
    data = next((folder / "base" / "data").glob("[!.]*"))
    return Scene(folder, folder / "base" / "runs" / "evil", data, shared / "words.txt", rng)


def _listing(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def _meet(argv: list[str], folder: Path, allowed: frozenset[int]) -> int:
    """Runs a command, within bounds, and judges what it said; its exit code."""
    command = Command(argv, folder, bounded)
    memory, cpu = _watch(command)
    code = command.wait(1)
    said, printed = command.said, command.printed
    told = f"{' '.join(argv)[:300]!r} ended with {code} and said:\n{said[-1500:]}"
    assert code in allowed, told
    assert "Traceback" not in said + printed, told
    assert memory < MOST_MEMORY, f"{memory / 1e9:.1f} GB of memory: {told}"
    assert cpu < MOST_CPU_S, f"{cpu:.1f} s of CPU: {told}"
    _check_said(said, "" if argv[0] == "gpt-infer" else printed, code, told)
    page = folder.parent / "page.html"
    if page.exists():
        _check_page(page.read_text(encoding="utf-8"))
    return code


def _check_said(said: str, printed: str, code: int, told: str) -> None:
    """What a model says is its own business as long as it goes into a file or a pipe."""
    lines = said.splitlines()
    errors = [line for line in lines if line.startswith("error: ")]
    assert (len(errors) >= 1) == (code == 2), told
    assert len(errors) <= 20, f"{len(errors)} errors: {told}"
    assert all(len(line) <= LONGEST_LINE for line in lines), f"a long line: {told}"
    found = _CONTROL.search(said)
    assert found is None, f"{found[0]!r} went to the terminal: {told}"
    found = _CONTROL.search(printed)
    assert found is None, f"{found[0]!r} was printed: {told}\n{printed[:2000]!r}"


def _check_page(page: str) -> None:
    for text in ("<script>alert", "<img src=x", "javascript:alert"):
        assert text not in page, f"{text} stands in the page as markup"


def bounded(folder: Path) -> None:
    """In the command's process: memory that it asks for is refused beyond the bound."""
    status = Path("/proc/self/status").read_text()
    used = int(re.search(r"VmData:\s+(\d+)", status)[1]) * 1024
    resource.setrlimit(resource.RLIMIT_DATA, (used + MOST_MEMORY,) * 2)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def _watch(command: Command, timeout_s: float = 40) -> tuple[int, float]:
    """Peak memory in bytes and CPU seconds of a command, which is ended if it takes too long."""
    place, memory, cpu = Path(f"/proc/{command.pid}"), 0, 0.0
    end = time.monotonic() + timeout_s
    while command.process.is_alive():
        try:
            peak = re.search(r"VmHWM:\s+(\d+)", (place / "status").read_text())
            memory = max(memory, int(peak[1]) * 1024 if peak else 0)
            spent: Sequence[str] = (place / "stat").read_text().rpartition(")")[2].split()
            cpu = max(cpu, (int(spent[11]) + int(spent[12])) / _TICKS)
        except (FileNotFoundError, ProcessLookupError):
            break
        if time.monotonic() > end or cpu > 4 * MOST_CPU_S:
            command.process.kill()
            command.process.join()
            raise TimeoutError(f"hangs, or works without end: {command.said[-1000:]}")
        time.sleep(0.005)
    return memory, cpu


TORTURE = Torture(
    title="hostile checkpoints, tokenizers, shards, configs, texts and logs, their manifests true",
    promise="nothing executed, nothing outside written; at most 1.5 GB and 5 s of work; one line "
    "that says why, or read as the data it is; no control character reaches the terminal",
    full=len(ATTACKS),
    short=6,
    case=case,
    prepare=prepare,
    chunk=3,
    timeout_s=150,
)
