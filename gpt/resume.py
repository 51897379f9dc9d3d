"""Where a run begins or goes on, by which config, and what that makes of its rate.

A checkpoint's own config says what it was made with, the run's config.yaml and rate.json what was
accepted since. Each change of the rate counts from the checkpoint that the run goes on from; if
that is an older one than when it was accepted, it counts from the older one.
"""

import shlex
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import reduce
from pathlib import Path

import torch
from torch import nn

from gpt.checkpoint import Training, restore_checkpoint
from gpt.config import Config, OptimizerConfig
from gpt.configfile import load_config
from gpt.course import Course, RateJump, Stretch
from gpt.errors import UserError
from gpt.optim import build_optimizer
from gpt.plan import Plan
from gpt.ratepolicy import (
    RESTART_KEY,
    KeyChange,
    RateChange,
    RatePolicy,
    check_changes,
    offer,
    read_record,
    shown,
    with_keys,
)
from gpt.rundir import (
    changed_keys,
    check_new,
    checkpoint_folders,
    free_changes,
    newest_checkpoint,
    step_of,
)
from gpt.schedule import advance_scheduler, build_scheduler


@dataclass(frozen=True)
class Start:
    """Where a run begins or goes on.

    Attributes:
        config: what the run is from here on, `schedule.restart_step` filled in.
        checkpoint: what it goes on from; None for a new run.
        step: the steps that are completed.
        made: what the checkpoint was made with; for a new run the config.
        past: the changes of the rate that the checkpoint was made after.
        change: what changes now, if anything does.
        notes: what the user should know of this, a line each.
    """

    config: Config
    checkpoint: Path | None
    step: int
    made: Config
    past: tuple[RateChange, ...] = ()
    change: RateChange | None = None
    notes: tuple[str, ...] = ()

    @property
    def record(self) -> list[RateChange]:
        """Every change of the rate until now: what rate.json holds from here on."""
        return [*self.past, *([self.change] if self.change else [])]


def find_start(
    run: Path, config: Config, rate: RatePolicy = "keep", *, at_step: int | None = None
) -> Start:
    """Decides where a run goes on, and whether it may with this config. Reads only.

    With `at_step` the answer is what would be if the newest checkpoint were of that step.

    Raises UserError where there is no whole checkpoint that a policy could go on from, where the
    policy does not accept what changed, and where the run's own config.yaml was changed by hand.
    """
    checkpoint = newest_checkpoint(run)
    if checkpoint is None:
        if broken := checkpoint_folders(run):
            raise UserError(
                f"{run}: none of its {len(broken)} checkpoints is whole, as told above; bring one "
                "back from a copy, or begin anew with another --run.name"
            )
        check_new(config, rate)
        return Start(config, None, 0, config)
    state = _read_state(run, checkpoint)
    if at_step is not None and at_step != state.step:
        state = _moved(state, at_step)
    return _decide(state, config, rate)


@dataclass(frozen=True)
class _State:
    """What a run's directory says.

    The checkpoint is of `step` and was made with `made`; the run is to go on with `accepted`, which
    differs by the changes that are `pending`, and by what was changed `by_hand`.
    """

    run: Path
    checkpoint: Path
    step: int
    made: Config
    accepted: Config
    past: tuple[RateChange, ...]
    pending: tuple[RateChange, ...] = ()
    by_hand: tuple[KeyChange, ...] = ()


def _read_state(run: Path, checkpoint: Path) -> _State:
    step, made = step_of(checkpoint), load_config(checkpoint / "config.yaml")
    saved = run / "config.yaml"
    accepted = load_config(saved) if saved.exists() else made
    record = read_record(run)
    past = tuple(change for change in record if change.step < step)
    later = tuple(change for change in record if change.step >= step)
    state = _State(run, checkpoint, step, made, accepted, past)
    explained = reduce(lambda config, change: change.done(config), later, made)
    if not changed_keys(explained, accepted):
        return replace(state, pending=later)
    return replace(state, by_hand=tuple(changed_keys(made, accepted)))


def _moved(state: _State, step: int) -> _State:
    """The state as if the newest checkpoint were of another step."""
    made, past = state.made, state.past
    if step < state.step:
        undone = reversed([change for change in past if change.step >= step])
        made = reduce(lambda config, change: change.undone(config), undone, made)
        past = tuple(change for change in past if change.step < step)
    elif state.pending:
        made = _clipped(state.accepted, state.step)
        change = _change(state.pending[-1].policy, state.step, state.made, made)
        past = (*past, change) if change else past
    return _State(state.run, state.checkpoint, step, made, made, past)


def _decide(state: _State, config: Config, rate: RatePolicy) -> Start:
    base = state.accepted
    if state.by_hand and changed_keys(state.made, config):
        base = state.made
        if rate == "keep":
            raise _changed_by_hand(state)
    check_changes(
        changed_keys(base, config),
        rate,
        differs=f"{state.run} is a run of another config"
        if state.step == step_of(state.checkpoint)
        else f"{state.run} had another config at step {state.step}",
        own=f"go on with its own (--config {shlex.quote(str(state.run / 'config.yaml'))})",
    )
    now, policy, notes = _with_restart(state, config, rate), rate, []
    if others := free_changes(state.made, config):
        notes.append(f"changed  since step {state.step:,}: {shown(others)}")
    if state.pending and state.pending[-1].step > state.step:
        notes.append(
            f"warning: the rate of {state.run} was changed at step {state.pending[-1].step:,} "
            f"({state.pending[-1].policy}), after its newest whole checkpoint; that change counts "
            f"from step {state.step:,} now"
        )
    is_new = bool(changed_keys(base, now))
    if state.pending and not (rate != "keep" and is_new):
        policy = state.pending[-1].policy
    change = _change(policy, state.step, state.made, now)
    if rate != "keep" and not is_new:
        notes.append(f"rate     {rate} changes nothing: the config is the run's own already")
    elif rate != "keep" and change is None:
        notes.append(f"rate     {rate} takes back what no checkpoint was made with yet")
    return Start(now, state.checkpoint, state.step, state.made, state.past, change, tuple(notes))


def _with_restart(state: _State, config: Config, rate: RatePolicy) -> Config:
    """The config with its schedule beginning anew where the policy has it."""
    restart = config.schedule.restart_step
    if rate == "rewarm":
        return with_keys(config, {RESTART_KEY: state.step})
    if restart is None or restart <= state.step:
        return config
    if not state.pending or restart != state.accepted.schedule.restart_step:
        raise UserError(
            f"schedule.restart_step: step {restart} is after step {state.step}, from which "
            f"{state.run} would go on; leave it out, --rate rewarm fills it in"
        )
    return _clipped(config, state.step)


def _clipped(config: Config, step: int) -> Config:
    """The config with a restart no later than `step`."""
    restart = config.schedule.restart_step
    return config if restart is None or restart <= step else with_keys(config, {RESTART_KEY: step})


def _change(policy: RatePolicy, step: int, made: Config, now: Config) -> RateChange | None:
    changed = changed_keys(made, now)
    if not changed:
        return None
    assert policy != "keep", "a change that no policy accepted"
    return RateChange(policy=policy, step=step, changed={c.key: (c.was, c.now) for c in changed})


def _changed_by_hand(state: _State) -> UserError:
    way = offer(state.by_hand)
    return UserError(
        f"{state.run / 'config.yaml'}: is not what the run's checkpoint of step {state.step} was "
        f"made with ({shown(state.by_hand)}); {f'say {way}, or ' if way else ''}copy "
        f"{state.checkpoint / 'config.yaml'} over it"
    )


def rate_course(
    start: Start, plan: Plan, model: nn.Module, total_steps: Callable[[Config], int]
) -> Course:
    """The rate over the whole run: by the plans that it had, and from `start` on by `plan`.

    `model` may be one without weights, on the device `meta`; `total_steps` tells the length of a
    run by its config.
    """
    stretches = [Stretch(0, plan, peak_rates(model, start.config.optimizer))]
    config = start.config
    for change in reversed(start.record):
        stretches[0] = replace(stretches[0], first_step=change.step)
        config = start.made if change is start.change else change.undone(config)
        before = Plan.from_config(config, total_steps(config), strict=False)
        stretches.insert(0, Stretch(0, before, peak_rates(model, config.optimizer)))
    return Course(tuple(stretches))


def rate_jump(
    start: Start, plan: Plan, model: nn.Module, total_steps: Callable[[Config], int]
) -> RateJump | None:
    """What the change at `start` does to the rates, if there is one; as `rate_course` has it."""
    if start.change is None:
        return None
    before, after = rate_course(replace(start, past=()), plan, model, total_steps).stretches
    return RateJump(start.change, before.rates(start.step), after.rates(start.step))


def peak_rates(model: nn.Module, config: OptimizerConfig) -> dict[str, float]:
    """The peak rate of each of the optimizer's groups, by name; the logged one first."""
    optimizer = build_optimizer(model, config, device=torch.device("meta"))
    return {str(group["name"]): float(group["lr"]) for group in optimizer.param_groups}


def check_left(start: Start, plan: Plan) -> None:
    """Raises UserError where no step is left that could use a changed rate."""
    if start.change is not None and start.step >= plan.total_steps:
        raise UserError(
            f"--rate {start.change.policy}: all {plan.total_steps:,} steps of the run are done "
            f"(it stands at step {start.step:,}), and none is left to use another rate; give a "
            "larger train.max_steps (or max_tokens, max_epochs) too"
        )


def restore(start: Start, training: Training, plan: Plan, epoch_tokens: int) -> None:
    """Puts the checkpoint of `start` into a training that was built with its config and `plan`.

    Where the rate changes, the checkpoint goes into an optimizer and a schedule as it was made
    with, so that all is checked and exact; then the optimizer's state moves into the new one, whose
    rates, decay and so on are the config's, and the schedule to where the new plan is at that step.

    Raises UserError if the checkpoint holds something else than the config builds.
    """
    assert start.checkpoint is not None
    if start.change is None:
        restore_checkpoint(start.checkpoint, training)
        return
    made = start.made
    device = next(training.model.parameters()).device
    optimizer = build_optimizer(training.model, made.optimizer, device=device)
    plan_before = Plan.from_config(made, made.total_steps(epoch_tokens))
    scheduler = build_scheduler(optimizer, plan_before)
    as_made = replace(training, config=made, optimizer=optimizer, scheduler=scheduler)
    restore_checkpoint(start.checkpoint, as_made)
    training.progress = as_made.progress
    for parameter, values in optimizer.state.items():
        training.optimizer.state[parameter] = values
    advance_scheduler(training.optimizer, training.scheduler, plan, start.step)
