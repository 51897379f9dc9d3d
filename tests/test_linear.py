"""Linear layers whose products are cut: the numbers of nn.Linear, and cut only where told."""

from unittest.mock import patch

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import gpt.linear
from gpt.linear import Linear, _product

ROWS, INPUTS, OUTPUTS = 647, 512, 640


@pytest.fixture(autouse=True)
def two_amx_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpt.linear, "_has_two_amx_threads", lambda: True)


def results(layer: nn.Module, x: torch.Tensor, grad: torch.Tensor) -> list[torch.Tensor]:
    x = x.clone().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    y.backward(grad)
    return [y.detach(), x.grad, *(parameter.grad for parameter in layer.parameters())]


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # dynamo's
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize(("inputs", "outputs"), [(INPUTS, OUTPUTS), (OUTPUTS, INPUTS)])
def test_outputs_and_gradients_are_those_of_nn_linear(inputs, outputs, compiled, bias) -> None:
    torch.manual_seed(1)
    plain, cut = nn.Linear(inputs, outputs, bias=bias), Linear(inputs, outputs, bias=bias)
    cut.load_state_dict(plain.state_dict())
    if compiled:
        torch._dynamo.reset()
        cut.compile(backend="aot_eager", fullgraph=True)
    x, grad = torch.randn(1, ROWS, inputs), torch.randn(1, ROWS, outputs).bfloat16()
    with patch.object(gpt.linear, "parts", wraps=gpt.linear.parts) as cuts:
        made = results(cut, x, grad)
    sizes = {call.args[1] for call in cuts.call_args_list}
    assert (ROWS + 1) // 2 in sizes, "forward or back, one of the products is cut"
    for mine, theirs in zip(made, results(plain, x, grad), strict=True):
        assert (mine.dtype, mine.stride()) == (theirs.dtype, theirs.stride())
        torch.testing.assert_close(mine, theirs, rtol=8e-3, atol=8e-3)


def test_only_products_that_leave_a_core_idle_are_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    # The products themselves, which take seconds where bf16 is emulated, are not what is asked.
    monkeypatch.setattr(torch, "mm", lambda a, b, *, out: out.zero_())
    zeros = lambda a, b: a.new_zeros(a.shape[0], b.shape[1])  # noqa: E731
    monkeypatch.setattr(torch.Tensor, "__matmul__", zeros)
    monkeypatch.setattr(F, "linear", lambda x, weight, bias: x[:, :1] + weight[:, 0])
    layer, wide = Linear(768, 768, bias=False), Linear(768, 2304, bias=False)
    rows = torch.randn(1024, 768)

    def cut_at(layer: Linear, x: torch.Tensor, dtype: torch.dtype | None) -> set[int]:
        """The sizes of parts of the products that are not left to nn.Linear."""
        with patch.object(gpt.linear, "parts", wraps=gpt.linear.parts) as cuts:
            with torch.autocast("cpu", dtype or torch.bfloat16, enabled=dtype is not None):
                y = layer(x)
            y.sum().backward()
        return {call.args[1] for call in cuts.call_args_list}

    assert cut_at(layer, rows, torch.bfloat16) == {512}
    assert cut_at(wide, rows, torch.bfloat16) == {1024}, "whole, and x needs no gradient"
    assert cut_at(wide, rows.clone().requires_grad_(), torch.bfloat16) == {1024, 512}
    for other in (rows[:640], rows.repeat(2, 1)):
        assert cut_at(layer, other, torch.bfloat16) == set()
    assert cut_at(layer, rows, None) == set()
    monkeypatch.setattr(gpt.linear, "_has_two_amx_threads", lambda: False)
    assert cut_at(layer, rows, torch.bfloat16) == {1024}


def test_the_compiler_is_told_the_truth() -> None:
    a, b = torch.randn(ROWS, INPUTS).bfloat16(), torch.randn(OUTPUTS, INPUTS).bfloat16().mT
    torch.library.opcheck(_product, (a, b, None))
    torch.library.opcheck(_product, (a, b, torch.randn(OUTPUTS).bfloat16()))
