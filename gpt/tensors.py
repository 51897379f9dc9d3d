"""Safetensors files that may be a stranger's: names and sizes are compared before allocation."""

from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from gpt.files import open_plain
from gpt.manifest import CheckpointError
from gpt.saved import brief

MAX_HEADER_BYTES = 8 * 2**20  # 50,000 tensors have less


def read_tensors(
    path: Path, shapes: dict[str, tuple[int, ...]], *, only_check: bool = False
) -> dict[str, Tensor]:
    """Tensors of a safetensors file whose names and shapes are exactly `shapes`, all fp32."""
    try:
        _check_header(path)
        with safe_open(path, framework="pt") as file:
            found = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
            dtypes = {file.get_slice(name).get_dtype() for name in found}
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path}: not a safetensors file ({error})") from None
    if found != shapes or dtypes != {"F32"}:
        wrong = [n for n in sorted({*found, *shapes}) if found.get(n) != shapes.get(n)]
        example = (
            f"{brief(wrong[:1])}: {found.get(wrong[0])} in the file, "
            f"{shapes.get(wrong[0])} by the config"
            if wrong
            else f"dtypes {sorted(dtypes)}, not F32"
        )
        raise CheckpointError(f"{path}: other tensors than the config's ({example})")
    return {} if only_check else load_file(path)


def load_all(path: Path) -> dict[str, Tensor]:
    """All tensors of a safetensors file, whatever they are called.

    Copies: what `load_file` gives is the file itself, mapped. It would change with the file, and
    keep the room of one that is deleted.
    """
    try:
        _check_header(path)
        return {name: tensor.clone() for name, tensor in load_file(path).items()}
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path}: not a safetensors file ({error})") from None


def _check_header(path: Path) -> None:
    """Raises CheckpointError for more names than any checkpoint has: reading them takes long."""
    with open_plain(path) as file:
        length = int.from_bytes(file.read(8), "little")
    if length > MAX_HEADER_BYTES:
        raise CheckpointError(
            f"{path}: not a safetensors file of a checkpoint: a header of {length:,} bytes, "
            f"at most {MAX_HEADER_BYTES:,} are read"
        )
