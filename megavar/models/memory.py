"""The memory that training holds on a rank, counted from a model's sizes."""

from megavar.config.schema import ParallelConfig, TrainConfig
from megavar.models.dims import ModelDims

LOGITS_AT_ONCE = 2**24
"""Elements of a chunk: CHUNK_ELEMENTS of `training/logprobs.py`, a package above this one."""


def training_bytes(
    dims: ModelDims, num_parameters: int, parallel: ParallelConfig, train: TrainConfig, element_bytes: int, ranks: int
) -> dict[str, float]:
    """Bytes of the rank that holds most, by part; their sum is the peak, at the end of a forward pass.

    Not counted: the CUDA context, NCCL's and other libraries' buffers, what the allocator holds in reserve, and FP8
    copies of weights.

    Args:
        num_parameters: of the whole model.
        element_bytes: of a weight: 4 in float32, 2 in bf16 and FP8.
        ranks: of the run.
    """
    table = dims.vocab_size * dims.hidden_size
    tables = 1 if dims.tied_embeddings else 2
    experts = 3 * dims.hidden_size * dims.ffn_size * dims.num_experts * dims.num_layers
    dense = num_parameters - tables * table - experts
    held = dense / (parallel.tensor * parallel.pipeline) + experts / (parallel.expert * parallel.pipeline)
    held += table / parallel.tensor * (tables if parallel.pipeline == 1 else 1)
    states = 8 if element_bytes == 4 else 12  # two moments, and the float32 copy of shorter weights
    states -= 4 if train.optimizer_moments == "bf16" else 0
    optimizer = held * states * (1 - train.optimizer_offload)
    optimizer /= ranks // parallel.ranks_per_replica if train.distributed_optimizer else 1
    # The float32 gradient of the output table, a chunk of float32 logits, and it and its gradient in bf16.
    rows, tokens = table // dims.hidden_size // parallel.tensor, train.microbatch_tokens // parallel.context
    chunk = min(max(LOGITS_AT_ONCE, rows * dims.hidden_size), rows * tokens)
    return {
        "weights": held * element_bytes,
        "gradients": held * 4,
        "optimizer": optimizer,
        "activations": _activation_bytes(dims, parallel, train, element_bytes),
        "logits": 4 * rows * dims.hidden_size + chunk * (4 if element_bytes == 4 else 8),
    }


def layer_elements(dims: ModelDims, parallel: ParallelConfig) -> float:
    """Elements a token that a layer keeps for its backward pass, on a tensor-parallel rank.

    Inputs and outputs of the norms; queries and keys before and after their norms (the latter rotated), values and the
    attention's output; both halves of the MLP's inner activation, and their product.
    """
    kv_size = dims.num_query_groups * dims.head_dim
    attention = 2 * dims.query_size + 2 * kv_size
    attention += dims.query_size + kv_size if dims.qk_norm else 0
    mlp = 3.0 * dims.ffn_size / parallel.tensor
    between = parallel.tensor if parallel.sequence_parallel else 1
    if dims.num_experts:  # each of a token's experts has a copy of its input
        mlp = dims.experts_per_token * (dims.hidden_size + 3.0 * dims.ffn_size) / between
    return 4.0 * dims.hidden_size / between + attention / parallel.tensor + mlp


def _activation_bytes(dims: ModelDims, parallel: ParallelConfig, train: TrainConfig, element_bytes: int) -> float:
    """Of all microbatches that the first pipeline rank holds at once."""
    between = parallel.tensor if parallel.sequence_parallel else 1
    layers, layer = dims.num_layers / parallel.pipeline, layer_elements(dims, parallel)
    kept = layers * layer
    if train.recompute == "full":  # the layers' inputs, and one layer at a time
        kept = layers * dims.hidden_size / between + layer
    microbatches: float = parallel.pipeline
    if parallel.virtual_pipeline > 1:
        microbatches += (parallel.pipeline - 1) / parallel.virtual_pipeline
    # Embedding, final norm, and the hidden states of the targets with their gradients.
    around = 5 * dims.hidden_size if parallel.pipeline == 1 else dims.hidden_size / between
    return element_bytes * train.microbatch_tokens / parallel.context * (kept * microbatches + around)
