"""What is measured of a step is what plain arithmetic gives, and measuring changes nothing."""

import copy
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

import gpt.gauges
from gpt.autopsy import examine
from gpt.build import build_training
from gpt.checkpoint import Training
from gpt.config import Config
from gpt.data import Batches, open_data
from gpt.device import rng_state
from gpt.gauges import Gauge, Moves, NoiseMeter, Pair, inspect, sample_size
from gpt.guard import SpikeGuard
from gpt.metrics import MetricsLog
from gpt.model import GPT
from gpt.record import Recorder
from gpt.step import cross_entropy_sum, train_step
from tests.conftest import ConfigMaker

LLAMA = {
    "model__position": "rotary",
    "model__norm": "rmsnorm",
    "model__activation": "swiglu",
    "model__bias": "false",
    "model__n_head": "4",
    "model__n_kv_head": "2",
    "model__n_embd": "32",
}


def begin(config: Config) -> tuple[Training, Iterator[tuple[Tensor, Tensor]]]:
    data = open_data(config, progress=False)
    training, _ = build_training(config, data)
    batches = Batches(data.train, config.model.context_len, config.train.batch_size, 3)
    return training, (batches.batch(step) for step in range(1000))


def weights(training: Training) -> list[Tensor]:
    return [p.detach().clone() for p in training.model.parameters()]


def flat(tensors: list[Tensor]) -> Tensor:
    return torch.cat([tensor.double().flatten() for tensor in tensors])


def loss_of(training: Training, batch: tuple[Tensor, Tensor], at: list[Tensor]) -> float:
    """The loss of a batch at other weights, in fp64."""
    model = copy.deepcopy(training.model).double()
    with torch.no_grad():
        for parameter, value in zip(model.parameters(), at, strict=True):
            parameter.copy_(value)
        logits = model(batch[0])
        return float(
            torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch[1].flatten()),
        )


def gradient_at(training: Training, batch: tuple[Tensor, Tensor]) -> Tensor:
    """The gradient of a batch, by plain autograd."""
    model = copy.deepcopy(training.model)
    model.zero_grad()
    (cross_entropy_sum(model(batch[0]), batch[1]) / batch[1].numel()).backward()
    return flat([p.grad for p in model.parameters() if p.grad is not None])


def two_steps(config: Config) -> tuple[Pair, dict[str, Tensor], tuple[float, float]]:
    """A pair as it was measured, with its parts by hand, and the loss around the second batch."""
    training, batches = begin(config)
    for _ in range(4):
        train_step(training, *next(batches))
    gauge = Gauge(training.model, training.optimizer)
    first, second = next(batches), next(batches)
    before = weights(training)
    parts = {"g1": gradient_at(training, first)}
    gauge.watch(full=False, first=True)
    train_step(training, *first, gauge=gauge)
    assert gauge.pair is None
    assert gauge.moves is None
    after = weights(training)
    parts["g2"] = gradient_at(training, second)
    parts["dw"] = flat(after) - flat(before)
    along = [
        [a.double() + h * (a.double() - b.double()) for a, b in zip(after, before, strict=True)]
        for h in (1e-3, -1e-3)
    ]
    around = loss_of(training, second, along[0]), loss_of(training, second, along[1])
    gauge.watch(full=False, first=False)
    train_step(training, *second, gauge=gauge)
    assert gauge.pair is not None
    return gauge.pair, parts, around


def measured(config: Config, steps: int) -> tuple[Moves, Training, list[Tensor]]:
    """The moves of the last of some steps, the training, and the weights before that step."""
    training, batches = begin(config)
    gauge = Gauge(training.model, training.optimizer)
    for _ in range(steps):
        before = weights(training)
        gauge.watch(full=True, first=False)
        train_step(training, *next(batches), gauge=gauge)
    assert gauge.moves is not None
    return gauge.moves, training, before


def plain_adam_rms(training: Training, step: int) -> float:
    """Root of the mean of g^2 / v over all elements, v without its bias."""
    ratios = []
    for group in training.optimizer.param_groups:
        for p in group["params"]:
            v = training.optimizer.state[p]["exp_avg_sq"].double()
            v = v / (1 - group["betas"][1] ** step)
            ratios.append((p.grad.double().square() / v.clamp(min=group["eps"] ** 2)).flatten())
    return float(torch.cat(ratios).mean().sqrt())


@pytest.mark.parametrize("clip", ["0", "0.5"])
def test_moves_are_what_plain_arithmetic_gives(clip: str, make_config: ConfigMaker) -> None:
    moves, training, before = measured(make_config(train__grad_clip=clip), steps=3)
    after = weights(training)
    names = [name for name, _ in training.model.named_parameters()]
    assert list(moves.by_parameter) == list(moves.grad_norms) == names
    for name, old, new, p in zip(names, before, after, training.model.parameters(), strict=True):
        length, moved = float(old.norm()), float((new - old).norm())
        assert p.grad is not None
        assert moves.grad_norms[name] == pytest.approx(float(p.grad.norm()), rel=1e-5)
        expected = moved / length if length else math.inf
        assert moves.by_parameter[name] == pytest.approx(expected, rel=1e-4)
    whole = float((flat(after) - flat(before)).norm() / flat(before).norm())
    assert moves.update_ratio == pytest.approx(whole, rel=1e-4)
    assert moves.adam_rms == pytest.approx(plain_adam_rms(training, 3), rel=1e-4)


def test_a_sample_estimates_the_whole(
    make_config: ConfigMaker, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make_config(model__n_embd="64", model__n_layer="2")
    whole, training, _ = measured(config, steps=4)
    monkeypatch.setattr(gpt.gauges, "SAMPLE", 1024)
    part, _, _ = measured(config, steps=4)
    # 16.06, and 17 has no divisor in common with the width.
    assert sample_size(torch.empty(257, 64)) == math.ceil(64 * 257 / 17)
    assert sample_size(torch.empty(256, 64)) == math.ceil(64 * 256 / 17)
    assert sample_size(torch.empty(16 * 1024)) == 1024
    assert part.update_ratio == pytest.approx(whole.update_ratio, rel=0.05)
    assert part.adam_rms == pytest.approx(whole.adam_rms, rel=0.05)
    for name, parameter in training.model.named_parameters():
        near = {"rel": 0.15 if parameter.numel() > 1024 else 1e-5}
        # A few tokens' rows have nearly all of the gradient: a stride meets more or fewer of them.
        if name not in ("tok_emb.weight", "head.weight"):
            assert part.grad_norms[name] == pytest.approx(whole.grad_norms[name], **near), name
            assert part.by_parameter[name] == pytest.approx(whole.by_parameter[name], **near), name


@pytest.mark.parametrize("name", ["sgd", "muon", "adafactor"])
def test_other_optimizers_are_measured_too(name: str, make_config: ConfigMaker) -> None:
    moves, _, _ = measured(make_config(optimizer__name=name, optimizer__lr="1e-3"), steps=2)
    assert moves.update_ratio > 0
    assert (moves.adam_rms is not None) == (name == "muon"), "muon's other weights have Adam"


def test_slopes_are_products_of_gradient_and_update(make_config: ConfigMaker) -> None:
    """Of the gradient as it was before clipping, which is what the loss does."""
    pair, parts, around = two_steps(make_config(train__grad_clip="0.5"))
    g1, g2, dw = parts["g1"], parts["g2"], parts["dw"]
    assert pair.slope_before == pytest.approx(float(g1 @ dw), rel=1e-3)
    assert pair.slope_after == pytest.approx(float(g2 @ dw), rel=1e-3)
    assert pair.signal == pytest.approx(float(g1 @ g2), rel=1e-3)
    expected = float(g1 @ g1 + g2 @ g2) / 2 - float(g1 @ g2)
    assert pair.noise == pytest.approx(max(0.0, expected), rel=1e-3, abs=1e-6)
    # The slope behind a step is the loss's own derivative along the update, on the next batch.
    assert (around[0] - around[1]) / 2e-3 == pytest.approx(pair.slope_after, rel=1e-3)


def test_a_sampled_slope_is_near(make_config: ConfigMaker, monkeypatch: pytest.MonkeyPatch) -> None:
    config = make_config(model__n_embd="64")
    whole, _, _ = two_steps(config)
    monkeypatch.setattr(gpt.gauges, "SAMPLE", 2048)
    part, _, _ = two_steps(config)
    assert part.slope_before == pytest.approx(whole.slope_before, rel=0.1)
    assert part.slope_after == pytest.approx(whole.slope_after, rel=0.2)


def test_what_is_not_asked_for_is_not_measured(make_config: ConfigMaker) -> None:
    training, batches = begin(make_config())
    gauge = Gauge(training.model, training.optimizer)
    gauge.watch(full=True, first=True)
    train_step(training, *next(batches), gauge=gauge)
    assert gauge.moves is not None
    gauge.watch(full=False, first=False)
    train_step(training, *next(batches), gauge=gauge)
    assert gauge.pair is not None, "the second of a pair"
    assert gauge.moves is None
    gauge.watch(full=False, first=False)
    train_step(training, *next(batches), gauge=gauge)
    assert gauge.pair is None
    gauge.watch(full=True, first=True)
    train_step(training, *next(batches), gauge=gauge)
    gauge.forget()
    gauge.watch(full=False, first=False)
    train_step(training, *next(batches), gauge=gauge)
    assert gauge.pair is None, "a step in between was not taken"


@pytest.mark.parametrize("dropout", ["0", "0.2"])
def test_measuring_changes_nothing(dropout: str, make_config: ConfigMaker) -> None:
    config = make_config(model__dropout=dropout, train__grad_clip="1", train__micro_batch_size="2")
    ends = []
    for measure in (True, False):
        training, batches = begin(config)
        gauge = Gauge(training.model, training.optimizer) if measure else None
        for _ in range(12):
            batch = next(batches)
            if gauge is not None:
                gauge.watch(full=True, first=True)
            train_step(training, *batch, gauge=gauge)
            if measure:
                inspect(training.model, batch[0])
                examine(training, *batch)
        ends.append(weights(training))
    assert all(torch.equal(a, b) for a, b in zip(*ends, strict=True))


class NoFloat64(TorchFunctionMode):
    """Refuses what Apple's mps refuses."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        made = func(*args, **(kwargs or {}))
        if isinstance(made, Tensor) and made.dtype == torch.float64:
            raise TypeError("the MPS framework doesn't support float64")
        return made


def test_a_step_is_measured_where_there_is_no_float64(
    make_config: ConfigMaker, monkeypatch: pytest.MonkeyPatch
) -> None:
    def on_mps(measure: Callable[[Gauge], None]) -> Callable[[Gauge], None]:
        def refusing(gauge: Gauge) -> None:
            with NoFloat64():
                measure(gauge)

        return refusing

    for name in ("gradients", "before_update", "after_update"):
        monkeypatch.setattr(Gauge, name, on_mps(getattr(Gauge, name)))
    pair, _, _ = two_steps(make_config())
    moves, _, _ = measured(make_config(), steps=1)
    assert pair.noise > 0
    assert moves.adam_rms is not None


@pytest.mark.parametrize(("signal", "noise"), [(1.0, 40.0), (1.0, 4.0), (4.0, 100.0)])
def test_the_noise_meter_finds_a_known_scale(signal: float, noise: float) -> None:
    """Gradients of 2,000 numbers whose mean and covariance are known; `noise` is the trace."""
    rng = np.random.default_rng(5)
    size, batch = 2_000, 64
    mean = rng.normal(size=size)
    mean *= math.sqrt(signal) / np.linalg.norm(mean)
    meter = NoiseMeter()
    scales = []
    for step in range(400):
        g1, g2 = (mean + rng.normal(scale=math.sqrt(noise / size), size=size) for _ in range(2))
        meter.add(float(g1 @ g2), float((g1 @ g1 + g2 @ g2) / 2 - g1 @ g2))
        if step % 20 == 19:
            scales.append(meter.scale(batch) or math.inf)
    # A running mean of about ten wavers; its middle over the run does not.
    assert np.median(scales) == pytest.approx(batch * noise / signal, rel=0.2)


def test_the_noise_meter_says_nothing_without_enough() -> None:
    meter = NoiseMeter()
    for _ in range(4):
        meter.add(1.0, 2.0)
        meter.add(math.nan, 2.0)
        meter.add(1.0, math.inf)
    assert meter.scale(10) is None
    meter.add(1.0, 2.0)
    assert meter.scale(10) == pytest.approx(20)
    for _ in range(50):
        meter.add(-3.0, 2.0)
    assert meter.scale(10) is None, "no signal, no scale"


@pytest.mark.parametrize(
    "damaged",
    [
        {"grad_noise": 9.0, "grad_sigmal": 1.0},
        {"grad_noise": 9.0, "grad_signal": "1.0"},
        {"grad_noise": [9.0], "grad_signal": 1.0},
        {"grad_noise": 10**400, "grad_signal": 1.0},
    ],
)
def test_a_damaged_line_of_the_log_is_no_measurement(
    damaged: dict[str, Any], make_config: ConfigMaker, tmp_path: Path
) -> None:
    training, _ = begin(make_config())
    measured = [{"grad_noise": 2.0, "grad_signal": 1.0}] * 5
    with MetricsLog(tmp_path) as log:
        for step, record in enumerate([*measured, damaged], 1):
            log.write({"kind": "train", "step": step, "loss": 3.0, **record})
    with Recorder(tmp_path, training, 10) as recorder:
        assert recorder._noise.scale(10) == pytest.approx(20)


def model_of(config: Config, scale: float = 4.0) -> GPT:
    """Weights that are large enough for attention to differ from even."""
    torch.manual_seed(11)
    model = GPT(config.model, 257).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(scale)
    return model


def plain_largest(model: GPT, ids: Tensor) -> list[float]:
    """The largest |q.k| x scale of each block, from its definition, token by token and head."""
    found: list[float] = []
    stream: list[Tensor] = []
    hooks = [
        block.attn.register_forward_pre_hook(lambda _, args: stream.append(args[0]))
        for block in model.blocks
    ]
    with torch.no_grad():
        model(ids)
    for hook in hooks:
        hook.remove()
    for block, x in zip(model.blocks, stream, strict=True):
        attention, length = block.attn, x.size(1)
        size = attention.head_dim
        with torch.no_grad():
            q = attention.wq(x)[0].double().reshape(length, -1, size)
            k = attention.wk(x)[0].double().reshape(length, -1, size)
        each = q.size(1) // k.size(1)
        largest = 0.0
        for head in range(q.size(1)):
            qs, ks = q[:, head], k[:, head // each]
            if attention.qk_norm:
                qs, ks = (
                    part / (part.square().mean(-1, keepdim=True) + attention.norm_eps).sqrt()
                    for part in (qs, ks)
                )
            if model.config.position == "rotary":
                qs, ks = (turned(part, model.config.rope_theta) for part in (qs, ks))
            largest = max(largest, float((qs @ ks.T).abs().max()) / math.sqrt(size))
        found.append(largest)
    return found


def turned(x: Tensor, theta: float) -> Tensor:
    """Rotary positions as products of complex numbers; x is (T, D)."""
    half = x.size(1) // 2
    angles = torch.outer(
        torch.arange(len(x)).double(), theta ** (-torch.arange(half).double() / half)
    )
    pairs = torch.complex(x[:, :half], x[:, half:]) * torch.polar(torch.ones_like(angles), angles)
    return torch.cat([pairs.real, pairs.imag], 1)


@pytest.mark.parametrize(
    "changes",
    [{}, LLAMA, LLAMA | {"model__qk_norm": "true"}, {"model__qk_norm": "true"}],
    ids=["gpt2", "llama", "llama-qk-norm", "gpt2-qk-norm"],
)
def test_attention_logits_are_the_plain_products(
    changes: dict[str, str], make_config: ConfigMaker
) -> None:
    model = model_of(make_config(**changes))
    ids = torch.randint(257, (3, 16), generator=torch.Generator().manual_seed(1))
    figures = inspect(model, ids)
    assert list(figures["attn_logit_max"]) == ["blocks.0", "blocks.1"]
    expected = plain_largest(model, ids[:1])
    assert list(figures["attn_logit_max"].values()) == pytest.approx(expected, rel=1e-4)
    with torch.no_grad():
        stream = model.tok_emb(ids[:1])
        if model.config.position == "learned":
            stream = stream + model.pos_emb.weight[:16]
            rotation = None
        else:
            rotation = model.rotation(slice(16))
        for name, block in zip(figures["rms"], model.blocks, strict=True):
            stream = block(stream, rotation, None)
            rms = float(stream.double().square().mean().sqrt())
            assert figures["rms"][name] == pytest.approx(rms, rel=1e-4)


@pytest.mark.parametrize("training", [True, False])
def test_looking_inside_leaves_everything_as_it_was(
    training: bool, make_config: ConfigMaker
) -> None:
    model = model_of(make_config(model__dropout="0.3"))
    model.train(training)
    ids = torch.randint(257, (2, 16), generator=torch.Generator().manual_seed(1))
    before, state = {k: v.clone() for k, v in model.state_dict().items()}, rng_state()
    first = inspect(model, ids)
    assert first == inspect(model, ids), "without dropout"
    assert model.training is training
    assert all(module.training is training for module in model.modules())
    assert all(torch.equal(state[name], value) for name, value in rng_state().items())
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    for module in model.modules():
        assert not module._forward_hooks
        assert not module._forward_pre_hooks


def test_dead_features_are_counted(make_config: ConfigMaker) -> None:
    """relu2 of what is below 0 for every token: half of one block's features, all of another's."""
    model = model_of(make_config(model__activation="relu2"))
    ids = torch.randint(257, (1, 16), generator=torch.Generator().manual_seed(1))
    alive = inspect(model, ids)["dead_share"]
    assert max(alive.values()) < 0.3
    with torch.no_grad():
        for number, share in ((0, 2), (1, 1)):
            up = model.blocks[number].mlp.up
            up.weight[: len(up.weight) // share] = 0
    dead = inspect(model, ids)["dead_share"]
    assert dead["blocks.1"] == 1.0
    assert 0.5 <= dead["blocks.0"] < 1


def test_a_long_sequence_is_looked_at_in_part(make_config: ConfigMaker) -> None:
    model = model_of(make_config(model__context_len="512"))
    ids = torch.randint(257, (1, 512), generator=torch.Generator().manual_seed(1))
    assert inspect(model, ids) == inspect(model, ids[:, : gpt.gauges.INSPECT_TOKENS])


def test_a_step_that_is_not_taken_ends_the_pair(
    make_config: ConfigMaker, monkeypatch: pytest.MonkeyPatch
) -> None:
    training, batches = begin(make_config())
    gauge, guard = Gauge(training.model, training.optimizer), SpikeGuard(6, 5, training.progress)
    gauge.watch(full=False, first=True)
    train_step(training, *next(batches), gauge=gauge)
    monkeypatch.setattr(guard, "outlier", lambda *_: "far above")
    assert train_step(training, *next(batches), gauge=gauge, guard=guard).skipped
    gauge.watch(full=False, first=False)
    train_step(training, *next(batches), gauge=gauge)
    assert gauge.pair is None
