"""Arithmetic of the engine: float32, bf16, and FP8 through Transformer Engine.

Transformer Engine is optional. Where it is absent, or there is no CUDA, the engine uses Megatron's local layers.
`docs/gpu.md` has the source of every value here.
"""

from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch

from megavar.config.schema import PrecisionConfig


@dataclass(frozen=True)
class Recipe:
    """What a precision is made of."""

    values: dict[str, Any] = field(default_factory=dict)
    """Of Megatron's TransformerConfig, beyond the data type of the parameters."""
    token_multiple: int = 1
    """Rows that its matrix products are padded to."""
    te_version: str = "0"
    """The oldest Transformer Engine that Megatron runs it with (fp8_utils.py, get_fp8_recipe)."""
    te_check: str = ""
    """Transformer Engine's own test of the device, a function of `transformer_engine.pytorch`."""


RECIPES = {
    "fp32": Recipe(),
    "bf16": Recipe(),
    "fp8_delayed": Recipe(
        {
            "fp8": "hybrid",
            "fp8_recipe": "delayed",
            "fp8_margin": 0,
            "fp8_amax_history_len": 1024,
            "fp8_amax_compute_algo": "max",
        },
        16,
        "1.0",
        "is_fp8_available",
    ),
    "fp8_current": Recipe(
        {
            "fp8": "hybrid",
            "fp8_recipe": "tensorwise",
            "first_last_layers_bf16": True,
            "num_layers_at_start_in_bf16": 1,
            "num_layers_at_end_in_bf16": 1,
        },
        16,
        "2.2",
        "is_fp8_available",
    ),
    "fp8_blockwise": Recipe({"fp8": "hybrid", "fp8_recipe": "blockwise"}, 128, "2.3", "is_fp8_block_scaling_available"),
    "mxfp8": Recipe({"fp8": "e4m3", "fp8_recipe": "mxfp8"}, 32, "2.1", "is_mxfp8_available"),
}


@cache
def has_transformer_engine() -> bool:
    """Whether Transformer Engine's layers can be used: installed with its core, and a CUDA device present.

    Raises:
        ValueError: for the bare `transformer-engine` package, which imports as an empty shell.
    """
    if not torch.cuda.is_available():
        return False
    try:
        import transformer_engine.pytorch  # noqa: F401
    except ImportError:
        return False
    except RuntimeError as error:
        raise ValueError(
            f"Transformer Engine is installed without its core ({error}); "
            "install `transformer-engine[core_cu13,pytorch]` (or core_cu12), or uninstall it."
        ) from error
    return True


def check_recipe(key: str, recipe: str) -> None:
    """Check that this machine can compute by a recipe; `key` is the setting that asks for it.

    Raises:
        ValueError: if FP8 is asked for without CUDA, Transformer Engine in a version that has it, or a GPU that has it.
    """
    needed = RECIPES[recipe]
    if not needed.values:
        return
    asked = f"{key}={recipe}"
    if not torch.cuda.is_available():
        raise ValueError(f"{asked} needs a CUDA GPU and Transformer Engine, there is none; use {key}=bf16.")
    if not has_transformer_engine():
        raise ValueError(f"{asked} needs Transformer Engine; install it as docs/gpu.md says, or use {key}=bf16.")
    import transformer_engine.pytorch
    from megatron.core.utils import get_te_version, is_te_min_version

    if not is_te_min_version(needed.te_version):
        raise ValueError(
            f"{asked} needs Transformer Engine {needed.te_version} or newer, {get_te_version()} is installed; use "
            f"{key}=bf16."
        )
    if recipe == "fp8_blockwise" and torch.cuda.get_device_capability()[0] > 9:
        raise ValueError(f"{asked} is for Hopper, whose products take float32 scales; use {key}=mxfp8 on this GPU.")
    available, reason = getattr(transformer_engine.pytorch, needed.te_check)(return_reason=True)
    if not available:
        raise ValueError(f"{asked} cannot be used here: {reason} Use another recipe or {key}=bf16.")


def transformer_config_arguments(config: PrecisionConfig, num_experts: int) -> dict[str, Any]:
    """The precision part of Megatron's TransformerConfig."""
    dtype, values = torch.float32 if config.recipe == "fp32" else torch.bfloat16, RECIPES[config.recipe].values
    return {
        "bf16": dtype == torch.bfloat16,
        "params_dtype": dtype,
        "pipeline_dtype": dtype,
        "attention_softmax_in_fp32": True,
        **values,
        # The router gives each expert a multiple of rows, so that its layers need not pad what they are given.
        "moe_router_padding_for_quantization": bool(values and num_experts),
    }
