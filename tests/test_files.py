"""Files of strangers: no pipe is waited for, no link followed, no hole read."""

import os
from pathlib import Path

import pytest

from gpt.files import is_hollow, locked, open_plain, read_plain


def test_a_plain_file_is_read_up_to_its_limit(tmp_path: Path):
    path = tmp_path / "a"
    path.write_bytes(b"12345")
    assert read_plain(path, 5) == b"12345"
    with pytest.raises(OSError, match="over 4 bytes"):
        read_plain(path, 4)


@pytest.mark.parametrize("target", ["/dev/zero", "/dev/urandom", "."])
def test_what_never_ends_is_not_begun(target: str, tmp_path: Path):
    link = tmp_path / "link"
    link.symlink_to(target)
    with pytest.raises(OSError, match=r"not a plain file|directory"):
        read_plain(link, 100)


def test_a_pipe_is_not_waited_for(tmp_path: Path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(OSError, match="not a plain file"):
        open_plain(tmp_path / "pipe")


def test_holes_are_seen(tmp_path: Path):
    path = tmp_path / "huge"
    path.write_bytes(b"head")
    assert not is_hollow(path)
    os.truncate(path, 2**40)
    assert is_hollow(path)


def test_a_lock_that_is_a_link_overwrites_nothing(tmp_path: Path):
    victim = tmp_path / "victim"
    victim.write_text("precious")
    (tmp_path / ".lock").symlink_to(victim)
    with pytest.raises(OSError, match="symbolic links"), locked(tmp_path / ".lock", wait=False):
        pass
    assert victim.read_text() == "precious"
