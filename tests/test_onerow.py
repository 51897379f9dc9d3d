"""The quick step of one row, in C and by NumPy: the logits of the model itself, whatever it is."""

import itertools
import math
from typing import Any

import pytest
import torch

from gpt.clibrary import c_library
from gpt.config import ModelConfig
from gpt.decode import Decoder, KVCache, OneRow
from gpt.errors import UserError
from gpt.generate import complete
from gpt.model import GPT
from gpt.onerow_c import OneRowC
from gpt.packed import HalfLinear
from gpt.products import Product
from gpt.quantize import halves_pay, pack
from gpt.sampling import Sampling
from tests.test_generate import BYTES, build, uncached


@pytest.fixture(params=["in C", "by NumPy"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> type:
    """The class of the step; without a compiler there is one of them."""
    if request.param == "by NumPy":
        monkeypatch.setattr("gpt.decode.c_library", lambda _: "left out")
        return OneRow
    if isinstance(c_library("decode"), str):
        pytest.skip("no C compiler")
    return OneRowC


@pytest.mark.parametrize("shape", [(16, 4), (19, 5), (3, 40), (65, 384)])
@pytest.mark.parametrize("bias", [False, True])
def test_a_cut_product_equals_the_layer(shape: tuple[int, int], bias: bool) -> None:
    torch.manual_seed(9)
    linear = torch.nn.Linear(shape[1], shape[0], bias=bias)
    x, y = torch.randn(shape[1]), torch.full((shape[0],), math.nan)
    product = Product([linear], x.numpy(), y.numpy())
    with torch.inference_mode():
        product.set(2.0)
        expected = torch.nn.functional.linear(2 * x, linear.weight, linear.bias)
        torch.testing.assert_close(y, expected)
        product.add()
        torch.testing.assert_close(y, expected + linear(x))


CHOICES: dict[str, list[Any]] = {
    "position": ["learned", "rotary"],
    "norm": ["layernorm", "rmsnorm"],
    "activation": ["gelu", "gelu_tanh", "swiglu", "relu2"],
    "bias": [False, True],
    "tie_embeddings": [False, True],
    "n_kv_head": [None, 2, 1],
    "qk_norm": [False, True],
}


@pytest.mark.parametrize("n_head", [4, 1])
def test_one_row_equals_the_plain_model_with_every_option(way: type, n_head: int) -> None:
    for values in itertools.product(*CHOICES.values()):
        options = dict(zip(CHOICES, values, strict=True))
        if n_head == 1 and options["n_kv_head"] is not None:
            continue
        shape = {"n_layer": 2, "n_head": n_head, "n_embd": 24, "context_len": 8, "n_hidden": 37}
        torch.manual_seed(10)
        model = GPT(ModelConfig(**shape, init="gpt2", init_std=0.2, **options), 67).train()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() == 1:
                    parameter.add_(torch.randn_like(parameter), alpha=0.1)
        ids = torch.randint(67, (8,)).tolist()
        cache, decoder = KVCache(model, 1, 8), Decoder(model)
        assert isinstance(decoder.one_row, way)
        assert model.training
        with torch.inference_mode():
            cache.fill(decoder.model, 0, ids[:3])
            plain = model(torch.tensor([ids]))[0]
            for n in range(3, 8):
                logits = decoder.next_logits([ids[n]], cache)[0]
                torch.testing.assert_close(logits, plain[n], atol=1e-4, rtol=0, msg=str(options))


@pytest.mark.usefixtures("way")
def test_one_row_hides_of_the_largest_weights_no_more_than_the_model() -> None:
    model = build(tie_embeddings=False)
    with torch.inference_mode():
        model.tok_emb.weight.fill_(1e38)
        logits = Decoder(model).next_logits([97], KVCache(model, 1, 8))[0]
        torch.testing.assert_close(logits, uncached(model, [97]), rtol=0, atol=0)


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("norm", ["rmsnorm", "layernorm"])
def test_one_row_has_the_logits_of_the_model_where_squares_overflow(norm: str) -> None:
    model = build(tie_embeddings=False, norm=norm)
    with torch.no_grad():
        for weight in (model.tok_emb.weight, model.blocks[1].attn.wq.weight):
            weight *= 1e30
    ids = [97, 98, 99]
    cache, decoder = KVCache(model, 1, 8), Decoder(model)
    assert decoder.one_row is not None
    with torch.inference_mode():
        for end, token in enumerate(ids, start=1):
            logits = decoder.next_logits([token], cache)[0]
            expected = uncached(model, ids[:end])
            assert expected.isfinite().all() == (norm == "rmsnorm"), "what torch's own norm gives"
            torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-6, equal_nan=True)


@pytest.mark.usefixtures("way")
def test_one_row_hides_no_broken_weights() -> None:
    for bad in (math.nan, math.inf):
        model = build(tie_embeddings=False)
        with torch.no_grad():
            model.tok_emb.weight.fill_(bad)
        with pytest.raises(UserError, match="not finite"):
            complete(model, BYTES, ["ab"], Sampling(max_tokens=3))


def steps(model: GPT, ids: list[int], threads: int) -> torch.Tensor:
    """The logits after each of the ids, of a decoder with so many threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        cache, decoder = KVCache(model, 1, len(ids)), Decoder(model)
        with torch.inference_mode():
            logits = [decoder.next_logits([token], cache)[0].clone() for token in ids]
        if isinstance(c_library("decode"), str):
            pytest.skip("no C compiler")
        assert isinstance(decoder.one_row, OneRowC)
        return torch.stack(logits)
    finally:
        torch.set_num_threads(before)


FORMATS = [torch.float32, torch.bfloat16, torch.float16, torch.int8]


@pytest.mark.parametrize("dtype", FORMATS)
def test_threads_do_not_change_a_bit(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gpt.onerow_c.ALONE_BYTES", 0)
    if dtype in (torch.bfloat16, torch.float16) and not halves_pay(dtype):
        pytest.skip("no products for halves on this CPU")
    model = build(n_kv_head=2, activation="swiglu", bias=True, norm="layernorm")
    model = model if dtype == torch.float32 else pack(model, dtype)
    ids = torch.randint(257, (12,)).tolist()
    one = steps(model, ids, 1)
    assert one.std() > 0.5
    for threads in (2, 3, 5):
        assert torch.equal(steps(model, ids, threads), one), f"{threads} threads"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("width", [32, 96, 244])
def test_the_smallest_halves_are_multiplied_too(dtype: torch.dtype, width: int) -> None:
    if not halves_pay(dtype):
        pytest.skip("no products for halves on this CPU")
    model = build(n_embd=width, n_head=2, tie_embeddings=False)
    with torch.no_grad():
        model.head.weight.mul_(torch.logspace(-7, 0, model.vocab_size)[:, None])
    packed = pack(model, dtype)
    rows, wanted = packed.head.rows(), model.head.weight.detach().to(dtype)
    if dtype == torch.bfloat16 and isinstance(packed.head, HalfLinear):  # kept in fp16
        most = 2**-38 * float(wanted.abs().max())
        assert float((rows.double() - wanted.double()).abs().max()) <= most
    else:
        assert torch.equal(rows, wanted)
    with torch.no_grad():
        x = packed.features(torch.tensor([[7]]))[0, -1]
    exact = rows.double() @ (x.bfloat16() if packed.head.rounds else x).double()
    difference = (steps(packed, [7], 2)[0].double() - exact).abs()
    tolerance = 1e-4 if dtype == torch.float16 else 2**-7
    assert (difference <= tolerance * exact.abs().clamp(min=rows.double().abs().amax(1))).all()


def test_a_long_context_in_c_is_that_of_the_model() -> None:
    model = build(context_len=300, n_head=2, n_embd=64)
    ids = torch.randint(257, (300,)).tolist()
    logits = steps(model, ids, 2)
    with torch.no_grad():
        torch.testing.assert_close(logits, model(torch.tensor([ids]))[0], atol=2e-4, rtol=0)
