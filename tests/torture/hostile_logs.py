"""Attacks on what gpt-report reads: logs of any program, folders, names and texts that it shows."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.torture.hostile import (
    ESCAPES,
    Scene,
    attack,
    event,
    link,
    pipe,
    sparse,
    tensors,
    version_event,
    write,
)
from tests.torture.hostile_checkpoints import DEEP_JSON, DIGITS, ODD, WIDE_JSON

ANY = (0, 2, 3)
STARTED = {"kind": "event", "event": "run", "step": 0, "total_steps": 100, "vocab_size": 270}


def _report(scene: Scene, path: Path) -> list[list[str]]:
    """The report in its three forms."""
    page = str(scene.folder / "page.html")
    return [["gpt-report", str(path)], ["gpt-report", str(path), "--json", "--html", page]]


def _log(
    kind: str, name: str, content: Callable[[Scene], bytes | str], *codes: int, as_name: str = ""
) -> None:
    """A log of this content, in a file of this name."""

    def spoil(scene: Scene) -> Any:
        place = scene.folder / "log"
        place.mkdir()
        path = place / as_name
        write(path, content(scene))
        return _report(scene, path)

    spoil.__name__ = name.replace(" ", "_")
    attack(kind, *(codes or ANY))(spoil)


def _lines(*records: dict[str, Any]) -> str:
    return "".join(f"{json.dumps(record)}\n" for record in records)


def _train(count: int = 60, **more: Any) -> list[dict[str, Any]]:
    return [
        {"kind": "train", "step": n, "loss": 5 - n / 30, "lr": 1e-3, **more}
        for n in range(1, count + 1)
    ]


# --- pickles ---

for _name in ("metrics.jsonl", "trainer_state.json", "log.csv", "events.out.tfevents.1.x"):
    _log("pickle", f"pickle_as_{_name}", lambda scene: scene.any_payload(), 2, as_name=_name)
_log(
    "pickle",
    "weights_as_a_log",
    lambda scene: tensors({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}, b"loss"),
    2,
    as_name="log.txt",
)


# --- bombs ---

for _name in ("metrics.jsonl", "trainer_state.json", "log.json"):
    _log("bomb", f"deep_{_name}", lambda scene: DEEP_JSON, 2, as_name=_name)
    _log("bomb", f"digits_{_name}", lambda scene: DIGITS, 2, as_name=_name)
    _log("bomb", f"wide_{_name}", lambda scene: WIDE_JSON, 2, as_name=_name)
    _log("bomb", f"braces_{_name}", lambda scene: '{"a":' * 200_000, 2, as_name=_name)
_log(
    "bomb",
    "a_key_a_line",
    lambda scene: _lines(
        STARTED,
        *({"kind": "train", "step": n, "loss": 3.0, f"key{n}": n} for n in range(1, 30_001)),
    ),
    0,
    3,
    as_name="metrics.jsonl",
)
_log(
    "bomb",
    "many_short_lines",
    lambda scene: '{"kind":"train","step":1}\n' * 1_000_000,
    as_name="metrics.jsonl",
)
_log(
    "bomb",
    "many_events",
    lambda scene: '{"kind":"event","event":"x"}\n' * 400_000,
    as_name="metrics.jsonl",
)
_log(
    "bomb",
    "steps_far_apart",
    lambda scene: _lines(
        STARTED,
        *(
            {
                "kind": "train",
                "step": scene.rng.choice([1e15, 2**62, 1e300, 10**30]) * n,
                "loss": 3.0,
            }
            for n in range(1, 100)
        ),
        {"kind": "eval", "step": 1e18, "val_loss": 3.0},
    ),
    as_name="metrics.jsonl",
)
_log(
    "bomb",
    "steps_far_apart_elsewhere",
    lambda scene: (
        "step,loss,val_loss\n"
        + "".join(f"{10 ** (n % 300)},{5 / n},{3 + n}\n" for n in range(1, 2000))
    ),
    as_name="log.csv",
)
_log("bomb", "one_line", lambda scene: "step 1 loss 3.0 " * 4_000_000, as_name="out.log")
_log(
    "bomb", "wide_table", lambda scene: "step,loss," + "loss," * 10**6 + "\n1,2\n", as_name="l.csv"
)
_log(
    "bomb",
    "table_without_end",
    lambda scene: 'step,loss\n1,"' + "a\n" * 10**6,
    as_name="log.csv",
)
_log(
    "bomb",
    "records_that_claim_all",
    lambda scene: version_event() + event() + event(length=2**63) + event(),
    as_name="events.out.tfevents.1.x",
)
_log(
    "bomb",
    "one_giant_record",
    lambda scene: version_event() + event() + event(b"x" * 100) * 2 + _giant_record(),
    as_name="events.out.tfevents.1.x",
)


def _giant_record() -> bytes:
    size = 200 * 2**20
    return size.to_bytes(8, "little") + b"\0" * (size + 8)


HARD_LINES = [
    "loss" + "a " * 2000,
    "loss " + "a.b/" * 1000 + ": nan",
    "loss |" + "|" * 4000,
    "loss" + " [" * 2000 + "1",
    "loss " + "1,000" * 800,
    "val loss " + "(((" * 1300,
    "loss " + "INFO - " * 580,
    "loss: " * 680,
    "step 1/" * 580 + "loss",
    "\x1b[" + "0;" * 2000 + "loss",
    "\x1b]" * 2000 + "loss",
    "loss " + "1e" * 2000,
    "loss_" * 800 + "=",
    "loss " + "Ⅷ²³١" * 1000,
    "loss " + "٣.١ " * 1000,
]
for _number, _line in enumerate(HARD_LINES):
    _log(
        "bomb",
        f"hard_line_{_number}",
        lambda scene, line=_line: "iter 1: loss 3.0\n" + (line[:4096] + "\n") * 120,
        as_name="out.log",
    )


# --- numbers and types that no log of ours holds ---


def _odd(scene: Scene) -> str:
    records = [STARTED, *_train(40), {"kind": "eval", "step": 20, "val_loss": 3.0}, STARTED]
    records += [{"kind": "event", "event": name, "step": 5} for name in _EVENTS]
    spoiled = []
    for record in records:
        changed = dict(record)
        for key in record:
            if scene.rng.random() < 0.15:
                changed[key] = scene.rng.choice(ODD)
        for key in scene.rng.sample(_KEYS, 3):
            changed[key] = scene.rng.choice(ODD)
        spoiled.append(changed)
    return _lines(*spoiled)


_EVENTS = ("data_check", "end", "diverged", "resumed", "finding", "skip", "sample", "rate", "spike")
_EVENTS += ("save_failed", "warning", "lr_find")
_KEYS = [
    "total_steps",
    "vocab_size",
    "tokens",
    "epoch",
    "time_s",
    "tokens_per_s",
    "grad_norm",
    "lr",
]
_KEYS += [
    "update_ratio",
    "memory_bytes",
    "how",
    "text",
    "event",
    "kind",
    "unigram_entropy",
    "config",
]
_KEYS += [
    "train_loss",
    "val_bpb",
    "clipped_share",
    "steps",
    "count",
    "first_step",
    "evidence",
    "id",
]
_KEYS += ["warmup_end", "n_parameters", "device", "torch", "gpu", "seconds", "batch", "threads"]
for _number in range(12):
    _log("odd log", f"odd_values_{_number}", _odd, as_name="metrics.jsonl")
    _log(
        "odd log",
        f"odd_state_{_number}",
        lambda scene: json.dumps(
            {
                "max_steps": scene.rng.choice(ODD),
                "log_history": [
                    {
                        "step": n,
                        "loss": 3.0,
                        "epoch": 1,
                        scene.rng.choice(_KEYS): scene.rng.choice(ODD),
                    }
                    for n in range(40)
                ]
                + [scene.rng.choice(ODD)],
            }
        ),
        as_name="trainer_state.json",
    )


@attack("odd log", *ANY)
def odd_values_in_a_run(scene):
    lines = (scene.run / "metrics.jsonl").read_text().splitlines()
    spoiled = []
    for line in lines:
        record = json.loads(line)
        key = scene.rng.choice(list(record))
        if scene.rng.random() < 0.5:
            record[key] = scene.rng.choice(ODD)
        spoiled.append(json.dumps(record))
    write(scene.run / "metrics.jsonl", "\n".join(spoiled) + "\n")
    return [*_report(scene, scene.run), scene.train()]


# --- what is shown: names, texts, keys ---


@attack("injection", 0, 3)
def escapes_in_a_run(scene):
    odd = ESCAPES.replace("/", "\u2044")
    place = scene.folder / odd
    scene.run.rename(place)
    records = [json.loads(line) for line in (place / "metrics.jsonl").read_text().splitlines()]
    for record in records:
        record |= {ESCAPES: 1.0, "text": ESCAPES, "evidence": ESCAPES, "cause": ESCAPES}
    more = [
        {
            "kind": "event",
            "step": 3,
            "event": name,
            "text": ESCAPES,
            "reason": ESCAPES,
            "id": ESCAPES,
        }
        for name in (*_EVENTS, ESCAPES)
    ]
    write(place / "metrics.jsonl", _lines(*records, *more))
    again = scene.folder / f"{odd}2"
    again.mkdir()
    write(again / "metrics.jsonl", _lines(STARTED, *_train()))
    page = ["--html", str(scene.folder / "page.html")]
    two = [str(place), str(again)]
    watch = ["gpt-report", str(place), "--watch", "--every", "0.1"]
    return [*_report(scene, place), ["gpt-report", *two, *page], watch]


@attack("injection", *ANY)
def escapes_in_a_config(scene):
    path = scene.run / "config.yaml"
    text = path.read_text()
    odd = json.dumps(ESCAPES)
    another = scene.rng.choice(["source", "name", "dir", "kind", "sample_prompt"])
    lines = [
        f"  {key}: {odd}" if key in ("sample_prompt", "text_field", another) else line
        for line in text.splitlines()
        for key in [line.strip().partition(":")[0]]
    ]
    write(path, "\n".join(lines) + "\n")
    return _report(scene, scene.run)


@attack("injection", *ANY)
def escapes_in_a_table(scene):
    header = f"step,loss,{ESCAPES} - train/loss,{ESCAPES}\n"
    path = scene.folder / "evil.csv"
    write(path, header + "".join(f"{n},{5 / n},3,4\n" for n in range(1, 50)))
    return _report(scene, path)


@attack("injection", *ANY)
def escapes_in_a_console(scene):
    path = scene.folder / "evil.log"
    lines = [f"{ESCAPES} iter {n}: loss {5 / n:.3f}, {ESCAPES} lr: 1e-3" for n in range(1, 50)]
    write(path, "\n".join(lines))
    return _report(scene, path)


@attack("injection", *ANY)
def escapes_in_tags(scene):
    place = scene.folder / "board"
    tag = ESCAPES.encode("utf-8")[:90] + b"/train/loss"
    for run in ("a\x1b[31m", "b\x9b31m"):
        (place / run).mkdir(parents=True)
        records = [event(tag, 3.0, n) + event(b"loss", 3.0, n) for n in range(1, 40)]
        write(place / run / "events.out.tfevents.1.x", version_event() + b"".join(records))
    return [*_report(scene, place), *_report(scene, place / "a\x1b[31m")]


@attack("injection", 2)
def escapes_on_the_command_line(scene):
    odd = f"/no/{ESCAPES}"
    config = ["--config", str(scene.sound_config)]
    return [
        ["gpt-infer", "--run", odd, "--prompt", "a"],
        ["gpt-infer", "--checkpoint", odd, "--prompt", "a"],
        ["gpt-infer", "--prompts", odd],
        ["gpt-infer", "--prompt", "a", "--device", ESCAPES],
        ["gpt-infer", "--prompt", "a", f"--{ESCAPES}"],
        ["gpt-report", odd],
        ["gpt-data", "info", odd],
        ["gpt-train", "--config", odd],
        ["gpt-train", *config, "--tokenizer.kind", ESCAPES],
        ["gpt-train", *config, "--data.source", odd],
        ["gpt-lr", "plan", "--config", odd],
    ]


@attack("injection", 2)
def escapes_in_file_names(scene):
    config = scene.folder / f"evil{ESCAPES.replace('/', '|')}.yaml"
    write(config, f"model: {{{json.dumps(ESCAPES)}: 1, n_layer: {json.dumps(ESCAPES)}}}\n")
    place = scene.folder / "logs"
    place.mkdir()
    for name in ("a\x1b[31m\n.log", "b\x9b31m.log"):
        write(place / name, "loss 3\n")
    return [["gpt-train", "--config", str(config)], ["gpt-report", str(place)]]


@attack("injection", 0)
def escapes_in_a_text(scene):
    source = scene.folder / "evil.txt"
    text = ESCAPES.replace("\r", "") + " and some words "
    write(source, text * 200)
    build = ["gpt-data", "build", "--config", str(scene.sound_config), "--data.source", str(source)]
    shape = ["--data.dir", str(scene.folder / "built"), "--tokenizer.kind", "chars"]
    train = scene.train("--run.name", "new", "--eval.sample_prompt", ESCAPES[:5])
    train += ["--data.source", str(source), *shape]
    token = ["gpt-data", "tokenizer", *build[2:], *shape, "--tokenizer.kind", "bpe"]
    return [[*build, *shape], train, token]


# --- links, pipes, devices, folders ---


def _folder(name: str, make: Callable[[Scene, Path], None], *codes: int) -> None:
    def spoil(scene: Scene) -> Any:
        place = scene.folder / "log"
        place.mkdir()
        make(scene, place)
        return _report(scene, place)

    spoil.__name__ = name
    attack("link", *(codes or ANY))(spoil)


_folder("log_is_a_pipe", lambda scene, place: pipe(place / "out.log"), 2)
_folder("metrics_is_a_pipe", lambda scene, place: pipe(place / "metrics.jsonl"), 2)
_folder("metrics_is_zeros", lambda scene, place: link(place / "metrics.jsonl", "/dev/zero"), 2)
_folder("log_is_noise", lambda scene, place: link(place / "out.log", "/dev/urandom"), 2)
_folder("folder_in_itself", lambda scene, place: link(place / "again", place), 2)
_folder("log_links_to_itself", lambda scene, place: link(place / "out.log", "out.log"), 2)
_folder("terabyte_of_log", lambda scene, place: sparse(place / "out.log", head=b"loss 3\n"), 2)
_folder("terabyte_of_metrics", lambda scene, place: sparse(place / "metrics.jsonl"), 2)
_folder("half_a_gigabyte", lambda scene, place: sparse(place / "out.log", 2**29, b"loss 3\n"), 2)
_folder(
    "half_a_gigabyte_of_metrics",
    lambda scene, place: sparse(
        place / "metrics.jsonl", 2**29, (_lines(STARTED, *_train())).encode()
    ),
)
_folder("state_is_a_pipe", lambda scene, place: pipe(place / "trainer_state.json"), 2)


def _pipes_beside(scene: Scene, place: Path) -> None:
    write(place / "events.out.tfevents.1.x", version_event() + event())
    pipe(place / "events.out.tfevents.2.x")


_folder("a_pipe_beside_events", _pipes_beside)


def _many_checkpoints(scene: Scene, place: Path) -> None:
    for number in ("9" * 200, "1", "-1", "٣", "1e9", "0x10"):
        (place / f"checkpoint-{number}").mkdir()
        write(place / f"checkpoint-{number}" / "trainer_state.json", '{"log_history": []}')


_folder("odd_checkpoint_numbers", _many_checkpoints)


def _config_beside(content: Callable[[Path], object]) -> Callable[[Scene, Path], None]:
    def make(scene: Scene, place: Path) -> None:
        write(place / "metrics.jsonl", _lines(STARTED, *_train()))
        content(place / "config.yaml")

    return make


_folder("config_is_a_pipe", _config_beside(pipe))
_folder("config_is_zeros", _config_beside(lambda path: link(path, "/dev/zero")))
_folder("config_of_a_terabyte", _config_beside(sparse))
_folder(
    "lock_is_a_pipe",
    lambda scene, place: (_config_beside(lambda p: None)(scene, place), pipe(place / ".lock"))[0],
)
