"""One writer a directory; what is kept; what is refused."""

import errno
import os
from pathlib import Path

import pytest

import gpt.rundir
from gpt.checkpoint import SaveError, Training
from gpt.config import Config, TrainConfig
from gpt.errors import UserError
from gpt.rundir import (
    check_run,
    checkpoint_folders,
    find_checkpoint,
    locked_run,
    run_path,
    step_of,
)
from gpt.train import train
from tests.conftest import ConfigMaker


def test_a_second_process_is_told_who_holds_the_run(make_config: ConfigMaker) -> None:
    config = make_config()
    with (
        locked_run(config, "auto"),
        pytest.raises(UserError, match=f"in use by process {os.getpid()}"),
        locked_run(config, "auto"),
    ):
        pass
    with locked_run(config, "auto"):  # free again
        pass


def test_a_folder_that_is_no_run_is_left_alone(make_config: ConfigMaker) -> None:
    config = make_config()
    path = run_path(config)
    path.mkdir(parents=True)
    (path / "thesis.txt").write_text("precious")
    with pytest.raises(UserError, match="is not a run"), locked_run(config, "auto"):
        pass
    assert [child.name for child in path.iterdir()] == ["thesis.txt"]


def test_a_file_in_the_way(make_config: ConfigMaker) -> None:
    config = make_config()
    run_path(config).parent.mkdir(parents=True)
    run_path(config).write_text("")
    with pytest.raises(UserError, match="is a file"):
        check_run(config, "auto")


def test_leftovers_of_a_killed_save_are_removed(make_config: ConfigMaker) -> None:
    config = make_config()
    leftovers = [
        run_path(config) / "checkpoints" / ".tmp-step-00000004",
        run_path(config) / "checkpoints" / ".tmp-drop-step-00000002",
    ]
    for folder in leftovers:
        folder.mkdir(parents=True)
        (folder / "model.safetensors").write_bytes(b"half")
    leftovers.append(run_path(config) / ".tmp-config.yaml")  # the run's very first file
    leftovers[-1].write_text("run:")
    with locked_run(config, "auto") as path:
        assert path == Path(config.run.dir) / "tiny"
        assert not any(folder.exists() for folder in leftovers)


def test_a_run_that_never_began_leaves_no_folder(make_config: ConfigMaker) -> None:
    config = make_config()
    with pytest.raises(UserError, match="no such text"), locked_run(config, "auto"):
        raise UserError("no such text")
    assert not run_path(config).exists()


@pytest.mark.parametrize("name", ["metrics.jsonl", ".lock", "curve.png", "checkpoints/.tmp-x"])
@pytest.mark.parametrize("kind", ["link to a file", "link to nothing", "link to a folder", "pipe"])
def test_a_run_writes_through_no_link(
    make_config: ConfigMaker, tmp_path: Path, name: str, kind: str
) -> None:
    config = make_config()
    path = run_path(config) / name
    path.parent.mkdir(parents=True)
    target = tmp_path / "outside"
    if kind == "pipe":
        os.mkfifo(path)
    else:
        path.symlink_to(target)
    if kind == "link to a folder":
        target.mkdir()
    elif kind == "link to a file":
        target.write_text("precious")
    with pytest.raises(UserError, match="a link, a pipe or a device"), locked_run(config, "auto"):
        pass
    assert not target.is_file() or target.read_text() == "precious"
    assert target.exists() == (kind in ("link to a file", "link to a folder"))


def test_the_checkpoints_may_lie_on_another_disk(make_config: ConfigMaker, tmp_path: Path) -> None:
    config = make_config()
    (tmp_path / "disk").mkdir()
    run_path(config).mkdir(parents=True)
    (run_path(config) / "checkpoints").symlink_to(tmp_path / "disk")
    with locked_run(config, "auto") as path:
        assert path == run_path(config)


def saved_until(config: Config) -> list[int]:
    train(config)
    return [step_of(folder) for folder in checkpoint_folders(run_path(config))]


def test_where_there_is_room_for_no_more_the_oldest_goes_first(
    make_config: ConfigMaker, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make_config(checkpoint__every_steps="2", checkpoint__keep="3", eval__every_steps="100")
    save = gpt.rundir.save_checkpoint

    def fits_three(folder: Path, training: Training) -> None:
        if len(checkpoint_folders(run_path(config))) >= 3:
            raise SaveError(OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)))
        save(folder, training)

    monkeypatch.setattr(gpt.rundir, "save_checkpoint", fits_three)
    assert saved_until(config) == [8, 10, 12]


def test_other_failures_of_a_save_let_nothing_go(
    make_config: ConfigMaker, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make_config(checkpoint__every_steps="2", checkpoint__keep="3", train__max_steps="8")
    saved_until(config)
    before = checkpoint_folders(run_path(config))

    def fail(folder: Path, training: Training) -> None:
        raise SaveError(OSError(errno.EIO, os.strerror(errno.EIO)))

    monkeypatch.setattr(gpt.rundir, "save_checkpoint", fail)
    with pytest.raises(UserError, match="could not be saved"):
        train(config.model_copy(update={"train": longer(config)}), rate="extend")
    assert checkpoint_folders(run_path(config)) == before


def longer(config: Config) -> TrainConfig:
    return config.train.model_copy(update={"max_steps": 12})


def test_a_best_json_that_cannot_be_right_is_told(
    make_config: ConfigMaker, capsys: pytest.CaptureFixture[str]
) -> None:
    config = make_config(checkpoint__every_steps="2", checkpoint__keep="6")
    saved_until(config)
    run = run_path(config)
    path = run / "checkpoints" / "best.json"
    whole = path.read_bytes()
    best = find_checkpoint(run, None)
    newest = checkpoint_folders(run)[-1]
    capsys.readouterr()
    number = b"step-%08d" % step_of(best)
    for damaged in (whole.replace(number, b"step-00000002"), whole[:-9], b"", whole + b" "):
        path.write_bytes(damaged)
        assert find_checkpoint(run, None) == newest
        assert "best.json is damaged" in capsys.readouterr().err
    path.write_text(f'{{"checkpoint": "{checkpoint_folders(run)[0].name}", "val_loss": 1.0}}')
    assert find_checkpoint(run, None) == checkpoint_folders(run)[0], "as older versions wrote it"


def test_nothing_begins_anew_over_checkpoints_that_are_damaged(make_config: ConfigMaker) -> None:
    config = make_config()
    saved_until(config)
    for folder in checkpoint_folders(run_path(config)):
        (folder / "state.json").write_text("{}")
    log = (run_path(config) / "metrics.jsonl").read_bytes()
    with pytest.raises(UserError, match=r"none of its \d checkpoints is whole.*--run\.name"):
        train(config)
    assert (run_path(config) / "metrics.jsonl").read_bytes() == log


def test_a_free_key_that_changed_is_named(
    make_config: ConfigMaker, capsys: pytest.CaptureFixture[str]
) -> None:
    saved_until(make_config())
    capsys.readouterr()
    train(make_config(eval__max_tokens="300"))
    assert "changed  since step 12: eval.max_tokens: 200 there, 300 now" in capsys.readouterr().err


def test_a_disk_that_refuses_the_start_leaves_nothing(
    make_config: ConfigMaker, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make_config()

    def full(run: Path, config: Config) -> None:
        (run / "config.yaml").write_text("half")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(run / "config.yaml"))

    monkeypatch.setattr("gpt.build.start_afresh", full)
    with pytest.raises(UserError, match=r"run\.dir: .*config\.yaml: cannot be written \(No space"):
        train(config)
    assert not run_path(config).exists()
