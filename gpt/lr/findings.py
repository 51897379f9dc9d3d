"""What the lint works on and what comes out: the facts of a run, and a finding."""

from dataclasses import dataclass

import torch

from gpt.config import Config
from gpt.data import TokenData
from gpt.device import cpu_has_bf16
from gpt.plan import Plan


@dataclass(frozen=True)
class Finding:
    """One thing that looks wrong: the value and the reason, what to type, and who says so."""

    id: str
    message: str
    remedy: str
    source: str


@dataclass(frozen=True)
class Facts:
    """What data, model and machine tell, as far as it is known: None where it is not.

    `device` is torch's type: cpu, cuda, mps; `has_bf16` whether it multiplies bf16 in hardware.
    """

    parameters: int
    train_tokens: int | None = None
    documents: int | None = None
    device: str | None = None
    has_bf16: bool | None = None

    def epochs(self, config: Config, plan: Plan) -> float | None:
        """Passes over the training text in the whole run."""
        if not self.train_tokens:
            return None
        return plan.total_steps * config.tokens_per_step / self.train_tokens


def facts_of(parameters: int, data: TokenData | None, device: torch.device | None) -> Facts:
    """The facts of a run: from its text, if it is tokenized, and its device, if it is here."""
    has_bf16: bool | None = None
    if device is not None and device.type == "cpu":
        has_bf16 = cpu_has_bf16()
    elif device is not None and device.type == "cuda":
        has_bf16 = bool(torch.cuda.is_bf16_supported(including_emulation=False))
    return Facts(
        parameters=parameters,
        train_tokens=None if data is None else data.train.n_tokens,
        documents=None if data is None else data.train.n_documents,
        device=None if device is None else device.type,
        has_bf16=has_bf16,
    )
