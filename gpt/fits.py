"""Whether a run fits into the memory that is free, and what would fit where it does not.

Bounds in closed form settle most cases at once; between them a rehearsal (`lr.memory`) says more.
What the estimate missed is caught when an allocation fails: the same advice, and where to go on.
"""

import errno
import shlex
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import torch

from gpt.config import Config
from gpt.configfile import under_new_name
from gpt.errors import UserError
from gpt.gauges import SAMPLE
from gpt.headloss import head_loss_pays, slice_tokens
from gpt.lr.memory import Memory, estimate_memory
from gpt.model import parameter_inventory
from gpt.room import Room, room
from gpt.rundir import newest_checkpoint

# Shares of what is free. Up to the first, no closer look is needed; over the second, a warning, and
# advice stays below it: beside its tensors a process holds about half a gigabyte (`lr.memory`),
# half of which it does not have yet when it asks.
SURE, NEAR = 0.5, 0.66
_FLOAT = 4
# Python's and NumPy's own objects for one sequence while a batch is put together; measured.
_SEQUENCE_BYTES = 300
# A token as it is read, as int64, and as input and target.
_TOKEN_BYTES = 4 + 8 + 8 + 8
# What can be made smaller, in this order, and down to what (n_embd: two features a head).
_LEAST = {"batch_size": 1, "context_len": 16, "n_layer": 1, "n_embd": 1}
_FAILURES = ("can't allocate memory", "not enough memory", "out of memory", "bad_alloc")


class Bounds(NamedTuple):
    """Bytes of a training step: what is there throughout, and bounds of the most at once."""

    resting: float
    low: float
    high: float


def bounds(config: Config, vocab_size: int) -> Bounds:
    """The memory of a step in closed form: between which bounds it must lie.

    Measured against the rehearsal over widths, depths, contexts, vocabularies, activations and
    formats: it lies at 0.2 to 0.99 of the upper one.
    """
    model, train = config.model, config.train
    n_parameters = sum(row.count for row in parameter_inventory(model, vocab_size))
    of_state = {"adam": 2, "adamw": 2, "muon": 2, "sgd": 1, "adafactor": 0}[config.optimizer.name]
    batch = train.batch_size * (model.context_len * _TOKEN_BYTES + _SEQUENCE_BYTES)
    tokens = (train.micro_batch_size or train.batch_size) * model.context_len
    least_state = min(1, of_state) if config.optimizer.momentum else 0
    low = _FLOAT * n_parameters * (2 + least_state) + batch
    inside = model.n_layer * (4 * model.n_embd + model.hidden) * _FLOAT / 2
    if train.activation_checkpointing:
        inside = model.n_layer * model.n_embd * _FLOAT / 2
    logits, least_copies, most_copies = vocab_size * tokens, 3.0, 4.0
    if head_loss_pays(tokens, model.n_embd, vocab_size):
        # One slice, in the products' format; and copies of the head and of its gradient in it.
        logits = vocab_size * min(tokens, slice_tokens(vocab_size))
        least_copies, most_copies = 0.5, 1 + 3 * model.n_embd * vocab_size / logits
    least = tokens * inside + least_copies * logits * _FLOAT
    inside = model.n_layer * (20 * model.n_embd + 4 * model.hidden) + 10 * model.n_embd
    most = (tokens * inside + most_copies * logits) * _FLOAT
    # What an update adds (`lr.memory.update_bytes`): samples of each tensor; Adafactor's largest.
    update = 7 * min(n_parameters, (9 * model.n_layer + 4) * SAMPLE)
    if config.optimizer.name == "muon":
        update = 7 * n_parameters
    elif config.optimizer.name == "adafactor":
        widest = model.n_embd * max(vocab_size, model.hidden)
        update += max(widest, model.ngram_parameters)
    resting = _FLOAT * (n_parameters * (2 + of_state) + update) + batch
    return Bounds(low, low + least, resting + most)


def check_fits(
    config: Config, vocab_size: int, device: torch.device, dtype: torch.dtype, *, compiles: bool
) -> list[str]:
    """Raises UserError, before anything is allocated, where a step does not fit; warns where near.

    What is compiled, or runs on an accelerator, holds less than the estimate: it is refused only
    for what any step holds.
    """
    there = room(device)
    if there is None:
        return []
    at = bounds(config, vocab_size)
    if at.high <= SURE * there.free:
        return []
    whole = there.free + there.swap
    if at.resting > whole:
        changes = fitting(config, vocab_size, there.free)
        alone = "weights, gradients and optimizer alone need"
        raise _too_large(config, alone, at.resting, there, device, changes)
    known = None if at.low > whole else estimate_memory(config, vocab_size, dtype)
    need = at.low if known is None else batch_bytes(config) + known.total
    if need <= NEAR * there.free:
        return []
    changes = fitting(config, vocab_size, there.free, dtype, known)
    if need > whole and device.type == "cpu" and not compiles:
        raise _too_large(config, "a step needs at least", need, there, device, changes)
    fits = f"; should it not fit: {_options(changes)}" if changes else ""
    return [
        f"warning: a step needs about {gigabytes(need)} of memory, and {gigabytes(there.free)} "
        f"are free on {device}{fits}"
    ]


def batch_bytes(config: Config) -> float:
    """What a batch is made of, but for its two tensors of ids, which a rehearsal counts."""
    tokens = config.model.context_len * (_TOKEN_BYTES - 16)
    return config.train.batch_size * (tokens + _SEQUENCE_BYTES)


def _with(config: Config, **changes: int) -> Config:
    """The config with some of the sizes that decide what it needs."""
    of_train = {"batch_size", "micro_batch_size"}
    train = {key: value for key, value in changes.items() if key in of_train}
    shape = {key: value for key, value in changes.items() if key not in of_train}
    return config.model_copy(
        update={
            "train": config.train.model_copy(update=train),
            "model": config.model.model_copy(update=shape),
        }
    )


def _too_large(
    config: Config,
    what: str,
    need: float,
    there: Room,
    device: torch.device,
    changes: dict[str, int],
) -> UserError:
    swap = f" (and {gigabytes(there.swap)} of swap)" if there.swap else ""
    key = next(iter(changes), "model.n_embd").replace("micro_", "")
    section, _, name = key.partition(".")
    value = config.model_dump()[section][name]
    fits = f"it would fit with {_options(changes)}" if changes else "no size of it would fit"
    return UserError(
        f"{key} {value}: {what} {gigabytes(need)} of memory, and {gigabytes(there.free)}{swap} are "
        f"free on {device}; {fits}"
    )


def fitting(
    config: Config,
    vocab_size: int,
    free: float,
    dtype: torch.dtype | None = None,
    known: Memory | None = None,
) -> dict[str, int]:
    """Sizes that would fit, by key: the largest micro-batch; else a shorter context, and so on.

    The micro-batch changes nothing but speed, so it goes first. Empty where nothing helps. `known`
    is the config's own memory, where a rehearsal has told.
    """
    limit, batch = NEAR * free, config.train.batch_size
    micro = config.train.micro_batch_size or batch
    if dtype is not None and (most := _largest_micro(config, vocab_size, limit, dtype, known)):
        return {"train.micro_batch_size": most}
    first = {} if micro == 1 else {"train.micro_batch_size": 1}
    one_by_one = [[key] for key in _LEAST]
    for keys in [*one_by_one, list(_LEAST)]:
        now, changes = _with(config, micro_batch_size=1), dict[str, int]()
        halved = True
        while halved and bounds(now, vocab_size).high > limit:
            halved = False
            for key in keys:
                section = "train" if key == "batch_size" else "model"
                least = 2 * config.model.n_head if key == "n_embd" else _LEAST[key]
                value = int(getattr(getattr(now, section), key)) // 2
                value -= value % least if key == "n_embd" else 0
                if value >= least:
                    now, halved = _with(now, **{key: value}), True
                    changes[f"{section}.{key}"] = value
        if bounds(now, vocab_size).high <= limit:
            return changes | first
    return {}


def _largest_micro(
    config: Config, vocab_size: int, limit: float, dtype: torch.dtype, known: Memory | None
) -> int:
    """The largest micro-batch whose step is estimated to fit, from 5 on a power of 2; 0 if none.

    Each sequence adds the same, so that the memory of two sizes tells that of all between.
    """
    micro = most = config.train.micro_batch_size or config.train.batch_size
    one, now = (bounds(_with(config, micro_batch_size=n), vocab_size).low for n in (1, micro))
    if micro == 1 or one > limit:
        return 0
    if known is not None:
        # The whole batch at once meets no gradients of an earlier part, as smaller parts do.
        parts = micro < config.train.batch_size
        many = known.activations + (0 if parts else known.gradients)
    else:
        # More than that cannot fit, and shapes far beyond it are none that torch could even count.
        most = min(micro - 1, 1 + int((limit - one) * (micro - 1) / max(1.0, now - one)))
        largest = _with(config, micro_batch_size=most)
        many = estimate_memory(largest, vocab_size, dtype).activations
    few = estimate_memory(_with(config, micro_batch_size=1), vocab_size, dtype)
    left = limit - batch_bytes(config) - few.weights - few.optimizer
    if max(few.activations, few.gradients + few.update) > left:
        return 0
    if many > left:
        each = (many - few.activations) / (most - 1)
        most = 1 + int((left - few.activations) / each)
    most = min(most, micro - 1)
    return most if most <= 4 else 1 << (most.bit_length() - 1)


def _options(changes: dict[str, int]) -> str:
    return " ".join(f"--{key} {value}" for key, value in changes.items())


def gigabytes(n_bytes: float) -> str:
    """A size for people."""
    for unit, size in (("TB", 1e12), ("GB", 1e9)):
        if n_bytes >= size:
            return f"{n_bytes / size:,.1f} {unit}"
    return f"{n_bytes / 1e6:,.0f} MB"


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an allocation failed: torch, NumPy, Python and the system each say it their way."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    return isinstance(error, RuntimeError) and any(word in str(error) for word in _FAILURES)


@contextmanager
def memory_errors(config: Config, run: Path) -> Iterator[None]:
    """Turns a failed allocation in a run into one line: what would fit, and where it goes on."""
    try:
        yield
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        traceback.clear_frames(error.__traceback__)  # they hold the tensors
        raise out_of_memory(config, run) from None


def out_of_memory(config: Config, run: Path) -> UserError:
    """The end of a run whose memory did not suffice."""
    micro, kept = config.train.micro_batch_size or config.train.batch_size, newest_checkpoint(run)
    key = "train.micro_batch_size" if config.train.micro_batch_size else "train.batch_size"
    again = shlex.join(["gpt-train", "--config", str(run / "config.yaml")])
    if micro > 1:
        value, way = micro, f"{again} --train.micro_batch_size {max(1, micro // 2)}"
    elif not config.train.activation_checkpointing:
        value, way = micro, f"{again} --train.activation_checkpointing true"
    else:
        key, value = "model.context_len", config.model.context_len
        anew = shlex.join(under_new_name(config, "short"))
        way = f"{again} --model.context_len {max(1, value // 2)} {anew}"
    where = f"the newest checkpoint is {kept}" if kept else "there is no checkpoint yet"
    return UserError(
        f"{key} {value}: an allocation failed, there is less memory free here than the run needs; "
        f"stopped, {where}. Go on with: {way}"
    )


@contextmanager
def memory_for_inference(checkpoint: Path, device: torch.device) -> Iterator[None]:
    """Refuses a model whose weights alone do not fit, and explains a failed allocation later on."""
    stored, there = checkpoint / "model.safetensors", room(device)
    weights = stored.stat().st_size if stored.is_file() else 0
    if there is not None and weights > there.free + there.swap:
        raise UserError(
            f"{checkpoint}: its weights take {gigabytes(weights)} of memory, and "
            f"{gigabytes(there.free)} are free on {device}; end other programs, or take a smaller "
            "model"
        )
    try:
        yield
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        traceback.clear_frames(error.__traceback__)
        raise UserError(
            f"{checkpoint}: an allocation failed: there is less memory free here than its weights "
            f"({gigabytes(weights)}) and the texts need; ask for fewer --samples, fewer prompts at "
            "once, or shorter texts (--max-tokens)"
        ) from None
