"""Test 4: a disk that is full, becomes full, may only be read, or fails; then it has room again."""

import errno
import os
import random
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path

from gpt.checkpoint import verify_checkpoint
from gpt.config import Config
from gpt.metrics import read_metrics
from gpt.rundir import checkpoint_folders, run_path
from tests.conftest import tiny_config
from tests.torture import Torture
from tests.torture.runs import (
    Command,
    check_same,
    check_tidy,
    last_state,
    run,
    until,
    write_config,
)

SIZES_KB = [8, 24, 60, 160, 280, 400, 560, 680, 760, 880]  # a checkpoint takes 208, the log 36
ENOUGH_KB = 680  # for the checkpoints that are kept, if the oldest goes before the next one comes
ROOM = "64m"
NO_MOUNT = "not possible here: no right to mount"


def make_config(shared: Path, name: str, run_dir: Path, **more: str) -> Config:
    """A save every other step."""
    values = {"checkpoint__every_steps": "2", "eval__sample_tokens": "0", **more}
    return tiny_config(
        shared, run__name=name, run__dir=str(run_dir), model__dropout="0.1", **values
    )


def prepare(shared: Path) -> None:
    """The run on a disk that has room."""
    whole = make_config(shared, "whole", shared / "runs")
    ended = run(["gpt-train", "--config", str(write_config(whole, shared))], shared)
    assert ended.process.exitcode == 0, ended.said


class NoMountError(Exception):
    """This machine lets nobody mount."""


@contextmanager
def disk(folder: Path, size: str) -> Iterator[Path]:
    """A file system of its own, in memory, of a size."""
    path = folder / "disk"
    path.mkdir()
    if _mount("-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(path)):
        raise NoMountError
    try:
        yield path
    finally:
        subprocess.run(["umount", "-l", str(path)], check=False, capture_output=True)


def _mount(*options: str) -> int:
    try:
        return subprocess.run(["mount", *options], check=False, capture_output=True).returncode
    except FileNotFoundError:
        return 1


def resize(path: Path, option: str) -> None:
    """Changes a mounted file system."""
    assert _mount("-o", f"remount,{option}", str(path)) == 0


def fill(path: Path, left: int = 0) -> Path:
    """Takes all the room there is, save some bytes."""
    filler = path / "filler"
    with filler.open("wb", buffering=0) as file, suppress(OSError):
        while file.write(b"x" * 4096):
            pass
    os.truncate(filler, max(0, filler.stat().st_size - left))
    return filler


def case(index: int, rng: random.Random, folder: Path) -> str:
    """One of the scenes."""
    try:
        return SCENES[index](rng, folder)
    except NoMountError:
        return NO_MOUNT


def check_said(ended: Command, *codes: int) -> int:
    """Nothing but lines: one error where it ended with 2, no traceback; returns the exit code."""
    code, said = ended.wait(), ended.said
    assert code in codes, f"exit {code}: {said[-3000:]}"
    assert "Traceback" not in said, said[-3000:]
    errors = [line for line in said.splitlines() if line.startswith("error: ")]
    assert len(errors) == (code == 2), said[-3000:]
    return code


def check_goes_on(config: Config, folder: Path, before: str = "") -> None:
    """Every checkpoint is whole; with room, the run goes on to the end that it would have had.

    The log lacks lines only if that was said before.
    """
    for checkpoint in checkpoint_folders(run_path(config)):
        verify_checkpoint(checkpoint)
    ended = run(["gpt-train", "--config", str(write_config(config, folder))], folder)
    check_said(ended, 0)
    if "lacks its last" in before:
        whole = make_config(folder.parent, "whole", folder.parent / "runs")
        assert last_state(config) == last_state(whole)
        check_tidy(config)
    else:
        check_end(config, folder)


def check_end(config: Config, folder: Path) -> None:
    """The end is that of the run with room."""
    check_same(make_config(folder.parent, "whole", folder.parent / "runs"), config)
    check_tidy(config)


def too_small(size_kb: int, rng: random.Random, folder: Path) -> str:
    """The disk is too small from the start; then it is made larger."""
    with disk(folder, f"{size_kb}k") as path:
        config = make_config(folder.parent, "run", path)
        ended = run(["gpt-train", "--config", str(write_config(config, folder))], folder)
        code = check_said(ended, 0, 2)
        began = (run_path(config) / "config.yaml").exists()
        assert began or not run_path(config).exists(), "a run that never began left something"
        if code == 2 and began:
            assert "could not be saved" in ended.said, ended.said
            steps = [line["step"] for line in read_metrics(run_path(config))]
            assert "step 12/12" in ended.said, f"the run did not go on: {steps}"
        assert code == 0 or size_kb < ENOUGH_KB, ended.said
        if code == 0 and "lacks its last" not in ended.said:
            check_end(config, folder)
        resize(path, f"size={ROOM}")
        check_goes_on_or_ended(config, folder, code, ended.said)
        tight = "dropped" if len(checkpoint_folders(run_path(config))) < 3 else "held"
    how = "ended well" if code == 0 else "last save failed" if began else "did not begin"
    return f"too small a disk: {how}" + (", with fewer kept" if tight == "dropped" else "")


def check_goes_on_or_ended(config: Config, folder: Path, code: int, said: str) -> None:
    """A run that ended well lacks at most lines of its log; another goes on."""
    if code == 2:
        check_goes_on(config, folder, said)
        return
    for checkpoint in checkpoint_folders(run_path(config)):
        verify_checkpoint(checkpoint)


def _slowly(folder: Path) -> None:
    import gpt.train

    step = gpt.train.train_step

    def slow(*args: object, **options: object) -> object:
        time.sleep(0.03)
        return step(*args, **options)

    gpt.train.train_step = slow


def becomes_full(comes_back: bool, left: int, rng: random.Random, folder: Path) -> str:
    """The disk becomes full while the run goes on, and in half of the cases has room again."""
    with disk(folder, "4m") as path:
        config = make_config(folder.parent, "run", path)
        started = Command(
            ["gpt-train", "--config", str(write_config(config, folder))], folder, _slowly
        )
        saves = f"saved    {run_path(config)}"
        wanted = rng.randint(1, 3)
        assert until(lambda: started.said.count(saves) >= wanted, started), started.said
        time.sleep(rng.uniform(0, 0.1))
        filler = fill(path, left)
        told = until(lambda: "could not be saved" in started.said, started)
        if comes_back:
            filler.unlink()
        code = check_said(started, 0, 2)
        filler.unlink(missing_ok=True)
        if code == 0 and comes_back:
            check_end(config, folder)
        else:
            check_goes_on_or_ended(config, folder, code, started.said)
        assert told or code == 0
    how = "exact, in the same process" if code == 0 else "exit 2, then exact"
    return f"became full{', room came back' if comes_back else ''}: {how}"


def copy_run(shared: Path, path: Path) -> None:
    """The run with room, as if its last save had not been."""
    shutil.copytree(shared / "runs" / "whole", path / "runs" / "whole")
    shutil.rmtree(path / "runs" / "whole" / "checkpoints" / "step-00000012")


def read_only(what: str, rng: random.Random, folder: Path) -> str:
    """A disk that may only be read: for the run, the text's shards, an old run, inference."""
    shared = folder.parent
    with disk(folder, "16m") as path:
        where = "data" if what == "data" else "runs"
        if what in ("resume", "infer"):
            copy_run(shared, path)
        if what == "shards":
            shutil.copytree(shared / "data", path / "data")
        resize(path, "ro")
        more = {"data__dir": str(path / "data")} if what in ("data", "shards") else {}
        place = folder / "runs" if more else path / "runs"
        name = "whole" if what in ("resume", "infer") else "run"
        config = make_config(shared, name, place, **more)
        argv = ["gpt-train", "--config", str(write_config(config, folder))]
        if what == "infer":
            argv = ["gpt-infer", "--run", str(run_path(config)), "--prompt", "the", "--seed", "1"]
        ended = run(argv, folder)
        check_said(ended, 0 if what in ("infer", "shards") else 2)
        if what == "shards":
            check_end(config, folder)
        if what == "data":
            assert not run_path(config).exists(), "a run that never began left something"
        resize(path, "rw")
        if what == "resume":
            check_goes_on(config, folder)
        assert what != "new" or not (path / where / "run").exists()
    return f"read-only: {'works' if what in ('infer', 'shards') else 'refused in a line'}"


def tokenising(size_kb: int, rng: random.Random, folder: Path) -> str:
    """No room for the shards; then there is."""
    with disk(folder, f"{size_kb}k") as path:
        more = {"data__dir": str(path / "data")}
        config = make_config(folder.parent, "run", folder / "runs", **more)
        argv = ["gpt-train", "--config", str(write_config(config, folder))]
        code = check_said(run(argv, folder), 2)
        assert not run_path(config).exists(), "a run that never began left something"
        left = [each.name for each in path.rglob("*") if not each.name.startswith(".lock")]
        assert left in ([], ["data"]), f"left behind: {left}"
        resize(path, f"size={ROOM}")
        check_goes_on(config, folder)
    return f"no room for the shards: exit {code}, then exact"


def full_at_start(left: int, rng: random.Random, folder: Path) -> str:
    """Not a byte, or almost none, when it starts: new, or on a run that would go on."""
    with disk(folder, "16m") as path:
        resumes = rng.random() < 0.5
        if resumes:
            copy_run(folder.parent, path)
        filler = fill(path, left)
        config = make_config(folder.parent, "whole" if resumes else "run", path / "runs")
        before = _all(run_path(config))
        ended = run(["gpt-train", "--config", str(write_config(config, folder))], folder)
        code = check_said(ended, 2)
        if not resumes and "could not be saved" not in ended.said:
            assert not run_path(config).exists(), f"left behind: {_all(run_path(config))}"
        kept = [name for name in before if "step-" in name]
        assert all(name in _all(run_path(config)) for name in kept if "00000012" not in name)
        filler.unlink()
        check_goes_on(config, folder)
    return f"full at the start of {'a run that goes on' if resumes else 'a new run'}: exit {code}"


def _all(path: Path) -> list[str]:
    return sorted(str(each.relative_to(path)) for each in path.rglob("*"))


def fails(how: str, rng: random.Random, folder: Path) -> str:
    """System calls that fail for a while: what writes fsync, rename, the tensors, the log."""
    config = make_config(folder.parent, "run", folder / "runs")
    argv = ["gpt-train", "--config", str(write_config(config, folder))]
    started = Command(argv, folder, partial(PATCHES[how], rng.randint(0, 60)))
    code = check_said(started, 0, 2)
    if code == 0:
        check_end(config, folder)
    else:
        if not (run_path(config) / "config.yaml").exists():
            assert not run_path(config).exists(), _all(run_path(config))
        check_goes_on(config, folder)
    return f"{how} fails: {'exact' if code == 0 else 'exit 2, then exact'}"


def _failing(module: object, name: str, number: int, first: int, length: int) -> None:
    """Calls `first` to `first + length` of a function raise."""
    call, count = getattr(module, name), [0]

    def failing(*args: object, **options: object) -> object:
        count[0] += 1
        if first < count[0] <= first + length:
            raise OSError(number, os.strerror(number))
        return call(*args, **options)

    setattr(module, name, failing)


def _fsync(first: int, folder: Path) -> None:
    _failing(os, "fsync", errno.EIO, 4 + first, 7)


def _rename(first: int, folder: Path) -> None:
    _failing(Path, "rename", errno.EIO, first // 10, 3)


def _replace(first: int, folder: Path) -> None:
    _failing(Path, "replace", errno.EROFS, first // 10, 3)


def _write(first: int, folder: Path) -> None:
    _failing(Path, "write_bytes", errno.EDQUOT, first // 2, 3)


def _tensors(first: int, folder: Path) -> None:
    from safetensors import SafetensorError

    import gpt.checkpoint

    save, count = gpt.checkpoint.save_file, [0]

    def failing(*args: object) -> object:
        count[0] += 1
        if first // 5 < count[0] <= first // 5 + 4:
            raise SafetensorError("I/O error: No space left on device (os error 28)")
        return save(*args)

    gpt.checkpoint.save_file = failing


def _size(first: int, folder: Path) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (first * 1000 + 500, resource.RLIM_INFINITY))


def _console(first: int, folder: Path) -> None:
    full = os.open("/dev/full", os.O_WRONLY)
    os.dup2(full, 1)
    os.dup2(full, 2)


PATCHES: dict[str, Callable[[int, Path], None]] = {
    "fsync": _fsync,
    "rename": _rename,
    "replace": _replace,
    "write": _write,
    "writing tensors": _tensors,
    "growing beyond a limit": _size,
    "printing to /dev/full": _console,
}


def output(command: str, rng: random.Random, folder: Path) -> str:
    """The answer itself goes to /dev/full."""
    whole = make_config(folder.parent, "whole", folder.parent / "runs")
    path = str(write_config(whole, folder))
    argv = {
        "infer": ["--run", str(run_path(whole)), "--prompt", "the", "--max-tokens", "9"],
        "lr": ["plan", "--config", path, "--json"],
        "report": [str(run_path(whole)), "--json"],
    }[command]
    code = f"import sys; from gpt.cli.{command} import main; sys.exit(main({argv}))"
    with Path("/dev/full").open("wb") as full:
        ended = subprocess.run(
            [sys.executable, "-c", code],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
        )
    assert ended.returncode == 2, ended.stderr
    assert "Traceback" not in ended.stderr, ended.stderr
    assert "error: the output: No space left on device" in ended.stderr, ended.stderr
    return "an answer to /dev/full: exit 2"


SCENES: list[Callable[[random.Random, Path], str]] = [
    *(partial(too_small, size) for size in SIZES_KB),
    *(partial(becomes_full, back, left) for left in (0, 9000, 60_000) for back in (False, True)),
    *(partial(read_only, what) for what in ("new", "data", "resume", "shards", "infer")),
    *(partial(tokenising, size) for size in (4, 16, 32)),
    *(partial(full_at_start, left) for left in (0, 4096, 12_000)),
    *(partial(fails, how) for how in PATCHES),
    *(partial(fails, how) for how in ("fsync", "writing tensors", "growing beyond a limit")),
    *(partial(output, command) for command in ("infer", "lr", "report")),
]

TORTURE = Torture(
    title="disks that are too small, become full, are read-only, fail, and have room again; "
    "/dev/full",
    promise="no traceback, a clear line; every published checkpoint is whole; training goes on; "
    "exit 2 if the last save failed; nothing half-begun is left; with room it goes on exactly",
    full=len(SCENES),
    short=6,
    case=case,
    prepare=prepare,
    chunk=3,
)
