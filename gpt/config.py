"""Every knob of a run on one page: typed, frozen, documented. Imports no torch."""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, get_args

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, model_validator

TokenizerKind = Literal["bytes", "chars", "bpe", "gpt2", "cl100k_base", "o200k_base"]
ScheduleName = Literal[
    "warmup_cosine",
    "wsd",
    "linear",
    "constant",
    "inverse_sqrt",
    "polynomial",
    "cosine_restarts",
    "hf_cosine",
    "chapter",
]


def _no_bool(value: object) -> object:
    """YAML's true and false are not the numbers 1 and 0."""
    if isinstance(value, bool):
        raise ValueError("a number is needed, not true or false")
    return value


def _switch(value: object) -> object:
    """Reads `on`, `off`, `true` and `false` alike."""
    if isinstance(value, bool):
        return "on" if value else "off"
    return value


def _name_of_file(value: str) -> str:
    """Refuses what no file system takes as a path, before anything is tried with it."""
    if any(character < " " or character == "\x7f" for character in value):
        raise ValueError("a path without control characters is needed")
    if len(value.encode()) > MOST_PATH_BYTES:
        raise ValueError(f"a path of at most {MOST_PATH_BYTES:,} bytes is needed")
    if any(len(name.encode()) > MOST_NAME_BYTES for name in value.split("/")):
        raise ValueError(f"each name in a path may have {MOST_NAME_BYTES} bytes at most")
    return value


def _at_home(path: str) -> str:
    """A path in a user's folder, spelled out."""
    try:
        return str(Path(path).expanduser()) if path.startswith("~") else path
    except RuntimeError:  # nobody's folder
        return path


def _not_too_many(value: list[str]) -> list[str]:
    """Refuses a list that the run's own config.yaml could not hold."""
    if sum(len(path.encode()) for path in value) > MOST_SOURCES_BYTES:
        raise ValueError(f"at most {MOST_SOURCES_BYTES:,} bytes together are read; name a folder")
    return value


def _with_default(given: object, default: dict[str, Any], *others: str) -> object:
    """Spells out the default of a key that competes with others, where none of them is given."""
    if isinstance(given, dict) and all(given.get(key) is None for key in [*default, *others]):
        return {**given, **default}
    return given


# Beyond these, numbers stop to mean what they say: a count is no longer one of 64 bits, and what is
# added to a sum of fp32, or divides by it, is 0 there.
MOST = 2**63 - 1
LEAST_RATE = 1e-30
# File systems allow 255 bytes a name and 4,096 a path; what is made inside needs some of them.
MOST_NAME_BYTES, MOST_PATH_BYTES = 200, 3000
MOST_SOURCES_BYTES = 100_000

Int = Annotated[int, BeforeValidator(_no_bool), Field(le=MOST)]
Float = Annotated[float, BeforeValidator(_no_bool), Field(allow_inf_nan=False)]
PathText = Annotated[str, Field(min_length=1), AfterValidator(_name_of_file)]
FolderText = Annotated[PathText, AfterValidator(_at_home)]
Sources = Annotated[list[PathText], Field(min_length=1), AfterValidator(_not_too_many)]
Switch = Annotated[Literal["auto", "on", "off"], BeforeValidator(_switch)]


class Section(BaseModel):
    """What all sections share: unknown keys are errors, nothing changes after it was read."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())


class RunConfig(Section):
    """The run's name, place and seed."""

    name: PathText = Field(
        "run",
        pattern=r"^[^\s./\\][^/\\\x00-\x1f]*$",
        description="name of the run; its directory is run.dir/run.name",
    )
    dir: FolderText = Field("runs", description="folder that holds the run directories")
    seed: Int = Field(1337, ge=0, description="seed of the weights, the data order and the samples")


class DataConfig(Section):
    """Which text, and how it is divided."""

    source: PathText | Sources = Field(
        "python-stdlib",
        description="python-stdlib (the interpreter's own library), or a file, a folder, a glob, "
        "or a list of them: .txt .md .py .jsonl .csv .parquet",
    )
    val_fraction: Float = Field(
        0.1,
        gt=0,
        lt=1,
        description="share of the text kept for validation: whole documents where there are "
        "several, the tail of the only one, or of one that is longer than that share",
    )
    text_field: str = Field(
        "text", max_length=1000, description="field or column of .jsonl .csv .parquet to read"
    )
    encoding: str = Field(
        "utf-8", max_length=100, description="encoding of the text files, as Python names it"
    )
    shuffle: bool = Field(
        True,
        description="draw each epoch's windows in an order of its own; false: in the text's order, "
        "which trains worse unless the text is a curriculum",
    )
    dir: FolderText = Field("data", description="folder that holds the tokenized shards")


class TokenizerConfig(Section):
    """How text becomes ids."""

    kind: PathText = Field(
        "bpe",
        description="bytes, chars, bpe (trained on the data), gpt2, cl100k_base, o200k_base, "
        "or the path of a ranks file (.tiktoken)",
    )
    vocab_size: Int = Field(
        4096, ge=257, le=1_000_000, description="ids wished for; read by kind bpe only"
    )
    split: Literal["auto", "gpt2", "cl100k_base", "o200k_base"] = Field(
        "auto",
        description="rule that cuts text into words before bpe merges them, for kind bpe and for "
        "ranks files; auto: by the number of ranks, else gpt2's",
    )


class ModelConfig(Section):
    """The GPT's shape. A preset fills in what is not given beside it."""

    preset: str | None = Field(
        None, description="a named size; see the README; keys given beside it win"
    )
    n_layer: Int = Field(4, ge=1, le=1000, description="blocks")
    n_head: Int = Field(4, ge=1, le=1024, description="attention heads a block")
    n_kv_head: Int | None = Field(
        None, ge=1, le=1024, description="heads for keys and values; null: n_head (no grouping)"
    )
    n_embd: Int = Field(128, ge=1, le=65536, description="width: features of a token")
    n_hidden: Int | None = Field(
        None,
        ge=1,
        le=1_048_576,
        description="features inside the MLP; null: 4 x n_embd, for swiglu 8/3 x n_embd rounded "
        "up to a multiple of 32",
    )
    context_len: Int = Field(256, ge=1, le=1_048_576, description="tokens that the model can see")
    dropout: Float = Field(
        0.0, ge=0, lt=1, description="share of embeddings and residual outputs dropped in training"
    )
    position: Literal["learned", "rotary"] = Field(
        "rotary", description="learned: added vectors (GPT-2); rotary: turned q and k (LLaMA)"
    )
    rope_theta: Float = Field(10000.0, ge=1, le=1e12, description="base of the rotary wavelengths")
    norm: Literal["layernorm", "rmsnorm"] = Field("rmsnorm", description="normalisation")
    norm_eps: Float = Field(1e-5, ge=1e-30, le=1, description="added under the norm's root")
    activation: Literal["gelu", "gelu_tanh", "swiglu", "relu2"] = Field(
        "relu2", description="MLP's activation; gelu_tanh is GPT-2's, swiglu LLaMA's"
    )
    bias: bool = Field(False, description="biases in linear layers and LayerNorm (GPT-2: true)")
    tie_embeddings: bool = Field(
        False, description="output layer shares the token embedding (GPT-2: true)"
    )
    ngram: Int = Field(
        1,
        ge=1,
        le=16,
        description="longest run of tokens with an embedding of its own, added to its last "
        "token's: 2 for pairs, 3 for triples too. Lowers the loss for hardly any work, the more "
        "the smaller the vocabulary. 1: none",
    )
    ngram_rows: Int = Field(
        16_384,
        ge=1,
        le=100_000_000,
        description="ngram: rows of the table that all n-grams are hashed into",
    )
    ngram_dropout: Float = Field(
        0.0,
        ge=0,
        lt=1,
        description="ngram: chance in training that a token's pair is not looked up, nor anything "
        "longer; that its triple is not, and so on. Against learning a text by heart when it is "
        "read more than once",
    )
    qk_norm: bool = Field(True, description="normalise q and k in each head (no parameters)")
    init: Literal["gpt2", "zero_proj"] = Field(
        "zero_proj",
        description="gpt2: normal(init_std), residual outputs / sqrt(2 n_layer); zero_proj: "
        "residual outputs and an untied head start at 0, other matrices at 1/sqrt(fan_in)",
    )
    init_std: Float = Field(
        0.02, gt=0, le=1, description="standard deviation of embeddings, and of gpt2's matrices"
    )
    mup_base_width: Int | None = Field(
        None,
        ge=1,
        le=65536,
        description="muP: the n_embd at which lr was chosen; rates, initialisation, attention and "
        "logits are scaled so that it holds at this n_embd. null: no scaling",
    )
    mup_base_depth: Int | None = Field(
        None,
        ge=1,
        le=1000,
        description="CompleteP: the n_layer at which lr was chosen; residual branches are scaled "
        "by mup_base_depth / n_layer. Needs mup_base_width. null: no scaling",
    )
    mup_base_head_dim: Int | None = Field(
        None,
        ge=1,
        le=65536,
        description="muP: the head size (n_embd / n_head) at which lr was chosen; q·k is scaled by "
        "its root / head size. null: heads keep their size, only their number grows with n_embd",
    )

    @model_validator(mode="before")
    @classmethod
    def _fill_from_preset(cls, given: object) -> object:
        if not isinstance(given, dict) or given.get("preset") is None:
            return given
        return {**PRESETS.get(str(given["preset"]), {}), **given}

    @property
    def head_dim(self) -> int:
        """Features of one attention head."""
        return self.n_embd // self.n_head

    @property
    def width_ratio(self) -> float:
        """The m of muP: how many times as wide as where lr was chosen; 1 without muP."""
        return 1.0 if self.mup_base_width is None else self.n_embd / self.mup_base_width

    @property
    def depth_ratio(self) -> float:
        """The m_L of CompleteP: how many times as deep as where lr was chosen; 1 without it."""
        return 1.0 if self.mup_base_depth is None else self.n_layer / self.mup_base_depth

    @property
    def kv_heads(self) -> int:
        """Heads that hold keys and values."""
        return self.n_head if self.n_kv_head is None else self.n_kv_head

    @property
    def ngram_parameters(self) -> int:
        """Parameters in the table of n-grams, of which a token reads a few rows."""
        return self.ngram_rows * self.n_embd if self.ngram > 1 else 0

    @property
    def hidden(self) -> int:
        """Features inside the MLP."""
        if self.n_hidden is not None:
            return self.n_hidden
        if self.activation == "swiglu":
            return math.ceil(8 * self.n_embd / 3 / 32) * 32
        return 4 * self.n_embd


class OptimizerConfig(Section):
    """Who updates the weights, and how far."""

    name: Literal["sgd", "adam", "adamw", "muon", "adafactor"] = Field(
        "adamw",
        description="update rule; muon: Muon for hidden matrices, AdamW for everything else",
    )
    lr: Float = Field(3e-4, ge=LEAST_RATE, le=1e3, description="peak learning rate")
    lr_batch_size: Int | None = Field(
        None,
        ge=1,
        le=10**7,
        description="train.batch_size that lr was chosen at, if it was another; changes nothing, "
        "but the plan warns and says what lr becomes",
    )
    adamw_lr: Float | None = Field(
        None,
        ge=LEAST_RATE,
        le=1e3,
        description="muon only: peak rate of its AdamW part; null: lr",
    )
    betas: tuple[
        Annotated[Float, Field(ge=0, lt=1)],
        Annotated[Float, Field(ge=0, lt=1)],
    ] = Field((0.9, 0.95), description="adam, adamw, muon's AdamW part: decay of the two averages")
    eps: Float = Field(
        1e-8,
        ge=1e-30,
        le=1e3,
        description="adam, adamw: added to the update's denominator",
    )
    momentum: Float = Field(0.95, ge=0, lt=1, description="sgd, muon: decay of the average")
    weight_decay: Float = Field(
        0.1, ge=0, le=1e3, description="decay; coupled in sgd and adam, decoupled in the others"
    )
    decay_on: Literal["matrices", "all"] = Field(
        "matrices", description="which parameters decay; matrices leaves out norms and biases"
    )


class ScheduleConfig(Section):
    """The rate at each step."""

    name: ScheduleName = Field(
        "warmup_cosine",
        description="shape after the warmup; wsd: flat, then a tail (warmup, stable, decay); "
        "hf_cosine: transformers' cosine, from 0 to 0; chapter: section 17.6.3 as written",
    )
    warmup_steps: Int | None = Field(
        None, ge=0, description="steps from start_factor x lr up to lr; null: warmup_fraction"
    )
    warmup_fraction: Float | None = Field(
        None,
        ge=0,
        le=1,
        description="the same as a share of all steps; 0.02 if neither is given (chapter: 1000 "
        "steps)",
    )
    start_factor: Float = Field(
        0.1,
        ge=1e-9,
        le=1,
        description="share of lr that step 0 uses; hf_cosine starts at 0 instead",
    )
    min_lr: Float | None = Field(
        None,
        ge=0,
        description="floor that the rate ends on, for a group at lr; other groups keep the ratio. "
        "null: lr / 10 for warmup_cosine and cosine_restarts, 1e-5 for chapter (there for every "
        "group alike), else 0",
    )
    decay_steps: Int | None = Field(
        None, ge=1, description="wsd: steps of the tail; null: decay_fraction"
    )
    decay_fraction: Float | None = Field(
        None, gt=0, le=1, description="the same as a share of all steps; 0.2 if neither is given"
    )
    decay_shape: Literal["sqrt", "linear"] = Field(
        "sqrt", description="wsd: how the tail falls: as 1 - sqrt(x), or in a line"
    )
    power: Float = Field(
        1.0, gt=0, le=100, description="polynomial: exponent of what is left of the run"
    )
    cycles: Int = Field(
        4, ge=1, le=1000, description="cosine_restarts: cosines of equal length, one by one"
    )
    cosine_steps: Int | None = Field(
        None,
        ge=1,
        description="chapter: T_max, steps from the peak to the floor; null: all steps of the run, "
        "as the chapter has it, so that the floor is not reached",
    )
    restart_step: Int | None = Field(
        None,
        ge=1,
        description="step of a run at which its schedule began anew, with its warmup and its shape "
        "over what was left; filled in by --rate rewarm. null: step 0",
    )

    @model_validator(mode="before")
    @classmethod
    def _default_lengths(cls, given: object) -> object:
        chapter = isinstance(given, dict) and given.get("name") == "chapter"
        warmup = {"warmup_steps": 1000} if chapter else {"warmup_fraction": 0.02}
        given = _with_default(given, warmup, "warmup_steps", "warmup_fraction")
        return _with_default(given, {"decay_fraction": 0.2}, "decay_steps")


class TrainConfig(Section):
    """The loop. The first limit that is reached ends the run."""

    max_steps: Int | None = Field(
        None, ge=1, le=10**9, description="optimizer steps; 2000 where no such limit is given"
    )
    max_tokens: Int | None = Field(None, ge=1, le=10**18, description="tokens trained on")
    max_epochs: Float | None = Field(
        None, gt=0, le=1e9, description="passes over the training text"
    )
    max_time_s: Float | None = Field(
        None, gt=0, description="seconds of training; stops early, the schedule stays as planned"
    )
    batch_size: Int = Field(32, ge=1, le=10**7, description="sequences an optimizer step")
    micro_batch_size: Int | None = Field(
        None, ge=1, description="sequences at a time on the device; null: batch_size"
    )
    grad_clip: Float | None = Field(
        1.0, ge=0, description="largest norm of the gradient; null or 0: no clipping"
    )
    skip_limit: Int = Field(
        5,
        ge=0,
        le=1000,
        description="steps in a row that are skipped because loss or gradient is not finite, or "
        "for spike_sigma; if the next one is not finite, the run stops. 0: at the first",
    )
    spike_sigma: Float | None = Field(
        None,
        ge=3,
        le=1000,
        description="skip a step whose loss or gradient norm is so many standard deviations above "
        "the mean of the last 128; 6 is usual. After skip_limit skips in a row the step is taken, "
        "for a new level. null: none is skipped for that",
    )
    device: str = Field(
        "auto",
        pattern=r"^(auto|cpu|mps|cuda(:(0|[1-9][0-9]?))?)$",
        description="auto, cpu, cuda, cuda:N (0 to 99) or mps",
    )
    dtype: Literal["auto", "fp32", "bf16", "fp16"] = Field(
        "auto", description="number format of the matrix products; weights stay fp32"
    )
    compile: Switch = Field("auto", description="torch.compile; auto: where it pays in this run")
    activation_checkpointing: bool = Field(
        False,
        description="compute what is inside each block a second time on the way back instead of "
        "keeping it: the same numbers in a longer step that holds less memory",
    )

    @model_validator(mode="before")
    @classmethod
    def _default_length(cls, given: object) -> object:
        return _with_default(given, {"max_steps": 2000}, "max_tokens", "max_epochs")


class EvalConfig(Section):
    """Validation: the same tokens each time."""

    every_steps: Int = Field(250, ge=1, description="steps between evaluations")
    max_tokens: Int | None = Field(
        204_800, ge=1, description="tokens, evenly over the validation text; null: all of it"
    )
    patience: Int | None = Field(
        None, ge=1, description="stop after so many evaluations without a better one; null: never"
    )
    sample_tokens: Int = Field(
        80, ge=0, le=100_000, description="tokens of the sample printed at evaluations; 0: none"
    )
    sample_prompt: str = Field(
        "\n",
        max_length=10_000,
        description="how that sample begins; empty: as a new document does",
    )


class CheckpointConfig(Section):
    """What survives."""

    every_steps: Int = Field(250, ge=1, description="steps between checkpoints")
    keep: Int = Field(
        3, ge=1, le=10_000, description="newest checkpoints kept; the best one is kept besides"
    )


class LogConfig(Section):
    """What is written down on the way."""

    every_steps: Int = Field(10, ge=1, description="steps between lines of metrics.jsonl")
    tensorboard: bool = Field(False, description="also write TensorBoard events (extra: track)")
    wandb: bool = Field(False, description="also log to Weights & Biases (extra: track)")


class Config(Section):
    """A whole run."""

    run: RunConfig = RunConfig()
    data: DataConfig = DataConfig()
    tokenizer: TokenizerConfig = TokenizerConfig()
    model: ModelConfig = ModelConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    schedule: ScheduleConfig = ScheduleConfig.model_validate({})
    train: TrainConfig = TrainConfig.model_validate({})
    eval: EvalConfig = EvalConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    log: LogConfig = LogConfig()

    @property
    def tokens_per_step(self) -> int:
        """Tokens that one optimizer step learns from."""
        return self.train.batch_size * self.model.context_len

    def total_steps(self, epoch_tokens: int) -> int:
        """Optimizer steps of the whole run: the first of the limits in steps, tokens, epochs.

        `epoch_tokens` is the number of training tokens. A limit in tokens or epochs is rounded up
        to whole steps.
        """
        train, limits = self.train, []
        if train.max_steps is not None:
            limits.append(train.max_steps)
        if train.max_tokens is not None:
            limits.append(math.ceil(train.max_tokens / self.tokens_per_step))
        if train.max_epochs is not None:
            limits.append(math.ceil(train.max_epochs * epoch_tokens / self.tokens_per_step))
        return max(1, min(limits))

    def schedule_steps(self, total_steps: int) -> int:
        """Steps that the schedule has in a run of `total_steps`: those after its restart, if any.

        0 or less where the run ends before that.
        """
        return total_steps - (self.schedule.restart_step or 0)

    def warmup_steps(self, total_steps: int) -> int:
        """Steps of the warmup in a run of `total_steps`."""
        if self.schedule.warmup_steps is not None:
            return self.schedule.warmup_steps
        assert self.schedule.warmup_fraction is not None
        return round(self.schedule_steps(total_steps) * self.schedule.warmup_fraction)

    def decay_steps(self, total_steps: int) -> int:
        """Steps of wsd's tail in a run of `total_steps`."""
        if self.schedule.decay_steps is not None:
            return self.schedule.decay_steps
        fraction, warmup_fraction = self.schedule.decay_fraction, self.schedule.warmup_fraction
        assert fraction is not None
        available = self.schedule_steps(total_steps)
        steps = round(available * fraction)
        if warmup_fraction is not None and warmup_fraction + fraction <= 1:
            # Both rounded up could be a step too many.
            steps = min(steps, available - self.warmup_steps(total_steps))
        return max(1, steps)

    @property
    def min_lr(self) -> float:
        """The rate that the schedule ends on."""
        match self.schedule:
            case ScheduleConfig(min_lr=float(floor)):
                return floor
            case ScheduleConfig(name="warmup_cosine" | "cosine_restarts"):
                return self.optimizer.lr / 10
            case ScheduleConfig(name="chapter"):
                return 1e-5
        return 0.0


class Contradiction(NamedTuple):
    """Values valid alone and impossible together: the keys, what is wrong and the fix.

    `lint` is the id of the plan's finding about the same, where there is one.
    """

    keys: tuple[str, ...]
    message: str
    lint: str | None = None


def contradictions(config: Config) -> Iterator[Contradiction]:
    """Everything in the config that cannot be meant together."""
    yield from _model_contradictions(config.model)
    yield from _mup_contradictions(config)
    yield from _schedule_contradictions(config)
    train = config.train
    if train.micro_batch_size is not None and train.micro_batch_size > train.batch_size:
        yield Contradiction(
            ("train.micro_batch_size", "train.batch_size"),
            f"micro_batch_size {train.micro_batch_size} is above batch_size {train.batch_size}; "
            "a step holds batch_size sequences, so lower the first or raise the second",
        )
    if train.spike_sigma is not None and train.skip_limit == 0:
        yield Contradiction(
            ("train.spike_sigma", "train.skip_limit"),
            f"spike_sigma {train.spike_sigma:g} skips no step while skip_limit is 0; set "
            "skip_limit to 1 or more (5 is usual), or leave spike_sigma out",
        )


def _model_contradictions(model: ModelConfig) -> Iterator[Contradiction]:
    if model.preset is not None and model.preset not in PRESETS:
        yield Contradiction(
            ("model.preset",),
            f"{model.preset!r} is not a preset; there are {', '.join(PRESETS)}",
        )
    if model.n_embd % model.n_head:
        fits = [n for n in range(1, model.n_embd + 1) if model.n_embd % n == 0]
        near = min(fits, key=lambda n: abs(n - model.n_head))
        yield Contradiction(
            ("model.n_embd", "model.n_head"),
            f"n_embd {model.n_embd} is not divisible by n_head {model.n_head}; "
            f"n_head {near} would fit",
        )
    elif model.position == "rotary" and model.head_dim % 2:
        yield Contradiction(
            ("model.n_embd", "model.n_head", "model.position"),
            f"rotary positions need an even head size, n_embd / n_head is {model.head_dim}; "
            "change n_head, or position: learned",
        )
    if model.n_head % model.kv_heads:
        yield Contradiction(
            ("model.n_head", "model.n_kv_head"),
            f"n_head {model.n_head} is not divisible by n_kv_head {model.n_kv_head}; "
            f"take a divisor of {model.n_head}, or null",
        )
    if model.ngram_dropout > 0 and model.ngram == 1:
        yield Contradiction(
            ("model.ngram_dropout", "model.ngram"),
            f"ngram_dropout {model.ngram_dropout:g} has no n-grams to drop while ngram is 1; "
            "set ngram to 2 or more, or leave ngram_dropout out",
        )
    if model.mup_base_depth is not None and model.mup_base_width is None:
        yield Contradiction(
            ("model.mup_base_depth", "model.mup_base_width"),
            f"mup_base_depth {model.mup_base_depth} needs mup_base_width; give that too "
            f"({model.n_embd} keeps the width as it is)",
        )
    if model.mup_base_head_dim is not None and model.mup_base_width is None:
        yield Contradiction(
            ("model.mup_base_head_dim", "model.mup_base_width"),
            f"mup_base_head_dim {model.mup_base_head_dim} needs mup_base_width; give that too "
            f"({model.n_embd} keeps the width as it is)",
        )


def _mup_contradictions(config: Config) -> Iterator[Contradiction]:
    """Optimizers for which no rule is known that would hold the rate across sizes."""
    model, optimizer = config.model, config.optimizer
    if model.mup_base_width is None:
        return
    if optimizer.name == "adafactor":
        yield Contradiction(
            ("model.mup_base_width", "optimizer.name"),
            "muP has no rule for adafactor, whose steps depend on the size of the weights; "
            "take adamw, adam, sgd or muon, or leave mup_base_width out",
        )
    if optimizer.name == "adam" and optimizer.weight_decay > 0:
        yield Contradiction(
            ("optimizer.weight_decay", "model.mup_base_width"),
            f"muP has no rule for adam's weight_decay {optimizer.weight_decay:g}, which goes "
            "through the gradient; set it to 0, or take optimizer.name: adamw",
        )
    if optimizer.name == "sgd" and model.depth_ratio != 1:
        yield Contradiction(
            ("model.mup_base_depth", "optimizer.name"),
            f"CompleteP has no rule for sgd, and mup_base_depth {model.mup_base_depth} is not "
            f"n_layer {model.n_layer}; leave mup_base_depth out, or take adamw, adam or muon",
        )


def _schedule_contradictions(config: Config) -> Iterator[Contradiction]:
    schedule = config.schedule
    if schedule.warmup_steps is not None and schedule.warmup_fraction is not None:
        yield Contradiction(
            ("schedule.warmup_steps", "schedule.warmup_fraction"),
            "warmup_steps and warmup_fraction both say how long the warmup is; "
            "remove one, or set it to null",
        )
    if schedule.decay_steps is not None and schedule.decay_fraction is not None:
        yield Contradiction(
            ("schedule.decay_steps", "schedule.decay_fraction"),
            "decay_steps and decay_fraction both say how long the tail is; "
            "remove one, or set it to null",
        )
    if config.train.max_epochs is None:
        yield from schedule_problems(config, config.total_steps(epoch_tokens=0))
    else:
        yield from _floor_contradictions(config)


def _floor_contradictions(config: Config) -> Iterator[Contradiction]:
    """What is wrong with the floor, however long the run is."""
    schedule = config.schedule
    if schedule.name == "hf_cosine" and schedule.min_lr:
        yield Contradiction(
            ("schedule.min_lr", "schedule.name"),
            f"hf_cosine ends at 0, not at {schedule.min_lr:g}; remove min_lr, or take "
            "name: warmup_cosine",
        )
    elif config.min_lr > config.optimizer.lr:
        yield Contradiction(
            ("schedule.min_lr", "optimizer.lr"),
            f"the floor min_lr {config.min_lr:g} is above the peak lr {config.optimizer.lr:g}; "
            "lower min_lr, or leave it out",
            lint="floor_above_peak",
        )


def schedule_problems(config: Config, total_steps: int) -> Iterator[Contradiction]:
    """What is wrong with the schedule of a run of `total_steps`."""
    yield from _floor_contradictions(config)
    steps, restart = config.schedule_steps(total_steps), config.schedule.restart_step
    if restart is not None and steps < 1:
        yield Contradiction(
            ("schedule.restart_step", "train.max_steps"),
            f"the schedule cannot begin anew at step {restart} of a run of {total_steps} steps, "
            "since none is left; train longer",
        )
        return
    where = f"a run of {steps}" if restart is None else f"the {steps} steps from {restart} on"
    warmup, cycles = config.warmup_steps(total_steps), config.schedule.cycles
    rest = steps - warmup
    if rest < 0:
        yield Contradiction(
            ("schedule.warmup_steps", "train.max_steps"),
            f"a warmup of {warmup} steps does not fit into {where}; "
            f"lower it to at most {steps} (1-5 % is usual), or train longer",
            lint="warmup_too_long",
        )
    elif config.schedule.name == "wsd" and (decay := config.decay_steps(total_steps)) > rest:
        yield Contradiction(
            ("schedule.decay_steps", "schedule.warmup_steps", "train.max_steps"),
            f"a warmup of {warmup} and a tail of {decay} steps do not fit into {where}; "
            "shorten one of them, or train longer",
        )
    elif config.schedule.name == "cosine_restarts" and 0 < rest < 2 * cycles and cycles > 1:
        yield Contradiction(
            ("schedule.cycles", "schedule.warmup_steps", "train.max_steps"),
            f"{cycles} cosines do not fit into the {rest} steps after the warmup: each needs 2, "
            f"to begin at the peak and end at the floor; lower cycles to at most "
            f"{max(1, rest // 2)}, or train longer",
        )


def is_tokenizer_kind(kind: str) -> bool:
    """Whether `tokenizer.kind` is one of the names; anything else is the path of a ranks file."""
    return kind in get_args(TokenizerKind)


_GPT2: dict[str, Any] = {
    "position": "learned",
    "norm": "layernorm",
    "norm_eps": 1e-5,
    "activation": "gelu_tanh",
    "bias": True,
    "tie_embeddings": True,
    "qk_norm": False,
    "init": "gpt2",
    "init_std": 0.02,
}
_LLAMA: dict[str, Any] = {
    "position": "rotary",
    "norm": "rmsnorm",
    "norm_eps": 1e-5,
    "activation": "swiglu",
    "bias": False,
    "tie_embeddings": False,
    "qk_norm": False,
    "init": "gpt2",
    "init_std": 0.02,
}


def _shape(n_layer: int, n_head: int, n_embd: int, context_len: int, **more: Any) -> dict[str, Any]:  # noqa: ANN401
    return {
        "n_layer": n_layer,
        "n_head": n_head,
        "n_embd": n_embd,
        "context_len": context_len,
        **more,
    }


PRESETS: dict[str, dict[str, Any]] = {
    # GPT-2 (Radford et al. 2019, table 2; parameter counts as OpenAI corrected them).
    "gpt2-124m": _GPT2 | _shape(12, 12, 768, 1024),
    "gpt2-355m": _GPT2 | _shape(24, 16, 1024, 1024),
    "gpt2-774m": _GPT2 | _shape(36, 20, 1280, 1024),
    "gpt2-1.5b": _GPT2 | _shape(48, 25, 1600, 1024),
    # GPT-3 (Brown et al. 2020, table 2.1). Its dense layers; the paper's sparse ones are not here.
    # The paper gives the 1.3B model 24 heads of 128, which is not its width: 16 of 128 is.
    "gpt3-125m": _GPT2 | _shape(12, 12, 768, 2048),
    "gpt3-350m": _GPT2 | _shape(24, 16, 1024, 2048),
    "gpt3-760m": _GPT2 | _shape(24, 16, 1536, 2048),
    "gpt3-1.3b": _GPT2 | _shape(24, 16, 2048, 2048),
    # LLaMA's architecture at small sizes: GaLore's 60M-350M (Zhao et al. 2024), TinyLlama-1.1B
    # (Zhang et al. 2024).
    "llama-60m": _LLAMA | _shape(8, 8, 512, 1024, n_hidden=1376, norm_eps=1e-6),
    "llama-130m": _LLAMA | _shape(12, 12, 768, 1024, n_hidden=2048, norm_eps=1e-6),
    "llama-350m": _LLAMA | _shape(24, 16, 1024, 1024, n_hidden=2736, norm_eps=1e-6),
    "llama-1.1b": _LLAMA | _shape(22, 32, 2048, 2048, n_hidden=5632, n_kv_head=4),
    # For CPUs, with this project's defaults for everything else.
    "cpu-1m": _shape(4, 4, 128, 256),
    "cpu-3m": _shape(4, 4, 256, 256),
    "cpu-10m": _shape(6, 6, 384, 256),
}
