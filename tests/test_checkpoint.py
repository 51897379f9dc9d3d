"""Whole or not at all: verified before it is parsed, nothing in it can run or escape."""

import itertools
import json
import os
import pickle
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from gpt.checkpoint import (
    CheckpointError,
    changed_parts,
    load_for_inference,
    verify_checkpoint,
)
from gpt.configfile import load_config
from gpt.errors import UserError
from gpt.generate import Sampling, generate
from gpt.manifest import write_manifest
from gpt.metrics import read_metrics
from gpt.rundir import find_checkpoint
from gpt.tensors import load_all
from gpt.train import train
from tests.conftest import ConfigMaker

CPU = torch.device("cpu")
FIXTURES = Path(__file__).parent / "fixtures"
OTHER_PROCESSOR = 1e-5  # how far a loss may be off where another one adds in another order


@pytest.fixture
def checkpoint(make_config: ConfigMaker) -> Path:
    config = make_config(train__max_steps="2", eval__sample_tokens="0")
    train(config)
    return Path(config.run.dir) / "tiny" / "checkpoints" / "step-00000002"


def reseal(folder: Path) -> None:
    """Makes the manifest agree with the files again: what someone with bad intent would do."""
    step = json.loads((folder / "manifest.json").read_text())["step"]
    (folder / "manifest.json").unlink()
    write_manifest(folder, step)


@pytest.mark.parametrize(
    "name",
    ["model.safetensors", "optimizer.safetensors", "rng.safetensors", "state.json", "config.yaml",
     "tokenizer.json"],
)  # fmt: skip
def test_every_damaged_byte_is_found(name: str, checkpoint: Path) -> None:
    path = checkpoint / name
    whole = path.read_bytes()
    for position in (0, len(whole) // 2, len(whole) - 1):
        damaged = bytearray(whole)
        damaged[position] ^= 4
        path.write_bytes(damaged)
        with pytest.raises(CheckpointError, match=name):
            verify_checkpoint(checkpoint)
    path.write_bytes(whole[:-1])
    with pytest.raises(CheckpointError, match=name):
        verify_checkpoint(checkpoint)
    path.write_bytes(whole)
    verify_checkpoint(checkpoint)


def add_stranger(folder: Path) -> None:
    (folder / "extra.bin").write_bytes(b"x")


def drop_manifest(folder: Path) -> None:
    (folder / "manifest.json").unlink()


def link_outside(folder: Path) -> None:
    secret = folder.parents[1] / "secret"
    secret.write_bytes((folder / "state.json").read_bytes())
    (folder / "state.json").unlink()
    (folder / "state.json").symlink_to(secret)


def climb_out(folder: Path) -> None:
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["files"]["../../config.yaml"] = {"bytes": 1, "sha256": "0"}
    (folder / "manifest.json").write_text(json.dumps(manifest))


def other_version(folder: Path) -> None:
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["version"] = 99
    (folder / "manifest.json").write_text(json.dumps(manifest))


def no_json(folder: Path) -> None:
    (folder / "manifest.json").write_text("[" * 100_000)


@pytest.mark.parametrize(
    "harm", [add_stranger, drop_manifest, link_outside, climb_out, other_version, no_json]
)
def test_a_manipulated_folder_is_refused(harm: Callable[[Path], None], checkpoint: Path) -> None:
    harm(checkpoint)
    with pytest.raises(CheckpointError):
        load_for_inference(checkpoint, CPU)


class Canary:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, (f"touch {self.path}",)


@pytest.mark.parametrize(
    "name", ["model.safetensors", "tokenizer.json", "config.yaml", "state.json"]
)
def test_a_pickle_in_any_place_never_runs(name: str, checkpoint: Path, tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    (checkpoint / name).write_bytes(pickle.dumps(Canary(canary)))
    reseal(checkpoint)
    if name == "state.json":  # not read by inference
        load_for_inference(checkpoint, CPU)
    else:
        with pytest.raises(UserError):
            load_for_inference(checkpoint, CPU)
    assert not canary.exists()


def test_yaml_objects_are_not_built(checkpoint: Path, tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    (checkpoint / "config.yaml").write_text(
        f"run: {{name: !!python/object/apply:os.system ['touch {canary}']}}\n"
    )
    reseal(checkpoint)
    with pytest.raises(UserError):
        load_for_inference(checkpoint, CPU)
    assert not canary.exists()


def test_other_shapes_than_the_config_are_refused_before_allocation(checkpoint: Path) -> None:
    """A config that claims terabytes is compared with the file, not believed."""
    text = (checkpoint / "config.yaml").read_text()
    assert "n_embd: 16\n" in text
    (checkpoint / "config.yaml").write_text(text.replace("n_embd: 16\n", "n_embd: 65536\n"))
    reseal(checkpoint)
    with pytest.raises(CheckpointError, match="65536"):
        load_for_inference(checkpoint, CPU)


def test_other_dtypes_and_missing_tensors_are_refused(checkpoint: Path) -> None:
    tensors = load_file(checkpoint / "model.safetensors")
    name = sorted(tensors)[0]
    save_file({**tensors, name: tensors[name].half()}, checkpoint / "model.safetensors")
    reseal(checkpoint)
    with pytest.raises(CheckpointError, match="F16"):
        load_for_inference(checkpoint, CPU)
    del tensors[name]
    save_file(tensors, checkpoint / "model.safetensors")
    reseal(checkpoint)
    with pytest.raises(CheckpointError, match=name):
        load_for_inference(checkpoint, CPU)


def test_find_checkpoint_says_what_is_missing(tmp_path: Path, checkpoint: Path) -> None:
    with pytest.raises(UserError, match="no run with a checkpoint"):
        find_checkpoint(None, None, tmp_path / "nowhere")
    with pytest.raises(UserError, match="does not exist"):
        find_checkpoint(tmp_path / "nothing", None)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="no whole checkpoint"):
        find_checkpoint(tmp_path / "empty", None)
    with pytest.raises(UserError, match="not a checkpoint folder"):
        find_checkpoint(None, tmp_path / "empty")
    runs = checkpoint.parents[2]
    assert find_checkpoint(None, None, runs) == checkpoint


@pytest.fixture(params=["checkpoint-v1"])
def old_run(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Path:
    """A run that an older version of this program was killed in after step 4, beside its text."""
    shutil.copytree(FIXTURES / request.param, tmp_path / "old")
    monkeypatch.chdir(tmp_path / "old")
    shutil.copytree("run", "runs/tiny")
    return tmp_path / "old"


def test_a_run_of_an_older_version_goes_on_as_it_would_have(old_run: Path) -> None:
    expected = json.loads((old_run / "expected.json").read_text(encoding="utf-8"))
    run = old_run / "runs" / "tiny"
    before = read_metrics(run)
    train(load_config(run / "config.yaml"), "must")
    records = read_metrics(run)
    assert [r for r in records if r in before] == before, "what was logged stays as it was"
    for kind, key in (("train", "loss"), ("val", "val_loss")):
        logged = {str(r["step"]): r[key] for r in records if key in r and r["step"] > 4}
        assert logged == pytest.approx(expected[kind], rel=OTHER_PROCESSOR)


def test_a_checkpoint_of_an_older_version_infers_as_it_did(old_run: Path) -> None:
    expected = json.loads((old_run / "expected.json").read_text(encoding="utf-8"))
    model, tokenizer = load_for_inference(find_checkpoint(old_run / "runs" / "tiny", None), CPU)
    prompt = expected["prompt"]
    with torch.no_grad():
        logits = model(torch.tensor([tokenizer.encode(prompt).tolist()]))[0, -1]
    assert logits.tolist() == pytest.approx(expected["logits"], abs=1e-6)
    pieces = generate(model, tokenizer, [prompt], Sampling(max_tokens=12, temperature=0))
    assert "".join(piece.text for piece in pieces) == expected["greedy"]


def alter_state(checkpoint: Path, alter: Callable[[dict[str, Any]], object]) -> None:
    state = json.loads((checkpoint / "state.json").read_text())
    alter(state)
    (checkpoint / "state.json").write_text(json.dumps(state))
    reseal(checkpoint)


@pytest.mark.parametrize(
    ("alter", "named"),
    [
        (lambda state: state.pop("data_parts"), "lacks data_parts"),
        (lambda state: state.update(mood=1), "'mood' is no part of it.*release that wrote it"),
        (lambda state: state["progress"].pop("skips_in_row"), r"lacks progress\.skips_in_row"),
        (lambda state: state["progress"].update(luck=1), r"'progress\.luck' is no part"),
        (lambda state: state.update(progress=[]), "progress is not an object"),
        (lambda state: state["progress"].update(step=1), r"progress\.step: 1 is not the step"),
    ],
)
def test_fields_that_are_missing_or_unknown_are_named(
    alter: Callable[[dict[str, Any]], object],
    named: str,
    checkpoint: Path,
    make_config: ConfigMaker,
) -> None:
    alter_state(checkpoint, alter)
    with pytest.raises(CheckpointError, match=f"state.json.*{named}"):
        train(make_config(train__max_steps="2", eval__sample_tokens="0"))


def test_no_byte_of_the_manifest_can_change_unseen(checkpoint: Path) -> None:
    path = checkpoint / "manifest.json"
    whole = path.read_bytes()
    for position in range(len(whole)):
        for bit in (0, 3, 6):
            damaged = bytearray(whole)
            damaged[position] ^= 1 << bit
            path.write_bytes(damaged)
            with pytest.raises(CheckpointError):
                verify_checkpoint(checkpoint)
    for damaged in (whole[:-1], whole + b"\n", b" " + whole, b""):
        path.write_bytes(damaged)
        with pytest.raises(CheckpointError):
            verify_checkpoint(checkpoint)


def test_a_checkpoint_under_the_name_of_another_step_is_refused(checkpoint: Path) -> None:
    other = checkpoint.with_name("step-00000009")
    checkpoint.rename(other)
    with pytest.raises(CheckpointError, match="is of step 2; it is misplaced"):
        verify_checkpoint(other)
    other.rename(checkpoint.with_name("favourite"))
    verify_checkpoint(checkpoint.with_name("favourite"))


def test_whoever_may_read_one_file_of_a_checkpoint_may_read_all(checkpoint: Path) -> None:
    modes = {path.name: path.stat().st_mode & 0o777 for path in checkpoint.iterdir()}
    assert len(set(modes.values())) == 1, modes


def test_what_changed_of_the_data_is_named(
    checkpoint: Path, make_config: ConfigMaker, text_file: Path
) -> None:
    config = make_config(train__max_steps="2", eval__sample_tokens="0")
    text = text_file.read_text(encoding="utf-8")
    text_file.write_text(text + " cat", encoding="utf-8")
    with pytest.raises(CheckpointError, match=r"other data \(text has changed\)"):
        train(config)


def test_parts_of_the_data_in_words() -> None:
    before = {"text": "a", "tokenizer": "b"}
    assert changed_parts(before, {"text": "c", "tokenizer": "b"}) == "text has"
    assert changed_parts(before, {"text": "a", "tokenizer": "c"}) == "tokenizer has"
    assert changed_parts(before, {"text": "c", "tokenizer": "c"}) == "text and tokenizer have"
    assert changed_parts(before, before) == "split has"
    assert changed_parts({}, before) == "text, tokenizer or split have"


def test_loaded_tensors_are_no_longer_the_file(tmp_path: Path) -> None:
    path = tmp_path / "some.safetensors"
    save_file({"a": torch.zeros(50_000)}, path)
    tensors = load_all(path)
    with path.open("r+b") as file:
        file.seek(-40_000, os.SEEK_END)
        file.write(b"\x01" * 40_000)
    assert tensors["a"].count_nonzero() == 0


PAGE = FIXTURES.parents[1] / "docs" / "checkpoint.md"


def documented(heading: str) -> set[str]:
    """The names in the first column of the table under a heading of the page."""
    lines = PAGE.read_text(encoding="utf-8").split(f"{heading}\n")[1].splitlines()
    section = list(itertools.takewhile(lambda line: not line.startswith("#"), lines))
    return {line.split("`")[1] for line in section if line.startswith("| `")}


def test_the_page_names_every_field_that_a_checkpoint_holds(
    make_config: ConfigMaker, tmp_path: Path
) -> None:
    config = make_config(
        train__max_steps="2",
        eval__sample_tokens="0",
        tokenizer__kind="bpe",
        tokenizer__vocab_size="300",
    )
    train(config)
    folder = Path(config.run.dir) / "tiny" / "checkpoints" / "step-00000002"
    state = json.loads((folder / "state.json").read_text())
    assert documented("## Files") == {path.name for path in folder.iterdir()}
    assert documented("## manifest.json") == set(json.loads((folder / "manifest.json").read_text()))
    assert documented("## state.json") == set(state)
    assert documented("### progress") == set(state["progress"])
    words = PAGE.read_text(encoding="utf-8")
    for name in (*state["optimizer"], *state["optimizer"]["groups"][0], *state["data_parts"]):
        assert f"`{name}`" in words
    version = json.loads((folder / "manifest.json").read_text())["version"]
    assert f"of this format, {version} |" in words
    assert re.findall(r"^\| (\d+) \|", words, re.M) == [str(n + 1) for n in range(version)]


def test_a_checkpoint_is_durable_before_it_has_its_name_and_then_its_name_is(
    make_config: ConfigMaker, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[tuple[str, int]] = []

    def note(path: Path) -> None:
        folder = path if path.name == "checkpoints" else path.parent
        synced.append((path.name, len(list(folder.glob("step-*")))))

    monkeypatch.setattr("gpt.checkpoint.sync", note)
    train(make_config(train__max_steps="2", eval__sample_tokens="0"))
    assert synced == [(".tmp-step-00000002", 0), ("checkpoints", 1)]
