"""Log-probs of a text under a model: transformers runs a Hugging Face folder, Megatron a checkpoint."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from megavar.checkpoints.convert import Model
from megavar.config.schema import ParallelConfig, PrecisionConfig
from megavar.records import LogProbs, TrainSequence
from megavar.sequences import in_memory
from megavar.training import parallel
from megavar.training.megatron_on_cpu import device
from megavar.training.scorer import Scorer

_POSITIONS = 1024
"""Whose logits are formed at once."""


def text_logps(model: Model, text: str) -> Tensor:
    """[tokens - 1] float32 natural-log probabilities of the text's tokens after the first, in float32 arithmetic.

    Raises:
        ValueError: if the text is shorter than two tokens or longer than the model's positions.
    """
    tokenizer = AutoTokenizer.from_pretrained(model.side_files, local_files_only=True, trust_remote_code=False)
    ids = tokenizer(text)["input_ids"]
    if not 2 <= len(ids) <= model.dims.max_positions:
        raise ValueError(f"the text has {len(ids)} tokens; give 2 to {model.dims.max_positions}.")
    sequence = TrainSequence(np.array(ids[:1], np.int32), np.array(ids[1:], np.int32), 1.0)
    if not model.is_megatron:
        return torch.from_numpy(transformers_logps(model, [sequence], 1.0)[0])
    parallel.start_alone()
    scorer = Scorer(model, ParallelConfig(), PrecisionConfig(recipe="fp32"))
    logps_of = scorer.score(in_memory([sequence]), [0], 1.0, len(ids))
    parallel.stop()
    return torch.from_numpy(logps_of[0])


def transformers_logps(model: Model, sequences: Sequence[TrainSequence], temperature: float) -> list[LogProbs]:
    """[target tokens] log-probs of each sequence under a Hugging Face folder, by transformers in float32."""
    network = _by_transformers(model).to(device())
    head, found = network.get_output_embeddings(), []
    with torch.no_grad():
        for sequence in sequences:
            ids = np.concatenate([sequence.prompt_ids, sequence.target_ids]).astype(np.int64)
            tokens = torch.from_numpy(ids).to(device())
            hidden = network.get_decoder()(input_ids=tokens[None, :-1]).last_hidden_state[0]
            first = len(sequence.prompt_ids) - 1
            parts = [
                (head(some) / temperature).log_softmax(-1).gather(1, chosen[:, None]).squeeze(1)
                for some, chosen in zip(
                    hidden[first:].split(_POSITIONS), tokens[first + 1 :].split(_POSITIONS), strict=True
                )
            ]
            found.append(torch.cat(parts).cpu().numpy())
    return found


def _by_transformers(model: Model) -> Any:
    config = AutoConfig.from_pretrained(model.path, local_files_only=True, trust_remote_code=False)
    # transformers 4 reads RoPE here only, and takes base 10000 and no scaling from a folder that 5 has written.
    config.rope_theta = model.dims.rope_base
    if config.rope_scaling is None:
        config.rope_scaling = getattr(config, "rope_parameters", None)
    return AutoModelForCausalLM.from_pretrained(
        model.path, config=config, dtype=torch.float32, local_files_only=True
    ).eval()
