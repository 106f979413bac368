"""Benchmarks a training step against transformers on padded batches and a plain Megatron-Core loop.

    python tools/bench_train.py [--model FOLDER]

All three take the same sequences through gradients, clipping and AdamW in float32. transformers gets them padded, in
order of length. The Megatron loop has the same model and packed microbatches, and its own loss: vocabulary-parallel
cross entropy of full logits, its mean over the trained tokens, without weights. The sides take turns in one process.
Ratios are of the median times, megavar / that side; processor time is that of all threads.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from megavar.checkpoints.convert import Model
from megavar.config.schema import ParallelConfig, PrecisionConfig, TrainConfig
from megavar.models.dims import ModelDims
from megavar.packing import Microbatch, PackShape, pack, partition
from megavar.records import TrainSequence
from megavar.training import forward_backward, parallel
from megavar.training.forward_backward import configure_gradients, gradient_pass
from megavar.training.load_weights import load_weights
from megavar.training.model import LogProbModel, Targets, build_model, transformer_config
from megavar.training.optimizer import build_optimizer, wrap_for_gradients

# isort: split

from megatron.core.tensor_parallel import vocab_parallel_cross_entropy
from megatron.core.utils import unwrap_model

BASE = Path(__file__).parents[1] / "examples" / "base" / "qwen3-tiny"
TRAIN = TrainConfig(num_steps=10_000, learning_rate=1e-5)
PARALLEL, PRECISION = ParallelConfig(), PrecisionConfig(recipe="fp32")
Step = Callable[[], float]
"""Takes one optimizer step and returns the loss."""


class PlainModel(LogProbModel):
    """The same model, with Megatron's logits and cross entropy of all tokens."""

    def _postprocess(self, hidden_states: Tensor, labels: Targets, **_: Any) -> Tensor:
        table = self.shared_embedding_or_output_weight() if self.share_embeddings_and_output_weights else None
        logits, _ = self.output_layer(hidden_states, weight=table)
        ids = labels.ids.new_zeros(len(hidden_states))
        ids[labels.positions] = labels.ids
        losses: Tensor = vocab_parallel_cross_entropy(logits.float(), ids[:, None])
        return losses.squeeze(1)[labels.positions]


def make_sequences(count: int, vocab_size: int) -> list[TrainSequence]:
    """Sequences of 40 to 140 tokens, a third of them prompt, all of weight 1."""
    random = np.random.default_rng(0)
    ids = [random.integers(0, vocab_size, length).astype(np.int32) for length in random.integers(40, 141, count)]
    return [TrainSequence(row[: len(row) // 3], row[len(row) // 3 :], 1.0) for row in ids]


def megatron_step(
    dims: ModelDims,
    fill: Callable[[list[torch.nn.Module]], None],
    microbatches: list[Microbatch],
    precision: PrecisionConfig,
    is_plain: bool,
    train: TrainConfig = TRAIN,
    changes: dict[str, Any] | None = None,
) -> Step:
    """A step of the training loop, or of the plain one, which differs in the head and the loss alone.

    Args:
        fill: gives the model its weights.
        changes: values of Megatron's TransformerConfig that are other than the engine's.
    """
    config = transformer_config(dims, PARALLEL, precision, train.recompute, train.fixed_tokens)
    for name, value in (changes or {}).items():
        setattr(config, name, value)
    configure_gradients(config)
    chunks = build_model(config, dims)
    fill(chunks)
    if is_plain:
        plain = unwrap_model(chunks[0])
        plain.__class__ = PlainModel
        del plain.output_layer.forward  # back to Megatron's
    chunks = wrap_for_gradients(config, chunks, train)
    optimizer, scheduler = build_optimizer(chunks, train, config.bf16, 10_000)
    optimizer.reload_model_params()
    scheduler.step(1)
    num_targets = float(sum(len(microbatch.targets) for microbatch in microbatches))

    def plain_pass() -> float:
        def targets_of(microbatch: Microbatch) -> Targets:
            return Targets(*forward_backward._targets(microbatch), 1.0)

        def mean(losses: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
            loss = losses.sum() / num_targets
            return loss, torch.ones((), dtype=torch.int, device=loss.device), {"loss": loss.detach()}

        results = forward_backward._run(chunks, microbatches, targets_of, mean, forward_only=False)
        return float(sum(result["loss"] for result in results))

    def step() -> float:
        for chunk in chunks:
            chunk.zero_grad_buffer()  # type: ignore[operator]
        optimizer.zero_grad()
        loss = plain_pass() if is_plain else gradient_pass(chunks, microbatches, num_targets).loss
        optimizer.step()
        scheduler.step(1)
        return loss

    return step


def transformers_step(folder: Path, sequences: list[TrainSequence], budget_tokens: int) -> Step:
    """A step of transformers and torch's AdamW, on padded batches of at most as many tokens as a microbatch."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    optimizer = torch.optim.AdamW(model.parameters(), lr=TRAIN.learning_rate, weight_decay=TRAIN.weight_decay)
    num_targets = sum(len(sequence.target_ids) for sequence in sequences)
    batches: list[list[TrainSequence]] = [[]]
    for sequence in sorted(sequences, key=lambda sequence: sequence.num_tokens):
        if (len(batches[-1]) + 1) * sequence.num_tokens > budget_tokens:
            batches.append([])
        batches[-1].append(sequence)

    def padded(batch: list[TrainSequence]) -> tuple[Tensor, Tensor, Tensor]:
        shape = len(batch), max(sequence.num_tokens for sequence in batch)
        ids, labels, mask = torch.zeros(shape).long(), torch.full(shape, -100), torch.zeros(shape).long()
        for row, sequence in enumerate(batch):
            tokens = torch.from_numpy(np.concatenate([sequence.prompt_ids, sequence.target_ids])).long()
            ids[row, : len(tokens)], mask[row, : len(tokens)] = tokens, 1
            labels[row, len(sequence.prompt_ids) : len(tokens)] = tokens[len(sequence.prompt_ids) :]
        return ids, labels, mask

    def step() -> float:
        optimizer.zero_grad()
        total = 0.0
        for ids, labels, mask in map(padded, batches):
            logits = model(input_ids=ids, attention_mask=mask).logits[:, :-1]
            loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten(), reduction="sum")
            (loss / num_targets).backward()
            total += loss.item() / num_targets
        torch.nn.utils.clip_grad_norm_(model.parameters(), TRAIN.clip_grad)
        optimizer.step()
        return total

    return step


def main() -> None:
    """Time the sides in turn; print seconds, ratios and the largest difference of a first loss."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=BASE, help="Hugging Face folder")
    parser.add_argument("--sequences", type=int, default=64, help="number of sequences of a step")
    parser.add_argument("--microbatch-tokens", type=int, default=4096)
    parser.add_argument("--steps", type=int, default=10, help="timed steps of each side")
    chosen = parser.parse_args()
    parallel.start_alone()
    model = Model(chosen.model)
    sequences = make_sequences(chosen.sequences, model.dims.vocab_size)
    plan = partition([sequence.num_tokens for sequence in sequences], chosen.microbatch_tokens, 1)[0]
    microbatches = [pack(sequences, indices, PackShape()) for indices in plan]

    def fill(chunks: list[torch.nn.Module]) -> None:
        load_weights(chunks, model)

    sides = {
        "megavar": megatron_step(model.dims, fill, microbatches, PRECISION, is_plain=False),
        "megatron": megatron_step(model.dims, fill, microbatches, PRECISION, is_plain=True),
        "transformers": transformers_step(chosen.model, sequences, chosen.microbatch_tokens),
    }
    first = {side: step() for side, step in sides.items()}
    wall, processor = ({side: list[float]() for side in sides} for _ in range(2))
    for _ in range(chosen.steps):
        for side, step in sides.items():
            started, used = time.perf_counter(), time.process_time()
            step()
            wall[side].append(time.perf_counter() - started)
            processor[side].append(time.process_time() - used)
    parallel.stop()
    for side in sides:
        times = [statistics.median(values[side]) for values in (wall, processor)]
        ratios = [statistics.median(v["megavar"]) / statistics.median(v[side]) for v in (wall, processor)]
        print(
            f"{side:13s} {times[0]:8.3f} s a step, {times[1]:8.3f} s of processor time   "
            f"ratio {ratios[0]:.2f}, of processor time {ratios[1]:.2f}"
        )
    print(f"largest difference of a first loss {max(first.values()) - min(first.values()):.1e}")


if __name__ == "__main__":
    main()
