"""A run's directory: who may write into it, which checkpoint goes on, which ones are kept.

runs/NAME/config.yaml  metrics.jsonl  tokenizer.*  checkpoints/step-00000250/  checkpoints/best.json
runs/NAME/rate.json, if the rate was changed on the way (see `ratepolicy`)
"""

import json
import re
import shlex
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Literal

from gpt.checkpoint import (
    REPLACED,
    CheckpointError,
    Progress,
    SaveError,
    Training,
    save_checkpoint,
    verify_checkpoint,
)
from gpt.config import Config
from gpt.configfile import dump_config, load_config
from gpt.errors import DISK_REFUSES, UserError, say
from gpt.files import (
    HeldError,
    check_writable,
    is_sealed,
    locked,
    read_plain,
    sealed,
    write_durably,
)
from gpt.metrics import read_metrics, truncate_after
from gpt.ratepolicy import KeyChange, RatePolicy, check_changes, write_record

Resume = Literal["auto", "never", "must"]

# Keys that may differ when a run goes on: they do not change what its steps compute. The text's
# place is among them because the data's fingerprint is compared instead, the number format because
# the checkpoint names its own.
FREE_KEYS = re.compile(
    r"run\..*|log\..*|eval\..*|checkpoint\..*|data\.(source|dir)|model\.preset"
    r"|train\.(device|compile|dtype|micro_batch_size|activation_checkpointing)"
    r"|train\.(max_time_s|skip_limit)"
)
FIXED_RUN_KEYS = {"run.seed"}
MAX_BEST_BYTES = 10_000


def run_path(config: Config) -> Path:
    """Where the run lives."""
    return Path(config.run.dir) / config.run.name


@contextmanager
def locked_run(config: Config, resume: Resume, rate: RatePolicy = "keep") -> Iterator[Path]:
    """Makes or reopens the run's directory and holds it: no second process can write there.

    Raises UserError, before anything is written, for a directory of another config, unless `rate`
    accepts the difference, for one that is no run, for one that another process holds, and where
    `resume` forbids or demands a start.
    """
    path = run_path(config)
    check_run(config, resume, rate)
    is_new = not path.exists()
    try:
        (path / "checkpoints").mkdir(parents=True, exist_ok=True)
        (path / ".lock").touch()
    except OSError as error:
        raise UserError(
            f"run.dir: {path} cannot be written ({error.strerror}); give another"
        ) from None
    try:
        with locked(path / ".lock", wait=False):
            _tidy(path)
            try:
                yield path
            finally:
                _remove_if_unused(path)
    except OSError as error:
        if error.errno not in DISK_REFUSES:
            raise
        if is_new and not checkpoint_folders(path) and not read_metrics(path):
            shutil.rmtree(path, ignore_errors=True)
        raise UserError(
            f"run.dir: {error.filename or path}: cannot be written ({error.strerror}); make room "
            "there, or give another --run.dir"
        ) from error
    except HeldError as held:
        raise UserError(
            f"run.name: {path} is in use by process {held.holder}; wait for it, or choose another "
            "--run.name"
        ) from None


def check_run(config: Config, resume: Resume, rate: RatePolicy = "keep") -> None:
    """Raises UserError where the run cannot start or go on; touches nothing.

    Whether its newest checkpoint can, is found out by `resume.find_start`.
    """
    path = run_path(config)
    check_writable("run.dir", path.parent)
    if path.exists() and not path.is_dir():
        raise UserError(f"run.name: {path} is a file; choose another --run.name")
    check_plain(path)
    started = checkpoint_folders(path)
    if resume == "must" and not started:
        raise UserError(
            f"--resume must: {path} holds no checkpoint; check --run.name, or --resume auto"
        )
    if resume == "never" and started:
        raise UserError(
            f"--resume never: {path} already holds {len(started)} checkpoints; "
            "choose another --run.name, or remove that folder"
        )
    if not started:
        check_new(config, rate)
    saved = path / "config.yaml"
    if saved.exists():
        check_changes(
            changed_keys(load_config(saved), config),
            rate,
            differs=f"{path} is a run of another config",
            own=f"go on with its own (--config {shlex.quote(str(saved))})",
            started=bool(started),
        )
    elif path.is_dir() and any(
        child.name not in {".lock", "checkpoints"} and not child.name.startswith(".tmp-")
        for child in path.iterdir()
    ):
        raise UserError(f"run.name: {path} exists and is not a run; choose another --run.name")


def check_plain(run: Path) -> None:
    """Raises UserError for a link, pipe or device in a run's directory, to which it would write.

    The folder of the checkpoints alone may be a link, to another disk.
    """
    for folder in (run, run / "checkpoints"):
        for path in folder.iterdir() if folder.is_dir() else ():
            linked = path.is_symlink() and not (path.name == "checkpoints" and path.is_dir())
            if linked or not (path.is_dir() or path.is_file()):
                raise UserError(
                    f"{path}: a link, a pipe or a device, where a run writes files of its own; "
                    "remove it, or choose another --run.name"
                )


def check_new(config: Config, rate: RatePolicy) -> None:
    """Raises UserError for what only a run with a checkpoint can have; for one without."""
    path, restart = run_path(config), config.schedule.restart_step
    if rate != "keep":
        raise UserError(
            f"--rate {rate}: {path} holds no checkpoint to go on from; check --run.name, or leave "
            "--rate out"
        )
    if restart is not None:
        raise UserError(
            f"schedule.restart_step: the schedule would begin anew at step {restart} of a run that "
            f"goes on, and {path} holds no checkpoint to go on from; check --run.name, or begin a "
            "new run without it (--schedule.restart_step null)"
        )


def changed_keys(before: Config, now: Config) -> list[KeyChange]:
    """The keys whose change would make it another run."""
    return [each for each in _all_changes(before, now) if not _is_free(each.key)]


def free_changes(before: Config, now: Config) -> list[KeyChange]:
    """The other keys that differ, save where the run lies and what it is called."""
    changes = _all_changes(before, now)
    return [each for each in changes if _is_free(each.key) and not each.key.startswith("run.")]


def _is_free(key: str) -> bool:
    return FREE_KEYS.fullmatch(key) is not None and key not in FIXED_RUN_KEYS


def _all_changes(before: Config, now: Config) -> list[KeyChange]:
    old, new = before.model_dump(mode="json"), now.model_dump(mode="json")
    return [
        KeyChange(f"{section}.{key}", old[section][key], value)
        for section, values in new.items()
        for key, value in values.items()
        if value != old[section][key]
    ]


def checkpoint_folders(run: Path) -> list[Path]:
    """Published checkpoints, oldest first; temporary ones have other names."""
    return sorted((run / "checkpoints").glob("step-" + "[0-9]" * 8 + "*"))


def step_of(checkpoint: Path) -> int:
    """The number of completed steps that a checkpoint's folder is named after."""
    digits = checkpoint.name.removeprefix("step-")
    if not digits.isdecimal():
        raise UserError(
            f"{checkpoint}: not named as a checkpoint is (step-00000250); name it so, or move it "
            "out of the run"
        )
    return int(digits)


def newest_checkpoint(run: Path) -> Path | None:
    """The newest checkpoint that is whole; a damaged one is named loudly and passed over."""
    for folder in reversed(checkpoint_folders(run)):
        try:
            verify_checkpoint(folder)
        except CheckpointError as error:
            say(f"warning: {error}; falling back to the one before")
            continue
        return folder
    return None


def find_checkpoint(run: Path | None, checkpoint: Path | None, runs: Path = Path("runs")) -> Path:
    """The checkpoint to read from: the one named, else the run's best, else its newest whole one.

    Without a run, the newest one under `runs`. Raises UserError where there is none.
    """
    if checkpoint is not None:
        if not (checkpoint / "manifest.json").exists():
            raise UserError(
                f"--checkpoint: {checkpoint} is not a checkpoint folder; "
                "give RUN/checkpoints/step-..., or --run RUN"
            )
        return checkpoint
    if run is None:
        found = [path for path in runs.glob("*") if checkpoint_folders(path)]
        if not found:
            raise UserError(f"no run with a checkpoint under {runs}; train one, or give --run DIR")
        run = max(found, key=lambda path: (path / "checkpoints").stat().st_mtime)
    if not run.is_dir():
        raise UserError(f"--run: {run} does not exist; give a run directory, such as runs/NAME")
    best = _best_folder(run)
    if best is not None:
        with suppress(CheckpointError):
            verify_checkpoint(best)
            return best
        say(f"warning: {best} is damaged; taking the newest whole checkpoint")
    newest = newest_checkpoint(run)
    if newest is None:
        raise UserError(f"--run: {run} holds no whole checkpoint; train it first, or give another")
    return newest


def save_run(run: Path, training: Training) -> Path:
    """Saves a checkpoint of this moment and drops the old ones beyond `checkpoint.keep`.

    The newest and the best are never dropped. Where the disk has no room for one more, the oldest
    goes first, if another one is left. Raises SaveError when the disk refuses.
    """
    progress, keep = training.progress, training.config.checkpoint.keep
    folder = run / "checkpoints" / f"step-{progress.step:08d}"
    try:
        try:
            save_checkpoint(folder, training)
        except SaveError as error:
            if not (error.no_room and keep > 1 and _retain(run, keep - 1, progress)):
                raise
            save_checkpoint(folder, training)
        write_best(run, progress)
        _retain(run, keep, progress)
    except OSError as error:
        raise SaveError(error) from error
    return folder


def write_best(run: Path, progress: Progress) -> None:
    """Names the checkpoint of the best evaluation in best.json.

    The one named before stays where the best was never saved, as on a full disk.
    """
    path = run / "checkpoints" / "best.json"
    if progress.best_step is None:  # there may be one of steps that are undone
        path.unlink(missing_ok=True)
        return
    name = f"step-{progress.best_step:08d}"
    if (path.parent / name).exists():
        write_durably(path, sealed({"checkpoint": name, "val_loss": progress.best_val_loss}))


def start_afresh(run: Path, config: Config) -> None:
    """Writes what a new run begins with: its config, and a log without lines of an earlier try."""
    write_record(run, [])
    write_durably(run / "config.yaml", dump_config(config))
    truncate_after(run, -1)


def _best_folder(run: Path) -> Path | None:
    """The checkpoint that best.json names; None, and a warning, if it names none that is there."""
    path = run / "checkpoints" / "best.json"
    try:
        content = read_plain(path, MAX_BEST_BYTES)
        best = json.loads(content)
        whole = is_sealed(content) or set(best) == {"checkpoint", "val_loss"}  # unsealed: older
        folder = run / "checkpoints" / Path(str(best["checkpoint"])).name
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        whole = False
    if whole and folder in checkpoint_folders(run):
        return folder
    say(f"warning: {path} is damaged, or names a checkpoint that is not there")
    return None


def _tidy(run: Path) -> None:
    """Removes what a killed process left; a checkpoint whose successor never came is put back."""
    for old in (run / "checkpoints").glob(f"{REPLACED}*"):
        folder = old.with_name(old.name.removeprefix(REPLACED))
        if not folder.exists():
            old.rename(folder)
    for stale in [*run.glob(".tmp-*"), *(run / "checkpoints").glob(".tmp-*")]:
        shutil.rmtree(stale) if stale.is_dir() else stale.unlink()


def _remove_if_unused(run: Path) -> None:
    """Takes back the folder of a run that failed before it began."""
    if not (run / "config.yaml").exists():
        with suppress(OSError):
            (run / ".lock").unlink(missing_ok=True)
            (run / "checkpoints").rmdir()
            run.rmdir()


def _retain(run: Path, keep: int, progress: Progress) -> int:
    """Drops all but the newest `keep` and the best; returns how many went.

    Newer ones than this step are superseded. What best.json names stays until it names another.
    """
    folders = checkpoint_folders(run)
    now = f"step-{progress.step:08d}"
    best = {_best_folder(run), run / "checkpoints" / f"step-{progress.best_step or 0:08d}"}
    past = [folder for folder in folders if folder.name <= now]
    kept = {*past[-keep:], *(folder for folder in past if folder in best)}
    dropped = [folder for folder in folders if folder not in kept]
    for folder in dropped:
        doomed = folder.with_name(f".tmp-drop-{folder.name}")
        folder.rename(doomed)
        shutil.rmtree(doomed, ignore_errors=True)
    return len(dropped)
