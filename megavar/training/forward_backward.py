"""One pass of packed microbatches through the pipeline: with gradients for training, without for scoring.

loss = (1 / C) x sum over target tokens of weight x -logp, C constant (docs/method.md, "Loss and its normaliser").
Megatron's schedules add the microbatches up and divide by nothing, so the gradient is the same at every split.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.distributed import finalize_model_grads
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.pipeline_parallel import get_forward_backward_func
from numpy.typing import NDArray
from torch import Tensor

from megavar.config.schema import ParallelConfig, PrecisionConfig
from megavar.packing import Microbatch, PackShape, partition
from megavar.training.megatron_on_cpu import device
from megavar.training.model import Targets, WeightedTargets
from megavar.training.precision import RECIPES


@dataclass(frozen=True)
class StepSums:
    """Sums over the global batch, the same on every rank."""

    loss: float
    nll: float
    """Sum of -logp over the target tokens, unweighted, nats."""
    num_target_tokens: int


def pack_shape(parallel: ParallelConfig, precision: PrecisionConfig, fixed_tokens: int = 0) -> PackShape:
    """The multiples that this parallel layout and precision require of a microbatch's length.

    Args:
        fixed_tokens: `TrainConfig.fixed_tokens`.
    """
    multiple = parallel.context * RECIPES[precision.recipe].token_multiple
    multiple *= parallel.tensor if parallel.sequence_parallel else 1
    return PackShape(parallel.context, multiple, fixed_tokens)


def plan_microbatches(
    lengths: Sequence[int], budget_tokens: int, parallel: ParallelConfig, shape: PackShape
) -> list[list[list[int]]]:
    """`partition` sequences of these lengths over this layout: [data-parallel ranks][microbatches] indices of them."""
    # As long as they become: else a microbatch could be longer than its budget, and than others of one fixed length.
    padded = [length + -length % shape.segment_multiple for length in lengths]
    multiple = parallel.pipeline if parallel.virtual_pipeline > 1 else 1
    ranks = parallel_state.get_data_parallel_world_size()
    return partition(padded, shape.whole(budget_tokens), ranks, multiple)


def configure_gradients(config: Any) -> None:
    """Finish gradients without dividing by a token count."""

    def finish(model: list[torch.nn.Module], num_tokens: Tensor | None = None, **arguments: Any) -> None:
        finalize_model_grads(model, None, **arguments)

    config.finalize_model_grads_func = finish


def gradient_pass(chunks: list[torch.nn.Module], microbatches: Sequence[Microbatch], normalizer: float) -> StepSums:
    """Add up the gradients of the global batch, of which `microbatches` are this data-parallel rank's part."""

    def targets_of(microbatch: Microbatch) -> Targets:
        weights = torch.from_numpy(microbatch.weights) / normalizer
        return WeightedTargets(*_targets(microbatch), 1.0, weights.to(device()))

    results = _run(chunks, microbatches, targets_of, _loss, forward_only=False)
    sums = torch.zeros(3, dtype=torch.float64)
    if parallel_state.get_tensor_model_parallel_rank() == 0:
        for result in results:
            sums += result["sums"].cpu()
    sums = sums.to(device())
    dist.all_reduce(sums)
    loss, nll, num_tokens = sums.tolist()
    return StepSums(loss, nll, int(num_tokens))


def score_pass(
    chunks: list[torch.nn.Module], microbatches: Sequence[Microbatch], temperature: float
) -> list[NDArray[np.float32]]:
    """Log-probs [S] of each microbatch's targets on the last pipeline stage; an empty list on the others."""

    def targets_of(microbatch: Microbatch) -> Targets:
        return Targets(*_targets(microbatch), temperature)

    with torch.no_grad():
        results = _run(chunks, microbatches, targets_of, _collect, forward_only=True)
    return [result["logps"] for result in results]


def _run(
    chunks: list[torch.nn.Module],
    microbatches: Sequence[Microbatch],
    targets_of: Callable[[Microbatch], Targets],
    loss_function: Any,
    forward_only: bool,
) -> list[dict[str, Any]]:
    def forward_step(iterator: Iterator[Microbatch], model: torch.nn.Module) -> tuple[Any, Any]:
        microbatch = next(iterator)
        return _forward(model, microbatch, targets_of(microbatch)), loss_function

    iterators = [iter(microbatches) for _ in chunks]
    results: list[dict[str, Any]] = get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=iterators if len(chunks) > 1 else iterators[0],
        model=chunks if len(chunks) > 1 else chunks[0],
        num_microbatches=len(microbatches),
        # Over all context-parallel ranks; read where all microbatches have one length.
        seq_length=max(sum(microbatch.segment_lengths) for microbatch in microbatches),
        micro_batch_size=1,
        forward_only=forward_only,
    )
    return results


def _forward(model: torch.nn.Module, microbatch: Microbatch, targets: Targets) -> Any:
    where = device()
    # The longest segment itself, never a rounded size: if it equalled the total of several segments, Megatron
    # would take the rotary table for one of the entire pack (rope_utils.py:155) and not restart positions.
    longest = max(microbatch.segment_lengths)
    bounds = torch.tensor([0, *np.cumsum(microbatch.segment_lengths)], dtype=torch.int32, device=where)
    packed = PackedSeqParams(
        qkv_format="thd", cu_seqlens_q=bounds, cu_seqlens_kv=bounds, max_seqlen_q=longest, max_seqlen_kv=longest
    )
    token_ids = torch.from_numpy(microbatch.token_ids)[None].to(where)
    return model(token_ids, None, None, labels=targets, packed_seq_params=packed)


def _targets(microbatch: Microbatch) -> tuple[Tensor, Tensor]:
    where = device()
    return torch.from_numpy(microbatch.positions).to(where), torch.from_numpy(microbatch.targets).to(where)


def _loss(output: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, dict[str, Any]]:
    loss, logps = output
    sums = torch.stack([loss.detach().double(), -logps.double().sum(), loss.new_tensor(len(logps)).double()])
    # Megatron adds up the integer, and finish() above ignores it.
    return loss, torch.ones((), dtype=torch.int, device=logps.device), {"sums": sums}


def _collect(logps: Tensor) -> tuple[Tensor, Tensor, dict[str, Any]]:
    one = torch.ones((), dtype=torch.int, device=logps.device)
    return logps.sum(), one, {"logps": logps.cpu().numpy()}
