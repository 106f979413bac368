"""Tiny random Qwen models and sequences that tests of the engine share."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import transformers
from transformers import (
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from megavar.records import TrainSequence

transformers.utils.logging.disable_progress_bar()

VOCAB = 203  # divides by no tensor-parallel size: padding rows are always there


def save_tiny_model(folder: Path, family: str, tied: bool, seed: int = 0, **changes: object) -> PreTrainedModel:
    """A 4-layer model with weights large enough, and norms uneven enough, for mistakes to show in its log-probs."""
    sizes = {
        "vocab_size": VOCAB,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 4,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "max_position_embeddings": 512,
        "tie_word_embeddings": tied,
        "rope_theta": 1_000_000.0,  # transformers 5 saves it in rope_parameters, 4 as it is
        **changes,
    }
    torch.manual_seed(seed)
    if family == "qwen3_moe":
        experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 40, "norm_topk_prob": True}
        model: PreTrainedModel = Qwen3MoeForCausalLM(Qwen3MoeConfig(**{"head_dim": 24, **experts, **sizes}))
    elif family == "qwen3":
        model = Qwen3ForCausalLM(Qwen3Config(**{"head_dim": 24, **sizes}))
    else:
        model = Qwen2ForCausalLM(Qwen2Config(**sizes))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape)
            if "norm" in name:
                parameter.copy_(1 + 0.3 * noise)
            else:
                parameter.copy_((0.3 if name.endswith("bias") else 0.08) * noise)
    model.float().save_pretrained(folder)
    return model.eval()


def random_sequences(count: int, seed: int = 3, longest: int = 40) -> list[TrainSequence]:
    """Sequences of uneven lengths with uneven weights, one of them zero."""
    random = np.random.default_rng(seed)
    sequences = []
    for index in range(count):
        prompt, target = random.integers(1, 9), random.integers(1, longest - 9)
        ids = random.integers(0, VOCAB, prompt + target).astype(np.int32)
        weight = 0.0 if index == 1 else float(random.uniform(0.1, 2.0))
        sequences.append(TrainSequence(ids[:prompt], ids[prompt:], weight))
    return sequences


@dataclass(frozen=True)
class Reference:
    """What transformers computes of sequences."""

    logps: list[torch.Tensor]
    """Of each sequence's targets."""
    loss: float
    gradients: dict[str, torch.Tensor]
    """Of the weighted loss."""


def reference_gradients(model: PreTrainedModel, sequences: list[TrainSequence], normalizer: float) -> Reference:
    """Log-probs, and the loss -sum(weight x log-prob) / normalizer with its gradients."""
    model.zero_grad()
    logps = [reference_logps(model, sequence) for sequence in sequences]
    weighted = [sequence.weight * found.sum() for sequence, found in zip(sequences, logps, strict=True)]
    loss = -torch.stack(weighted).sum() / normalizer
    loss.backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    return Reference([found.detach() for found in logps], loss.item(), gradients)


def reference_logps(model: PreTrainedModel, sequence: TrainSequence, temperature: float = 1.0) -> torch.Tensor:
    """transformers' log-probs of a sequence's targets, [target tokens], with gradients."""
    ids = torch.from_numpy(np.concatenate([sequence.prompt_ids, sequence.target_ids])).long()
    logits = model(input_ids=ids[None, :-1]).logits[0].float() / temperature
    logps = logits.log_softmax(-1).gather(1, ids[1:, None]).squeeze(1)
    return logps[len(sequence.prompt_ids) - 1 :]
