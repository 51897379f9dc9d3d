"""N-gram embeddings: which row an n-gram has, what reaches a logit, and that they are learned."""

import itertools

import pytest
import torch
from torch.nn import functional as F

from gpt.config import ModelConfig, OptimizerConfig
from gpt.configfile import load_config
from gpt.errors import UserError
from gpt.model import GPT, count_parameters, ngram_rows, parameter_inventory
from gpt.optim import parameter_groups

V, T, ROWS = 23, 9, 1000


def build(ngram: int, **options: object) -> GPT:
    torch.manual_seed(5)
    shape = {"n_layer": 1, "n_head": 2, "n_embd": 16, "context_len": T, "init": "gpt2"}
    return GPT(ModelConfig.model_validate({**shape, "ngram": ngram, **options}), V)


def rows_of(tokens: list[int], longest: int) -> list[list[int]]:
    """The same hash in Python's own integers, one n-gram after another."""
    out = []
    for at in range(len(tokens)):
        row, key = [], tokens[at]
        for back in range(1, longest):
            earlier = tokens[at - back] if at >= back else -1
            key = (key * 1_000_003 + earlier + 2) % (2**31 - 1)
            row.append(key * 1_664_525 % (2**31 - 1) % ROWS)
        out.append(row)
    return out


@pytest.mark.parametrize("vocab", [V, 300_000])
def test_rows_are_the_hash_of_the_ngram_that_ends_there(vocab: int) -> None:
    tokens = torch.randint(vocab, (3, 40), generator=torch.Generator().manual_seed(1))
    rows = ngram_rows(F.pad(tokens, (3, 0), value=-1), 3, ROWS)
    assert rows.shape == (3, 40, 3)
    assert rows.tolist() == [rows_of(one, 4) for one in tokens.tolist()]


def test_few_ngrams_share_a_row() -> None:
    """As few as in a table of random rows: pairs of 65 characters in 16,384 rows."""
    pairs = torch.tensor(list(itertools.product(range(65), repeat=2)))
    rows = ngram_rows(pairs, 1, 16_384)[:, 0, 0]
    used, expected = rows.unique().numel(), 16_384 * (1 - (1 - 1 / 16_384) ** 65**2)
    assert used > 0.97 * expected


def test_no_logit_depends_on_a_later_token() -> None:
    model = build(4).eval()
    ids = torch.randint(V, (1, T), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        before = model(ids)
        for at in range(T):
            changed = ids.clone()
            changed[0, at] = (changed[0, at] + 1) % V
            differs = (model(changed) - before).abs().amax(-1)[0] > 0
            assert not differs[:at].any()
            assert differs[at:].all()


def test_without_attention_a_logit_sees_as_many_tokens_as_the_longest_ngram() -> None:
    model = build(3).eval()
    with torch.no_grad():
        for block in model.blocks:
            block.attn.wo.weight.zero_()  # type: ignore[union-attr]
        ids = torch.arange(T)[None]
        changed = ids.clone()
        changed[0, 2] = V - 1
        differs = (model(changed) - model(ids)).abs().amax(-1)[0] > 0
    assert differs.tolist() == [False, False, True, True, True, False, False, False, False]


def test_one_is_the_model_without_them() -> None:
    plain = build(1, ngram_rows=7)
    assert not [name for name, _ in plain.named_parameters() if "ngram" in name]


def test_they_are_counted_and_updated_as_embeddings() -> None:
    model = build(3, ngram_rows=50)
    rows = parameter_inventory(model.config, V)
    assert sum(row.count for row in rows) == count_parameters(model)
    groups = parameter_groups(model, OptimizerConfig(name="muon"))
    table = model.ngram_emb.weight
    assert [g["name"] for g in groups if any(p is table for p in g["params"])] == ["embeddings"]


def test_dropout_takes_a_length_and_all_longer_ones() -> None:
    model = build(4, ngram_dropout=0.4, context_len=512)
    ones = torch.ones(8, 512, 3, 16)
    kept = model._kept(ones)
    assert kept.shape == (8, 512, 3)
    assert set(kept.unique().tolist()) == {0, 1}
    assert (kept[..., 1:] <= kept[..., :-1]).all()
    shares = kept.mean((0, 1)).tolist()
    assert shares == pytest.approx([0.6, 0.36, 0.216], abs=0.04)


def test_dropout_is_for_training_only() -> None:
    ids = torch.arange(T)[None]
    plain, dropped = build(4), build(4, ngram_dropout=0.9)
    assert torch.equal(plain.eval()(ids), dropped.eval()(ids))
    assert not torch.equal(plain.train()(ids), dropped.train()(ids))


def test_a_table_learns_what_pairs_tell() -> None:
    """With no attention and no MLP the next token of a chain of order two is still learned."""
    draw = torch.Generator().manual_seed(3)
    follows = torch.randint(V, (V, V), generator=draw)
    losses = {}
    for ngram in (1, 2):
        model = build(ngram, context_len=64, ngram_rows=4096)
        table = [p for name, p in model.named_parameters() if "emb" in name or "head" in name]
        optimizer = torch.optim.Adam(table, lr=0.05)
        for _ in range(60):
            ids = torch.randint(V, (32, 65), generator=draw)
            for at in range(2, 65):
                ids[:, at] = follows[ids[:, at - 2], ids[:, at - 1]]
            loss = F.cross_entropy(model(ids[:, :-1])[:, 2:].flatten(0, 1), ids[:, 3:].flatten())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        losses[ngram] = float(loss.detach())
    assert losses[2] < 0.3 * losses[1]


def test_dropout_without_ngrams_is_refused() -> None:
    with pytest.raises(UserError, match=r"ngram_dropout 0\.5 has no n-grams .* set ngram to 2"):
        load_config(None, [("model.ngram_dropout", "0.5")])
