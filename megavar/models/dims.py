"""The sizes of a model: what the operators and the engine need to know of it."""

from dataclasses import dataclass


@dataclass(frozen=True)
class ModelDims:
    """Sizes of a dense or mixture decoder; counts are of the whole model, not of a rank."""

    family: str
    num_layers: int
    hidden_size: int
    num_heads: int
    num_query_groups: int
    head_dim: int
    ffn_size: int
    """Of a dense MLP, or of each expert."""
    vocab_size: int
    """Rows of the embedding, which are more than the tokenizer's entries."""
    tied_embeddings: bool
    rope_base: float
    norm_eps: float
    max_positions: int
    qkv_bias: bool
    qk_norm: bool
    num_experts: int
    """0: dense."""
    experts_per_token: int
    normalise_routing: bool
    """Whether the chosen experts' probabilities sum to one."""

    @property
    def query_size(self) -> int:
        """Rows of the query projection."""
        return self.num_heads * self.head_dim

    def padded_vocab_size(self, tensor_parallel: int) -> int:
        """Embedding rows after padding to a multiple of the tensor-parallel size."""
        return -(-self.vocab_size // tensor_parallel) * tensor_parallel
