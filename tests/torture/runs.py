"""Commands in processes of their own, as a user starts them; and what they leave, to compare.

The processes come from a server that has imported torch before (the standard library's
`forkserver`): they start in hundredths of a second, and are as killable as any.
"""

import json
import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from multiprocessing import get_context
from multiprocessing.context import ForkServerProcess
from pathlib import Path

from gpt.config import Config
from gpt.configfile import dump_config
from gpt.metrics import read_metrics
from gpt.rundir import checkpoint_folders, run_path

CLOCKS = {"time_s", "tokens_per_s", "memory_bytes", "cpu_share", "others_share", "major_faults"}
# Measured over two steps of one process: the first line after a resume has none.
PAIRS = {"slope_before", "slope_after", "grad_signal", "grad_noise", "noise_scale"}

_context = get_context("forkserver")
_context.set_forkserver_preload(
    ["gpt.train", "gpt.infer", "gpt.lr.find", "gpt.lr.sweep"]
    + ["matplotlib.backends.backend_agg", "matplotlib.figure"]
    + [f"gpt.cli.{name}" for name in ("train", "infer", "lr", "data", "report")]
)


class Command:
    """A started command. `said` is what it has printed to stderr, `printed` that to stdout."""

    def __init__(
        self,
        argv: Sequence[str],
        folder: Path,
        patch: Callable[[Path], None] | None = None,
    ) -> None:
        """Takes the command line; `patch` is called in the new process, with `folder`, before it.

        The output goes to files in `folder`.
        """
        self._out, self._err = folder / "stdout", folder / "stderr"
        self._out.write_bytes(b"")
        self._err.write_bytes(b"")
        self.process: ForkServerProcess = _context.Process(
            target=_command, args=(list(argv), folder, patch)
        )
        self.process.start()

    @property
    def pid(self) -> int:
        """The number of its process."""
        assert self.process.pid is not None
        return self.process.pid

    @property
    def said(self) -> str:
        """Its stderr so far."""
        return self._err.read_text(encoding="utf-8", errors="replace")

    @property
    def printed(self) -> str:
        """Its stdout so far."""
        return self._out.read_text(encoding="utf-8", errors="replace")

    def signal(self, number: int) -> None:
        """Sends a signal, if the process is still there."""
        if self.process.is_alive():
            os.kill(self.pid, number)

    def wait(self, timeout_s: float = 60) -> int:
        """Its exit code, negative for the signal that killed it."""
        self.process.join(timeout_s)
        if self.process.exitcode is None:
            self.process.kill()
            self.process.join()
            raise TimeoutError(f"still running after {timeout_s} s; it said:\n{self.said[-3000:]}")
        return self.process.exitcode


def _command(argv: list[str], folder: Path, patch: Callable[[Path], None] | None) -> None:
    os.setpgid(0, 0)  # a group of its own, as a shell gives it: signals may go to its children too
    hear_interrupts()
    for number, path in ((1, folder / "stdout"), (2, folder / "stderr")):
        handle = os.open(path, os.O_WRONLY | os.O_APPEND)
        os.dup2(handle, number)
        os.close(handle)
    sys.stdin = open(os.devnull, encoding="utf-8")  # noqa: SIM115, PTH123 (as long as it lives)
    name = argv[0].removeprefix("gpt-")
    main = __import__(f"gpt.cli.{name}", fromlist=["main"]).main
    if patch is not None:
        patch(folder)
    sys.exit(main(argv[1:]))


def hear_interrupts() -> None:
    """In a new process: SIGINT counts, though a shell starts what it puts aside deaf to it."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


def run(argv: Sequence[str], folder: Path, timeout_s: float = 60) -> Command:
    """Runs a command to its end."""
    command = Command(argv, folder)
    command.wait(timeout_s)
    return command


def until(condition: Callable[[], bool], command: Command, timeout_s: float = 30) -> bool:
    """Waits for a condition; false if the command ended before it came true."""
    end = time.monotonic() + timeout_s
    while not condition():
        if not command.process.is_alive():
            return condition()
        assert time.monotonic() < end, f"waited in vain; the command said:\n{command.said[-3000:]}"
        time.sleep(0.0005)
    return True


def write_config(config: Config, folder: Path) -> Path:
    """The config as a file, for a command line."""
    path = folder / f"{config.run.name}.yaml"
    path.write_text(dump_config(config), encoding="utf-8")
    return path


def last_state(config: Config) -> tuple[str, dict[str, bytes], dict[str, object]]:
    """The newest checkpoint: its name, its tensors to the byte, and all of its other state."""
    folder = checkpoint_folders(run_path(config))[-1]
    tensors = {path.name: path.read_bytes() for path in sorted(folder.glob("*.safetensors"))}
    state = json.loads((folder / "state.json").read_text(encoding="utf-8"))
    state["progress"].pop("seconds")
    return folder.name, tensors, state


def logged(run: Config | Path) -> list[dict[str, object]]:
    """A log without its clocks, and without events, which tell of interruptions."""
    return [
        {key: value for key, value in record.items() if key not in CLOCKS | PAIRS}
        for record in read_metrics(run if isinstance(run, Path) else run_path(run))
        if record["kind"] != "event"
    ]


def check_same(whole: Config, other: Config) -> None:
    """Asserts that two runs ended alike: weights, optimizer, generators, every logged loss."""
    name, tensors, state = last_state(whole)
    other_name, other_tensors, other_state = last_state(other)
    assert name == other_name
    assert tensors.keys() == other_tensors.keys()
    for file, content in tensors.items():
        assert content == other_tensors[file], f"{file} differs at the end"
    assert state == other_state
    lines, other_lines = logged(whole), logged(other)
    steps = [line["step"] for line in other_lines if line["kind"] == "train"]
    assert len(steps) == len(set(steps)), "a step stands in the log twice"
    assert lines == other_lines, "the logs differ"


def check_tidy(config: Config) -> None:
    """Asserts that nothing temporary is left in the run."""
    left = [path for path in run_path(config).rglob("*") if ".tmp" in path.name]
    assert not left, f"left behind: {left}"
