"""What a hostile file is made of: payloads that would show if they ran, headers that lie, links."""

import hashlib
import io
import json
import os
import pickle
import random
import shutil
import struct
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gpt.files import sealed

TERABYTE = 2**40
DEEP = 10**6
ESCAPES = "\x1b]0;owned\x07\x1b[2J\x9b31m\r\x08\u202e"
ESCAPES += "</script><script>alert(1)</script><img src=x onerror=a>"


@dataclass
class Scene:
    """A run, its data and a text that were sound, to be spoiled; and what must stay untouched.

    Attributes:
        folder: the case's own; everything else lies below it.
        run: a run of 12 steps with checkpoints, of a tokenizer that has all files.
        checkpoint: its newest one.
        data: its tokenized text.
        text: a small text.
        canary: the file that a payload would make.
        outside: a folder that nothing may change.
        rng: the case's.
    """

    folder: Path
    run: Path
    data: Path
    text: Path
    rng: random.Random

    @property
    def canary(self) -> Path:
        return self.folder / "canary"

    @property
    def outside(self) -> Path:
        return self.folder / "outside"

    @property
    def checkpoint(self) -> Path:
        return sorted((self.run / "checkpoints").glob("step-*"))[-1]

    def train(self, *more: str) -> list[str]:
        """Going on with the run."""
        places = ("--run.dir", str(self.run.parent), "--data.source", str(self.text))
        data = ("--data.dir", str(self.data.parent))
        return ["gpt-train", "--config", str(self.sound_config), *places, *data, *more]

    @property
    def sound_config(self) -> Path:
        """The run's config, kept apart from the run."""
        return self.folder / "config.yaml"

    def infer(self, *more: str) -> list[str]:
        """The run's text."""
        return ["gpt-infer", "--run", str(self.run), "--prompt", "a", "--max-tokens", "3", *more]

    def payload(self, protocol: int = 2) -> bytes:
        """A pickle that makes the canary when it is loaded."""
        return pickle.dumps(_Payload(self.canary), protocol)

    def zip_payload(self) -> bytes:
        """The same as torch.save writes it."""
        content = io.BytesIO()
        with zipfile.ZipFile(content, "w") as archive:
            archive.writestr("model/data.pkl", self.payload())
            archive.writestr("model/version", "3\n")
            archive.writestr("model/data/0", b"\0" * 64)
        return content.getvalue()

    def npy_payload(self) -> bytes:
        """The same as NumPy saves an array of objects."""
        head = b"{'descr': '|O', 'fortran_order': False, 'shape': (1,), }".ljust(117) + b"\n"
        return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(head)) + head + self.payload()

    def any_payload(self) -> bytes:
        """A pickle in one of its disguises."""
        made = [self.payload(0), self.payload(4), self.zip_payload(), self.npy_payload()]
        return self.rng.choice(made)

    def tag(self) -> str:
        """YAML that unsafe loaders run."""
        command = f"touch {self.canary}"
        tags = [
            f'!!python/object/apply:os.system ["{command}"]',
            f'!!python/object/new:os.system ["{command}"]',
            f'!!python/object/apply:subprocess.check_output [["touch", "{self.canary}"]]',
            "!!python/name:os.system",
            "!!python/module:os",
        ]
        return self.rng.choice(tags)


class _Payload:
    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> tuple[Callable[..., object], tuple[str, str]]:
        return open, (str(self.canary), "w")


@dataclass(frozen=True)
class Attack:
    """How a scene is spoiled: `spoil` returns the command lines that meet it."""

    kind: str
    name: str
    codes: frozenset[int]
    spoil: Callable[[Scene], Sequence[str] | Sequence[Sequence[str]]]


ATTACKS: list[Attack] = []


def attack(
    kind: str, *codes: int
) -> Callable[[Callable[[Scene], Sequence[str] | Sequence[Sequence[str]]]], Any]:
    """Lists an attack of this kind, whose commands must end with one of the codes (2)."""

    def listed(
        spoil: Callable[[Scene], Sequence[str] | Sequence[Sequence[str]]],
    ) -> Callable[[Scene], Sequence[str] | Sequence[Sequence[str]]]:
        ATTACKS.append(Attack(kind, spoil.__name__, frozenset(codes or (2,)), spoil))
        return spoil

    return listed


def seal(folder: Path) -> None:
    """Makes the manifest true of the files, as whoever spoils one would."""
    entries = {}
    for path in sorted(folder.iterdir()):
        if path.name != "manifest.json":
            entries[path.name] = _entry(path)
    change(folder / "manifest.json", lambda manifest: manifest.update(files=entries))


def _entry(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {"bytes": 0, "sha256": hashlib.sha256(b"").hexdigest()}
    size = path.stat().st_size
    digest = hashlib.sha256(path.read_bytes()).hexdigest() if size < 2**31 else "0" * 64
    return {"bytes": size, "sha256": digest}


def write(path: Path, content: bytes | str) -> None:
    """Replaces a file, or the link or pipe that lies there."""
    path.unlink(missing_ok=True)
    path.write_bytes(
        content.encode("utf-8", "surrogatepass") if isinstance(content, str) else content
    )


def link(path: Path, target: Path | str) -> None:
    """Replaces a file by a link."""
    path.unlink(missing_ok=True)
    path.symlink_to(target)


def pipe(path: Path) -> None:
    """Replaces a file by a pipe that nobody writes into."""
    path.unlink(missing_ok=True)
    os.mkfifo(path)


def sparse(path: Path, size: int = TERABYTE, head: bytes = b"") -> None:
    """Replaces a file by one that claims to be huge and takes no room."""
    write(path, head)
    os.truncate(path, size)


def change(path: Path, alter: Callable[[dict[str, Any]], object]) -> None:
    """Changes a JSON object in a file, and seals it anew where it has a seal."""
    value = json.loads(path.read_text())
    has_seal = value.pop("seal", None) is not None
    alter(value)
    write(path, sealed(value) if has_seal else json.dumps(value))


def tensors(header: dict[str, Any] | bytes, body: bytes = b"", length: int | None = None) -> bytes:
    """A safetensors file made by hand; `length` is what it claims its header to be."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + body


def described(path: Path) -> tuple[dict[str, Any], bytes]:
    """Header and body of a sound safetensors file."""
    content = path.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def event(
    tag: bytes = b"loss", value: float = 3.0, step: int = 1, length: int | None = None
) -> bytes:
    """A record of TensorBoard's; `length` is what it claims to be."""
    number = b"\x0a" + bytes([len(tag)]) + tag + b"\x15" + struct.pack("<f", value)
    summary = b"\x0a" + _varint(len(number)) + number
    body = b"\x10" + _varint(step) + b"\x2a" + _varint(len(summary)) + summary
    return _framed(body, length)


def version_event() -> bytes:
    """The first record of an event file."""
    return _framed(b"\x1a\x0dbrain.Event:2")


def _framed(body: bytes, length: int | None = None) -> bytes:
    size = len(body) if length is None else length
    return struct.pack("<Q", size) + b"\0" * 4 + body + b"\0" * 4


def _varint(number: int) -> bytes:
    out = b""
    while number > 127:
        out, number = out + bytes([number & 127 | 128]), number >> 7
    return out + bytes([number])


def copy(source: Path, target: Path) -> None:
    """A scene's folder, links as they are."""
    shutil.copytree(source, target, symlinks=True)
