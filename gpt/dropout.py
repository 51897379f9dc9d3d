"""Dropout that does not spend most of its time on random numbers."""

import torch
from torch import Tensor, nn

_LEVELS = 2**16


class Dropout(nn.Dropout):
    """`nn.Dropout`; under a CPU's autocast with four choices out of each random number of 64 bits.

    There torch draws one such number for each feature, which takes four times as long. The share
    that is dropped is the nearest multiple of 2^-16, and the rest is scaled by just that. In fp32
    the products take longer, and the choices stay torch's, as older runs had them.
    """

    def forward(self, x: Tensor) -> Tensor:
        """The features, some set to zero and the others made larger, so that the mean stays."""
        level = round(self.p * _LEVELS)
        quick = x.device.type == "cpu" and torch.is_autocast_enabled("cpu")
        if not (quick and self.training and 0 < level < _LEVELS):
            return super().forward(x)
        words = torch.randint(-(2**63), 2**63 - 1, (-(-x.numel() // 4),))
        drawn = words.view(torch.int16)[: x.numel()].view(x.shape)
        kept = drawn >= level - _LEVELS // 2
        return x * kept.to(x.dtype).mul_(_LEVELS / (_LEVELS - level))
