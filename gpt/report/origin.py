"""The checkpoint that a probe begins from: which one will do, and the run in its state.

The run's directory is only read, so a run that is still going needs no lock.
"""

from collections.abc import Sequence
from pathlib import Path

import torch

from gpt.build import assemble
from gpt.checkpoint import CheckpointError, restore_checkpoint, verify_checkpoint
from gpt.config import Config
from gpt.configfile import load_config
from gpt.data import TokenData, kept_data, open_data
from gpt.device import DTYPES, pick_device
from gpt.errors import UserError, say
from gpt.manifest import MANIFEST, read_json
from gpt.plan import Plan
from gpt.report.branches import Bench
from gpt.rundir import checkpoint_folders, step_of
from gpt.schedule import build_scheduler

_TRIES = 8  # a live run drops old checkpoints; so often another one is looked for


def open_bench(run: Path, lowest: float) -> Bench:
    """The run at its newest whole checkpoint whose rate is at least `lowest` of its peak.

    A run that goes on meanwhile may drop the checkpoint: then another one is taken. Raises
    UserError where none will do, and where the text is no longer the one that the run learned from.
    """
    if not checkpoint_folders(run):
        raise UserError(_without_checkpoint(run))
    config = load_config(run / "config.yaml")
    data = kept_data(config) or open_data(config)
    for _ in range(_TRIES):
        folder = _choose(run, data, lowest)
        try:
            if folder is not None:
                return _restored(folder, data)
        except Exception:  # whatever each reader says of a file that is gone
            assert folder is not None
            if folder.exists():
                raise
    raise UserError(
        f"--probe: the run dropped {_TRIES} checkpoints of {run} while they were read; let it keep "
        "more (--checkpoint.keep), or probe it once it has ended"
    )


def _without_checkpoint(run: Path) -> str:
    if not run.is_dir():
        found = "is not a run directory" if run.exists() else "does not exist"
        return f"--probe: {run} {found}; a probe trains on from a checkpoint: give runs/NAME"
    if not (run / "config.yaml").is_file():
        return (
            f"--probe: {run} is no run of gpt-train (no config.yaml), and a probe trains on from "
            "a checkpoint; without --probe the log alone is read"
        )
    return (
        f"--probe: {run} holds no checkpoint yet; wait for its first "
        "(--checkpoint.every_steps says when)"
    )


def _choose(run: Path, data: TokenData, lowest: float) -> Path | None:
    """The newest checkpoint that can be judged, verified; None if one went away meanwhile."""
    unfit: list[tuple[int, Plan]] = []
    for folder in reversed(checkpoint_folders(run)):
        try:
            plan, step = plan_of(load_config(folder / "config.yaml"), data), step_of(folder)
            if not is_judgeable(plan, step, lowest):
                unfit.append((step, plan))
                continue
            verify_checkpoint(folder)
        except (UserError, OSError) as error:
            if not folder.exists():
                return None
            say(f"warning: {error}; looking for an older one")
            continue
        return folder
    raise UserError(_why_none(run, unfit, lowest))


def is_judgeable(plan: Plan, step: int, lowest: float) -> bool:
    """Whether the rate after `step` steps is past its warmup and not below `lowest` of its peak."""
    # 1/sqrt falls for ever and is never cooled down.
    falls_for_ever = plan.name == "inverse_sqrt"
    return step >= plan.warmup_end and (falls_for_ever or plan.factor(step) >= lowest)


def _why_none(run: Path, unfit: Sequence[tuple[int, Plan]], lowest: float) -> str:
    if not unfit:
        return f"--probe: no checkpoint of {run} is whole; let the run save another"
    past_warmup = [(step, plan) for step, plan in unfit if step >= plan.warmup_end]
    if not past_warmup:
        return (
            f"--probe: {run} has no checkpoint after its warmup, which ends at step "
            f"{unfit[0][1].warmup_end:,}; probe it once there is one"
        )
    step, plan = max(past_warmup, key=lambda pair: pair[1].factor(pair[0]))
    return (
        f"--probe: the rate of {run} has already come down to {plan.factor(step):.0%} of its peak "
        f"at step {step:,}, and no checkpoint with a higher one is kept; below {lowest:.0%} there "
        "is too little left to show. Probe a run earlier, or let it keep more (--checkpoint.keep)"
    )


def plan_of(config: Config, data: TokenData) -> Plan:
    """The plan of a config on its text, whatever may be wrong with it."""
    return Plan.from_config(config, config.total_steps(data.train.n_tokens), strict=False)


def _restored(folder: Path, data: TokenData) -> Bench:
    """The run in the checkpoint's state, in the number format that it was trained in."""
    manifest = (folder / MANIFEST).read_bytes()
    config = load_config(folder / "config.yaml")
    plan, device = plan_of(config, data), _device_of(config)
    training = assemble(config, data, device, _dtype_of(folder))
    steady = training.scheduler
    training.scheduler = build_scheduler(training.optimizer, plan)
    restore_checkpoint(folder, training)
    if (folder / MANIFEST).read_bytes() != manifest:
        raise CheckpointError(f"{folder}: was replaced while it was read; try again")
    bench = Bench(folder, training, data, plan)
    training.scheduler = steady  # what it sets is overwritten before each step
    return bench


def _device_of(config: Config) -> torch.device:
    try:
        return pick_device(config.train.device)
    except UserError:
        raise UserError(
            f"--probe: the run trains on {config.train.device}, which this machine does not have; "
            "probe it where it trains"
        ) from None


def _dtype_of(folder: Path) -> torch.dtype:
    path = folder / "state.json"
    name = read_json(path).get("dtype")
    for dtype in DTYPES.values():
        if str(dtype) == f"torch.{name}":
            return dtype
    raise CheckpointError(f"{path}: dtype {name!r} is none of {', '.join(DTYPES)}; it is damaged")
