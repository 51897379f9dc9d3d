"""The model's parts, its initialisation, and the inventory of its parameters."""

import itertools
import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gpt.config import PRESETS, ModelConfig
from gpt.model import (
    GPT,
    Attention,
    count_parameters,
    flops_per_token,
    parameter_inventory,
    rotary_tables,
    rotate,
)

V = 37


def small(**options: Any) -> ModelConfig:
    return ModelConfig(**{"n_layer": 2, "n_head": 4, "n_embd": 32, "context_len": 16, **options})


def build(config: ModelConfig, seed: int = 0) -> GPT:
    torch.manual_seed(seed)
    return GPT(config, V)


shapes = st.fixed_dictionaries(
    {
        "n_layer": st.integers(1, 3),
        "n_head": st.sampled_from([2, 4]),
        "n_kv_head": st.sampled_from([None, 1, 2]),
        "n_embd": st.sampled_from([16, 32]),
        "n_hidden": st.sampled_from([None, 24]),
        "context_len": st.integers(1, 20),
        "position": st.sampled_from(["learned", "rotary"]),
        "norm": st.sampled_from(["layernorm", "rmsnorm"]),
        "activation": st.sampled_from(["gelu", "gelu_tanh", "swiglu", "relu2"]),
        "bias": st.booleans(),
        "tie_embeddings": st.booleans(),
        "qk_norm": st.booleans(),
        "init": st.sampled_from(["gpt2", "zero_proj"]),
    }
)


def evaluate(formula: str, config: ModelConfig) -> int:
    """The number that a formula of the inventory stands for."""
    if formula.startswith("shared"):
        return 0
    names = {"V": V, "d": config.n_embd, "layers": config.n_layer, "d_ff": config.hidden}
    names["context"] = config.context_len
    text = formula.replace("·", "*").replace("²", "**2")
    return int(eval(text, {"__builtins__": {}}, names))


@settings(max_examples=80, deadline=None, derandomize=True)
@given(options=shapes, vocab_size=st.integers(1, 50))
def test_inventory_counts_every_parameter(options: dict[str, Any], vocab_size: int) -> None:
    config = ModelConfig(**options)
    rows = parameter_inventory(config, vocab_size)
    model = GPT(config, vocab_size)
    assert sum(row.count for row in rows) == count_parameters(model)
    assert len({row.name for row in rows}) == len(rows)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(options=shapes)
def test_inventory_formulas_give_their_counts(options: dict[str, Any]) -> None:
    config = ModelConfig(**options)
    for row in parameter_inventory(config, V):
        assert evaluate(row.formula, config) == row.count, row


@settings(max_examples=40, deadline=None, derandomize=True)
@given(options=shapes)
def test_every_combination_of_options_runs_and_trains(options: dict[str, Any]) -> None:
    model = build(ModelConfig(**{**options, "init": "gpt2"}))
    ids = torch.randint(V, (2, options["context_len"]))
    logits = model(ids)
    assert logits.shape == (2, options["context_len"], V)
    logits.logsumexp(-1).sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_inventory_has_the_chapters_formulas() -> None:
    config = small(position="learned", norm="layernorm", activation="gelu_tanh")
    rows = {row.name: row for row in parameter_inventory(config, V)}
    assert rows["token embedding"].formula == "V·d"
    assert rows["attention Wq Wk Wv Wo"].formula == "layers·4·d²"
    assert rows["FFN"].formula == "layers·2·d·d_ff"
    assert rows["output Wp"].formula == "d·V"


@pytest.mark.parametrize(
    ("preset", "millions"),
    [("gpt2-124m", 124.4), ("gpt2-355m", 354.8), ("gpt2-774m", 774.0), ("gpt2-1.5b", 1557.6)],
)
def test_gpt2_presets_have_the_published_sizes(preset: str, millions: float) -> None:
    assert preset in PRESETS
    rows = parameter_inventory(ModelConfig(preset=preset), 50257)
    assert sum(row.count for row in rows) / 1e6 == pytest.approx(millions, abs=0.05)


def test_flops_are_six_per_weight_and_attention() -> None:
    config = small(activation="gelu_tanh")
    weights = 2 * (4 * 32 * 32 + 2 * 32 * 128) + 32 * V
    assert flops_per_token(config, V) == 6 * weights + 12 * 2 * 32 * 16
    tied = small(activation="gelu_tanh", tie_embeddings=True)
    assert flops_per_token(tied, V) == flops_per_token(config, V)


def test_state_dict_names_read_well() -> None:
    names = set(build(small(position="learned", activation="swiglu")).state_dict())
    block = ["attn_norm", "attn.wq", "attn.wk", "attn.wv", "attn.wo", "mlp_norm"]
    block += ["mlp.up", "mlp.gate", "mlp.down"]
    expected = {f"blocks.{n}.{part}.weight" for n in range(2) for part in block}
    expected |= {"tok_emb.weight", "pos_emb.weight", "final_norm.weight", "head.weight"}
    assert names == expected


def test_tied_head_is_the_embedding() -> None:
    model = build(small(tie_embeddings=True))
    assert model.head.weight is model.tok_emb.weight


@pytest.mark.parametrize("init", ["gpt2", "zero_proj"])
def test_initialisation_is_a_function_of_the_seed(init: str) -> None:
    first, again, other = (build(small(init=init), seed).state_dict() for seed in (1, 1, 2))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["tok_emb.weight"], other["tok_emb.weight"])


def test_gpt2_initialisation_scales_residual_outputs_by_depth() -> None:
    config = small(n_layer=3, n_embd=128, init="gpt2", init_std=0.05, bias=True)
    model = build(config)
    for name, weight in model.state_dict().items():
        if name.endswith(("wo.weight", "down.weight")):
            assert weight.std().item() == pytest.approx(0.05 / math.sqrt(6), rel=0.05), name
        elif name.endswith("bias"):
            assert not weight.any(), name
        elif "norm" not in name:
            assert weight.std().item() == pytest.approx(0.05, rel=0.05), name


@pytest.mark.parametrize("tied", [False, True])
def test_zero_projections_start_as_the_identity(tied: bool) -> None:
    config = small(n_embd=128, init="zero_proj", activation="swiglu", tie_embeddings=tied)
    model = build(config)
    weights = model.state_dict()
    for n in range(config.n_layer):
        assert not weights[f"blocks.{n}.attn.wo.weight"].any()
        assert not weights[f"blocks.{n}.mlp.down.weight"].any()
        for part in ("attn.wq", "attn.wk", "attn.wv", "mlp.up", "mlp.gate"):
            std = weights[f"blocks.{n}.{part}.weight"].std().item()
            assert std == pytest.approx(1 / math.sqrt(128), rel=0.05), part
    assert weights["tok_emb.weight"].std().item() == pytest.approx(0.02, rel=0.05)
    loss = torch.nn.functional.cross_entropy(model(torch.arange(8)[None])[0], torch.arange(8) + 1)
    if not tied:
        assert not weights["head.weight"].any()
        assert loss.item() == pytest.approx(math.log(V), abs=1e-5)


def plain_attention(layer: Attention, x: torch.Tensor) -> torch.Tensor:
    """Attention written out: one query, one key at a time."""
    size, heads = layer.head_dim, layer.wq.out_features // layer.head_dim
    q, k, v = layer.wq(x), layer.wk(x), layer.wv(x)
    group = heads // (k.size(-1) // size)
    out = torch.zeros_like(q)
    for b, t, h in itertools.product(range(x.size(0)), range(x.size(1)), range(heads)):
        mine = slice(h * size, (h + 1) * size)
        shared = slice(h // group * size, (h // group + 1) * size)
        scores = torch.stack([q[b, t, mine] @ k[b, s, shared] for s in range(t + 1)])
        weights = (scores / math.sqrt(size)).softmax(0)
        out[b, t, mine] = weights @ v[b, : t + 1, shared]
    return layer.wo(out)


@pytest.mark.parametrize("n_kv_head", [None, 2, 1])
@pytest.mark.parametrize("bias", [False, True])
def test_attention_equals_the_formula(n_kv_head: int | None, bias: bool) -> None:
    torch.manual_seed(3)
    layer = Attention(small(n_kv_head=n_kv_head, qk_norm=False, bias=bias), 0)
    x = torch.randn(2, 5, 32)
    torch.testing.assert_close(layer(x, None, None), plain_attention(layer, x))


def test_qk_norm_makes_scores_independent_of_scale() -> None:
    torch.manual_seed(4)
    layer = Attention(small(qk_norm=True), 0)
    x = torch.randn(2, 5, 32)
    before = layer(x, None, None)
    with torch.no_grad():
        layer.wq.weight *= 100
        layer.wk.weight *= 0.5
    torch.testing.assert_close(layer(x, None, None), before, atol=1e-4, rtol=1e-3)


def test_rotary_scores_depend_on_distance_only() -> None:
    torch.manual_seed(5)
    cos, sin = rotary_tables(64, 8, 10000.0)
    q, k = torch.randn(8), torch.randn(8)

    def score(at: int, to: int) -> float:
        turned_q = rotate(q[None], (cos[at : at + 1], sin[at : at + 1]))
        turned_k = rotate(k[None], (cos[to : to + 1], sin[to : to + 1]))
        return (turned_q @ turned_k.T).item()

    assert score(20, 13) == pytest.approx(score(60, 53), abs=1e-5)
    assert score(20, 13) != pytest.approx(score(20, 14), abs=1e-3)
    assert score(0, 0) == pytest.approx((q @ k).item(), abs=1e-6)


def test_dropout_acts_in_training_only() -> None:
    model = build(small(dropout=0.5, init="gpt2"))
    ids = torch.randint(V, (2, 8))
    assert not torch.equal(model(ids), model(ids))
    model.eval()
    assert torch.equal(model(ids), model(ids))


def test_attention_runs_torchs_kernel_that_keeps_no_scores() -> None:
    """Also where heads share keys and values."""
    layer = Attention(small(n_kv_head=2), 0)
    with torch.profiler.profile() as seen:
        layer(torch.randn(1, 64, 32), None, None)
    assert any("flash_attention" in event.name for event in seen.events())
