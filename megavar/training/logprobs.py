"""Log-probs of chosen tokens from hidden states and a vocabulary-parallel output table, in chunks.

Only the positions that are scored or trained get logits, and these exist for a chunk of the vocabulary at a time, in
the forward and once more in the backward pass: no [positions, vocabulary] tensor ever does. Each row of the table is
read once a pass. Rows that pad the vocabulary are left out of the product.
Shape suffixes: S positions, H hidden size, V vocabulary rows of this tensor-parallel rank, C rows of a chunk.
"""

from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

CHUNK_ELEMENTS = 2**24
"""Logits held at once: 64 MiB in float32."""


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
        vocab_size: rows of the full table that are real; the others get no probability.
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
        first_row = dist.get_rank(group) * table_VH.shape[0]
        ctx.num_real = min(max(vocab_size - first_row, 0), table_VH.shape[0])
        ctx.temperature = temperature
        local_S = targets_S - first_row
        maximum_S, sums_2S = _local_statistics(ctx, hidden_SH, table_VH, local_S)

        # One maximum and one sum over the ranks for the microbatch, whatever the number of chunks.
        total_S = maximum_S.clone()
        dist.all_reduce(total_S, dist.ReduceOp.MAX, group=group)
        sums_2S[0] *= (maximum_S - total_S).exp()
        dist.all_reduce(sums_2S, group=group)
        log_normalizer_S = total_S + sums_2S[0].log()
        ctx.save_for_backward(hidden_SH, table_VH, local_S, log_normalizer_S)
        return sums_2S[1] - log_normalizer_S

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad_S,) = grads
        hidden_SH, table_VH, local_S, log_normalizer_S = ctx.saved_tensors
        scale_S1 = (grad_S / ctx.temperature)[:, None]
        grad_hidden_SH = torch.zeros_like(hidden_SH, dtype=torch.float32)
        grad_table_VH = torch.zeros_like(table_VH)
        for rows, logits_SC, columns_S1, here_S1 in _chunks(ctx, hidden_SH, table_VH, local_S):
            grad_logits_SC = logits_SC.sub_(log_normalizer_S[:, None]).exp_().neg_()
            grad_logits_SC.scatter_add_(1, columns_S1, here_S1.to(grad_logits_SC.dtype))
            grad_logits_SC = grad_logits_SC.mul_(scale_S1).to(hidden_SH.dtype)
            grad_hidden_SH += grad_logits_SC @ table_VH[rows]
            torch.mm(grad_logits_SC.T, hidden_SH, out=grad_table_VH[rows])
        return grad_hidden_SH.to(hidden_SH.dtype), grad_table_VH, None, None, None, None


def _local_statistics(ctx: Any, hidden_SH: Tensor, table_VH: Tensor, local_S: Tensor) -> tuple[Tensor, Tensor]:
    """This rank's largest logit [S], and [2, S]: its sum of exp(logit - largest), its target logit (or 0).

    A rank whose rows are all padding has -inf as its largest logit, and sums of 0.
    """
    maximum_S = hidden_SH.new_full((hidden_SH.shape[0],), -torch.inf, dtype=torch.float32)
    sums_2S = maximum_S.new_zeros(2, hidden_SH.shape[0])
    for _, logits_SC, columns_S1, here_S1 in _chunks(ctx, hidden_SH, table_VH, local_S):
        sums_2S[1] += logits_SC.gather(1, columns_S1).masked_fill_(~here_S1, 0).squeeze(1)
        larger_S = torch.maximum(maximum_S, logits_SC.amax(1))
        sums_2S[0] *= (maximum_S - larger_S).exp()
        sums_2S[0] += logits_SC.sub_(larger_S[:, None]).exp_().sum(1)
        maximum_S = larger_S
    return maximum_S, sums_2S


def _chunks(
    ctx: Any, hidden_SH: Tensor, table_VH: Tensor, local_S: Tensor
) -> Iterator[tuple[slice, Tensor, Tensor, Tensor]]:
    """For each chunk of real rows: the rows, logits [S, C] float32, the target's column [S, 1] and if it is in them."""
    size = max(1, CHUNK_ELEMENTS // max(1, hidden_SH.shape[0]))
    for start in range(0, ctx.num_real, size):
        rows = slice(start, min(start + size, ctx.num_real))
        logits_SC = (hidden_SH @ table_VH[rows].T).float()
        if ctx.temperature != 1:
            logits_SC = logits_SC.div_(ctx.temperature)
        columns_S1 = (local_S - start)[:, None]
        here_S1 = (columns_S1 >= 0) & (columns_S1 < rows.stop - start)
        yield rows, logits_SC, columns_S1.clamp(0, rows.stop - start - 1), here_S1
