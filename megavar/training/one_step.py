"""One training step of a few sequences, whose gradients are formed twice, in microbatches of different sizes."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megavar.checkpoints.convert import Model
from megavar.config.schema import ParallelConfig, PrecisionConfig, TrainConfig
from megavar.records import LogProbs
from megavar.sequences import SequenceSet
from megavar.training.checkpoint import save_checkpoint
from megavar.training.forward_backward import gradient_pass, pack_shape
from megavar.training.hardware import release_memory
from megavar.training.loop import clear_gradients, open_training, own_microbatches
from megavar.training.optimizer import gather_parameters
from megavar.training.scorer import Scorer
from megavar.training.tensor_overlap import tensor_overlap


@dataclass(frozen=True)
class Gradients:
    """Of one way to pack the sequences, the same on every rank."""

    loss: float
    norm: float


def take_one_step(
    init: Model,
    sequences: SequenceSet,
    budgets: Sequence[int],
    train: TrainConfig,
    parallel: ParallelConfig,
    precision: PrecisionConfig,
    scored_in: PrecisionConfig,
    folder: Path,
) -> tuple[list[Gradients], list[LogProbs] | None]:
    """Form the gradients of all sequences once for each budget, take one step and save it to `folder`.

    Every rank calls it.

    Args:
        budgets: tokens of a microbatch, at most `train.microbatch_tokens`; those of scoring come first.
        precision: of the step.
        scored_in: fp32 or bf16, like the parameters.

    Returns:
        The gradients, and [target tokens] log-probs of each sequence after the step, on rank 0.
    """
    hidden_size, normalizer, found = init.dims.hidden_size, float(sequences.num_targets.sum()), []
    with tensor_overlap(hidden_size, parallel, precision, train):
        chunks, optimizer, scheduler = open_training(init, train, parallel, precision, 1, None)
        shape = pack_shape(parallel, precision, train.fixed_tokens)
        for budget in budgets:
            clear_gradients(chunks, optimizer)
            microbatches, _ = own_microbatches(sequences, range(len(sequences)), budget, parallel, shape)
            loss = gradient_pass(chunks, microbatches, normalizer).loss
            optimizer.prepare_grads()
            found.append(Gradients(loss, float(optimizer.get_grad_norm())))
        optimizer.step()
    gather_parameters(chunks)
    save_checkpoint(folder, 1, chunks, optimizer, scheduler, 1, init)
    for chunk in chunks:
        chunk.config.fp8 = None  # type: ignore[union-attr]
    with tensor_overlap(hidden_size, parallel, scored_in, train):
        scorer = Scorer(init, parallel, scored_in, chunks, train.fixed_tokens)
        after = scorer.score_all(sequences, 1.0, budgets[0])
        scorer.release()
    del chunks, optimizer, scheduler
    release_memory()
    return found, after
