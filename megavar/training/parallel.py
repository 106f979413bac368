"""Starts and stops torch.distributed, and makes Megatron's process groups: tensor, pipeline, context, expert, data."""

import os
import signal
from datetime import timedelta

import torch
import torch.distributed as dist

from megavar.config.schema import ParallelConfig
from megavar.stopping import request_stop, stop_requested


def start(config: ParallelConfig) -> None:
    """Join torch.distributed and make Megatron's process groups."""
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    if not dist.is_initialized():
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        dist.init_process_group(backend, timeout=timedelta(minutes=30))
    parallel_state.initialize_model_parallel(
        config.tensor,
        config.pipeline,
        virtual_pipeline_model_parallel_size=config.virtual_pipeline if config.virtual_pipeline > 1 else None,
        context_parallel_size=config.context,
        expert_model_parallel_size=config.expert,
        expert_tensor_parallel_size=1,  # experts are small: they are spread over ranks, not split
    )
    # Megatron's layers fork this generator even where they sample nothing from it, as here (no dropout).
    model_parallel_cuda_manual_seed(0)


def start_alone() -> None:
    """As `start`, for a process that torchrun did not start: it is the only rank."""
    alone = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "localhost", "MASTER_PORT": "0"}
    os.environ |= alone
    start(ParallelConfig())


def agree(flag: bool = False) -> tuple[bool, bool]:
    """Whether a rank was asked to stop, and whether the flag is set on one; every rank calls it and gets the same."""
    wish = stop_requested() or 0
    votes = torch.tensor([wish, flag], dtype=torch.uint8)  # on the CPU: gloo, also where there are GPUs
    dist.all_reduce(votes, dist.ReduceOp.MAX)
    number, any_flag = votes.tolist()
    if number:
        request_stop(signal.Signals(number))
    return bool(number), bool(any_flag)


def stop() -> None:
    """Leave torch.distributed."""
    if dist.is_initialized():
        from megatron.core import parallel_state

        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()
