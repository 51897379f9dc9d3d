"""Keys and values of the tokens so far, a row each, in memory that is reserved once."""

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn import functional as F

from gpt.attention_c import attend_rows, attends_in_c
from gpt.model import GPT
from gpt.packed import Part


class KVCache:
    """Keys and values of B rows, each row as long as it is; room for `size` tokens a row.

    In the model's own format; in bf16 also where its layers give numbers rounded to bf16, and what
    reads them here can.
    """

    def __init__(self, model: GPT, rows: int, size: int) -> None:
        """Reserves the memory; zeros, because what is masked must still be finite."""
        config, like = model.config, model.final_norm.weight
        assert isinstance(like, Tensor)
        shape = (rows, config.kv_heads, size, config.head_dim)
        # C reads queries, new keys and new values as fp32, which the model must compute in.
        self.in_c = attends_in_c(like)
        dtype = torch.bfloat16 if _rounds(model) and self.in_c else like.dtype
        self.k = [like.new_zeros(shape, dtype=dtype) for _ in range(config.n_layer)]
        self.v = [like.new_zeros(shape, dtype=dtype) for _ in range(config.n_layer)]
        self.lengths = [0] * rows
        # The newest ids, for models with n-gram embeddings; -1 before the first.
        self.recent = torch.full((rows, config.ngram - 1), -1, device=self.k[0].device)

    def fill(self, model: GPT, row: int, ids: list[int]) -> None:
        """Encodes a row's tokens from position 0 on, in place of what it held."""
        self.fill_rows(model, {row: ids})

    def fill_rows(self, model: GPT, rows: Mapping[int, list[int]]) -> None:
        """The same for several rows, one behind the other as one long row: products are quicker.

        Each sees itself alone. For models without n-grams, which would look across.
        """
        for row, ids in rows.items():
            self.lengths[row] = len(ids)
            self.recent[row] = -1
        whole = [token for ids in rows.values() for token in ids]
        if whole:
            lengths = {row: len(ids) for row, ids in rows.items() if ids}
            model.features(torch.tensor([whole], device=self.k[0].device), _Fill(self, lengths))

    def copy(self, source: int, target: int) -> None:
        """Gives one row what another holds."""
        for store in (*self.k, *self.v):
            store[target] = store[source]
        self.lengths[target] = self.lengths[source]
        self.recent[target] = self.recent[source]

    def keep(self, rows: list[int]) -> None:
        """Drops all other rows."""
        self.k = [store[rows] for store in self.k]
        self.v = [store[rows] for store in self.v]
        self.lengths = [self.lengths[row] for row in rows]
        self.recent = self.recent[rows]

    def after_earlier(self, ids: Tensor, rows: slice) -> Tensor:
        """Puts the newest ids before new ones (B, T) of some rows, and keeps what is newest now."""
        ids = torch.cat((self.recent[rows], ids), dim=1)
        self.recent[rows] = ids[:, ids.size(1) - self.recent.size(1) :]
        return ids

    def next_token(self) -> "_NextToken":
        """The cache as the model needs it to append one token to each row."""
        new = _NextToken(self)
        self.lengths = [length + 1 for length in self.lengths]
        return new


def _rounds(model: GPT) -> bool:
    """Whether keys and values come from layers that round to bf16."""
    return any(isinstance(m, Part) and m.whole.rounds for m in model.modules())


class _Fill:
    """Writes the first tokens of some rows, which come one behind the other."""

    def __init__(self, cache: KVCache, lengths: dict[int, int]) -> None:
        self.cache, self.lengths = cache, lengths
        device = cache.k[0].device
        self.positions = torch.cat([torch.arange(n, device=device) for n in lengths.values()])

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float | None) -> Tensor:
        parts, grouped = [], q.size(1) > k.size(1)
        of_rows = (torch.split(each, list(self.lengths.values()), 2) for each in (q, k, v))
        for (row, length), q_row, k_row, v_row in zip(self.lengths.items(), *of_rows, strict=True):
            self.cache.k[layer][row, :, :length] = k_row[0]
            self.cache.v[layer][row, :, :length] = v_row[0]
            part = F.scaled_dot_product_attention(
                q_row, k_row, v_row, is_causal=length > 1, scale=scale, enable_gqa=grouped
            )
            parts.append(part)
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=2)

    def after_earlier(self, ids: Tensor) -> Tensor:
        (row,) = self.lengths
        return self.cache.after_earlier(ids, slice(row, row + 1))


class _NextToken:
    """Appends one token to each row."""

    def __init__(self, cache: KVCache) -> None:
        device = cache.k[0].device
        self.cache, self.used = cache, max(cache.lengths) + 1
        self.rows = torch.arange(len(cache.lengths), device=device)
        self.at = torch.tensor(cache.lengths, device=device)  # (B,)
        self.positions = self.at[:, None]  # (B, T = 1)
        self.mask: Tensor | None = None
        if not cache.in_c and len(set(cache.lengths)) > 1:  # else there is nothing to hide
            slots = torch.arange(self.used, device=device)
            self.mask = (slots <= self.positions)[:, None, None, :]  # (B, 1, T = 1, S)

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float | None) -> Tensor:
        keys, values = self.cache.k[layer], self.cache.v[layer]
        if self.cache.in_c:
            return attend_rows(q, k, v, keys, values, self.at, scale)
        keys[self.rows, :, self.at] = k[:, :, 0]
        values[self.rows, :, self.at] = v[:, :, 0]
        keys, values = keys[:, :, : self.used], values[:, :, : self.used]  # (B, H, S, D)
        grouped = q.size(1) > k.size(1)
        return F.scaled_dot_product_attention(
            q, keys, values, self.mask, scale=scale, enable_gqa=grouped
        )

    def after_earlier(self, ids: Tensor) -> Tensor:
        return self.cache.after_earlier(ids, slice(None))
