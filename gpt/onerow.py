"""One token of one row on the CPU: the model unrolled into as few operations as it takes."""

import math

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gpt.config import ModelConfig
from gpt.kvcache import KVCache
from gpt.model import GPT, Block, attention_scale, ngram_rows
from gpt.products import Floats, VectorProduct, product

# The options of a model that are unrolled here.
UNROLLED = {
    "preset",
    "n_layer",
    "n_head",
    "n_kv_head",
    "n_embd",
    "n_hidden",
    "context_len",
    "dropout",
    "position",
    "rope_theta",
    "norm",
    "norm_eps",
    "activation",
    "bias",
    "tie_embeddings",
    "qk_norm",
    "ngram",
    "ngram_rows",
    "ngram_dropout",
    "init",
    "init_std",
    "mup_base_width",
    "mup_base_depth",
    "mup_base_head_dim",
}


def is_unrolled(config: ModelConfig) -> bool:
    """Whether `OneRow` knows all that the config asks for: any other option is off."""
    others = ModelConfig.model_fields.items()
    return all(
        getattr(config, name) == field.default for name, field in others if name not in UNROLLED
    )


class Embedding:
    """Writes the embedding of a token, with its n-grams and its learned place, into one vector."""

    def __init__(self, model: GPT, x: Floats) -> None:
        """Takes the model and the vector (C,)."""
        self.config, self.x = model.config, x
        self.tokens = _array(model.tok_emb.weight)
        self.ngrams = _array(model.ngram_emb.weight) if model.config.ngram > 1 else None
        learned = model.config.position == "learned"
        self.places = _array(model.pos_emb.weight) if learned else None

    def __call__(self, token: int, at: int, cache: KVCache) -> None:
        """Begins the stream of a token at position `at`."""
        np.copyto(self.x, self.tokens[token])
        if self.ngrams is not None:
            ids = cache.after_earlier(torch.tensor([[token]]), slice(None))
            before, rows = self.config.ngram - 1, self.config.ngram_rows
            self.x += self.ngrams[ngram_rows(ids, before, rows)[0, 0].numpy()].sum(0)
        if self.places is not None:
            self.x += self.places[at]


class OneRow:
    """`GPT.forward` for one token of one row, unrolled into as few operations as it takes.

    A token's products read every weight once and calculate little. So torch does the products, on
    all cores, and NumPy the small steps between them, on the same memory: it starts an operation
    in a microsecond, torch in five. Vectors are allocated once and written in place.
    """

    def __init__(self, model: GPT) -> None:
        """Takes a model on the CPU, in fp32 or packed, whose config `is_unrolled`."""
        config = model.config
        n_head, kv_heads, head_dim = config.n_head, config.kv_heads, config.head_dim
        self.config, self.model = config, model
        self.scale = attention_scale(config) or head_dim**-0.5
        self.x, self.normed, self.mixed = _vectors(3, config.n_embd)
        self.hidden, self.gate = _vectors(2, config.hidden)
        self.hidden_there = torch.from_numpy(self.hidden)
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
        self.diagonals = _diagonals(self.rotation)
        self.embed = Embedding(model, self.x)
        if rotary:
            self.cos, self.sin = _array(model.cos), _array(model.sin)
        self.blocks = [block for block in model.blocks.children() if isinstance(block, Block)]
        self.products = [self._cut(block) for block in self.blocks]
        logits, norm = self.logits.numpy()[0], model.final_norm
        self.head = product([model.head], self.normed, logits, norm, factor=1 / config.width_ratio)
        self.norms = [(_array(b.attn_norm.weight), _array(b.mlp_norm.weight)) for b in self.blocks]
        self.final_norm = _array(model.final_norm.weight)

    def _cut(self, block: Block) -> dict[str, VectorProduct]:
        """The products of a block, each from the vector it reads to the one it writes."""
        attn, mlp, normed = block.attn, block.mlp, self.normed
        branch = 1 / self.config.depth_ratio
        products = {
            "qkv": product([attn.wq, attn.wk, attn.wv], normed, self.qkv, block.attn_norm),
            "out": product([attn.wo], self.mixed, self.x, factor=branch),
            "up": product([mlp.up], normed, self.hidden, block.mlp_norm),
            "down": product([mlp.down], self.hidden, self.x, factor=branch),
        }
        if self.config.activation == "swiglu":
            products["gate"] = product([mlp.gate], normed, self.gate, block.mlp_norm)
        return products

    def __call__(self, token: int, cache: KVCache) -> Tensor:
        """Appends a token to a cache of one row; gives the logits (1, V) of the one after it."""
        at = cache.lengths[0]
        cache.lengths[0] += 1
        with np.errstate(all="ignore"):  # broken weights show in the logits
            self.embed(token, at, cache)
            if self.config.position == "rotary":
                self._turn(at)
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

    def _turn(self, at: int) -> None:
        """Makes the matrix that turns q and k by a position's angles, all heads in one product.

        It has the four parts of `rotate` as diagonals.
        """
        same, other, cos_rest, minus = self.diagonals
        np.copyto(same, self.cos[at])
        np.copyto(cos_rest, same)
        np.copyto(other, self.sin[at])
        np.negative(other, out=minus)

    def _normalise(self, weight: Floats) -> float:
        """Writes the normalised stream, but for a factor that it gives: products scale for free."""
        x = self.x
        if self.config.norm == "layernorm":
            x = np.subtract(x, np.add.reduce(x) / len(x), out=self.normed)
        mean_square = float(np.dot(x, x)) / len(x)
        np.multiply(x, weight, out=self.normed)
        if mean_square < math.inf:
            return 1 / math.sqrt(mean_square + self.config.norm_eps)
        # Where squares of numbers overflow, torch's RMSNorm gives 0, and its LayerNorm NaN.
        zeros = self.config.norm == "rmsnorm" and np.isfinite(x).all()
        self.normed.fill(0 if zeros else math.nan)
        return 1.0

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
        hidden = self.hidden_there
        match self.config.activation:
            case "gelu":
                torch.ops.aten.gelu_(hidden)
            case "gelu_tanh":
                torch.ops.aten.gelu_(hidden, approximate="tanh")
            case "swiglu":
                hidden.mul_(F.silu(torch.from_numpy(self.gate)))
            case "relu2":
                np.maximum(self.hidden, 0, out=self.hidden)
                self.hidden *= self.hidden


def _diagonals(rotation: Floats) -> list[Floats]:
    """Views of the places of cos, sin, cos and -sin, as `rotate` has them, a diagonal each."""
    size = len(rotation)
    half, flat = size // 2, rotation.reshape(-1)
    upper, lower = flat[: half * size], flat[half * size :]
    starts = ((upper, 0), (upper, half), (lower, half), (lower, 0))
    return [rows[start :: size + 1][:half] for rows, start in starts]


def _vectors(count: int, length: int) -> list[Floats]:
    return [np.zeros(length, np.float32) for _ in range(count)]


def _array(tensor: Tensor | nn.Module) -> Floats:
    """The tensor's own memory as NumPy sees it."""
    assert isinstance(tensor, Tensor)
    array: Floats = tensor.detach().numpy()
    return array
