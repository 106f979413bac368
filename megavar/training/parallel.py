"""The process grid: tensor x pipeline x context x data parallel ranks of one torchrun.

The only place that starts and stops torch.distributed. Rank 0 also does what needs one process (talking to servers,
writing records): `on_rank_zero` lets the others wait meanwhile, without a collective that would time out.
"""

import os
import time
import traceback
from collections.abc import Callable
from datetime import timedelta

import torch
import torch.distributed as dist

from megavar.config.schema import ParallelConfig
from megavar.models.dims import ModelDims

_POLL_SECONDS = 0.2
_collective_calls = 0


def world_size() -> int:
    """Ranks that torchrun started.

    Raises:
        ValueError: if this process was not started by torchrun.
    """
    if "WORLD_SIZE" not in os.environ:
        raise ValueError(
            "This stage trains or scores and runs under torchrun; start it with "
            "`torchrun --nproc-per-node N -m megavar ...` or `torchrun --nproc-per-node N examples/...`."
        )
    return int(os.environ["WORLD_SIZE"])


def check_parallel(config: ParallelConfig, dims: ModelDims, ranks: int) -> None:
    """Check that a model of these sizes can be split over this grid.

    Raises:
        ValueError: naming the setting, the size it must divide, and the values that would do.
    """
    product = config.tensor * config.pipeline * config.context
    if ranks % product:
        raise ValueError(
            f"parallel.tensor={config.tensor} x parallel.pipeline={config.pipeline} x parallel.context="
            f"{config.context} = {product} does not divide the world size {ranks}; start a multiple of {product} "
            "ranks or choose smaller sizes."
        )
    for name, size in (
        ("num_attention_heads", dims.num_heads),
        ("num_key_value_heads (query groups)", dims.num_query_groups),
        ("intermediate_size", 0 if dims.num_experts else dims.ffn_size),  # experts are not split
    ):
        if size % config.tensor:
            fitting = [str(tensor) for tensor in range(1, 65) if size % tensor == 0]
            raise ValueError(
                f"parallel.tensor={config.tensor} does not divide {name}={size}; use one of {', '.join(fitting)}."
            )
    copies = ranks // config.pipeline
    if config.expert > 1 and (copies % config.expert or dims.num_experts == 0 or dims.num_experts % config.expert):
        raise ValueError(
            f"parallel.expert={config.expert} does not divide both num_experts={dims.num_experts} and the {copies} "
            "ranks of a pipeline stage; use 1 or a divisor of both."
        )
    if dims.num_experts and config.tensor > 1 and not config.sequence:
        raise ValueError(
            f"parallel.tensor={config.tensor} of a mixture of experts needs parallel.sequence=true (--sp): Megatron "
            "routes tokens that are split over the tensor-parallel ranks."
        )
    stages = config.pipeline * config.virtual_pipeline
    if dims.num_layers % stages:
        raise ValueError(
            f"parallel.pipeline={config.pipeline} x parallel.virtual_pipeline={config.virtual_pipeline} = {stages} "
            f"does not divide num_hidden_layers={dims.num_layers}; use stages of equally many layers."
        )


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
    # Megatron's layers fork this generator even where they draw nothing from it, as here (no dropout).
    model_parallel_cuda_manual_seed(0)


def start_alone() -> None:
    """As `start`, for a process that torchrun did not start: it is the only rank."""
    alone = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "localhost", "MASTER_PORT": "0"}
    os.environ |= alone
    start(ParallelConfig())


def stop() -> None:
    """Leave torch.distributed."""
    if dist.is_initialized():
        from megatron.core import parallel_state

        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()


def is_rank_zero() -> bool:
    """Whether this process writes files, shows progress and talks to servers."""
    return not dist.is_initialized() or dist.get_rank() == 0


def on_rank_zero(work: Callable[[], None]) -> None:
    """Run `work` on rank 0 while the other ranks sleep, however long it takes; a failure fails every rank.

    Waiting goes through the rendezvous store in short polls, so it neither burns a core nor meets the
    time-out of a collective.
    """
    global _collective_calls
    if not dist.is_initialized():
        work()
        return
    _collective_calls += 1
    key = f"megavar/rank_zero/{_collective_calls}"
    store = dist.distributed_c10d._get_default_store()
    if dist.get_rank() == 0:
        try:
            work()
        except BaseException as error:
            store.set(key, f"{type(error).__name__}: {error}")
            raise
        store.set(key, "done")
        return
    while not store.check([key]):
        time.sleep(_POLL_SECONDS)
    outcome = store.get(key).decode()
    if outcome != "done":
        raise RankZeroError(f"rank 0 failed: {outcome}")


class RankZeroError(RuntimeError):
    """Raised on the other ranks when rank 0's work failed; rank 0 reports the cause."""


def barrier() -> None:
    """Wait for every rank; for short waits only."""
    if dist.is_initialized():
        dist.barrier()


def exit_code_for(error: BaseException) -> int:
    """Report an error once: a user's mistake as one line on rank 0, anything else with its traceback."""
    if isinstance(error, RankZeroError):
        return 1
    if isinstance(error, ValueError):
        if int(os.environ.get("RANK", "0")) == 0:
            print(f"error: {error}", flush=True)
        return 2
    traceback.print_exception(error)
    return 1
