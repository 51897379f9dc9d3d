"""What broke a step is told apart: the rate, an overflow of fp16, or the batch; and where."""

import copy
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from gpt.autopsy import LOST_LOGIT, Autopsy, examine, out_of_range
from gpt.build import build_training
from gpt.checkpoint import Training
from gpt.data import Batches, open_data
from gpt.device import rng_state
from gpt.step import NonFiniteError, train_step
from tests.conftest import ConfigMaker

Batch = tuple[Tensor, Tensor]


def begin(make_config: ConfigMaker, **changes: str) -> tuple[Training, Batch]:
    """A training after a few sound steps, and its next batch."""
    config = make_config(train__max_steps="100", **changes)
    data = open_data(config, progress=False)
    training, _ = build_training(config, data)
    batches = Batches(data.train, config.model.context_len, config.train.batch_size, 3)
    for step in range(4):
        train_step(training, *batches.batch(step))
    return training, batches.batch(4)


def broken_step(training: Training, batch: Batch) -> Autopsy:
    """The autopsy of a step that has to fail; nothing but gradients may have changed."""
    before = copy.deepcopy(training.model.state_dict())
    with pytest.raises(NonFiniteError):
        train_step(training, *batch)
    for name, value in training.model.state_dict().items():
        assert torch.equal(value.nan_to_num(7), before[name].nan_to_num(7)), name
    training.model.train()
    state = rng_state()
    found = examine(training, *batch)
    assert training.model.training
    assert all(torch.equal(state[name], value) for name, value in rng_state().items())
    for name, value in training.model.state_dict().items():
        assert torch.equal(value.nan_to_num(7), before[name].nan_to_num(7)), name
    assert not any(module._forward_hooks for module in training.model.modules())
    return found


@torch.no_grad()
def scale(training: Training, name: str, factor: float) -> None:
    training.model.get_parameter(name).mul_(factor)


@pytest.mark.parametrize("micro", ["null", "4"])
def test_weights_that_have_blown_up(micro: str, make_config: ConfigMaker) -> None:
    """Finite, but so large that the MLP's products are not."""
    training, batch = begin(make_config, train__micro_batch_size=micro)
    scale(training, "blocks.1.mlp.up.weight", 1e30)
    scale(training, "blocks.1.mlp.down.weight", 1e30)
    found = broken_step(training, batch)
    assert found.cause == "rate"
    assert found.where == "blocks.1.mlp.down"
    assert found.rows == tuple(range(6))


def test_logits_beyond_any_use(make_config: ConfigMaker) -> None:
    training, batch = begin(make_config)
    scale(training, "head.weight", 1e38)
    scale(training, "final_norm.weight", 1e3)
    found = broken_step(training, batch)
    assert found.cause == "rate"
    assert found.where == "head"
    assert found.largest_logit > 1e3


def test_weights_that_are_no_numbers(make_config: ConfigMaker) -> None:
    training, batch = begin(make_config)
    with torch.no_grad():
        training.model.get_parameter("blocks.0.attn.wq.weight")[0, 0] = math.nan
    found = broken_step(training, batch)
    assert found.cause == "rate"
    assert found.where == "blocks.0.attn.wq"


def test_a_lost_model_whose_gradient_breaks(make_config: ConfigMaker) -> None:
    """Logits of tens of thousands give a finite loss, far above ln V."""
    training, batch = begin(make_config)
    scale(training, "head.weight", 1e6)
    hook = training.model.get_parameter("tok_emb.weight").register_hook(lambda g: g * math.inf)
    found = broken_step(training, batch)
    hook.remove()
    assert found.cause == "rate"
    assert found.where == "tok_emb.weight"
    assert found.rows == ()
    assert 1e3 < found.largest_logit < math.inf


def fp16(make_config: ConfigMaker) -> tuple[Training, Batch]:
    """Sound steps in fp32, then autocast to fp16, which works on a CPU too."""
    training, batch = begin(make_config, model__activation="relu2", train__dtype="fp32")
    training.dtype = torch.float16
    return training, batch


def test_a_hidden_feature_beyond_what_fp16_holds(make_config: ConfigMaker) -> None:
    """65,504 is its largest number: up and down give each other a factor, in fp32 it cancels."""
    training, batch = fp16(make_config)
    scale(training, "blocks.0.mlp.up.weight", 1e4)
    scale(training, "blocks.0.mlp.down.weight", 1e-8)
    found = broken_step(training, batch)
    assert found.cause == "overflow"
    assert found.where == "blocks.0.mlp.down"
    assert found.rows == tuple(range(6))
    assert found.largest_logit < 1e3


def test_an_overflow_in_some_rows_alone(make_config: ConfigMaker) -> None:
    """One token's embedding is large enough: no other sequence has it."""
    training, (inputs, targets) = fp16(make_config)
    inputs = inputs.clamp(max=199)
    inputs[4, 2] = 250
    with torch.no_grad():
        training.model.get_parameter("blocks.1.attn.wv.weight").zero_()[0, 0] = 6e4
        training.model.get_parameter("blocks.1.attn.wo.weight").mul_(1e-6)
        training.model.get_parameter("blocks.1.attn_norm.weight").fill_(1e-4)[0] = 1.0
        training.model.get_parameter("tok_emb.weight")[:200, 0] = 0.0
        training.model.get_parameter("tok_emb.weight")[250, 0] = 100.0
    found = examine(training, inputs, targets)
    assert found.cause == "overflow"
    assert found.where == "blocks.1.attn.wv"
    assert found.rows == (4,)


def test_weights_that_have_blown_up_in_fp16_are_the_rates(make_config: ConfigMaker) -> None:
    training, batch = fp16(make_config)
    scale(training, "head.weight", 1e7)
    found = broken_step(training, batch)
    assert found.cause == "rate"


def test_a_gradient_that_is_poisoned(make_config: ConfigMaker) -> None:
    training, batch = begin(make_config)
    hook = training.model.get_parameter("blocks.1.attn.wo.weight").register_hook(
        lambda g: g * math.nan
    )
    found = broken_step(training, batch)
    hook.remove()
    assert found.cause == "batch"
    assert found.where == "blocks.1.attn.wo.weight"
    assert found.rows == ()
    assert found.largest_logit < 100


def poison_row(training: Training, rows: set[int], batch: Batch) -> Callable[[], None]:
    """Makes a kernel fail on some sequences: the second block's MLP gives nan for them."""
    marks = [batch[0][row] for row in rows]
    seen: list[Tensor] = []

    def note(_module: object, inputs: tuple[Tensor, ...]) -> None:
        seen[:] = [inputs[0]]

    def spoil(_module: object, _inputs: object, out: Tensor) -> Tensor:
        hit = torch.tensor([any(torch.equal(ids, mark) for mark in marks) for ids in seen[0]])
        return torch.where(hit[:, None, None], math.nan, out)

    first = training.model.register_forward_pre_hook(note)
    second = training.model.blocks[1].mlp.up.register_forward_hook(spoil)

    def undo() -> None:
        first.remove()
        second.remove()

    return undo


@pytest.mark.parametrize("micro", ["null", "4", "1"])
@pytest.mark.parametrize("rows", [{2}, {0, 5}])
def test_a_row_that_is_poisoned(rows: set[int], micro: str, make_config: ConfigMaker) -> None:
    training, batch = begin(make_config, train__micro_batch_size=micro)
    undo = poison_row(training, rows, batch)
    with pytest.raises(NonFiniteError):
        train_step(training, *batch)
    found = examine(training, *batch)
    undo()
    assert found.cause == "batch"
    assert found.where == "blocks.1.mlp.up"
    assert found.rows == tuple(sorted(rows))
    assert found.record() == {
        "cause": "batch",
        "where": "blocks.1.mlp.up",
        "rows": sorted(rows),
        "largest_logit": found.largest_logit,
    }


def test_a_batch_that_is_well_when_looked_at_again(make_config: ConfigMaker) -> None:
    training, batch = begin(make_config)
    found = examine(training, *batch)
    assert (found.cause, found.where, found.rows) == ("batch", "", ())
    assert 0 < found.largest_logit < 100
    assert found.largest_logit < LOST_LOGIT


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_one_number_of_weights_or_optimizer_that_is_out_of_range(
    value: float, make_config: ConfigMaker
) -> None:
    training, _ = begin(make_config)
    assert out_of_range(training) == ""
    parameter = training.model.get_parameter("blocks.1.mlp.up.weight")
    average = training.optimizer.state[parameter]["exp_avg_sq"]
    with torch.no_grad():
        parameter[3, 4] = 9e17
        average[1, 2] = 3e38  # the largest numbers are numbers
        assert out_of_range(training) == ""
        parameter[3, 4] = -2e18
        assert out_of_range(training) == "blocks.1.mlp.up.weight"
        parameter[3, 4] = 0
        average[1, 2] = value
        assert out_of_range(training) == "the optimizer's exp_avg_sq of blocks.1.mlp.up.weight"
        parameter[3, 4] = value
        assert out_of_range(training) == "blocks.1.mlp.up.weight"
