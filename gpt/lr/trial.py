"""Short trainings in memory: real steps of a config's own model and data, at any rate.

Nothing is written, nothing printed, and no state of the caller's is touched.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from gpt.build import assemble, choose
from gpt.checkpoint import Training
from gpt.config import Config
from gpt.data import Batches, TokenData
from gpt.device import rng_state, seed_everything, set_rng_state
from gpt.lr.rates import with_lr
from gpt.plan import Plan
from gpt.schedule import build_scheduler
from gpt.step import NonFiniteError, evaluate, train_step

# A ramp whose loss is this far above its first one, in nats, has seen enough.
LOST_NATS = 1.0
# Fewer validation tokens than this tell one rate from another too badly.
MIN_EVAL_TOKENS = 1024


@dataclass(frozen=True)
class Trial:
    """One short training: the rate, the losses of its steps (nats per token), how it ended.

    `loss` is the validation loss at its end, infinite if it diverged.
    """

    lr: float
    seed: int
    losses: tuple[float, ...]
    loss: float


@contextmanager
def untouched_generators() -> Iterator[None]:
    """Whatever is drawn inside, torch's generators are outside as if nothing had been."""
    before = rng_state()
    try:
        yield
    finally:
        set_rng_state(before)


class Laboratory:
    """Trains copies of one model on one text. `steps` counts what that cost.

    An evaluation counts as a third of the step that would train on as many tokens, since it goes
    forward only.
    """

    def __init__(
        self,
        config: Config,
        data: TokenData,
        *,
        weights: dict[str, Tensor] | None = None,
        on_cost: Callable[[float], None] | None = None,
    ) -> None:
        """Takes the run to try; `weights`, to begin from those instead of from a seed's own.

        `on_cost` is called with the cost, in steps, of everything that is done.
        """
        self.config = config
        self.total_steps = config.total_steps(data.train.n_tokens)
        self.steps = 0.0
        self._data = data
        self._weights = weights
        self._on_cost = on_cost
        self._choices = choose(config, data.tokenizer.vocab_size, self.total_steps)

    def eval_tokens(self, steps: int) -> int:
        """Tokens on which a training of `steps` is judged: half of what it read, within limits."""
        limits = [self._data.val.n_tokens - 1]
        if self.config.eval.max_tokens is not None:
            limits.append(self.config.eval.max_tokens)
        wanted = max(MIN_EVAL_TOKENS, steps * self.config.tokens_per_step // 2)
        return max(1, min(wanted, *limits))

    def cost(self, steps: int) -> float:
        """What a training of `steps` and its evaluation cost, in steps."""
        return steps + self.eval_tokens(steps) / self.config.tokens_per_step / 3

    def run(self, lr: float, steps: int, seed: int) -> Trial:
        """Trains `steps` at the config's whole schedule, shortened, with the peak at `lr`."""
        tokens = self.eval_tokens(steps)
        evaluation = self.config.eval.model_copy(update={"max_tokens": tokens})
        config = with_lr(self.config, lr).model_copy(update={"eval": evaluation})
        plan = Plan.from_config(config, self.total_steps).scaled(steps)
        with untouched_generators():
            training = self._training(config, seed)
            training.scheduler = build_scheduler(training.optimizer, plan)
            losses = self._train(training, steps, seed)
            loss = math.inf
            if len(losses) == steps:
                result = evaluate(training, self._data.val, self._choices.device, lambda: False)
                self._spend(self.cost(steps) - steps)
                if result is not None and math.isfinite(result.loss):
                    loss = result.loss
        return Trial(lr, seed, tuple(losses), loss)

    def ramp(self, low: float, high: float, steps: int, seed: int) -> tuple[list[float], Trial]:
        """Trains while the rate rises geometrically from `low` to `high`: the rates, the trial.

        Every group's rate is multiplied alike, so that their ratios stay. Its `loss` is that of
        the last step.
        """
        config = with_lr(self.config, low)
        ratio = high / low
        with untouched_generators():
            training = self._training(config, seed)
            training.scheduler = LambdaLR(
                training.optimizer, lambda step: ratio ** (step / max(1, steps - 1))
            )
            losses = self._train(training, steps, seed, until_lost=True)
        rates = [low * ratio ** (step / max(1, steps - 1)) for step in range(len(losses))]
        return rates, Trial(high, seed, tuple(losses), losses[-1] if losses else math.inf)

    def _training(self, config: Config, seed: int) -> Training:
        """A model at its start, with its optimizer; the schedule is the caller's."""
        seed_everything(seed)
        training = assemble(config, self._data, self._choices.device, self._choices.dtype)
        if self._weights is not None:
            training.model.load_state_dict(self._weights)
        return training

    def _train(
        self, training: Training, steps: int, seed: int, *, until_lost: bool = False
    ) -> list[float]:
        """The losses of up to `steps` steps; fewer where it broke or, if asked for, is lost.

        A training with a schedule may come back from a spike; one whose rate only rises will not.
        """
        config = training.config
        batches = Batches(
            self._data.train,
            config.model.context_len,
            config.train.batch_size,
            seed,
            shuffle=config.data.shuffle,
        )
        losses: list[float] = []
        skipped = 0
        while len(losses) < steps:
            inputs, targets = batches.batch(len(losses))
            try:
                result = train_step(training, inputs, targets)
            except NonFiniteError:
                break
            self._spend(1)
            if result.skipped and skipped < 32:  # fp16: the scale comes down, the same batch again
                skipped += 1
                continue
            losses.append(result.loss)
            if until_lost and result.loss > losses[0] + LOST_NATS:
                break
        return losses

    def _spend(self, steps: float) -> None:
        self.steps += steps
        if self._on_cost is not None:
            self._on_cost(steps)


def starting_weights(model: nn.Module) -> dict[str, Tensor]:
    """A copy of a model's weights, which the model's own training cannot change."""
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
