"""Configs: spellings of numbers, all mistakes at once with their lines, dumps that come back."""

import ast
import contextlib
import json
import math
import time
from pathlib import Path
from typing import Any, get_args

import pytest
import yaml
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from gpt.cli.arguments import split_overrides
from gpt.config import PRESETS, Config, ModelConfig
from gpt.configfile import (
    dump_config,
    json_schema,
    knobs,
    knobs_help,
    load_config,
    located,
    named,
)
from gpt.errors import UserError
from gpt.model import parameter_inventory

GPT = Path(__file__).parents[1] / "gpt"


def load(tmp_path: Path, text: str | bytes, *overrides: tuple[str, str]) -> Config:
    path = tmp_path / "run.yaml"
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return load_config(path, overrides)


def mistakes(tmp_path: Path, text: str | bytes, *overrides: tuple[str, str]) -> list[str]:
    with pytest.raises(UserError) as caught:
        load(tmp_path, text, *overrides)
    lines = [line.replace(f"{tmp_path}/", "") for line in caught.value.lines]
    assert all(line.strip() and "\n" not in line for line in lines)
    return lines


def test_no_file_is_the_defaults():
    assert load_config(None) == Config()


# Numbers -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spelling", "value"),
    [
        ("3e-4", 3e-4),
        ("3E-4", 3e-4),
        ("3.0e-4", 3e-4),
        (".0003", 3e-4),
        ("0.0003", 3e-4),
        ("+3e-4", 3e-4),
        ("1e-3", 1e-3),
        ("1e2", 100.0),
        ("1e+2", 100.0),
        ("1.", 1.0),
        ("1", 1.0),
        ("1_00.5", 100.5),
        ("'3e-4'", 3e-4),
    ],
)
def test_floats_in_all_spellings(tmp_path, spelling, value):
    floor = "schedule: {min_lr: 0}\n"
    assert load(tmp_path, f"{floor}optimizer:\n  lr: {spelling}\n").optimizer.lr == value
    if "'" not in spelling:
        assert load(tmp_path, floor, ("optimizer.lr", spelling)).optimizer.lr == value


@pytest.mark.parametrize(
    ("spelling", "value"),
    [("2000", 2000), ("1_000", 1000), ("1e6", 10**6), ("1e3", 1000), ("2000.0", 2000), ("017", 17)],
)
def test_integers_in_all_spellings(tmp_path, spelling, value):
    text = f"train:\n  max_steps: {spelling}\n"
    assert load(tmp_path, text).train.max_steps == value
    assert load(tmp_path, "", ("train.max_steps", spelling)).train.max_steps == value


@pytest.mark.parametrize(
    "spelling",
    ["true", "1.5", "1:30", "no", "yes", ".inf", ".nan", "1e400", "0x10", "many", "[1]", "{}"],
)
def test_not_an_integer(tmp_path, spelling):
    (line,) = mistakes(tmp_path, f"model:\n  n_layer: {spelling}\n")
    assert line.startswith("run.yaml:2: model.n_layer: ")
    assert "got" in line


@pytest.mark.parametrize(
    "spelling", ["true", ".nan", ".inf", "-.inf", "nan", "1e999", "1:30", "off"]
)
def test_not_a_number(tmp_path, spelling):
    (line,) = mistakes(tmp_path, f"optimizer:\n  lr: {spelling}\n")
    assert line.startswith("run.yaml:2: optimizer.lr: ")


def test_a_number_of_five_thousand_digits(tmp_path):
    (line,) = mistakes(tmp_path, f"model:\n  n_layer: {'1' * 5000}\n")
    assert line.startswith("run.yaml:2: model.n_layer: ")
    assert len(line) < 300


def test_words_that_yaml_1_1_turns_into_other_things(tmp_path):
    text = "run:\n  name: no\n  dir: 1:30\ndata:\n  text_field: yes\n  source: [off, 'null']\n"
    config = load(tmp_path, text)
    assert (config.run.name, config.run.dir, config.data.text_field) == ("no", "1:30", "yes")
    assert config.data.source == ["off", "null"]


def test_a_date_stays_text(tmp_path):
    assert load(tmp_path, "run: {name: 2024-01-02}\n").run.name == "2024-01-02"


@pytest.mark.parametrize(
    ("spelling", "value"),
    [
        ("on", "on"),
        ("off", "off"),
        ("true", "on"),
        ("false", "off"),
        ("auto", "auto"),
        ("'on'", "on"),
    ],
)
def test_compile_switch(tmp_path, spelling, value):
    assert load(tmp_path, f"train: {{compile: {spelling}}}\n").train.compile == value
    word = spelling.strip("'")
    assert load(tmp_path, "", ("train.compile", word)).train.compile == value


def test_compile_is_nothing_else(tmp_path):
    (line,) = mistakes(tmp_path, "train: {compile: maybe}\n")
    assert "'auto', 'on' or 'off'" in line


# Mistakes ----------------------------------------------------------------------------------------


def test_duplicate_keys(tmp_path):
    lines = mistakes(tmp_path, "optimizer:\n  lr: 1e-3\n  lr: 2e-3\nrun: {}\nrun: {}\n")
    assert lines == [
        "run.yaml:3: optimizer.lr: given twice, first in line 2; remove one",
        "run.yaml:5: run: given twice, first in line 4; remove one",
    ]


@pytest.mark.parametrize(
    ("text", "near"),
    [
        ("optimizer: {learning_rate: 1}", "optimizer has"),
        ("optimizer: {weigth_decay: 1}", "did you mean optimizer.weight_decay?"),
        ("model: {n_layers: 1}", "did you mean model.n_layer?"),
        ("train: {lr: 1e-3}", "did you mean optimizer.lr?"),
        ("optimiser: {lr: 1e-3}", "did you mean optimizer?"),
        ("lr: 1e-3", "did you mean optimizer.lr?"),
        ("qwertyuiop: {a: 1}", "the sections are run, data"),
    ],
)
def test_unknown_keys_name_the_nearest(tmp_path, text, near):
    (line,) = mistakes(tmp_path, text)
    assert line.startswith("run.yaml:1: ")
    assert near in line


def test_every_mistake_at_once_each_with_its_line(tmp_path):
    text = """\
run:
  nme: x
model:
  n_embd: 100
  n_head: 3
  dropout: 1.5
optimizer:
  lr: -1
  name: adamm
  betas: [0.9, 1.0]
train:
  max_steps: 10
schedule:
  warmup_steps: 11
"""
    lines = mistakes(tmp_path, text, ("eval.every_steps", "0"))
    starts = [line.split(": ")[:2] for line in lines]
    expected = {
        ("run.yaml:2", "run.nme"),
        ("run.yaml:4", "model.n_embd"),
        ("run.yaml:6", "model.dropout"),
        ("run.yaml:8", "optimizer.lr"),
        ("run.yaml:9", "optimizer.name"),
        ("run.yaml:10", "optimizer.betas"),
        ("run.yaml:14", "schedule.warmup_steps"),
    }
    assert expected <= {tuple(start) for start in starts}
    assert any("command line" in line and "eval.every_steps" in line for line in lines)
    assert len(lines) == len(expected) + 1


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("model: {n_embd: 130, n_head: 4}", ["130", "n_head 4", "would fit"]),
        ("model: {n_embd: 12, n_head: 4}", ["even head size", "3"]),
        ("model: {n_head: 4, n_kv_head: 3}", ["n_kv_head 3"]),
        ("schedule: {warmup_steps: 5, warmup_fraction: 0.1}", ["remove one"]),
        ("schedule: {warmup_steps: 2001}", ["2001", "2000"]),
        ("train: {max_tokens: 81920}\nschedule: {warmup_steps: 11}", ["11", "run of 10"]),
        ("schedule: {min_lr: 4e-4}", ["0.0004", "0.0003"]),
        ("train: {batch_size: 4, micro_batch_size: 8}", ["8", "4"]),
        ("model: {preset: gpt5}", ["'gpt5'", "gpt2-124m"]),
        ("train: {spike_sigma: 6, skip_limit: 0}", ["spike_sigma 6", "skip_limit to 1 or more"]),
    ],
)
def test_values_that_contradict_each_other(tmp_path, text, words):
    (line,) = mistakes(tmp_path, text)
    assert line.startswith("run.yaml:")
    assert all(word in line for word in words), line


@pytest.mark.parametrize(
    "text",
    [
        "run: {name: ''}",
        "run: {name: .hidden}",
        "run: {name: a/b}",
        "run: {name: ../up}",
        "run: {seed: -1}",
        "run: {seed: 9223372036854775808}",
        "data: {source: []}",
        "data: {val_fraction: 0}",
        "data: {val_fraction: 1}",
        "tokenizer: {vocab_size: 256}",
        "model: {n_layer: 0}",
        "model: {n_embd: -128}",
        "model: {bias: 1.5}",
        "optimizer: {betas: [0.9]}",
        "optimizer: {betas: [0.9, 0.95, 0.99]}",
        "optimizer: {betas: 0.9}",
        "optimizer: {eps: 0}",
        "optimizer: {lr: 0}",
        "optimizer: {name: null}",
        "schedule: {start_factor: 0}",
        "schedule: {start_factor: 1.1}",
        "train: {device: gpu}",
        "train: {device: 'cuda:-1'}",
        "train: {dtype: float32}",
        "train: {max_steps: 0}",
        "checkpoint: {keep: 0}",
        "log: {tensorboard: 3}",
        "model: 5",
        "model: [1, 2]",
    ],
)
def test_wrong_types_and_ranges(tmp_path, text):
    (line,) = mistakes(tmp_path, text)
    assert line.startswith("run.yaml:1: ")


# Files that are no configs -----------------------------------------------------------------------


@pytest.mark.parametrize(
    "text", ["", "\n\n", "# nothing\n", "---\n", "run:\nmodel:\n", "\ufeffrun: {}\n"]
)
def test_empty_files_are_the_defaults(tmp_path, text):
    assert load(tmp_path, text) == Config()


@pytest.mark.parametrize(
    ("text", "word"),
    [
        (b"\xff\xfe\x00\x01", "not UTF-8"),
        (b"\x00\x01\x02", "not valid YAML"),
        ("- a\n- b\n", "sections"),
        ("just words\n", "sections"),
        ("run: {name: [}\n", "not valid YAML"),
        ("run:\n\tname: x\n", "not valid YAML"),
        ("run: {}\n---\nrun: {}\n", "not valid YAML"),
        ("a: &a [x]\nb: *a\n", "aliases"),
        ("run: !!python/object/apply:os.system ['true']\n", ""),
        ("run: {name: !!python/name:os.system ''}\n", "run.name"),
        ("[" * 20_000, ""),
        ("run: " + "{a: " * 20_000, ""),
        ("x" * 2_000_000, "over 1,000,000 bytes"),
        ("? [a, b]\n: c\n", ""),
        ("run: {? {a: b} : c}\n", ""),
        ("1: 2\n", ""),
        ("model: {1: 2}\n", ""),
        ("null: {}\n", ""),
        ("run: {name: {a: b}}\n", "run.name"),
        ("run: {seed: !!timestamp 5}\n", "run.seed"),
        ("run: {seed: !!int x}\n", "run.seed"),
        ("run: {seed: !!float x}\n", "run.seed"),
        ("run: {seed: !!bool 3}\n", "run.seed"),
        ("run: {seed: !!int ''}\n", "run.seed"),
    ],
)
def test_files_that_are_no_configs(tmp_path, text, word):
    started = time.process_time()
    lines = mistakes(tmp_path, text)
    assert any(word in line for line in lines), lines
    assert time.process_time() - started < 2


def test_an_alias_bomb_is_refused_before_it_grows(tmp_path):
    text = "a: &a [x]\n" + "".join(
        f"{chr(98 + i)}: &{chr(98 + i)} [{', '.join([f'*{chr(97 + i)}'] * 9)}]\n" for i in range(20)
    )
    (line,) = mistakes(tmp_path, text)
    assert "aliases" in line


def test_a_file_that_is_not_there(tmp_path):
    (tmp_path / "quickstart.yaml").write_text("")
    with pytest.raises(UserError, match=r"does not exist; did you mean .*quickstart\.yaml\?"):
        load_config(tmp_path / "quikstart.yaml")
    with pytest.raises(UserError, match="check the path"):
        load_config(tmp_path / "zzzzzz")
    with pytest.raises(UserError, match="cannot be read"):
        load_config(tmp_path)
    with pytest.raises(UserError, match="cannot be read"):
        load_config(Path("nul\0byte"))


@given(st.text(max_size=60) | st.binary(max_size=60))
@settings(max_examples=200, deadline=None, derandomize=True)
def test_any_file_is_a_config_or_a_user_error(tmp_path_factory, content):
    path = tmp_path_factory.mktemp("any") / "run.yaml"
    path.write_bytes(
        content.encode("utf-8", "surrogatepass") if isinstance(content, str) else content
    )
    with contextlib.suppress(UserError):
        load_config(path)


SCALARS = st.sampled_from(
    ["1", "0", "-1", "1e3", "1.5", ".nan", ".inf", "true", "null", "~", "", "''", "x", "[1]"]  # noqa: RUF005
    + ["[]", "{}", "{a: 1}", "{a", "1_0", "_", "1__", "9" * 20, "9" * 5000, "-", "[" * 3000, "*a"]
)


@given(st.lists(st.tuples(st.sampled_from([name for name, *_ in knobs()]), SCALARS), max_size=4))
@settings(max_examples=200, deadline=None, derandomize=True)
def test_any_value_on_the_command_line_is_taken_or_a_user_error(overrides):
    with contextlib.suppress(UserError):
        load_config(None, overrides)


# The command line --------------------------------------------------------------------------------


def test_overrides_win_over_the_file(tmp_path):
    config = load(
        tmp_path,
        "optimizer: {lr: 1e-3, betas: [0.9, 0.99]}\n",
        ("optimizer.lr", "2e-3"),
        ("optimizer.betas", "[0.8, 0.9]"),
        ("train.micro_batch_size", "null"),
        ("train.grad_clip", ""),
        ("data.source", "[a.txt, b.txt]"),
        ("run.name", "007"),
        ("eval.sample_prompt", "{not: yaml}"),
    )
    assert config.optimizer.lr == 2e-3
    assert config.optimizer.betas == (0.8, 0.9)
    assert config.train.grad_clip is None
    assert config.data.source == ["a.txt", "b.txt"]
    assert config.run.name == "007"
    assert config.eval.sample_prompt == "{not: yaml}"


def test_mistakes_on_the_command_line_say_so(tmp_path):
    lines = mistakes(
        tmp_path,
        "",
        ("optimizer.lrr", "1"),
        ("model.n_layer", "x"),
        ("nope.key", "1"),
        ("run.", "1"),
    )
    assert len(lines) == 4
    assert all(line.startswith("command line: --") for line in lines)
    assert "did you mean optimizer.lr?" in lines[0] + lines[1] + lines[2] + lines[3]


@pytest.mark.parametrize("path", ["notes #2.txt", "a: b.txt", "2024", "!imp.txt", "&amp", "[a"])
def test_a_source_is_taken_as_typed(path, tmp_path):
    assert load_config(None, [("data.source", path)]).data.source == path


def test_a_list_of_sources_is_typed_in_brackets():
    assert load_config(None, [("data.source", "[a.txt, 'b c.txt']")]).data.source == [
        "a.txt",
        "b c.txt",
    ]


def test_a_preset_that_is_typed_wins_over_the_file(tmp_path):
    """A run's config.yaml spells out every key."""
    spelled = dump_config(load_config(None, [("model.n_layer", "3"), ("model.dropout", "0.2")]))
    preset = ("model.preset", "gpt2-124m")
    config = load(tmp_path, spelled, preset, ("model.n_head", "6"))
    named = {"n_head": 6, "preset": "gpt2-124m", "dropout": 0.2}
    assert config.model == load(tmp_path, "", preset).model.model_copy(update=named)
    assert load(tmp_path, spelled, ("model.preset", "null")).model.n_layer == 3


def test_a_key_that_is_a_number_is_named(tmp_path):
    (line,) = mistakes(tmp_path, "1: 2")
    assert line.startswith("run.yaml:1: 1: no such key")


def test_the_users_folder_is_spelled_out(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    config = load(tmp_path, "run: {dir: ~/runs}\ndata: {dir: ~/data}")
    assert (config.run.dir, config.data.dir) == (f"{tmp_path}/runs", f"{tmp_path}/data")
    assert load(tmp_path, "run: {dir: ~nobody-at-all/runs}").run.dir == "~nobody-at-all/runs"


def test_split_overrides():
    rest, overrides = split_overrides(
        [
            "--config",
            "a.yaml",
            "--optimizer.lr",
            "-1",
            "--run.name=a=b",
            "--dry-run",
            "--model.bias=",
            "c.d",
        ]
    )
    assert rest == ["--config", "a.yaml", "--dry-run", "c.d"]
    assert overrides == [("optimizer.lr", "-1"), ("run.name", "a=b"), ("model.bias", "")]
    with pytest.raises(UserError, match=r"--optimizer\.lr needs a value"):
        split_overrides(["--optimizer.lr"])


# Presets -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("preset", "vocab_size", "count"),
    [
        # GPT-2's counts are those of the published weights.
        ("gpt2-124m", 50_257, 124_439_808),
        ("gpt2-355m", 50_257, 354_823_168),
        ("gpt2-774m", 50_257, 774_030_080),
        ("gpt2-1.5b", 50_257, 1_557_611_200),
        ("gpt3-125m", 50_257, 124_439_808 + 1024 * 768),
        ("gpt3-350m", 50_257, 354_823_168 + 1024 * 1024),
        ("llama-60m", 32_000, 58_073_600),
        ("llama-130m", 32_000, 134_105_856),
        ("llama-350m", 32_000, 367_969_280),
        ("llama-1.1b", 32_000, 1_100_048_384),
    ],
)
def test_presets_have_the_published_number_of_parameters(preset, vocab_size, count):
    rows = parameter_inventory(ModelConfig(preset=preset), vocab_size)
    assert sum(row.count for row in rows) == count


@pytest.mark.parametrize("preset", sorted(PRESETS))
def test_presets_are_valid_and_keys_beside_them_win(tmp_path, preset):
    config = load(tmp_path, f"model: {{preset: {preset}, context_len: 77}}\n")
    for key, value in (PRESETS[preset] | {"context_len": 77}).items():
        assert getattr(config.model, key) == value


# Dumps -------------------------------------------------------------------------------------------


def values_of(annotation: Any, metadata: list[Any]) -> st.SearchStrategy[Any]:
    """Values for a knob, by its type; ranges are left to the check."""
    text = st.text(max_size=12) | st.sampled_from(
        ["null", "~", "1e3", "\u2028", "\x7f", "é🙂", "a: b"]
    )
    choices = {
        int: st.integers(1, 2000),
        float: st.floats(1e-9, 1, exclude_max=True),
        str: text,
        bool: st.booleans(),
        type(None): st.none(),
    }
    if annotation in choices:
        return choices[annotation]
    if hasattr(annotation, "__metadata__"):
        return values_of(annotation.__origin__, [])
    origin = getattr(annotation, "__origin__", None)
    parts = get_args(annotation)
    if origin is list:
        return st.lists(values_of(parts[0], []), min_size=1, max_size=3)
    if origin is tuple:
        return st.tuples(*(values_of(part, []) for part in parts))
    if parts and all(isinstance(part, str) for part in parts):
        return st.sampled_from(parts)
    return st.one_of(*(values_of(part, []) for part in parts))


def sections() -> st.SearchStrategy[dict[str, Any]]:
    return st.fixed_dictionaries(
        {
            name: st.fixed_dictionaries(
                {},
                optional={
                    key: values_of(info.annotation, info.metadata)
                    for key, info in section.annotation.model_fields.items()
                    if key != "preset"
                },
            )
            for name, section in Config.model_fields.items()
        }
    )


@given(sections())
@settings(max_examples=100, deadline=None, derandomize=True, phases=[Phase.generate])
def test_a_dumped_config_comes_back_equal(tmp_path_factory, given_values):
    valid: dict[str, dict[str, Any]] = {}
    for section, keys in given_values.items():
        for key, value in keys.items():
            attempt = valid | {section: valid.get(section, {}) | {key: value}}
            with contextlib.suppress(ValidationError):
                Config.model_validate(attempt)
                valid = attempt
    config = Config.model_validate(valid)
    path = tmp_path_factory.mktemp("dump") / "config.yaml"
    path.write_text(dump_config(config), encoding="utf-8")
    try:
        again = load_config(path)
    except UserError as error:
        # Only values that contradict each other, which `model_validate` alone does not see.
        with pytest.raises(UserError):
            load_config(
                None, [(f"{s}.{k}", plain(v)) for s, ks in valid.items() for k, v in ks.items()]
            )
        assert all("YAML" not in line for line in error.lines)
        return
    assert again == config
    assert dump_config(again) == dump_config(config)


def plain(value: object) -> str:
    return yaml.safe_dump(value, default_flow_style=True).strip().removesuffix("...").strip()


@pytest.mark.parametrize(
    "text", ["\u2028", "\x7f", "\x85", "🙂", "\ufeff", "\t", "\n", "\\", '"', "\x00", "#"]
)
def test_texts_that_yaml_would_bend_come_back(tmp_path, text):
    config = Config.model_validate({"eval": {"sample_prompt": f"a{text}b{text}"}})
    assert load(tmp_path, dump_config(config)) == config


def test_a_dump_spells_out_every_key_and_plain_yaml_reads_it():
    dumped = yaml.safe_load(dump_config(Config()))
    assert {f"{section}.{key}" for section, keys in dumped.items() for key in keys} == {
        name for name, *_ in knobs()
    }


# The page of knobs -------------------------------------------------------------------------------


def test_configs_do_not_change():
    config = Config()
    with pytest.raises(ValidationError):
        config.optimizer.lr = 1.0
    with pytest.raises(ValidationError):
        config.model = ModelConfig()


def test_every_knob_is_described():
    for name, kind, default, description in knobs():
        assert len(description) > 5, name
        assert kind and default
        assert f"--{name}\n" in knobs_help()


def test_the_schema_knows_every_key_and_refuses_others():
    schema = json_schema()
    for section, reference in schema["properties"].items():
        name = reference["$ref"].rpartition("/")[2]
        assert schema["$defs"][name]["additionalProperties"] is False
        for key, value in schema["$defs"][name]["properties"].items():
            assert value["description"], f"{section}.{key}"


@pytest.mark.parametrize(
    ("limits", "steps"),
    [
        ({}, 2000),
        ({"max_steps": 7}, 7),
        ({"max_tokens": 32 * 256 * 3 + 1}, 4),
        ({"max_epochs": 2}, math.ceil(2 * 100_000 / (32 * 256))),
        ({"max_steps": 5, "max_tokens": 10**9, "max_epochs": 50}, 5),
        ({"max_tokens": 1}, 1),
    ],
)
def test_total_steps_is_the_first_limit(limits, steps):
    assert Config.model_validate({"train": limits}).total_steps(100_000) == steps


def test_warmup_and_floor_derive_from_the_rest():
    assert Config().warmup_steps(1000) == 20
    assert Config.model_validate({"schedule": {"warmup_fraction": 0.5}}).warmup_steps(9) == 4
    assert Config.model_validate({"schedule": {"warmup_steps": 3}}).warmup_steps(10**6) == 3
    assert Config.model_validate({"optimizer": {"lr": 0.01}}).min_lr == pytest.approx(0.001)
    assert Config.model_validate({"schedule": {"min_lr": 0}}).min_lr == 0


def test_every_knob_is_read_somewhere():
    read = {
        node.attr
        for path in GPT.rglob("*.py")
        if path.name not in ("config.py", "configfile.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load)
    }
    # Read through a property of the config, under its name.
    through = {
        "n_kv_head": "kv_heads",
        "n_hidden": "hidden",
        "warmup_fraction": "warmup_steps",
        "decay_fraction": "decay_steps",
        "max_steps": "total_steps",
        "max_tokens": "total_steps",
        "max_epochs": "total_steps",
        "preset": "model",
    }
    keys = {name.partition(".")[2] for name, *_ in knobs()}
    unread = {key for key in keys if key not in read and through.get(key) not in read}
    assert not unread


# What the torture of configs found ---------------------------------------------------------------


def test_a_character_that_does_not_exist_is_told_with_its_line(tmp_path):
    (line,) = mistakes(tmp_path, 'run:\n  name: "\\UFFFFFFFF"\n')
    assert line.startswith("run.yaml:2: not valid YAML")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("optimizer.lr", "5e-324"),
        ("schedule.start_factor", "1e-300"),
        ("optimizer.eps", "1e-60"),
        ("train.max_tokens", "1" + "0" * 400),
        ("schedule.cosine_steps", "1" + "0" * 30),
        ("run.name", "é" * 150),
        ("run.dir", "a\0b"),
        ("data.source", "x" * 5000),
        ("tokenizer.kind", "a\0b"),
        ("eval.sample_prompt", "x" * 20_000),
        ("train.device", "cuda:٣"),
        ("train.device", "cuda:01"),
        ("train.device", "cuda:256"),
        ("data.\ud800", "1"),
        ("\ud800.x", "1"),
    ],
)
def test_what_would_fail_later_is_refused_at_once(key, value):
    with pytest.raises(UserError) as caught:
        load_config(None, [(key, value)])
    (line,) = caught.value.lines
    assert line.startswith("command line: --")


@pytest.mark.parametrize("line", ["x: 1\n", "model: {x: 1}\n", "- 1\n", "[1, 2, 3],\n"])
def test_a_flood_of_keys_is_refused_soon(tmp_path, line):
    start = time.process_time()
    mistakes(tmp_path, ("[" if line[0] == "[" else "") + line * (900_000 // len(line)))
    assert time.process_time() - start < 3


def test_many_sources_still_fit_into_the_runs_own_config():
    with pytest.raises(UserError, match="name a folder"):
        load_config(None, [("data.source", f"[{', '.join(['a' * 190] * 900)}]")])


def test_the_schema_has_the_limits_in_its_own_words():
    found = json_schema()["$defs"]["ScheduleConfig"]["properties"]["decay_fraction"]
    assert found["anyOf"][0] == {"exclusiveMinimum": 0, "maximum": 1, "type": "number"}
    assert '"le"' not in json.dumps(json_schema())


def test_a_later_mistake_names_where_its_key_was_written(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("data:\n  source: gone.txt\n", encoding="utf-8")

    def told(*lines: str, overrides: tuple[tuple[str, str], ...] = ()) -> tuple[str, ...]:
        with pytest.raises(UserError) as caught, located(path, overrides):
            raise UserError(*lines)
        return caught.value.lines

    assert told("data.source: it is gone", "run.name: is a file", "other") == (
        f"{path}:2: data.source: it is gone",
        "run.name: is a file",
        "other",
    )
    assert told("run.name 3: x", overrides=(("run.name", "3"),)) == (
        "command line: --run.name 3: x",
    )
    with pytest.raises(UserError, match=r"^data\.source: words.txt: bad$"), named("data.source"):
        raise UserError("words.txt: bad")
    with pytest.raises(UserError, match=r"^data\.encoding: bad$"), named("data.source"):
        raise UserError("data.encoding: bad")
