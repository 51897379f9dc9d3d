"""Accumulation changes nothing but rounding; clipping, weights and schedule do what they say."""

import pytest
import torch

from gpt.build import build_training
from gpt.data import Batches, open_data
from gpt.gauges import Gauge
from gpt.step import gradient_norm, train_step
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
