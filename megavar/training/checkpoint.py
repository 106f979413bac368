"""Training checkpoints: sharded by Megatron's dist_checkpointing, loadable on another parallel layout.

A checkpoint is the folder `step_NNNNNN`, written under a temporary name and renamed, so it is complete or absent. It
carries its Hugging Face configuration and tokenizer, so it converts like any other Megatron checkpoint
(`checkpoints/convert.py`). Nothing random happens in training (no dropout; the data order is a function of seed and
step): weights, optimizer, schedule and step are the state.
"""

import os
import pickle
import queue
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.utils import unwrap_model
from torch.distributed.checkpoint.api import CheckpointException

from megavar.checkpoints.convert import Model
from megavar.checkpoints.huggingface import copy_side_files
from megavar.checkpoints.megatron import SIDE_FILES, Description
from megavar.checkpoints.safe_pickle import check_pickles, load_scales, only_known_classes
from megavar.checksums import CHECKSUMS, check_files, file_digests, files_in, read_checksums, write_checksums
from megavar.disk import make_folder, sync
from megavar.ranks import ExplainedFailure, barrier, is_rank_zero, on_rank_zero
from megavar.training.precision import has_transformer_engine

_ALLOWS_PICKLES = "NVTE_ALLOW_UNSAFE_PICKLE_EXTRA_STATE"
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

    Each rank syncs and hashes a share of the files before the folder gets its name.

    Args:
        init: what training began from.

    Raises:
        ExplainedFailure: on every rank, if it cannot be written; the checkpoints before stay.
    """
    aside = folder / f".step_{step:06d}.tmp"

    def begin() -> None:
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)

    check_free_space(folder, chunks, 1)
    on_rank_zero(begin)
    state = _model_state(chunks)
    state["optimizer"] = optimizer.sharded_state_dict(state, metadata=_SHARDING)
    state["scheduler"] = scheduler.state_dict()
    state["distributed_optimizer"] = _is_distributed(optimizer)
    _queue_results_in_this_process()
    try:
        dist_checkpointing.save(state, str(aside), content_metadata=_SHARDING)
        barrier()
        on_rank_zero(lambda: _describe(aside, init))
        digest_of = _sync_and_hash(_share(files_in(aside)))
    except (OSError, CheckpointException) as error:
        raise _not_written(aside, error) from error
    all_digests = _gather(digest_of)

    def finish() -> None:
        write_checksums(aside, {file: digest for part in all_digests for file, digest in part.items()})
        for path in (aside / CHECKSUMS, aside / SIDE_FILES, aside):
            sync(path)
        os.replace(aside, folder / f"step_{step:06d}")
        sync(folder)
        for old in list_checkpoints(folder)[:-keep]:
            shutil.rmtree(old)

    on_rank_zero(finish)


def check_free_space(folder: Path, chunks: list[torch.nn.Module], num_checkpoints: int) -> None:
    """Refuse to write more checkpoints than the disk of `folder` has room for; all ranks call it.

    Raises:
        ExplainedFailure: on every rank, with what is needed and what is free.
    """
    # Weights, the optimizer's float32 copy of those that are shorter, and two moments. A replica holds all of them.
    num_bytes = sum(
        parameter.numel() * (parameter.element_size() + (8 if parameter.element_size() == 4 else 12))
        for chunk in chunks
        for parameter in chunk.parameters()
    )
    total = torch.tensor([num_bytes], dtype=torch.int64)
    dist.all_reduce(total)
    replicas = parallel_state.get_data_parallel_world_size(with_context_parallel=True)
    needed = num_checkpoints * int(total.item()) // replicas
    make_folder(folder)
    free = shutil.disk_usage(folder).free
    smallest = torch.tensor([free], dtype=torch.int64)
    dist.all_reduce(smallest, dist.ReduceOp.MIN)
    if smallest.item() < needed:
        raise ExplainedFailure(
            f"{folder} needs about {needed / 1e6:,.0f} MB for {num_checkpoints} checkpoint(s), and its disk has "
            f"{smallest.item() / 1e6:,.0f} MB free; free some (or lower keep_checkpoints), then the same command goes "
            "on from the last one."
        )


def _describe(aside: Path, init: Model) -> None:
    (aside / SIDE_FILES).mkdir()
    copy_side_files(init.side_files, aside / SIDE_FILES)
    Description(init.tied_head_written, source_digest=None).write(aside)


def _share(files: list[Path]) -> list[Path]:
    """This rank's part of the files, which all ranks see."""
    return files[dist.get_rank() :: dist.get_world_size()]


def _sync_and_hash(files: list[Path]) -> dict[Path, str]:
    for file in files:
        sync(file)
    return dict(zip(files, file_digests(files), strict=True))


def _gather(value: Any) -> list[Any]:
    """What each rank has, on every rank."""
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def _not_written(aside: Path, error: BaseException) -> ExplainedFailure:
    """One line for what torch reports with the stacks of all ranks; rank 0 gets to know the cause."""
    causes = [cause for cause, _ in error.failures.values()] if isinstance(error, CheckpointException) else [error]
    reasons = [str(cause) for cause in causes if isinstance(cause, OSError)] or [repr(cause) for cause in causes]
    if is_rank_zero():
        shutil.rmtree(aside, ignore_errors=True)
    free_megabytes = shutil.disk_usage(aside.parent).free / 1e6
    return ExplainedFailure(
        f"a checkpoint could not be written to {aside.parent}: {(reasons or ['see rank 0'])[0]:.500}; its disk has "
        f"{free_megabytes:,.0f} MB free; the checkpoints before are complete, and once that is mended the same command "
        "goes on from the last."
    )


def load_checkpoint(checkpoint: Path, chunks: list[torch.nn.Module], optimizer: Any, scheduler: Any) -> None:
    """Restore weights, optimizer and schedule, on this parallel layout or another one.

    Each rank compares a share of the files with their checksums, and nothing that a file names is run.

    Raises:
        ValueError: on every rank, if the checkpoint is damaged, names what no checkpoint needs, or was saved with the
            other kind of optimizer, whose state cannot be read into this one.
    """
    _check_share(checkpoint)
    on_rank_zero(lambda: check_pickles(checkpoint))
    with only_known_classes():
        _load(checkpoint, chunks, optimizer, scheduler)


def _check_share(checkpoint: Path) -> None:
    problem = ""
    try:
        digest_of = read_checksums(checkpoint)
        check_files(checkpoint, {file: digest_of[file] for file in _share(list(digest_of))})
    except ValueError as error:
        problem = str(error)
    if problems := [text for text in _gather(problem) if text]:
        raise ValueError(problems[0])


def _load(checkpoint: Path, chunks: list[torch.nn.Module], optimizer: Any, scheduler: Any) -> None:
    saved = dist_checkpointing.load_common_state_dict(str(checkpoint)).get("distributed_optimizer")
    if saved not in (None, _is_distributed(optimizer)):
        raise ValueError(
            f"{checkpoint} was saved with distributed_optimizer={saved}, now it is {not saved}; set it back, or remove "
            f"{checkpoint.parent} to train from the start."
        )
    wanted = _model_state(chunks)
    wanted["optimizer"] = optimizer.sharded_state_dict(wanted, is_loading=True, metadata=_SHARDING)
    state: dict[str, Any] = dist_checkpointing.load(wanted, str(checkpoint))
    with _loading_scales():
        for index, chunk in enumerate(chunks):
            missing, unexpected = unwrap_model(chunk).load_state_dict(state[f"model{index}"], strict=False)
            differing = [name for name in [*missing, *unexpected] if not name.endswith("_extra_state")]
            assert not differing, f"checkpoint and model differ in {differing}"
    optimizer.load_state_dict(state["optimizer"])
    scheduler.load_state_dict(state["scheduler"])


@contextmanager
def _loading_scales() -> Iterator[None]:
    """Within it, Transformer Engine reads the scales of `fp8_delayed`, which are pickled, and runs nothing of them.

    pytorch/module/base.py (`set_extra_state`) unpickles anything, since 2.20 only if a variable allows that.
    """
    if not has_transformer_engine():
        yield
        return
    from transformer_engine.pytorch.module import base

    before = os.environ.get(_ALLOWS_PICKLES)
    os.environ[_ALLOWS_PICKLES] = "1"
    base.pickle = SimpleNamespace(loads=load_scales, dumps=pickle.dumps)
    try:
        yield
    finally:
        base.pickle = pickle
        del os.environ[_ALLOWS_PICKLES]
        if before is not None:
            os.environ[_ALLOWS_PICKLES] = before


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
