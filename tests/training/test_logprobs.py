"""The head against torch's log_softmax and autograd in float64, over chunk sizes, ranks, padding and temperatures."""

import itertools

import pytest
import torch
import torch.distributed as dist
from helpers.ranks import run_ranks
from torch import Tensor

from megavar.training import logprobs
from megavar.training.logprobs import token_logps, weighted_loss

LOGP_TOLERANCE = 1e-5
GRADIENT_TOLERANCE = 2e-6  # of the largest element
POSITIONS, HIDDEN = 37, 5  # a chunk has HIDDEN positions or more
VOCABULARIES = {"padded": 203, "one rank has padding only": 100, "no padding": 256}
ROWS = 256
CHUNKS = {"one": 2**24, "some": 10 * ROWS, "smallest": 1}
UPSTREAM = 0.37


def inputs(vocab_size: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Hidden [S, H], table [all rows, H], targets [S] and signed weights [S], one of them zero.

    The targets have the first and the last real row, and the rows at the border of two ranks.
    """
    random = torch.Generator().manual_seed(vocab_size)
    hidden = torch.randn(POSITIONS, HIDDEN, generator=random).to(dtype)
    table = torch.randn(ROWS, HIDDEN, generator=random).to(dtype)
    targets = torch.randint(0, vocab_size, (POSITIONS,), generator=random)
    targets[:4] = torch.tensor([0, vocab_size - 1, min(127, vocab_size - 1), min(128, vocab_size - 1)])
    weights = torch.randn(POSITIONS, generator=random)
    weights[5] = 0
    return hidden, table, targets, weights


def expected(vocab_size: int, temperature: float, dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
    """Log-probs, loss, and gradients of UPSTREAM x loss to hidden and table, by autograd in float64."""
    hidden, table, targets, weights = inputs(vocab_size, dtype)
    hidden, table = hidden.double().requires_grad_(), table.double().requires_grad_()
    logps = (hidden @ table[:vocab_size].T / temperature).log_softmax(-1).gather(1, targets[:, None]).squeeze(1)
    loss = -(weights.double() * logps).sum()
    (UPSTREAM * loss).backward()
    return logps.detach(), loss.detach(), hidden.grad, table.grad


def head(vocab_size: int, temperature: float, group: dist.ProcessGroup) -> tuple[Tensor, ...]:
    """The same by `weighted_loss`: the gradient to hidden summed over the ranks, that to the table gathered."""
    hidden, table, targets, weights = inputs(vocab_size)
    local = table.chunk(dist.get_world_size(group))[dist.get_rank(group)].clone().requires_grad_()
    hidden.requires_grad_()
    loss, logps = weighted_loss(hidden, local, targets, weights, vocab_size, temperature, group)
    assert not logps.requires_grad
    (UPSTREAM * loss).backward()
    dist.all_reduce(hidden.grad, group=group)
    parts = [torch.empty_like(local.grad) for _ in range(dist.get_world_size(group))]
    dist.all_gather(parts, local.grad, group=group)
    return logps, loss.detach(), hidden.grad, torch.cat(parts)


def compare_on_this_rank() -> None:
    dist.init_process_group("gloo")
    group = dist.group.WORLD
    cases = itertools.product(VOCABULARIES.items(), (1.0, 0.7), CHUNKS.items())
    for (name, vocab_size), temperature, (chunks, elements) in cases:
        case = (name, temperature, chunks)
        logprobs.CHUNK_ELEMENTS = logprobs.SCORED_ELEMENTS = elements
        logps, loss, *gradients = expected(vocab_size, temperature)
        found_logps, found_loss, *found_gradients = head(vocab_size, temperature, group)
        hidden, table, targets, _ = inputs(vocab_size)
        local = table.chunk(dist.get_world_size())[dist.get_rank()]
        scored = token_logps(hidden, local, targets, vocab_size, temperature, group)
        assert (found_logps - logps).abs().max() <= LOGP_TOLERANCE, case
        assert (scored - logps).abs().max() <= LOGP_TOLERANCE, case
        assert (found_loss - loss).abs() <= LOGP_TOLERANCE * logps.abs().sum(), case
        for gradient, found in zip(gradients, found_gradients, strict=True):
            assert (found - gradient).abs().max() <= GRADIENT_TOLERANCE * gradient.abs().max(), case
        assert not found_gradients[1][vocab_size:].any(), case
    dist.destroy_process_group()


@pytest.mark.parametrize("num_ranks", [1, 2])
def test_log_probs_loss_and_gradients_equal_autograd_in_float64(num_ranks):
    run_ranks(num_ranks, compare_on_this_rank)


@pytest.fixture
def alone(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    yield dist.group.WORLD
    dist.destroy_process_group()


def bf16_errors(gradients: list[Tensor], references: list[Tensor]) -> list[float]:
    return [
        float((found.double() - right).norm() / right.norm())
        for found, right in zip(gradients, references, strict=True)
    ]


@pytest.mark.parametrize("elements", CHUNKS.values(), ids=CHUNKS)
def test_gradients_in_bfloat16_are_nearly_as_precise_as_those_of_one_product(alone, monkeypatch, elements):
    """One product over all positions, rounded once, is what autograd has; each chunk's product is rounded once more."""
    monkeypatch.setattr(logprobs, "CHUNK_ELEMENTS", elements)
    monkeypatch.setattr(logprobs, "SCORED_ELEMENTS", min(elements, 100 * HIDDEN))
    _, _, *references = expected(203, 1.0, torch.bfloat16)
    errors = []
    for use_head in (True, False):
        hidden, table, targets, weights = inputs(203, torch.bfloat16)
        hidden.requires_grad_(), table.requires_grad_()
        if use_head:
            loss, _ = weighted_loss(hidden, table, targets, weights, 203, 1.0, alone)
        else:
            logps = (hidden @ table[:203].T).float().log_softmax(-1).gather(1, targets[:, None]).squeeze(1)
            loss = -(weights * logps).sum()
        (UPSTREAM * loss).backward()
        errors.append(bf16_errors([hidden.grad, table.grad], references))
    for found, one_product in zip(*errors, strict=True):
        assert found <= (1.02 if elements == CHUNKS["one"] else 1.1) * one_product


def test_no_positions_give_no_loss_and_no_gradient(alone):
    hidden, table, targets, weights = (tensor[:0] if len(tensor) == POSITIONS else tensor for tensor in inputs(203))
    hidden, table = hidden.requires_grad_(), table.requires_grad_()
    loss, logps = weighted_loss(hidden, table, targets, weights, 203, 1.0, alone)
    loss.backward()
    assert loss == 0 and len(logps) == 0 and not table.grad.any()


def test_what_has_no_gradient_says_so(alone):
    hidden, table, targets, weights = inputs(203)
    hidden.requires_grad_()
    assert not token_logps(hidden, table, targets, 203, 1.0, alone).requires_grad
    loss, _ = weighted_loss(hidden, table, targets, weights, 203, 1.0, alone)
    loss.backward(retain_graph=True)
    with pytest.raises(AssertionError, match="have been taken before"):
        loss.backward()
