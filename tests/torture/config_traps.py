"""What YAML, bytes and command lines have in store for a config."""

import random
from collections.abc import Callable

Trap = Callable[[str, random.Random], str | bytes]

BOMB = "a: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"{b}: &{b} [*{a},*{a},*{a},*{a},*{a},*{a},*{a},*{a},*{a}]\n"
    for a, b in zip("abcdefgh", "bcdefghi", strict=True)
)
# Pieces of YAML, put before or behind a right file, or in place of it.
PIECES = [
    "",
    "\n\n",
    "# nothing",
    "null",
    "~",
    "3",
    "text",
    "[]",
    "[1, 2]",
    "{}",
    "- model\n- train\n",
    "model: 3\n",
    "model: [1]\n",
    "model:\n",
    "model: null\n",
    "model: {n_layer: 1, n_layer: 1}\n",
    'model: {n_layer: 1, "n_layer": 1}\n',
    "model:\n\tn_layer: 1\n",
    "model:\n  n_layer: 1\n n_head: 1\n",
    "model: {n_layer: 1\n",
    'run: {name: "open\n',
    "train: &t {max_steps: 1}\neval: *t\n",
    "train: {<<: {max_steps: 1}}\n",
    "<<: {train: {max_steps: 1}}\n",
    "train: {max_steps: &a 1, batch_size: *a}\n",
    "train: {max_steps: &a 1}\n",
    "!!python/object/apply:os.system ['true']\n",
    "train: !!python/object:os.system {max_steps: 1}\n",
    "train: {max_steps: !!python/int 3}\n",
    "train: {max_steps: !!int '3'}\n",
    "train: {max_steps: !!str 3}\n",
    "train: {max_steps: !!float 3}\n",
    "train: {max_steps: !!binary MTI=}\n",
    "train: {max_steps: !!null 3}\n",
    "train: {max_steps: !!bool 3}\n",
    "train: {max_steps: !!int abc}\n",
    "train: {max_steps: !!int ''}\n",
    "train: {max_steps: !!timestamp abc}\n",
    "train: {max_steps: !!timestamp 2001-02-30}\n",
    "train: {max_steps: !!omap [1]}\n",
    "train: {max_steps: !!set {1, 2}}\n",
    "train: {max_steps: !own 3}\n",
    "train: {max_steps: !<tag:yaml.org,2002:int> 3}\n",
    "train: !!map {max_steps: 3}\n",
    "train: !!seq {max_steps: 3}\n",
    "train: !!str {max_steps: 3}\n",
    "!!map {train: {max_steps: 3}}\n",
    "%YAML 1.1\n---\ntrain: {max_steps: 017}\n",
    "%YAML 9.9\n---\ntrain: {max_steps: 3}\n",
    "%TAG ! tag:x,2000:\n---\ntrain: {max_steps: 3}\n",
    "--- {train: {max_steps: 3}}\n--- {train: {max_steps: 4}}\n",
    "---\n---\n",
    "...\n",
    "? train\n: {max_steps: 3}\n",
    "? [a, b]\n: 1\n",
    "? {a: b}\n: 1\n",
    "{[a, b]: 1}\n",
    "train: {[a]: 1, {b: 1}: 2}\n",
    "1: 2\n",
    "null: 1\n",
    "true: {max_steps: 3}\n",
    "'': 1\n",
    "train: {'': 1}\n",
    "train: {null: 1}\n",
    "train: {max_steps}\n",
    "train: {max_steps: |\n    3\n  }\n",
    "run:\n  name: >-\n    folded\n    name\n",
    "run:\n  name: |\n    block\n",
    'run: {name: "\\x00"}\n',
    'run: {name: "\\ud800"}\n',
    'run: {name: "\\UFFFFFFFF"}\n',
    'run: {name: "\\q"}\n',
    "run: {name: 'it''s'}\n",
    "run: {name: no}\n",
    "run: {name: 1:30}\n",
    "run: {name: 2001-01-01}\n",
    "run: {name: =}\n",
    "run: {name: 1e3}\n",
    "run: {name: @x}\n",
    "run: {name: `x`}\n",
    "run: {name: %x}\n",
    "run: {name: -}\n",
    "run: {name: a: b}\n",
    "run: {name: a #b}\n",
    "train.max_steps: 3\n",
    "train: {train.max_steps: 3}\n",
    "train: {max_steps: 3,}\n",
    "train: {max_steps: 3}}\n",
    "optimizer: {betas: [0.9, 0.95\n",
    "optimizer: {betas: [.9, !!float 0.95]}\n",
    "optimizer: {betas: {0: 0.9, 1: 0.95}}\n",
    "optimizer: {betas: [0.9, [0.95]]}\n",
    "data: {source: [a, b, [c]]}\n",
    "data: {source: {a: b}}\n",
    BOMB,
]


def _deep(opening: str, closing: str) -> Trap:
    def trap(text: str, rng: random.Random) -> str:
        depth = rng.choice([19, 21, 1000, 100_000])
        return f"{text}\nmodel: {opening * depth}1{closing * depth}\n"

    return trap


def _sized(line: str) -> Trap:
    """A file of about a megabyte, below or above the limit."""

    def trap(text: str, rng: random.Random) -> str:
        room = rng.choice([100_000, 999_000, 1_000_001]) - len(text.encode())
        filler = line.replace("@", "x" * room) if "@" in line else line * (room // len(line))
        return text + filler + "\n"

    return trap


TRAPS: list[Trap] = [
    *[lambda text, rng, piece=piece: piece for piece in PIECES],  # type: ignore[misc]
    *[lambda text, rng, piece=piece: text + piece for piece in PIECES],  # type: ignore[misc]
    *[lambda text, rng, piece=piece: piece + "\n" + text for piece in PIECES[12:]],  # type: ignore[misc]
    lambda text, rng: "\ufeff" + text,
    lambda text, rng: "\ufeff\ufeff" + text,
    lambda text, rng: text.replace("  ", "\t"),
    lambda text, rng: text.replace("\n", "\r"),
    lambda text, rng: text.replace("\n", "\u2028"),
    lambda text, rng: text.replace("\n", "\x85"),
    lambda text, rng: text.replace(" ", "\u00a0"),
    lambda text, rng: text.replace(":", "："),
    lambda text, rng: text + text,
    lambda text, rng: text.encode("utf-16"),
    lambda text, rng: text.encode("utf-8") + b"\xff\xfe",
    lambda text, rng: text.encode("utf-8") + b"\0",
    lambda text, rng: text.encode("utf-8") + b"# \x1b[31m \x07\n",
    lambda text, rng: b"\x80" + text.encode("utf-8"),
    lambda text, rng: "{" * rng.choice([30, 90_000]),
    lambda text, rng: "[" * rng.choice([30, 90_000]),
    lambda text, rng: "- " * rng.choice([30, 90_000]) + "1",
    lambda text, rng: "? " * rng.choice([30, 5_000]) + "1",
    lambda text, rng: "a: " * rng.choice([3, 50_000]) + "1",
    lambda text, rng: "\n".join(f"{' ' * i}a{i}:" for i in range(rng.choice([5, 300]))),
    lambda text, rng: "&a " * rng.choice([1, 50_000]) + "1",
    lambda text, rng: "!t " * rng.choice([1, 50_000]) + "1",
    _deep("[", "]"),
    _deep("{a: ", "}"),
    _deep('{"a": [', "]}"),
    _sized("# @"),
    _sized("run: {name: @}"),
    _sized('eval: {sample_prompt: "@"}'),
    _sized("@: 1"),
    _sized("model: {@: 1}"),
    _sized("x: 1\n"),
    _sized("model: {x: 1}\n"),
    _sized("%"),
    _sized("\n"),
    _sized(" "),
    _sized("'"),
    _sized('"\\'),
    _sized("a: |\n @"),
    _sized("train: {max_steps: 1@}"),
]
JUNK = list(b"\0\t\n\r \"#%&'*,-:?[]{}|>!@`~=<.0eE_\\\x80\xff\xc3\xe2")


def mutated(raw: bytes, rng: random.Random) -> bytes:
    """A file with some bytes or lines taken out, put in, doubled or moved."""
    content = bytearray(raw)
    for _ in range(rng.choice([1, 1, 2, 5, 30])):
        place = rng.randrange(len(content) + 1)
        match rng.randrange(7):
            case 0:
                del content[place : place + rng.choice([1, 1, 4, 40])]
            case 1:
                content[place:place] = bytes([rng.choice(JUNK)])
            case 2 if place < len(content):
                content[place] = rng.choice(JUNK)
            case 3 if place < len(content):
                content[place] ^= 1 << rng.randrange(8)
            case 4:
                lines = content.split(b"\n")
                first, second = (rng.randrange(len(lines)) for _ in range(2))
                lines[first], lines[second] = lines[second], lines[first]
                content = bytearray(b"\n".join(lines))
            case 5:
                lines = content.split(b"\n")
                line = rng.randrange(len(lines))
                lines.insert(line, lines[rng.randrange(len(lines))])
                content = bytearray(b"\n".join(lines))
            case _:
                content[place:place] = content[place : place + rng.randint(1, 30)]
    return bytes(content)


# Odd arguments behind a right command line.
ARGUMENTS = [
    ["--train.max_steps"],
    ["--train.max_steps="],
    ["--train.max_steps", ""],
    ["--train.max_steps", "--dry-run"],
    ["--train.max_steps", "-1"],
    ["--train.max_steps", "2", "--train.max_steps", "x"],
    ["--train.max_steps=2=3"],
    ["--train.max_steps", "*a"],
    ["--train.max_steps", "&a 2"],
    ["--train.max_steps", "2 # two"],
    ["--train.max_steps", "--- 2\n--- 3"],
    ["--train.max_steps", "!!python/object:os.system x"],
    ["--train.max_steps", "[" * 5000],
    ["--train.max_steps", "2\x00"],
    ["--train.max_steps", "\ud800"],
    ["--train.max_steps", "9" * 100_000],
    ["--train.", "2"],
    ["--.max_steps", "2"],
    ["--.", "2"],
    ["--..", "2"],
    ["--train.max.steps", "2"],
    ["--train..max_steps", "2"],
    ["--trian.max_steps", "2"],
    ["--train.max_step", "2"],
    ["--max_steps", "2"],
    ["--train", "2"],
    ["--TRAIN.MAX_STEPS", "2"],
    ["--\ud800.x", "2"],
    ["--a\nb.c", "2"],
    ["-train.max_steps", "2"],
    ["train.max_steps", "2"],
    ["train.max_steps=2"],
    ["extra"],
    [""],
    ["--"],
    ["--", "--train.max_steps", "2"],
    ["--unknown"],
    ["--resume"],
    ["--resume", "perhaps"],
    ["--resume", "must"],
    ["--resume", "never"],
    ["--rate", "rewarm"],
    ["--rate", "faster"],
    ["--config"],
    ["--config", ""],
    ["--config", "{case}"],
    ["--config", "{case}/missing.yaml"],
    ["--config", "{shared}/pipe"],
    ["--config", "{shared}/loop"],
    ["--config", "/dev/zero"],
    ["--config", "/proc/self/mem"],
    ["--config", "{shared}/utf16.txt"],
    ["--config", "x" * 300],
    ["--config", "a\0b"],
    ["--config", "\ud800.yaml"],
    ["--optimizer.betas", "[0.9,0.95]"],
    ["--optimizer.betas", "0.9,0.95"],
    ["--optimizer.betas", "0.9 0.95"],
    ["--optimizer.betas", "[0.9"],
    ["--optimizer.betas", "(0.9, 0.95)"],
    ["--run.name", "null"],
    ["--run.name", "~"],
    ["--run.name", "17"],
    ["--run.name", "true"],
    ["--run.name", "-x"],
    ["--run.name", "--x"],
    ["--run.name", '"quoted"'],
    ["--run.name", "a: b"],
    ["--run.name", "\x1b[31m"],
    ["--data.source", "[{shared}/words.txt, {shared}/rows.jsonl]"],
    ["--data.source", "[{shared}/words.txt"],
    ["--data.source", "{shared}/words.txt,{shared}/rows.jsonl"],
    ["--train.compile", "on"],
    ["--train.compile", "yes"],
    ["--train.compile", "true"],
    ["--log.wandb", "nope"],
    ["--model.preset", "null"],
    ["--model.preset", "gpt9"],
    ["--model", "{n_layer: 1}"],
    ["--model.", "{n_layer: 1}"],
]
