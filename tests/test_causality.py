"""No logit depends on a later token: by gradient, for every option of the architecture."""

from typing import Any

import pytest
import torch

from gpt.config import ModelConfig
from gpt.model import GPT

V, T = 19, 7
OPTIONS: list[dict[str, Any]] = [
    {},
    {"position": "learned"},
    {"norm": "layernorm"},
    {"activation": "gelu"},
    {"activation": "gelu_tanh"},
    {"activation": "swiglu"},
    {"bias": True},
    {"tie_embeddings": True},
    {"n_kv_head": 2},
    {"n_kv_head": 1},
    {"qk_norm": False},
    {"preset": "gpt2-124m"},
    {"preset": "llama-1.1b", "n_kv_head": 2, "n_hidden": None},
]


def build(options: dict[str, Any]) -> GPT:
    torch.manual_seed(21)
    shape = {"n_layer": 2, "n_head": 4, "n_embd": 32, "context_len": 8, "init": "gpt2"}
    return GPT(ModelConfig(**{**shape, "init_std": 0.2, **options, **shape}), V)


def gradient(model: GPT, at: int) -> torch.Tensor:
    """How strongly the logits at one place depend on each token's embedding: (T,)."""
    x = torch.randn(1, T, 32, generator=torch.Generator().manual_seed(22), requires_grad=True)
    logits = model.head(model.transform(x))
    logits[0, at].square().sum().backward()
    assert x.grad is not None
    return x.grad[0].abs().amax(-1)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_gradient_reaches_no_later_token(options: dict[str, Any]) -> None:
    model = build(options)
    for at in range(T):
        reached = gradient(model, at)
        assert (reached[at + 1 :] == 0).all(), f"logits at {at} see a later token"
        assert (reached[: at + 1] > 0).all(), f"logits at {at} miss an earlier token"


def test_dropout_keeps_causality() -> None:
    model = build({"dropout": 0.3}).train()
    for at in range(T):
        assert (gradient(model, at)[at + 1 :] == 0).all()


def test_forward_is_transform_of_embeddings() -> None:
    model = build({})
    ids = torch.arange(T)[None]
    torch.testing.assert_close(model.head(model.transform(model.tok_emb(ids))), model(ids))
