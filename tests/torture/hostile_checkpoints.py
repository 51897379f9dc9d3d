"""Attacks on what gpt-infer, gpt-train and gpt-data load: checkpoints, runs, tokenizers, shards."""

import base64
import json
import os
import shutil
import struct
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file, save_file

from tests.torture.hostile import (
    ATTACKS,
    DEEP,
    ESCAPES,
    TERABYTE,
    Scene,
    attack,
    change,
    described,
    link,
    pipe,
    seal,
    sparse,
    tensors,
    write,
)

MODEL, OPTIMIZER, RNG = "model.safetensors", "optimizer.safetensors", "rng.safetensors"


def _both(scene: Scene) -> Sequence[Sequence[str]]:
    """Inference of the checkpoint, and training on from it."""
    return scene.infer(), scene.train()


# --- pickles, in every file and in every disguise ---


def _pickled(name: str, commands: Callable[[Scene], Any], *codes: int) -> None:
    def spoil(scene: Scene) -> Any:
        write(scene.checkpoint / name, scene.any_payload())
        seal(scene.checkpoint)
        return commands(scene)

    spoil.__name__ = f"pickle_as_{name}"
    attack("pickle", *codes)(spoil)


_pickled(MODEL, _both)
_pickled(OPTIMIZER, Scene.train)
_pickled(RNG, Scene.train)
_pickled("state.json", Scene.train)
_pickled("config.yaml", _both)
_pickled("tokenizer.json", Scene.infer)
_pickled("tokenizer.tiktoken", Scene.infer)
_pickled("training_args.bin", _both, 0)


@attack("pickle")
def pickle_as_manifest(scene):
    write(scene.checkpoint / "manifest.json", scene.any_payload())
    return _by_name(scene)


@attack("pickle")
def zip_pickle_instead_of_weights(scene):
    (scene.checkpoint / MODEL).unlink()
    for name in ("model.pt", "pytorch_model.bin", "model.ckpt", "model.pkl"):
        write(scene.checkpoint / name, scene.zip_payload())
    seal(scene.checkpoint)
    return _both(scene)


@attack("pickle", 0)
def pickle_as_best(scene):
    write(scene.run / "checkpoints" / "best.json", scene.any_payload())
    return _both(scene)


@attack("pickle")
def pickle_as_rate_record(scene):
    write(scene.run / "rate.json", scene.any_payload())
    return scene.train()


@attack("pickle")
def pickle_as_run_config(scene):
    write(scene.run / "config.yaml", scene.any_payload())
    return scene.train(), ["gpt-report", str(scene.run)]


@attack("pickle")
def pickle_as_shards(scene):
    for shard in scene.data.glob("*.bin"):
        write(shard, scene.any_payload())
    _seal_data(scene)
    return ["gpt-data", "info", str(scene.data)]


@attack("pickle")
def pickle_as_data_meta(scene):
    write(scene.data / "meta.json", scene.any_payload())
    return ["gpt-data", "info", str(scene.data)]


@attack("pickle")
def pickle_as_parquet_extension(scene):
    import pyarrow as pa
    import pyarrow.parquet as pq

    field = pa.field(
        "text",
        pa.binary(),
        metadata={
            b"ARROW:extension:name": b"arrow.py_extension_type",
            b"ARROW:extension:metadata": scene.payload(),
        },
    )
    table = pa.table([pa.array([b"a", b"b"])], schema=pa.schema([field]))
    source = scene.folder / "evil.parquet"
    pq.write_table(table, source)
    return _build(scene, source)


@attack("pickle")
def tagged_config(scene):
    config = scene.folder / "tagged.yaml"
    write(config, f"run:\n  name: {scene.tag()}\nmodel: {scene.tag()}\n")
    commands = [[name, "--config", str(config)] for name in ("gpt-train",)]
    commands += [["gpt-lr", "plan", "--config", str(config)]]
    return [*commands, ["gpt-data", "build", "--config", str(config)]]


@attack("pickle")
def tagged_checkpoint_config(scene):
    text = (scene.checkpoint / "config.yaml").read_text()
    write(scene.checkpoint / "config.yaml", text.replace("n_layer: 2", f"n_layer: {scene.tag()}"))
    seal(scene.checkpoint)
    return _both(scene)


@attack("pickle")
def hugging_face_folder(scene):
    place = _hugging_face(scene)
    infer = ["gpt-infer", "--prompt", "a"]
    return [*infer, "--run", str(place)], [*infer, "--checkpoint", str(place)]


@attack("pickle")
def hugging_face_tokenizer(scene):
    place = _hugging_face(scene)
    return [scene.train("--tokenizer.kind", str(place / name)) for name in (".", "tokenizer.json")]


def _hugging_face(scene: Scene) -> Path:
    """What a repository of a model with code of its own holds."""
    place = scene.folder / "hub"
    place.mkdir()
    auto = {"AutoModelForCausalLM": "modeling_evil.Evil", "AutoConfig": "modeling_evil.Evil"}
    config = {"model_type": "gpt2", "auto_map": auto, "trust_remote_code": True}
    write(place / "config.json", json.dumps(config))
    write(place / "modeling_evil.py", f"open({str(scene.canary)!r}, 'w')\n")
    write(place / "__init__.py", f"open({str(scene.canary)!r}, 'w')\n")
    write(place / "sitecustomize.py", f"open({str(scene.canary)!r}, 'w')\n")
    write(place / "tokenizer.json", json.dumps({"version": "1.0", "model": {"type": "BPE"}}))
    write(place / "tokenizer_config.json", json.dumps({"auto_map": {"AutoTokenizer": ["e.E"] * 2}}))
    for name in ("pytorch_model.bin", "training_args.bin", "optimizer.pt", "rng_state.pth"):
        write(place / name, scene.any_payload())
    return place


# --- bombs: sizes that are claimed, nested, repeated ---

DEEP_JSON = "[" * DEEP + "]" * DEEP
DIGITS = '{"version": ' + "9" * 10**7 + "}"
WIDE_JSON = "[" + "[]," * (20 * 2**20) + "[]]"


def _text_bombs(name: str, commands: Callable[[Scene], Any], *codes: int) -> None:
    """A file of a checkpoint that is JSON and nested, all digits, wide, huge."""

    def make(kind: str, spoil_file: Callable[[Path], None]) -> None:
        def spoil(scene: Scene) -> Any:
            path = scene.checkpoint / name
            spoil_file(path)
            if name != "manifest.json":
                seal(scene.checkpoint)
            return commands(scene)

        spoil.__name__ = f"{kind}_{name}"
        attack("bomb", *codes)(spoil)

    make("deep", lambda path: write(path, DEEP_JSON))
    make("digits", lambda path: write(path, DIGITS))
    make("wide", lambda path: write(path, WIDE_JSON))
    make("terabyte", lambda path: sparse(path, head=b'{"format": 1'))


def _by_name(scene: Scene) -> Sequence[str]:
    return ["gpt-infer", "--checkpoint", str(scene.checkpoint), "--prompt", "a"]


_text_bombs("manifest.json", _by_name)
_text_bombs("state.json", Scene.train, 0, 2)
_text_bombs("tokenizer.json", _by_name)
_text_bombs("tokenizer.tiktoken", _by_name)
_text_bombs("config.yaml", _by_name)


@attack("bomb")
def manifest_of_a_million_files(scene):
    names = {f"{number:030d}": {"bytes": 0, "sha256": ""} for number in range(100_000)}
    change(scene.checkpoint / "manifest.json", lambda manifest: manifest.update(files=names))
    return _by_name(scene)


@attack("bomb")
def folder_of_many_files(scene):
    for number in range(20_000):
        (scene.checkpoint / f"{number}-{ESCAPES.replace('/', '|')}").touch()
    return _by_name(scene)


@attack("bomb")
def laughs(scene):
    lines = ["a0: &a0 [x,x,x,x,x,x,x,x,x,x]"]
    lines += [f"a{n}: &a{n} [{','.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 30)]
    config = scene.folder / "laughs.yaml"
    write(config, "\n".join(lines))
    return [["gpt-train", "--config", str(config)], ["gpt-lr", "plan", "--config", str(config)]]


@attack("bomb")
def many_wrong_keys(scene):
    config = scene.folder / "keys.yaml"
    write(config, "model:\n" + "\n".join(f"  n_layre{n}: 1" for n in range(20_000)))
    return ["gpt-train", "--config", str(config)]


@attack("bomb")
def yaml_of_merges(scene):
    config = scene.folder / "merge.yaml"
    write(config, "model: {? " * 15 + "}" * 15 + "\nrun: {<<: {<<: {name: 1e999999999}}}\n")
    return ["gpt-train", "--config", str(config)]


@attack("bomb")
def trillion_parameters(scene):
    text = (scene.checkpoint / "config.yaml").read_text()
    text = text.replace("n_layer: 2", "n_layer: 1000").replace("n_embd: 16", "n_embd: 65536")
    write(scene.checkpoint / "config.yaml", text)
    seal(scene.checkpoint)
    return _both(scene)


@attack("bomb", 0, 2)
def trillion_parameters_in_plan(scene):
    config = scene.folder / "huge.yaml"
    sizes = "n_layer: 1000, n_embd: 65536, n_head: 512, context_len: 1048576"
    write(config, f"model: {{{sizes}}}\ndata: {{source: {scene.text}}}\n")
    return ["gpt-train", "--config", str(config), "--dry-run"], [
        *("gpt-lr", "find", "--config", str(config)),
        *("--data.dir", str(scene.data.parent)),
        *("--tokenizer.kind", "bytes", "--data.source", str(scene.text)),
    ]


@attack("bomb", 0, 2)
def rotary_tables(scene):
    """Tables that no file holds: one row for each position, and a head as wide as the model."""
    width, vocab = 384, 270
    _replace_model(scene, width, vocab)
    text = (scene.checkpoint / "config.yaml").read_text()
    text = text.replace("n_embd: 16", f"n_embd: {width}").replace("n_head: 2", "n_head: 1")
    text = text.replace("n_layer: 2", "n_layer: 1")
    write(scene.checkpoint / "config.yaml", text.replace("context_len: 16", "context_len: 1048576"))
    seal(scene.checkpoint)
    return scene.infer()


def _replace_model(scene: Scene, width: int, vocab: int) -> None:
    old = load_file(scene.checkpoint / MODEL)
    new = {}
    for name, value in old.items():
        if name.startswith("blocks.1."):
            continue
        shape = [width * side // 16 if side % 16 == 0 else side for side in value.shape]
        new[name] = np.zeros(shape, np.float32)
    save_file(new, scene.checkpoint / MODEL)


def _weights(name: str, content: Callable[[dict[str, Any], bytes], bytes], *codes: int) -> None:
    """A safetensors file of a checkpoint, made of the sound one's header and body."""
    for file, commands in ((MODEL, _both), (OPTIMIZER, Scene.train), (RNG, Scene.train)):

        def spoil(scene: Scene, file: str = file, commands: Any = commands) -> Any:
            path = scene.checkpoint / file
            write(path, content(*described(path)))
            seal(scene.checkpoint)
            return commands(scene)

        spoil.__name__ = f"{name}_{file}"
        attack("bomb" if "claim" in name else "shape", *codes)(spoil)


def _first(header: dict[str, Any]) -> str:
    return next(name for name in header if name != "__metadata__")


def _with(header: dict[str, Any], **values: Any) -> dict[str, Any]:
    name = _first(header)
    return {**header, name: {**header[name], **values}}


_weights("header_claims_2_to_60", lambda header, body: tensors(header, body, 2**60))
_weights("header_claims_all", lambda header, body: tensors(header, body, 2**64 - 1))
_weights(
    "claims_terabytes",
    lambda header, body: tensors(
        _with(header, shape=[2**20, 2**20], data_offsets=[0, 2**42]), body
    ),
)
_weights(
    "claims_overflow",
    lambda header, body: tensors(_with(header, shape=[2**62, 2**62, 2**62]), body),
)
_weights(
    "claims_a_million_names",
    lambda header, body: tensors(
        {
            **header,
            **{
                f"{n}": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}
                for n in range(300_000)
            },
        },
        body,
    ),
)
_weights("claims_depth", lambda header, body: tensors(DEEP_JSON.encode(), body))
_weights("nothing", lambda header, body: b"")
_weights("cut", lambda header, body: tensors(header, body[: len(body) // 2]))
_weights("longer", lambda header, body: tensors(header, body + b"\0" * 4096))
_weights(
    "overlapping",
    lambda header, body: tensors(
        {
            name: {
                **value,
                "data_offsets": [0, value["data_offsets"][1] - value["data_offsets"][0]],
            }
            for name, value in header.items()
            if name != "__metadata__"
        },
        body,
    ),
    0,  # of one tensor it overlaps nothing
    2,
)
_weights(
    "negative_offset",
    lambda header, body: tensors(_with(header, data_offsets=[-4, 4]), body),
)
_weights("odd_dtype", lambda header, body: tensors(_with(header, dtype="F7"), body))
_weights("missing", lambda header, body: _without_first(header, body))
_weights("renamed", lambda header, body: _renamed(header, body))
_weights("flat", lambda header, body: _flat(header, body))
_weights("int", lambda header, body: _retyped(header, body, "I32", "F32"))
_weights("half", lambda header, body: _halved(header, body))


def _without_first(header: dict[str, Any], body: bytes) -> bytes:
    """A sound file without the tensor that comes first in it."""
    names = sorted(
        (n for n in header if n != "__metadata__"), key=lambda n: header[n]["data_offsets"]
    )
    start = header[names[0]]["data_offsets"][1]
    kept = {
        name: {**header[name], "data_offsets": [at - start for at in header[name]["data_offsets"]]}
        for name in names[1:]
    }
    return tensors(kept, body[start:])


def _renamed(header: dict[str, Any], body: bytes) -> bytes:
    name = _first(header)
    return tensors({ESCAPES if n == name else n: value for n, value in header.items()}, body)


def _flat(header: dict[str, Any], body: bytes) -> bytes:
    """All tensors as vectors of as many numbers."""
    flat = {}
    for name, value in header.items():
        if name != "__metadata__":
            count = int(np.prod(value["shape"])) if value["shape"] else 1
            flat[name] = {**value, "shape": [1, count]}
    return tensors(flat, body)


def _retyped(header: dict[str, Any], body: bytes, dtype: str, other: str) -> bytes:
    """Another type of as many bytes."""
    typed = {
        name: {**value, "dtype": dtype if value["dtype"] != dtype else other}
        for name, value in header.items()
        if name != "__metadata__" and value["dtype"] in ("F32", "I32")
    }
    rest = {name: value for name, value in header.items() if name not in typed}
    if not typed:  # the generators' states are bytes
        rest = {n: {**v, "dtype": "I8"} for n, v in rest.items() if n != "__metadata__"}
    return tensors({**rest, **typed}, body)


def _halved(header: dict[str, Any], body: bytes) -> bytes:
    """Half as many numbers in each tensor."""
    halved, at = {}, 0
    for name, value in header.items():
        if name == "__metadata__":
            continue
        count = max(1, int(np.prod(value["shape"])) // 2)
        size = {"F32": 4, "I64": 8, "U8": 1}.get(value["dtype"], 4) * count
        halved[name] = {**value, "shape": [count], "data_offsets": [at, at + size]}
        at += size
    return tensors(halved, body[:at])


@attack("bomb", 0, 2)
def terabyte_of_weights(scene):
    header, _ = described(scene.checkpoint / MODEL)
    path = scene.checkpoint / MODEL
    sparse(path, head=tensors(_with(header, shape=[2**19, 2**19], data_offsets=[0, TERABYTE])))
    seal(scene.checkpoint)
    return _both(scene)


@attack("shape")
def weights_not_finite(scene):
    path = scene.checkpoint / MODEL
    value = scene.rng.choice([np.nan, np.inf, -np.inf, 1e38])
    save_file({n: np.full_like(v, value) for n, v in load_file(path).items()}, path)
    seal(scene.checkpoint)
    return scene.infer(), scene.infer("--temperature", "0"), scene.infer("--top-p", "0.9")


@attack("shape", 0, 2)
def optimizer_not_finite(scene):
    path = scene.checkpoint / OPTIMIZER
    save_file({n: np.full_like(v, np.nan) for n, v in load_file(path).items()}, path)
    seal(scene.checkpoint)
    return scene.train()


ODD = [None, [], {}, "x", -1, 1e308, 10**400, True, "\x1b[31m", [[]], float("nan")]
STATE_KEYS = ["progress", "scheduler", "scaler", "optimizer", "dtype", "data_fingerprint", "torch"]
INNER_KEYS = [
    *(("progress", key) for key in ("step", "tokens", "seconds", "best_step", "skips_in_row")),
    *(("progress", key) for key in ("guard_losses", "guard_norms", "interval", "best_val_loss")),
    *(("scheduler", key) for key in ("last_epoch", "_last_lr", "base_lrs", "lr_lambdas")),
    *(("optimizer", key) for key in ("class", "groups", "values")),
]


def _state(name: str, alter: Callable[[Scene, dict[str, Any]], object], *codes: int) -> None:
    def spoil(scene: Scene) -> Any:
        change(scene.checkpoint / "state.json", lambda state: alter(scene, state))
        seal(scene.checkpoint)
        return scene.train()

    spoil.__name__ = name
    attack("shape", *codes)(spoil)


for _key in STATE_KEYS[:-1]:
    _state(f"state_without_{_key}", lambda scene, state, key=_key: state.pop(key))
    _state(
        f"state_with_odd_{_key}",
        lambda scene, state, key=_key: state.update({key: scene.rng.choice(ODD)}),
    )
for _outer, _inner in INNER_KEYS:
    _state(
        f"state_with_odd_{_outer}_{_inner}",
        lambda scene, state, outer=_outer, inner=_inner: state[outer].update(
            {inner: scene.rng.choice(ODD)}
        ),
        0,
        2,
    )
_state(
    "state_with_more_progress",
    lambda scene, state: state["progress"].update({"__class__": "x", ESCAPES: 1}),
)
_state(
    "state_with_odd_groups",
    lambda scene, state: state["optimizer"]["groups"][0].update(
        {scene.rng.choice(["lr", "initial_lr", "parameters"]): scene.rng.choice(ODD)}
    ),
)
_state(
    "state_with_values_of_nobody",
    lambda scene, state: state["optimizer"]["values"].update({ESCAPES: {"x": 1}}),
)


# --- links, pipes, devices ---


def _linked(name: str, make: Callable[[Scene, Path], None], *codes: int) -> None:
    """Each file of a checkpoint in turn, as drawn, made something else than a plain file."""

    def spoil(scene: Scene) -> Any:
        files = sorted(path for path in scene.checkpoint.iterdir())
        chosen = scene.rng.choice(files)
        make(scene, chosen)
        if chosen.name != "manifest.json":
            seal(scene.checkpoint)
        return _by_name(scene)

    spoil.__name__ = name
    attack("link", *codes)(spoil)


_linked("link_outside", lambda scene, path: link(path, scene.outside / "victim"))
_linked("link_to_zeros", lambda scene, path: link(path, "/dev/zero"))
_linked("link_to_noise", lambda scene, path: link(path, "/dev/urandom"))
_linked("link_to_nothing", lambda scene, path: link(path, "/nowhere/at/all"))
_linked("link_to_itself", lambda scene, path: link(path, path.name))
_linked("pipe", lambda scene, path: pipe(path))


def _is_folder(scene: Scene, path: Path) -> None:
    path.unlink()
    path.mkdir()


_linked("folder_as_file", _is_folder)
for _make in (link, pipe):
    _target = ("/dev/zero",) if _make is link else ()

    def _manifest(scene: Scene, make: Any = _make, target: Any = _target) -> Any:
        make(scene.checkpoint / "manifest.json", *target)
        return _by_name(scene)

    _manifest.__name__ = f"manifest_as_{_make.__name__}"
    attack("link")(_manifest)


@attack("link")
def escaping_names(scene):
    outside = os.path.relpath(scene.outside / "victim", scene.checkpoint)
    for name in (outside, str(scene.outside / "victim"), "..", ".", "", "a\0b", ESCAPES):
        change(scene.checkpoint / "manifest.json", lambda m, n=name: m["files"].update({n: {}}))
    return _by_name(scene)


@attack("link", 0)
def hard_link(scene):
    os.link(scene.checkpoint / MODEL, scene.folder / "hard")
    return scene.infer()


@attack("link", 0)
def escaping_best(scene):
    best = scene.run / "checkpoints" / "best.json"
    for_all = ["../../../outside", "/etc", str(scene.outside), "..", "", "step-9\0", "a" * 5000]
    write(best, json.dumps({"checkpoint": scene.rng.choice(for_all)}))
    return scene.infer()


@attack("link", 0)
def best_that_never_ends(scene):
    best = scene.run / "checkpoints" / "best.json"
    spoil = scene.rng.randrange(4)
    if spoil == 0:
        link(best, "/dev/zero")
    elif spoil == 1:
        pipe(best)
    elif spoil == 2:
        write(best, DEEP_JSON)
    else:
        sparse(best)
    return scene.infer()


@attack("link", 0, 2)
def checkpoint_folder_is_a_link(scene):
    moved = scene.folder / "moved"
    scene.checkpoint.rename(moved)
    (scene.run / "checkpoints" / "step-00000012").symlink_to(moved)
    (scene.run / "checkpoints" / "step-00000099").symlink_to("/proc/self/root")
    (scene.run / "checkpoints" / "step-00000098").symlink_to("step-00000098")
    return scene.infer()


@attack("link", 2)
def checkpoints_link_to_themselves(scene):
    shutil.rmtree(scene.run / "checkpoints")
    (scene.run / "checkpoints").symlink_to("checkpoints")
    return _both(scene)


def _run_file(name: str, *codes: int) -> None:
    """A file that a run writes, as a link to somebody else's."""

    def to_victim(scene: Scene) -> Any:
        link(scene.run / name, scene.outside / "victim")
        return scene.train()

    def to_new(scene: Scene) -> Any:
        link(scene.run / name, scene.outside / "planted")
        return scene.train()

    def as_pipe(scene: Scene) -> Any:
        pipe(scene.run / name)
        return scene.train()

    for made in (to_victim, to_new, as_pipe):
        made.__name__ = f"{name}_{made.__name__}"
        attack("link", *codes)(made)


for _name in ("metrics.jsonl", ".lock", "config.yaml", "rate.json", "curve.png", "report.html"):
    _run_file(_name, 0, 2)
for _name in (".tmp-config.yaml", ".tmp-metrics.jsonl", "tokenizer.json"):
    _run_file(_name, 0, 2)


@attack("link", 0, 2)
def temporary_folders_are_links(scene):
    (scene.run / ".tmp-x").symlink_to(scene.outside)
    for name in (".tmp-step-00000012", ".tmp-y", ".tmp-old-step-00000012"):
        (scene.run / "checkpoints" / name).symlink_to(scene.outside)
    return scene.train()


@attack("bomb", 0, 2)
def log_of_a_terabyte_at_resume(scene):
    sparse(scene.run / "metrics.jsonl", head=b'{"kind":"train","step":1,"loss":3.0}\n')
    return scene.train()


# --- tokenizers ---


def _tokenizer(name: str, alter: Callable[[Scene, dict[str, Any]], object]) -> None:
    def spoil(scene: Scene) -> Any:
        change(scene.checkpoint / "tokenizer.json", lambda meta: alter(scene, meta))
        seal(scene.checkpoint)
        return scene.infer()

    spoil.__name__ = name
    attack("tokenizer")(spoil)


_tokenizer("end_id_of_a_billion", lambda scene, meta: meta.update(eot_id=10**9))
_tokenizer("vocabulary_of_a_billion", lambda scene, meta: meta.update(vocab_size=10**9))
_tokenizer("end_id_of_a_letter", lambda scene, meta: meta.update(eot_id=97))
_tokenizer(
    "end_id_far_out", lambda scene, meta: meta.update(eot_id=1_999_999, vocab_size=2 * 10**6)
)
_tokenizer("regex_as_split", lambda scene, meta: meta.update(split="(a+)+$"))
_tokenizer("odd_split", lambda scene, meta: meta.update(split=scene.rng.choice(ODD)))
_tokenizer("odd_kind", lambda scene, meta: meta.update(kind=scene.rng.choice([*ODD, ESCAPES])))
_tokenizer("odd_end_id", lambda scene, meta: meta.update(eot_id=scene.rng.choice(ODD)))
_tokenizer(
    "other_kind", lambda scene, meta: meta.update(kind=scene.rng.choice(["bytes", "chars", "gpt2"]))
)
_tokenizer(
    "surrogate_characters",
    lambda scene, meta: meta.update(kind="chars", chars="ab\ud800", vocab_size=4, eot_id=3),
)


@attack("bomb")
def a_million_characters(scene):
    chars = "".join(map(chr, [*range(0xD800), *range(0xE000, 0x110000)]))
    meta = {"format": 1, "kind": "chars", "vocab_size": len(chars) + 1, "eot_id": len(chars)}
    write(scene.checkpoint / "tokenizer.json", json.dumps({**meta, "chars": chars}))
    (scene.checkpoint / "tokenizer.tiktoken").unlink()
    seal(scene.checkpoint)
    return scene.infer()


def _ranks(name: str, lines: Callable[[Scene], bytes]) -> None:
    """A ranks file, in a checkpoint and as the user's own."""

    def spoil(scene: Scene) -> Any:
        path = scene.checkpoint / "tokenizer.tiktoken"
        content = lines(scene)
        write(path, content)
        seal(scene.checkpoint)
        own = scene.folder / "own.tiktoken"
        write(own, content)
        return scene.infer(), scene.train("--tokenizer.kind", str(own), "--run.name", "new")

    spoil.__name__ = name
    attack("tokenizer")(spoil)


def _bytes_lines() -> bytes:
    return b"".join(base64.b64encode(bytes([b])) + b" %d\n" % b for b in range(256))


_ranks("giant_token", lambda scene: _bytes_lines() + base64.b64encode(b"ab" * 2**24) + b" x\n")
_ranks("rank_of_many_digits", lambda scene: _bytes_lines() + b"YWI= " + b"9" * 10**7 + b"\n")
_ranks("rank_of_a_billion", lambda scene: _bytes_lines() + b"YWI= 1000000000\n")
_ranks("negative_rank", lambda scene: _bytes_lines() + b"YWI= -1\n")
_ranks("ranks_of_nothing", lambda scene: b"\n" * (60 * 2**20))
_ranks("rank_twice", lambda scene: _bytes_lines() + b"YWI= 97\n")
_ranks("token_twice", lambda scene: _bytes_lines() + b"YQ== 300\n")
_ranks("no_bytes", lambda scene: b"YWI= 0\n")
_ranks(
    "many_ranks",
    lambda scene: (
        _bytes_lines()
        + b"".join(
            base64.b64encode(struct.pack("<I", n)) + b" %d\n" % n for n in range(256, 3_500_000)
        )
    ),
)


# --- shards, and texts to be tokenized ---


def _seal_data(scene: Scene) -> None:
    import hashlib

    def alter(meta: dict[str, Any]) -> None:
        for side in ("train", "val"):
            for shard in meta[side]["shards"]:
                content = (scene.data / shard["name"]).read_bytes()
                shard.update(size=len(content), sha256=hashlib.sha256(content).hexdigest())

    change(scene.data / "meta.json", alter)


def _info(scene: Scene) -> Sequence[str]:
    return ["gpt-data", "info", str(scene.data)]


def _meta(name: str, alter: Callable[[Scene, dict[str, Any]], object], *codes: int) -> None:
    def spoil(scene: Scene) -> Any:
        change(scene.data / "meta.json", lambda meta: alter(scene, meta))
        return _info(scene)

    spoil.__name__ = name
    attack("shards", *codes)(spoil)


_meta("shard_outside", lambda s, m: m["train"]["shards"][0].update(name="../../outside/victim"))
_meta("shard_absolute", lambda s, m: m["train"]["shards"][0].update(name="/dev/zero"))
_meta("shard_of_all_tokens", lambda s, m: m["train"]["shards"][0].update(n_tokens=2**62 - 1))
_meta("split_of_all_tokens", lambda s, m: m["train"].update(n_tokens=2**62 - 1))
_meta("odd_meta", lambda s, m: m["val"].update(n_tokens=s.rng.choice(ODD)))
_meta("many_shards", lambda s, m: m["train"].update(shards=m["train"]["shards"] * 100_000))
_meta("source_with_escapes", lambda s, m: m.update(source=ESCAPES, split=ESCAPES), 0)


@attack("shards")
def shard_of_a_terabyte(scene):
    shard = scene.data / "train-00000.bin"
    head = shard.read_bytes()[:128]
    tokens = (TERABYTE - 128) // 2
    sparse(shard, head=head[:16] + struct.pack("<Q", tokens) + head[24:])
    claim = {"size": TERABYTE, "n_tokens": tokens}
    change(scene.data / "meta.json", lambda meta: meta["train"]["shards"][0].update(claim))
    return _info(scene)


@attack("shards")
def shard_that_never_ends(scene):
    shard = scene.data / "train-00000.bin"
    if scene.rng.random() < 0.5:
        pipe(shard)
    else:
        link(shard, scene.rng.choice(["/dev/zero", "/dev/urandom"]))
    change(scene.data / "meta.json", lambda meta: meta["train"]["shards"][0].update(size=0))
    return _info(scene)


@attack("shards", 0, 2)
def ids_beyond_the_vocabulary(scene):
    shard = scene.data / "train-00000.bin"
    content = shard.read_bytes()
    write(shard, content[:128] + b"\xff\xff" * ((len(content) - 128) // 2))
    _seal_data(scene)
    return scene.train("--resume", "never", "--run.name", "new"), _info(scene)


@attack("shards")
def data_meta_that_never_ends(scene):
    meta = scene.data / "meta.json"
    kind = scene.rng.randrange(3)
    if kind == 0:
        pipe(meta)
    elif kind == 1:
        link(meta, "/dev/zero")
    else:
        sparse(meta)
    return _info(scene)


@attack("link", 0, 2)
def data_lock_is_a_link(scene):
    for lock in scene.data.parent.glob(".lock-*"):
        link(lock, scene.outside / "victim")
    write(scene.text.with_name("evil.txt"), "a new text " * 500)
    shutil.rmtree(scene.data)
    return scene.train("--resume", "never", "--run.name", "new")


def _build(scene: Scene, source: Path) -> list[str]:
    return [
        *("gpt-data", "build", "--config", str(scene.sound_config)),
        *("--data.source", str(source), "--data.dir", str(scene.folder / "built")),
        *("--tokenizer.kind", "bytes"),
    ]


@attack("bomb", 0, 2)
def parquet_bomb(scene):
    """Kilobytes that say the same 40 megabytes again and again; the text after them is none."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    words = pa.DictionaryArray.from_arrays(pa.array([0] * 40, pa.int32()), ["a" * (40 * 2**20)])
    source = scene.folder / "bombs"
    source.mkdir()
    pq.write_table(pa.table({"text": words}), source / "a.parquet", compression="zstd")
    write(source / "b.txt", b"\xff\xfe\xfd")
    return _build(scene, source)


@attack("bomb")
def json_text_bomb(scene):
    source = scene.folder / "bomb.jsonl"
    write(source, scene.rng.choice([DEEP_JSON, DIGITS, '{"text": ' + DEEP_JSON + "}"]) + "\n")
    return _build(scene, source)


@attack("link")
def text_that_never_ends(scene):
    source = scene.folder / "endless.txt"
    if scene.rng.random() < 0.5:
        pipe(source)
    else:
        link(source, scene.rng.choice(["/dev/zero", "/dev/urandom"]))
    return _build(scene, source)


assert ATTACKS
