"""Log-probs of chosen tokens, and their weighted loss, from hidden states and a vocabulary-parallel output table.

Only the positions that are scored or trained get logits, and no tensor of [positions, vocabulary] exists but in chunks.
Scoring takes chunks of the vocabulary: each row of the table is read once. Training takes chunks of positions, whose
logits are complete, so that the gradient is made from them at once: three matrix products (logits, gradient of hidden,
gradient of the table) where a backward pass that forms the logits again has four. That needs each position's gradient
in the forward pass: the function is that of the loss, whose weights are known, and not of the log-probs.
Rows that pad the vocabulary are left out of the products.
Shape suffixes: S positions, P positions of a chunk, H hidden size, V vocabulary rows of this tensor-parallel rank, R
those of them that are real, C rows of a chunk.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

SCORED_ELEMENTS = 2**26 if torch.cuda.is_available() else 2**22
"""Logits held at once in scoring: 16 MiB in float32, which a CPU's caches hold; 256 MiB on GPUs, where products of few
rows leave most of the device idle."""
CHUNK_ELEMENTS = 2**24
"""Logits held at once in training, 64 MiB in float32, or H positions' if these are more: as many as the gradient of the
table has elements. Each chunk reads and writes that gradient, which takes longer than the products if P is small."""


@torch.no_grad()
def token_logps(
    hidden_SH: Tensor,
    table_VH: Tensor,
    targets_S: Tensor,
    vocab_size: int,
    temperature: float,
    group: dist.ProcessGroup,
) -> Tensor:
    """log softmax(hidden x table^T / temperature)[target] for each position, without gradients.

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
    first_row, num_real = _rows(table_VH, vocab_size, group)
    maximum_S, sums_2S = _local_statistics(hidden_SH, table_VH[:num_real], targets_S - first_row, temperature)

    # One maximum and one sum over the ranks for the microbatch, whatever the number of chunks.
    total_S = maximum_S.clone()
    dist.all_reduce(total_S, dist.ReduceOp.MAX, group=group)
    sums_2S[0] *= (maximum_S - total_S).exp()
    dist.all_reduce(sums_2S, group=group)
    return sums_2S[1] - total_S - sums_2S[0].log()


def weighted_loss(
    hidden_SH: Tensor,
    table_VH: Tensor,
    targets_S: Tensor,
    weights_S: Tensor,
    vocab_size: int,
    temperature: float,
    group: dist.ProcessGroup,
) -> tuple[Tensor, Tensor]:
    """sum over positions of weight x -log-prob (`token_logps`), with gradients, which can be asked for once.

    The gradient to `hidden_SH` is this rank's part: the caller sums it over `group`.

    Args:
        weights_S: [S] float32, the same on every rank; they are constants. The other arguments are those of
            `token_logps`.

    Returns:
        The loss, a float32 scalar, and [S] float32 log-probs without gradients; the same on every rank.
    """
    result: tuple[Tensor, Tensor] = _WeightedLoss.apply(  # type: ignore[no-untyped-call]
        hidden_SH, table_VH, targets_S, weights_S, vocab_size, temperature, group
    )
    return result


class _WeightedLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_SH: Tensor,
        table_VH: Tensor,
        targets_S: Tensor,
        weights_S: Tensor,
        vocab_size: int,
        temperature: float,
        group: dist.ProcessGroup,
    ) -> tuple[Tensor, Tensor]:
        first_row, num_real = _rows(table_VH, vocab_size, group)
        # A rank that has no real row takes part with one that gets no probability.
        table_RH = table_VH[: max(1, num_real)]
        local_S1 = (targets_S - first_row)[:, None]
        here_S1 = (local_S1 >= 0) & (local_S1 < num_real)
        columns_S1 = local_S1.clamp(0, len(table_RH) - 1)
        logps_S = torch.empty_like(weights_S)
        grad_hidden_SH = torch.empty_like(hidden_SH)
        grad_table_VH = torch.zeros_like(table_VH, dtype=torch.float32)
        # By the padded rows, of which all ranks have the same number: so all have the same chunks.
        size = max(CHUNK_ELEMENTS // len(table_VH), hidden_SH.shape[1])
        buffer = hidden_SH.new_empty(min(size, len(hidden_SH)) * len(table_RH))
        for chunk in (slice(start, start + size) for start in range(0, len(hidden_SH), size)):
            logits_PR = _logits(hidden_SH[chunk], table_RH, temperature, buffer)
            if not num_real:
                logits_PR.fill_(-torch.inf)
            maximum_P = logits_PR.amax(1)
            dist.all_reduce(maximum_P, dist.ReduceOp.MAX, group=group)
            here_P1, columns_P1 = here_S1[chunk], columns_S1[chunk]
            target_P = logits_PR.gather(1, columns_P1).masked_fill_(~here_P1, 0).squeeze(1)
            exp_PR = logits_PR.sub_(maximum_P[:, None]).exp_()
            sums_2P = torch.stack([exp_PR.sum(1), target_P])
            dist.all_reduce(sums_2P, group=group)
            logps_S[chunk] = sums_2P[1] - maximum_P - sums_2P[0].log()

            # d loss / d logit = weight x (probability - [is the target]) / temperature
            scale_P = weights_S[chunk] / temperature
            grad_PR = exp_PR.mul_((scale_P / sums_2P[0])[:, None])
            grad_PR.scatter_add_(1, columns_P1, -scale_P[:, None] * here_P1)
            grad_PR = grad_PR.to(hidden_SH.dtype)
            torch.mm(grad_PR, table_RH, out=grad_hidden_SH[chunk])
            _add_product(grad_table_VH, grad_PR, hidden_SH[chunk])
            del logits_PR, exp_PR, grad_PR  # before the next chunk's are made
        ctx.gradients = grad_hidden_SH, grad_table_VH.to(table_VH.dtype)
        ctx.mark_non_differentiable(logps_S)
        return -(weights_S * logps_S).sum(), logps_S

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        assert ctx.gradients is not None, "the gradients of this loss have been taken before"
        # Kept nowhere else: so a parameter takes its gradient over without a copy.
        (grad_hidden_SH, grad_table_VH), ctx.gradients = ctx.gradients, None
        if grads[0] != 1:
            grad_hidden_SH *= grads[0]
            grad_table_VH *= grads[0]
        return grad_hidden_SH, grad_table_VH, None, None, None, None, None


def _rows(table_VH: Tensor, vocab_size: int, group: dist.ProcessGroup) -> tuple[int, int]:
    """This rank's first row of the full table, and how many of its rows are real."""
    first_row = dist.get_rank(group) * len(table_VH)
    return first_row, min(max(vocab_size - first_row, 0), len(table_VH))


def _logits(hidden_SH: Tensor, table_CH: Tensor, temperature: float, buffer: Tensor) -> Tensor:
    """[S, C] float32 logits: in `buffer`, which holds as many elements or more, if it is float32."""
    shape = len(hidden_SH), len(table_CH)
    logits_SC = torch.mm(hidden_SH, table_CH.T, out=buffer[: shape[0] * shape[1]].view(shape)).float()
    return logits_SC if temperature == 1 else logits_SC.div_(temperature)


def _add_product(total_VH: Tensor, grad_PR: Tensor, hidden_PH: Tensor) -> None:
    """total[:R] += grad^T x hidden, added up in float32 whatever the type of the product."""
    if grad_PR.dtype == total_VH.dtype:
        total_VH[: grad_PR.shape[1]].addmm_(grad_PR.T, hidden_PH)
        return
    size = max(1, SCORED_ELEMENTS // hidden_PH.shape[1])
    for part_VH, part_PC in zip(total_VH.split(size), grad_PR.split(size, dim=1), strict=False):
        part_VH[: part_PC.shape[1]] += part_PC.T @ hidden_PH


def _local_statistics(
    hidden_SH: Tensor, table_RH: Tensor, local_S: Tensor, temperature: float
) -> tuple[Tensor, Tensor]:
    """This rank's largest logit [S], and [2, S]: its sum of exp(logit - largest), its target logit (or 0).

    A rank whose rows are all padding has -inf as its largest logit, and sums of 0.
    """
    maximum_S = hidden_SH.new_full((len(hidden_SH),), -torch.inf, dtype=torch.float32)
    sums_2S = maximum_S.new_zeros(2, len(hidden_SH))
    size = max(1, SCORED_ELEMENTS // max(1, len(hidden_SH)))
    buffer = hidden_SH.new_empty(len(hidden_SH) * min(size, len(table_RH)))
    for start in range(0, len(table_RH), size):
        logits_SC = _logits(hidden_SH, table_RH[start : start + size], temperature, buffer)
        columns_S1 = (local_S - start)[:, None]
        here_S1 = (columns_S1 >= 0) & (columns_S1 < logits_SC.shape[1])
        columns_S1 = columns_S1.clamp(0, logits_SC.shape[1] - 1)
        sums_2S[1] += logits_SC.gather(1, columns_S1).masked_fill_(~here_S1, 0).squeeze(1)
        larger_S = torch.maximum(maximum_S, logits_SC.amax(1))
        sums_2S[0] *= (maximum_S - larger_S).exp()
        sums_2S[0] += logits_SC.sub_(larger_S[:, None]).exp_().sum(1)
        maximum_S = larger_S
    return maximum_S, sums_2S
