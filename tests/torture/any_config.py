"""Test 10: any config, right, borderline, wrong, torn or hostile, by file and command line."""

import base64
import io
import json
import math
import os
import random
import re
import signal
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, chdir, redirect_stderr, redirect_stdout
from pathlib import Path
from unittest.mock import patch

from gpt.cli.arguments import split_overrides
from gpt.config import Config
from gpt.configfile import dump_config, load_config
from gpt.errors import UserError
from gpt.metrics import read_metrics
from gpt.model import flops_per_token
from gpt.room import Room
from gpt.rundir import run_path
from tests.conftest import write_text
from tests.torture import Torture
from tests.torture.config_maker import (
    KNOBS,
    NASTY,
    Draft,
    alternatives,
    base,
    edge,
    place,
    quoted,
    reconcile,
    valid,
    wrong,
)
from tests.torture.config_traps import ARGUMENTS, TRAPS, mutated

LIMIT_S = 2.0  # of one core, until a config is accepted or refused
SPREAD = 250
MOST_STEPS = 6  # then a run is stopped as by SIGTERM
MOST_FLOPS, MOST_SAMPLED = 3e9, 300  # more than a case may take
FREE_BYTES = 4e9  # the machine that a case believes it has
KEY = re.compile(rf"\b({'|'.join(map(re.escape, KNOBS))})\b")


def prepare(shared: Path) -> None:
    """Texts, good and bad, and vocabularies."""
    words = write_text(shared).read_text(encoding="utf-8")
    (shared / "folder" / "deep").mkdir(parents=True)
    (shared / "folder" / "a.md").write_text(words[:5000], encoding="utf-8")
    (shared / "folder" / "deep" / "b.TXT").write_text("\ufeff" + words[5000:9000], encoding="utf-8")
    rows = [words[i : i + 300] for i in range(0, 9000, 300)]
    lines = "".join(json.dumps({"text": row, "n": 1}) + "\n" for row in rows)
    (shared / "rows.jsonl").write_text(lines, encoding="utf-8")
    (shared / "bad.jsonl").write_text(lines + '{"text": 3}\n', encoding="utf-8")
    (shared / "rows.csv").write_text("n,text\n" + "".join(f'1,"{row}"\n' for row in rows), "utf-8")
    (shared / "bad.csv").write_text('text\n"open\n', encoding="utf-8")
    (shared / "no.csv").write_text("a,b\n1,2\n", encoding="utf-8")
    for name, content in {
        "empty.txt": b"",
        "blank.txt": b" \n\t\n" * 99,
        "one.txt": b"a",
        "nul.txt": b"some text\0more" * 99,
        "latin.txt": "é grün".encode("latin-1") * 99,
        "utf16.txt": words.encode("utf-16"),
        "fake.parquet": b"PAR1" + b"\0" * 99,
        "letters.txt": b"a" * 20_000,
        "bad.tiktoken": b"not a line\n",
    }.items():
        (shared / name).write_bytes(content)
    tokens = [bytes([byte]) for byte in range(256)] + [b"th", b"the", b" the", b" cat"]
    ranks = [base64.b64encode(token) + b" %d\n" % rank for rank, token in enumerate(tokens)]
    (shared / "r.tiktoken").write_bytes(b"".join(ranks))
    (shared / "huge.tiktoken").write_bytes(b"".join(ranks) + b"YWFh 1999999\n")
    os.mkfifo(shared / "pipe")
    (shared / "loop").symlink_to("loop")
    (shared / "gone").symlink_to("nowhere")


def case(index: int, rng: random.Random, folder: Path) -> str:
    """One config, checked with --dry-run, trained with, and now and then planned."""
    turn = index + index // SPREAD  # so that evenly spread cases are of all kinds
    kind, make = list(MAKERS.items())[turn % len(MAKERS)]
    argv, draft = make(rng, folder)
    with ExitStack() as stack:
        (folder / "here").mkdir()
        stack.enter_context(chdir(folder / "here"))  # relative names are the case's own
        _confine(stack, pictures=turn // len(MAKERS) % 8 == 0)
        if turn // len(MAKERS) % 6 == 5:
            return f"{kind}: {_plan(argv, rng)}"
        told, dry, seconds = _call("train", ["--dry-run", *argv])
        assert seconds < LIMIT_S * _patience(), f"--dry-run took {seconds:.1f} s of the CPU"
        _check_told(told, dry, draft, argv)
        assert not list(folder.glob("**/.tmp*")), "left behind by --dry-run"
        config = _config_of(argv)
        if told == 0 and (config is None or _is_long(config)):
            return f"{kind}: accepted, more than a case can run"
        made, lines, seconds = _call("train", argv)
        if told == 2:
            assert made == 2, f"refused by --dry-run, and then ran: {dry}"
            assert seconds < LIMIT_S * _patience(), f"refusing took {seconds:.1f} s of the CPU"
            assert _plain(lines) == _plain(dry), (
                f"says something else than --dry-run:\n{lines}\n{dry}"
            )
            return f"{kind}: refused"
        assert config is not None
        return f"{kind}: {_check_run(config, made, lines)}"


def _patience() -> float:
    return float(os.environ.get("TORTURE_PATIENCE", "1"))


# What is made ------------------------------------------------------------------------------------

Made = tuple[list[str], Draft]


def _finish(
    draft: Draft, rng: random.Random, folder: Path, text: str | bytes | None = None
) -> Made:
    text = draft.text(rng) if text is None else text
    raw = text if isinstance(text, bytes) else text.encode("utf-8", "surrogatepass")
    raw = raw.replace(b"{shared}", str(folder.parent).encode()).replace(
        b"{case}", str(folder).encode()
    )
    path = folder / "config.yaml"
    path.write_bytes(raw)
    argv = ["--config", str(path)]
    for key, value in draft.overrides.items():
        value = place(value, folder.parent, folder)
        argv += [f"--{key}={value}"] if rng.random() < 0.5 else [f"--{key}", value]
    return argv, draft


def _right(rng: random.Random, folder: Path) -> Made:
    """Any number of keys, each with a value of its own range; together they may contradict."""
    draft = base(rng)
    for key in rng.sample(sorted(KNOBS), rng.choice([3, 10, len(KNOBS)])):
        draft.put(key, valid(key, rng), rng)
    return _finish(draft, rng, folder)


def _consistent(rng: random.Random, folder: Path) -> Made:
    """The same, with some of the contradictions taken out."""
    draft = base(rng)
    for key in rng.sample(sorted(KNOBS), rng.choice([3, 10, len(KNOBS)])):
        draft.put(key, valid(key, rng), rng)
    reconcile(draft, rng)
    return _finish(draft, rng, folder)


def _borderline(rng: random.Random, folder: Path) -> Made:
    """A few keys at their limits."""
    draft = base(rng)
    for key in rng.sample(sorted(KNOBS), rng.choice([1, 1, 2, 4])):
        kinds = {str(schema.get("type")) for schema in alternatives(key)}
        if "string" not in kinds and key != "log.wandb":
            draft.put(key, edge(key, rng), rng)
    return _finish(draft, rng, folder)


def _wrong(rng: random.Random, folder: Path) -> Made:
    """Some keys that cannot be right: each of them must be told."""
    draft = base(rng)
    for key in rng.sample(sorted(KNOBS), rng.choice([1, 1, 2, 5])):
        draft.write(key, wrong(key, rng), rng)
        draft.mistaken.add(key)
    return _finish(draft, rng, folder)


def _nasty(rng: random.Random, folder: Path) -> Made:
    """Texts that have broken programs, as names, places, encodings, prompts."""
    draft = base(rng)
    for key in rng.sample(sorted(NASTY), rng.choice([1, 1, 2])):
        text = rng.choice(NASTY[key])
        if key == "data.source" and rng.random() < 0.2:
            draft.keys[key] = f"[{quoted(text)}, {{shared}}/words.txt]"
            draft.overrides.pop(key, None)
        elif rng.random() < 0.2 and "\0" not in text:
            draft.keys.pop(key, None)
            draft.overrides[key] = text
        else:
            draft.keys[key] = quoted(text)
            draft.overrides.pop(key, None)
    return _finish(draft, rng, folder)


def _typos(rng: random.Random, folder: Path) -> Made:
    """Keys and sections that are none."""
    draft = base(rng)
    text = draft.text(rng)
    for _ in range(rng.choice([1, 2])):
        section, _, key = rng.choice(sorted(KNOBS)).partition(".")
        word = rng.choice(
            [key[:-1] + "x", key * 2, "", "ключ", "lr", "1", "{}", key.upper(), "a" * 999]
        )
        text += rng.choice(
            [f"{section}x: {{{key}: 1}}\n", f"{section}s:\n", f'"{word}\\t":\n', "? a\n"]
        )
        draft.overrides[
            rng.choice([f"{section}.{word}", f"{word}.{key}", f"a.b.{word}", f".{word}"])
        ] = "1"
    return _finish(draft, rng, folder, text)


def _trap(rng: random.Random, folder: Path) -> Made:
    """What YAML has in store."""
    draft = base(rng)
    text = draft.text(rng)
    draft.lines.clear()
    return _finish(draft, rng, folder, rng.choice(TRAPS)(text, rng))


def _torn(rng: random.Random, folder: Path) -> Made:
    """A right file with some of its bytes changed."""
    draft, _ = base(rng), None
    raw = mutated(draft.text(rng).encode(), rng)
    draft.lines.clear()
    return _finish(draft, rng, folder, raw)


def _command_line(rng: random.Random, folder: Path) -> Made:
    """Odd arguments."""
    argv, draft = _finish(base(rng), rng, folder)
    argv += rng.choice(ARGUMENTS)
    return [place(word, folder.parent, folder) for word in argv], draft


def _huge(rng: random.Random, folder: Path) -> Made:
    """Sizes that no machine has, or that this one lacks."""
    draft = base(rng)
    sizes = {
        "model.n_embd": [512, 4096, 65536],
        "model.n_layer": [50, 1000],
        "model.context_len": [1000, 20_000, 1_048_576],
        "model.n_hidden": [1_048_576],
        "tokenizer.vocab_size": [1_000_000],
        "train.batch_size": [1000, 10**5, 10**7],
        "train.micro_batch_size": [1, 1000, 10**7],
        "train.max_steps": [10**6, 10**9],
        "train.max_tokens": [10**18],
        "train.max_epochs": [1e9],
        "checkpoint.keep": [10_000],
        "eval.sample_tokens": [100_000],
        "schedule.warmup_steps": [10**6, 2**63 - 1],
        "schedule.cosine_steps": [2**63 - 1],
        "schedule.cycles": [1000],
        "model.preset": ["gpt2-1.5b", "llama-1.1b", "gpt3-1.3b"],
    }
    for key in rng.sample(sorted(sizes), rng.choice([1, 1, 2, 3])):
        draft.put(key, rng.choice(sizes[key]), rng)
        if key == "model.preset":
            for other in ("n_layer", "n_head", "n_embd", "context_len"):
                draft.keys.pop(f"model.{other}", None)
                draft.overrides.pop(f"model.{other}", None)
    return _finish(draft, rng, folder)


MAKERS: dict[str, Callable[[random.Random, Path], Made]] = {
    "right": _right,
    "at the limits": _borderline,
    "wrong": _wrong,
    "consistent": _consistent,
    "nasty text": _nasty,
    "typos": _typos,
    "YAML trap": _trap,
    "torn": _torn,
    "command line": _command_line,
    "huge": _huge,
}


# What is checked ---------------------------------------------------------------------------------


def _confine(stack: ExitStack, *, pictures: bool) -> None:
    """No network, a machine of a fixed size, no compiler; most runs without their pictures."""
    stack.enter_context(patch("gpt.ranks._reachable", lambda *_: False))
    stack.enter_context(patch.dict(os.environ, {"TIKTOKEN_CACHE_DIR": "/nowhere"}))
    stack.enter_context(patch("gpt.fits.room", lambda device: Room(FREE_BYTES)))
    stack.enter_context(patch("gpt.model.Block.compile", lambda *_, **__: None))
    if not pictures:
        stack.enter_context(patch("gpt.ending.plot_run", lambda *_: None))
        stack.enter_context(patch("gpt.ending.write_report", lambda *_: None))
    import gpt.train

    once, done = gpt.train.step_once, []

    def step_once(*arguments: object) -> None:
        done.append(1)
        if len(done) == MOST_STEPS:
            signal.raise_signal(signal.SIGTERM)
        once(*arguments)  # type: ignore[arg-type]

    stack.enter_context(patch("gpt.train.step_once", step_once))


def _call(command: str, argv: Sequence[str]) -> tuple[int, str, float]:
    """Exit code, stderr and CPU seconds of a command, run here."""
    main = __import__(f"gpt.cli.{command}", fromlist=["main"]).main
    said, printed = io.StringIO(), io.StringIO()
    start = time.process_time()
    with redirect_stderr(said), redirect_stdout(printed):
        try:
            code = main(list(argv))
        except SystemExit as ended:  # argparse's
            code = int(str(ended.code))
    if command == "lr" and code == 0 and "--json" in argv:
        json.loads(printed.getvalue())
    return code, said.getvalue(), time.process_time() - start


def _errors(said: str) -> list[str]:
    return [line for line in said.splitlines() if re.match(r"(gpt-\w+( \w+)?: )?error: ", line)]


def _check_told(code: int, said: str, draft: Draft, argv: list[str]) -> None:
    """A refusal names each key that is wrong, and where it stands."""
    assert code in (0, 2), f"exit {code}:\n{said}"
    assert "Traceback" not in said
    errors = _errors(said)
    assert bool(errors) == (code == 2), said
    assert len(set(errors)) == len(errors), said
    path = argv[argv.index("--config") + 1] if "--config" in argv else "no file"
    typed = {word.partition("=")[0][2:] for word in argv if word.startswith("--")}
    for line in errors:
        assert len(line) < 1400
        assert KEY.search(line) or any(word in line for word in argv) or "--" in line, line
        told = re.match(r"error: (?:.*?: )?", line)
        key = KEY.search(line)
        begins = key is not None and re.fullmatch(
            r"error: (\S+:\d+: |command line: --)?", line[: key.start()]
        )
        if begins and key is not None and told is not None:
            if key[1] in typed and "given twice" not in line:
                assert line.startswith(f"error: command line: --{key[1]}"), line
            elif key[1] in draft.lines:
                assert line.startswith(f"error: {path}:{draft.lines[key[1]]}: "), line
    for key in draft.mistaken:
        assert any(key in line for line in errors), f"{key} is not told:\n{said}"


def _plain(said: str) -> list[str]:
    return [re.sub(r"\d[\d,.]*", "#", line) for line in _errors(said)]


def _config_of(argv: list[str]) -> Config | None:
    """The config of a command line; None where it is not that simple."""
    try:
        rest, overrides = split_overrides(argv) if "--" not in argv else ([], [])
        return load_config(Path(rest[rest.index("--config") + 1]), overrides)
    except (UserError, ValueError, IndexError):
        return None


def _is_long(config: Config) -> bool:
    """Whether a run takes more than a case may; validation and the sample count too."""
    steps = config.train.max_steps or MOST_STEPS
    tokens = config.tokens_per_step * min(steps, MOST_STEPS) + 5_000
    flops = flops_per_token(config.model, min(config.tokenizer.vocab_size, 500)) * tokens
    sampled = config.eval.sample_tokens * config.model.n_layer
    return flops > MOST_FLOPS or sampled > MOST_SAMPLED or config.train.batch_size > 20_000


def _check_run(config: Config, code: int, said: str) -> str:
    """A run that was accepted: it ends well, or its numbers broke and it says so."""
    run = run_path(config)
    records = read_metrics(run) if (run / "metrics.jsonl").exists() else []
    assert "Traceback" not in said, said
    errors = _errors(said)
    if code == 2:
        assert all(re.search(r"not finite|is (nan|inf)", line) for line in errors), said
        assert any(record.get("event") == "diverged" for record in records), said
        return "diverged, explained"
    assert code in (0, 143), f"exit {code}:\n{said}"
    assert load_config(run / "config.yaml") == config
    assert (run / "config.yaml").read_text(encoding="utf-8") == dump_config(config)
    assert "warning: no sample" not in said, said
    explained = {record["step"] for record in records if record["kind"] == "event"}
    for record in records:
        losses = [record[name] for name in ("loss", "val_loss") if name in record]
        for loss in losses:
            fine = isinstance(loss, float | int) and math.isfinite(loss)
            assert fine or record["kind"] == "event" or explained, record
    return "ran" if code == 0 else "ran, stopped"


def _plan(argv: list[str], rng: random.Random) -> str:
    """gpt-lr plan of it."""
    form = rng.choice([["--json"], []])
    code, said, seconds = _call("lr", ["plan", *argv, *form])
    assert "Traceback" not in said
    assert code in (0, 2), f"exit {code}:\n{said}"
    assert bool(_errors(said)) == (code == 2), said
    assert seconds < 5 * LIMIT_S * _patience(), f"the plan took {seconds:.1f} s of the CPU"
    return "planned" if code == 0 else "no plan"


TORTURE = Torture(
    title="any config: each key in every spelling, at and beyond its limits, nonsense, YAML traps, "
    "torn files, odd arguments",
    promise="a run, or exit 2 with key and line, within 2 s; --dry-run says the same; never a "
    "traceback, never a late failure",
    full=10_000,
    short=40,
    case=case,
    prepare=prepare,
    chunk=10,
)
