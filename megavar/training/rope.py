"""The frequencies of rotary position embeddings whose context YaRN extends (arXiv 2309.00071, section 3.2)."""

from math import ceil, floor, log, pi

import torch
from torch import Tensor

from megavar.models.dims import Yarn


def yarn_frequencies(yarn: Yarn, base: float, head_dim: int) -> Tensor:
    """[head_dim / 2] float32 radians a position.

    What turns at least `beta_fast` times within the original length is kept, what turns at most `beta_slow` times is
    divided by `factor`, and in between a linear ramp over the dimensions mixes both.
    """
    plain = 1.0 / base ** (torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)

    def dimension_of(turns: float) -> float:
        """The one, not rounded, that turns so often within the original length."""
        return head_dim * log(yarn.original_positions / (turns * 2 * pi)) / (2 * log(base))

    first, last = dimension_of(yarn.beta_fast), dimension_of(yarn.beta_slow)
    if yarn.truncate:
        first, last = floor(first), ceil(last)
    first, last = max(first, 0), min(last, head_dim - 1)
    if first == last:
        last += 0.001  # as transformers does: a step instead of a ramp
    divided = ((torch.arange(head_dim // 2, dtype=torch.float32) - first) / (last - first)).clamp(0, 1)
    return plain / yarn.factor * divided + plain * (1 - divided)
