"""A tiny model learns one batch by heart."""

from typing import Any

import pytest
import torch
from torch.nn.functional import cross_entropy

from gpt.config import ModelConfig
from gpt.model import GPT

V = 16


@pytest.mark.parametrize(
    "options",
    [{}, {"preset": "gpt2-124m"}, {"preset": "llama-1.1b", "n_kv_head": 1, "n_hidden": None}],
    ids=["default", "gpt2", "llama"],
)
def test_learns_one_batch(options: dict[str, Any]) -> None:
    torch.manual_seed(31)
    shape = {"n_layer": 2, "n_head": 2, "n_embd": 32, "context_len": 16}
    model = GPT(ModelConfig(**{**options, **shape}), V)
    ids = torch.randint(V, (4, 17))
    ids[:, 0] = torch.arange(4)  # the first token tells which sequence it is
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.0)
    loss = torch.tensor(float("inf"))
    for _ in range(150):
        loss = cross_entropy(model(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.05
