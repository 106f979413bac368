"""Arithmetic of the engine: fp32, bf16, and FP8 through Transformer Engine.

Transformer Engine is optional. Where it is absent, or there is no CUDA, the engine uses Megatron's local layers.
"""

from functools import cache
from typing import Any

import torch

from megavar.config.schema import PrecisionConfig

FP8_TOKEN_MULTIPLE = {"none": 1, "delayed": 16, "tensorwise": 16, "blockwise": 128, "mxfp8": 32}
"""Rows that FP8 matrix products are padded to, for each recipe."""
_LEAST_CAPABILITY = {"delayed": (8, 9), "tensorwise": (8, 9), "blockwise": (9, 0), "mxfp8": (10, 0)}


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


def check_precision(config: PrecisionConfig) -> None:
    """Check that this machine can compute as asked.

    Raises:
        ValueError: if FP8 is asked for without CUDA, Transformer Engine or a GPU that has it.
    """
    if config.fp8 == "none":
        return
    asked = f"precision.fp8={config.fp8}"
    if not torch.cuda.is_available():
        raise ValueError(f"{asked} needs a CUDA GPU and Transformer Engine, there is none; use precision.fp8=none.")
    if not has_transformer_engine():
        raise ValueError(f"{asked} needs Transformer Engine; `pip install 'megavar[gpu]'`, or use precision.fp8=none.")
    actual, least = torch.cuda.get_device_capability(), _LEAST_CAPABILITY[config.fp8]
    if actual < least:
        raise ValueError(
            f"{asked} needs compute capability {least[0]}.{least[1]}, this GPU has {actual[0]}.{actual[1]}; "
            "use another recipe or precision.fp8=none."
        )


def transformer_config_arguments(config: PrecisionConfig) -> dict[str, Any]:
    """The precision part of Megatron's TransformerConfig."""
    dtype = torch.bfloat16 if config.dtype == "bf16" else torch.float32
    arguments: dict[str, Any] = {
        "bf16": config.dtype == "bf16",
        "params_dtype": dtype,
        "pipeline_dtype": dtype,
        "attention_softmax_in_fp32": True,
    }
    if config.fp8 != "none":
        arguments |= {"fp8": "hybrid", "fp8_recipe": config.fp8}
    return arguments
