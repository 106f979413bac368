"""The training loop: weighted sequences in, checkpoints out. It knows nothing of objectives."""

import gc
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import parallel_state

from megavar.checkpoints.convert import Model
from megavar.config.schema import ParallelConfig, PrecisionConfig, TrainConfig
from megavar.packing import Microbatch, PackShape, data_order, pack
from megavar.sequences import SequenceSet
from megavar.stopping import Stopped
from megavar.training.checkpoint import check_free_space, list_checkpoints, load_checkpoint, save_checkpoint, step_of
from megavar.training.forward_backward import configure_gradients, gradient_pass, pack_shape, plan_microbatches
from megavar.training.hardware import peak_flops, peak_memory_gib
from megavar.training.load_weights import load_weights
from megavar.training.model import build_model, transformer_config
from megavar.training.optimizer import NOT_FINITE, build_optimizer, gather_parameters, wrap_for_gradients
from megavar.training.parallel import agree
from megavar.training.tensor_overlap import tensor_overlap

GC_INTERVAL_STEPS = 100
"""Ranks wait for the slowest in every step: garbage is collected after the same steps on all of them."""
Report = Callable[[int, int, dict[str, float]], None]
"""Called on every rank with (steps done, steps in all, metrics of the last step)."""


def loss_normalizer(sequences: SequenceSet, train: TrainConfig) -> float:
    """C of the loss: B x the mean over the data set of (|weight| x trained tokens), unless set by config."""
    if train.loss_normalizer is not None:
        return train.loss_normalizer
    return train.batch_sequences * float(np.mean(np.abs(sequences.weights) * sequences.num_targets))


@contextmanager
def _without_collecting_garbage() -> Iterator[None]:
    enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


@_without_collecting_garbage()
def train_model(
    init: Path,
    sequences: SequenceSet,
    train: TrainConfig,
    parallel: ParallelConfig,
    precision: PrecisionConfig,
    seed: int,
    folder: Path,
    report: Report,
) -> None:
    """Train from the Hugging Face folder `init` to the last step, resuming from the newest checkpoint in `folder`.

    Args:
        sequences: the data set, the same on every rank.
        folder: holds the checkpoints; the last one is the result.

    Raises:
        ValueError: if a sequence does not fit the microbatch.
        FloatingPointError: if the loss or the gradient norm is not finite, before the weights change.
        Stopped: on every rank after the same step, which is saved, if any was asked to stop.
    """
    model = Model(init)
    with tensor_overlap(model.dims.hidden_size, parallel, precision, train):
        _train(model, sequences, train, parallel, precision, seed, folder, report)


def _train(
    model: Model,
    sequences: SequenceSet,
    train: TrainConfig,
    parallel: ParallelConfig,
    precision: PrecisionConfig,
    seed: int,
    folder: Path,
    report: Report,
) -> None:
    num_steps = train.steps_of(len(sequences))
    normalizer = loss_normalizer(sequences, train)
    existing = list_checkpoints(folder)
    start = existing[-1] if existing else None
    chunks, optimizer, scheduler = open_training(model, train, parallel, precision, num_steps, start)
    shape = pack_shape(parallel, precision, train.fixed_tokens)
    first_step, checkpoint_seconds = step_of(existing[-1]) if existing else 0, 0.0
    saved_at = time.monotonic()
    if first_step < num_steps:
        most_at_once = train.keep_checkpoints + 1 - len(existing)
        check_free_space(folder, chunks, max(1, min(most_at_once, 1 + (num_steps - first_step) // train.save_interval)))
    for step in range(first_step, num_steps):
        clock = _Clock()

        # Data: this rank's packed microbatches of the global batch.
        indices = data_order(len(sequences), step * train.batch_sequences, (step + 1) * train.batch_sequences, seed)
        lengths, num_targets = sequences.num_tokens[indices].tolist(), int(sequences.num_targets[indices].sum())
        microbatches, padding_share = own_microbatches(sequences, indices, train.microbatch_tokens, parallel, shape)
        data_seconds = clock.lap()

        # Gradients, added up over microbatches and ranks.
        clear_gradients(chunks, optimizer)
        sums = gradient_pass(chunks, microbatches, normalizer)
        if not math.isfinite(sums.loss):
            raise FloatingPointError(f"step {step + 1}: the loss is {sums.loss}; {NOT_FINITE}")
        forward_backward_seconds = clock.lap()

        # Update; a gradient norm that is not finite stops it before a weight changes.
        learning_rate = max(group["lr"] for group in optimizer.param_groups)
        _, grad_norm, _ = optimizer.step()
        scheduler.step(1)
        optimizer_seconds = clock.lap()

        metrics = {
            "loss": sums.loss,
            "token_nll": sums.nll / sums.num_target_tokens,
            "grad_norm": float(grad_norm or 0.0),
            "learning_rate": float(learning_rate),
            "target_tokens": float(sums.num_target_tokens),
            "tokens_per_second": sum(lengths) / clock.seconds,
            "padding_share": padding_share,
            **_utilisation(model.dims.training_flops(lengths, num_targets) / dist.get_world_size(), clock.seconds),
            "peak_memory_gib": peak_memory_gib(),
            "seconds": clock.seconds,
            "data_seconds": data_seconds,
            "forward_backward_seconds": forward_backward_seconds,
            "optimizer_seconds": optimizer_seconds,
            "checkpoint_seconds": checkpoint_seconds,
        }
        if (step + 1) % GC_INTERVAL_STEPS == 0:
            gc.collect()
        # Reported before it is saved: a step that a checkpoint holds is never taken again, so its row must be there.
        report(step + 1, num_steps, metrics)
        clock.lap()
        checkpoint_seconds = 0.0
        save_is_due = 0 < train.save_minutes * 60 <= time.monotonic() - saved_at
        stops, save_is_due = agree(save_is_due)
        if stops or save_is_due or (step + 1) % train.save_interval == 0 or step + 1 == num_steps:
            gather_parameters(chunks)
            save_checkpoint(folder, step + 1, chunks, optimizer, scheduler, train.keep_checkpoints, model)
            checkpoint_seconds, saved_at = clock.lap(), time.monotonic()
        if stops:
            raise Stopped(f"step {step + 1} of {num_steps} is saved in {folder}")


def open_training(
    model: Model,
    train: TrainConfig,
    parallel: ParallelConfig,
    precision: PrecisionConfig,
    num_steps: int,
    checkpoint: Path | None,
) -> tuple[list[torch.nn.Module], Any, Any]:
    """This rank's part of the model, its optimizer and its schedule, as a checkpoint has them, or at their start."""
    config = transformer_config(
        model.dims, parallel, precision, train.recompute, train.fixed_tokens, train.overlap_tensor_parallel
    )
    configure_gradients(config)
    chunks = build_model(config, model.dims)
    if checkpoint is None:
        load_weights(chunks, model)
    chunks = wrap_for_gradients(config, chunks, train)
    optimizer, scheduler = build_optimizer(chunks, train, config.bf16, num_steps)
    if checkpoint is None:
        optimizer.reload_model_params()
        scheduler.step(1)
    else:
        load_checkpoint(checkpoint, chunks, optimizer, scheduler)
    return chunks, optimizer, scheduler


def clear_gradients(chunks: list[torch.nn.Module], optimizer: Any) -> None:
    """Before the gradients of a step are added up."""
    for chunk in chunks:
        chunk.zero_grad_buffer()  # type: ignore[operator]
    optimizer.zero_grad()


class _Clock:
    """Wall time of a step, and of its parts."""

    def __init__(self) -> None:
        self._start = self._lap = time.perf_counter()

    def lap(self) -> float:
        """Seconds since the last call."""
        last, self._lap = self._lap, time.perf_counter()
        return self._lap - last

    @property
    def seconds(self) -> float:
        """From the start of the step to the last lap."""
        return self._lap - self._start


def _utilisation(flops: float, seconds: float) -> dict[str, float]:
    """Model FLOP/s of a rank and, where its device's peak is known, the share of it (MFU)."""
    values, peak = {"tflops_per_second_per_rank": flops / seconds / 1e12}, peak_flops()
    if peak is not None:
        values["mfu"] = flops / seconds / peak
    return values


def own_microbatches(
    sequences: SequenceSet, indices: Sequence[int], budget_tokens: int, parallel: ParallelConfig, shape: PackShape
) -> tuple[list[Microbatch], float]:
    """This data-parallel rank's microbatches of the global batch; only its own sequences are read.

    Returns:
        The microbatches, and the share of padding in the tokens of those of all ranks.
    """
    lengths = sequences.num_tokens[np.asarray(indices)].tolist()
    plan = plan_microbatches(lengths, budget_tokens, parallel, shape)
    packed = [sum(shape.segment_tokens([lengths[place] for place in places])) for rank in plan for places in rank]
    padding_share = 1 - (sum(lengths) - len(lengths)) / sum(packed)
    mine = plan[parallel_state.get_data_parallel_rank()]
    context_rank = parallel_state.get_context_parallel_rank()
    chosen = [[indices[place] for place in places] for places in mine]
    return [pack(sequences, some, shape, context_rank) for some in chosen], padding_share
