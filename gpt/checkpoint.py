"""What a run must remember: written whole or not at all, verified before it is parsed.

A checkpoint is a folder:

    model.safetensors      the weights by name; a tied one once
    optimizer.safetensors  the optimizer's tensors, "<parameter>|<key>"
    rng.safetensors        the generators' states
    state.json             progress, schedule, scaler, the optimizer's groups, dtype, data identity
    config.yaml            the resolved config
    tokenizer.*            what turns text into ids and back
    manifest.json          version, and size and SHA-256 of each file; written last (`manifest`)

docs/checkpoint.md names every field, and says what the checkpoint of an older version lacks.
Which run a checkpoint belongs to, and which ones are kept, is `rundir`'s business.
"""

import errno
import json
import os
import shutil
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from gpt.config import Config
from gpt.configfile import dump_config, load_config
from gpt.device import on_meta, rng_state, set_rng_state
from gpt.files import sync
from gpt.manifest import (
    CheckpointError,
    read_json,
    read_manifest,
    verify_checkpoint,
    write_manifest,
)
from gpt.model import GPT
from gpt.saved import brief, check_form, check_generators, check_optimizer, read_progress
from gpt.schedule import load_scheduler
from gpt.tensors import load_all, read_tensors
from gpt.tokenizer import Tokenizer, load_tokenizer

__all__ = [
    "CheckpointError",
    "Progress",
    "SaveError",
    "Training",
    "load_for_inference",
    "load_weights",
    "restore_checkpoint",
    "save_checkpoint",
    "verify_checkpoint",
]

REPLACED = ".tmp-old-"
STATE_KEYS = ["progress", "scheduler", "scaler", "optimizer", "dtype", "data_fingerprint"]
STATE_KEYS += ["data_parts", "torch"]
NEW_IN_2 = {"data_parts"}  # keys of the state that version 1 does not have


class SaveError(Exception):
    """A checkpoint could not be written (full disk, no permission); the older ones are intact."""

    def __init__(self, error: Exception) -> None:
        """Takes what was raised: OSError, or what stands for it in Rust and in torch."""
        own = error.strerror if isinstance(error, OSError) else None
        super().__init__(own or str(error))
        words = [os.strerror(number) for number in (errno.ENOSPC, errno.EDQUOT)]
        self.no_room = any(word in str(self) for word in words)


@dataclass
class Progress:
    """Where a run stands: plain numbers, all of which a resumed run needs."""

    step: int = 0
    tokens: int = 0
    seconds: float = 0.0
    evaluated_step: int = 0
    best_step: int | None = None
    best_val_loss: float | None = None
    evals_since_best: int = 0
    train_loss_sum: float = 0.0
    train_loss_steps: int = 0
    skipped_steps: int = 0  # that fp16's scale overflowed in; the same batch came again
    skipped_batches: int = 0  # that were passed over; the next batch is step + skipped_batches
    skips_in_row: int = 0
    guard_losses: list[float] = field(default_factory=list)
    guard_norms: list[float] = field(default_factory=list)
    interval: dict[str, float] = field(default_factory=dict)  # since the last line of the log

    @property
    def next_batch(self) -> int:
        """The number of the batch that comes next, counted from 0."""
        return self.step + self.skipped_batches


@dataclass
class Training:
    """Everything that changes while training; a checkpoint holds exactly this."""

    config: Config
    tokenizer: Tokenizer
    model: GPT
    optimizer: Optimizer
    scheduler: LRScheduler
    scaler: torch.amp.GradScaler
    dtype: torch.dtype
    data_fingerprint: str
    progress: Progress = field(default_factory=Progress)
    data_parts: dict[str, str] = field(default_factory=dict)  # of the fingerprint, by their names


def save_checkpoint(folder: Path, training: Training) -> None:
    """Writes `folder` so that at every instant it is either absent or whole and durable.

    One that is there is replaced: between two renames it has the name of `REPLACED` before its own.
    Raises SaveError when the disk refuses; nothing temporary is left then.
    """
    temporary = folder.with_name(f".tmp-{folder.name}")
    replaced = folder.with_name(f"{REPLACED}{folder.name}")
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        _write_files(temporary, training)
        write_manifest(temporary, training.progress.step)
        sync(temporary)
        shutil.rmtree(replaced, ignore_errors=True)
        if folder.exists():
            folder.rename(replaced)
        temporary.rename(folder)
        sync(folder.parent)
        shutil.rmtree(replaced, ignore_errors=True)
    except (OSError, RuntimeError, SafetensorError) as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise SaveError(error) from error


def restore_checkpoint(folder: Path, training: Training) -> None:
    """Puts a verified checkpoint's state into `training`, to the last bit; RNG states come last.

    Raises CheckpointError where names, shapes or kinds do not match what the config builds.
    """
    with _checked(folder / "state.json"):
        _restore(folder, training, read_json(folder / "state.json"))


def _restore(folder: Path, training: Training, state: dict[str, Any]) -> None:
    manifest = read_manifest(folder)
    _check_fields(state, STATE_KEYS, "", NEW_IN_2 if manifest["version"] < 2 else ())
    _check_fields(state["progress"], [each.name for each in fields(Progress)], "progress.")
    dtype = str(training.dtype).removeprefix("torch.")
    if state["dtype"] != dtype:
        if state["dtype"] not in _SHORT_DTYPE:
            raise ValueError(f"dtype: {brief([state['dtype']])} is none of {brief(_SHORT_DTYPE)}")
        raise CheckpointError(
            f"{folder}: trained with {state['dtype']}, this run would go on in {dtype}; "
            f"say --train.dtype {_SHORT_DTYPE[state['dtype']]}"
        )
    if state["data_fingerprint"] != training.data_fingerprint:
        changed = changed_parts(state.get("data_parts", {}), training.data_parts)
        raise CheckpointError(
            f"{folder}: trained on other data ({changed} changed); "
            "bring the old one back, or start a new run with another --run.name"
        )
    progress = read_progress(Progress, state["progress"])
    if progress.step != manifest["step"]:
        raise ValueError(f"progress.step: {progress.step} is not the step of the manifest")
    check_form(state["scheduler"], training.scheduler.state_dict(), "scheduler")
    check_form(state["scaler"], training.scaler.state_dict(), "scaler")
    if training.scaler.is_enabled() and not state["scaler"]:
        raise ValueError("scaler: is empty")
    load_weights(folder, training.model)
    _restore_optimizer(folder, training, state["optimizer"])
    load_scheduler(training.scheduler, state["scheduler"])
    training.scaler.load_state_dict(state["scaler"])
    training.progress = progress
    with _checked(folder / "rng.safetensors"):
        generators = load_all(folder / "rng.safetensors")
        check_generators(generators, rng_state())
        set_rng_state(generators)


def changed_parts(before: dict[str, str], now: dict[str, str]) -> str:
    """Which part of the data differs, in words; all of them where it is not known.

    The split is made of the others and one more number: it is what differs if nothing else does.
    """
    if not (before and now):
        return "text, tokenizer or split have"
    names = [name for name in before if before[name] != now.get(name)]
    return f"{' and '.join(names)} {'have' if len(names) > 1 else 'has'}" if names else "split has"


def _check_fields(
    found: object, known: Collection[str], place: str, may_lack: Collection[str] = ()
) -> None:
    """Raises ValueError that names what is missing, and what is not known here."""
    if not isinstance(found, dict):
        raise ValueError(f"{place.rstrip('.') or 'it'} is not an object")
    lacks = [place + name for name in known if name not in found and name not in may_lack]
    if lacks:
        raise ValueError(f"lacks {', '.join(lacks)}")
    unknown = sorted(set(found) - set(known))
    if unknown:
        raise ValueError(
            f"{brief([place + name for name in unknown])} is no part of it in this version; "
            "use the release that wrote it"
        )


def load_weights(folder: Path, model: GPT) -> None:
    """Copies the weights into `model` after names, shapes and dtypes were compared.

    Raises CheckpointError for a file that holds something else.
    """
    parameters = dict(model.named_parameters())
    tensors = read_tensors(
        folder / "model.safetensors", {name: tuple(p.shape) for name, p in parameters.items()}
    )
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(tensors[name])


def load_for_inference(folder: Path, device: torch.device) -> tuple[GPT, Tokenizer]:
    """Verifies a checkpoint and builds its model, in evaluation mode, and its tokenizer.

    Raises CheckpointError; nothing that it reads can execute code.
    """
    verify_checkpoint(folder)
    config = load_config(folder / "config.yaml")
    tokenizer = load_tokenizer(folder)
    with on_meta():  # compared before a byte is allocated: a config can claim anything
        model = GPT(config.model, tokenizer.vocab_size)
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    read_tensors(folder / "model.safetensors", shapes, only_check=True)
    _check_memory(folder, model)
    try:
        model.allocate()
    except (RuntimeError, MemoryError):
        raise _too_large(folder, model) from None
    load_weights(folder, model)
    return model.to(device).eval(), tokenizer


def _check_memory(folder: Path, claimed: GPT) -> None:
    """Raises CheckpointError for more than the machine has: position tables stand in no file."""
    if hasattr(os, "sysconf") and _size(claimed) > os.sysconf("SC_PAGE_SIZE") * os.sysconf(
        "SC_PHYS_PAGES"
    ):
        raise _too_large(folder, claimed)


def _size(model: GPT) -> int:
    return sum(one.numel() * one.element_size() for one in (*model.parameters(), *model.buffers()))


def _too_large(folder: Path, claimed: GPT) -> CheckpointError:
    return CheckpointError(
        f"{folder}: its config describes a model of {_size(claimed) / 1e9:,.1f} GB, more than this "
        "machine's memory holds; take a machine with more, or a smaller model"
    )


_SHORT_DTYPE = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}


def _write_files(folder: Path, training: Training) -> None:
    weights = {name: p.detach().contiguous() for name, p in training.model.named_parameters()}
    save_file(weights, folder / "model.safetensors")
    tensors, described = _describe_optimizer(training)
    save_file(tensors, folder / "optimizer.safetensors")
    save_file(rng_state(), folder / "rng.safetensors")
    state = {
        "progress": asdict(training.progress),
        "scheduler": training.scheduler.state_dict(),
        "scaler": training.scaler.state_dict(),
        "optimizer": described,
        "dtype": str(training.dtype).removeprefix("torch."),
        "data_fingerprint": training.data_fingerprint,
        "data_parts": training.data_parts,
        "torch": str(torch.__version__),
    }
    (folder / "state.json").write_text(json.dumps(state, indent=1), encoding="utf-8")
    (folder / "config.yaml").write_text(dump_config(training.config), encoding="utf-8")
    training.tokenizer.save(folder)
    mode = (folder / "state.json").stat().st_mode
    for path in folder.glob("*.safetensors"):  # written for this user alone, whatever the umask
        path.chmod(mode)


def _describe_optimizer(training: Training) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """The optimizer's tensors by parameter name, and everything else of it as plain values."""
    names = {parameter: name for name, parameter in training.model.named_parameters()}
    tensors: dict[str, torch.Tensor] = {}
    values: dict[str, dict[str, Any]] = {}
    for parameter, name in names.items():
        for key, value in training.optimizer.state.get(parameter, {}).items():
            if isinstance(value, torch.Tensor):
                tensors[f"{name}|{key}"] = value.detach().contiguous()
            else:
                values.setdefault(name, {})[key] = value
    groups = [
        {
            "parameters": [names[p] for p in group["params"]],
            "lr": group["lr"],
            "initial_lr": group["initial_lr"],
        }
        for group in training.optimizer.param_groups
    ]
    return tensors, {"class": type(training.optimizer).__name__, "groups": groups, "values": values}


def _restore_optimizer(folder: Path, training: Training, described: dict[str, Any]) -> None:
    _, ours = _describe_optimizer(training)
    same_groups = [g["parameters"] for g in described["groups"]] == [
        g["parameters"] for g in ours["groups"]
    ]
    if described["class"] != ours["class"] or not same_groups:
        raise CheckpointError(
            f"{folder}: holds the state of {described['class']} over other parameters, "
            f"the config builds {ours['class']}; start a new run with another --run.name"
        )
    parameters = dict(training.model.named_parameters())
    tensors = load_all(folder / "optimizer.safetensors")
    check_optimizer(described, tensors, parameters)
    restored: dict[str, dict[str, Any]] = {name: dict(v) for name, v in described["values"].items()}
    for full_name, tensor in tensors.items():
        name, _, key = full_name.rpartition("|")
        # A step counter lives where its optimizer made it: on the CPU unless fused on a device.
        tensor_device = (
            parameters[name].device if tensor.ndim or _fused(training) else tensor.device
        )
        restored.setdefault(name, {})[key] = tensor.to(tensor_device)
    for name, values in restored.items():
        training.optimizer.state[parameters[name]] = values
    for group, saved in zip(training.optimizer.param_groups, described["groups"], strict=True):
        group["lr"], group["initial_lr"] = saved["lr"], saved["initial_lr"]


def _fused(training: Training) -> bool:
    return any(group.get("fused") for group in training.optimizer.param_groups)


@contextmanager
def _checked(path: Path) -> Iterator[None]:
    """What a file lacks, or has in another form than a run's own state, as one CheckpointError."""
    try:
        yield
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        why = f"no {error}" if isinstance(error, KeyError) else str(error)
        raise CheckpointError(
            f"{path}: not the state of such a run ({why}); go on from an older checkpoint"
        ) from error
