"""Rules about the text: repeats, leaks, a tokenizer that misfits, an order that is not shuffled."""

import math
from collections.abc import Iterator

from gpt.health.advice import train_command
from gpt.health.finding import Finding
from gpt.health.view import View

# Python's own library, with its licences and copied helpers, has 0.15 and 0.10.
MOST_DUPLICATES = 0.4
MOST_LEAKED = 0.25
LEAST_BYTES = 1.5  # a token of a fitting BPE; one of 512 ids on its own text has 1.8
LEAST_IDS = 400  # below it a vocabulary is one of bytes or characters
LEAST_LINES = 60


def data_duplicate(view: View) -> Iterator[Finding]:
    """Much of the training text stands in it more than once."""
    share = view.history.data_check.get("duplicate_share", 0.0)
    if share <= MOST_DUPLICATES:
        return
    yield Finding(
        id="data_duplicate",
        first_step=0,
        evidence=f"{100 * share:.0f} % of the passages of about 120 bytes stand in the training "
        "text more than once",
        cause="documents are repeated: the model will learn them by heart, and a pass over the "
        "text is worth less than it seems",
        next="remove the copies (a list of files: sha256sum FILES | sort | uniq -w64 -D), then the "
        "same command",
        numbers={"duplicate_share": share},
    )


def data_leak(view: View) -> Iterator[Finding]:
    """Much of the validation text stands in the training text."""
    check = view.history.data_check
    share = check.get("leak_share", 0.0)
    if share <= MOST_LEAKED or check.get("duplicate_share", 0.0) > MOST_DUPLICATES:
        return  # of repeated text some is always on both sides
    yield Finding(
        id="data_leak",
        first_step=0,
        evidence=f"{100 * share:.0f} % of the validation text's passages of about 120 bytes stand "
        "in the training text too",
        cause="validation measures memory, not learning: its loss will look better than it is",
        next="take the copies out of the text, or give each document a file of its own, so that "
        "equal ones come to the same side",
        numbers={"leak_share": share},
    )


def wrong_tokenizer(view: View) -> Iterator[Finding]:
    """A vocabulary of many ids that cuts this text into single bytes."""
    check, vocab_size = view.history.data_check, view.history.vocab_size or 0
    each = check.get("bytes_per_token", math.inf)
    if vocab_size < LEAST_IDS or each >= LEAST_BYTES:
        return
    used = check.get("used_share", math.nan)
    yield Finding(
        id="wrong_tokenizer",
        first_step=0,
        evidence=f"{each:.2f} bytes a token, with a vocabulary of {vocab_size:,} of which the text "
        f"uses {100 * used:.0f} %",
        cause="the tokenizer was made for other text (another language or script): it falls back "
        "to single bytes",
        next=train_command(view.history, "--tokenizer.kind bpe", name="bpe")
        or "a tokenizer that is trained on this text",
        numbers={"bytes_per_token": each, "used_share": used},
    )


def data_order(view: View) -> Iterator[Finding]:
    """Text that comes in its own order, so that neighbouring steps are alike."""
    config = view.history.config
    if config is None or config.data.shuffle:
        return
    correlation, swing = _togetherness(view)
    measured = ""
    if correlation is not None:
        measured = (
            f"; the losses of neighbouring lines go together (correlation {correlation:.2f}, "
            f"shuffled text has 0) and swing by {swing:.2f} nats"
        )
    yield Finding(
        id="data_order",
        first_step=0,
        evidence=f"data.shuffle is false: each step reads {config.train.batch_size} windows that "
        f"follow each other in the text{measured}",
        cause="the model sees one document after the other and forgets the earlier ones",
        next=train_command(view.history, "--data.shuffle true", name="shuffled"),
        numbers={} if correlation is None else {"correlation": correlation},
    )


def _togetherness(view: View) -> tuple[float | None, float]:
    """Correlation of neighbouring lines' losses, trend taken out, and their spread in nats."""
    rows = view.steps > view.warmup_end
    if rows.sum() < LEAST_LINES:
        return None, 0.0
    residual = (view.loss - view.smooth)[rows]
    spread = float((residual**2).mean())
    if spread <= 0:
        return None, 0.0
    return float((residual[1:] * residual[:-1]).mean() / spread), math.sqrt(spread)
