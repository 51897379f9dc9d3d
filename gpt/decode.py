"""From the tokens so far to the logits of the next: KV cache, prefill, one step. Draws nothing."""

import copy
import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gpt.model import GPT, Block, attention_scale

Floats = npt.NDArray[np.float32]


class KVCache:
    """Keys and values of B rows, each row as long as it is; room for `size` tokens a row."""

    def __init__(self, model: GPT, rows: int, size: int) -> None:
        """Reserves the memory; zeros, because what is masked must still be finite."""
        config, like = model.config, model.tok_emb.weight
        shape = (rows, config.kv_heads, size, config.head_dim)
        self.k = [like.new_zeros(shape) for _ in range(config.n_layer)]
        self.v = [like.new_zeros(shape) for _ in range(config.n_layer)]
        self.lengths = [0] * rows

    def fill(self, model: GPT, row: int, ids: list[int]) -> None:
        """Encodes a row's tokens from position 0 on, in place of what it held."""
        self.lengths[row] = len(ids)
        if ids:
            device = model.tok_emb.weight.device
            model.features(torch.tensor([ids], device=device), _Fill(self, row, len(ids)))

    def copy(self, source: int, target: int) -> None:
        """Gives one row what another holds."""
        for store in (*self.k, *self.v):
            store[target] = store[source]
        self.lengths[target] = self.lengths[source]

    def keep(self, rows: list[int]) -> None:
        """Drops all other rows."""
        self.k = [store[rows] for store in self.k]
        self.v = [store[rows] for store in self.v]
        self.lengths = [self.lengths[row] for row in rows]

    def next_token(self) -> "_NextToken | _NextTokenRagged":
        """The cache as the model needs it to append one token to each row."""
        same = len(set(self.lengths)) == 1
        step = _NextToken(self) if same else _NextTokenRagged(self)
        self.lengths = [length + 1 for length in self.lengths]
        return step


class _Fill:
    """Writes the first tokens of one row."""

    mask = None

    def __init__(self, cache: KVCache, row: int, length: int) -> None:
        self.cache, self.row, self.length = cache, row, length
        self.positions = torch.arange(length, device=cache.k[0].device)

    def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        self.cache.k[layer][self.row, :, : self.length] = k[0]
        self.cache.v[layer][self.row, :, : self.length] = v[0]
        return k, v


class _NextToken:
    """Appends one token to rows of one length: nothing to mask, nothing to look up."""

    mask = None

    def __init__(self, cache: KVCache) -> None:
        self.cache, self.at = cache, cache.lengths[0]
        self.positions = torch.tensor([self.at], device=cache.k[0].device)

    def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        keys, values, at = self.cache.k[layer], self.cache.v[layer], self.at
        keys[:, :, at : at + 1] = k
        values[:, :, at : at + 1] = v
        return keys[:, :, : at + 1], values[:, :, : at + 1]


class _NextTokenRagged:
    """Appends one token to rows of different lengths."""

    def __init__(self, cache: KVCache) -> None:
        device = cache.k[0].device
        self.cache, self.used = cache, max(cache.lengths) + 1
        self.rows = torch.arange(len(cache.lengths), device=device)
        self.at = torch.tensor(cache.lengths, device=device)  # (B,)
        self.positions = self.at[:, None]  # (B, T = 1)
        slots = torch.arange(self.used, device=device)
        self.mask = (slots <= self.positions)[:, None, None, :]  # (B, 1, T = 1, S)

    def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        keys, values = self.cache.k[layer], self.cache.v[layer]
        keys[self.rows, :, self.at] = k[:, :, 0]
        values[self.rows, :, self.at] = v[:, :, 0]
        return keys[:, :, : self.used], values[:, :, : self.used]


def prefill(model: GPT, cache: KVCache, rows: Sequence[list[int]]) -> None:
    """Encodes all but the newest token of each row; samples of one prompt share the work.

    The newest token is left to the first step of decoding. One prompt at a time: no padding, and
    the same arithmetic as for the prompt alone.
    """
    first_with: dict[tuple[int, ...], int] = {}
    for index, ids in enumerate(rows):
        source = first_with.setdefault(tuple(ids), index)
        if source == index:
            cache.fill(model, index, ids[:-1])
        else:
            cache.copy(source, index)


class Decoder:
    """A model in evaluation mode that continues rows; shares the model's weights and not its mode.

    Prepare anew after the weights have changed: a copy of some of them is kept.
    """

    def __init__(self, model: GPT) -> None:
        """Takes the model; one row on a CPU in fp32 gets the quick step, all else the plain one."""
        shared = (*model.parameters(), *model.buffers())
        self.model = copy.deepcopy(model, memo={id(one): one for one in shared}).eval()
        weight = model.tok_emb.weight
        quick = weight.device.type == "cpu" and weight.dtype == torch.float32
        self.one_row = OneRow(self.model) if quick else None

    def next_logits(self, newest: list[int], cache: KVCache) -> Tensor:
        """Appends the newest token of each row; gives the logits (B, V) of the one after it.

        To be called in inference mode. The logits may be overwritten by the next call.
        """
        if self.one_row is not None and len(newest) == 1:
            return self.one_row(newest[0], cache)
        ids = torch.tensor(newest, device=self.model.tok_emb.weight.device)[:, None]  # (B, T = 1)
        logits: Tensor = self.model(ids, cache.next_token())[:, -1]  # (B, V)
        return logits


class OneRow:
    """`GPT.forward` for one token of one row, unrolled into as few operations as it takes.

    A token's products read every weight once and calculate little. So torch does the products, on
    all cores, and NumPy the small steps between them, on the same memory: it starts an operation
    in a microsecond, torch in five. Vectors are allocated once and written in place.
    """

    def __init__(self, model: GPT) -> None:
        """Takes a model in fp32 on the CPU."""
        config = model.config
        n_head, kv_heads, head_dim = config.n_head, config.kv_heads, config.head_dim
        self.config, self.model = config, model
        self.scale = attention_scale(config) or head_dim**-0.5
        self.x, self.normed, self.mixed = _vectors(3, config.n_embd)
        self.hidden, self.gate = _vectors(2, config.hidden)
        self.logits = torch.zeros(1, model.vocab_size)
        self.qkv = _vectors(1, (n_head + 2 * kv_heads) * head_dim)[0]
        heads = self.qkv.reshape(-1, head_dim)
        self.qk, self.v = heads[: n_head + kv_heads], heads[n_head + kv_heads :]
        rotary = config.position == "rotary"
        self.turned = np.zeros_like(self.qk) if rotary else self.qk
        self.q = self.turned[:n_head].reshape(kv_heads, -1, head_dim)  # queries beside their key
        self.k = self.turned[n_head:]
        self.y = self.mixed.reshape(self.q.shape)
        self.rotation = np.zeros((head_dim, head_dim), np.float32)
        self.embedding = _array(model.tok_emb.weight)
        self.blocks = [block for block in model.blocks.children() if isinstance(block, Block)]
        self.products = [self._cut(block) for block in self.blocks]
        self.head = Product(
            [model.head], self.normed, self.logits, model.final_norm, factor=1 / config.width_ratio
        )
        self.norms = [(_array(b.attn_norm.weight), _array(b.mlp_norm.weight)) for b in self.blocks]
        self.final_norm = _array(model.final_norm.weight)

    def _cut(self, block: Block) -> dict[str, "Product"]:
        """The products of a block, each from the vector it reads to the one it writes."""
        attn, mlp, normed = block.attn, block.mlp, self.normed
        branch = 1 / self.config.depth_ratio
        x, qkv, hidden = (torch.from_numpy(one) for one in (self.x, self.qkv, self.hidden))
        products = {
            "qkv": Product([attn.wq, attn.wk, attn.wv], normed, qkv, block.attn_norm),
            "out": Product([attn.wo], self.mixed, x, factor=branch),
            "up": Product([mlp.up], normed, hidden, block.mlp_norm),
            "down": Product([mlp.down], self.hidden, x, factor=branch),
        }
        if self.config.activation == "swiglu":
            gate = torch.from_numpy(self.gate)
            products["gate"] = Product([mlp.gate], normed, gate, block.mlp_norm)
        return products

    def __call__(self, token: int, cache: KVCache) -> Tensor:
        """Appends a token to a cache of one row; gives the logits (1, V) of the one after it."""
        at = cache.lengths[0]
        cache.lengths[0] += 1
        with np.errstate(all="ignore"):  # broken weights show in the logits
            self._embed(token, at)
            for layer, products in enumerate(self.products):
                attn_norm, mlp_norm = self.norms[layer]
                products["qkv"].set(self._normalise(attn_norm))
                self._attend(cache.k[layer].numpy()[0], cache.v[layer].numpy()[0], at)
                products["out"].add()
                scale = self._normalise(mlp_norm)
                products["up"].set(scale)
                if "gate" in products:
                    products["gate"].set(scale)
                self._activate()
                products["down"].add()
            self.head.set(self._normalise(self.final_norm))
        return self.logits

    def _embed(self, token: int, at: int) -> None:
        """Begins the stream, and with rotary positions the matrix that turns q and k of a token.

        The matrix turns all heads in one product; it has the four parts of `rotate` as diagonals.
        """
        np.copyto(self.x, self.embedding[token])
        if self.config.position == "learned":
            self.x += _array(self.model.pos_emb.weight)[at]
            return
        half = self.config.head_dim // 2
        cos, sin = self.model.cos[at].numpy(), self.model.sin[at].numpy()
        diagonal = np.arange(half)
        self.rotation[diagonal, diagonal] = self.rotation[half + diagonal, half + diagonal] = cos
        self.rotation[diagonal, half + diagonal] = sin
        self.rotation[half + diagonal, diagonal] = -sin

    def _normalise(self, weight: Floats) -> float:
        """Writes the normalised stream, but for a factor that it gives: products scale for free."""
        x = self.x
        if self.config.norm == "layernorm":
            x = np.subtract(x, np.add.reduce(x) / len(x), out=self.normed)
        mean_square = float(np.dot(x, x)) / len(x)
        np.multiply(x, weight, out=self.normed)
        # Infinity would become 0 and hide that the weights are broken.
        scale = 1 / math.sqrt(mean_square + self.config.norm_eps)
        return scale if mean_square < math.inf else math.nan

    def _attend(self, keys: Floats, values: Floats, at: int) -> None:
        """From q, k and v to the mixed answers, with the keys and values (H, S, D) so far."""
        if self.config.qk_norm:
            mean_square = np.einsum("hd,hd->h", self.qk, self.qk) / self.config.head_dim
            self.qk /= np.sqrt(mean_square + self.config.norm_eps)[:, None]
        if self.config.position == "rotary":
            np.dot(self.qk, self.rotation, out=self.turned)
        keys[:, at], values[:, at] = self.k, self.v
        scores = np.matmul(self.q, keys[:, : at + 1].transpose(0, 2, 1))  # (kv H, H / kv H, S)
        scores *= self.scale
        scores -= np.maximum.reduce(scores, axis=-1, keepdims=True)
        np.exp(scores, out=scores)
        np.matmul(scores, values[:, : at + 1], out=self.y)
        self.y /= np.add.reduce(scores, axis=-1, keepdims=True)

    def _activate(self) -> None:
        """The MLP's activation, on the hidden features where they are."""
        hidden = torch.from_numpy(self.hidden)
        match self.config.activation:
            case "gelu":
                hidden.copy_(F.gelu(hidden))
            case "gelu_tanh":
                hidden.copy_(F.gelu(hidden, approximate="tanh"))
            case "swiglu":
                hidden.mul_(F.silu(torch.from_numpy(self.gate)))
            case "relu2":
                np.maximum(self.hidden, 0, out=self.hidden)
                self.hidden *= self.hidden


class Product:
    """Linear layers that read one vector, as one product from a fixed vector to a fixed vector.

    A plain product with one vector runs on one core. Cut into blocks of rows, which are views, it
    is a batch of products, and all cores share a batch. Several layers are copied into one.
    """

    def __init__(
        self,
        layers: list[nn.Linear],
        x: Floats,
        y: Tensor,
        norm: nn.Module | None = None,
        *,
        factor: float = 1.0,
    ) -> None:
        """Takes the layers, the vector they read, the one for their outputs together.

        The shift of a norm before the layers, if it has one, becomes part of the bias. All outputs
        are multiplied by `factor`.
        """
        weights = [layer.weight.detach() for layer in layers]
        biases = [layer.bias.detach() for layer in layers if layer.bias is not None]
        weight = torch.cat(weights) if len(weights) > 1 else weights[0]
        self.bias = torch.cat(biases) if biases else None
        shift = getattr(norm, "bias", None)
        if shift is not None:
            moved = weight @ shift.detach()
            self.bias = moved if self.bias is None else self.bias + moved
        self.factor = factor
        if self.bias is not None and factor != 1:
            self.bias = self.bias * factor
        rows, width = weight.shape
        blocks = torch.get_num_threads()  # one each: measured, finer ones are slower
        even = rows - rows % blocks
        self.x, self.y = torch.from_numpy(x), y.view(-1)
        self.blocks = weight[:even].view(blocks, -1, width).mT  # (blocks, in_features, rows)
        self.block_x = self.x.expand(blocks, 1, width)
        self.block_y = self.y[:even].view(blocks, 1, -1)
        self.rest, self.rest_y = weight[even:], self.y[even:]

    def set(self, scale: float) -> None:
        """Makes y the outputs for scale·x."""
        if self.bias is None:
            self._multiply(0, scale)
        else:
            self.y.copy_(self.bias)
            self._multiply(1, scale)

    def add(self) -> None:
        """Adds the outputs to y."""
        if self.bias is not None:
            self.y.add_(self.bias)
        self._multiply(1, 1.0)

    def _multiply(self, beta: int, scale: float) -> None:
        alpha = scale * self.factor
        self.block_y.baddbmm_(self.block_x, self.blocks, beta=beta, alpha=alpha)
        if len(self.rest):
            self.rest_y.addmv_(self.rest, self.x, beta=beta, alpha=alpha)


def _vectors(count: int, length: int) -> list[Floats]:
    return [np.zeros(length, np.float32) for _ in range(count)]


def _array(tensor: Tensor | nn.Module) -> Floats:
    """The tensor's own memory as NumPy sees it."""
    assert isinstance(tensor, Tensor)
    array: Floats = tensor.detach().numpy()
    return array
