"""muP and CompleteP: a rate that holds at other widths and depths, and GPT-2 left as it is."""

import math
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from gpt.config import ModelConfig, OptimizerConfig, contradictions
from gpt.configfile import load_config
from gpt.decode import Decoder, KVCache
from gpt.errors import UserError
from gpt.model import GPT, attention_scale
from gpt.optim import build_optimizer, mup_factors
from tests.conftest import ConfigMaker

CPU = torch.device("cpu")
V = 32
GPT2 = {
    "position": "learned",
    "norm": "layernorm",
    "activation": "gelu_tanh",
    "bias": True,
    "tie_embeddings": True,
    "qk_norm": False,
    "init": "gpt2",
}
RATES = {"adamw": 3e-3, "adam": 3e-3, "muon": 1e-2, "sgd": 0.1}


def build(width: int = 32, layers: int = 2, seed: int = 0, **options: Any) -> GPT:
    torch.manual_seed(seed)
    shape = {"n_layer": layers, "n_head": max(1, width // 16), "n_embd": width, "context_len": 16}
    return GPT(ModelConfig(**{**shape, **options}), V)


def optimizer_for(model: GPT, name: str, **options: Any) -> torch.optim.Optimizer:
    values = {"lr": RATES[name], "weight_decay": 0.0, **options}
    return build_optimizer(model, OptimizerConfig(name=name, **values), device=CPU)


def tokens() -> torch.Tensor:
    return torch.randint(V, (8, 17), generator=torch.Generator().manual_seed(5))


def train(model: GPT, optimizer: torch.optim.Optimizer, steps: int = 4) -> None:
    ids = tokens()
    for _ in range(steps):
        optimizer.zero_grad()
        F.cross_entropy(model(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten()).backward()
        optimizer.step()


def moved(model: GPT, name: str) -> tuple[float, float]:
    """RMS of what four steps change in the stream after the last norm, and in the logits."""

    def activations() -> tuple[torch.Tensor, torch.Tensor]:
        read = model.features(tokens()[:, :-1])
        return read * model.config.width_ratio, model.head(read)

    with torch.no_grad():
        before = activations()
    train(model, optimizer_for(model, name))
    with torch.no_grad():
        after = activations()
    stream, logits = (
        (a - b).square().mean().sqrt().item() for a, b in zip(after, before, strict=True)
    )
    return stream, logits


@pytest.mark.parametrize("name", RATES)
@pytest.mark.parametrize("options", [GPT2, {}], ids=["gpt2", "defaults"])
def test_a_step_moves_activations_alike_at_every_width(name, options):
    with_mup = [moved(build(w, **options, mup_base_width=32), name) for w in (32, 64, 128, 256)]
    for activation in zip(*with_mup, strict=True):
        assert max(activation) < 1.6 * min(activation), with_mup
    narrow, wide = (moved(build(w, **options), name)[1] for w in (32, 256))
    assert wide > 2.5 * narrow, "without muP the logits move further, the wider the model"


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_a_step_moves_activations_alike_at_every_depth(name):
    base = {**GPT2, "mup_base_width": 32}
    depths = (2, 4, 8, 16)
    with_it = [moved(build(32, n, **base, mup_base_depth=2), name) for n in depths]
    for activation in zip(*with_it, strict=True):
        assert max(activation) < 1.15 * min(activation), with_it


def test_without_completep_the_depth_shows():
    found = [moved(build(32, n, **GPT2, mup_base_width=32), "muon") for n in (2, 16)]
    assert min(max(a) / min(a) for a in zip(*found, strict=True)) > 1.3, found


def test_head_size_may_grow_too():
    options = {**GPT2, "n_head": 2, "mup_base_width": 32, "mup_base_head_dim": 16}
    found = [moved(build(w, **options), "adamw") for w in (32, 64, 128, 256)]
    for activation in zip(*found, strict=True):
        assert max(activation) < 1.6 * min(activation), found


@pytest.mark.parametrize("name", RATES)
@pytest.mark.parametrize("options", [GPT2, {}], ids=["gpt2", "defaults"])
def test_at_the_base_it_is_the_standard_model_to_the_bit(name, options):
    plain = build(**options)
    mup = build(**options, mup_base_width=32, mup_base_depth=2, mup_base_head_dim=16)
    decay = {"weight_decay": 0.0 if name == "adam" else 0.1}
    for model in (plain, mup):
        train(model, optimizer_for(model, name, **decay))
    for (key, a), (other, b) in zip(plain.named_parameters(), mup.named_parameters(), strict=True):
        assert key == other
        assert torch.equal(a, b), key
    assert torch.equal(plain(tokens()[:, :-1]), mup(tokens()[:, :-1]))


def test_without_mup_nothing_has_changed():
    model = build(**GPT2)
    for block in model.blocks:
        assert block.attn.scale is None
        assert block.depth_ratio == 1
    for name in ("sgd", "adam", "adamw", "adafactor"):
        groups = build_optimizer(model, OptimizerConfig(name=name), device=CPU).param_groups
        assert [group["name"] for group in groups] == ["matrices", "rest"]
        assert {group["lr"] for group in groups} == {3e-4}


def rows(model: GPT, optimizer: str, **options: Any) -> dict[str, dict[str, Any]]:
    config = OptimizerConfig(name=optimizer, **options)
    groups = build_optimizer(model, config, device=CPU).param_groups
    return {group["name"]: group for group in groups}


@pytest.mark.parametrize("name", ["adam", "adamw"])
def test_groups_of_adam(name):
    model = build(128, 6, **GPT2, mup_base_width=32, mup_base_depth=2)
    groups = rows(model, name, lr=0.01, weight_decay=0.1, eps=1e-8)
    assert list(groups) == ["embeddings", "rest", "matrices"], "the first is at lr itself"
    assert [group["lr"] for group in groups.values()] == pytest.approx([0.01, 0.01, 0.0025])
    assert [g["weight_decay"] for g in groups.values()] == pytest.approx([0.1, 0.0, 0.4])
    eps = [group["eps"] for group in groups.values()]
    assert eps == pytest.approx([1e-8 / 4, 1e-8 / 12, 1e-8 / 12])
    names = {id(p): key for key, p in model.named_parameters()}
    hidden = [names[id(p)] for p in groups["matrices"]["params"]]
    assert {names[id(p)] for p in groups["embeddings"]["params"]} == {
        "tok_emb.weight",
        "pos_emb.weight",
    }
    assert all(".attn.w" in name or ".mlp." in name for name in hidden)


def test_groups_of_muon_and_sgd():
    model = build(128, mup_base_width=32)
    muon = rows(model, "muon", lr=0.02, adamw_lr=0.003, weight_decay=0.1)
    assert {name: group["lr"] for name, group in muon.items()} == pytest.approx(
        {"matrices": 0.01, "embeddings": 0.003, "rest": 0.003}
    )
    assert muon["matrices"]["weight_decay"] == pytest.approx(0.2)
    assert muon["matrices"]["eps"] == pytest.approx(1e-7), "Muon's own"
    assert muon["embeddings"]["eps"] == pytest.approx(1e-8 / 4)
    one_rate = rows(model, "muon", lr=0.02)
    assert list(one_rate) == ["embeddings", "rest", "matrices"]
    sgd = rows(model, "sgd", lr=0.1, weight_decay=0.01, decay_on="all")
    assert {name: group["lr"] for name, group in sgd.items()} == pytest.approx(
        {"matrices": 0.1, "embeddings": 0.4, "rest": 0.4}
    )
    for name, group in sgd.items():
        assert group["lr"] * group["weight_decay"] == pytest.approx(0.001), name


def test_muon_trains_whichever_part_comes_first():
    model = build(64, mup_base_width=32)
    optimizer = optimizer_for(model, "muon")
    inner = [group for part in optimizer.parts for group in part.param_groups]
    assert all(a is b for a, b in zip(optimizer.param_groups, inner, strict=True))
    before = [p.detach().clone() for p in model.parameters()]
    train(model, optimizer)
    assert all(not torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


def test_hidden_variance_shrinks_and_the_rest_stays():
    options = {**GPT2, "tie_embeddings": False, "init_std": 0.05}
    model = build(256, 8, **options, mup_base_width=64, mup_base_depth=2)
    for name, weight in model.state_dict().items():
        if weight.ndim < 2:
            continue
        std = weight.std().item()
        if name.endswith(("attn.wo.weight", "mlp.down.weight")):
            assert std == pytest.approx(0.05 / 2 / math.sqrt(2 * 2), rel=0.05), name
        elif name.startswith("blocks"):
            assert std == pytest.approx(0.05 / 2, rel=0.05), name
        else:
            assert std == pytest.approx(0.05, rel=0.05), name


@pytest.mark.parametrize("qk_norm", [False, True])
def test_attention_is_one_over_head_size(qk_norm):
    base = {"mup_base_width": 64, "mup_base_head_dim": 16, "qk_norm": qk_norm}
    grown = ModelConfig(n_embd=256, n_head=4, **base)
    assert attention_scale(grown) == pytest.approx(math.sqrt(16) / 64)
    assert attention_scale(ModelConfig(n_embd=256, n_head=16, mup_base_width=64)) is None
    at_base = ModelConfig(n_embd=64, n_head=4, **base)
    assert attention_scale(at_base) is None


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("options", [GPT2, {"n_kv_head": 2, "activation": "swiglu"}])
def test_one_row_decoding_has_the_models_logits(tied, options):
    mup = {"mup_base_width": 16, "mup_base_depth": 1, "mup_base_head_dim": 4}
    model = build(64, 3, **{**options, "init": "gpt2", "tie_embeddings": tied, "n_head": 4}, **mup)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():  # biases and shifts that show, were one not scaled
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.2)
    ids = tokens()[0, :9].tolist()
    with torch.inference_mode():
        cache, decoder = KVCache(model, 1, 16), Decoder(model)
        assert decoder.one_row is not None
        cache.fill(decoder.model, 0, ids[:4])
        for n in range(4, 9):
            quick = decoder.next_logits([ids[n]], cache)[0]
            whole = model.eval()(torch.tensor([ids[: n + 1]]))[0, -1]
            torch.testing.assert_close(quick, whole, rtol=1e-4, atol=1e-4)


REFUSED = {
    "adafactor": ({"optimizer__name": "adafactor"}, "no rule for adafactor"),
    "coupled decay": ({"optimizer__name": "adam"}, "no rule for adam's weight_decay"),
    "depth without width": ({"model__mup_base_width": "null"}, "needs mup_base_width"),
    "sgd and depth": ({"optimizer__name": "sgd"}, "no rule for sgd"),
    "head size alone": (
        {"model__mup_base_width": "null", "model__mup_base_head_dim": "8"},
        "mup_base_head_dim 8 needs",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_has_no_rule_is_refused(case, make_config: ConfigMaker):
    changes, message = REFUSED[case]
    base = {"model__mup_base_width": "8", "model__mup_base_depth": "1"}
    with pytest.raises(UserError, match=message):
        make_config(**{**base, **changes})


def test_what_has_a_rule_is_accepted(make_config: ConfigMaker):
    for changes in (
        {"optimizer__name": "adamw", "model__mup_base_depth": "1"},
        {"optimizer__name": "muon", "model__mup_base_depth": "1"},
        {"optimizer__name": "adam", "optimizer__weight_decay": "0"},
        {"optimizer__name": "sgd", "model__mup_base_depth": "2"},
    ):
        config = make_config(**{"model__mup_base_width": "8", **changes})
        assert not list(contradictions(config))
        assert set(mup_factors(config.optimizer.name, config.model)) == {
            "matrices",
            "embeddings",
            "rest",
        }
    with pytest.raises(ValueError, match="adafactor"):
        mup_factors("adafactor", config.model)


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_an_interrupted_run_ends_as_an_uninterrupted_one(name, make_config: ConfigMaker, tmp_path):
    from gpt.train import train as train_run

    mup = {"model__mup_base_width": "8", "model__mup_base_depth": "1", "optimizer__name": name}
    whole = make_config(**mup, run__name="whole")
    train_run(whole)
    parts = {**mup, "run__name": "parts"}
    train_run(make_config(**parts, train__max_steps="12", train__max_time_s="1e-9"))
    assert not (tmp_path / "runs/parts/checkpoints/step-00000012").exists(), "it was interrupted"
    train_run(make_config(**parts))
    ends = [
        tmp_path / "runs" / run / "checkpoints" / "step-00000012" / "model.safetensors"
        for run in ("whole", "parts")
    ]
    assert ends[0].read_bytes() == ends[1].read_bytes()
    assert load_config(tmp_path / "runs" / "whole" / "config.yaml") == whole
