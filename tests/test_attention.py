"""Attention's own way back, and dropout's own choices, against torch's."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import gpt.attention
from gpt.attention import causal_attention, dense_backward_pays
from gpt.config import ModelConfig
from gpt.dropout import Dropout
from gpt.model import GPT

BF16 = torch.bfloat16


def drawn(batch: int, heads: int, kv_heads: int, length: int, dtype: torch.dtype) -> list[Tensor]:
    """q, k, v (B, H, T, D) as a model has them, transposed in memory, and a gradient of y."""
    torch.manual_seed(1)
    q, k, v, dy = (
        torch.randn(batch, length, n, 16).to(BF16).to(dtype).transpose(1, 2)
        for n in (heads, kv_heads, kv_heads, heads)
    )
    return [*(each.requires_grad_() for each in (q, k, v)), dy]


def exact(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)


def errors(found: tuple[Tensor, ...], wanted: tuple[Tensor, ...]) -> list[float]:
    pairs = zip(found, wanted, strict=True)
    return [float((a.float() - b.float()).norm() / b.float().norm()) for a, b in pairs]


@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (6, 2)])
@pytest.mark.parametrize("length", [1, 7, 64, 200])
def test_attention_is_torchs_and_its_gradients_are_as_good(
    heads: int, kv_heads: int, length: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpt.attention, "_SCORES", 3 * length**2)  # three heads at a time
    q, k, v, dy = drawn(2, heads, kv_heads, length, torch.float64)
    wanted = torch.autograd.grad(exact(q, k, v), (q, k, v), dy)
    q, k, v, dy = drawn(2, heads, kv_heads, length, BF16)
    y = causal_attention(q, k, v, None)
    assert torch.equal(y, exact(q, k, v))
    for found, most in zip(
        errors(torch.autograd.grad(y, (q, k, v), dy), wanted), (0.01, 0.01, 0.008), strict=True
    ):
        assert found < most or length == 1  # one token alone: its q and k have no gradient


def test_features_that_are_no_neighbours_are_read_right() -> None:
    """As of heads of two features, whose halves the rotation puts together."""
    q, k, v, dy = (torch.randn(2, 4, 2, 8).to(BF16).mT for _ in range(4))  # (B, H, T, 2)
    assert q.stride(-1) != 1
    some = [each.requires_grad_() for each in (q, k, v)]
    y = causal_attention(q, k, v, None)
    wanted = exact(*(each.contiguous() for each in some))
    assert torch.equal(y, wanted)
    found = torch.autograd.grad(y, some, dy)
    for error in errors(found, torch.autograd.grad(wanted, some, dy)):
        assert error < 0.02


def test_a_first_token_alone_has_no_gradient_but_its_value() -> None:
    q, k, v, dy = drawn(1, 2, 2, 1, BF16)
    dq, dk, dv = torch.autograd.grad(causal_attention(q, k, v, 0.3), (q, k, v), dy)
    assert not dq.any()
    assert not dk.any()
    assert torch.equal(dv, dy)


def test_it_is_for_training_in_bf16_on_short_sequences() -> None:
    q, k, v, _ = drawn(1, 2, 2, 8, BF16)
    assert dense_backward_pays(q, k, v)
    assert not dense_backward_pays(q.float(), k.float(), v.float())
    assert not dense_backward_pays(*(each.detach() for each in (q, k, v)))
    with torch.no_grad():
        assert not dense_backward_pays(q, k, v)
    q, k, v, _ = drawn(1, 1, 1, gpt.attention.LONGEST + 1, BF16)
    assert not dense_backward_pays(q, k, v)


def test_a_model_trains_through_it(monkeypatch: pytest.MonkeyPatch) -> None:
    model = GPT(ModelConfig(n_layer=2, n_head=4, n_kv_head=2, n_embd=32, context_len=24), 11)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.1)
    ids = torch.randint(11, (2, 24), generator=torch.Generator().manual_seed(3))

    def gradients() -> tuple[Tensor, ...]:
        with torch.autocast("cpu", BF16):
            loss = F.cross_entropy(model(ids).flatten(0, 1), ids.flatten())
        return torch.autograd.grad(loss, list(model.parameters()))

    calls = []
    kept = gpt.attention._gradients
    monkeypatch.setattr(gpt.attention, "_gradients", lambda *a: calls.append(1) or kept(*a))
    ours = gradients()
    assert len(calls) == 2
    monkeypatch.setattr("gpt.model.dense_backward_pays", lambda *_: False)
    assert max(errors(ours, gradients())) < 0.03


@pytest.mark.parametrize("dtype", [torch.float32, BF16])
@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_dropout_drops_its_share_and_keeps_the_mean(p: float, dtype: torch.dtype) -> None:
    torch.manual_seed(4)
    x = torch.ones(301, 1003, dtype=dtype, requires_grad=True)
    with torch.autocast("cpu", BF16):
        y = Dropout(p)(x)
    share = float((y == 0).float().mean())
    assert share == pytest.approx(p, abs=5 * (p * (1 - p) / x.numel()) ** 0.5)
    assert float(y.detach().max()) == pytest.approx(
        1 / (1 - p), rel=1e-4 if dtype != BF16 else 1e-2
    )
    y.sum().backward()
    assert x.grad is not None
    assert torch.equal(x.grad, y.detach())
    # Neighbours, which come out of one random number, are dropped independently.
    dropped = (y.detach() == 0).float().flatten()
    both = float((dropped[:-1] * dropped[1:]).mean())
    assert both == pytest.approx(p**2, abs=0.01)


def test_dropout_is_repeated_by_its_seed_and_off_in_evaluation() -> None:
    x, layer = torch.randn(5, 7), Dropout(0.3)
    with torch.autocast("cpu", BF16):
        torch.manual_seed(1)
        first = layer(x)
        torch.manual_seed(1)
        assert torch.equal(layer(x), first)
        assert torch.equal(layer.eval()(x), x)
        assert torch.equal(Dropout(0.0)(x), x)
        assert not Dropout(1.0)(x).any()


def test_dropout_in_fp32_is_torchs_to_the_bit() -> None:
    x = torch.randn(50, 70)
    torch.manual_seed(1)
    first = Dropout(0.3)(x)
    torch.manual_seed(1)
    assert torch.equal(nn.Dropout(0.3)(x), first)
