"""Accumulation changes nothing but rounding; clipping, weights and schedule do what they say."""

import math
import statistics

import pytest
import torch

from gpt.build import build_training
from gpt.checkpoint import Progress
from gpt.data import Batches, eval_batches, open_data
from gpt.gauges import Gauge
from gpt.guard import SpikeGuard
from gpt.record import note_evaluation
from gpt.step import (
    OVERFLOW,
    Evaluation,
    NonFiniteError,
    evaluate,
    gradient_norm,
    loss_sum,
    train_step,
)
from tests.conftest import ConfigMaker


def one_step(make_config: ConfigMaker, **changes: str):  # type: ignore[no-untyped-def]
    config = make_config(**changes)
    data = open_data(config, progress=False)
    training, _ = build_training(config, data)
    batches = Batches(data.train, config.model.context_len, config.train.batch_size, 0)
    before = [p.detach().clone() for p in training.model.parameters()]
    gauge = Gauge(training.model, training.optimizer)
    gauge.watch(full=True, first=False)
    result = train_step(training, *batches.batch(0), gauge=gauge)
    return training, result, (before, gauge)


@pytest.mark.parametrize("micro", ["1", "2", "4", "5"])
def test_micro_batches_give_the_gradient_of_the_whole_batch(
    micro: str, make_config: ConfigMaker
) -> None:
    """Also where the last micro-batch is smaller, which a mean of means would weigh wrongly."""
    whole, one, _ = one_step(make_config)
    parts, many, _ = one_step(make_config, train__micro_batch_size=micro)
    assert many.loss == pytest.approx(one.loss, rel=1e-5)
    assert many.grad_norm == pytest.approx(one.grad_norm, rel=1e-4)
    for a, b in zip(whole.model.parameters(), parts.model.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-3, atol=1e-6)


def test_clipping_limits_the_gradient(make_config: ConfigMaker) -> None:
    _, result, _ = one_step(make_config, train__grad_clip="0")
    assert not result.clipped
    limit = result.grad_norm / 4
    clipped, second, _ = one_step(make_config, train__grad_clip=str(limit))
    assert second.clipped
    assert second.grad_norm == pytest.approx(result.grad_norm)
    norm = gradient_norm([p for p in clipped.model.parameters() if p.grad is not None])
    assert float(norm) == pytest.approx(limit, rel=1e-3)


def test_the_length_of_a_gradient_is_exact_however_large() -> None:
    torch.manual_seed(1)
    shapes = [(20_000_000,), (3000, 700), (7,), ()]
    parameters = [torch.nn.Parameter(torch.zeros(shape)) for shape in shapes]
    for parameter in parameters:
        parameter.grad = torch.randn(parameter.shape) * 1e-3
    parameters[1].grad = (torch.randn(700, 3000) * 1e-3).T  # not in the order of memory
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    exact = math.sqrt(sum(float(gradient.double().square().sum()) for gradient in gradients))
    assert float(gradient_norm(parameters)) == pytest.approx(exact, rel=2e-6)


def test_update_ratio_is_update_over_weights(make_config: ConfigMaker) -> None:
    training, _, (before, gauge) = one_step(make_config)
    after = [p.detach() for p in training.model.parameters()]
    moved = sum(float((a - b).pow(2).sum()) for a, b in zip(after, before, strict=True))
    length = sum(float(b.pow(2).sum()) for b in before)
    assert gauge.moves is not None
    assert gauge.moves.update_ratio == pytest.approx((moved / length) ** 0.5, rel=1e-4)


def test_the_schedule_moves_once_a_step(make_config: ConfigMaker) -> None:
    training, result, _ = one_step(make_config, schedule__warmup_steps="4")
    assert result.lr == pytest.approx(1e-3)
    assert training.optimizer.param_groups[0]["lr"] == pytest.approx(1e-3 + 9e-3 / 4)


def test_an_fp16_gradient_whose_norm_alone_overflows_leaves_the_weights(
    make_config: ConfigMaker,
) -> None:
    """Every element is finite, the sum of their squares is not: the scaler itself would step."""
    config = make_config(train__dtype="fp16", train__grad_clip="null")
    data = open_data(config, progress=False)
    training, _ = build_training(config, data)
    batches = Batches(data.train, config.model.context_len, config.train.batch_size, 0)
    train_step(training, *batches.batch(0))
    before = [p.detach().clone() for p in training.model.parameters()]
    scale = training.scaler.get_scale()
    parameter = training.model.get_parameter("blocks.0.attn.wq.weight")
    hook = parameter.register_hook(lambda g: torch.full_like(g, 1e25))
    result = train_step(training, *batches.batch(1))
    hook.remove()
    assert (result.skipped, result.grad_norm) == (OVERFLOW, math.inf)
    for a, b in zip(training.model.parameters(), before, strict=True):
        assert torch.equal(a, b)
    assert training.scaler.get_scale() == scale / 2
    assert training.scaler.state_dict()["_growth_tracker"] == 0
    assert train_step(training, *batches.batch(1)).skipped == ""


def test_an_evaluation_of_broken_weights_is_no_number(make_config: ConfigMaker) -> None:
    config = make_config()
    data = open_data(config, progress=False)
    training, _ = build_training(config, data)
    with torch.no_grad():
        training.model.get_parameter("head.weight").fill_(math.nan)
    result = evaluate(training, data.val, torch.device("cpu"), lambda: False)
    assert result is not None
    assert math.isnan(result.loss)
    assert result.standard_error is None or math.isnan(result.standard_error)


@pytest.mark.parametrize("broken", [math.nan, math.inf, -math.inf])
def test_a_broken_evaluation_is_never_the_best_and_patience_counts_it(broken: float) -> None:
    progress = Progress()
    best = []
    for loss in (broken, 3.0, broken, 2.0, broken, broken):
        note_evaluation(progress, Evaluation(loss, loss, 1))
        best.append(progress.best_val_loss)
    assert best == [None, 3.0, 3.0, 2.0, 2.0, 2.0]
    assert progress.evals_since_best == 2


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_checkpointed_activations_change_no_bit(make_config: ConfigMaker, dtype: str) -> None:
    """With dropout, whose random numbers have to come again, and with micro-batches."""
    shape = {"model__dropout": "0.2", "train__micro_batch_size": "4", "train__dtype": dtype}
    kept, one, _ = one_step(make_config, **shape)
    again, two, _ = one_step(make_config, **shape, train__activation_checkpointing="true")
    assert again.model.recompute
    assert not kept.model.recompute
    assert (one.loss, one.grad_norm) == (two.loss, two.grad_norm)
    for a, b in zip(kept.model.parameters(), again.model.parameters(), strict=True):
        assert a.grad is not None
        assert b.grad is not None
        assert torch.equal(a.grad, b.grad)
        assert torch.equal(a, b)


def test_checkpointed_blocks_run_a_second_time(make_config: ConfigMaker) -> None:
    config = make_config(train__activation_checkpointing="true")
    data = open_data(config, progress=False)
    training, _ = build_training(config, data)
    batches = Batches(data.train, config.model.context_len, config.train.batch_size, 0)
    calls: list[int] = []
    training.model.blocks[0].attn.register_forward_pre_hook(lambda *_: calls.append(1))
    train_step(training, *batches.batch(0))
    assert len(calls) == 2
    evaluate(training, data.val, torch.device("cpu"), lambda: False)
    assert len(calls) == 2 + 2, "an evaluation of two batches keeps nothing"


def begun(make_config: ConfigMaker, **changes: str):  # type: ignore[no-untyped-def]
    config = make_config(**changes)
    data = open_data(config, progress=False)
    training, _ = build_training(config, data)
    return training, data, Batches(data.train, config.model.context_len, config.train.batch_size, 0)


def test_bits_per_byte_count_the_bytes_of_each_token(make_config: ConfigMaker) -> None:
    changes = {"tokenizer__kind": "bpe", "tokenizer__vocab_size": "300"}
    training, data, _ = begun(make_config, eval__max_tokens="null", **changes)
    result = evaluate(training, data.val, torch.device("cpu"), lambda: False)
    assert result is not None
    ids = data.val.read(1, data.val.n_tokens - 1)
    n_bytes = sum(len(data.tokenizer.token_bytes(int(token))) for token in ids)
    assert n_bytes > 1.5 * result.tokens
    bits = result.loss * result.tokens / math.log(2)
    assert result.bits_per_byte == pytest.approx(bits / n_bytes)


def test_the_standard_error_is_that_of_the_mean_of_batches(make_config: ConfigMaker) -> None:
    changes = {"model__init": "gpt2", "model__init_std": "0.3"}
    training, data, _ = begun(make_config, eval__max_tokens="null", **changes)
    result = evaluate(training, data.val, torch.device("cpu"), lambda: False)
    assert result is not None
    with torch.no_grad():
        means = [
            float(loss_sum(training.model.eval(), x, y)) / y.numel()
            for x, y in eval_batches(data.val, 16, 6, None)
        ]
    assert result.standard_error == pytest.approx(statistics.stdev(means) / len(means) ** 0.5)


@pytest.mark.parametrize("broken", [False, True])
def test_a_step_of_fp16_that_is_not_taken_leaves_the_scaler_ready(
    broken: bool, make_config: ConfigMaker, monkeypatch: pytest.MonkeyPatch
) -> None:
    training, _, batches = begun(make_config, train__dtype="fp16")
    scale, guard = training.scaler.get_scale(), SpikeGuard(6, 5, training.progress)
    with monkeypatch.context() as patch:
        if broken:
            patch.setattr("gpt.step.cross_entropy_sum", lambda x, y: x.float().sum() * math.nan)
            with pytest.raises(NonFiniteError):
                train_step(training, *batches.batch(0))
        else:
            patch.setattr(guard, "outlier", lambda *_: "far above")
            assert train_step(training, *batches.batch(0), guard=guard).skipped == "far above"
    assert train_step(training, *batches.batch(0)).skipped == ""
    assert training.scaler.get_scale() == scale


def test_fp16s_scale_shrinks_to_1_and_no_further(make_config: ConfigMaker) -> None:
    training, _, batches = begun(make_config, train__dtype="fp16")
    training.scaler.load_state_dict(training.scaler.state_dict() | {"scale": 2.0})
    training.model.head.weight.register_hook(lambda gradient: gradient * math.inf)
    assert train_step(training, *batches.batch(0)).skipped == OVERFLOW
    assert training.scaler.get_scale() == 1
    with pytest.raises(NonFiniteError, match="gradient"):
        train_step(training, *batches.batch(0))
