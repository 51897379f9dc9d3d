"""Makes configs of every kind: right, borderline, wrong, torn, hostile; new keys come along."""

import json
import math
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gpt.configfile import json_schema

Schema = dict[str, Any]


def _knobs() -> dict[str, Schema]:
    """The JSON schema of each key; those of a union as its `anyOf`."""
    whole = json_schema()
    return {
        f"{section}.{key}": schema
        for section, outer in whole["properties"].items()
        for key, schema in whole["$defs"][outer["$ref"].rpartition("/")[2]]["properties"].items()
    }


KNOBS = _knobs()

# What decides the size of a run, and what lies outside of the config; the rest is drawn from its
# schema alone. `{shared}` and `{case}` are folders.
TINY: dict[str, Callable[[random.Random], Any]] = {
    "run.name": lambda rng: rng.choice(["run", "跑", "a b", "é" * 40, "x" * 200, "-n", "run.1"]),
    "run.dir": lambda rng: rng.choice(["{case}/runs", "{case}/ünï/深/runs", "{case}/" + "d" * 200]),
    "run.seed": lambda rng: rng.choice([0, 1, 1337, 2**63 - 1]),
    "data.source": lambda rng: rng.choice(
        ["{shared}/words.txt"] * 6 + ["{shared}/folder", "{shared}/rows.j*", "{shared}/rows.csv"]
    ),
    "data.val_fraction": lambda rng: rng.choice([0.1, 0.1, 0.5, 0.03]),
    "data.text_field": lambda rng: "text",
    "data.encoding": lambda rng: rng.choice(["utf-8", "UTF8", "utf-8-sig"]),
    "data.dir": lambda rng: "{shared}/.data",  # hidden: no glob of a case finds it
    "tokenizer.kind": lambda rng: rng.choice(
        ["bytes"] * 4 + ["chars", "bpe", "{shared}/r.tiktoken"]
    ),
    "tokenizer.vocab_size": lambda rng: rng.choice([257, 300, 300]),
    "model.preset": lambda rng: None,
    "model.n_layer": lambda rng: rng.randint(1, 3),
    "model.n_head": lambda rng: rng.choice([1, 2, 4]),
    "model.n_kv_head": lambda rng: rng.choice([None, None, 1, 2]),
    "model.n_embd": lambda rng: rng.choice([8, 16, 16, 24, 32]),
    "model.n_hidden": lambda rng: rng.choice([None, None, 1, 31, 64]),
    "model.context_len": lambda rng: rng.choice([1, 2, 16, 16, 33]),
    "model.dropout": lambda rng: rng.choice([0, 0.1, 0.5, 0.999]),
    "train.max_steps": lambda rng: rng.choice([None, 1, 2, 5, 9]),
    "train.max_tokens": lambda rng: rng.choice([None, None, 1, 300]),
    "train.max_epochs": lambda rng: rng.choice([None, None, 1e-3, 0.01]),
    "train.max_time_s": lambda rng: rng.choice([None, None, 1e-300, 0.03, 1e300]),
    "train.batch_size": lambda rng: rng.randint(1, 6),
    "train.micro_batch_size": lambda rng: rng.choice([None, None, 1, 2, 5]),
    "train.device": lambda rng: rng.choice(["auto", "cpu"]),
    "eval.max_tokens": lambda rng: rng.choice([None, 1, 50, 200, 2**63 - 1]),
    "eval.every_steps": lambda rng: rng.choice([1, 3, 5, 2**63 - 1]),
    "eval.sample_tokens": lambda rng: rng.choice([0, 1, 5]),
    "eval.sample_prompt": lambda rng: rng.choice(["\n", "", "the", "学习 cat 🙂", "cat " * 50]),
    "schedule.warmup_steps": lambda rng: rng.choice([None, 0, 1, 4]),
    "schedule.decay_steps": lambda rng: rng.choice([None, 1, 2]),
    "schedule.min_lr": lambda rng: rng.choice([None, 0, 1e-30]),
    "schedule.restart_step": lambda rng: None,
    "optimizer.lr": lambda rng: rng.choice([3e-4, 1e-3, 1e-2, 0.1]),
    "log.wandb": lambda rng: False,  # whether one is logged in is no part of a config
    "log.tensorboard": lambda rng: rng.random() < 0.05,
}
BASE = ["run.dir", "data.source", "data.dir", "tokenizer.kind", "tokenizer.vocab_size"]
BASE += [f"model.{key}" for key in ("n_layer", "n_head", "n_embd", "context_len")]
BASE += [f"train.{key}" for key in ("max_steps", "batch_size")]
BASE += ["eval.sample_tokens", "eval.max_tokens"]

# What no number is, and texts that have broken programs.
NOT_A_NUMBER = ["abc", "[1]", "[]", "{}", "{a: 1}", "true", "no", "0x10", "1:30", ".nan", ".inf"]
NOT_A_NUMBER += ["-.inf", "nan", "inf", "1e400", "'1 2'", "!!python/object:os.system x", "1,5", "½"]
NOT_A_NUMBER += ["!!binary aGk=", "2001-01-01", "!!set {a}", "--1", "1e", "'\\0'", "9" * 5000]
NASTY_TEXT = ["", " ", ".", "..", "../up", "/", "a/b", "a\0b", "a\nb", "\u202edir", "\ud800", "~"]
NASTY_TEXT += [
    "~nobody-here/x",
    "x" * 300,
    "é" * 200,
    "x" * 5000,
    "*",
    "[",
    "{case}",
    "null",
    "\x7f",
]
NASTY_TEXT += ["/proc/self/mem", "/dev/null", "/dev/zero", "{shared}/words.txt", "{shared}/pipe"]
NASTY_TEXT += [
    "{shared}/loop",
    "{shared}/gone",
    "{shared}/words.txt/in",
    "con",
    "-",
    "\t",
    "🙂" * 70,
]
NASTY_SOURCES = ["{shared}/empty.txt", "{shared}/blank.txt", "{shared}/one.txt", "{shared}/nul.txt"]
NASTY_SOURCES += ["{shared}/latin.txt", "{shared}/bad.jsonl", "{shared}/bad.csv", "{shared}/no.csv"]
NASTY_SOURCES += [
    "{shared}/utf16.txt",
    "{shared}/fake.parquet",
    "{shared}/none/*.txt",
    "{shared}/**",
]
NASTY_SOURCES += ["{shared}/letters.txt", "{shared}/words.*", "{shared}/bad.tiktoken"]
ENCODINGS = ["utf-16", "utf-7", "idna", "punycode", "undefined", "unicode_escape", "rot13", "hex"]
ENCODINGS += ["raw_unicode_escape", "latin-1", "ascii", "gb18030", "utf-32", "mbcs", "utf_8 ", "é"]
ENCODINGS += [
    "cp037",
    "shift_jis",
    "iso2022_jp",
    "hz",
    "uu",
    "big5",
    "base64",
    "utf-16-le",
    "quopri",
]
KINDS = [
    "gpt2",
    "cl100k_base",
    "o200k_base",
    "{shared}/bad.tiktoken",
    "{shared}/words.txt",
    "Bytes",
]
KINDS += ["{shared}/empty.txt", "chars", "bpe", "{shared}/r.tiktoken", "{shared}/huge.tiktoken"]
# As a source, these are folders of the machine, whose files are no part of a case.
ELSEWHERE = {"..", "/", "~"}
NASTY: dict[str, list[str]] = {
    "run.name": NASTY_TEXT,
    "run.dir": NASTY_TEXT,
    "data.dir": NASTY_TEXT,
    "data.source": [text for text in NASTY_TEXT if text not in ELSEWHERE] + NASTY_SOURCES * 3,
    "data.encoding": NASTY_TEXT[:20] + ENCODINGS * 2,
    "data.text_field": NASTY_TEXT,
    "tokenizer.kind": NASTY_TEXT + KINDS * 4,
    "eval.sample_prompt": [
        *NASTY_TEXT,
        "z" * 9_000,
        "\x01" * 9_000,
        "Ω",
        "<|endoftext|>",
        "\x85\u2028",
    ],
    "model.preset": ["cpu-1m", "gpt2-1.5b", "gpt4", "", "CPU-1M", "llama-1.1b"],
    "train.device": ["mps", "cuda", "cuda:0", "cuda:99999999999", "cuda:٣", "CPU", "cpu:0", "xpu"],
}
assert NASTY.keys() | TINY.keys() <= KNOBS.keys(), "a key of the tables is gone"


@dataclass
class Draft:
    """A config in the making: how each key is written, and what surely is wrong with it."""

    keys: dict[str, str] = field(default_factory=dict)
    values: dict[str, Any] = field(default_factory=dict)
    overrides: dict[str, str] = field(default_factory=dict)
    mistaken: set[str] = field(default_factory=set)
    lines: dict[str, int] = field(default_factory=dict)

    def put(self, key: str, value: Any, rng: random.Random) -> None:
        """A key with a value, in one of the value's spellings."""
        self.values[key] = value
        self.write(key, spelled(value, rng), rng)

    def write(self, key: str, text: str, rng: random.Random) -> None:
        """A key as it shall stand there; a tenth of them on the command line."""
        self.mistaken.discard(key)
        self.overrides.pop(key, None)
        if rng.random() < 0.1 and not {"string", None} & {s.get("type") for s in alternatives(key)}:
            self.overrides[key] = text
        else:
            self.keys[key] = text

    def drop(self, key: str) -> None:
        """Takes a key out again."""
        for each in (self.values, self.keys, self.overrides):
            each.pop(key, None)

    def text(self, rng: random.Random) -> str:
        """The file; notes the line of each key."""
        lines = rng.choice([[], ["# a config", ""], ["---"], ["%YAML 1.2", "---"]])[:]
        sections = list(dict.fromkeys(key.partition(".")[0] for key in self.keys))
        rng.shuffle(sections)
        for section in sections:
            inside = [key for key in self.keys if key.startswith(f"{section}.")]
            rng.shuffle(inside)
            if rng.random() < 0.2 and all(_fits_flow(self.keys[key]) for key in inside):
                self.lines |= dict.fromkeys(inside, len(lines) + 1)
                pairs = ", ".join(f"{key.partition('.')[2]}: {self.keys[key]}" for key in inside)
                lines.append(f"{section}: {{{pairs}}}")
                continue
            lines.append(rng.choice([f"{section}:", f"'{section}':", f"{section}:  # a section"]))
            indent = " " * rng.choice([1, 2, 2, 7])
            for key in inside:
                self.lines[key] = len(lines) + 1
                lines.append(f"{indent}{key.partition('.')[2]}: {self.keys[key]}")
        return rng.choice(["\n", "\n", "\r\n"]).join(lines) + "\n"


def _fits_flow(text: str) -> bool:
    return text != "" and not set(text) & set(",[]{}#:!*&") and len(text) < 200


def spelled(value: Any, rng: random.Random) -> str:
    """One of the ways to write a value in YAML."""
    if value is None:
        return rng.choice(["null", "~", "Null", ""])
    if isinstance(value, bool):
        return rng.choice([str(value), str(value).lower(), str(value).upper()])
    if isinstance(value, int):
        ways = [str(value), str(value), f"+{value}", f"0{value}", f"'{value}'", f"{value:_}"]
        return rng.choice([*ways, f"{value}.0", f"{value}e0"] if value < 2**53 else ways)
    if isinstance(value, float):
        return rng.choice([repr(value), f"+{value!r}", f"{value:.17e}", f"'{value!r}'"])
    if isinstance(value, list | tuple):
        return "[" + ", ".join(spelled(each, rng) for each in value) + "]"
    return quoted(value)


def quoted(text: str) -> str:
    """A text in double quotes, with YAML's escapes."""
    safe = json.dumps(text, ensure_ascii=False)
    return "".join(c if c.isprintable() else f"\\U{ord(c):08x}" for c in safe)


def alternatives(key: str) -> list[Schema]:
    """What a key may be: schemas of one type each."""
    return KNOBS[key].get("anyOf", [KNOBS[key]])


def valid(key: str, rng: random.Random) -> Any:
    """A value that the key takes, alone, and that keeps a run tiny."""
    return TINY[key](rng) if key in TINY else edge(key, rng)


def edge(key: str, rng: random.Random) -> Any:
    """A value at the limit of what the key takes, or anywhere inside."""
    return _inside(rng.choice(alternatives(key)), rng)


def _inside(schema: Schema, rng: random.Random) -> Any:
    low, high = schema.get("minimum", 0), schema.get("maximum", 2**63 - 1)
    match schema.get("type"):
        case _ if "enum" in schema:
            choices = schema["enum"]
        case "null":
            choices = [None]
        case "boolean":
            choices = [False, True]
        case "integer":
            choices = [low, low + 1, high, high - 1, int(_between(low, high, rng))]
        case "number":
            low = schema.get("minimum", math.nextafter(schema.get("exclusiveMinimum", 0.0), 1e9))
            high = schema.get("maximum", math.nextafter(schema.get("exclusiveMaximum", 1e308), 0))
            choices = [low, high, float(_between(low, high, rng))]
        case "array" if "prefixItems" in schema:
            choices = [[_inside(item, rng) for item in schema["prefixItems"]]]
        case "array":
            choices = [["{shared}/words.txt"], ["{shared}/words.txt"] * 2]
        case _:
            choices = ["text", "x" * schema.get("minLength", 1)]
    return rng.choice(choices)


def _between(low: float, high: float, rng: random.Random) -> float:
    return low + (high - low) * 10 ** rng.uniform(-18, 0)


def wrong(key: str, rng: random.Random) -> str:
    """A text that the key cannot take, whatever else is there."""
    kinds = {schema.get("type") for schema in alternatives(key)}
    if "array" in kinds or "boolean" in kinds:
        return rng.choice(["{a: 1}", "[[1]]", "17", "2.5"])
    if "string" in kinds or "enum" in KNOBS[key]:
        return rng.choice(["[1]", "{}", "{a: 1}", "2.5", "-17", ".nan", "[]"])
    return rng.choice([*NOT_A_NUMBER, *map(str, beyond(key) * 4)])


def beyond(key: str) -> list[float]:
    """Numbers just outside of the limits of a key."""
    found: list[float] = []
    for schema in alternatives(key):
        is_int = schema.get("type") == "integer"
        for limit, away in (("minimum", -1e308), ("maximum", 1e308)):
            if limit in schema:
                number = schema[limit]
                nearest = number + int(math.copysign(1, away)) if is_int else None
                found.append(math.nextafter(float(number), away) if nearest is None else nearest)
        found += [
            schema[limit] for limit in ("exclusiveMinimum", "exclusiveMaximum") if limit in schema
        ]
    return found


def base(rng: random.Random) -> Draft:
    """A tiny run."""
    draft = Draft()
    for key in BASE:
        draft.put(key, valid(key, rng), rng)
    if draft.values["train.max_steps"] is None:
        draft.put("train.max_steps", 3, rng)
    return draft


def reconcile(draft: Draft, rng: random.Random) -> None:
    """Takes back some of what contradicts, so that more runs start."""
    for one, other in (
        ("schedule.warmup_steps", "schedule.warmup_fraction"),
        ("schedule.decay_steps", "schedule.decay_fraction"),
        ("model.mup_base_depth", "model.mup_base_width"),
        ("model.mup_base_head_dim", "model.mup_base_width"),
        ("model.mup_base_width", "optimizer.weight_decay"),
    ):
        if one in draft.values and other in draft.values:
            draft.drop(rng.choice([one, other]))
    values = draft.values
    batch, micro = values["train.batch_size"], values.get("train.micro_batch_size")
    if micro is not None and micro > batch:
        draft.put("train.micro_batch_size", batch, rng)
    for key in (
        "schedule.warmup_steps",
        "schedule.cycles",
        "model.n_kv_head",
        "schedule.decay_steps",
    ):
        draft.drop(key)
    if values["model.n_embd"] % (2 * values["model.n_head"]):
        draft.put("model.n_head", 2, rng)
    for key in ("model.mup_base_depth", "model.mup_base_head_dim"):
        if key in values and rng.random() < 0.7:
            draft.drop(key)


def place(text: str, shared: Path, case: Path) -> str:
    """Puts the folders in."""
    return text.replace("{shared}", str(shared)).replace("{case}", str(case))
