"""Tokens to measure a loaded model on: held out from its training where they are still at hand."""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from gpt.configfile import load_config
from gpt.data import eval_batches, kept_validation
from gpt.model import GPT, count_parameters
from gpt.tokenizer import Tokenizer

Batches = list[tuple[Tensor, Tensor]]

MOST_TOKENS = 4096
# Some seconds of two cores; a large model is measured on fewer tokens.
MOST_FLOPS = 1e12
LEAST_TOKENS = 32


def held_out(
    model: GPT, tokenizer: Tokenizer, checkpoint: Path, prompts: list[str]
) -> tuple[Batches, str]:
    """Inputs and targets (1, T), and what they are: validation text, else the prompts' own.

    No batches, and the reason, where both are missing. Reads the run's shards, and makes none.
    """
    context_len = model.config.context_len
    most = min(MOST_TOKENS, int(MOST_FLOPS / (4 * count_parameters(model))))
    kept = kept_validation(load_config(checkpoint / "config.yaml"))
    if kept is not None and kept.tokenizer.fingerprint == tokenizer.fingerprint:
        batches = list(eval_batches(kept.split, context_len, 1, max(most, context_len)))
        return batches, f"validation tokens of {kept.folder}"
    windows = [tokenizer.encode(prompt)[: context_len + 1] for prompt in prompts[:100]]
    windows = [ids for ids in windows if len(ids) > 1]
    n_tokens = sum(len(ids) - 1 for ids in windows)
    if n_tokens < LEAST_TOKENS:
        where = "not here (they are looked for where its config says)"
        if kept is not None:
            where = f"of another tokenizer in {kept.folder}"
        return [], (
            f"the run's shards are {where}, and the prompts have fewer than {LEAST_TOKENS} tokens"
        )
    rows = [torch.from_numpy(ids.astype(np.int64))[None] for ids in windows]
    return [(ids[:, :-1], ids[:, 1:]) for ids in rows], "tokens of the prompts"
