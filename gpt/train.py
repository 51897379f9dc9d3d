"""Training, from top to bottom: build, go on from a checkpoint, then evaluate, save, step, log."""

import math
from collections.abc import Callable
from pathlib import Path

from gpt.broken import skip_broken, stop_if_broken
from gpt.build import build_training, continue_or_start, sample_prompt
from gpt.checkpoint import SaveError, Training
from gpt.config import Config
from gpt.data import Batches, Split, TokenData, open_data
from gpt.device import busy_warning, eager, pick_device, set_threads
from gpt.ending import (
    STOPPED,
    in_words,
    reached_limit,
    reached_patience,
    report,
    telling_where_it_stands,
    way_on,
)
from gpt.errors import UserError, say
from gpt.fits import memory_errors
from gpt.generate import Sampling, generate
from gpt.guard import SpikeGuard
from gpt.malloc import keep_freed_memory
from gpt.ratepolicy import RatePolicy
from gpt.record import Recorder, note_evaluation
from gpt.resume import find_start
from gpt.rundir import Resume, locked_run, save_run
from gpt.schedule import Plan
from gpt.signals import StopRequest
from gpt.step import OVERFLOW, NonFiniteError, evaluate, train_step
from gpt.trackers import check_installed


def train(
    config: Config,
    resume: Resume = "auto",
    *,
    rate: RatePolicy = "keep",
    title: str = "",
    data: TokenData | None = None,
    open_text: Callable[[Config], TokenData] | None = None,
) -> None:
    """Trains the run that `config` describes, or goes on with it, until one of its limits.

    `rate` says what the config may change of the rate where the run goes on (see `ratepolicy`).
    With a `title` it is one run out of many: the console shows its bar and warnings, no more; and
    with `data`, opened before, all of them learn from the same, whatever happens to the text.
    `open_text` takes the place of `open_data`.
    Raises UserError for what the user can mend, and Stopped after a signal, once all is saved.
    """
    pick_device(config.train.device)  # before any work: is it there?
    check_installed(config.log)
    set_threads()
    keep_freed_memory(not config.train.activation_checkpointing)
    if not title and (busy := busy_warning()):
        say(f"warning: {busy}")
    with locked_run(config, resume, rate) as run:
        with telling_where_it_stands(run), memory_errors(config, run):
            stop = train_in(run, config, rate, title, data or (open_text or open_data)(config))
        stop.raise_if_requested()


def train_in(
    run: Path, config: Config, rate: RatePolicy, title: str, data: TokenData
) -> StopRequest:
    """The same in a directory that this process holds; returns whether it was asked to stop."""
    start = find_start(run, config, rate)
    config = start.config
    training, plan = build_training(config, data)
    jump = continue_or_start(run, training, plan, start, data.train.n_tokens)
    stop = StopRequest(way_on(run))
    with stop, Recorder(run, training, plan.total_steps, title) as recorder:
        if start.checkpoint is not None:
            recorder.event("resumed")
        if jump is not None:
            recorder.event("rate_policy", **jump.values())
        batches = Batches(
            data.train,
            config.model.context_len,
            config.train.batch_size,
            config.run.seed,
            shuffle=config.data.shuffle,
        )
        recorder.begin(data)
        ending = train_until_end(run, training, plan, batches, data.val, recorder, stop)
        recorder.end(in_words(ending, training, plan))
    report(run, training, plan, ending)
    return stop


def train_until_end(
    run: Path,
    training: Training,
    plan: Plan,
    batches: Batches,
    val: Split,
    recorder: Recorder,
    stop: StopRequest,
) -> str:
    """Runs steps until a limit, patience or a signal ends it; returns which it was.

    Evaluating and saving come before the step, so that a resumed run takes up what was due.
    """
    config, progress = training.config, training.progress
    saved_step = progress.step
    last_save_failed = False
    guard = None
    if config.train.spike_sigma is not None:
        guard = SpikeGuard(config.train.spike_sigma, config.train.skip_limit, progress)
    while True:
        step, limit = progress.step, reached_limit(config, plan, progress.step, progress.seconds)
        evaluated = False
        if step > progress.evaluated_step and (limit or step % config.eval.every_steps == 0):
            evaluated = evaluate_and_sample(training, val, recorder, stop)
        # Asked once: a stop that is seen after the save must wait for the next one.
        ending = limit or reached_patience(training) or (STOPPED if stop.requested else "")
        best = progress.best_step == step
        due = ending or best or step % config.checkpoint.every_steps == 0
        if due and (step > saved_step or evaluated):
            last_save_failed = not save(run, training, recorder)
            saved_step = step
        recorder.tick()
        if ending:
            if last_save_failed:
                raise UserError(
                    f"train: the last checkpoint of {run} could not be saved; see above"
                )
            return ending
        step_once(run, training, batches, recorder, guard)


def step_once(
    run: Path, training: Training, batches: Batches, recorder: Recorder, guard: SpikeGuard | None
) -> None:
    """Takes the next batch and one optimizer step from it, and writes down how it went.

    A batch that gives no finite numbers, or that the guard refuses, is passed over.
    """
    progress = training.progress
    inputs, targets = batches.batch(progress.next_batch)
    recorder.before_step()
    try:
        result = train_step(training, inputs, targets, gauge=recorder.gauge, guard=guard)
    except NonFiniteError as error:
        skip_broken(run, training, recorder, error, (inputs, targets))
        return
    if result.skipped == OVERFLOW:  # fp16's scale was too high; the same batch again, at half of it
        progress.skipped_steps += 1
        scale = training.scaler.get_scale()
        recorder.event("skipped", batch=progress.next_batch, loss=result.loss, scale=scale)
        return
    if result.skipped:
        recorder.skipped_batch("spike_skipped", loss=result.loss, why=result.skipped)
        return
    progress.skips_in_row = 0
    progress.step += 1
    progress.tokens += targets.numel()
    progress.train_loss_sum += result.loss
    progress.train_loss_steps += 1
    epoch = batches.epoch(progress.next_batch)
    recorder.step(result, inputs, epoch, recorder.tick())


def evaluate_and_sample(
    training: Training, val: Split, recorder: Recorder, stop: StopRequest
) -> bool:
    """Validation loss over the same tokens as ever, and a few words from the model.

    False, and everything as it was, if a stop is requested on the way: a resumed run does it again.
    """
    config, progress = training.config, training.progress
    device = next(training.model.parameters()).device
    result = evaluate(training, val, device, lambda: stop.requested)
    if result is None:
        return False
    prompt, text = sample_prompt(config, training.tokenizer), None
    if config.eval.sample_tokens and math.isfinite(result.loss):
        try:
            text = sample(training, prompt, stop)
        except UserError as error:  # a model from which none can be drawn: the next step judges it
            recorder.line(f"warning: no sample: {error}")
        else:
            if text is None:
                return False
    train_loss = note_evaluation(progress, result)
    recorder.evaluation(result, train_loss, is_best=progress.best_step == progress.step)
    if text is not None:
        recorder.event("sample", prompt=prompt, text=text)
        recorder.line(f"sample | {prompt}{text}".replace("\n", "\n       | "))
    return True


def sample(training: Training, prompt: str, stop: StopRequest) -> str | None:
    """What the model writes now, always from the same seed; draws nothing from the run's own.

    None if a stop is requested on the way.
    """
    config = training.config
    sampling = Sampling(max_tokens=config.eval.sample_tokens, seed=config.run.seed)
    training.model.eval()
    text = ""
    with eager(training.model):
        for piece in generate(training.model, training.tokenizer, [prompt], sampling):
            if stop.requested:
                return None
            text += piece.text
    return text


def save(run: Path, training: Training, recorder: Recorder) -> bool:
    """Saves a checkpoint and says so once it is durable; a full disk does not end the run.

    Weights that are not finite are never saved: they end it.
    """
    stop_if_broken(run, training, recorder)
    try:
        folder = save_run(run, training)
    except SaveError as error:
        recorder.event("save_failed", reason=str(error))
        recorder.line(
            f"warning: step {training.progress.step} could not be saved ({error}); the older "
            "checkpoints are intact, the next save tries again"
        )
        return False
    recorder.line(f"saved    {folder}")
    return True
