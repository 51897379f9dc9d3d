"""How large a run is, as each source of an estimate counts it: parameters, tokens, batch."""

from dataclasses import dataclass

from gpt.build import CHARS_GUESS, expected_vocab_size
from gpt.config import Config
from gpt.data import TokenData, cached_data
from gpt.errors import UserError
from gpt.model import parameter_inventory


@dataclass(frozen=True)
class RunSize:
    """A run in the quantities that rules for the rate are made of.

    Attributes:
        parameters: all of them, a tied head once.
        matrices: those in the blocks' matrix products: no embedding, head, norm or bias.
        with_head: the same and the head's, tied or not.
        flops_per_token: 6 x matrices, and attention's share, as DeepSeek counts it.
        tokens: trained on in the whole run; None while only the tokenized text could tell.
        batch_tokens: of one optimizer step.
    """

    parameters: int
    matrices: int
    with_head: int
    flops_per_token: int
    tokens: int | None
    batch_tokens: int


def measure_run(config: Config) -> tuple[RunSize, list[str]]:
    """The size of a run, and what in it is assumed. Reads shards that are there, builds none."""
    notes: list[str] = []
    data = tokenized(config)
    vocab_size = expected_vocab_size(config.tokenizer) if data is None else _vocabulary(data)
    if data is None and config.tokenizer.kind == "chars":
        notes.append(
            f"the text is not tokenized yet: {CHARS_GUESS} characters are assumed; "
            "gpt-data build with this config counts them"
        )
    tokens = run_tokens(config, data)
    if tokens is None:
        notes.append(
            f"train.max_epochs {config.train.max_epochs:g}: how many tokens that is, only the "
            "tokenized text tells; gpt-data build with this config makes it"
        )
    model = config.model
    rows = parameter_inventory(model, vocab_size)
    count = {row.name: row.count for row in rows}
    matrices = count["attention Wq Wk Wv Wo"] + count["FFN"]
    size = RunSize(
        parameters=sum(count.values()) - model.ngram_parameters,  # no published rule knows such
        matrices=matrices,
        with_head=matrices + model.n_embd * vocab_size,
        flops_per_token=6 * matrices + 12 * model.n_layer * model.n_embd * model.context_len,
        tokens=tokens,
        batch_tokens=config.tokens_per_step,
    )
    return size, notes


def tokenized(config: Config) -> TokenData | None:
    """The tokenized text, if it is there; a run may be sized before its text is."""
    try:
        return cached_data(config)
    except UserError:
        return None


def _vocabulary(data: TokenData) -> int:
    return data.tokenizer.vocab_size


def run_tokens(config: Config, data: TokenData | None) -> int | None:
    """Tokens of the whole run; None if its length is in epochs of a text not tokenized yet."""
    train = config.train
    if data is not None:
        return config.total_steps(data.train.n_tokens) * config.tokens_per_step
    if train.max_steps is None and train.max_tokens is None:
        return None
    # Without the text an epoch counts as long as can be: the other limits come first.
    return config.total_steps(epoch_tokens=10**18) * config.tokens_per_step
