"""The training engine. Importing it first makes megatron-core usable on CPUs, before anything binds CUDA."""

import os

from megavar.training.megatron_on_cpu import retarget_megatron

# Part of `precision.recipe=fp8_blockwise`, which is for Hopper: without it scales are powers of two, which only
# Blackwell needs. Transformer Engine reads it as it is imported (common/recipe/__init__.py, Float8BlockScaling).
os.environ.setdefault("NVTE_FP8_BLOCK_SCALING_FP32_SCALES", "1")
retarget_megatron()
