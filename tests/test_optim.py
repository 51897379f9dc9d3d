"""Optimizers by name: groups, decay, and equality with plain torch."""

import copy
import json
import subprocess
import sys
import warnings

import pytest
import torch
from torch import nn

from gpt import optim
from gpt.config import ModelConfig, OptimizerConfig
from gpt.model import GPT
from gpt.optim import BatchedMuon, CombinedOptimizer, build_optimizer, orthogonalize

CPU = torch.device("cpu")
NAMES = ["sgd", "adam", "adamw", "muon", "adafactor"]


def small_gpt(seed: int = 0, **more: object) -> GPT:
    torch.manual_seed(seed)
    shape = {"n_layer": 2, "n_head": 2, "n_embd": 16, "context_len": 8, "init": "gpt2"}
    return GPT(ModelConfig(**(shape | {"bias": True, "norm": "layernorm"} | more)), 11)


def backward(model: nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator)


def plain_groups(model: nn.Module, decay: float) -> list[dict[str, object]]:
    return [
        {"params": [p for p in model.parameters() if p.ndim >= 2], "weight_decay": decay},
        {"params": [p for p in model.parameters() if p.ndim < 2], "weight_decay": 0.0},
    ]


def weights(model: nn.Module) -> list[torch.Tensor]:
    return [p.detach().clone() for p in model.parameters()]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("position", ["learned", "rotary"])
def test_every_parameter_is_in_exactly_one_group(name, tied, position):
    model = small_gpt(tie_embeddings=tied, position=position)
    optimizer = build_optimizer(model, OptimizerConfig(name=name), device=CPU)
    grouped = [id(p) for group in optimizer.param_groups for p in group["params"]]
    assert len(grouped) == len(set(grouped))
    assert set(grouped) == {id(p) for p in model.parameters()}
    names = [group["name"] for group in optimizer.param_groups]
    muon = ["matrices", "embeddings", "rest"]
    assert names == (muon if name == "muon" else ["matrices", "rest"])


@pytest.mark.parametrize("name", NAMES)
def test_decay_is_on_matrices_only_unless_asked_for(name):
    for decay_on, on_rest in (("matrices", 0.0), ("all", 0.3)):
        config = OptimizerConfig(name=name, weight_decay=0.3, decay_on=decay_on)
        for group in build_optimizer(small_gpt(), config, device=CPU).param_groups:
            assert group["weight_decay"] == (on_rest if group["name"] == "rest" else 0.3)
            assert all((p.ndim < 2) == (group["name"] == "rest") for p in group["params"])


def test_frozen_parameters_are_left_out_and_empty_groups_too():
    model = nn.Sequential(nn.Linear(3, 3, bias=False), nn.LayerNorm(3))
    model[1].requires_grad_(False)
    (group,) = build_optimizer(model, OptimizerConfig(), device=CPU).param_groups
    assert group["params"] == [model[0].weight]


@pytest.mark.parametrize("name", ["sgd", "adam", "adamw", "adafactor"])
def test_equals_plain_torch(name):
    config = OptimizerConfig(
        name=name, lr=0.01, betas=(0.8, 0.9), eps=1e-6, momentum=0.7, weight_decay=0.2
    )
    ours, theirs = small_gpt(), small_gpt()
    groups = plain_groups(theirs, 0.2)
    reference = {
        "sgd": lambda: torch.optim.SGD(groups, lr=0.01, momentum=0.7, foreach=False),
        "adam": lambda: torch.optim.Adam(groups, lr=0.01, betas=(0.8, 0.9), eps=1e-6),
        "adamw": lambda: torch.optim.AdamW(groups, lr=0.01, betas=(0.8, 0.9), eps=1e-6),
        "adafactor": lambda: torch.optim.Adafactor(groups, lr=0.01),
    }[name]()
    optimizer = build_optimizer(ours, config, device=CPU)
    assert isinstance(optimizer, type(reference))
    for seed in range(5):
        for model, each in ((ours, optimizer), (theirs, reference)):
            backward(model, seed)
            each.step()
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("name", ["sgd", "adam", "adamw"])
def test_fused_where_torch_has_it(name):
    optimizer = build_optimizer(small_gpt(), OptimizerConfig(name=name), device=CPU)
    assert all(group["fused"] for group in optimizer.param_groups)


def decayed(name: str) -> float:
    """A weight of 4 after two steps without a gradient from the loss: lr 0.1, decay 0.01."""
    model = nn.Module()
    model.weight = nn.Parameter(torch.full((2, 2), 4.0))
    config = OptimizerConfig(name=name, lr=0.1, weight_decay=0.01, momentum=0.5, betas=(0.9, 0.9))
    optimizer = build_optimizer(model, config, device=CPU)
    for _ in range(2):
        model.weight.grad = torch.zeros(2, 2)
        optimizer.step()
    return float(model.weight.detach()[0, 0])


def test_coupled_decay_goes_through_the_update_rule():
    first = 4 - 0.1 * 0.04
    momentum = 0.5 * 0.04 + 0.01 * first
    assert decayed("sgd") == pytest.approx(first - 0.1 * momentum, rel=1e-6)
    assert decayed("adam") == pytest.approx(4 - 2 * 0.1, abs=1e-2)  # a step is about lr


@pytest.mark.parametrize("name", ["adamw", "adafactor"])
def test_decoupled_decay_shrinks_by_rate_times_decay(name):
    assert decayed(name) == pytest.approx(4 * (1 - 0.1 * 0.01) ** 2, rel=1e-6)


def muon_pair(monkeypatch, **options):
    """The combined optimizer, and two separate ones of torch over a copy of the model."""
    monkeypatch.setattr(optim, "cpu_has_bf16", lambda: True)
    config = OptimizerConfig(name="muon", lr=0.02, weight_decay=0.1, **options)
    ours, theirs = small_gpt(), small_gpt()
    hidden = [p for n, p in theirs.named_parameters() if n.startswith("blocks.") and p.ndim == 2]
    chosen = {id(p) for p in hidden}
    others = [p for p in theirs.parameters() if id(p) not in chosen]
    muon = torch.optim.Muon(
        hidden, lr=0.02, weight_decay=0.1, momentum=0.95, adjust_lr_fn="match_rms_adamw"
    )
    adamw = torch.optim.AdamW(
        [
            {"params": [p for p in others if p.ndim == 2], "weight_decay": 0.1},
            {"params": [p for p in others if p.ndim < 2], "weight_decay": 0.0},
        ],
        lr=options.get("adamw_lr", 0.02),
        betas=config.betas,
        eps=config.eps,
        fused=True,
    )
    return ours, build_optimizer(ours, config, device=CPU), theirs, [muon, adamw]


@pytest.mark.parametrize("options", [{}, {"adamw_lr": 0.003}])
def test_muon_equals_two_separate_optimizers_bit_for_bit(monkeypatch, options):
    ours, combined, theirs, separate = muon_pair(monkeypatch, **options)
    assert isinstance(combined.parts[0], torch.optim.Muon)
    for seed in range(4):
        backward(ours, seed)
        backward(theirs, seed)
        combined.step()
        for part in separate:
            part.step()
    assert all(map(torch.equal, weights(ours), weights(theirs)))
    combined.zero_grad()
    assert all(p.grad is None for p in ours.parameters())


def test_muon_shares_groups_and_state_with_its_parts():
    model = small_gpt()
    optimizer = build_optimizer(model, OptimizerConfig(name="muon", adamw_lr=1e-3), device=CPU)
    assert isinstance(optimizer, CombinedOptimizer)
    assert [group["lr"] for group in optimizer.param_groups] == [3e-4, 1e-3, 1e-3]
    inner = [group for part in optimizer.parts for group in part.param_groups]
    assert all(a is b for a, b in zip(optimizer.param_groups, inner, strict=True))
    backward(model, 0)
    optimizer.step()
    assert set(optimizer.state) == set(model.parameters())
    for parameter in optimizer.param_groups[0]["params"]:
        assert set(optimizer.state[parameter]) == {"momentum_buffer"}
    for parameter in optimizer.param_groups[1]["params"]:
        assert set(optimizer.state[parameter]) == {"step", "exp_avg", "exp_avg_sq"}


def continued(name: str, restore) -> None:
    """Three steps, the state carried over by `restore` into a fresh optimizer, two more steps."""
    config = OptimizerConfig(name=name, lr=0.01)
    straight, broken = small_gpt(), small_gpt()
    first = build_optimizer(straight, config, device=CPU)
    before = build_optimizer(broken, config, device=CPU)
    for seed in range(3):
        for model, each in ((straight, first), (broken, before)):
            backward(model, seed)
            each.step()
    after = build_optimizer(broken, config, device=CPU)
    restore(before, after)
    for seed in range(3, 5):
        for model, each in ((straight, first), (broken, after)):
            backward(model, seed)
            each.step()
    assert all(map(torch.equal, weights(straight), weights(broken)))


@pytest.mark.parametrize("name", NAMES)
def test_state_can_be_read_and_assigned_for_each_parameter(name):
    def restore(before, after):
        for group in before.param_groups:
            for parameter in group["params"]:
                after.state[parameter] = copy.deepcopy(before.state[parameter])

    continued(name, restore)


@pytest.mark.parametrize("name", NAMES)
def test_state_dict_carries_over(name):
    continued(name, lambda before, after: after.load_state_dict(before.state_dict()))


def test_muon_still_shares_after_loading_and_copying():
    model = small_gpt()
    optimizer = build_optimizer(model, OptimizerConfig(name="muon"), device=CPU)
    backward(model, 0)
    optimizer.step()
    optimizer.load_state_dict(optimizer.state_dict())
    for each in (optimizer, copy.deepcopy(optimizer)):
        inner = [group for part in each.parts for group in part.param_groups]
        assert all(a is b for a, b in zip(each.param_groups, inner, strict=True))
        assert all(part.state is each.state for part in each.parts)


@pytest.mark.parametrize("name", NAMES)
def test_scheduler_and_hooks_work(name):
    model = small_gpt()
    optimizer = build_optimizer(model, OptimizerConfig(name=name, lr=0.5), device=CPU)
    scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, start_factor=1e-9, total_iters=10)
    calls: list[object] = []
    optimizer.register_step_post_hook(lambda *_: calls.append(1))
    before = weights(model)
    backward(model, 0)
    optimizer.step()
    moved = max((a - b).abs().max().item() for a, b in zip(before, weights(model), strict=True))
    assert moved < 1e-6, "the scheduler's rate did not reach the update"
    scheduler.step()
    assert calls == [1]
    assert optimizer.step(lambda: 7.0) == 7.0


@pytest.mark.parametrize("name", NAMES)
def test_grad_scaler_skips_overflow_and_unscales(name):
    # The very first step overflows, as a scaler's first steps do: torch's fused SGD, left alone,
    # then starts from uninitialised momentum.
    scaled, plain = small_gpt(), small_gpt()
    config = OptimizerConfig(name=name, lr=0.01)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    a = build_optimizer(scaled, config, device=CPU)
    b = build_optimizer(plain, config, device=CPU)
    before = weights(scaled)
    backward(scaled, 0)
    next(scaled.parameters()).grad[0, 0] = float("inf")
    scaler.scale(torch.zeros(()))
    scaler.unscale_(a)
    scaler.step(a)
    scaler.update()
    assert all(map(torch.equal, before, weights(scaled)))
    assert scaler.get_scale() == 512.0
    backward(scaled, 1)
    for parameter in scaled.parameters():
        parameter.grad *= 512.0
    scaler.unscale_(a)
    scaler.step(a)
    scaler.update()
    backward(plain, 1)
    b.step()
    for x, y in zip(weights(scaled), weights(plain), strict=True):
        torch.testing.assert_close(x, y)


@pytest.mark.parametrize(("has_bf16", "dtype"), [(False, torch.float32), (True, torch.bfloat16)])
def test_muon_multiplies_in_bf16_where_the_cpu_does(has_bf16, dtype, monkeypatch):
    monkeypatch.setattr(optim, "cpu_has_bf16", lambda: has_bf16)
    seen = []
    kept = optim.orthogonalize
    monkeypatch.setattr(
        optim, "orthogonalize", lambda x, **more: seen.append(x.dtype) or kept(x, **more)
    )
    model = small_gpt()
    optimizer = build_optimizer(model, OptimizerConfig(name="muon"), device=CPU)
    backward(model, 0)
    optimizer.step()
    assert type(optimizer.parts[0]) is BatchedMuon
    assert set(seen) == {dtype}


@pytest.mark.parametrize("has_bf16", [False, True])
@pytest.mark.parametrize("shape", [(8, 8), (24, 8), (8, 24)])
def test_batched_muon_is_torchs_up_to_bf16_rounding(shape, has_bf16, monkeypatch):
    monkeypatch.setattr(optim, "cpu_has_bf16", lambda: has_bf16)
    torch.manual_seed(3)
    start = torch.randn(shape)
    ours, theirs = (nn.Parameter(start.clone()) for _ in range(2))
    options = {"lr": 0.02, "weight_decay": 0.1, "adjust_lr_fn": "match_rms_adamw"}
    a, b = BatchedMuon([ours], **options), torch.optim.Muon([theirs], **options)
    for _ in range(3):
        ours.grad = theirs.grad = torch.randn(shape)
        a.step()
        b.step()
    moved = (theirs - start).norm()
    assert (ours - theirs).norm() < 0.02 * moved
    torch.testing.assert_close(
        a.state[ours]["momentum_buffer"], b.state[theirs]["momentum_buffer"], rtol=0, atol=0
    )


def test_orthogonalize_brings_singular_values_near_one():
    torch.manual_seed(5)
    matrices = torch.randn(3, 12, 40)
    result = orthogonalize(matrices, coefficients=(3.4445, -4.7750, 2.0315), steps=5, eps=1e-7)
    values = torch.linalg.svdvals(result)
    assert values.min() > 0.6
    assert values.max() < 1.3
    u, _, vh = torch.linalg.svd(matrices, full_matrices=False)
    cosine = (result * (u @ vh)).sum((1, 2)) / result.norm(dim=(1, 2)) / 12**0.5
    assert cosine.min() > 0.97
    tall = orthogonalize(matrices.mT, coefficients=(3.4445, -4.7750, 2.0315), steps=5, eps=1e-7)
    torch.testing.assert_close(tall.mT, result)


@pytest.mark.parametrize("shape", [(2, 32, 96), (2, 96, 32), (2, 32, 64), (2, 32, 32)])
@pytest.mark.parametrize("smallest", [-6.0, 0.0])
def test_orthogonalize_is_the_iteration_done_in_fp64(shape, smallest):
    """Also where singular values are as far apart as a run's: squared, the small ones are lost."""
    torch.manual_seed(6)
    u, s, vh = torch.linalg.svd(torch.randn(shape), full_matrices=False)
    matrices = (u * torch.logspace(0, smallest, s.shape[-1])) @ vh
    a, b, c = 3.4445, -4.7750, 2.0315
    x = matrices.double() / matrices.double().norm(dim=(1, 2), keepdim=True)
    x = x.mT if shape[1] > shape[2] else x
    for _ in range(5):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    expected = x.mT if shape[1] > shape[2] else x
    result = orthogonalize(matrices, coefficients=(a, b, c), steps=5, eps=1e-7)
    assert (result - expected).norm() < 6e-4 * expected.norm()


def test_groups_hold_plain_values_beside_parameters():
    for name in NAMES:
        optimizer = build_optimizer(small_gpt(), OptimizerConfig(name=name), device=CPU)
        for group in optimizer.param_groups:
            json.dumps({key: value for key, value in group.items() if key != "params"})


def test_building_is_silent():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for name in NAMES:
            build_optimizer(small_gpt(), OptimizerConfig(name=name), device=CPU)


def test_no_optimizer_imports_the_compiler():
    lines = [
        "import sys, torch",
        "from gpt.config import OptimizerConfig",
        "from gpt.optim import build_optimizer",
        "from gpt.schedule import build_scheduler, check_plan",
        "from gpt.plan import Plan",
        "plan = Plan('warmup_cosine', 9, 2, start_factor=1e-3, floor_ratio=0.0)",
        "check_plan(plan, [0.1])",
        f"for name in {NAMES}:",
        "    model = torch.nn.Sequential(torch.nn.Embedding(3, 4), torch.nn.Linear(4, 3))",
        "    config = OptimizerConfig(name=name)",
        "    optimizer = build_optimizer(model, config, device=torch.device('cpu'))",
        "    scheduler = build_scheduler(optimizer, plan)",
        "    model(torch.tensor([1])).sum().backward()",
        "    optimizer.step()",
        "    scheduler.step()",
        "    optimizer.load_state_dict(optimizer.state_dict())",
        "    optimizer.zero_grad()",
        "sys.exit('torch._dynamo' in sys.modules)",
    ]
    subprocess.run([sys.executable, "-c", "\n".join(lines)], check=True)


def test_a_step_records_no_gradients_and_keeps_hooks():
    model = small_gpt()
    optimizer = build_optimizer(model, OptimizerConfig(name="adamw"), device=CPU)
    called = []
    optimizer.register_step_post_hook(lambda *_: called.append(torch.is_grad_enabled()))
    backward(model, 0)
    optimizer.step()
    assert called == [True]
    assert all(p.requires_grad and p.grad_fn is None for p in model.parameters())
    assert type(optimizer).__name__ == "AdamW"  # what a checkpoint calls it
