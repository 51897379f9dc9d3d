"""What --dry-run finds out without writing: what the run would be refused for, and in its words."""

import sys
from pathlib import Path

import pytest

from gpt.build import dry_run
from gpt.config import Config, LogConfig
from gpt.errors import UserError
from gpt.metrics import read_metrics
from gpt.trackers import check_installed
from gpt.train import train
from tests.conftest import ConfigMaker


def both(config: Config, *needed: str) -> str:
    """What --dry-run and the run refuse it for: the same."""
    told = []
    for attempt in (lambda: dry_run(config, "auto"), lambda: train(config)):
        with pytest.raises(UserError) as caught:
            attempt()
        told.append(caught.value.lines)
    assert told[0] == told[1]
    assert not Path(config.run.dir, config.run.name).exists()
    (line,) = told[0]
    assert all(word in line for word in needed), line
    return line


def test_a_small_text_is_read_and_nothing_is_left(make_config: ConfigMaker, tmp_path: Path):
    lines = dry_run(make_config(), "auto")
    assert any("tokens to train on" in line for line in lines)
    assert not (tmp_path / "data").exists()
    assert not (tmp_path / "runs").exists()


def test_a_prompt_that_the_tokenizer_lacks_is_no_late_failure(make_config: ConfigMaker):
    line = both(make_config(tokenizer__kind="chars", eval__sample_prompt="Q"), "'Q'")
    assert line.startswith("eval.sample_prompt: not among")


def test_where_the_text_has_no_new_line_samples_begin_as_a_document(make_config: ConfigMaker):
    config = make_config(tokenizer__kind="chars", train__max_steps="4")
    train(config)
    records = read_metrics(Path(config.run.dir, config.run.name))
    assert [each["prompt"] for each in records if each.get("event") == "sample"] == [""]


@pytest.mark.parametrize("tracker", ["tensorboard", "wandb"])
def test_a_tracker_that_is_not_installed(make_config: ConfigMaker, monkeypatch, tracker: str):
    monkeypatch.setitem(sys.modules, tracker, None)
    both(make_config(**{f"log__{tracker}": "true"}), f"the package {tracker} is not installed")


def test_a_folder_called_wandb_is_no_package(make_config: ConfigMaker, monkeypatch, tmp_path: Path):
    for name in [name for name in sys.modules if name.partition(".")[0] == "wandb"]:
        monkeypatch.delitem(sys.modules, name)
    (tmp_path / "wandb").mkdir()
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    with pytest.raises(UserError, match="not installed"):
        check_installed(LogConfig(wandb=True))


@pytest.mark.parametrize(
    ("changes", "needed"),
    [
        ({"model__context_len": "50000"}, "model.context_len 50000: the training split has"),
        ({"data__val_fraction": "1e-300"}, "data.val_fraction"),
        ({"data__encoding": "ascii"}, "data.source: "),
        ({"data__encoding": "idna"}, "data.encoding"),
        ({"data__dir": "{}/words.txt/in"}, "data.dir: "),
        ({"run__dir": "{}/words.txt/in"}, "run.dir: "),
    ],
)
def test_refused_alike(make_config: ConfigMaker, tmp_path: Path, changes, needed):
    placed = {key: value.format(tmp_path) for key, value in changes.items()}
    both(make_config(**placed), needed)


@pytest.mark.parametrize("encoding", ["quopri", "no-such"])
def test_an_encoding_of_a_text_too_large_to_be_read(make_config, monkeypatch, encoding: str):
    monkeypatch.setattr("gpt.build.SMALL_BYTES", 0)
    both(make_config(data__encoding=encoding), f"data.encoding: {encoding} is not a text encoding")


def test_a_ranks_file_whose_ids_leave_no_room(make_config: ConfigMaker, tmp_path: Path):
    from tests.test_tokenizer import write_ranks

    path = write_ranks(tmp_path / "full.tiktoken")
    path.write_bytes(path.read_bytes() + b"YWFh 1999999\n")
    both(make_config(tokenizer__kind=str(path)), "tokenizer.kind: ", "give another ranks file")
