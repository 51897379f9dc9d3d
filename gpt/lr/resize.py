"""Another width or depth: the keys of muP and CompleteP, and what they then do, in numbers."""

from collections.abc import Iterator

from gpt.config import Config, ModelConfig
from gpt.errors import UserError
from gpt.lr.draft import Draft
from gpt.lr.rules import COMPLETEP, MUP
from gpt.optim import mup_factors, outer_rate


def resize(draft: Draft, model: ModelConfig, width: int | None, depth: int | None) -> None:
    """Width and depth; lr stays that of the base, whose size the muP keys remember."""
    if (width is None or width == model.n_embd) and (depth is None or depth == model.n_layer):
        return
    draft.set("model.preset", None, "another size than the preset's", "asked for")
    if model.mup_base_width is None:
        draft.set("model.mup_base_width", model.n_embd, "the width that lr was chosen at", MUP)
    if width is not None and width != model.n_embd:
        _widen(draft, model, width)
    if depth is not None and depth != model.n_layer:
        draft.set("model.n_layer", depth, f"{depth} blocks", "asked for")
        if model.mup_base_depth is None:
            was = "the depth that lr was chosen at"
            draft.set("model.mup_base_depth", model.n_layer, was, COMPLETEP)


def _widen(draft: Draft, model: ModelConfig, width: int) -> None:
    """Width, and heads, of the same size where they divide it."""
    draft.set("model.n_embd", width, f"{width} features", "asked for")
    size = model.head_dim
    if width % size == 0:
        heads = width // size
        draft.set("model.n_head", heads, f"{width} / {size} = {heads}", "heads of the same size")
        if model.n_kv_head is not None:
            grown = model.n_kv_head * heads
            if grown % model.n_head:
                raise UserError(
                    f"--width {width}: n_kv_head {model.n_kv_head} of {model.n_head} heads is no "
                    f"whole number of {heads}; take a width where it is, or set model.n_kv_head"
                )
            groups = grown // model.n_head
            draft.set("model.n_kv_head", groups, f"as many heads a group, {groups}", "as before")
    elif model.mup_base_head_dim is None:
        was = f"{size} features a head where lr was chosen; now {width} / {model.n_head}"
        draft.set("model.mup_base_head_dim", size, was, f"{MUP}: q·k / head size")
    if model.n_hidden is not None:
        hidden = max(1, round(model.n_hidden * width / model.n_embd))
        arithmetic = f"{model.n_hidden} x {width} / {model.n_embd} = {hidden}"
        draft.set("model.n_hidden", hidden, arithmetic, "the same shape")


def effects(config: Config) -> Iterator[str]:
    """What the muP keys do, in numbers."""
    model, optimizer = config.model, config.optimizer
    if model.mup_base_width is None:
        return
    m, depth = model.width_ratio, model.depth_ratio
    yield f"m = {model.n_embd} / {model.mup_base_width} = {m:.4g}: logits / {m:.4g}"
    if model.init == "gpt2":
        yield f"initial variance of hidden matrices / {m:.4g}"
    if model.mup_base_depth is not None:
        yield (
            f"m_L = {model.n_layer} / {model.mup_base_depth} = {depth:.4g}: "
            f"residual branches / {depth:.4g}"
        )
    for group, factors in mup_factors(optimizer.name, model).items():
        lr = optimizer.lr if group == "matrices" else outer_rate(optimizer)
        parts = [_product("lr", lr, factors.lr)]
        if optimizer.weight_decay and group != "rest":
            parts.append(_product("weight_decay", optimizer.weight_decay, factors.decay))
        if factors.eps != 1:
            parts.append(_product("eps", optimizer.eps, factors.eps))
        yield f"{group}: {', '.join(parts)}"


def _product(name: str, value: float, factor: float) -> str:
    return f"{name} {value:g}" + ("" if factor == 1 else f" x {factor:.4g} = {value * factor:.4g}")
