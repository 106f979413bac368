"""The `Family` record: parameters of a model family and the meaning of its config.json."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from megavar.models.dims import ModelDims
from megavar.models.ops import Operator


@dataclass(frozen=True)
class Family:
    """A Hugging Face `model_type`."""

    operators: Callable[[ModelDims], list[Operator]]
    """Operators of all parameters of a model of these sizes."""
    qkv_bias: bool = False
    """Query, key and value projections have biases."""
    qk_norm: bool = False
    """Query and key heads are normalised."""
    is_moe: bool = False
    """Every layer is a mixture of experts."""
    head_dim: int | None = None
    """Default if config.json has no `head_dim`; None: hidden_size / num_attention_heads."""
    required: dict[str, Any] = field(default_factory=dict)
    """config.json keys that must have this value if present: the engine supports no other."""
