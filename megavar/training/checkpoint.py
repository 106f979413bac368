"""Training checkpoints: sharded by Megatron's dist_checkpointing, loadable on another parallel layout.

A checkpoint is the folder `step_NNNNNN`, written under a temporary name and renamed, so it is complete or absent. It
carries its Hugging Face configuration and tokenizer, so it converts like any other Megatron checkpoint
(`checkpoints/convert.py`). Nothing random happens in training (no dropout; the data order is a function of seed and
step): weights, optimizer, schedule and step are the state.
"""

import os
import queue
import shutil
from pathlib import Path
from typing import Any

import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.utils import unwrap_model

from megavar.checkpoints.convert import Model
from megavar.checkpoints.huggingface import copy_side_files
from megavar.checkpoints.megatron import SIDE_FILES, Description
from megavar.ranks import barrier, is_rank_zero

_SHARDING = {"distrib_optim_sharding_type": "fully_reshardable"}


def list_checkpoints(folder: Path) -> list[Path]:
    """Complete checkpoints, oldest first."""
    return sorted(folder.glob("step_*"))


def step_of(checkpoint: Path) -> int:
    """Optimizer steps done at a checkpoint."""
    return int(checkpoint.name.removeprefix("step_"))


def save_checkpoint(
    folder: Path, step: int, chunks: list[torch.nn.Module], optimizer: Any, scheduler: Any, keep: int, init: Model
) -> None:
    """Save after `step` optimizer steps and remove all but the last `keep` checkpoints; all ranks call it.

    Args:
        init: what training began from.
    """
    name = f"step_{step:06d}"
    aside = folder / f".{name}.tmp"
    if is_rank_zero():
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)
    barrier()
    state = _model_state(chunks)
    state["optimizer"] = optimizer.sharded_state_dict(state, metadata=_SHARDING)
    state["scheduler"] = scheduler.state_dict()
    state["distributed_optimizer"] = _is_distributed(optimizer)
    _queue_results_in_this_process()
    dist_checkpointing.save(state, str(aside), content_metadata=_SHARDING)
    barrier()
    if is_rank_zero():
        (aside / SIDE_FILES).mkdir()
        copy_side_files(init.side_files, aside / SIDE_FILES)
        Description(init.tied_head_written, source_digest=None).write(aside)
        os.replace(aside, folder / name)
        for old in list_checkpoints(folder)[:-keep]:
            shutil.rmtree(old)
    barrier()


def load_checkpoint(checkpoint: Path, chunks: list[torch.nn.Module], optimizer: Any, scheduler: Any) -> None:
    """Restore weights, optimizer and schedule, on this parallel layout or another one.

    Raises:
        ValueError: if it was saved with the other kind of optimizer, whose state cannot be read into this one.
    """
    saved = dist_checkpointing.load_common_state_dict(str(checkpoint)).get("distributed_optimizer")
    if saved not in (None, _is_distributed(optimizer)):
        raise ValueError(
            f"{checkpoint} was saved with distributed_optimizer={saved}, now it is {not saved}; set it back, or remove "
            f"{checkpoint.parent} to train from the start."
        )
    wanted = _model_state(chunks)
    wanted["optimizer"] = optimizer.sharded_state_dict(wanted, is_loading=True, metadata=_SHARDING)
    state: dict[str, Any] = dist_checkpointing.load(wanted, str(checkpoint))
    for index, chunk in enumerate(chunks):
        missing, unexpected = unwrap_model(chunk).load_state_dict(state[f"model{index}"], strict=False)
        differing = [name for name in [*missing, *unexpected] if not name.endswith("_extra_state")]
        assert not differing, f"checkpoint and model differ in {differing}"
    optimizer.load_state_dict(state["optimizer"])
    scheduler.load_state_dict(state["scheduler"])


def _is_distributed(optimizer: Any) -> bool:
    return bool(optimizer.config.use_distributed_optimizer)


def _queue_results_in_this_process() -> None:
    """Save without a process that only holds a queue.

    dist_checkpointing/strategies/filesystem_async.py:51 spawns a manager process a rank (seconds of imports) for a
    queue between processes; a synchronous save uses it within this one.
    """
    if vars(filesystem_async).get("_results_queue", ...) is None:
        filesystem_async._results_queue = queue.Queue()


def _model_state(chunks: list[torch.nn.Module]) -> dict[str, Any]:
    return {f"model{index}": unwrap_model(chunk).sharded_state_dict() for index, chunk in enumerate(chunks)}
