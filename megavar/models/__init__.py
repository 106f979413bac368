"""Registry of the model families."""

from collections.abc import Callable

from megavar.models import qwen2, qwen3, qwen3_moe
from megavar.models.dims import ModelDims
from megavar.models.ops import Operator

FAMILIES: dict[str, Callable[[ModelDims], list[Operator]]] = {
    "qwen2": qwen2.operators,
    "qwen3": qwen3.operators,
    "qwen3_moe": qwen3_moe.operators,
}


def operators(dims: ModelDims) -> list[Operator]:
    """The operators of the family of `dims`."""
    return FAMILIES[dims.family](dims)
