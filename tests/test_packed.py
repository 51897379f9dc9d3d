"""Packed weights: what each format keeps, in rows and one by one; what it costs in loss."""

import math
from typing import Any

import pytest
import torch

from gpt.config import ModelConfig
from gpt.decode import Decoder, KVCache
from gpt.int8_c import whole_product
from gpt.model import GPT
from gpt.onerow import UNROLLED, is_unrolled
from gpt.packed import BFloat16Linear, BlockedLinear, HalfLinear, Int8Linear, has_half_kernel
from gpt.quantize import cost_of, halves_pay, linear_bytes, multiplies_bf16, pack

# What leaves an option off that OneRow does not know, where that is not null or false.
OFF: dict[str, object] = {}

needs_half_kernel = pytest.mark.skipif(not has_half_kernel(), reason="no FBGEMM on this CPU")
HALVES = [torch.bfloat16, torch.float16]
ARCHITECTURES: list[dict[str, Any]] = [
    {"position": "rotary"},
    {"position": "rotary", "n_kv_head": 2, "activation": "swiglu", "bias": True},
    {"position": "learned", "norm": "layernorm", "bias": True, "tie_embeddings": True},
    {"ngram": 4, "ngram_rows": 97},
    {"mup_base_width": 16, "mup_base_depth": 1, "norm": "layernorm", "bias": True},
]


def build(seed: int = 1, **options: Any) -> GPT:
    torch.manual_seed(seed)
    shape = {"n_layer": 2, "n_head": 4, "n_embd": 32, "context_len": 16}
    model = GPT(ModelConfig(**{**shape, **options}, init="gpt2", init_std=0.2), 67)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model.eval()


def layers(bias: bool, width: int = 48) -> list[torch.nn.Linear]:
    torch.manual_seed(3)
    return [torch.nn.Linear(width, rows, bias=bias) for rows in (16, 9)]


def plain(linear: list[torch.nn.Linear], x: torch.Tensor) -> torch.Tensor:
    return torch.cat([layer(x) for layer in linear], -1)


@pytest.mark.parametrize("bias", [False, True])
@torch.no_grad()
def test_int8_is_within_its_steps(bias: bool) -> None:
    linear = layers(bias)
    packed = Int8Linear(linear)
    weight = torch.cat([layer.weight for layer in linear])
    kept = packed.whole * packed.step[:, None]
    assert packed.whole.abs().amax(-1).eq(127).all(), "each row uses all of the range"
    assert ((kept - weight).abs() <= packed.step[:, None] / 2 + 1e-7).all()
    x = torch.randn(2, 5, 48)
    exact = torch.nn.functional.linear(x, kept, packed.bias)
    bound = x.abs().amax(-1, keepdim=True) / 127 / 2 * kept.abs().sum(-1)
    got = packed(x)
    assert got.shape == (2, 5, 25)
    assert ((got - exact).abs() <= bound + 1e-5).all()
    assert (got - exact).abs().max() > 0
    assert torch.equal(got[1, 2:3], packed(x[1, 2:3])), "a row does not depend on the others"


@pytest.mark.parametrize("way", ["instructions", "C", "fp32"])
@pytest.mark.parametrize(
    ("n", "width", "rows"), [(1, 7, 1), (2, 48, 4), (7, 1025, 30), (70, 5000, 9)]
)
def test_products_in_int8_are_exact_in_each_way(
    monkeypatch: pytest.MonkeyPatch, way: str, n: int, width: int, rows: int
) -> None:
    monkeypatch.setattr("gpt.int8_c.cpu_has_int8", lambda: way == "instructions")
    if way == "fp32":
        monkeypatch.setattr("gpt.int8_c.c_library", lambda name: f"no {name}")
    torch.manual_seed(1)
    x = torch.randint(-127, 128, (n, width)).float()
    weights = torch.randint(-127, 128, (rows, width), dtype=torch.int8)
    x[0], weights[0] = 127, -127  # the largest sum
    exact = (x.double() @ weights.double().mT).float()
    assert torch.equal(whole_product(x, weights), exact)


@torch.no_grad()
def test_an_outlier_costs_the_other_features_no_precision() -> None:
    linear = layers(bias=False, width=400)
    packed = Int8Linear(linear)
    x = torch.randn(3, 400)
    x[1, 7] = 300
    exact = torch.nn.functional.linear(x, packed.whole * packed.step[:, None])
    rounding = torch.round(x / (300 / 127)) * (300 / 127)
    alone = torch.nn.functional.linear(rounding, packed.whole * packed.step[:, None])
    assert (alone[1] - exact[1]).abs().mean() > 0.1, "it would"
    assert (packed(x) - exact)[1].abs().mean() < 0.01


@needs_half_kernel
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("size", [1e-9, 1.0, 1e9])
@torch.no_grad()
def test_halves_are_exact(dtype: torch.dtype, size: float) -> None:
    if dtype == torch.float16 and size != 1:
        pytest.skip("fp16 itself holds no such weights")
    linear = layers(bias=True)
    for layer in linear:
        layer.weight.mul_(size * torch.logspace(-6, 0, 48))
    packed, x = HalfLinear(linear, dtype), torch.randn(2, 5, 48)
    for layer in linear:
        layer.weight.copy_(layer.weight.to(dtype))
    torch.testing.assert_close(packed(x), plain(linear, x), rtol=1e-5, atol=size * 1e-6)


@pytest.mark.skipif(not multiplies_bf16(), reason="this CPU has no bf16")
@pytest.mark.parametrize("rows", [1, 70])
@torch.no_grad()
def test_bf16_rounds_what_it_reads_and_gives(rows: int) -> None:
    linear, x = layers(bias=True), torch.randn(rows, 48)
    packed = BFloat16Linear(linear)(x)
    for layer in linear:
        layer.weight.copy_(layer.weight.bfloat16())
    exact = plain(linear, x.bfloat16().float())
    assert torch.equal(packed, packed.bfloat16().float())
    torch.testing.assert_close(packed, exact, rtol=2**-8, atol=1e-5)


@torch.no_grad()
def test_blocks_change_nothing() -> None:
    linear, x = layers(bias=True), torch.randn(2, 5, 48)
    torch.testing.assert_close(BlockedLinear(linear)(x), plain(linear, x))


@pytest.mark.parametrize("options", ARCHITECTURES, ids=str)
@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [
        (torch.float32, 1e-4),
        (torch.int8, 0.35),
        pytest.param(torch.bfloat16, 0.12, marks=needs_half_kernel),
        pytest.param(torch.float16, 0.02, marks=needs_half_kernel),
    ],
)
def test_packed_logits_are_near_those_of_fp32(
    options: dict[str, Any], dtype: torch.dtype, tolerance: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gpt.quantize.multiplies_bf16", lambda: False)
    exact = dtype != torch.int8  # whole numbers may round to the other side
    check_packed_logits(options, dtype, tolerance, alone=1e-4 if exact else 0.2)


@pytest.mark.skipif(not multiplies_bf16(), reason="this CPU has no bf16")
@pytest.mark.parametrize("options", ARCHITECTURES, ids=str)
def test_logits_of_products_in_bf16_are_near_those_of_fp32(options: dict[str, Any]) -> None:
    check_packed_logits(options, torch.bfloat16, 0.2, alone=0.2)


def check_packed_logits(
    options: dict[str, Any], dtype: torch.dtype, tolerance: float, *, alone: float
) -> None:
    """Within a tolerance of logits that spread over some units; one row as the rows of a batch."""
    model, ids = build(**options), torch.randint(67, (1, 14))
    packed = pack(model, dtype)
    with torch.inference_mode():
        plain_logits, logits = model(ids)[0], packed(ids)[0]
        assert plain_logits.std() > 0.5
        assert (logits - plain_logits).abs().max() < tolerance
        if dtype != torch.float32:
            cache, decoder = KVCache(packed, 1, 16), Decoder(packed)
            cache.fill(packed, 0, ids[0, :3].tolist())
            assert decoder.one_row is not None
            for n in range(3, 14):
                row = decoder.next_logits([int(ids[0, n])], cache)[0]
                assert (row - logits[n]).abs().max() < alone
    assert isinstance(model.head, torch.nn.Linear), "the model itself stays as it was"


@pytest.mark.parametrize("dtype", [torch.int8, *HALVES])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_packed_weights_hide_no_broken_ones(dtype: torch.dtype, bad: float) -> None:
    if dtype != torch.int8 and not halves_pay(dtype):
        pytest.skip("no products for halves on this CPU")
    for name in ("blocks.0.attn.wv", "blocks.1.mlp.down", "head"):
        model = build()
        with torch.inference_mode():
            model.get_submodule(name).weight[0, 0] = bad
            packed = pack(model, dtype)
            assert not packed(torch.tensor([[1, 2]])).isfinite().all(), name
            assert not Decoder(packed).next_logits([1], KVCache(packed, 1, 4)).isfinite().all()


def test_bytes_are_those_that_a_token_reads() -> None:
    model = build(tie_embeddings=True)
    weights = 2 * (4 * 32 * 32 + 2 * 32 * 128) + 67 * 32
    assert linear_bytes(model) == 4 * weights
    rows = 2 * (4 * 32 + 128 + 32) + 67
    assert linear_bytes(pack(model, torch.int8)) == weights + 4 * rows


def test_cost_is_the_mean_difference() -> None:
    model, worse = build(), build(seed=2)
    ids = torch.randint(67, (6, 9))
    batches = [(row[None, :-1], row[None, 1:]) for row in ids]
    with torch.no_grad():
        losses = [
            torch.nn.functional.cross_entropy(
                one(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten(), reduction="none"
            )
            for one in (model, worse)
        ]
    cost = cost_of(model, worse, batches)
    difference = losses[1] - losses[0]
    assert cost.n_tokens == 48
    assert cost.loss == pytest.approx(float(difference.mean()), abs=1e-5)
    assert cost.error == pytest.approx(float(difference.std()) / 48**0.5, rel=1e-4)
    assert cost_of(model, model, batches)[:2] == (0, 0)


def test_an_option_that_is_not_unrolled_takes_the_plain_step() -> None:
    """A field that OneRow does not know must be off by default, and turns it off when it is on."""
    assert not UNROLLED - set(ModelConfig.model_fields), "a name that is no option"
    for name, field in ModelConfig.model_fields.items():
        if name not in UNROLLED:
            off = field.default in (None, False, OFF.get(name))
            assert off, f"{name} is on by default: unroll it in OneRow, or add what is off to OFF"
            assert not is_unrolled(ModelConfig().model_copy(update={name: "on"}))
    assert is_unrolled(ModelConfig())


def test_a_model_with_an_unknown_option_decodes_by_the_plain_path(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("gpt.onerow.UNROLLED", UNROLLED - {"qk_norm"})
    assert Decoder(build(qk_norm=True)).one_row is not None, "its default"
    assert Decoder(build(qk_norm=False)).one_row is None
