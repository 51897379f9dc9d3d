"""Test 12: any prompt, any options, to gpt-infer: in its own process, over real byte streams."""

import io
import json
import math
import random
import re
import sys
from collections.abc import Iterable
from pathlib import Path

import torch

from gpt.checkpoint import Training, save_checkpoint
from gpt.cli.infer import main
from gpt.config import Config
from gpt.model import GPT
from gpt.tokenizer import build_tokenizer, clean_text
from tests.torture import Torture

BASE = {"n_layer": 2, "n_head": 2, "n_embd": 16, "context_len": 16, "init": "gpt2"}
MODELS = {
    "bytes": ("bytes", {}),
    "bytes-learned": ("bytes", {"position": "learned", "norm": "layernorm", "bias": True}),
    "bytes-wide": ("bytes", {"context_len": 64, "n_head": 4, "n_kv_head": 1, "n_layer": 1}),
    "bytes-one": ("bytes", {"context_len": 1, "position": "learned", "n_layer": 1}),
    "chars": ("chars", {"activation": "gelu", "tie_embeddings": False}),
    "chars-swiglu": ("chars", {"activation": "swiglu", "qk_norm": False, "context_len": 5}),
    "bpe": ("bpe", {"activation": "relu2", "context_len": 24}),
    "bpe-mup": ("bpe", {"mup_base_width": 8, "mup_base_depth": 1, "mup_base_head_dim": 4}),
}
SEEN = "".join(map(chr, range(32, 127))) + "\n\t学习率🙂é"
LONGEST_S = 20
MARK = re.compile(r"--- .* ---")


def prepare(shared: Path) -> None:
    """Small models with random weights, one for each kind of tokenizer and of model."""
    for number, (name, (kind, shape)) in enumerate(MODELS.items()):
        config = Config.model_validate(
            {"tokenizer": {"kind": kind, "vocab_size": 300}, "model": {**BASE, **shape}}
        )
        tokenizer = build_tokenizer(config.tokenizer, lambda: iter([SEEN + "the cat sat " * 50]))
        torch.manual_seed(number)
        model = GPT(config.model, tokenizer.vocab_size)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(3)  # far from uniform, so that the options matter
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for group in optimizer.param_groups:
            group["initial_lr"] = 0.1
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: 1.0)
        scaler = torch.amp.GradScaler("cpu", enabled=False)
        training = Training(
            config, tokenizer, model, optimizer, scheduler, scaler, torch.float32, ""
        )
        training.progress.step = 1
        save_checkpoint(shared / "runs" / name / "checkpoints" / "step-00000001", training)
        sound = ["--run", str(shared / "runs" / name), "--prompt", "a", "--max-tokens", "3"]
        code, _, err = call(sound, b"", random.Random(number))
        assert code == 0, f"{name}: {err}"


LETTERS = {
    "words": list("the cat sat on a mat. "),
    "seen": list(SEEN),
    "ascii": [chr(code) for code in range(1, 128)],
    "nul": ["\0", "a", "\x1b[31m", "\x9b", "\x7f", "\x85"],
    "lines": ["\n", "\r", "\r\n", "\u2028", "\u2029", "\x0b", "\x0c", "x"],
    "specials": [
        "<|endoftext|>",
        "<|im_start|>",
        "<s>",
        "</s>",
        "[INST]",
        "<pad>",
        "\ufeff",
        "\uffff",
    ],
    "rtl": [*"שלום عليكم", "\u202e", "\u2066", "\u200f", "\u061c"],
    "marks": ["e", "\u0301", "\u0489", "\u20dd", "Z̸̡̢̧̛̛̲̲̹", "각", "क्षि", "\u200b", "\u00ad"],
    "emoji": ["👩‍👩‍👧‍👦", "🏳️‍🌈", "🇩🇪", "👍🏽", "1️⃣", "🫠", "\U000e0041", "\u200d"],
    "planes": ["\U00010000", "\U0010ffff", "\ufdd0", "𝕏", "学", "ﷺ", "ß", "İ"],
    "surrogates": ["\ud800", "\udc80", "\udcff", "\ud83d", "\ude42", "a"],
    "digits": list("0123456789٣Ⅷ²½"),
    "space": [" ", "\t", "\u00a0", "\u3000", "\u2003", "\u180e"],
}
KINDS = [*LETTERS, "empty", "mixed", "big letter", "big space", "big mixed", "invalid"]


def make_text(kind: str, rng: random.Random) -> str:
    """A text of this kind; bytes that are no UTF-8 are lone surrogates, as in argv."""
    if kind == "empty":
        return rng.choice(["", " ", "\n", "\0", "\u200b"])
    if kind == "big letter":
        return rng.choice("aZ0 .学🙂\n\0'") * rng.choice([20_000, 300_000, 1_000_000])
    if kind == "big space":
        unit = rng.choice([" ", "\n", "\t ", " \n", "\r", "\u3000", " a"])
        return unit * rng.choice([100_001, 250_000]) + rng.choice(["", "a", "\n"])
    if kind == "big mixed":
        part = "".join(make_text(rng.choice(list(LETTERS)), rng) for _ in range(5))
        return part * (200_000 // max(1, len(part)))
    if kind == "invalid":
        noise = rng.randbytes(rng.randint(1, 200))
        return noise.decode("utf-8", "surrogateescape")
    letters = LETTERS.get(kind) or [
        rng.choice(LETTERS[rng.choice(list(LETTERS))]) for _ in range(9)
    ]
    return "".join(rng.choice(letters) for _ in range(rng.choice([1, 2, 3, 9, 17, 40, 200])))


STOPS = [*["words", "specials", "emoji"] * 20, "empty"]
ODD_NUMBERS = ["0", "-1", "nan", "inf", "-inf", "1e-300", "1e300", "-0.0", "5e-324", "1", "x", ""]
ODD_NUMBERS += ["1_0", " 1", "٣", "0x10", "9" * 400, "1e-8", "1.5", "0.0001", "9" * 5000]


def make_options(rng: random.Random) -> list[str]:
    """Options of which most are good and any may be odd."""
    options = []

    def add(name: str, good: Iterable[object], share: float, odd: float = 0.06) -> None:
        if rng.random() < share:
            value = rng.choice(ODD_NUMBERS) if rng.random() < odd else str(rng.choice(list(good)))
            options.extend([f"--{name}={value}"] if rng.random() < 0.5 else [f"--{name}", value])

    add("temperature", [0, 0.1, 0.8, 1, 3, 1e-300, 1e308, 5e-324], 0.6)
    add("top-k", [1, 2, 5, 300, 10**6, 10**30], 0.3)
    add("top-p", [0.1, 0.5, 0.999, 1, 1e-300], 0.3)
    add("min-p", [0, 0.05, 0.5, 1, 1e-320], 0.3)
    add("repetition-penalty", [1, 1.2, 0.5, 100, 1e30, 1e300, 1e-300, 1e-30], 0.3)
    add("seed", [0, 1, 2**64, 10**100], 0.5, 0.1)
    add("samples", [1, 2, 3, 17], 0.3, 0.1)
    for _ in range(rng.choice([0, 0, 0, 1, 2, 40])):
        options += [f"--stop={make_text(rng.choice(STOPS), rng)}"]
    add("dtype", ["auto", "fp32", "bf16", "fp16"], 0.2, 0.05)
    add("device", ["auto", "cpu", "cuda:99", "tpu", "cpu:7", ""], 0.1)
    return options


class Endless(io.RawIOBase):
    """An output whose reader says Ctrl-C after some bytes."""

    def __init__(self, most: int) -> None:
        super().__init__()
        self.kept, self.most = bytearray(), most
        self.patience: float = most

    def writable(self) -> bool:
        return True

    def write(self, data) -> int:
        self.kept += bytes(data)
        if len(self.kept) > self.patience:
            self.patience = len(self.kept) + len(data) + self.most  # this comes once more
            raise KeyboardInterrupt
        return len(data)


def call(
    argv: list[str], stdin: bytes, rng: random.Random, most: int = 10**9
) -> tuple[int, str, str]:
    """Exit code, stdout, which must be UTF-8, and stderr of a call."""
    raw, err = Endless(most), io.BytesIO()
    before = sys.stdin, sys.stdout, sys.stderr
    coding = rng.choice(["utf-8", "utf-8", "ascii", "latin-1"])
    strict = rng.choice(["strict", "surrogateescape"])
    sys.stdin = io.TextIOWrapper(io.BytesIO(stdin), encoding="utf-8", errors=strict)
    sys.stdout = io.TextIOWrapper(io.BufferedWriter(raw), encoding=coding)
    sys.stderr = io.TextIOWrapper(err, encoding=coding, errors="backslashreplace")
    streams = sys.stdin, sys.stdout, sys.stderr  # whose end would close what they write into
    try:
        code = main(argv)
        raw.patience = math.inf
        for stream in streams[1:]:
            stream.flush()
    finally:
        sys.stdin, sys.stdout, sys.stderr = before
    return code, bytes(raw.kept).decode("utf-8"), err.getvalue().decode(coding)


def make_lengths(options: list[str], rng: random.Random) -> tuple[list[str], bool]:
    """How much is asked for, most often little; whether only Ctrl-C will end it."""
    if _value(options, "samples", "1") == "9" * 400:
        return ["--max-tokens", "3"], True
    if rng.random() < 0.06 and not any("samples" in option for option in options):
        many = ["--samples", str(10**12), "--max-tokens", "4"]
        return rng.choice([["--max-tokens", str(10**18)], many]), True
    if rng.random() < 0.9:
        return ["--max-tokens", rng.choice(["1", "2", "5", "9", "40"])], False
    return ["--max-tokens", rng.choice(["-5", "0", "many", "9" * 5000, "1e3"])], False


def deliver(
    way: str, kind: str, rng: random.Random, folder: Path
) -> tuple[list[str], bytes, list[str]]:
    """Arguments, stdin, and the prompts that should arrive; of the interactive way none is told."""
    text = make_text(kind, rng)
    if way == "argument":
        text = text.replace("\0", "") or "a"  # no shell can pass on a NUL
        return [f"--prompt={text}"], b"", ["" if text == "-" else clean_text(text)]
    if way == "stdin":
        data = _as_bytes(text)
        return ["--prompt", "-"], data, [data.decode("utf-8", "replace").removesuffix("\n")]
    if way == "interactive":
        # A newline would make many prompts of a long text.
        lines = [re.sub(r"[\r\n]", " ", text)]
        lines += [make_text(rng.choice(KINDS[:14]), rng) for _ in range(2)]
        return ["--interactive"], b"\n".join(map(_as_bytes, lines)), []
    count = 1 if kind.startswith("big") else rng.choice([1, 2, 5, 20])
    texts = [text, *(make_text(rng.choice(KINDS[:14]), rng) for _ in range(count - 1))]
    lines = [re.sub(r"[\r\n]", " ", each) for each in texts]
    lines[-1] = lines[-1] or "a"  # an empty line at the end is none
    rows = list(map(_as_bytes, lines))
    (folder / "prompts").write_bytes(b"\n".join(rows))
    prompts = [row.decode("utf-8", "replace") for row in rows]
    return ["--prompts", str(folder / "prompts")], b"", prompts


def case(index: int, rng: random.Random, folder: Path) -> str:
    """One call; with a seed now and then a second one that must say the same."""
    name = list(MODELS)[index % len(MODELS)]
    kind = KINDS[index // len(MODELS) % len(KINDS)]
    way = rng.choice(["argument", "argument", "stdin", "file", "interactive"])
    options = make_options(rng)
    lengths, endless = make_lengths(options, rng)
    # JSON says nothing before a text is whole.
    as_json, stats = rng.random() < 0.4 and not endless, rng.random() < 0.3
    prompt, stdin, prompts = deliver(way, kind, rng, folder)
    argv = ["--run", str(folder.parent / "runs" / name), *options, *lengths, *prompt]
    argv += [*(["--json"] if as_json else []), *(["--stats"] if stats else [])]
    code, out, err = call(argv, stdin, rng, 300 if endless else 10**9)
    shown = f"{[word[:80] for word in argv[2:]]} of {name}, {kind}, {way}"
    told = f"{shown}: {code}\n{out[-300:]!r}\n{err[-800:]}"
    _check_said(code, err, told, interactive=way == "interactive", endless=endless)
    if code == 0 and prompts:
        _check_given(argv, prompts, out, err, told, as_json=as_json, stats=stats)
    certain = any(word.startswith("--seed") for word in options) or "--temperature=0" in options
    if code == 0 and certain and not endless and len(out) < 10_000 and rng.random() < 0.3:
        assert call(argv, stdin, rng)[:2] == (0, out), f"another text the second time: {told}"
    return _category(code, way, kind, endless=endless)


def _category(code: int, way: str, kind: str, *, endless: bool) -> str:
    ends = {0: "generated", 2: "refused", 130: "stopped by Ctrl-C"}
    if code == 0 and kind.startswith("big"):
        return f"generated from a long {way}"
    return ends[code] + (f" from {way}" if code == 0 and not endless else "")


def _as_bytes(text: str) -> bytes:
    try:
        return text.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError:
        return text.encode("utf-8", "surrogatepass")


def _check_said(code: int, err: str, told: str, *, interactive: bool, endless: bool) -> None:
    assert code in (0, 2) or (endless and code == 130), told
    assert "Traceback" not in err, told
    lines = err.splitlines()
    errors = [line for line in lines if line.startswith("error: ")]
    assert interactive or bool(errors) == (code == 2), told
    assert code != 2 or 1 <= len(errors) <= 9, told
    known = ("error: ", "note: ", "warning: ", "interrupted")
    for line in lines:
        assert line.startswith(known) or "tokens/s" in line or not line, told
        assert len(line) < 1500, f"{len(line)} characters: {told}"
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]", err), told


def _check_given(
    argv: list[str],
    prompts: list[str],
    out: str,
    err: str,
    told: str,
    *,
    as_json: bool,
    stats: bool,
) -> None:
    samples, most = int(_value(argv, "samples", "1")), int(_value(argv, "max-tokens", "200"))
    stops = [clean_text(a.removeprefix("--stop=")) for a in argv if a.startswith("--stop=")]
    if as_json:
        assert out.endswith("\n"), told
        rows = [json.loads(line) for line in out[:-1].split("\n")]
        assert len(rows) == len(prompts) * samples, told
        for row in rows:
            assert set(row) == {"prompt", "text", "tokens", "finish_reason"}, told
            assert row["finish_reason"] in ("length", "stop", "end"), told
            assert len(row["tokens"]) <= most, told
            assert row["finish_reason"] != "length" or len(row["tokens"]) == most, told
            assert not any(stop in row["text"] for stop in stops), told
        told_prompts = [row["prompt"] for row in rows]
        assert told_prompts == [each for each in prompts for _ in range(samples)], told
        count = sum(len(row["tokens"]) for row in rows)
    else:
        assert len(prompts) * samples == 1 or len(MARK.findall(out)) >= len(prompts) * samples, told
        count = None
    if stats:
        shown = re.search(r"(\d+) tokens in ([\d.]+) s: ([\d.]+) tokens/s", err)
        assert shown is not None, told
        assert math.isfinite(float(shown[3])), told
        assert count is None or int(shown[1]) in (count, count + len(prompts) * samples), told
        assert int(shown[1]) <= most * len(prompts) * samples, told


def _value(argv: list[str], name: str, default: str) -> str:
    """The last value of an option on a command line."""
    found = default
    for place, word in enumerate(argv):
        if word == f"--{name}":
            found = argv[place + 1]
        elif word.startswith(f"--{name}="):
            found = word.partition("=")[2]
    return found


TORTURE = Torture(
    title="prompts and sampling options at random, over every kind of tokenizer and model",
    promise="exit 0 or 2, or 130 after Ctrl-C; never a traceback; valid UTF-8 and JSON; the same "
    "seed gives the same text",
    full=5000,
    short=150,
    case=case,
    prepare=prepare,
    chunk=25,
    timeout_s=LONGEST_S,
)
