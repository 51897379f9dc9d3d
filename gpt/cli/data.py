"""The command `gpt-data`: builds shards, describes them, makes a tokenizer."""

import argparse
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gpt.cli.arguments import Parser, knobs_page, split_overrides
from gpt.errors import UserError, json_line, run_command, say, shown

if TYPE_CHECKING:
    from gpt.config import Config
    from gpt.data import TokenData
    from gpt.tokenizer import Tokenizer

PEEK_TOKENS = 64


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit code."""
    return run_command(_data, argv)


def _data(argv: Sequence[str]) -> None:
    rest, overrides = split_overrides(argv)
    arguments = _parser().parse_args(rest)
    if arguments.command == "info":
        if overrides:
            raise UserError(
                f"gpt-data info: --{overrides[0][0]}: it reads no config; leave that out"
            )
        _info(arguments.folder, as_json=arguments.json)
        return
    from gpt.configfile import load_config, located  # here Ctrl-C ends in a line

    config = load_config(arguments.config, overrides)
    with located(arguments.config, overrides):
        if arguments.command == "build":
            from gpt.data import open_data

            print(open_data(config).folder)
        else:
            _tokenizer(config, arguments.out)


def _info(folder: Path, *, as_json: bool) -> None:
    """Describes a data folder after verifying all of it."""
    from gpt.data import open_folder

    try:
        is_data = (folder / "meta.json").is_file()
        inside = [] if is_data else sorted(str(meta.parent) for meta in folder.glob("*/meta.json"))
    except OSError as error:  # a name too long, or a folder closed
        raise UserError(f"{folder}: cannot be read: {error.strerror}; check the path") from None
    if not is_data:
        hint = f"did you mean {inside[0]}?" if inside else "make one with gpt-data build"
        raise UserError(f"{folder}: not a data folder (it holds no meta.json); {hint}")
    facts = describe(open_folder(folder))
    if as_json:
        print(json_line(facts))
        return
    tokenizer = facts["tokenizer"]
    print(f"source       {shown(facts['source'])}")
    print(f"split        {shown(facts['split'])}")
    print(f"tokenizer    {tokenizer['kind']}, {tokenizer['vocab_size']:,} ids")
    print(f"fingerprint  {facts['fingerprint']}\n")
    print(f"{'':12}{'documents':>12}{'tokens':>16}{'bytes':>16}{'bytes/token':>13}{'shards':>8}")
    for side in ("train", "val"):
        row = facts[side]
        print(
            f"{side:12}{row['documents']:>12,}{row['tokens']:>16,}{row['bytes']:>16,}"
            f"{row['bytes_per_token'] or 0:>13.3f}{row['shards']:>8}"
        )
    for side in ("train", "val"):
        print(f"\n{side} begins with {facts[side]['peek']!r}")


def describe(data: "TokenData") -> dict[str, Any]:
    """What `gpt-data info --json` prints."""
    facts: dict[str, Any] = {
        "folder": str(data.folder),
        "source": data.source,
        "fingerprint": data.fingerprint,
        "split": data.split,
        "tokenizer": {
            "kind": data.tokenizer.kind,
            "vocab_size": data.tokenizer.vocab_size,
            "eot_id": data.tokenizer.eot_id,
            "fingerprint": data.tokenizer.fingerprint,
        },
    }
    for name, side in (("train", data.train), ("val", data.val)):
        ids = side.read(0, min(PEEK_TOKENS, side.n_tokens)).tolist()
        facts[name] = {
            "documents": side.n_documents,
            "tokens": side.n_tokens,
            "bytes": side.n_bytes,
            "bytes_per_token": side.n_bytes / side.n_tokens if side.n_tokens else None,
            "shards": len(side.arrays),
            "peek": data.tokenizer.decode(ids),
        }
    return facts


def _tokenizer(config: "Config", out: Path | None) -> None:
    """Makes the config's tokenizer, saves it, and shows what it learned."""
    from gpt.data import make_tokenizer
    from gpt.files import check_writable

    folder = Path(config.data.dir) / "tokenizer" if out is None else out
    with _writing(folder):
        if folder.exists() and not folder.is_dir():
            raise UserError(f"--out: {folder} is a file; name a folder")
        check_writable("--out", folder)
    corpus, tokenizer = make_tokenizer(config)
    with _writing(folder):
        if (folder / "tokenizer.json").exists() and not _is_in(folder, tokenizer):
            raise UserError(
                f"--out: {folder} holds another tokenizer, which a run may need; name another "
                f"folder (--out {folder}-2), or remove that one"
            )
        tokenizer.save(folder)
    n_bytes, n_tokens = _compression(tokenizer, corpus.texts(train_only=False))
    text = f"{corpus.name}: {corpus.n_documents:,} documents, {corpus.n_bytes:,} bytes"
    ids = f"{tokenizer.kind}, {tokenizer.vocab_size:,} ids, end token {tokenizer.eot_id}"
    print(f"text             {shown(text)}\ntokenizer        {ids}")
    print(f"bytes per token  {n_bytes / n_tokens:.3f}")
    print(f"longest tokens   {'  '.join(map(repr, _longest(tokenizer)))}")
    print(f"saved in         {folder}")
    if config.tokenizer.kind == "bpe":
        ranks, split = folder / "tokenizer.tiktoken", config.tokenizer.split
        split = "gpt2" if split == "auto" else split
        say(f"to train with exactly these ids: tokenizer.kind: {ranks}, tokenizer.split: {split}")


@contextmanager
def _writing(folder: Path) -> Iterator[None]:
    """Turns what the disk refuses into a line."""
    try:
        yield
    except OSError as error:
        raise UserError(
            f"--out: {folder} cannot be written: {error.strerror}; name another folder"
        ) from None


def _is_in(folder: Path, tokenizer: "Tokenizer") -> bool:
    """Whether a folder holds just this tokenizer."""
    from gpt.tokenizer import load_tokenizer

    try:
        return load_tokenizer(folder).fingerprint == tokenizer.fingerprint
    except UserError:  # damaged, or of another program
        return False


def _compression(tokenizer: "Tokenizer", texts: Any, limit: int = 10_000_000) -> tuple[int, int]:  # noqa: ANN401
    """Bytes and tokens of the first texts, about `limit` bytes of them."""
    n_bytes = n_tokens = 0
    for text in texts:
        n_bytes, n_tokens = n_bytes + len(text.encode()), n_tokens + len(tokenizer.encode(text))
        if n_bytes >= limit:
            break
    return n_bytes, n_tokens


def _longest(tokenizer: "Tokenizer", count: int = 5) -> list[str]:
    """The longest tokens that are more than one repeated character."""
    tokens = sorted(map(tokenizer.token_bytes, range(tokenizer.vocab_size)), key=len, reverse=True)
    words = (token.decode("utf-8", "replace") for token in tokens if len(set(token.strip())) > 1)
    return [word for word, _ in zip(words, range(count), strict=False)]


def _parser() -> argparse.ArgumentParser:
    parser = Parser(prog="gpt-data", description="Text to tokens, and a look at them.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    build = commands.add_parser("build", help="tokenize the text of a config, or say it is done")
    info = commands.add_parser("info", help="verify and describe a folder that build made")
    tokenizer = commands.add_parser("tokenizer", help="make the tokenizer of a config, and save it")
    page = knobs_page()
    for command in (build, tokenizer):
        command.epilog = page
        command.add_argument(
            "--config", type=Path, required=True, metavar="FILE", help="YAML config"
        )
    tokenizer.add_argument(
        "--out", type=Path, metavar="DIR", help="where to save it (default: data.dir/tokenizer)"
    )
    info.add_argument("folder", type=Path, metavar="DIR", help="the folder that build printed")
    info.add_argument("--json", action="store_true", help="one JSON object instead of a table")
    return parser
