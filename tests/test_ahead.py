"""A text that is opened while torch is imported: same data, same errors, nothing too early."""

from pathlib import Path

import pytest

from gpt import ahead as ahead_module
from gpt.ahead import DataAhead, is_certain
from gpt.config import Config
from gpt.configfile import load_config
from gpt.data import open_data
from gpt.errors import UserError


def config_of(folder: Path, *overrides: tuple[str, str]) -> Config:
    (folder / "a.txt").write_text("some words on a line\n" * 200)
    (folder / "a.yaml").write_text("model: {context_len: 16}\ntokenizer: {kind: bytes}\n")
    places = {"data.source": "a.txt", "data.dir": "data", "run.dir": "runs"}
    own = [(key, str(folder / value)) for key, value in places.items()]
    return load_config(folder / "a.yaml", [*own, *overrides])


def test_it_gives_what_open_data_gives(tmp_path: Path):
    config = config_of(tmp_path)
    with DataAhead(config, may=True) as ahead:
        data = ahead.open(config)
    again = open_data(config)
    assert (data.fingerprint, data.folder) == (again.fingerprint, again.folder)
    assert data.train.read(0, 50).tolist() == again.train.read(0, 50).tolist()


def test_an_error_comes_where_the_data_is_asked_for(tmp_path: Path):
    config = config_of(tmp_path)
    (tmp_path / "a.txt").write_bytes(b"not \xff text")
    with DataAhead(config, may=True) as ahead, pytest.raises(UserError, match="byte 4 is 0xff"):
        ahead.open(config)


def test_another_config_is_opened_as_ever(tmp_path: Path):
    config, other = config_of(tmp_path), config_of(tmp_path, ("tokenizer.kind", "chars"))
    with DataAhead(config, may=True) as ahead:
        assert ahead.open(other).tokenizer.kind == "chars"


def test_a_run_that_could_be_refused_begins_nothing(tmp_path: Path, monkeypatch):
    assert is_certain(config_of(tmp_path))
    assert not is_certain(config_of(tmp_path, ("train.device", "cuda")))
    assert not is_certain(config_of(tmp_path, ("data.source", str(tmp_path / "none.txt"))))
    monkeypatch.setattr(ahead_module, "MOST_BYTES", 100)
    assert not is_certain(config_of(tmp_path))
    monkeypatch.undo()
    config = config_of(tmp_path)
    with DataAhead(config, may=False):
        pass
    (Path(config.run.dir) / config.run.name).mkdir(parents=True)
    with DataAhead(config, may=True):
        pass
    assert not Path(config.data.dir).exists()


def test_whoever_leaves_waits_for_what_was_begun(tmp_path: Path):
    config = config_of(tmp_path)
    with pytest.raises(KeyboardInterrupt), DataAhead(config, may=True):
        raise KeyboardInterrupt
    names = [path.name for path in Path(config.data.dir).iterdir()]
    assert not [name for name in names if name.startswith((".tmp", ".old"))]
    assert open_data(config).train.n_tokens
