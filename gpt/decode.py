"""From the tokens so far to the logits of the next: KV cache, prefill, one step. Draws nothing."""

import copy
import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gpt.model import GPT, Block

# Blocks that a product is cut into: enough for the cores to share evenly.
BLOCKS = 8


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

    A token's products read every weight once and calculate little, so what can be saved is the
    start of each operation, and idle cores. Vectors are allocated once and written in place.
    """

    def __init__(self, model: GPT) -> None:
        """Takes a model in fp32 on the CPU."""
        config = model.config
        n_head, kv_heads, head_dim = config.n_head, config.kv_heads, config.head_dim
        self.x, self.normed, self.mixed = torch.zeros(3, config.n_embd)
        self.hidden, self.gate = torch.zeros(2, config.hidden)
        self.logits = torch.zeros(1, model.vocab_size)
        self.qkv = torch.zeros(n_head + 2 * kv_heads, head_dim)
        self.qk, self.v = torch.split(self.qkv, [n_head + kv_heads, kv_heads])
        rotary = config.position == "rotary"
        self.turned = torch.zeros_like(self.qk) if rotary else self.qk
        q, self.k = torch.split(self.turned, [n_head, kv_heads])
        self.q = q.view(kv_heads, -1, head_dim)  # beside each other: queries of one key
        self.y = self.mixed.view_as(self.q)
        self.embedding = model.tok_emb.weight.detach()
        if rotary:
            turns = torch.stack((model.cos, model.sin, -model.sin, model.cos), dim=1)
            self.places = turns.view(-1, 2, 2, head_dim // 2)  # (context_len, 2, 2, D / 2)
            self.rotation = torch.zeros(2, head_dim // 2, 2, head_dim // 2)
        else:
            self.places = model.pos_emb.weight.detach()
        self.norm_eps = torch.full((1, 1, 1), config.norm_eps)
        self.config, self.model = config, model
        self.blocks = [block for block in model.blocks.children() if isinstance(block, Block)]
        self.products = [self._cut(block) for block in self.blocks]
        self.head = Product([model.head], self.normed, self.logits)

    def _cut(self, block: Block) -> dict[str, "Product"]:
        """The products of a block, each from the vector it reads to the one it writes."""
        attn, mlp = block.attn, block.mlp
        products = {
            "qkv": Product([attn.wq, attn.wk, attn.wv], self.normed, self.qkv),
            "out": Product([attn.wo], self.mixed, self.x),
            "up": Product([mlp.up], self.normed, self.hidden),
            "down": Product([mlp.down], self.hidden, self.x),
        }
        if self.config.activation == "swiglu":
            products["gate"] = Product([mlp.gate], self.normed, self.gate)
        return products

    def __call__(self, token: int, cache: KVCache) -> Tensor:
        """Appends a token to a cache of one row; gives the logits (1, V) of the one after it."""
        at = cache.lengths[0]
        cache.lengths[0] += 1
        self._embed(token, at)
        for layer, (block, products) in enumerate(zip(self.blocks, self.products, strict=True)):
            products["qkv"].set(self._normalise(block.attn_norm))
            self._attend(cache.k[layer][0], cache.v[layer][0], at)
            products["out"].add()
            scale = self._normalise(block.mlp_norm)
            products["up"].set(scale)
            if "gate" in products:
                products["gate"].set(scale)
            self._activate()
            products["down"].add()
        self.head.set(self._normalise(self.model.final_norm))
        return self.logits

    def _embed(self, token: int, at: int) -> None:
        """Begins the stream, and with rotary positions the matrix that turns q and k of a token.

        The matrix turns all heads in one product; it has the four parts of `rotate` as diagonals.
        """
        self.x.copy_(self.embedding[token])
        if self.config.position == "learned":
            self.x.add_(self.places[at])
        else:
            self.rotation.diagonal(dim1=1, dim2=3).copy_(self.places[at])

    def _normalise(self, norm: nn.Module) -> float:
        """Writes the normalised stream, but for a factor that it gives: products scale for free."""
        if isinstance(norm, nn.RMSNorm):
            mean_square = torch.dot(self.x, self.x).item() / len(self.x)
            torch.mul(self.x, norm.weight, out=self.normed)
            # Infinity would become 0 and hide that the weights are broken.
            scale = 1 / math.sqrt(mean_square + self.config.norm_eps)
            return scale if mean_square < math.inf else math.nan
        self.normed.copy_(norm(self.x))
        return 1.0

    def _attend(self, keys: Tensor, values: Tensor, at: int) -> None:
        """From q, k and v to the mixed answers, with the keys and values (H, S, D) so far."""
        config = self.config
        if config.qk_norm:
            rows, columns = self.qk.unsqueeze(1), self.qk.unsqueeze(2)
            mean_square = torch.baddbmm(self.norm_eps, rows, columns, alpha=1 / config.head_dim)
            self.qk.mul_(mean_square.rsqrt_().squeeze(2))  # a mean would cost several operations
        if config.position == "rotary":
            torch.mm(self.qk, self.rotation.view(config.head_dim, -1), out=self.turned)
        keys[:, at] = self.k
        values[:, at] = self.v
        scores = torch.bmm(self.q, keys[:, : at + 1].mT).mul_(config.head_dim**-0.5)
        torch.bmm(scores.softmax(-1), values[:, : at + 1], out=self.y)

    def _activate(self) -> None:
        """The MLP's activation, on the hidden features where they are."""
        match self.config.activation:
            case "gelu":
                self.hidden.copy_(F.gelu(self.hidden))
            case "gelu_tanh":
                self.hidden.copy_(F.gelu(self.hidden, approximate="tanh"))
            case "swiglu":
                self.hidden.mul_(F.silu(self.gate))
            case "relu2":
                self.hidden.relu_().square_()


class Product:
    """Linear layers that read one vector, as one product from a fixed vector to a fixed vector.

    A plain product with one vector runs on one core. Cut into blocks of rows, which are views, it
    is a batch of products, and all cores share a batch. Several layers are copied into one.
    """

    def __init__(self, layers: list[nn.Linear], x: Tensor, y: Tensor) -> None:
        """Takes the layers, the vector they read, and the one for their outputs together."""
        weights = [layer.weight.detach() for layer in layers]
        biases = [layer.bias.detach() for layer in layers if layer.bias is not None]
        weight = torch.cat(weights) if len(weights) > 1 else weights[0]
        self.bias = torch.cat(biases) if biases else None
        rows, width = weight.shape
        even = rows - rows % BLOCKS
        self.x, self.y = x, y.view(-1)
        self.blocks = weight[:even].view(BLOCKS, -1, width).mT  # (blocks, in_features, rows)
        self.block_x = x.expand(BLOCKS, 1, width)
        self.block_y = self.y[:even].view(BLOCKS, 1, -1)
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

    def _multiply(self, beta: int, alpha: float) -> None:
        self.block_y.baddbmm_(self.block_x, self.blocks, beta=beta, alpha=alpha)
        if len(self.rest):
            self.rest_y.addmv_(self.rest, self.x, beta=beta, alpha=alpha)
