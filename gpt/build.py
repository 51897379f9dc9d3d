"""From a config to a Training that is ready for its next step: built, or continued.

Each choice made for the user (device, number format, compile, length) is said, with its reason.
"""

from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch.optim.lr_scheduler import LambdaLR

from gpt.checkpoint import Training
from gpt.config import Config, EvalConfig, TokenizerConfig, is_tokenizer_kind
from gpt.configfile import dump_config, named
from gpt.corpus import source_files
from gpt.course import RateJump
from gpt.data import TokenData, cached_data, open_data
from gpt.device import (
    compile_blocks,
    grad_scaler,
    on_meta,
    pick_compile,
    pick_device,
    pick_dtype,
    seed_everything,
)
from gpt.errors import UserError, only_warnings, say
from gpt.files import check_writable, write_durably
from gpt.fits import check_fits
from gpt.lr.findings import Facts, facts_of
from gpt.lr.lint import lint
from gpt.metrics import truncate_after
from gpt.model import GPT, count_parameters, flops_per_token, parameter_inventory
from gpt.optim import build_optimizer
from gpt.ranks import KNOWN
from gpt.ratepolicy import RatePolicy, write_record
from gpt.resume import Start, check_left, find_start, rate_jump, restore
from gpt.rundir import Resume, check_run, run_path, start_afresh, write_best
from gpt.schedule import Plan, build_scheduler, check_plan
from gpt.sources import file_stat
from gpt.tokenizer import Tokenizer, build_tokenizer
from gpt.trackers import check_installed

BYTES_VOCAB = 257
SMALL_BYTES = 2_000_000  # a text of which --dry-run can know everything in a second
CHARS_GUESS = 256  # letters, digits and signs of one alphabet; Chinese text has thousands


@dataclass(frozen=True)
class Choices:
    """What `auto` came to, and the lines that say why."""

    device: torch.device
    dtype: torch.dtype
    compile: bool
    lines: list[str]
    warnings: list[str]


def choose(config: Config, vocab_size: int, total_steps: int) -> Choices:
    """Device, number format and compile for a run.

    Raises UserError for what is not there, and where the memory does not suffice.
    """
    device = pick_device(config.train.device)
    rows = parameter_inventory(config.model, vocab_size)
    matrices = sum(row.count for row in rows if "W" in row.name or row.name == "FFN")
    dtype, dtype_reason = pick_dtype(config.train.dtype, device, matrices)
    flops = flops_per_token(config.model, vocab_size) * config.tokens_per_step * total_steps
    compiles, compile_reason = pick_compile(config.train.compile, device, flops)
    threads = f", {torch.get_num_threads()} threads" if device.type == "cpu" else ""
    return Choices(
        device,
        dtype,
        compiles,
        [f"device   {device}{threads}", f"dtype    {dtype_reason}", f"compile  {compile_reason}"],
        check_fits(config, vocab_size, device, dtype, compiles=compiles),
    )


def check_prompt(config: Config, data: TokenData) -> None:
    """Raises UserError for a prompt that would end the run at its first evaluation."""
    if config.eval.sample_tokens:
        with named("eval.sample_prompt"):
            data.tokenizer.encode(sample_prompt(config, data.tokenizer))


def sample_prompt(config: Config, tokenizer: Tokenizer) -> str:
    """How samples begin; as a new document does, where the text has not the default's new line."""
    prompt = config.eval.sample_prompt
    if prompt == EvalConfig().sample_prompt:
        try:
            tokenizer.encode(prompt)
        except UserError:
            return ""
    return prompt


def build_training(config: Config, data: TokenData) -> tuple[Training, Plan]:
    """Model, optimizer and schedule at step 0, and the plan of the rate; says what was chosen.

    Raises UserError where the text, the schedule or the device does not allow the run.
    """
    total_steps = config.total_steps(data.train.n_tokens)
    plan = Plan.from_config(config, total_steps)
    check_prompt(config, data)
    choices = choose(config, data.tokenizer.vocab_size, total_steps)
    for line in choices.warnings:
        say(line)
    seed_everything(config.run.seed)
    training = assemble(config, data, choices.device, choices.dtype)
    check_plan(plan, [group["lr"] for group in training.optimizer.param_groups])
    training.scheduler = build_scheduler(training.optimizer, plan)
    n_parameters = count_parameters(training.model)
    lines = describe(config, data, plan, n_parameters) + choices.lines
    for line in lines + lint_lines(config, plan, facts_of(n_parameters, data, choices.device)):
        say(line)
    if choices.compile:
        compile_blocks(training.model.blocks)
    return training, plan


def assemble(config: Config, data: TokenData, device: torch.device, dtype: torch.dtype) -> Training:
    """A fresh model with its optimizer, drawn from torch's generators as they are.

    Every rate stays at its peak until the caller puts a scheduler of its own in.
    """
    training = assemble_without_text(config, data.tokenizer.vocab_size, device, dtype)
    training.tokenizer = data.tokenizer
    training.data_fingerprint, training.data_parts = data.fingerprint, data.parts
    return training


def assemble_without_text(
    config: Config, vocab_size: int, device: torch.device, dtype: torch.dtype
) -> Training:
    """The same to be timed on random ids: its tokenizer is a stand-in, and it cannot be saved."""
    model = GPT(config.model, vocab_size).to(device)
    model.recompute = config.train.activation_checkpointing
    optimizer = build_optimizer(model, config.optimizer, device=device)
    return Training(
        config=config,
        tokenizer=build_tokenizer(TokenizerConfig(kind="bytes"), tuple),
        model=model,
        optimizer=optimizer,
        scheduler=LambdaLR(optimizer, _peak),
        scaler=grad_scaler(device, dtype),
        dtype=dtype,
        data_fingerprint="",
    )


def _peak(step: int) -> float:
    return 1.0


def continue_or_start(
    run: Path, training: Training, plan: Plan, start: Start, epoch_tokens: int
) -> RateJump | None:
    """Puts the checkpoint of `start` into `training`, or begins a new run; writes down which.

    `training` and `plan` were built of the config of `start`; `epoch_tokens` is the number of
    training tokens. Returns what that does to the rate, if anything.

    Raises UserError, before anything is written, if the checkpoint holds something else than the
    config builds, and where no step is left that could use another rate.
    """
    for note in start.notes:
        say(note)
    if start.checkpoint is None:
        start_afresh(run, start.config)
        training.tokenizer.save(run)
        say(f"run      {run}")
        return None
    check_left(start, plan)
    restore(start, training, plan, epoch_tokens)
    write_best(run, training.progress)  # where a run was killed between its checkpoint and this
    step = training.progress.step
    truncate_after(run, step, training.progress.next_batch, training.progress.evaluated_step)
    write_record(run, start.record)  # first: a config.yaml without it would seem changed by hand
    write_durably(run / "config.yaml", dump_config(start.config))
    say(f"run      {run}, going on after step {step} of {plan.total_steps}")
    jump = rate_jump(start, plan, training.model, lambda each: each.total_steps(epoch_tokens))
    if jump is not None:
        say(jump.line())
    return jump


def describe(config: Config, data: TokenData, plan: Plan, n_parameters: int) -> list[str]:
    """The run in a few lines, before step 1."""
    model, train, peak = config.model, config.train, config.optimizer.lr
    train_set, val_set = data.train, data.val
    top_step = min(plan.warmup_end, plan.total_steps - 1)
    epochs = plan.total_steps * config.tokens_per_step / train_set.n_tokens
    micro = train.micro_batch_size or train.batch_size
    split = f" in micro-batches of {micro}" if micro < train.batch_size else ""
    return [
        f"data     {train_set.n_tokens:,} tokens to train on, {val_set.n_tokens:,} to validate on; "
        f"{train_set.n_bytes / train_set.n_tokens:.2f} bytes/token, "
        f"vocabulary {data.tokenizer.vocab_size:,}",
        f"model    {n_parameters:,} parameters: {model.n_layer} layers, {model.n_head} heads, "
        f"{model.n_embd} wide, context {model.context_len}",
        f"rate     {config.optimizer.name}, {plan.name}: {plan.rate(plan.origin, peak):.2e} "
        f"at step {plan.origin:,}, {plan.rate(top_step, peak):.2e} at {top_step:,}, "
        f"{plan.rate(plan.total_steps - 1, peak):.2e} at the end",
        f"length   {plan.total_steps:,} steps of {train.batch_size} x {model.context_len} = "
        f"{config.tokens_per_step:,} tokens{split}; {epochs:.2f} epochs",
    ]


def lint_lines(config: Config, plan: Plan, facts: Facts) -> list[str]:
    """What looks wrong, a line each; `gpt-lr plan` has the sources too."""
    return [
        f"lint     {found.id}: {found.message} → {found.remedy}"
        for found in lint(config, plan, facts)
    ]


def expected_vocab_size(config: TokenizerConfig) -> int:
    """The number of ids before any text is read: exact, save for bpe of little text and chars."""
    match config.kind:
        case "bytes":
            return BYTES_VOCAB
        case "bpe":
            return config.vocab_size
        case "chars":
            return CHARS_GUESS
        case kind if is_tokenizer_kind(kind):
            return 1 + next(eot_id for split, eot_id in KNOWN.values() if split == kind)
    return build_tokenizer(config, tuple).vocab_size  # a ranks file, which needs no text


def dry_run(config: Config, resume: Resume, rate: RatePolicy = "keep") -> list[str]:
    """Checks all that can be checked without writing anything; the plan as lines.

    Raises UserError for whatever would stop the run.
    """
    pick_device(config.train.device)
    check_run(config, resume, rate)
    check_installed(config.log)
    start = find_start(run_path(config), config, rate)
    config = start.config
    files = source_files(config.data)
    size = sum(file_stat(path).st_size for path in files)
    data = cached_data(config)
    if data is None:
        check_writable("data.dir", Path(config.data.dir))
        data = small_data(config) if size <= SMALL_BYTES else None
    if data is None:
        vocab_size = expected_vocab_size(config.tokenizer)
    else:
        vocab_size = data.tokenizer.vocab_size
        check_prompt(config, data)
    n_parameters = sum(row.count for row in parameter_inventory(config.model, vocab_size))
    plan = None
    if data is not None or config.train.max_epochs is None:
        epoch_tokens = 0 if data is None else data.train.n_tokens
        plan = Plan.from_config(config, config.total_steps(epoch_tokens))
    choices = choose(config, vocab_size, plan.total_steps if plan else 1)
    device = choices.device
    if data is None or plan is None:
        lines = [
            f"data     {len(files):,} files, {size:,} bytes; not tokenized yet: "
            "tokens and epochs are open",
            *choices.lines[:1],
        ]
    else:
        lines = describe(config, data, plan, n_parameters) + choices.lines
    lines += choices.warnings
    if plan is not None:
        lines += lint_lines(config, plan, facts_of(n_parameters, data, device))
    lines += [*start.notes, *jump_lines(start, plan, vocab_size, data)]
    return [*lines, f"run      {run_path(config)} (dry run: nothing was written)"]


def small_data(config: Config) -> TokenData:
    """A small text tokenized for once, in a place of its own: what it tells is worth the second."""
    with TemporaryDirectory() as folder, only_warnings():
        elsewhere = config.data.model_copy(update={"dir": folder})
        return open_data(config.model_copy(update={"data": elsewhere}), progress=False)


def jump_lines(
    start: Start, plan: Plan | None, vocab_size: int, data: TokenData | None
) -> list[str]:
    """What going on does to the rate, in a line; none where it stays as it was planned.

    Without the tokenized text, the rates of a length in epochs are open.
    """
    if start.change is None:
        return []
    if plan is None or (data is None and start.made.train.max_epochs is not None):
        return [RateJump(start.change, None, None).line()]
    check_left(start, plan)
    epoch_tokens = 0 if data is None else data.train.n_tokens
    with on_meta():
        model = GPT(start.config.model, vocab_size)
    jump = rate_jump(start, plan, model, lambda each: each.total_steps(epoch_tokens))
    return [] if jump is None else [jump.line()]
