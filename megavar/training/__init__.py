"""The training engine. Importing it first makes megatron-core usable on CPUs, before anything binds CUDA."""

from megavar.training.megatron_on_cpu import retarget_megatron

retarget_megatron()
