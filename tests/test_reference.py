"""Logits of GPT-2 and LLaMA, and the rates of hf_cosine, are those of `transformers`."""

from typing import Any

import pytest
import torch

from gpt.config import ModelConfig
from gpt.model import GPT
from gpt.schedule import Plan, walk

transformers = pytest.importorskip("transformers")

V = 61
TOLERANCE = 1e-4


def from_gpt2(theirs: dict[str, torch.Tensor], width: int) -> dict[str, torch.Tensor]:
    """GPT-2's weights under our names: its matrices are transposed, its q, k, v are one."""
    ours = {
        "tok_emb.weight": theirs["transformer.wte.weight"],
        "head.weight": theirs["lm_head.weight"],
        "pos_emb.weight": theirs["transformer.wpe.weight"],
        "final_norm.weight": theirs["transformer.ln_f.weight"],
        "final_norm.bias": theirs["transformer.ln_f.bias"],
    }
    parts = {"ln_1": "attn_norm", "ln_2": "mlp_norm", "attn.c_proj": "attn.wo"}
    parts |= {"mlp.c_fc": "mlp.up", "mlp.c_proj": "mlp.down"}
    for name, weight in theirs.items():
        if not name.startswith("transformer.h."):
            continue
        n, _, rest = name.removeprefix("transformer.h.").partition(".")
        part, _, kind = rest.rpartition(".")
        if part == "attn.c_attn":
            for letter, piece in zip("qkv", weight.split(width, -1), strict=True):
                ours[f"blocks.{n}.attn.w{letter}.{kind}"] = piece.t()
        elif part in parts:
            ours[f"blocks.{n}.{parts[part]}.{kind}"] = weight.t()
    return ours


def from_llama(theirs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """LLaMA's weights under our names."""
    names = {
        "model.embed_tokens": "tok_emb",
        "model.norm": "final_norm",
        "lm_head": "head",
        "model.layers": "blocks",
        "self_attn.o_proj": "attn.wo",
        "self_attn.q_proj": "attn.wq",
        "self_attn.k_proj": "attn.wk",
        "self_attn.v_proj": "attn.wv",
        "post_attention_layernorm": "mlp_norm",
        "input_layernorm": "attn_norm",
        "mlp.up_proj": "mlp.up",
        "mlp.gate_proj": "mlp.gate",
        "mlp.down_proj": "mlp.down",
    }
    ours = {}
    for full_name, weight in theirs.items():
        name = full_name
        for old, new in names.items():
            name = name.replace(old, new)
        ours[name] = weight
    return ours


def randomize(model: torch.nn.Module) -> None:
    """Random weights everywhere, biases and norms too, so that no part can hide."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(std=0.2)
            if "norm" in name or "ln_" in name:
                parameter.add_(1.0)


def assert_same_logits(ours: GPT, theirs: Any, context_len: int) -> None:
    ids = torch.randint(V, (3, context_len))
    with torch.no_grad():
        expected = theirs.eval()(ids).logits
        got = ours.eval()(ids)
    assert expected.std() > 0.5, "the comparison would be empty"
    assert (got - expected).abs().max().item() < TOLERANCE


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        ("gelu_new", {}),
        ("gelu", {"activation": "gelu"}),
        ("gelu_new", {"norm_eps": 1e-3, "n_hidden": 80}),
        ("gelu_new", {"tie_embeddings": False}),
    ],
)
def test_gpt2(theirs: str, ours: dict[str, Any]) -> None:
    torch.manual_seed(11)
    shape = {"n_layer": 3, "n_head": 4, "n_embd": 48, "context_len": 24}
    config = ModelConfig(preset="gpt2-124m", **{**shape, **ours})
    reference = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(
            vocab_size=V,
            n_positions=24,
            n_embd=48,
            n_layer=3,
            n_head=4,
            n_inner=config.hidden,
            activation_function=theirs,
            layer_norm_epsilon=config.norm_eps,
            tie_word_embeddings=config.tie_embeddings,
            bos_token_id=0,
            eos_token_id=0,
        )
    )
    randomize(reference)
    model = GPT(config, V)
    model.load_state_dict(from_gpt2(reference.state_dict(), 48))
    assert_same_logits(model, reference, 24)


@pytest.mark.parametrize(
    "options",
    [
        {"n_kv_head": 2},
        {"n_kv_head": None, "tie_embeddings": True},
        {"n_kv_head": 1, "rope_theta": 500.0, "norm_eps": 1e-3},
        {"n_kv_head": 2, "n_hidden": 56},
    ],
)
def test_llama(options: dict[str, Any]) -> None:
    torch.manual_seed(12)
    shape = {"n_layer": 3, "n_head": 4, "n_embd": 48, "context_len": 24, "n_hidden": 128}
    config = ModelConfig(preset="llama-1.1b", **{**shape, **options})
    reference = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=V,
            hidden_size=48,
            intermediate_size=config.hidden,
            num_hidden_layers=3,
            num_attention_heads=4,
            num_key_value_heads=config.kv_heads,
            max_position_embeddings=24,
            rms_norm_eps=config.norm_eps,
            rope_parameters={"rope_type": "default", "rope_theta": config.rope_theta},
            tie_word_embeddings=config.tie_embeddings,
            attention_bias=False,
            mlp_bias=False,
        )
    )
    randomize(reference)
    model = GPT(config, V)
    model.load_state_dict(from_llama(reference.state_dict()))
    assert_same_logits(model, reference, 24)


@pytest.mark.parametrize(
    ("total", "warmup"), [(100_000, 2_000), (100, 0), (100, 99), (100, 100), (1, 0), (1, 1)]
)
def test_cosine_schedule(total: int, warmup: int) -> None:
    """Equal to the last bit at every step; the first numbers are those of section 17.8.3."""
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=3e-4)
    theirs = transformers.get_cosine_schedule_with_warmup(optimizer, warmup, total)
    optimizer.step()
    expected = []
    for _ in range(total):
        expected.append((optimizer.param_groups[0]["lr"],))
        theirs.step()
    assert walk(Plan("hf_cosine", total, warmup, 0.1, 0.0), [3e-4]) == expected
