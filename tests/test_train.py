"""Limits, patience, best and kept checkpoints, broken numbers, full disks."""

import errno
import json
import math
from collections.abc import Collection
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import gpt.checkpoint
import gpt.step
import gpt.tensors
import gpt.train
from gpt.checkpoint import load_for_inference, verify_checkpoint
from gpt.config import Config
from gpt.errors import Stopped, UserError
from gpt.metrics import read_metrics
from gpt.rundir import find_checkpoint
from gpt.step import NonFiniteError
from gpt.train import train
from tests.conftest import ConfigMaker
from tests.test_resume import final_state, logged, stop_at


def run_folder(config: Config) -> Path:
    return Path(config.run.dir) / config.run.name


def lines(config: Config, kind: str) -> list[dict[str, object]]:
    return [record for record in read_metrics(run_folder(config)) if record["kind"] == kind]


def kept(config: Config) -> list[int]:
    folders = (run_folder(config) / "checkpoints").glob("step-*")
    return sorted(int(folder.name.removeprefix("step-")) for folder in folders)


def test_a_run_learns_and_leaves_what_the_contract_says(
    make_config: ConfigMaker, pictures: None
) -> None:
    config = make_config(train__max_steps="100", log__every_steps="10", eval__every_steps="50")
    train(config)
    run = run_folder(config)
    for name in ("config.yaml", "metrics.jsonl", "tokenizer.json", "curve.png"):
        assert (run / name).stat().st_size > 0, name
    assert (run / "curve.png").read_bytes().startswith(b"\x89PNG")
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


@pytest.mark.parametrize("recomputes", [False, True])
def test_a_run_that_is_to_be_small_gives_freed_memory_back(
    recomputes: bool, make_config: ConfigMaker, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[bool] = []
    monkeypatch.setattr("gpt.train.keep_freed_memory", asked.append)
    checkpointing = str(recomputes).lower()
    train(make_config(train__max_steps="1", train__activation_checkpointing=checkpointing))
    assert asked == [not recomputes]


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


def poison(monkeypatch: pytest.MonkeyPatch, batches: Collection[int]) -> list[int]:
    """Makes the loss of these batches nan, counted as they come; returns those that came.

    A wrapped step also sees to it that what fails leaves the weights and the rate as they were.
    """
    inner, count = gpt.train.train_step, gpt.step.cross_entropy_sum
    came: list[int] = []

    def step(training, inputs, targets, **more):  # type: ignore[no-untyped-def]
        progress = training.progress
        number = progress.step + progress.skipped_batches
        came.append(number)
        before = [p.detach().clone() for p in training.model.parameters()]
        rate = training.optimizer.param_groups[0]["lr"]
        with monkeypatch.context() as patch:
            if number in batches:
                nan = lambda logits, targets: count(logits, targets) * math.nan  # noqa: E731
                patch.setattr(gpt.step, "cross_entropy_sum", nan)
            try:
                return inner(training, inputs, targets, **more)
            except NonFiniteError:
                for kept_before, parameter in zip(before, training.model.parameters(), strict=True):
                    assert torch.equal(kept_before, parameter)
                assert training.optimizer.param_groups[0]["lr"] == rate
                raise

    monkeypatch.setattr(gpt.train, "train_step", step)
    return came


def test_one_broken_batch_is_passed_over(
    make_config: ConfigMaker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The run ends as it was meant to: all its steps, each at the rate of the plan."""
    clean = make_config(run__name="clean")
    train(clean)
    config = make_config()
    came = poison(monkeypatch, {9})
    train(config)
    assert came == list(range(13)), "no batch comes twice, and one more than there are steps"
    rates = [[line["lr"] for line in lines(c, "train")] for c in (clean, config)]
    assert rates[0] == rates[1]
    assert [line["step"] for line in lines(config, "train")] == list(range(1, 13))
    (event,) = (e for e in lines(config, "event") if e["event"] == "nonfinite")
    assert (event["step"], event["batch"], event["what"], event["cause"]) == (9, 9, "loss", "batch")
    assert [line["skipped"] for line in lines(config, "train")] == [0] * 9 + [1, 0, 0]
    ends = [e for e in lines(config, "event") if e["event"] in ("end", "diverged")]
    assert [e["event"] for e in ends] == ["end"]
    assert '"loss": "NaN"' in (run_folder(config) / "metrics.jsonl").read_text()
    for line in (run_folder(config) / "metrics.jsonl").read_text().splitlines():
        json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))


@pytest.mark.parametrize("limit", [0, 2])
def test_too_many_broken_batches_in_a_row_stop_the_run(
    limit: int, make_config: ConfigMaker, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make_config(train__skip_limit=str(limit), train__max_steps="20")
    came = poison(monkeypatch, range(9, 100))
    with pytest.raises(UserError) as error:
        train(config)
    assert came == list(range(10 + limit))
    checkpoint = run_folder(config) / "checkpoints" / "step-00000008"
    for part in ("loss of step 10", "nan", f"{limit} steps before it", str(checkpoint)):
        assert part in str(error.value)
    assert len(str(error.value).splitlines()) == 1
    assert kept(config) == [4, 8]
    events = [event["event"] for event in lines(config, "event")]
    assert events.count("nonfinite") == limit + 1
    assert events[-2:] == ["diverged", "finding"]
    assert "end" not in events
    diverged = lines(config, "event")[-2]
    assert (diverged["step"], diverged["what"], diverged["cause"]) == (9, "loss", "batch")
    assert math.isnan(float(str(diverged["loss"])))


def test_broken_batches_that_are_not_in_a_row_do_not_stop_it(
    make_config: ConfigMaker, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make_config(train__skip_limit="1")
    came = poison(monkeypatch, range(1, 100, 2))
    train(config)
    assert came == list(range(23))
    state = json.loads((run_folder(config) / "checkpoints/step-00000012/state.json").read_text())
    assert state["progress"]["skipped_batches"] == 11
    assert state["progress"]["tokens"] == 12 * 6 * 16


@pytest.mark.parametrize(
    ("blown_up_at", "words"),
    [
        (9, ("--rate override --optimizer.lr 3.3e-03", "--optimizer.lr 3.3e-03 --rate override")),
        (2, ("--optimizer.lr 3.3e-03 --run.name tiny-lower-lr",)),
    ],
)
def test_a_rate_that_broke_the_weights_is_named_with_what_to_type(
    blown_up_at: int,
    words: tuple[str, ...],
    make_config: ConfigMaker,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With a checkpoint the run goes on from it at a lower rate; without, it is another run."""
    config = make_config(train__max_steps="20", eval__every_steps="100")
    inner = gpt.train.train_step

    def blow_up(training, inputs, targets, **more):  # type: ignore[no-untyped-def]
        if training.progress.step == blown_up_at:
            with torch.no_grad():
                training.model.head.weight.fill_(3e38)
        return inner(training, inputs, targets, **more)

    monkeypatch.setattr(gpt.train, "train_step", blow_up)
    with pytest.raises(UserError) as error:
        train(config)
    message = str(error.value)
    assert any(part in message for part in words), message
    assert "rate is too high" in message
    assert ("step-00000008" in message) == (blown_up_at == 9)
    assert ("there is no checkpoint yet" in message) == (blown_up_at == 2)
    assert lines(config, "event")[-2]["cause"] == "rate"


def test_a_lower_rate_goes_on_from_the_last_good_checkpoint(
    make_config: ConfigMaker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the message says: the same run, `--rate override` and a lower rate."""
    config = make_config(train__max_steps="20")
    with monkeypatch.context() as patch:
        poison(patch, range(9, 100))
        with pytest.raises(UserError):
            train(config)
    lower = make_config(train__max_steps="20", optimizer__lr="3.3e-3")
    train(lower, rate="override")
    assert lines(config, "train")[-1]["step"] == 20
    events = [event["event"] for event in lines(config, "event")]
    assert "resumed" in events
    assert events[-1] == "end" or events[-2] == "end"
    # What the run wrote behind its checkpoint is gone, and with it that it broke.
    assert "diverged" not in events


def test_a_run_that_passed_over_batches_goes_on_as_if_it_had_not_stopped(
    make_config: ConfigMaker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped behind a skipped batch, and between two of them: which batch is next is saved."""
    poison(monkeypatch, {3, 7, 8, 13})
    changes = {"model__dropout": "0.2", "train__max_steps": "16", "log__every_steps": "5"}
    whole, parts = (make_config(run__name=name, **changes) for name in ("whole", "parts"))
    train(whole)
    stops = [4, 6, 11]
    stop_at(monkeypatch, stops)
    for _ in range(3):
        with pytest.raises(Stopped):
            train(parts)
    train(parts)
    assert not stops
    assert final_state(whole, 16) == final_state(parts, 16)
    assert logged(whole) == logged(parts)
    batches = [[e["batch"] for e in lines(c, "event") if "batch" in e] for c in (whole, parts)]
    assert batches == [[3, 7, 8, 13]] * 2


def test_nonfinite_gradient_stops_before_the_update(
    make_config: ConfigMaker, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make_config(train__max_steps="20", train__skip_limit="3")
    monkeypatch.setattr(gpt.step, "gradient_norm", lambda _: torch.tensor(math.inf))
    with pytest.raises(UserError, match="the gradient of step 1 is inf"):
        train(config)
    nonfinite = [e for e in lines(config, "event") if e["event"] == "nonfinite"]
    assert [e["batch"] for e in nonfinite] == [0, 1, 2, 3]
    assert {e["what"] for e in nonfinite} == {"gradient"}


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


def test_a_best_that_could_not_be_saved_leaves_the_one_before(
    make_config: ConfigMaker, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of falling losses 4 is the best saved, 8 the best; afterwards no evaluation comes."""
    config = make_config(
        train__max_steps="14", eval__every_steps="4", eval__patience="99", checkpoint__keep="1"
    )
    losses = iter([3.0, 2.0, 2.5, 2.6])
    evaluate, save_file = gpt.train.evaluate, gpt.checkpoint.save_file

    def as_wished(*arguments: Any) -> Any:
        return replace(evaluate(*arguments), loss=next(losses))

    def fill_disk(tensors: object, path: Path) -> None:
        if path.parent.name.endswith("8"):
            raise OSError(errno.ENOSPC, "No space left on device")
        save_file(tensors, path)

    monkeypatch.setattr(gpt.train, "evaluate", as_wished)
    monkeypatch.setattr(gpt.checkpoint, "save_file", fill_disk)
    train(config)
    assert kept(config) == [4, 14]
    assert find_checkpoint(run_folder(config), None).name == "step-00000004"
    assert "damaged" not in capsys.readouterr().err


def test_a_run_killed_before_its_best_json_makes_up_for_it(make_config: ConfigMaker) -> None:
    config = make_config(train__max_steps="12", eval__every_steps="4")
    train(config)
    best = run_folder(config) / "checkpoints" / "best.json"
    written = best.read_bytes()
    best.unlink()
    train(config)
    assert best.read_bytes() == written


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
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")  # as well
def test_a_compiled_run_trains_and_is_measured(make_config: ConfigMaker) -> None:
    from gpt.device import pick_compile

    if not pick_compile("auto", torch.device("cpu"), 1e18)[0]:
        pytest.skip("no C++ compiler for torch.compile")
    changes = {"model__n_layer": "1", "eval__every_steps": "100", "eval__sample_tokens": "0"}
    eager = make_config(run__name="eager", **changes)
    compiled = make_config(run__name="compiled", train__compile="on", **changes)
    train(eager)
    torch._dynamo.utils.counters.clear()
    train(compiled)
    assert torch._dynamo.utils.counters["frames"]["ok"] > 0, "else both are eager"
    for a, b in zip(lines(eager, "train"), lines(compiled, "train"), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-3)
        assert a["update_ratio"] == pytest.approx(b["update_ratio"], rel=1e-2)
    layers = zip(lines(eager, "layers"), lines(compiled, "layers"), strict=True)
    for a, b in layers:
        assert a["update_ratio"].keys() == b["update_ratio"].keys()
        assert a["rms"].keys() == b["rms"].keys() == {"blocks.0"}
    names = gpt.tensors.safe_open(
        run_folder(compiled) / "checkpoints" / "step-00000012" / "model.safetensors", framework="pt"
    ).keys()
    assert not any("_orig_mod" in name for name in names)
