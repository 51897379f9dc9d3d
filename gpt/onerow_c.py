"""One token of one row on the CPU, in C: fills the structures of decode.c from a model."""

import ctypes

import torch
from torch import Tensor, nn

from gpt.attention_c import FORMATS
from gpt.clibrary import c_library
from gpt.kvcache import KVCache
from gpt.model import GPT, Block, attention_scale
from gpt.onerow import Embedding
from gpt.packed import Packed, Part
from gpt.quantize import linear_bytes

# As decode.c numbers them.
NORMS = ["layernorm", "rmsnorm"]
ACTIVATIONS = ["gelu", "gelu_tanh", "swiglu", "relu2"]
# Of weights a token: below, threads wait for each other as long as they work, and on a busy machine
# a hundred times as long: 8 tokens/s of a model of 4 MB instead of 1,100.
ALONE_BYTES = 8 * 2**20


class _Product(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("weight", "bias", "step")),
        *((name, ctypes.c_int64) for name in ("rows", "width")),
        *((name, ctypes.c_int32) for name in ("format", "rounds")),
        ("factor", ctypes.c_float),
    ]


class _Norm(ctypes.Structure):
    _fields_ = [(name, ctypes.c_void_p) for name in ("weight", "bias")]


class _Block(ctypes.Structure):
    _fields_ = [
        *((name, _Norm) for name in ("attn_norm", "mlp_norm")),
        ("qkv", _Product * 3),
        *((name, _Product) for name in ("out", "up", "gate", "down")),
        *((name, ctypes.c_void_p) for name in ("keys", "values")),
    ]


_SIZES = ("n_layer", "n_head", "n_kv_head", "head_dim", "n_embd", "n_hidden", "room")
_VECTORS = ("x", "normed", "qkv", "mixed", "hidden", "gate", "logits", "scratch")


class _Model(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_int64) for name in (*_SIZES, "scratch_size")),
        *((name, ctypes.c_int32) for name in ("norm", "activation", "qk_norm")),
        *((name, ctypes.c_int32) for name in ("cache_format", "threads")),
        *((name, ctypes.c_float) for name in ("norm_eps", "attention_scale")),
        *((name, ctypes.c_void_p) for name in ("cos", "sin")),
        ("blocks", ctypes.POINTER(_Block)),
        ("final_norm", _Norm),
        ("head", _Product),
        *((name, ctypes.c_void_p) for name in _VECTORS),
    ]


class OneRowC:
    """`GPT.forward` for one token of one row, in C: reads each weight once, as fast as memory goes.

    What `OneRow` does, to rounding. Layers in bf16 and fp16 are copied once more, row by row, and
    then take as much memory as in fp32.
    """

    def __init__(self, model: GPT) -> None:
        """Takes a model on the CPU, in fp32 or packed, whose config `is_unrolled`."""
        library, config = c_library("decode"), model.config
        assert isinstance(library, ctypes.CDLL), library
        self._run = library.next_logits
        self._run.argtypes, self._run.restype = [ctypes.POINTER(_Model), ctypes.c_int64], None
        self._kept: list[Tensor] = []  # all memory that C knows
        self._cache: list[Tensor] | None = None
        n_head, kv_heads, head_dim = config.n_head, config.kv_heads, config.head_dim
        threads = 1 if linear_bytes(model) < ALONE_BYTES else torch.get_num_threads()
        scratch_size = max(config.n_embd, config.hidden, config.context_len)
        sizes = {
            "x": config.n_embd,
            "normed": config.n_embd,
            "qkv": (n_head + 2 * kv_heads) * head_dim,
            "mixed": config.n_embd,
            "hidden": config.hidden,
            "gate": config.hidden,
            "logits": model.vocab_size,
            "scratch": threads * scratch_size,
        }
        vectors = {name: torch.zeros(size) for name, size in sizes.items()}
        self.logits, self._embed = vectors["logits"][None], Embedding(model, vectors["x"].numpy())
        blocks = [block for block in model.blocks.children() if isinstance(block, Block)]
        self._blocks = (_Block * len(blocks))(*(self._block(block) for block in blocks))
        rotary = config.position == "rotary"
        self._model = _Model(
            n_layer=len(blocks),
            n_head=n_head,
            n_kv_head=kv_heads,
            head_dim=head_dim,
            n_embd=config.n_embd,
            n_hidden=config.hidden,
            scratch_size=scratch_size,
            norm=NORMS.index(config.norm),
            activation=ACTIVATIONS.index(config.activation),
            qk_norm=config.qk_norm,
            threads=threads,
            norm_eps=config.norm_eps,
            attention_scale=attention_scale(config) or head_dim**-0.5,
            cos=self._at(model.cos) if rotary else None,
            sin=self._at(model.sin) if rotary else None,
            blocks=self._blocks,
            final_norm=self._norm(model.final_norm),
            head=self._product(model.head, 1 / config.width_ratio),
            **{name: self._at(vector) for name, vector in vectors.items()},
        )

    def __call__(self, token: int, cache: KVCache) -> Tensor:
        """Appends a token to a cache of one row; gives the logits (1, V) of the one after it."""
        at = cache.lengths[0]
        cache.lengths[0] += 1
        if self._cache is not cache.k:
            self._cache = cache.k
            self._model.room = cache.k[0].size(2)
            self._model.cache_format = FORMATS.index(cache.k[0].dtype)
            for block, keys, values in zip(self._blocks, cache.k, cache.v, strict=True):
                block.keys, block.values = keys.data_ptr(), values.data_ptr()
        self._embed(token, at, cache)
        self._run(self._model, at)
        return self.logits

    def _block(self, block: Block) -> _Block:
        attn, mlp, branch = block.attn, block.mlp, 1 / block.depth_ratio
        qkv: list[nn.Module] = [attn.wq, attn.wk, attn.wv]
        if isinstance(attn.wq, Part):
            qkv = [attn.wq.whole]
        return _Block(
            attn_norm=self._norm(block.attn_norm),
            mlp_norm=self._norm(block.mlp_norm),
            qkv=(_Product * 3)(*(self._product(layer) for layer in qkv)),
            out=self._product(attn.wo, branch),
            up=self._product(mlp.up),
            gate=self._product(mlp.gate) if mlp.activation == "swiglu" else _Product(),
            down=self._product(mlp.down, branch),
        )

    def _norm(self, norm: nn.Module) -> _Norm:
        return _Norm(self._at(norm.weight), self._at(getattr(norm, "bias", None)))

    def _product(self, layer: nn.Module, factor: float = 1.0) -> _Product:
        packed = layer if isinstance(layer, Packed) else None
        weight = layer.weight if packed is None else packed.rows()
        assert isinstance(weight, Tensor)
        return _Product(
            weight=self._at(weight),
            bias=self._at(layer.bias),
            step=self._at(getattr(layer, "step", None)),
            rows=weight.size(0),
            width=weight.size(1),
            format=FORMATS.index(weight.dtype),
            rounds=packed is not None and packed.rounds,
            factor=factor,
        )

    def _at(self, tensor: object) -> int | None:
        """Where a tensor's numbers are, which stay there from now on."""
        if not isinstance(tensor, Tensor):
            return None
        assert tensor.is_contiguous()
        self._kept.append(tensor.detach())
        return tensor.data_ptr()
