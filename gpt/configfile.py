"""Reads a config from YAML and the command line: every mistake at once, with its file and line.

What the knobs are is `config`'s business.
"""

import difflib
import json
import re
import textwrap
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import UnionType
from typing import Any, Union, get_args, get_origin

import yaml
from pydantic import BaseModel, ValidationError

from gpt.config import MOST_NAME_BYTES, PRESETS, Config, contradictions
from gpt.errors import MOST_LINES, UserError, shown
from gpt.files import check_writable, read_plain

# What PyYAML raises for a value that its tag cannot be, as in `!!bool 3`.
_NOT_OF_ITS_TAG = (yaml.YAMLError, ValueError, AttributeError, LookupError, TypeError)
MAX_FILE_BYTES = 1_000_000
MAX_DEPTH = 20  # a config needs 3; PyYAML takes minutes for thousands
MAX_EVENTS = (
    20_000  # keys, values, brackets: a config has some hundred, PyYAML reads 50,000 a second
)
_NOT_PLAIN = re.compile(
    r"[^ -~\u00a0-\u2027\u202a-\ud7ff\ue000-\ufefe\uff00-\ufffd\U00010000-\U0010ffff]"
)
Override = tuple[str, str]
# A mistake often begins with the key that it is about.
_KEY = re.compile(
    "|".join(
        rf"{section}\.(?:{'|'.join(type(values).model_fields)})\b" for section, values in Config()
    )
)


@dataclass
class _Problem:
    """One mistake: where it stands, which keys it concerns, what to do."""

    where: str
    key: str
    message: str

    def __str__(self) -> str:
        named = not self.key or self.where.endswith(f"--{self.key}")
        return (
            f"{self.where}: {self.message}"
            if named
            else f"{self.where}: {self.key}: {self.message}"
        )


@dataclass
class _Source:
    """Raw values by section and key, and where each was written."""

    values: dict[str, Any] = field(default_factory=dict)
    where: dict[str, str] = field(default_factory=dict)
    problems: list[_Problem] = field(default_factory=list)


class _NoConfigError(Exception):
    """YAML, but not of the kind that a config is: the reason, and its line."""

    def __init__(self, event: yaml.Event, reason: str) -> None:
        super().__init__(reason)
        self.line = event.start_mark.line + 1 if event.start_mark else 1


class _Loader(yaml.SafeLoader):
    """YAML 1.2's scalars: `3e-4` is a number, `no` and `1:30` are text, 017 is seventeen.

    Aliases, and more or deeper than any config is, raise _NoConfigError.
    """

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self._count = self._depth = 0

    def get_event(self) -> yaml.Event:
        event: yaml.Event = super().get_event()  # type: ignore[no-untyped-call]
        self._count += 1
        self._depth += isinstance(event, yaml.CollectionStartEvent)
        self._depth -= isinstance(event, yaml.CollectionEndEvent)
        if isinstance(event, yaml.AliasEvent):
            raise _NoConfigError(event, "YAML aliases (*name) are not read; write it out")
        if self._count > MAX_EVENTS:
            raise _NoConfigError(event, f"over {MAX_EVENTS:,} keys and values; is it a config?")
        if self._depth > MAX_DEPTH:
            raise _NoConfigError(event, "nested too deeply; a config has sections and keys")
        return event


_Loader.yaml_implicit_resolvers = {}
for _tag, _pattern, _first in (
    ("null", r"^(?:~|null|Null|NULL|)$", ["~", "n", "N", ""]),
    ("bool", r"^(?:true|True|TRUE|false|False|FALSE)$", list("tTfF")),
    ("int", r"^[-+]?[0-9][0-9_]*$", list("-+0123456789")),
    (
        "float",
        r"^[-+]?(?:\.[0-9]+|[0-9][0-9_]*(?:\.[0-9_]*)?)(?:[eE][-+]?[0-9]+)?$"
        r"|^[-+]?\.(?:inf|Inf|INF)$|^\.(?:nan|NaN|NAN)$",
        list("-+.0123456789"),
    ),
):
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(_pattern), _first)


def _read_int(loader: yaml.SafeLoader, node: yaml.Node) -> int:
    assert isinstance(node, yaml.ScalarNode)
    return int(loader.construct_scalar(node).replace("_", ""))


_Loader.add_constructor("tag:yaml.org,2002:int", _read_int)


def load_config(
    path: Path | None, overrides: Sequence[Override] = (), *, for_lint: bool = False
) -> Config:
    """Reads a config file (or only the defaults), applies `section.key` overrides, checks it all.

    With `for_lint`, contradictions that the plan's lint has a finding for pass.

    Raises UserError with one line for each mistake in the file and on the command line.
    """
    source = _read_yaml(path) if path is not None else _Source()
    _apply_overrides(source, overrides)
    config, problems = _validate(source, for_lint=for_lint)
    problems = source.problems + problems
    if problems:
        raise UserError(*dict.fromkeys(str(problem) for problem in problems))
    assert config is not None
    return config


@contextmanager
def located(path: Path | None, overrides: Sequence[Override] = ()) -> Iterator[None]:
    """Puts before a mistake that shows only later where its key was written, if it was."""
    try:
        yield
    except UserError as error:
        source = _Source()
        with suppress(UserError):
            source = _read_yaml(path) if path is not None else source
        _apply_overrides(source, overrides)
        raise UserError(*(_at_its_place(line, source.where) for line in error.lines)) from None


def _at_its_place(line: str, where: dict[str, str]) -> str:
    key = _KEY.match(line)
    place = where.get(key[0]) if key else None
    if key is None or place is None:
        return line
    return place + line[key.end() :] if place.endswith(key[0]) else f"{place}: {line}"


@contextmanager
def named(key: str) -> Iterator[None]:
    """Puts a key before the mistakes of what it names, where they do not begin with one."""
    try:
        yield
    except UserError as error:
        lines = (line if _KEY.match(line) else f"{key}: {line}" for line in error.lines)
        raise UserError(*lines) from None


def under_new_name(config: Config, suffix: str) -> list[str]:
    """The options for another run beside this one, from its beginning."""
    words = ["--run.name", f"{config.run.name}-{suffix}"]
    if config.schedule.restart_step is not None:
        words += ["--schedule.restart_step", "null"]
    return words


def dump_config(config: Config) -> str:
    """The config as YAML with every default spelled out; `load_config` on it gives it back."""
    sections = config.model_dump(mode="json")
    lines = ["# The resolved config of this run: `gpt-train --config` on this file repeats it."]
    for section, values in sections.items():
        lines.append(f"{section}:")
        # JSON is YAML: quotes and lists come out right, and 1e-05 stays a number for our loader.
        lines += [f"  {key}: {_quoted(value)}" for key, value in values.items()]
    return "\n".join(lines) + "\n"


def free_copy(wish: Path, config: Path, ending: str) -> Path:
    """Where `--apply` writes a changed config: `wish`, or beside it if that is empty (`Path()`).

    Raises UserError for a file that is there already, for a folder that is not or forbids it, and
    for a name that no file can have.
    """
    target = config.with_name(f"{config.stem}-{ending}.yaml") if wish == Path() else wish
    if len(target.name.encode(errors="replace")) > MOST_NAME_BYTES:
        raise UserError(
            f"--apply: {target}: a file's name may have {MOST_NAME_BYTES} bytes at most; give a "
            "shorter one"
        )
    try:
        is_taken, has_folder = target.exists() or target.is_symlink(), target.parent.is_dir()
    except OSError as error:
        raise UserError(
            f"--apply: {target} cannot be written: {error.strerror}; name another file"
        ) from None
    if is_taken:
        raise UserError(f"--apply: {target} is there already; name another file, or remove it")
    if not has_folder:
        raise UserError(f"--apply: the folder {target.parent} does not exist; make it first")
    check_writable("--apply", target.parent)
    return target


def _quoted(value: object) -> str:
    """JSON, with the characters that YAML forbids or takes for line ends as YAML's escapes."""
    text = json.dumps(value, ensure_ascii=False)
    return _NOT_PLAIN.sub(lambda match: f"\\U{ord(match[0]):08x}", text)


def json_schema() -> dict[str, Any]:
    """The JSON schema that editors use to complete and check a config."""
    schema = Config.model_json_schema()
    schema["$schema"] = "https://json-schema.org/draft/2020-12/schema"
    _name_limits(schema)
    return schema


def _name_limits(schema: Any) -> None:  # noqa: ANN401
    """Limits as JSON schema has them: pydantic leaves them in Python's words behind a validator."""
    names = {"ge": "minimum", "gt": "exclusiveMinimum", "le": "maximum", "lt": "exclusiveMaximum"}
    parts = [schema]
    while parts:
        part = parts.pop()
        if isinstance(part, dict):
            for name in [name for name in names if isinstance(part.get(name), int | float)]:
                part[names[name]] = part.pop(name)
        if isinstance(part, dict | list):
            parts += part.values() if isinstance(part, dict) else part


def knobs() -> Iterator[tuple[str, str, str, str]]:
    """Every knob: its key, its type, its default, its description."""
    for section, outer in Config.model_fields.items():
        for key, info in _section_class(outer.annotation).model_fields.items():
            default = json.dumps(info.default, ensure_ascii=False)
            yield f"{section}.{key}", _type_name(info.annotation), default, info.description or ""


def knobs_help() -> str:
    """Every knob on a page: what gpt/cli/knobs.txt holds for the commands' `--help`."""
    lines = ["config keys (YAML `section: {key: value}`, or --section.key VALUE):"]
    for name, kind, default, description in knobs():
        text = f"{kind}, default {default}. {description}"
        lines.append(f"  --{name}")
        lines += textwrap.wrap(text, 88, initial_indent="      ", subsequent_indent="      ")
    return "\n".join(lines) + "\n"


def _section_class(annotation: Any) -> type[BaseModel]:  # noqa: ANN401
    assert isinstance(annotation, type) and issubclass(annotation, BaseModel)
    return annotation


def _type_name(annotation: Any) -> str:  # noqa: ANN401
    """A type as a user would say it."""
    if get_origin(annotation) in (Union, UnionType):
        return " or ".join(dict.fromkeys(_type_name(part) for part in get_args(annotation)))
    if hasattr(annotation, "__metadata__"):
        return _type_name(annotation.__origin__)
    if get_origin(annotation) in (list, tuple):
        return "list"
    if get_args(annotation):
        return "|".join(str(choice) for choice in get_args(annotation))
    names = {int: "integer", float: "number", str: "text", bool: "true|false", type(None): "null"}
    return names[annotation]


def _read_yaml(path: Path) -> _Source:
    """Parses the file into sections, with the line of every key. Duplicate keys are problems."""
    source = _Source()
    root = _compose(path, _read_text(path))
    if root is None or root.tag == "tag:yaml.org,2002:null":
        return source
    for section, node, where in _pairs(root, path, "", source):
        source.where[section] = where
        source.values[section] = {}
        if isinstance(node, yaml.MappingNode):
            for key, value, line in _pairs(node, path, f"{section}.", source):
                source.where[f"{section}.{key}"] = line
                source.values[section][key] = _construct(value)
        elif node.tag != "tag:yaml.org,2002:null" and section in Config.model_fields:
            message = "a section holds `key: value` lines, indented below it"
            source.problems.append(_Problem(where, section, message))
    return source


def _read_text(path: Path) -> str:
    """The file's text; UserError for a file that is missing, too large or no text."""
    try:
        raw = read_plain(path, MAX_FILE_BYTES)
    except FileNotFoundError:
        near = difflib.get_close_matches(path.name, [p.name for p in path.parent.glob("*.y*ml")], 1)
        hint = f"; did you mean {path.parent / near[0]}?" if near else "; check the path"
        raise UserError(f"--config: {path} does not exist{hint}") from None
    except (OSError, ValueError) as error:
        why = getattr(error, "strerror", None) or error
        raise UserError(f"--config: {path} cannot be read ({why}); give a YAML file") from None
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        where = f"byte {error.start}"
        raise UserError(f"{path}: not UTF-8 text ({where}); save it as UTF-8") from None


def _compose(path: Path, text: str) -> yaml.Node | None:
    """The tree of YAML nodes; UserError with the line for what is not YAML, and for aliases."""
    loader = None
    try:
        loader = _Loader(text)
        return loader.get_single_node()
    except _NoConfigError as error:
        raise UserError(f"{path}:{error.line}: {error}") from None
    except (yaml.YAMLError, ValueError, OverflowError) as error:  # "\U": there is no such character
        mark = getattr(error, "problem_mark", None) or (loader and loader.get_mark())
        place = f":{mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or getattr(error, "reason", None) or "unreadable"
        raise UserError(f"{path}{place}: not valid YAML: {problem}; fix that line") from None


def _construct(node: yaml.Node) -> Any:  # noqa: ANN401
    """The plain value of a node; what its tag cannot be comes out as text."""
    if isinstance(node, yaml.SequenceNode):
        return [_construct(child) for child in node.value]
    if isinstance(node, yaml.MappingNode):
        return {str(key.value): _construct(value) for key, value in node.value}
    loader = _Loader("")
    try:
        return loader.construct_object(node)
    except _NOT_OF_ITS_TAG:
        return f"{node.tag} {node.value}"
    finally:
        loader.dispose()


def _pairs(
    node: yaml.Node, path: Path, prefix: str, source: _Source
) -> Iterator[tuple[str, yaml.Node, str]]:
    """The pairs of a mapping, each with the place of its key; repeated keys become problems."""
    if not isinstance(node, yaml.MappingNode):
        message = "a config is made of sections (`model:`) with `key: value` lines below"
        source.problems.append(_Problem(f"{path}:{node.start_mark.line + 1}", "", message))
        return
    first: dict[str, int] = {}
    for key_node, value in node.value:
        line = key_node.start_mark.line + 1
        key = shown(key_node.value) if isinstance(key_node, yaml.ScalarNode) else "?"
        if key in first:
            message = f"given twice, first in line {first[key]}; remove one"
            source.problems.append(_Problem(f"{path}:{line}", f"{prefix}{key}", message))
            continue
        first[key] = line
        yield key, value, f"{path}:{line}"


def _apply_overrides(source: _Source, overrides: Sequence[Override]) -> None:
    """Puts `--section.key value` over what the file says.

    Text is taken as typed, also where a list could stand, unless it is one in brackets. A preset
    wins over what the file says of the model, and what is typed beside it over the preset.
    """
    kinds = {name: kind for name, kind, _, _ in knobs()}
    typed = {given for given, _ in overrides}
    for given, raw in overrides:
        name = shown(given)
        section, _, key = name.partition(".")
        where = f"command line: --{name}"
        source.where[name] = where
        if not isinstance(source.values.setdefault(section, {}), dict):
            source.values[section] = {}
        source.where.setdefault(section, where)
        value: Any = raw
        kind = kinds.get(name, "")
        if "text" not in kind or (
            raw.lstrip().startswith("[") if "list" in kind else raw in ("null", "~")
        ):
            try:
                node = _compose(Path(where), raw)
                value = _construct(node) if node is not None else None
            except UserError:
                value = raw
        source.values[section][key] = value
        if name == "model.preset":
            for filled in PRESETS.get(raw, {}):
                if f"model.{filled}" not in typed:
                    source.values[section].pop(filled, None)


def _validate(source: _Source, *, for_lint: bool) -> tuple[Config | None, list[_Problem]]:
    """Checks types, ranges and contradictions; contradictions also beside other mistakes."""
    problems: list[_Problem] = []
    values = source.values
    try:
        config: Config | None = Config.model_validate(values)
    except ValidationError as error:
        bad = {".".join(str(part) for part in e["loc"][:2]) for e in error.errors()}
        # Looking for what was meant takes a millisecond each; nobody reads the thousandth.
        first = error.errors()[: 10 * MOST_LINES]
        problems = _one_a_key((_problem(source, dict(e)), str(e["type"])) for e in first)
        healthy = {
            section: {key: v for key, v in keys.items() if f"{section}.{key}" not in bad}
            for section, keys in values.items()
            if isinstance(keys, dict) and section not in bad
        }
        try:
            config = Config.model_validate(healthy)
        except ValidationError:
            config = None
    else:
        bad = set()
    if config is not None:
        for keys, message, finding in contradictions(config):
            if not bad.intersection(keys) and not (for_lint and finding):
                place = next((source.where[key] for key in keys if key in source.where), "config")
                problems.append(_Problem(place, keys[0], message))
    return config, problems


def _one_a_key(problems: Iterable[tuple[_Problem, str]]) -> list[_Problem]:
    """The first mistake of each key: pydantic tells one for every type that a key may have.

    What is wrong with a value of the right type says more than that it is of no other.
    """
    chosen: dict[tuple[str, str], tuple[_Problem, str]] = {}
    for problem, kind in problems:
        place = (problem.where, problem.key)
        of_type = place in chosen and chosen[place][1].endswith("_type")
        if place not in chosen or (of_type and not kind.endswith("_type")):
            chosen[place] = problem, kind
    return [problem for problem, _ in chosen.values()]


def _problem(source: _Source, error: dict[str, Any]) -> _Problem:
    """A pydantic error in a user's words."""
    path = [str(part) for part in error["loc"][:2]]
    key = ".".join(path)
    where = source.where.get(key) or source.where.get(path[0], "config")
    if error["type"] == "extra_forbidden":
        return _Problem(where, key, f"no such key{_nearest(path)}")
    message = error["msg"].removeprefix("Value error, ").removeprefix("Input should be ")
    message = re.sub(r"^(String|List) should ", "must ", message)
    if error["type"] == "string_pattern_mismatch":
        info = _section_class(Config.model_fields[path[0]].annotation).model_fields[path[1]]
        message = f"not of the form of this key ({info.description})"
    elif error["type"] != "value_error" and not message.startswith("must "):
        message = (
            f"must be {message}" if message[:1].islower() or message.startswith("'") else message
        )
    shown = repr(error["input"])
    shown = shown if len(shown) <= 60 else f"{shown[:57]}..."
    return _Problem(where, key, f"{message}; got {shown}")


def _nearest(path: list[str]) -> str:
    """The nearest valid key, for a typo; a key that lives in another section is found there."""
    known = [name for name, _, _, _ in knobs()]
    section, key = path[0], path[-1]
    inside = [name.rpartition(".")[2] for name in known if name.startswith(f"{section}.")]
    elsewhere = [name for name in known if name.rpartition(".")[2] == key]
    if len(path) == 1:
        found = difflib.get_close_matches(key, list(Config.model_fields), 1) or elsewhere
    elif inside:
        near = difflib.get_close_matches(key, inside, 1, 0.7)
        found = elsewhere or [f"{section}.{name}" for name in near]
    else:
        found = elsewhere or difflib.get_close_matches(".".join(path), known, 1)
    if found:
        return f"; did you mean {found[0]}?"
    if inside:
        return f"; {section} has {', '.join(inside)}"
    return f"; the sections are {', '.join(Config.model_fields)}"
