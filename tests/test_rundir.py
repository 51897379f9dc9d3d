"""One writer a directory; what is kept; what is refused."""

import os
from pathlib import Path

import pytest

from gpt.errors import UserError
from gpt.rundir import check_run, locked_run, run_path
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
