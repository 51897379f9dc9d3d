"""The loss made slice by slice against plain cross entropy, with its gradients and its memory."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from gpt import headloss
from gpt.checkpoint import Training
from gpt.config import ModelConfig
from gpt.device import autocast
from gpt.headloss import head_loss_pays, head_loss_sum
from gpt.model import GPT
from gpt.step import cross_entropy_sum, loss_sum, train_step
from tests.conftest import ConfigMaker

CPU = torch.device("cpu")
B, T, C, V = 3, 7, 16, 50


@pytest.fixture(autouse=True)
def small_slices(monkeypatch: pytest.MonkeyPatch) -> None:
    """Slices of 8 tokens, blocks of 2: of 21 tokens, the last of both is a part.

    Of the weight's gradient 16 rows are converted at once.
    """
    monkeypatch.setattr(headloss, "_PRODUCT_BYTES", 16 * C * 4)
    monkeypatch.setattr(headloss, "_SLICE_BYTES", 8 * V * 4)
    monkeypatch.setattr(headloss, "_BLOCK_BYTES", 2 * V * 4)


def inputs(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(3)
    features = torch.randn(B, T, C, dtype=dtype, requires_grad=True)
    weight = torch.randn(V, C, dtype=dtype, requires_grad=True)
    return features, weight, torch.randint(V, (B, T))


def plain(features: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(
        F.linear(features, weight).flatten(0, 1).float(), targets.flatten(), reduction="sum"
    )


def gradients(loss: Tensor, *leaves: Tensor) -> tuple[Tensor, ...]:
    return torch.autograd.grad(loss, leaves)


@pytest.mark.parametrize("factor", [1.0, 1 / 21, 3.0])
def test_loss_and_gradients_are_those_of_plain_cross_entropy(factor: float) -> None:
    """Also where the gradient that comes is not the expected one."""
    features, weight, targets = inputs()
    for expected in (1.0, 1 / 21):
        loss = head_loss_sum(features, weight, targets, gradient=expected)
        reference = plain(features, weight, targets)
        torch.testing.assert_close(loss, reference, rtol=1e-6, atol=0)
        ours = gradients(loss * factor, features, weight)
        for a, b in zip(ours, gradients(reference * factor, features, weight), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_far_apart_logits_neither_overflow_nor_vanish() -> None:
    features, weight, targets = inputs()
    with torch.no_grad():
        weight.mul_(1e3)
    loss = head_loss_sum(features, weight, targets, gradient=1.0)
    torch.testing.assert_close(loss, plain(features, weight, targets))
    broken = torch.full_like(features, torch.inf)
    assert not torch.isfinite(head_loss_sum(broken, weight, targets, gradient=1.0))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_with_autocast_it_is_as_near_as_the_plain_one(dtype: torch.dtype) -> None:
    features, weight, targets = inputs()
    exact = gradients(plain(features, weight, targets), features, weight)
    scale = 1024.0
    with autocast(CPU, dtype):
        ours = head_loss_sum(features, weight, targets, gradient=scale)
        theirs = plain(features, weight, targets)
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=0)
    near = gradients(ours * scale, features, weight)
    far = gradients(theirs * scale, features, weight)
    for a, b, truth in zip(near, far, exact, strict=True):
        assert a.dtype is torch.float32
        error, usual = ((x / scale - truth).norm() / truth.norm() for x in (a, b))
        assert error <= 1.1 * usual
        assert usual < 0.02


def test_small_gradients_of_fp16_do_not_vanish() -> None:
    """1e-8 is 0 in fp16: what is expected has to be in the numbers from the start."""
    features, weight, targets = inputs()
    with autocast(CPU, torch.float16):
        loss = head_loss_sum(features, weight, targets, gradient=64.0)
    (grad,) = gradients(loss * 64.0, weight)
    assert (grad != 0).all()


def test_a_second_backward_is_refused_and_without_gradients_none_are_made(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    features, weight, targets = inputs()
    loss = head_loss_sum(features, weight, targets, gradient=1.0)
    loss.backward(retain_graph=True)  # type: ignore[no-untyped-call]
    with pytest.raises(RuntimeError, match="used up"):
        loss.backward()  # type: ignore[no-untyped-call]
    monkeypatch.delattr(headloss, "_add_products")
    with torch.no_grad():
        alone = head_loss_sum(features, weight, targets, gradient=1.0)
    assert not alone.requires_grad
    assert torch.equal(alone, loss)


def test_it_is_for_many_logits_of_a_vocabulary_wider_than_the_model() -> None:
    assert head_loss_pays(1024, 768, 50_257)
    assert not head_loss_pays(1024, 768, 65)
    assert not head_loss_pays(16_384, 384, 300)
    assert not head_loss_pays(64, 64, 4096)


@pytest.mark.parametrize("tied", [True, False])
def test_a_models_gradient_is_the_same_either_way(
    tied: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(4)
    config = ModelConfig(
        n_layer=2, n_head=2, n_embd=C, context_len=T, tie_embeddings=tied, init="gpt2"
    )
    model = GPT(config, V)
    ids, targets = torch.randint(V, (B, T)), torch.randint(V, (B, T))
    found: list[dict[str, Tensor]] = []
    for sliced in (False, True):
        monkeypatch.setattr("gpt.step.head_loss_pays", lambda *_, sliced=sliced: sliced)
        model.zero_grad(set_to_none=True)
        (loss_sum(model, ids, targets) / targets.numel()).backward()  # type: ignore[no-untyped-call]
        found.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    plain_grads, sliced_grads = found
    assert plain_grads.keys() == sliced_grads.keys() == dict(model.named_parameters()).keys()
    for name, grad in sliced_grads.items():
        assert not grad.is_sparse
        torch.testing.assert_close(grad, plain_grads[name], rtol=1e-4, atol=1e-7, msg=name)


def test_a_shared_table_gets_the_gradient_of_a_dense_embedding() -> None:
    """Ids that come more than once, and rows that none reads."""
    torch.manual_seed(5)
    config = ModelConfig(n_layer=1, n_head=2, n_embd=C, context_len=T, tie_embeddings=True)
    model = GPT(config, V)
    ids = torch.tensor([[1, 1, 1, 2, 3, 1, 0]])
    targets = torch.randint(V, (1, T))
    cross_entropy_sum(model(ids), targets).backward()  # type: ignore[no-untyped-call]
    grad = model.tok_emb.weight.grad
    assert grad is not None
    model.zero_grad(set_to_none=True)
    logits = model.head(model.transform(F.embedding(ids, model.tok_emb.weight)))
    cross_entropy_sum(logits, targets).backward()  # type: ignore[no-untyped-call]
    assert model.tok_emb.weight.grad is not None
    torch.testing.assert_close(grad, model.tok_emb.weight.grad, rtol=1e-5, atol=1e-6)


def test_training_with_fp16s_scale_takes_the_same_steps(
    make_config: ConfigMaker, monkeypatch: pytest.MonkeyPatch
) -> None:
    from gpt.build import build_training
    from gpt.data import Batches, open_data

    def losses(sliced: bool, dtype: str) -> list[float]:
        monkeypatch.setattr("gpt.step.head_loss_pays", lambda *_: sliced)
        config = make_config(train__dtype=dtype, train__micro_batch_size="2")
        data = open_data(config, progress=False)
        training: Training = build_training(config, data)[0]
        batches = Batches(data.train, config.model.context_len, config.train.batch_size, 0)
        return [train_step(training, *batches.batch(number)).loss for number in range(4)]

    for dtype, tolerance in (("fp32", 1e-5), ("fp16", 2e-3)):
        assert losses(True, dtype) == pytest.approx(losses(False, dtype), rel=tolerance)
