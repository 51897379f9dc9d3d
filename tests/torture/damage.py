"""Test 5: any damage, to any file of a run's checkpoints, its own files, and its tokenized text."""

import contextlib
import io
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest import mock

import torch

import gpt.checkpoint
from gpt.checkpoint import CheckpointError, load_for_inference
from gpt.config import Config
from gpt.configfile import load_config
from gpt.data import open_data
from gpt.errors import UserError
from gpt.ratepolicy import read_record
from gpt.resume import find_start
from gpt.rundir import (
    changed_keys,
    check_run,
    checkpoint_folders,
    find_checkpoint,
    free_changes,
    newest_checkpoint,
    run_path,
)
from gpt.train import train
from tests.conftest import tiny_config
from tests.torture import Torture
from tests.torture.runs import check_same, check_tidy

CHECKPOINT = ["config.yaml", "manifest.json", "model.safetensors", "optimizer.safetensors"]
CHECKPOINT += ["rng.safetensors", "state.json", "tokenizer.json", "tokenizer.tiktoken"]
DATA = ["train-00000.bin", "val-00000.bin", "meta.json", "tokenizer.json", "tokenizer.tiktoken"]
RUN = ["best.json", "config.yaml", "rate.json"]
FOLDER = "the folder"
TARGETS = [*(("checkpoint", name) for name in CHECKPOINT), ("checkpoint", FOLDER)]
TARGETS += [*(("data", name) for name in DATA), *(("run", name) for name in RUN)]
TRAINED = 5  # of so many cases one is trained to its end


def make_config(folder: Path, name: str, seed: int = 1337) -> Config:
    """Three checkpoints, and a length that was changed on the way, of which rate.json tells."""
    return tiny_config(
        folder,
        run__name=name,
        run__dir=str(folder / "runs"),
        run__seed=str(seed),
        data__dir=str(folder / "data"),
        tokenizer__kind="bpe",
        tokenizer__vocab_size="300",
        model__dropout="0.1",
        schedule__name="constant",  # so that it is the same run wherever its length was changed
        eval__every_steps="4",
        eval__sample_tokens="0",
    )


def prepare(shared: Path) -> None:
    """A run that was extended from 8 steps to 12, its like of another seed, and other data."""
    for name, seed in (("whole", 1337), ("other", 7)):
        config = make_config(shared, name, seed)
        with _heard():
            train(config.model_copy(update={"train": _steps(config, 8)}))
            train(config, rate="extend")
        for picture in ("curve.png", "report.html"):
            (run_path(config) / picture).unlink()
    config = make_config(shared, "whole")
    data = config.data.model_copy(update={"val_fraction": 0.3, "dir": str(shared / "other-data")})
    with _heard():
        open_data(config.model_copy(update={"data": data}), progress=False)


def _steps(config: Config, steps: int) -> object:
    return config.train.model_copy(update={"max_steps": steps})


@contextlib.contextmanager
def _heard() -> Iterator[io.StringIO]:
    said = io.StringIO()
    with contextlib.redirect_stderr(said):
        yield said


def _truncated(content: bytes, rng: random.Random, like: bytes) -> bytes:
    return content[: rng.choice([0, 1, len(content) // 2, len(content) - 1])]


def _flipped(content: bytes, rng: random.Random, like: bytes) -> bytes:
    return _flip(content, rng, 1)


def _flipped_often(content: bytes, rng: random.Random, like: bytes) -> bytes:
    return _flip(content, rng, rng.choice([2, 3, 20]))


def _flip(content: bytes, rng: random.Random, count: int) -> bytes:
    changed = bytearray(content)
    for _ in range(count):
        changed[rng.randrange(len(changed))] ^= 1 << rng.randrange(8)
    return bytes(changed)


def _zeroed(content: bytes, rng: random.Random, like: bytes) -> bytes:
    return _block(content, rng, lambda block: bytes(len(block)))


def _scrambled(content: bytes, rng: random.Random, like: bytes) -> bytes:
    return _block(content, rng, lambda block: rng.randbytes(len(block)))


def _reversed(content: bytes, rng: random.Random, like: bytes) -> bytes:
    return _block(content, rng, lambda block: block[::-1])


def _block(content: bytes, rng: random.Random, change: Callable[[bytes], bytes]) -> bytes:
    size = min(len(content), rng.choice([1, 16, 512, 4096]))
    start = rng.randrange(len(content) - size + 1)
    return content[:start] + change(content[start : start + size]) + content[start + size :]


def _appended(content: bytes, rng: random.Random, like: bytes) -> bytes:
    return content + rng.choice([b"\0", b"\n", b" ", bytes(512), content, b"}", b"# x\n"])


def _shifted(content: bytes, rng: random.Random, like: bytes) -> bytes:
    return rng.choice([b"\n", b" ", b"\0", b"\xef\xbb\xbf"]) + content


def _digit(content: bytes, rng: random.Random, like: bytes) -> bytes:
    """One digit is another: as text it stays whole."""
    places = [i for i, byte in enumerate(content) if chr(byte).isdigit()]
    if not places:
        return _flip(content, rng, 1)
    place = rng.choice(places)
    other = rng.choice([d for d in b"0123456789" if d != content[place]])
    return content[:place] + bytes([other]) + content[place + 1 :]


def _swapped(content: bytes, rng: random.Random, like: bytes) -> bytes:
    return like


def _gone(content: bytes, rng: random.Random, like: bytes) -> None:
    return None


HARMS = [_truncated, _flipped, _flipped_often, _zeroed, _scrambled, _reversed, _appended]
HARMS += [_shifted, _digit, _swapped, _swapped, _gone]


def case(index: int, rng: random.Random, folder: Path) -> str:
    """Copies the run and its data, does harm to one file, and goes on."""
    shared = folder.parent
    part, name = TARGETS[index % len(TARGETS)]
    harm = HARMS[index // len(TARGETS) % len(HARMS)]
    trains = index % TRAINED == 0
    whole = make_config(shared, "whole")
    config = _copy(whole, folder)
    match part:
        case "checkpoint":
            return _checkpoint(name, harm, rng, whole, config, trains=trains)
        case "data":
            return _data(name, harm, rng, whole, config, trains=trains)
    return _run(name, harm, rng, whole, config, trains=trains)


def _copy(whole: Config, folder: Path) -> Config:
    run, data = folder / "runs" / "whole", folder / "data"
    shutil.copytree(run_path(whole), run)
    shutil.copytree(whole.data.dir, data)
    return whole.model_copy(
        update={
            "run": whole.run.model_copy(update={"dir": str(folder / "runs")}),
            "data": whole.data.model_copy(update={"dir": str(data)}),
        }
    )


def _do(harm: Callable[..., bytes | None], path: Path, rng: random.Random, like: Path) -> bool:
    """Does the harm; false if the file is as it was."""
    content = path.read_bytes()
    changed = harm(content, rng, like.read_bytes())
    if changed is None:
        path.unlink()
    else:
        path.write_bytes(changed)
    return changed != content


def _checkpoint(
    name: str,
    harm: Callable[..., bytes | None],
    rng: random.Random,
    whole: Config,
    config: Config,
    *,
    trains: bool,
) -> str:
    older, old, newest = checkpoint_folders(run_path(config))
    other = checkpoint_folders(run_path(make_config(Path(whole.run.dir).parent, "other")))[-1]
    if name == FOLDER:
        told = _spoil_folder(newest, old, rng)
        changed = True
    else:
        # The older checkpoint's file, or that of another run's same step.
        like = (old if rng.random() < 0.5 else other) / name
        told = "a checkpoint's file"
        changed = _do(harm, newest / name, rng, like)
    both = changed and rng.random() < 0.2
    if both:
        _do(_flipped, old / rng.choice(CHECKPOINT), rng, old / "state.json")
    with _heard() as said:
        found = newest_checkpoint(run_path(config))
    expected = (older if both else old) if changed else newest
    assert found == expected, f"{found}: {said.getvalue()}"
    warnings = said.getvalue().splitlines()
    assert len(warnings) == changed + both, warnings
    assert not changed or (newest.name in warnings[0] and "falling back" in warnings[0])
    assert not changed or name in (FOLDER, *_names(warnings[0])), warnings[0]
    if changed:
        _check_unparsed(newest)
    told += ", one step back" if changed else ", unchanged by it"
    told += " and one more" if both else ""
    return _ended(told, whole, config, trains=trains)


def _names(line: str) -> list[str]:
    return [name for name in CHECKPOINT if name in line or name.split(".")[0] in line]


def _spoil_folder(newest: Path, old: Path, rng: random.Random) -> str:
    victim = newest / rng.choice(CHECKPOINT)
    way = rng.choice(["a file too many", "a folder for a file", "a link for a file"])
    way = rng.choice([way, "an older checkpoint under its name", "an empty folder"])
    match way:
        case "a file too many":
            (newest / rng.choice(["extra.bin", "model.safetensors.tmp", ".hidden"])).mkdir()
        case "a folder for a file":
            victim.rename(newest.parent.parent / "moved")
            victim.mkdir()
        case "a link for a file":
            victim.rename(newest.parent.parent / "moved")
            victim.symlink_to(newest.parent.parent / "moved")
        case "an older checkpoint under its name":
            shutil.rmtree(newest)
            shutil.copytree(old, newest)
        case "an empty folder":
            for path in newest.iterdir():
                path.unlink()
    return way


def _check_unparsed(folder: Path) -> None:
    """Reading a damaged checkpoint ends before any of its files but the manifest is parsed."""
    parsers = ["load_config", "load_tokenizer", "read_tensors", "load_all", "read_json"]
    with contextlib.ExitStack() as stack:
        for parser in parsers:
            told = AssertionError(f"{parser} was called on a damaged checkpoint")
            stack.enter_context(mock.patch.object(gpt.checkpoint, parser, side_effect=told))
        try:
            load_for_inference(folder, torch.device("cpu"))
        except CheckpointError as error:
            assert len(error.lines) == 1
        else:
            raise AssertionError("a damaged checkpoint was loaded")


def _data(
    name: str,
    harm: Callable[..., bytes | None],
    rng: random.Random,
    whole: Config,
    config: Config,
    *,
    trains: bool,
) -> str:
    (folder,) = (path for path in Path(config.data.dir).iterdir() if path.is_dir())
    shared = Path(whole.data.dir).parent
    (other,) = (path for path in (shared / "other-data").iterdir() if path.is_dir())
    changed = _do(harm, folder / name, rng, other / name)
    with _heard():
        before = open_data(whole, progress=False)
    with _heard() as said:
        after = open_data(config, progress=False)
    assert after.fingerprint == before.fingerprint
    for ours, theirs in ((after.train, before.train), (after.val, before.val)):
        assert (ours.n_tokens, ours.n_bytes) == (theirs.n_tokens, theirs.n_bytes)
        assert (ours.read(0, ours.n_tokens) == theirs.read(0, theirs.n_tokens)).all()
    lines = said.getvalue().splitlines()
    rebuilt = any(line.startswith("data: built") for line in lines)
    warned = any(line.startswith("warning: ") and "again" in line for line in lines)
    assert rebuilt == (warned or (harm is _gone and name == "meta.json")), lines
    if not rebuilt and changed:  # another way to write the same tokenizer
        assert name.startswith("tokenizer"), f"{name} changed unseen: {lines}"
    told = "the text's shards, built again" if rebuilt else "the text's files, of no effect"
    return _ended(told, whole, config, trains=trains)


def _run(
    name: str,
    harm: Callable[..., bytes | None],
    rng: random.Random,
    whole: Config,
    config: Config,
    *,
    trains: bool,
) -> str:
    run = run_path(config)
    path = run / "checkpoints" / name if name == "best.json" else run / name
    other = run_path(make_config(Path(whole.run.dir).parent, "other"))
    like = other / path.relative_to(run)
    if name == "best.json" and rng.random() < 0.5:
        like = run / "config.yaml"
    changed = _do(harm, path, rng, like)
    if name == "best.json":
        return _best(run, whole, config, changed=changed, gone=harm is _gone, trains=trains)
    if rng.random() < 0.5:  # so that there is something left to train
        _do(_flipped, checkpoint_folders(run)[-1] / "state.json", rng, like)
    given = config
    with _heard() as said:
        try:
            if name == "config.yaml" and path.exists() and rng.random() < 0.5:
                read = load_config(path)
                moved = config.run.model_copy(update={"seed": read.run.seed})
                given = read.model_copy(update={"run": moved, "data": config.data})
            check_run(given, "auto")
            start = find_start(run, given)
        except UserError as error:
            assert all("Traceback" not in line for line in error.lines)
            return f"the run's {name}, refused"
    if name == "rate.json" and harm is not _gone:
        assert start.record == read_record(run_path(whole)), "another record, and not a word"
    differs = changed_keys(config, start.config) + free_changes(config, start.config)
    assert not changed_keys(config, start.config), differs
    if free_changes(config, start.config):
        assert any("changed  since" in note for note in start.notes), said.getvalue()
        return f"the run's {name}, what it changes is told"
    told = f"the run's {name}, of no effect" if changed else f"the run's {name}, unchanged by it"
    return _ended(told, whole, config, trains=trains and name != "rate.json")


def _best(
    run: Path, whole: Config, config: Config, *, changed: bool, gone: bool, trains: bool
) -> str:
    with _heard() as said:
        expected = find_checkpoint(run_path(whole), None).name
        assert not said.getvalue()
        found = find_checkpoint(run, None)
    told = "best.json is damaged" in said.getvalue()
    assert changed or not told, said.getvalue()
    if found.name != expected:
        assert told or gone, "another checkpoint, and not a word"
    return _ended(
        f"best.json, {'told, the newest is taken' if told else 'unchanged or gone'}",
        whole,
        config,
        trains=trains,
    )


def _ended(told: str, whole: Config, config: Config, *, trains: bool) -> str:
    """In some cases: the run goes on to its end, which is that of the one that saw no harm."""
    if not trains:
        return told
    with _heard():
        train(config)
    check_same(whole, config)
    check_tidy(config)
    return f"{told}; the same end"


TORTURE = Torture(
    title="truncations, flipped bits, zeroed, scrambled, appended and swapped content, missing and "
    "added files, in every file of a checkpoint, of the run and of its tokenized text",
    promise="found before anything is parsed and told; the run goes on one checkpoint back to the "
    "same bits, shards are built again, what cannot be mended is refused",
    full=1600,
    short=32,
    case=case,
    prepare=prepare,
    chunk=16,
)
