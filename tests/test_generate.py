"""Generation: cached = uncached, batch = alone, sampling, stop texts, whole characters."""

import itertools
import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gpt.config import ModelConfig, TokenizerConfig
from gpt.decode import KVCache, prefill
from gpt.errors import UserError
from gpt.generate import TextStream, complete, encode_prompt, generate
from gpt.model import GPT
from gpt.sampling import Sampling, choose, keep_likely
from gpt.tokenizer import build_tokenizer

BYTES = build_tokenizer(TokenizerConfig(kind="bytes"), lambda: iter(()))
EOT = BYTES.eot_id
PROMPTS = ["a", "some longer prompt", "", "日本", "some longer prompt"]
ARCHITECTURES: list[dict[str, Any]] = [
    {"position": "rotary"},
    {"position": "learned"},
    {"position": "rotary", "n_kv_head": 2, "activation": "swiglu", "qk_norm": False},
    {"position": "learned", "norm": "layernorm", "bias": True, "tie_embeddings": True},
    {"ngram": 4, "ngram_rows": 97},
]


def build(seed: int = 1, context_len: int = 64, **options: Any) -> GPT:
    """A model with strong opinions, so that errors show in its choices."""
    torch.manual_seed(seed)
    shape: dict[str, Any] = {"n_layer": 2, "n_head": 4, "n_embd": 32, "context_len": context_len}
    shape |= options
    model = GPT(ModelConfig(**shape, init="gpt2", init_std=0.2), BYTES.vocab_size)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(std=0.1)
    return model.eval()


def uncached(model: GPT, ids: list[int]) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.tensor([ids]))[0, -1]


def greedy_reference(model: GPT, prompt: str, max_tokens: int) -> list[int]:
    """Greedy decoding with no cache at all, sliding by a quarter of the context."""
    context_len = model.config.context_len
    window = (list(prompt.encode()) or [EOT])[-context_len:]
    tokens: list[int] = []
    for _ in range(max_tokens):
        if len(window) > context_len:
            window = window[max(1, context_len // 4) :]
        token = int(uncached(model, window).argmax())
        if token == EOT:
            break
        window.append(token)
        tokens.append(token)
    return tokens


@pytest.mark.parametrize("options", ARCHITECTURES, ids=str)
def test_cached_logits_equal_uncached(options: dict[str, Any]) -> None:
    model = build(**options)
    ids = torch.randint(256, (40,), generator=torch.Generator().manual_seed(2)).tolist()
    cache = KVCache(model, 1, 40)
    with torch.inference_mode():
        cache.fill(model, 0, ids[:7])
        for n in range(7, 40):
            logits = model(torch.tensor([[ids[n]]]), cache.next_token())[0, -1]
            torch.testing.assert_close(logits, uncached(model, ids[: n + 1]), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("in_c", [False, True])
@pytest.mark.parametrize("most", [0, 12, 4096])
@pytest.mark.parametrize("options", ARCHITECTURES, ids=str)
def test_prompts_that_are_encoded_together_do_not_see_each_other(
    options: dict[str, Any], most: int, in_c: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gpt.decode.TOKENS_TOGETHER", most)
    if not in_c:
        monkeypatch.setattr("gpt.kvcache.attends_in_c", lambda _: False)
    model = build(**options)
    draw = torch.Generator().manual_seed(4)
    rows = [torch.randint(256, (n,), generator=draw).tolist() for n in (5, 1, 9, 2, 14)]
    rows.append(rows[2])
    cache = KVCache(model, len(rows), 20)
    with torch.inference_mode():
        prefill(model, cache, rows)
        assert cache.lengths == [len(ids) - 1 for ids in rows]
        logits = model(torch.tensor([ids[-1:] for ids in rows]), cache.next_token())[:, -1]
        for got, ids in zip(logits, rows, strict=True):
            torch.testing.assert_close(got, uncached(model, ids), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("options", ARCHITECTURES, ids=str)
def test_ragged_rows_equal_uncached(options: dict[str, Any]) -> None:
    model = build(**options)
    draw = torch.Generator().manual_seed(3)
    rows = [torch.randint(256, (n,), generator=draw).tolist() for n in (1, 9, 4)]
    cache = KVCache(model, 3, 30)
    with torch.inference_mode():
        for row, ids in enumerate(rows):
            cache.fill(model, row, ids)
        for step in range(12):
            if step == 6:
                cache.keep([0, 2])
                rows = [rows[0], rows[2]]
            new = torch.randint(256, (len(rows), 1), generator=draw)
            rows = [[*ids, int(token)] for ids, token in zip(rows, new[:, 0], strict=True)]
            logits = model(new, cache.next_token())[:, -1]
            for got, ids in zip(logits, rows, strict=True):
                torch.testing.assert_close(got, uncached(model, ids), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("context_len", [1, 2, 5, 16])
@pytest.mark.parametrize("options", [ARCHITECTURES[n] for n in (0, 1, 4)], ids=str)
def test_greedy_equals_uncached_decoding_beyond_the_context(
    context_len: int, options: dict[str, Any]
) -> None:
    model = build(context_len=context_len, **options)
    prompts = ["x", "a prompt that is longer than the context"]
    for prompt in prompts:
        (result,) = complete(model, BYTES, [prompt], Sampling(temperature=0, max_tokens=40))
        assert result.tokens == greedy_reference(model, prompt, 40)


@pytest.mark.parametrize("options", ARCHITECTURES, ids=str)
@pytest.mark.parametrize("context_len", [64, 12])
def test_batch_gives_each_prompt_what_it_gets_alone(
    options: dict[str, Any], context_len: int
) -> None:
    model = build(context_len=context_len, **options)
    sampling = Sampling(temperature=1.0, seed=5, max_tokens=30, top_k=50, repetition_penalty=1.1)
    together = complete(model, BYTES, PROMPTS, sampling, samples=2)
    alone = [
        row for prompt in PROMPTS for row in complete(model, BYTES, [prompt], sampling, samples=2)
    ]
    assert together == alone
    assert together[2:4] == together[8:10], "the place in the batch must not matter"
    assert together[0].tokens != together[1].tokens, "samples differ"


def test_more_rows_than_run_at_once() -> None:
    model = build()
    sampling = Sampling(seed=6, max_tokens=3)
    many = complete(model, BYTES, ["ab"], sampling, samples=35)
    assert many[:3] == complete(model, BYTES, ["ab"], sampling, samples=3)
    assert len(many) == 35


def test_seed_decides_everything_and_global_state_stays() -> None:
    model = build()
    sampling = Sampling(seed=7, max_tokens=20)
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = complete(model, BYTES, ["hello"], sampling)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    assert complete(model, BYTES, ["hello"], sampling) == first
    assert complete(model, BYTES, ["hello"], Sampling(seed=8, max_tokens=20)) != first


def test_model_stays_in_its_mode_and_trainable() -> None:
    model = build(dropout=0.5).train()
    sampling = Sampling(seed=7, max_tokens=5)
    assert complete(model, BYTES, ["a"], sampling) == complete(model, BYTES, ["a"], sampling)
    assert model.training
    model(torch.tensor([[1, 2]])).sum().backward()
    assert isinstance(model.head, torch.nn.Linear)


def test_generation_follows_the_weights_of_now() -> None:
    model = build(tie_embeddings=False)
    sampling = Sampling(temperature=0, max_tokens=2)
    for samples in (1, 8):
        assert complete(model, BYTES, ["a"], sampling, samples)[0].tokens != [0, 0]
    with torch.no_grad():
        model.head.weight.zero_()
    for samples in (1, 8):
        assert complete(model, BYTES, ["a"], sampling, samples)[0].tokens == [0, 0]


def constant_model(*tokens: int) -> GPT:
    """A model that says these tokens in turn, by position, whatever it reads."""
    model = build(position="learned", tie_embeddings=False, norm="rmsnorm", context_len=64)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        model.final_norm.weight.fill_(1)
        for place in range(64):
            model.pos_emb.weight[place, place % 32] = 1
        for place in range(32):
            model.head.weight[tokens[place % len(tokens)], place] = 9
    return model


def test_length_end_and_stop() -> None:
    model = constant_model(*b"hello, world", EOT)
    results = {
        stop: complete(model, BYTES, ["x"], Sampling(temperature=0, max_tokens=20, stop=stop))[0]
        for stop in ((), (", w",), ("zzz", "rld", "world"))
    }
    assert (results[()].text, results[()].finish_reason) == ("hello, world", "end")
    assert results[()].tokens == list(b"hello, world")
    assert (results[", w",].text, results[", w",].finish_reason) == ("hello", "stop")
    assert results["zzz", "rld", "world"].text == "hello, ", "the first to begin wins"
    (short,) = complete(model, BYTES, ["x"], Sampling(temperature=0, max_tokens=5))
    assert (short.text, short.finish_reason) == ("hello", "length")


def test_pieces_never_show_half_a_character_or_part_of_a_stop_text() -> None:
    model = constant_model(*"aé日👍 stop".encode())
    sampling = Sampling(temperature=0, max_tokens=30, stop=(" stop",))
    pieces = list(generate(model, BYTES, ["x"], sampling))
    assert [piece.text for piece in pieces] == ["a", "é", "日", "👍", ""]
    assert pieces[-1].completion is not None
    assert pieces[-1].completion.text == "aé日👍"


def test_a_character_cut_by_max_tokens_is_left_out() -> None:
    model = constant_model(*"a👍".encode())
    (result,) = complete(model, BYTES, ["x"], Sampling(temperature=0, max_tokens=3))
    assert result.text == "a"
    assert len(result.tokens) == 3


@settings(max_examples=300, deadline=None, derandomize=True)
@given(
    text=st.text(alphabet="abé日👍", max_size=30),
    stop=st.lists(st.text(alphabet="abé日", min_size=1, max_size=4), max_size=3),
)
def test_stream_gives_the_text_before_the_first_stop(text: str, stop: list[str]) -> None:
    stream, shown = TextStream(stop), ""
    for byte in text.encode():
        shown += stream.feed(bytes([byte]))
        assert text.startswith(shown)
        assert not any(one in shown for one in stop)
        if stream.stopped:
            break
    else:
        shown += stream.finish()
        assert not any(one in text for one in stop)
        assert shown == text
    if stream.stopped:
        assert any(text.startswith(shown + one) for one in stop)
    assert stream.given == shown


def test_invalid_bytes_become_replacement_characters() -> None:
    stream = TextStream([])
    assert stream.feed(b"a\xff") + stream.feed(b"b\xe6") + stream.finish() == "a\ufffdb"


def test_prompt_edges(capsys: pytest.CaptureFixture[str]) -> None:
    assert encode_prompt(BYTES, "", 8) == [EOT]
    assert encode_prompt(BYTES, "abc", 8) == [97, 98, 99]
    assert encode_prompt(BYTES, "\udcff", 8) == list("\ufffd".encode())
    assert capsys.readouterr().err == ""
    assert encode_prompt(BYTES, "0123456789", 8) == list(b"23456789")
    assert "10 tokens" in capsys.readouterr().err


def test_unknown_characters_are_a_user_error() -> None:
    chars = build_tokenizer(TokenizerConfig(kind="chars"), lambda: iter(["abc"]))
    with pytest.raises(UserError, match="U\\+65E5"):
        complete(build(), chars, ["日"], Sampling())


LOGITS = torch.tensor([[2.0, 1.0, 0.0, -1.0, 3.0]])


def frequencies(sampling: Sampling, logits: torch.Tensor = LOGITS, n: int = 4000) -> list[float]:
    """How often each token comes out, over evenly spread draws."""
    tokens = [choose(logits, sampling, [(i + 0.5) / n], [[]])[0] for i in range(n)]
    return [tokens.count(token) / n for token in range(logits.size(-1))]


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_temperature_gives_the_softmax(temperature: float) -> None:
    expected = (LOGITS[0] / temperature).softmax(-1).tolist()
    assert frequencies(Sampling(temperature=temperature)) == pytest.approx(expected, abs=1e-3)


def test_filters_keep_what_they_should() -> None:
    def kept(**options: Any) -> list[int]:
        logits = LOGITS - LOGITS.max()
        return keep_likely(logits, Sampling(**options))[0].isfinite().nonzero().flatten().tolist()

    # Probabilities: 0.234, 0.086, 0.032, 0.012, 0.636.
    assert kept() == [0, 1, 2, 3, 4]
    assert kept(top_k=2) == [0, 4]
    assert kept(top_k=99) == [0, 1, 2, 3, 4]
    assert kept(top_p=0.6) == [4]
    assert kept(top_p=0.7) == [0, 4]
    assert kept(top_p=0.9) == [0, 1, 4]
    assert kept(top_p=1.0) == [0, 1, 2, 3, 4]
    assert kept(top_p=1e-9) == [4]
    assert kept(min_p=0.1) == [0, 1, 4]
    assert kept(min_p=1.0) == [4]
    assert kept(min_p=0.0) == [0, 1, 2, 3, 4]
    assert kept(top_k=3, top_p=0.7) == [0, 4]


def test_top_p_over_a_flat_large_vocabulary() -> None:
    logits = torch.zeros(1, 5000) - torch.arange(5000) * 1e-6
    kept = keep_likely(logits, Sampling(top_p=0.5))[0].isfinite().sum().item()
    assert kept == pytest.approx(2494, abs=5)


def test_filters_look_at_each_row_alone() -> None:
    logits = torch.stack((LOGITS[0], LOGITS[0].flip(0), LOGITS[0] * 0))
    logits = logits - logits.amax(-1, keepdim=True)
    sampling = Sampling(top_k=3, top_p=0.9, min_p=0.1)
    together = keep_likely(logits, sampling)
    for row in range(3):
        assert torch.equal(together[row], keep_likely(logits[row : row + 1], sampling)[0])


def test_repetition_penalty() -> None:
    logits = torch.tensor([[2.0, -1.0, 1.9]])
    greedy = {"temperature": 0.0, "repetition_penalty": 2.0}
    assert choose(logits, Sampling(**greedy), [0.0], [[0, 0, 1]]) == [2]
    assert choose(logits, Sampling(**greedy), [0.0], [[1]]) == [0]
    weakened = torch.tensor([[1.0, -2.0, 1.9]]).softmax(-1)[0].tolist()
    tokens = [
        choose(logits, Sampling(temperature=1, repetition_penalty=2), [(i + 0.5) / 999], [[0, 1]])
        for i in range(999)
    ]
    assert [tokens.count([t]) / 999 for t in range(3)] == pytest.approx(weakened, abs=2e-3)
    assert logits[0, 0] == 2.0, "the model's logits are left alone"


@pytest.mark.parametrize("penalty", [1e-300, 5e-324, 1e-38, 1e38, 1e300])
def test_no_penalty_makes_sound_weights_look_broken(penalty: float) -> None:
    logits = torch.tensor([[3.0, 0.0, -2.0, 1.0]])
    for temperature in (0.0, 1.0):
        sampling = Sampling(temperature=temperature, repetition_penalty=penalty)
        (token,) = choose(logits, sampling, [0.5], [[0, 1, 2]])
        assert token == (3 if penalty > 1 else 0)


class OnMps(torch.Tensor):
    """Says that it is on Apple's mps, and refuses float64 as that does."""

    @classmethod
    def __torch_function__(
        cls,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if func == torch.Tensor.device.__get__:
            return torch.device("mps")
        made = super().__torch_function__(func, types, args, kwargs or {})
        if func == torch.Tensor.cpu:
            with torch._C.DisableTorchFunctionSubclass():
                return made.as_subclass(torch.Tensor)
        if isinstance(made, torch.Tensor) and made.dtype == torch.float64:
            raise TypeError("the MPS framework doesn't support float64")
        return made


@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize("options", [{}, {"top_p": 0.9, "repetition_penalty": 1.3}])
def test_a_device_without_float64_gives_the_cpus_tokens(rows: int, options: dict[str, Any]) -> None:
    logits, sampling = LOGITS.expand(rows, -1), Sampling(temperature=1, **options)
    rest = [0.3, 0.9][:rows], [[4, 0], [1]][:rows]
    on_mps = logits.as_subclass(OnMps)
    assert choose(on_mps, sampling, *rest) == choose(logits, sampling, *rest)


def test_samples_come_without_end_and_without_delay() -> None:
    pieces = generate(build(), BYTES, ["a"], Sampling(max_tokens=1, seed=1), 10**15)
    last = next(piece for piece in itertools.islice(pieces, 200, None) if piece.completion)
    assert last.sample > 50


@pytest.mark.parametrize("temperature", [1e-300, 1e-12, 1e300])
@pytest.mark.parametrize("draw", [0.0, 0.5, 1 - 2**-53])
def test_extreme_temperatures(temperature: float, draw: float) -> None:
    (token,) = choose(LOGITS * 100, Sampling(temperature=temperature), [draw], [[]])
    assert token == 4 if temperature < 1 else 0 <= token < 5


def test_excluded_tokens_are_never_drawn() -> None:
    logits = torch.full((1, 50), 0.0)
    logits[0, 10] = 1.0
    for draw in (0.0, 1e-20, 0.999999, 1 - 2**-53):
        assert choose(logits, Sampling(top_k=1), [draw], [[]]) == [10]


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_broken_weights_are_named(bad: float, temperature: float) -> None:
    logits = LOGITS.clone()
    logits[0, 1] = bad
    with pytest.raises(UserError, match="not finite"):
        choose(logits, Sampling(temperature=temperature), [0.5], [[]])


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"temperature": -0.1}, "temperature -0.1"),
        ({"temperature": math.nan}, "temperature nan"),
        ({"temperature": math.inf}, "temperature inf"),
        ({"top_k": 0}, "top-k 0"),
        ({"top_p": 0.0}, "top-p 0.0"),
        ({"top_p": 1.01}, "top-p 1.01"),
        ({"top_p": math.nan}, "top-p nan"),
        ({"min_p": -0.1}, "min-p -0.1"),
        ({"min_p": math.nan}, "min-p nan"),
        ({"repetition_penalty": 0.0}, "repetition-penalty 0.0"),
        ({"repetition_penalty": math.nan}, "repetition-penalty nan"),
        ({"seed": -1}, "seed -1"),
        ({"max_tokens": 0}, "max-tokens 0"),
        ({"stop": ("",)}, "stop ''"),
    ],
)
def test_bad_settings_are_named(options: dict[str, Any], word: str) -> None:
    with pytest.raises(UserError, match=word.replace(".", "\\.")) as caught:
        Sampling(**options)
    assert len(caught.value.lines) == 1


def test_all_bad_settings_at_once() -> None:
    with pytest.raises(UserError) as caught:
        Sampling(temperature=-1, top_k=0, max_tokens=0)
    assert len(caught.value.lines) == 3


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    prompt=st.text(max_size=40),
    temperature=st.one_of(st.just(0.0), st.floats(0, 1e6)),
    top_k=st.one_of(st.none(), st.integers(1, 1000)),
    top_p=st.one_of(st.none(), st.floats(0, 1, exclude_min=True)),
    min_p=st.one_of(st.none(), st.floats(0, 1)),
    penalty=st.floats(0.1, 10),
    stop=st.lists(st.text(min_size=1, max_size=3), max_size=2),
)
def test_any_valid_settings_give_a_text(
    prompt: str,
    temperature: float,
    top_k: int | None,
    top_p: float | None,
    min_p: float | None,
    penalty: float,
    stop: list[str],
) -> None:
    sampling = Sampling(temperature, top_k, top_p, min_p, penalty, 3, 6, tuple(stop))
    (result,) = complete(SMALL, BYTES, [prompt], sampling)
    assert len(result.tokens) <= 6
    assert not any(one in result.text for one in stop)


SMALL = build(context_len=8)


def test_top_p_of_a_flat_row_does_not_depend_on_a_peaked_one_beside_it() -> None:
    flat = torch.zeros(1, 5000) - torch.arange(5000) * 1e-6
    peaked = torch.where(torch.arange(5000) == 7, 0.0, -30.0)[None]
    together = keep_likely(torch.cat((peaked, flat)), Sampling(top_p=0.5))
    assert torch.equal(together[1:], keep_likely(flat, Sampling(top_p=0.5)))


@pytest.mark.parametrize("options", [{"temperature": 0.0}, {"temperature": 1.0}, {"top_k": 2}])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_broken_weights_are_named_in_a_batch_too(bad: float, options: dict[str, Any]) -> None:
    logits = torch.cat((LOGITS, LOGITS))
    logits[1, 1] = bad
    with pytest.raises(UserError, match="not finite"):
        choose(logits, Sampling(**options), [0.5, 0.5], [[], []])
