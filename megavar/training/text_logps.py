"""Log-probs of a text under a model: transformers runs a Hugging Face folder, Megatron a checkpoint."""

import numpy as np
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from megavar.checkpoints.convert import Model
from megavar.config.schema import ParallelConfig, PrecisionConfig
from megavar.records import TrainSequence
from megavar.sequences import in_memory
from megavar.training import parallel
from megavar.training.scorer import Scorer


def text_logps(model: Model, text: str) -> Tensor:
    """[tokens - 1] float32 natural-log probabilities of the text's tokens after the first, in float32 arithmetic.

    Raises:
        ValueError: if the text is shorter than two tokens or longer than the model's positions.
    """
    tokenizer = AutoTokenizer.from_pretrained(model.side_files, local_files_only=True, trust_remote_code=False)
    ids = tokenizer(text)["input_ids"]
    if not 2 <= len(ids) <= model.dims.max_positions:
        raise ValueError(f"the text has {len(ids)} tokens; give 2 to {model.dims.max_positions}.")
    if not model.is_megatron:
        return _by_transformers(model, ids)
    parallel.start_alone()
    scorer = Scorer(model, ParallelConfig(), PrecisionConfig(recipe="fp32"))
    sequence = TrainSequence(np.array(ids[:1], np.int32), np.array(ids[1:], np.int32), 1.0)
    logps_of = scorer.score(in_memory([sequence]), [0], 1.0, len(ids))
    parallel.stop()
    return torch.from_numpy(logps_of[0])


def _by_transformers(model: Model, ids: list[int]) -> Tensor:
    config = AutoConfig.from_pretrained(model.path, local_files_only=True, trust_remote_code=False)
    # transformers 4 reads RoPE here only, and takes base 10000 and no scaling from a folder that 5 has written.
    config.rope_theta = model.dims.rope_base
    if config.rope_scaling is None:
        config.rope_scaling = getattr(config, "rope_parameters", None)
    network = AutoModelForCausalLM.from_pretrained(
        model.path, config=config, dtype=torch.float32, local_files_only=True
    ).eval()
    tokens = torch.tensor(ids)
    with torch.no_grad():
        logps = network(input_ids=tokens[None, :-1]).logits[0].log_softmax(-1)
    chosen: Tensor = logps.gather(1, tokens[1:, None]).squeeze(1)
    return chosen
