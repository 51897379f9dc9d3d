"""What a run must remember: written whole or not at all, verified before it is parsed.

A checkpoint is a folder:

    model.safetensors      the weights by name; a tied one once
    optimizer.safetensors  the optimizer's tensors, "<parameter>|<key>"
    rng.safetensors        the generators' states
    state.json             progress, schedule, scaler, the optimizer's groups, dtype, data identity
    config.yaml            the resolved config
    tokenizer.*            what turns text into ids and back
    manifest.json          version, and size and SHA-256 of each file; written last

Which run a checkpoint belongs to, and which ones are kept, is `rundir`'s business.
"""

import hashlib
import json
import shutil
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from gpt.config import Config
from gpt.configfile import dump_config, load_config
from gpt.device import rng_state, set_rng_state
from gpt.errors import UserError
from gpt.files import sync
from gpt.model import GPT
from gpt.schedule import load_scheduler
from gpt.tokenizer import Tokenizer, load_tokenizer

VERSION = 1
MANIFEST = "manifest.json"
MAX_JSON_BYTES = 64 * 2**20


class CheckpointError(UserError):
    """A checkpoint that is damaged, incomplete, or of something else."""


class SaveError(Exception):
    """A checkpoint could not be written (full disk, no permission); the older ones are intact."""


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


def save_checkpoint(folder: Path, training: Training) -> None:
    """Writes `folder` so that at every instant it is either absent or whole and durable.

    Raises SaveError when the disk refuses; nothing temporary is left then.
    """
    temporary = folder.with_name(f".tmp-{folder.name}")
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        _write_files(temporary, training)
        manifest = {"version": VERSION, "step": training.progress.step, "files": _sums(temporary)}
        for path in temporary.iterdir():
            sync(path)
        (temporary / MANIFEST).write_text(json.dumps(manifest, indent=1), encoding="utf-8")
        sync(temporary / MANIFEST)
        sync(temporary)
        temporary.rename(folder)
        sync(folder.parent)
    except (OSError, RuntimeError, SafetensorError) as error:
        shutil.rmtree(temporary, ignore_errors=True)
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise SaveError(reason) from error


def verify_checkpoint(folder: Path) -> None:
    """Compares every file's size and SHA-256 with the manifest, before anything else is read.

    Raises CheckpointError that names the file at fault.
    """
    manifest = _read_json(folder / MANIFEST)
    files = manifest.get("files")
    if manifest.get("version") != VERSION or not isinstance(files, dict):
        raise CheckpointError(
            f"{folder}: the manifest's version is {manifest.get('version')!r}, "
            f"this program reads {VERSION}; use the release that wrote it"
        )
    present = {path.name for path in folder.iterdir()} - {MANIFEST}
    if present != set(files):
        names = ", ".join(sorted(present ^ set(files)))
        raise CheckpointError(f"{folder}: files and manifest differ ({names}); it is damaged")
    for name, expected in files.items():
        path = folder / name
        if path.is_symlink() or not path.is_file() or not isinstance(expected, dict):
            raise CheckpointError(f"{path}: not a plain file; the checkpoint is damaged")
        if path.stat().st_size != expected.get("bytes"):
            raise CheckpointError(
                f"{path}: {path.stat().st_size} bytes, the manifest says {expected.get('bytes')}; "
                "it is damaged"
            )
        if _sha256(path) != expected.get("sha256"):
            raise CheckpointError(f"{path}: its SHA-256 differs from the manifest's; it is damaged")


def restore_checkpoint(folder: Path, training: Training) -> None:
    """Puts a verified checkpoint's state into `training`, to the last bit; RNG states come last.

    Raises CheckpointError where names, shapes or kinds do not match what the config builds.
    """
    state = _read_json(folder / "state.json")
    dtype = str(training.dtype).removeprefix("torch.")
    if state["dtype"] != dtype:
        raise CheckpointError(
            f"{folder}: trained with {state['dtype']}, this run would go on in {dtype}; "
            f"say --train.dtype {_SHORT_DTYPE.get(state['dtype'], state['dtype'])}"
        )
    if state["data_fingerprint"] != training.data_fingerprint:
        raise CheckpointError(
            f"{folder}: trained on other data (text, tokenizer or split have changed); "
            "bring the old text back, or start a new run with another --run.name"
        )
    load_weights(folder, training.model)
    _restore_optimizer(folder, training, state["optimizer"])
    load_scheduler(training.scheduler, state["scheduler"])
    training.scaler.load_state_dict(state["scaler"])
    training.progress = Progress(**state["progress"])
    set_rng_state(load_file(folder / "rng.safetensors"))


def load_weights(folder: Path, model: GPT) -> None:
    """Copies the weights into `model` after names, shapes and dtypes were compared.

    Raises CheckpointError for a file that holds something else.
    """
    parameters = dict(model.named_parameters())
    tensors = _read_tensors(
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
    with torch.device("meta"):  # compared before a byte is allocated: a config can claim anything
        claimed = GPT(config.model, tokenizer.vocab_size)
    shapes = {name: tuple(p.shape) for name, p in claimed.named_parameters()}
    _read_tensors(folder / "model.safetensors", shapes, only_check=True)
    model = GPT(config.model, tokenizer.vocab_size)
    load_weights(folder, model)
    return model.to(device).eval(), tokenizer


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
        "torch": str(torch.__version__),
    }
    (folder / "state.json").write_text(json.dumps(state, indent=1), encoding="utf-8")
    (folder / "config.yaml").write_text(dump_config(training.config), encoding="utf-8")
    training.tokenizer.save(folder)


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
    tensors = load_file(folder / "optimizer.safetensors")
    restored: dict[str, dict[str, Any]] = {name: dict(v) for name, v in described["values"].items()}
    for full_name, tensor in tensors.items():
        name, _, key = full_name.rpartition("|")
        if name not in parameters:
            raise CheckpointError(f"{folder}: optimizer state of an unknown parameter {name!r}")
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


def _read_tensors(
    path: Path, shapes: dict[str, tuple[int, ...]], *, only_check: bool = False
) -> dict[str, torch.Tensor]:
    """Tensors of a safetensors file whose names and shapes are exactly `shapes`, all fp32."""
    try:
        with safe_open(path, framework="pt") as file:
            found = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
            dtypes = {file.get_slice(name).get_dtype() for name in found}
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path}: not a safetensors file ({error})") from None
    if found != shapes or dtypes != {"F32"}:
        wrong = [n for n in sorted({*found, *shapes}) if found.get(n) != shapes.get(n)]
        example = (
            f"{wrong[0]}: {found.get(wrong[0])} in the file, {shapes.get(wrong[0])} by the config"
            if wrong
            else f"dtypes {sorted(dtypes)}, not F32"
        )
        raise CheckpointError(f"{path}: other tensors than the config's ({example})")
    return {} if only_check else load_file(path)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        if path.stat().st_size > MAX_JSON_BYTES:
            raise CheckpointError(f"{path}: over {MAX_JSON_BYTES} bytes; not a checkpoint's file")
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(
            f"{path} is missing; {path.parent} is not a whole checkpoint"
        ) from None
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: unreadable ({error}); the checkpoint is damaged") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: not a JSON object; the checkpoint is damaged")
    return value


def _sums(folder: Path) -> dict[str, dict[str, Any]]:
    return {
        path.name: {"bytes": path.stat().st_size, "sha256": _sha256(path)}
        for path in sorted(folder.iterdir())
    }


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
