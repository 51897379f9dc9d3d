"""Limits, patience, best and kept checkpoints, broken numbers, full disks."""

import errno
import json
import math
from pathlib import Path

import pytest
import torch

import gpt.checkpoint
import gpt.step
import gpt.train
from gpt.checkpoint import load_for_inference, verify_checkpoint
from gpt.config import Config
from gpt.errors import UserError
from gpt.metrics import read_metrics
from gpt.rundir import find_checkpoint
from gpt.train import train
from tests.conftest import ConfigMaker


def run_folder(config: Config) -> Path:
    return Path(config.run.dir) / config.run.name


def lines(config: Config, kind: str) -> list[dict[str, object]]:
    return [record for record in read_metrics(run_folder(config)) if record["kind"] == kind]


def kept(config: Config) -> list[int]:
    folders = (run_folder(config) / "checkpoints").glob("step-*")
    return sorted(int(folder.name.removeprefix("step-")) for folder in folders)


def test_a_run_learns_and_leaves_what_the_contract_says(make_config: ConfigMaker) -> None:
    config = make_config(train__max_steps="100", log__every_steps="10", eval__every_steps="50")
    train(config)
    run = run_folder(config)
    for name in ("config.yaml", "metrics.jsonl", "tokenizer.json", "curve.png"):
        assert (run / name).stat().st_size > 0, name
    steps, evals = lines(config, "train"), lines(config, "eval")
    assert [line["step"] for line in steps] == [1, *range(10, 101, 10)]
    assert [line["step"] for line in evals] == [50, 100]
    fields = "kind step tokens epoch loss lr grad_norm clipped update_ratio tokens_per_s time_s"
    assert set(steps[0]) >= set(fields.split())
    assert set(evals[0]) >= {"kind", "step", "val_loss", "val_bpb", "train_loss"}
    assert steps[-1]["tokens"] == 100 * 6 * 16
    assert math.isclose(float(str(steps[0]["loss"])), math.log(257), rel_tol=0.1)
    assert float(str(evals[-1]["val_loss"])) < 3.0
    assert 1e-5 < float(str(steps[5]["update_ratio"])) < 1


def test_logged_rate_is_the_one_that_the_step_used(make_config: ConfigMaker) -> None:
    config = make_config(schedule__warmup_steps="4", schedule__min_lr="1e-3")
    train(config)
    rates = [float(str(line["lr"])) for line in lines(config, "train")]
    assert rates[0] == pytest.approx(1e-3)
    assert rates[4] == pytest.approx(1e-2)
    assert rates[-1] == pytest.approx(1e-3)


@pytest.mark.parametrize(
    ("changes", "steps"),
    [
        ({"train__max_steps": "null", "train__max_tokens": "500"}, 6),
        ({"train__max_steps": "7"}, 7),
        ({"train__max_steps": "100", "train__max_tokens": "96"}, 1),
        ({"train__max_steps": "null", "train__max_epochs": "0.05"}, 8),
    ],
)
def test_limits_really_stop(changes: dict[str, str], steps: int, make_config: ConfigMaker) -> None:
    config = make_config(**changes)
    train(config)
    assert lines(config, "train")[-1]["step"] == steps
    assert kept(config)[-1] == steps


def test_time_limit_stops_and_saves(make_config: ConfigMaker) -> None:
    config = make_config(train__max_steps="1000000", train__max_time_s="1")
    train(config)
    last = lines(config, "train")[-1]
    assert 1 <= float(str(last["time_s"])) < 5
    assert kept(config)[-1] == last["step"] == lines(config, "eval")[-1]["step"]


def test_patience_stops_and_the_best_is_what_inference_takes(make_config: ConfigMaker) -> None:
    """A rate that grows worse after the first evaluation: the best stays the early one."""
    config = make_config(
        train__max_steps="400",
        optimizer__lr="3",
        optimizer__name="adam",
        schedule__warmup_steps="100",
        schedule__start_factor="0.001",
        eval__patience="3",
        eval__every_steps="5",
        checkpoint__every_steps="5",
        checkpoint__keep="1",
    )
    train(config)
    losses = {line["step"]: float(str(line["val_loss"])) for line in lines(config, "eval")}
    best = min(losses, key=lambda step: losses[step])
    assert max(losses) == best + 15 < 400
    assert kept(config) == [best, max(losses)]
    assert find_checkpoint(run_folder(config), None).name == f"step-{best:08d}"
    train(config)  # ended is ended: started again, it does not go on
    assert len(lines(config, "eval")) == len(losses)
    assert kept(config) == [best, max(losses)]


def test_keeps_the_newest_k_and_the_best(make_config: ConfigMaker) -> None:
    config = make_config(train__max_steps="40", checkpoint__every_steps="2", checkpoint__keep="3")
    train(config)
    best = json.loads((run_folder(config) / "checkpoints" / "best.json").read_text())
    best_step = int(best["checkpoint"].removeprefix("step-"))
    assert kept(config) == sorted({36, 38, 40, best_step})
    for step in kept(config):
        verify_checkpoint(run_folder(config) / "checkpoints" / f"step-{step:08d}")


def test_nonfinite_loss_stops_before_the_update(
    make_config: ConfigMaker, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make_config(eval__every_steps="100", train__max_steps="20")
    seen: list[dict[str, torch.Tensor]] = []
    inner = gpt.train.train_step

    def poisoned(training, inputs, targets, **more):  # type: ignore[no-untyped-def]
        if training.progress.step == 9:
            seen.append({n: p.detach().clone() for n, p in training.model.named_parameters()})
            monkeypatch.setattr(
                gpt.step, "cross_entropy_sum", lambda logits, _: logits.sum() * math.nan
            )
            try:
                inner(training, inputs, targets, **more)
            finally:
                for name, parameter in training.model.named_parameters():
                    assert torch.equal(seen[0][name], parameter), name
        return inner(training, inputs, targets, **more)

    monkeypatch.setattr(gpt.train, "train_step", poisoned)
    with pytest.raises(UserError) as error:
        train(config)
    assert seen, "the poisoned step was never reached"
    for part in ("step 10", "nan", "--optimizer.lr 3.3e-03", "--run.name tiny-lower-lr"):
        assert part in str(error.value)
    assert kept(config) == [4, 8]
    event = lines(config, "event")[-1]
    assert event["event"] == "nonfinite"
    assert '"loss": "NaN"' in (run_folder(config) / "metrics.jsonl").read_text()
    for line in (run_folder(config) / "metrics.jsonl").read_text().splitlines():
        json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))


def test_nonfinite_gradient_stops_before_the_update(
    make_config: ConfigMaker, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make_config(train__max_steps="20")
    monkeypatch.setattr(gpt.step, "gradient_norm", lambda _: torch.tensor(math.inf))
    with pytest.raises(UserError, match="the gradient of step 1 is inf"):
        train(config)


def test_full_disk_keeps_the_old_ones_and_tries_again(
    make_config: ConfigMaker, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The saves of steps 8 and 12 fail; the first is made good by the next, the last is not."""
    config = make_config(train__max_steps="12", eval__every_steps="100")
    save_file, full = gpt.checkpoint.save_file, {8}

    def fill_disk(tensors, path):  # type: ignore[no-untyped-def]
        if int(path.parent.name[-8:]) in full:
            raise OSError(errno.ENOSPC, "No space left on device")
        save_file(tensors, path)

    monkeypatch.setattr(gpt.checkpoint, "save_file", fill_disk)
    train(config)
    assert kept(config) == [4, 12]
    assert "step 8 could not be saved (No space left on device)" in capsys.readouterr().err
    full.add(12)
    other = make_config(run__name="other", train__max_steps="12", eval__every_steps="100")
    with pytest.raises(UserError, match="last checkpoint"):
        train(other)
    assert kept(other) == [4]
    assert not list(run_folder(other).rglob(".tmp*"))


def test_evaluation_is_the_mean_over_every_validation_token(make_config: ConfigMaker) -> None:
    """Recomputed by hand from the checkpoint: all tokens but the first, once each."""
    config = make_config(eval__max_tokens="null")
    train(config)
    line = lines(config, "eval")[-1]
    folder = run_folder(config) / "checkpoints" / "step-00000012"
    model, tokenizer = load_for_inference(folder, torch.device("cpu"))
    text = Path(str(config.data.source)).read_text(encoding="utf-8")
    ids = torch.tensor(tokenizer.encode(text[int(len(text) * (1 - 0.1)) :]).astype("int64"))
    total = 0.0
    with torch.no_grad():
        for start in range(0, len(ids) - 1, 16):
            window = ids[start : start + 17]
            logits = model(window[None, :-1])[0]
            total += float(torch.nn.functional.cross_entropy(logits, window[1:], reduction="sum"))
    tokens = len(ids) - 1
    assert line["val_tokens"] == tokens
    assert line["val_loss"] == pytest.approx(total / tokens, rel=1e-5)
    assert line["val_bpb"] == pytest.approx(total / tokens / math.log(2), rel=1e-5)


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")  # torch.compile's own
def test_compiled_run_trains(make_config: ConfigMaker) -> None:
    from gpt.device import pick_compile

    if not pick_compile("auto", torch.device("cpu"), 1e18)[0]:
        pytest.skip("no C++ compiler for torch.compile")
    changes = {"model__n_layer": "1", "eval__every_steps": "100", "eval__sample_tokens": "0"}
    eager = make_config(run__name="eager", **changes)
    compiled = make_config(run__name="compiled", train__compile="on", **changes)
    train(eager)
    train(compiled)
    for a, b in zip(lines(eager, "train"), lines(compiled, "train"), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-3)
    names = gpt.checkpoint.safe_open(
        run_folder(compiled) / "checkpoints" / "step-00000012" / "model.safetensors", framework="pt"
    ).keys()
    assert not any("_orig_mod" in name for name in names)
