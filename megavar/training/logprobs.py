"""Log-probs of chosen tokens from hidden states and a vocabulary-parallel output table, in chunks.

Only the positions that are scored or trained get logits, a chunk at a time and once more in the backward pass,
so no [positions, vocabulary] tensor of a whole sequence ever exists. Rows that pad the vocabulary are masked out.
Shape suffixes: S positions, H hidden size, V vocabulary rows of this tensor-parallel rank.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

CHUNK_ELEMENTS = 2**25
"""Logits held at once: 128 MiB in float32."""


def token_logps(
    hidden_SH: Tensor,
    table_VH: Tensor,
    targets_S: Tensor,
    vocab_size: int,
    temperature: float,
    group: dist.ProcessGroup,
) -> Tensor:
    """log softmax(hidden x table^T / temperature)[target] for each position, with gradients.

    The gradient to `hidden_SH` is this rank's part: the caller sums it over `group`.

    Args:
        hidden_SH: [S, H] hidden states, the same on every rank of `group`.
        table_VH: [V, H] this rank's rows of the output table, padded to equal sizes.
        targets_S: [S] int64 token ids, the same on every rank.
        vocab_size: rows of the whole table that are real; the others get no probability.
        temperature: logits are divided by it.
        group: tensor-parallel ranks in the order of their rows.

    Returns:
        [S] float32 natural-log probabilities, the same on every rank.
    """
    result: Tensor = _TokenLogps.apply(  # type: ignore[no-untyped-call]
        hidden_SH, table_VH, targets_S, vocab_size, temperature, group
    )
    return result


class _TokenLogps(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_SH: Tensor,
        table_VH: Tensor,
        targets_S: Tensor,
        vocab_size: int,
        temperature: float,
        group: dist.ProcessGroup,
    ) -> Tensor:
        num_rows = table_VH.shape[0]
        first_row = dist.get_rank(group) * num_rows
        ctx.num_real = min(max(vocab_size - first_row, 0), num_rows)
        ctx.temperature = temperature
        local_S = targets_S - first_row
        mine_S = (local_S >= 0) & (local_S < num_rows)
        local_S = local_S.clamp(0, num_rows - 1)
        maximum_S, sums_2S = _local_statistics(ctx, hidden_SH, table_VH, local_S, mine_S)

        # One maximum and one sum over the ranks for the whole microbatch, whatever the number of chunks.
        total_S = maximum_S.clone()
        dist.all_reduce(total_S, dist.ReduceOp.MAX, group=group)
        sums_2S[0] *= (maximum_S - total_S).exp()
        dist.all_reduce(sums_2S, group=group)
        log_normalizer_S = total_S + sums_2S[0].log()
        ctx.save_for_backward(hidden_SH, table_VH, local_S, mine_S, log_normalizer_S)
        return sums_2S[1] - log_normalizer_S

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad_S,) = grads
        hidden_SH, table_VH, local_S, mine_S, log_normalizer_S = ctx.saved_tensors
        grad_hidden_SH = torch.empty_like(hidden_SH)
        grad_table_VH = torch.zeros_like(table_VH, dtype=torch.float32)
        for rows in _chunks(hidden_SH, table_VH):
            logits = _logits(ctx, hidden_SH[rows], table_VH)
            grad_logits = logits.sub_(log_normalizer_S[rows, None]).exp_().neg_()
            grad_logits.scatter_add_(1, local_S[rows, None], mine_S[rows, None].to(grad_logits.dtype))
            grad_logits = grad_logits.mul_(grad_S[rows, None] / ctx.temperature).to(hidden_SH.dtype)
            grad_hidden_SH[rows] = grad_logits @ table_VH
            grad_table_VH += grad_logits.T @ hidden_SH[rows]
        return grad_hidden_SH, grad_table_VH.to(table_VH.dtype), None, None, None, None


def _local_statistics(
    ctx: Any, hidden_SH: Tensor, table_VH: Tensor, local_S: Tensor, mine_S: Tensor
) -> tuple[Tensor, Tensor]:
    """This rank's largest logit [S], and [2, S]: its sum of exp(logit - largest), its target logit (or 0)."""
    maximum_S = hidden_SH.new_empty(hidden_SH.shape[0], dtype=torch.float32)
    sums_2S = maximum_S.new_empty(2, hidden_SH.shape[0])
    for rows in _chunks(hidden_SH, table_VH):
        logits = _logits(ctx, hidden_SH[rows], table_VH)
        sums_2S[1, rows] = logits.gather(1, local_S[rows, None]).squeeze(1).masked_fill_(~mine_S[rows], 0)
        # A rank whose rows are all padding has no largest logit; any finite stand-in gives it a sum of 0.
        maximum_S[rows] = logits.amax(1).clamp_(min=torch.finfo(torch.float32).min)
        sums_2S[0, rows] = logits.sub_(maximum_S[rows, None]).exp_().sum(1)
    return maximum_S, sums_2S


def _chunks(hidden_SH: Tensor, table_VH: Tensor) -> list[slice]:
    size = max(1, CHUNK_ELEMENTS // table_VH.shape[0])
    return [slice(start, start + size) for start in range(0, hidden_SH.shape[0], size)]


def _logits(ctx: Any, hidden: Tensor, table_VH: Tensor) -> Tensor:
    logits = (hidden @ table_VH.T).float()
    if ctx.temperature != 1:
        logits = logits.div_(ctx.temperature)
    logits[:, ctx.num_real :] = -torch.inf
    return logits
