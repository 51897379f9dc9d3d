"""Which run `gpt-lr plan` draws: a new one, or one that goes on at another rate. Writes nothing."""

from collections.abc import Callable

from gpt.config import Config
from gpt.configfile import load_config
from gpt.course import Course, RateJump
from gpt.errors import UserError
from gpt.model import GPT
from gpt.plan import Plan
from gpt.ratepolicy import RatePolicy, read_record
from gpt.resume import Start, check_left, find_start, rate_course, rate_jump
from gpt.rundir import changed_keys, check_run, checkpoint_folders, run_path


def planned_start(config: Config, rate: RatePolicy | None, at_step: int | None) -> Start:
    """Where the planned run goes on; at step 0 if nothing else is asked for.

    Without a policy, a run of this very config whose rate was changed on the way is planned as it
    goes on. Raises UserError where there is no checkpoint that a policy could go on from.
    """
    run, restart = run_path(config), config.schedule.restart_step
    if rate is not None:
        check_run(config, "auto", rate)
        if not checkpoint_folders(run):
            raise UserError(
                f"--rate {rate}: {run} holds no checkpoint to go on from; check --run.name, or "
                "leave --rate out"
            )
        return find_start(run, config, rate, at_step=at_step)
    saved = run / "config.yaml"
    has_changed = checkpoint_folders(run) and saved.exists() and (restart or read_record(run))
    if has_changed and not changed_keys(load_config(saved), config):
        return find_start(run, config)
    if restart is not None:
        raise UserError(
            f"schedule.restart_step: step {restart} is where the schedule of a run began anew, and "
            f"{run} is no such run of this config; leave it out (--schedule.restart_step null), or "
            "say with --rate how that run goes on"
        )
    return Start(config, None, 0, config)


def planned_course(
    start: Start, schedule: Plan, model: GPT, total_steps: Callable[[Config], int]
) -> tuple[Course, RateJump | None]:
    """The rate of every step, and the jump that it makes where the policy sets in.

    `model` may be one without weights; `total_steps` tells the length of a run by its config.
    Raises UserError for a step that the run does not have.
    """
    check_left(start, schedule)
    course = rate_course(start, schedule, model, total_steps)
    if start.change is not None:
        before = course.stretches[-2].plan
        if start.step > before.total_steps:
            raise UserError(
                f"--at {start.step}: by the plan that it has had so far, the run ends at step "
                f"{before.total_steps}; give a step up to that"
            )
    return course, rate_jump(start, schedule, model, total_steps)
