"""torch's optimizers without the import of torch's compiler, which takes over a second.

torch wraps the methods of an optimizer such that a compiled training loop leaves them out; the
first call of each imports the compiler, whether anything is compiled or not. Here the loop is
never compiled, only the model: these classes have the methods below the wrappers.
"""

import inspect
from typing import Any

import torch
from torch.optim import Optimizer


class EagerOptimizer(Optimizer):
    """Put before an optimizer of torch's among the bases of a class; all else is that one's."""

    add_param_group = inspect.unwrap(Optimizer.add_param_group)
    zero_grad = inspect.unwrap(Optimizer.zero_grad)
    state_dict = inspect.unwrap(Optimizer.state_dict)
    load_state_dict = inspect.unwrap(Optimizer.load_state_dict)

    def __init_subclass__(cls, **options: Any) -> None:  # noqa: ANN401 (whatever a base takes)
        """Takes the step from below its wrappers, of which one turns gradients off."""
        super().__init_subclass__(**options)
        cls.step = torch.no_grad()(inspect.unwrap(cls.step))  # type: ignore[method-assign]


class SGD(EagerOptimizer, torch.optim.SGD):
    """torch's."""


class Adam(EagerOptimizer, torch.optim.Adam):
    """torch's."""


class AdamW(EagerOptimizer, torch.optim.AdamW):
    """torch's."""


class Adafactor(EagerOptimizer, torch.optim.Adafactor):
    """torch's."""


class Muon(EagerOptimizer, torch.optim.Muon):
    """torch's."""
