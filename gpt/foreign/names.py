"""What the columns of other programs are called, in our names.

A name is looked up by its words: `train/loss`, `loss_train` and `Train Loss` are the same one.
Programs whose names are known here: Hugging Face's Trainer, Lightning, W&B, TensorBoard, nanoGPT,
nanochat, llm.c, modded-nanogpt, litgpt, torchtitan, Megatron-LM, OLMo, lingua, Keras.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Literal

Place = Literal["row", "train", "eval", "layers"]
LAYER_FIGURES = ("update_ratio", "grad_norm", "rms", "attn_logit_max", "dead_share")
# A name that only a part of the spelling matches is believed less than one that all of it does.
_LOOSELY = 20
_ONLY_A_PHASE = 12
_LONGEST = 200


@dataclass(frozen=True)
class Meaning:
    """What a column holds.

    Attributes:
        name: our name of it.
        place: the kind of line that it belongs to; `row`: to any.
        rank: where two columns mean the same, the lower one is taken.
        scale: its values times this are in our unit.
    """

    name: str
    place: Place
    rank: int = 0
    scale: float = 1.0


_TRAIN = {"train", "training", "trn"}
_VAL = {"val", "valid", "validation", "validate", "eval", "evaluation", "dev", "heldout"}
_TEST = {"test", "testing"}
# Words that say where a number was sorted, not what it is.
_SHELVES = {"metrics", "metric", "scalars", "scalar", "optim", "optimizer", "perf", "performance"}
_SHELVES |= {"throughput", "speed", "stats", "logs", "history", "trainer", "device", "timers"}
# Losses of another kind, or one number made of many.
_NOT_THE_LOSS = {"best", "min", "max", "aux", "auxiliary", "z", "kl", "balance", "router", "std"}
_UNITS = {"ms": 1e-3, "s": 1.0, "sec": 1.0, "secs": 1.0, "seconds": 1.0, "second": 1.0}

# Spellings of each name, the preferred first; `train` and `val` are taken off before the look-up.
_SPELLINGS: dict[str, tuple[Place, str]] = {
    "step": (
        "row",
        "global_step optimizer_step step steps num_steps global_step_max_steps iteration iter iters"
        " iterations it iter_num update updates num_updates s loss_at_iteration",
    ),
    "loss": (
        "train",
        "loss loss_step lm_loss ce_loss cross_entropy_loss cross_entropy xent ce"
        " nll nll_loss loss_ce loss_out lm_loss_value loss_value global_avg_loss avg_loss loss_avg"
        " average_loss loss_average mean_loss running_loss smooth_loss total_loss loss_total"
        " loss_epoch epoch_loss trl",
    ),
    "ppl": ("train", "ppl perplexity ppl_step lm_loss_ppl loss_ppl ppl_epoch"),
    "lr": ("train", "lr learning_rate learningrate current_lr cur_lr lr_scheduled lr_0"),
    "grad_norm": (
        "train",
        "grad_norm gradient_norm gradnorm gnorm global_grad_norm total_grad_norm grad_norm_total"
        " grad_total_norm grad_2_norm_total grad_2_0_norm_total grad_l2_norm total_norm norm grad",
    ),
    "tokens_per_s": (
        "train",
        "tokens_per_s tokens_per_sec tokens_per_second token_per_s token_per_sec tok_per_s"
        " tok_per_sec tok_per_second tok_s toks_s tokens_s tok_sec toks_sec tokens_sec"
        " tokens_second tps wps throughput_tps",
    ),
    "step_time_s": (
        "train",
        "step_time_s dt step_time iter_time iteration_time batch_time time_per_step time_per_iter"
        " time_per_iteration seconds_per_step sec_per_step s_per_step"
        " elapsed_time_per_iteration end_to_end time_metrics_end_to_end",
    ),
    "time_s": (
        "row",
        "time_s runtime elapsed elapsed_time time_elapsed total_time total_training_time"
        " relative_time_process relative_time",
    ),
    "epoch": ("row", "epoch epochs ep"),
    "tokens": (
        "row",
        "tokens total_tokens tokens_total tokens_seen num_tokens n_tokens num_tokens_seen"
        " n_tokens_seen num_input_tokens_seen tokens_processed consumed_tokens",
    ),
    "mfu": ("train", "mfu bf_16_mfu mfu_pct mfu_percent"),
    "bpb": ("train", "bpb bits_per_byte"),
    "val_loss": ("eval", "tel"),
    "val_se": ("eval", "se"),
    "total_steps": ("row", "total_steps max_steps max_iters num_iterations train_iters"),
}
# What our own runs write is spelled in one way.
_OURS = (
    "loss_mean loss_max grad_norm_max clipped clipped_share skipped update_ratio adam_rms"
    " slope_before slope_after grad_signal grad_noise noise_scale memory_bytes cpu_share"
    " others_share major_faults"
)


def _alternatives() -> dict[str, Meaning]:
    found = {name: Meaning(name, "train") for name in _OURS.split()}
    for name, (place, spellings) in _SPELLINGS.items():
        for rank, spelling in enumerate(spellings.split()):
            found[spelling] = Meaning(name, place, rank)
    return found


_BY_WORDS = _alternatives()
_VALIDATED = {"loss": "val_loss", "ppl": "val_ppl", "bpb": "val_bpb"}


@lru_cache(maxsize=8192)
def meaning(spelled: str) -> Meaning | None:
    """What a column of this name holds; None if it is nothing that we know."""
    if len(spelled) > _LONGEST:
        return None
    return _layer_figure(spelled) or _rate_of_group(spelled) or _by_words(spelled)


def _by_words(spelled: str) -> Meaning | None:
    phase, rest = _phase(_words(spelled))
    if not rest:
        return _of_phase(_BY_WORDS["loss"], phase, _ONLY_A_PHASE) if phase else None
    found = _look_up(rest)
    if found is None and phase == "train" and rest == ["time"]:
        return Meaning("time_s", "row", 5)  # modded-nanogpt's clock
    if found is not None:
        return _of_phase(found, phase, 1 if spelled.startswith("_") else 0)
    return _validated_on(rest) if phase == "val" else None


def _layer_figure(spelled: str) -> Meaning | None:
    """A figure of one layer, as our runs write them: `layers/rms/blocks.0`."""
    shelf, _, rest = spelled.partition("/")
    figure, _, layer = rest.partition("/")
    if shelf == "layers" and figure in LAYER_FIGURES and layer:
        return Meaning(rest, "layers")
    return None


def _rate_of_group(spelled: str) -> Meaning | None:
    """The rate of one group of weights: `lr-AdamW/pg1`, `train/lr/matrices`."""
    group = re.fullmatch(
        r"(?:train/|optim/)?(?:lr|learning_rate)(?:[-/](?!\d+$)|_(?=group|pg))(.+)", spelled
    )
    return Meaning(f"lrs/{group[1]}", "train") if group else None


def _words(spelled: str) -> list[str]:
    spaced = re.sub(r"([a-z])([A-Z])", r"\1 \2", spelled)
    return re.findall(r"[a-z]+|\d+", spaced.lower())


def _phase(words: list[str]) -> tuple[str, list[str]]:
    """Which of `train`, `val`, `test` and `val_train` the words speak of, and the others."""
    spoken = [
        "train" if word in _TRAIN else "val" if word in _VAL else "test"
        for word in words
        if word in _TRAIN | _VAL | _TEST
    ]
    rest = [word for word in words if word not in _TRAIN | _VAL | _TEST]
    if spoken[:1] in (["val"], ["test"]) and spoken[-1] == "train":
        return "val_train", rest  # `eval/train_loss`: measured beside the validation loss
    return (spoken[-1] if spoken else ""), rest


def _look_up(words: list[str]) -> Meaning | None:
    joined = "_".join(words)
    if joined in _BY_WORDS:
        return _BY_WORDS[joined]
    if words and words[-1] in _UNITS and "_".join(words[:-1]) in _BY_WORDS:
        found = _BY_WORDS["_".join(words[:-1])]
        timed = found.name in ("step_time_s", "time_s")
        return replace(found, scale=_UNITS[words[-1]]) if timed else None
    if words == ["time", "ms"]:
        return Meaning("step_time_s", "train", 5, 1e-3)
    if words[:2] == ["loss", "metrics"]:  # torchtitan's shelf
        return _look_up(words[2:])
    unshelved = [word for word in words if word not in _SHELVES]
    loosely = _look_up(unshelved) if unshelved != words else None
    return replace(loosely, rank=loosely.rank + _LOOSELY) if loosely is not None else None


def _of_phase(found: Meaning, phase: str, extra: int) -> Meaning | None:
    """The meaning with what was said of training and validation; None if it is for neither."""
    rank = found.rank + extra + (_LOOSELY if phase == "test" else 0)
    if phase == "val_train":
        return Meaning("train_loss", "eval", rank) if found.name == "loss" else None
    if phase not in ("val", "test") or found.name == "step" or found.place == "eval":
        return replace(found, rank=rank)
    if found.name in _VALIDATED:
        return Meaning(_VALIDATED[found.name], "eval", rank)
    return None


def _validated_on(words: list[str]) -> Meaning | None:
    """The loss on one of several validation texts: `eval/wikitext/loss`."""
    if set(words) & _NOT_THE_LOSS:
        return None
    for length in (3, 2, 1):
        found = _look_up(words[-length:])
        if found is not None and found.name in _VALIDATED:
            return Meaning(_VALIDATED[found.name], "eval", found.rank + 2 * _LOOSELY)
    return None
