"""The GPT: token ids in, logits of the next token out; and where its parameters are.

Letters in shape comments:

    B  sequences in a batch        H  attention heads
    T  tokens in a sequence        D  features of one head, C / H
    C  width, features of a token  V  tokens in the vocabulary

With GPT-2's options this is exactly GPT-2, with LLaMA's exactly LLaMA. With muP (mup_base_width) a
rate found at one width and depth holds at another: what the blocks add, what the head reads, the
attention's scale and the initial weights change here, by factors that are 1 at the base; `optim`
has the rest. The loss, sampling and files are not here.
"""

import math
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from gpt.attention import causal_attention, dense_backward_pays
from gpt.config import ModelConfig
from gpt.dropout import Dropout
from gpt.gelu import gelu
from gpt.linear import Linear

Rotation = tuple[Tensor, Tensor]


class Cache(Protocol):
    """What the model asks of a memory that holds the keys and values of earlier tokens."""

    @property
    def positions(self) -> Tensor:
        """Places of the new tokens in their sequences: (T,), or (B, T) where rows differ."""

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float | None) -> Tensor:
        """Stores keys and values of new tokens, and gives what their q see in all so far.

        All are (B, H, T, D); k and v may have fewer heads. A scale of None is 1 / sqrt(D).
        """

    def after_earlier(self, ids: Tensor) -> Tensor:
        """Stores new ids (B, T); returns them behind the last ngram - 1, -1 where there are none.

        Asked by models with n-gram embeddings only.
        """


class Attention(nn.Module):
    """Each token asks (q) all tokens up to itself (k) and takes a mix of their answers (v)."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        """Takes the model's shape and the number of its block."""
        super().__init__()
        width, kv_width = config.n_embd, config.kv_heads * config.head_dim
        self.layer = layer
        self.head_dim = config.head_dim
        self.grouped = config.kv_heads < config.n_head
        self.qk_norm = config.qk_norm
        self.norm_eps = config.norm_eps
        self.scale = attention_scale(config)
        self.wq = Linear(width, width, bias=config.bias)
        self.wk = Linear(width, kv_width, bias=config.bias)
        self.wv = Linear(width, kv_width, bias=config.bias)
        self.wo = Linear(width, width, bias=config.bias)

    def forward(self, x: Tensor, rotation: Rotation | None, cache: Cache | None) -> Tensor:
        """Mixes information between the tokens of (B, T, C)."""
        q, k, v = (heads.transpose(1, 2) for heads in self.project(x))  # (B, H, T, D)
        if self.qk_norm:
            q = F.rms_norm(q, (self.head_dim,), eps=self.norm_eps)
            k = F.rms_norm(k, (self.head_dim,), eps=self.norm_eps)
        if rotation is not None:
            q, k = rotate(q, rotation), rotate(k, rotation)
        if cache is not None:
            y = cache.attend(self.layer, q, k, v, self.scale)  # (B, H, T, D)
        elif q.size(2) > 1 and dense_backward_pays(q, k, v):
            y = causal_attention(q, k, v, self.scale)
        else:
            y = F.scaled_dot_product_attention(
                q, k, v, is_causal=q.size(2) > 1, scale=self.scale, enable_gqa=self.grouped
            )
        out: Tensor = self.wo(y.transpose(1, 2).flatten(2))  # (B, T, C)
        return out

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The q, k and v of each token, cut into heads: (B, T, H, D)."""
        cut = (-1, self.head_dim)
        q, k, v = self.wq(x), self.wk(x), self.wv(x)
        return q.unflatten(-1, cut), k.unflatten(-1, cut), v.unflatten(-1, cut)


class MLP(nn.Module):
    """The feed-forward part (the chapter's FFN): each token by itself, out to d_ff and back."""

    def __init__(self, config: ModelConfig) -> None:
        """Takes the model's shape."""
        super().__init__()
        self.activation = config.activation
        self.up = Linear(config.n_embd, config.hidden, bias=config.bias)
        if config.activation == "swiglu":
            self.gate = Linear(config.n_embd, config.hidden, bias=config.bias)
        self.down = Linear(config.hidden, config.n_embd, bias=config.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Changes the features of each token of (B, T, C)."""
        out: Tensor = self.down(self.expand(x))  # (B, T, C)
        return out

    def expand(self, x: Tensor) -> Tensor:
        """The hidden features of each token, (B, T, d_ff)."""
        hidden: Tensor = self.up(x)
        match self.activation:
            case "gelu":
                return gelu(hidden, "none")
            case "gelu_tanh":
                return gelu(hidden, "tanh")
            case "swiglu":
                return F.silu(self.gate(x)) * hidden
            case "relu2":
                return F.relu(hidden).square()


class Block(nn.Module):
    """Attention, then MLP, each on a normalised copy and added back to the stream."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        """Takes the model's shape and the number of this block."""
        super().__init__()
        self.attn_norm = build_norm(config)
        self.attn = Attention(config, layer)
        self.mlp_norm = build_norm(config)
        self.mlp = MLP(config)
        self.dropout = Dropout(config.dropout)
        self.depth_ratio = config.depth_ratio

    def forward(self, x: Tensor, rotation: Rotation | None, cache: Cache | None) -> Tensor:
        """One round of mixing between and within tokens, (B, T, C)."""
        x = x + self.weigh(self.attn(self.attn_norm(x), rotation, cache))
        out: Tensor = x + self.weigh(self.mlp(self.mlp_norm(x)))
        return out

    def weigh(self, branch: Tensor) -> Tensor:
        """What a branch adds to the stream, (B, T, C): with CompleteP less, the more blocks."""
        out: Tensor = self.dropout(branch)
        return out if self.depth_ratio == 1 else out / self.depth_ratio


class GPT(nn.Module):
    """A decoder-only Transformer."""

    cos: Tensor
    sin: Tensor

    def __init__(self, config: ModelConfig, vocab_size: int) -> None:
        """Builds and initialises the model; the same global torch seed gives the same weights."""
        super().__init__()
        self.config = config
        self.width_ratio = config.width_ratio
        self.vocab_size = vocab_size
        self.recompute = False  # of a block only its input is kept for the way back
        self.tok_emb = nn.Embedding(vocab_size, config.n_embd)
        if config.ngram > 1:
            self.ngram_emb = nn.Embedding(config.ngram_rows, config.n_embd)
        if config.position == "learned":
            self.pos_emb = nn.Embedding(config.context_len, config.n_embd)
        else:
            self._make_tables()
        self.dropout = Dropout(config.dropout)
        self.blocks = nn.ModuleList(Block(config, layer) for layer in range(config.n_layer))
        self.final_norm = build_norm(config)
        self.head = nn.Linear(config.n_embd, vocab_size, bias=False)
        if config.tie_embeddings:
            self.head.weight = self.tok_emb.weight
        self.init_weights()

    def _make_tables(self) -> None:
        config = self.config
        if self.tok_emb.weight.is_meta:  # a shape is all that is asked for
            cos = sin = torch.empty(config.context_len, config.head_dim // 2)
        else:
            cos, sin = rotary_tables(config.context_len, config.head_dim, config.rope_theta)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)

    def allocate(self) -> None:
        """Gives a model that was built `on_meta` memory for its weights, on the CPU.

        They are whatever was there: to be loaded. Drawing them first takes longer than loading.
        """
        self.to_empty(device="cpu")
        if self.config.tie_embeddings:
            self.head.weight = self.tok_emb.weight
        if self.config.position == "rotary":
            self._make_tables()

    def forward(self, ids: Tensor, cache: Cache | None = None, *, head: bool = True) -> Tensor:
        """Logits (B, T, V) of the token after each of the ids (B, T); without `head` its input."""
        x = self.features(ids, cache)
        return self.head(x) if head else x  # (B, T, V) or (B, T, C)

    def features(self, ids: Tensor, cache: Cache | None = None) -> Tensor:
        """What the head reads: the normalised stream (B, T, C) after the last block."""
        return self.transform(self.embed(ids, cache), cache)

    def embed(self, ids: Tensor, cache: Cache | None = None) -> Tensor:
        """The embeddings (B, T, C) of ids (B, T), and of the n-grams that end there.

        Where the head shares the weights, its gradient fills the whole table, and the embedding
        adds to those rows that were read, instead of bringing a second table that is mostly zeros.
        """
        one = ids.numel() == 1  # whose head's gradient is laid out such that nothing adds to it
        in_place = self.config.tie_embeddings and ids.device.type == "cpu" and not one
        x = F.embedding(ids, self.tok_emb.weight, sparse=in_place)
        if self.config.ngram > 1:
            before = self.config.ngram - 1
            ids = F.pad(ids, (before, 0), value=-1) if cache is None else cache.after_earlier(ids)
            found = self.ngram_emb(ngram_rows(ids, before, self.config.ngram_rows))
            if self.training and self.config.ngram_dropout > 0:
                found = found * self._kept(found).unsqueeze(-1)
            x = x + found.sum(-2)
        return x

    def _kept(self, found: Tensor) -> Tensor:
        """Ones and zeros (B, T, lengths): where a length is dropped, all longer ones are."""
        drawn = torch.rand(found.shape[:-1], device=found.device)
        return (drawn >= self.config.ngram_dropout).type_as(found).cumprod(-1)

    def transform(self, x: Tensor, cache: Cache | None = None) -> Tensor:
        """From token embeddings (B, T, C), without positions, to what the head reads."""
        places = slice(x.size(1)) if cache is None else cache.positions
        rotation = None
        if self.config.position == "learned":
            x = x + self.pos_emb.weight[places]
        else:
            rotation = self.rotation(places)
        x = self.dropout(x)
        for block in self.blocks:
            if self.recompute and torch.is_grad_enabled() and cache is None:
                x = checkpoint(block, x, rotation, None, use_reentrant=False)
            else:
                x = block(x, rotation, cache)
        out: Tensor = self.final_norm(x)
        # Scaled before the head and not after it: muP's logits / m, at C numbers instead of V.
        return out if self.width_ratio == 1 else out / self.width_ratio

    def rotation(self, places: Tensor | slice) -> Rotation:
        """Cosines and sines of the positions, shaped to meet (B, H, T, D)."""
        cos, sin = self.cos[places], self.sin[places]  # (T, D / 2) or (B, T, D / 2)
        return cos.unsqueeze(-3), sin.unsqueeze(-3)  # (1, T, D / 2) or (B, 1, T, D / 2)

    @torch.no_grad()
    def init_weights(self) -> None:
        """Draws every weight anew, as `config.init` says, with torch's global generator.

        Source: gpt2: Radford et al. 2019, section 2.3 (residual outputs scaled by the depth);
        zero_proj: Zhang et al. 2019 (Fixup), section 3: residual branches that start at zero.
        muP: Dey et al. 2025 (arXiv:2505.01618), table 1: the variance of hidden matrices / m, that
        of embeddings and head unchanged, and no factor for the depth but the base's.
        """
        config = self.config
        for name, module in self.named_modules():
            if isinstance(module, nn.Embedding):
                module.weight.normal_(std=config.init_std)
            elif isinstance(module, nn.Linear) and not (name == "head" and config.tie_embeddings):
                module.weight.normal_(std=self._linear_std(name, module.in_features))
                if module.bias is not None:
                    module.bias.zero_()

    def _linear_std(self, name: str, fan_in: int) -> float:
        """Standard deviation of the weight of a linear layer."""
        config = self.config
        writes_residual = name.endswith(("attn.wo", "mlp.down"))
        if config.init == "gpt2":
            base_depth = config.n_layer if config.mup_base_depth is None else config.mup_base_depth
            depth = 2 * base_depth if writes_residual else 1
            width = 1.0 if name == "head" else config.width_ratio
            return config.init_std / math.sqrt(depth * width)
        # 1 / fan_in is already muP's variance: the base's, divided by m.
        return 0.0 if writes_residual or name == "head" else 1 / math.sqrt(fan_in)


def ngram_rows(ids: Tensor, before: int, rows: int) -> Tensor:
    """Rows (B, T, before) of the n-grams of 2 to before + 1 tokens that end at each of T tokens.

    `ids` are (B, before + T), the first ones only looked back at. A row is a hash of the n-gram;
    several may share one. A megabyte of English has 61,000 different runs of 2 to 4 characters.

    Source: Carter and Wegman 1979: polynomials modulo a prime.
    """
    prime, base, scramble = 2**31 - 1, 1_000_003, 1_664_525  # products stay below 2^63
    end = ids.size(1)
    key = ids[:, before:]
    found = []
    for back in range(1, before + 1):
        key = (key * base + ids[:, before - back : end - back] + 2) % prime  # -1, nothing: 1
        found.append(key * scramble % prime % rows)
    return torch.stack(found, dim=-1)


def attention_scale(config: ModelConfig) -> float | None:
    """The factor on q·k before the softmax; None: the standard 1 / sqrt(D), to the bit.

    With muP sqrt(D at the base) / D: trained q and k point the same way, so that q·k grows with D
    and not with its root. That is as true behind qk_norm, which bounds the length of q and k by
    sqrt(D) but not how much they agree. Heads of one size, however many, need no change.

    Source: Yang et al. 2022 (arXiv:2203.03466): attention as q·k / D instead of q·k / sqrt(D).
    """
    if config.mup_base_width is None or config.mup_base_head_dim in (None, config.head_dim):
        return None
    assert config.mup_base_head_dim is not None
    return math.sqrt(config.mup_base_head_dim) / config.head_dim


def build_norm(config: ModelConfig) -> nn.Module:
    """The normalisation that the config names, over the C features of a token."""
    if config.norm == "layernorm":
        return nn.LayerNorm(config.n_embd, eps=config.norm_eps, bias=config.bias)
    return nn.RMSNorm(config.n_embd, eps=config.norm_eps)


def rotary_tables(context_len: int, head_dim: int, theta: float) -> tuple[Tensor, Tensor]:
    """Cosine and sine of every position's angles, (context_len, D / 2), fp32.

    Source: Su et al. 2021 (RoFormer), section 3.2.2, equation 15.
    """
    frequencies = theta ** (-torch.arange(0, head_dim, 2).float() / head_dim)
    angles = torch.outer(torch.arange(context_len).float(), frequencies)
    return angles.cos(), angles.sin()


def rotate(x: Tensor, rotation: Rotation) -> Tensor:
    """Turns the features of (B, H, T, D) in pairs, each by its position's angle.

    Source: Su et al. 2021, equation 34. Deviation, as in LLaMA's published weights: feature i
    is paired with i + D / 2, not with its neighbour.
    """
    cos, sin = rotation
    first, second = x.chunk(2, dim=-1)
    turned = torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
    return turned.type_as(x)


@dataclass(frozen=True)
class ParameterRow:
    """One line of the inventory."""

    name: str
    formula: str
    count: int


def parameter_inventory(config: ModelConfig, vocab_size: int) -> list[ParameterRow]:
    """Where the parameters are, without building the model; d is the width, V the vocabulary."""
    d, layers, kv = config.n_embd, config.n_layer, config.kv_heads * config.head_dim
    d_ff, biased = config.hidden, config.bias
    ups = 2 if config.activation == "swiglu" else 1
    rows = [ParameterRow("token embedding", "V·d", vocab_size * d)]
    if config.ngram > 1:
        rows.append(ParameterRow("n-gram embedding", "rows·d", config.ngram_parameters))
    if config.position == "learned":
        rows.append(ParameterRow("position embedding", "context·d", config.context_len * d))
    if kv == d:
        rows.append(ParameterRow("attention Wq Wk Wv Wo", "layers·4·d²", layers * 4 * d * d))
    else:
        formula = f"layers·(2·d² + 2·d·{kv})"
        rows.append(
            ParameterRow("attention Wq Wk Wv Wo", formula, layers * (2 * d * d + 2 * d * kv))
        )
    rows.append(ParameterRow("FFN", f"layers·{ups + 1}·d·d_ff", layers * (ups + 1) * d * d_ff))
    if biased:
        count = layers * (3 * d + 2 * kv + ups * d_ff)
        sizes = "5·d" if kv == d else f"3·d + 2·{kv}"
        ff = "d_ff" if ups == 1 else f"{ups}·d_ff"
        rows.append(ParameterRow("biases", f"layers·({sizes} + {ff})", count))
    shifted = config.norm == "layernorm" and biased
    formula = f"(2·layers + 1)·{'2·d' if shifted else 'd'}"
    rows.append(ParameterRow("norms", formula, (2 * layers + 1) * (1 + shifted) * d))
    if config.tie_embeddings:
        rows.append(ParameterRow("output Wp", "shared with the token embedding", 0))
    else:
        rows.append(ParameterRow("output Wp", "d·V", d * vocab_size))
    return rows


def count_parameters(model: nn.Module) -> int:
    """Parameters of a model, a shared one once."""
    return sum(parameter.numel() for parameter in model.parameters())


def flops_per_token(config: ModelConfig, vocab_size: int) -> int:
    """Floating-point operations to train on one token, forward and backward.

    Source: Chowdhery et al. 2022 (PaLM), appendix B: 6 N + 12 layers·d·context, where N are the
    parameters in matrix products. Deviation: N counts the head, tied or not, and neither
    embedding nor norms nor biases, which multiply no matrix.
    """
    rows = {row.name: row.count for row in parameter_inventory(config, vocab_size)}
    products = rows["attention Wq Wk Wv Wo"] + rows["FFN"] + config.n_embd * vocab_size
    return 6 * products + 12 * config.n_layer * config.n_embd * config.context_len
