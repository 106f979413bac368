"""Model family registry, keyed by `model_type` of config.json: one file and one line per family."""

from megavar.models import qwen2, qwen3, qwen3_moe
from megavar.models.dims import ModelDims
from megavar.models.family import Family
from megavar.models.ops import Operator

FAMILIES: dict[str, Family] = {
    "qwen2": qwen2.FAMILY,
    "qwen3": qwen3.FAMILY,
    "qwen3_moe": qwen3_moe.FAMILY,
}


def operators(dims: ModelDims) -> list[Operator]:
    """Operators of all parameters of a model of these sizes."""
    return FAMILIES[dims.family].operators(dims)
