"""Buffers in which Transformer Engine exchanges activations between tensor-parallel ranks during matrix products.

They are registered on all ranks of a node before the model is built, and have one size: that of a microbatch.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from megavar.config.schema import ParallelConfig, PrecisionConfig, TrainConfig
from megavar.training.forward_backward import pack_shape
from megavar.training.precision import RECIPES, has_transformer_engine

SINGLE_QUEUE = "CUDA_DEVICE_MAX_CONNECTIONS"
"""How many queues a device's kernels are launched in. Up to Hopper it must be one: kernels then start in the order of
their launch, and a transfer before the product that it is to run beside. CUDA reads it as it starts."""


def check_tensor_overlap(key: str, tensor: int) -> None:
    """Check that this machine can overlap; `key` is the setting that asks for it.

    Raises:
        ValueError: without Transformer Engine, with fewer GPUs here than tensor-parallel ranks, and up to Hopper if
            kernels are launched in several queues.
    """
    if not has_transformer_engine():
        raise ValueError(f"{key}=true needs a CUDA GPU and Transformer Engine; use {key}=false.")
    if (count := torch.cuda.device_count()) < tensor:
        raise ValueError(
            f"{key}=true needs all tensor-parallel ranks on one node, but parallel.tensor={tensor} and there are "
            f"{count} GPUs; use {key}=false."
        )
    found = os.environ.get(SINGLE_QUEUE)
    if torch.cuda.get_device_capability()[0] < 10 and found != "1":
        raise ValueError(
            f"{key}=true needs {SINGLE_QUEUE}=1 on this GPU, but it is {found}; set it for all ranks, or unset it: "
            "commands of megavar then do."
        )


@contextmanager
def tensor_overlap(
    hidden_size: int, parallel: ParallelConfig, precision: PrecisionConfig, train: TrainConfig
) -> Iterator[None]:
    """The buffers of a training that asks for them, for as long as it takes; every rank enters and leaves it."""
    if not train.overlap_tensor_parallel:
        yield
        return
    from transformer_engine.pytorch import UserBufferQuantizationMode, destroy_ub, initialize_ub

    shape, recipe = pack_shape(parallel, precision, train.fixed_tokens), RECIPES[precision.recipe]
    modes = [UserBufferQuantizationMode.FP8] if recipe.values else []
    if not recipe.values or recipe.values.get("first_last_layers_bf16"):
        modes.append(UserBufferQuantizationMode.NONE)
    initialize_ub(
        shape=[shape.whole(train.fixed_tokens) // parallel.context, hidden_size],
        tp_size=parallel.tensor,
        quantization_modes=modes,
        dtype=torch.bfloat16,
        ub_cfgs={},
        bootstrap_backend="nccl",
    )
    try:
        yield
    finally:
        destroy_ub()
