"""Keys and values in the format of what reads them."""

import pytest
import torch

from gpt.decode import Decoder, KVCache, prefill
from gpt.infer import in_dtype
from tests.test_generate import build, uncached


def test_a_model_in_plain_halves_equals_uncached(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gpt.infer.halves_pay", lambda _: False)
    for name, dtype in (("bf16", torch.bfloat16), ("fp16", torch.float16)):
        model = in_dtype(build(n_kv_head=2), name, torch.device("cpu"))
        rows = [[97], list(b"some text"), list(b"more")]
        cache, decoder = KVCache(model, 3, 20), Decoder(model)
        with torch.inference_mode():
            prefill(model, cache, rows)
            assert cache.k[0].dtype == dtype
            for step in range(4):
                got = decoder.next_logits([ids[-1] for ids in rows], cache)
                wanted = torch.stack([uncached(model, ids) for ids in rows])
                torch.testing.assert_close(got, wanted, atol=0.1, rtol=0)
                rows = [[*ids, 100 + step] for ids in rows]
