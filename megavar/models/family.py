"""What a family of models declares of itself: its parameters, and what its configuration means."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from megavar.models.dims import ModelDims
from megavar.models.ops import Operator


@dataclass(frozen=True)
class Family:
    """One `model_type` of Hugging Face."""

    operators: Callable[[ModelDims], list[Operator]]
    """All parameters of a model of these sizes."""
    qkv_bias: bool = False
    qk_norm: bool = False
    is_mixture: bool = False
    head_dim: int | None = None
    """Where config.json has none; None: hidden_size / num_attention_heads."""
    required: dict[str, Any] = field(default_factory=dict)
    """Keys of config.json that, where they occur, must have this value: the engine does nothing else."""
