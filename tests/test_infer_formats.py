"""`gpt-infer --quantize int8` and `--dtype`: what is said, what is refused, what stays on disk."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch

import gpt.infer
import gpt.quantize
from gpt import pages
from gpt.cli.infer import main
from gpt.config import TokenizerConfig
from gpt.data import kept_data, kept_validation
from gpt.packed import BFloat16Linear, HalfLinear, Packed, has_half_kernel
from gpt.quantize import linear_bytes, multiplies_bf16
from gpt.tokenizer import build_tokenizer
from gpt.train import train
from tests.conftest import tiny_config

LOSS = r"loss ([+-]\d+\.\d{4}) ± (\d+\.\d{4}) nats/token on ([\d,]+) (.*)"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A trained run, with its shards beside it."""
    config = tiny_config(tmp_path_factory.mktemp("formats"))
    train(config)
    return Path(config.run.dir) / config.run.name


def written(folder: Path) -> dict[str, bytes]:
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {str(path): path.read_bytes() for path in files}


def infer(run: Path, *arguments: str) -> int:
    return main(["--run", str(run), "--max-tokens", "4", "--seed", "1", *arguments])


def test_int8_says_what_it_costs_and_leaves_no_trace(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = written(run.parents[1])
    assert infer(run, "--prompt", "the", "--quantize", "int8", "--json") == 0
    out, err = capsys.readouterr()
    assert len(json.loads(out)["tokens"]) == 4
    line = re.fullmatch(
        rf"int8     ([\d.]+) MB of weights a token instead of ([\d.]+) MB; {LOSS}\n", err
    )
    assert line, err
    assert abs(float(line[3])) < 0.05
    config = tiny_config(run.parents[1])
    data = kept_data(config)
    assert data is not None
    assert int(line[5].replace(",", "")) == data.val.n_tokens - 1
    assert line[6] == f"validation tokens of {data.folder}"
    assert written(run.parents[1]) == before


def test_only_validation_shards_are_read(run: Path, tmp_path: Path) -> None:
    """Those of training may be many: a damaged one is none of its business."""
    copy, config = tmp_path / "data", tiny_config(run.parents[1])
    data = kept_data(config)
    assert data is not None
    shutil.copytree(data.folder, copy / data.folder.name)
    (shard,) = (copy / data.folder.name).glob("train-*.bin")
    shard.write_bytes(b"")
    config = config.model_copy(update={"data": config.data.model_copy(update={"dir": str(copy)})})
    assert kept_data(config) is None
    kept = kept_validation(config)
    assert kept is not None
    assert kept.split.n_tokens == data.val.n_tokens
    assert kept.tokenizer.fingerprint == data.tokenizer.fingerprint


def test_without_shards_the_prompts_are_the_measure(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = tmp_path / "tiny"
    shutil.copytree(run, copy)
    for config in copy.rglob("config.yaml"):
        text = config.read_text(encoding="utf-8")
        config.write_text(re.sub(r"(?m)^  dir: .*data.*$", "  dir: gone", text), encoding="utf-8")
    model, tokenizer = gpt.infer.load_for_inference(
        gpt.infer.find_checkpoint(run, None), torch.device("cpu")
    )
    folder = copy / "checkpoints"
    batches, source = gpt.infer.held_out(model, tokenizer, folder.parent, ["the cat sat", "on"] * 9)
    assert sum(targets.numel() for _, targets in batches) == 9 * (10 + 1)
    assert source == "tokens of the prompts"
    batches, source = gpt.infer.held_out(model, tokenizer, folder.parent, ["the cat"])
    assert batches == []
    assert "not here" in source
    assert "fewer than 32 tokens" in source
    other = build_tokenizer(TokenizerConfig(kind="chars"), lambda: ["the cat"])
    batches, source = gpt.infer.held_out(model, other, run, ["the cat"])
    assert batches == []
    assert "of another tokenizer in" in source
    assert not Path("gone").exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--quantize", "int8", "--dtype", "bf16"], "--dtype bf16 with --quantize int8"),
        (["--quantize", "int8", "--dtype", "fp16"], "leave one of them out"),
        (["--quantize", "int4"], "int8"),
    ],
)
def test_what_does_not_go_together(
    run: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], words: str
) -> None:
    assert infer(run, "--prompt", "a", *arguments) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    assert words in err


def test_int8_is_for_the_cpu() -> None:
    request = gpt.infer.Request(["a"], gpt.infer.Sampling(), quantize="int8")
    with pytest.raises(gpt.infer.UserError, match="--device cpu"):
        gpt.infer.check_quantize(request, torch.device("cuda"))
    gpt.infer.check_quantize(request, torch.device("cpu"))


@pytest.mark.skipif(not has_half_kernel(), reason="no FBGEMM on this CPU")
@pytest.mark.parametrize("name", ["bf16", "fp16"])
def test_halves_hold_rounded_weights_and_compute_in_fp32(
    run: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpt.quantize, "multiplies_bf16", lambda: False)
    check_halves(run, name, HalfLinear, within=1e-5)


@pytest.mark.skipif(not multiplies_bf16(), reason="this CPU has no bf16")
def test_where_the_cpu_has_bf16_products_are_in_it(run: Path) -> None:
    check_halves(run, "bf16", BFloat16Linear, within=0.02)


def check_halves(run: Path, name: str, kind: type[Packed], *, within: float) -> None:
    """The model in halves, of one kind, is as far off its rounded self as is allowed, at most."""
    device = torch.device("cpu")
    model, _ = gpt.infer.load_for_inference(gpt.infer.find_checkpoint(run, None), device)
    rounded = {
        key: value.to(gpt.infer.DTYPES[name]).float() for key, value in model.state_dict().items()
    }
    size, ids = linear_bytes(model), torch.arange(10)[None]
    halves = gpt.infer.in_dtype(model, name, device)
    model.float().load_state_dict(rounded)
    assert isinstance(halves.head, kind)
    assert linear_bytes(halves) == size // 2
    with torch.inference_mode():
        torch.testing.assert_close(halves(ids), model(ids), rtol=within, atol=within)


def test_moved_parameters_are_the_same_and_stay_tied() -> None:
    model = torch.nn.Sequential(torch.nn.Embedding(70_000, 64), torch.nn.Linear(64, 70_000))
    model[1].weight = model[0].weight
    before = [parameter.clone() for parameter in model.parameters()]
    pages.move(model.parameters())
    assert model[1].weight is model[0].weight
    for one, other in zip(before, model.parameters(), strict=True):
        assert torch.equal(one, other)
        assert other.requires_grad


def test_memory_in_large_pages_is_memory() -> None:
    for numel in (0, 1, 3 * 2**20 + 1):
        tensor = pages.empty(numel).zero_()
        assert tensor.shape == (numel,)
        assert int(tensor.count_nonzero()) == 0
