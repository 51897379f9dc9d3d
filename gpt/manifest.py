"""Whether a checkpoint's folder is whole: size and SHA-256 of each file, and of the manifest.

What the files mean is not known here.
"""

import hashlib
import json
import re
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

from gpt.errors import UserError
from gpt.files import is_hollow, is_sealed, read_plain, sealed, sync
from gpt.saved import brief

VERSION = 2  # 1 had no seal in its manifest, and no data_parts in its state
MANIFEST = "manifest.json"
MAX_JSON_BYTES = 8 * 2**20
_KEYS = {1: {"version", "step", "files"}, 2: {"seal", "version", "step", "files"}}
_THREADS = 4
T = TypeVar("T")


class CheckpointError(UserError):
    """A checkpoint that is damaged, incomplete, or of something else."""


def write_manifest(folder: Path, step: int) -> None:
    """Makes all files of `folder` durable, and writes what they are, last.

    A file is read back for its SHA-256 while others are on their way to the disk.
    """
    paths = sorted(path for path in folder.iterdir() if path.name != MANIFEST)
    entries = _each(_secure, paths)
    files = {path.name: entry for path, entry in zip(paths, entries, strict=True)}
    content = sealed({"version": VERSION, "step": step, "files": files})
    (folder / MANIFEST).write_bytes(content)
    sync(folder / MANIFEST)


def verify_checkpoint(folder: Path) -> None:
    """Compares every file's size and SHA-256 with the manifest, before anything else is read.

    Raises CheckpointError that names the file at fault.
    """
    files = read_manifest(folder)["files"]
    try:
        present = {path.name for path in folder.iterdir()} - {MANIFEST}
        if present != set(files):
            names = brief(sorted(present ^ set(files)))
            raise CheckpointError(f"{folder}: files and manifest differ ({names}); it is damaged")
        for name, expected in files.items():
            _check_size(folder / name, expected)
        hashes = _each(_sha256, [folder / name for name in files])
    except OSError as error:
        raise CheckpointError(f"{folder}: cannot be read ({error.strerror})") from None
    for (name, expected), found in zip(files.items(), hashes, strict=True):
        if found != expected.get("sha256"):
            raise CheckpointError(
                f"{folder / name}: its SHA-256 differs from the manifest's; it is damaged"
            )


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest, which is of this folder, as it was written, and of a version that is read."""
    path = folder / MANIFEST
    if path.is_symlink():
        raise CheckpointError(f"{path}: not a plain file; the checkpoint is damaged")
    content = _read(path)
    whole = is_sealed(content)
    if whole is False:
        raise CheckpointError(f"{path}: its SHA-256 is not the one in it; it is damaged")
    manifest = _json(path, content)
    version, step = manifest.get("version"), manifest.get("step")
    if not isinstance(version, int) or version not in _KEYS:
        raise CheckpointError(
            f"{folder}: the manifest's version is {brief([version])}, this program reads "
            f"{' and '.join(map(str, _KEYS))}; use the release that wrote it"
        )
    if set(manifest) != _KEYS[version] or not isinstance(manifest["files"], dict):
        names = brief(sorted(set(manifest) ^ _KEYS[version])) or "files"
        raise CheckpointError(f"{path}: not as version {version} has it ({names}); it is damaged")
    if not whole and version > 1:
        raise CheckpointError(f"{path}: does not begin with its SHA-256; it is damaged")
    if re.fullmatch(r"step-\d{8,}", folder.name) and int(folder.name[5:]) != step:
        raise CheckpointError(f"{folder}: its manifest is of step {brief([step])}; it is misplaced")
    return manifest


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file of a checkpoint; CheckpointError for anything else."""
    return _json(path, _read(path))


def _read(path: Path) -> bytes:
    try:
        return read_plain(path, MAX_JSON_BYTES)
    except FileNotFoundError:
        raise CheckpointError(
            f"{path} is missing; {path.parent} is not a whole checkpoint"
        ) from None
    except OSError as error:
        raise _unreadable(path, error.strerror) from None


def _json(path: Path, content: bytes) -> dict[str, Any]:
    try:
        value = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise _unreadable(path, error) from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: not a JSON object; the checkpoint is damaged")
    return value


def _unreadable(path: Path, why: object) -> CheckpointError:
    return CheckpointError(f"{path}: unreadable ({why}); the checkpoint is damaged")


def _check_size(path: Path, expected: object) -> None:
    if path.is_symlink() or not path.is_file() or not isinstance(expected, dict):
        raise CheckpointError(f"{path}: not a plain file; the checkpoint is damaged")
    if is_hollow(path):
        raise CheckpointError(f"{path}: mostly holes, hours of reading; it is damaged")
    if path.stat().st_size != expected.get("bytes"):
        raise CheckpointError(
            f"{path}: {path.stat().st_size} bytes, the manifest says "
            f"{brief([expected.get('bytes')])}; it is damaged"
        )


def _secure(path: Path) -> dict[str, Any]:
    sync(path)
    return {"bytes": path.stat().st_size, "sha256": _sha256(path)}


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _each(work: Callable[[Path], T], paths: Iterable[Path]) -> list[T]:
    with ThreadPoolExecutor(_THREADS) as pool:  # hashing and syncing free the interpreter
        return list(pool.map(work, paths))
