"""The sizes of a model that operators and training engine need."""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Yarn:
    """RoPE scaling by YaRN: a model trained at one length, used at `factor` times that."""

    factor: float
    original_positions: int
    attention_factor: float
    """What rotated queries and keys are both multiplied by."""
    beta_fast: float
    beta_slow: float
    truncate: bool
    """Whether the ramp between kept and divided frequencies starts and ends at whole dimensions."""

    @property
    def positions(self) -> int:
        """The extended length: factor x original length."""
        return int(self.factor * self.original_positions)


@dataclass(frozen=True)
class ModelDims:
    """Sizes of a dense or MoE decoder: of the full model, not of one rank's shard."""

    family: str
    """`model_type` of config.json."""
    num_layers: int
    hidden_size: int
    num_heads: int
    num_query_groups: int
    head_dim: int
    ffn_size: int
    """Intermediate size of a dense MLP, or of each expert."""
    vocab_size: int
    """Rows of the embedding; can be more than the tokenizer has tokens."""
    tied_embeddings: bool
    rope_base: float
    yarn: Yarn | None
    """None: RoPE is not scaled."""
    norm_eps: float
    max_positions: int
    """`max_position_embeddings`, or the length that YaRN extends to where that is more."""
    qkv_bias: bool
    qk_norm: bool
    num_experts: int
    """0: dense."""
    experts_per_token: int
    normalise_routing: bool
    """`norm_topk_prob`: whether the probabilities of a token's experts are rescaled to sum to 1."""

    @property
    def query_size(self) -> int:
        """Output size of the query projection: num_heads x head_dim."""
        return self.num_heads * self.head_dim

    def training_flops(self, lengths: Sequence[int], num_targets: int) -> float:
        """FLOPs of one forward and backward pass over all ranks, without recomputation.

        Per weight and token: 2 FLOPs forward, 4 backward. Attention is causal within each sequence. The output layer
        runs at the target positions only.

        Args:
            lengths: tokens of each sequence.
            num_targets: target tokens of all sequences together.
        """
        kv_size = self.num_query_groups * self.head_dim
        mlp = (
            3 * self.hidden_size * self.ffn_size * max(1, self.experts_per_token) + self.hidden_size * self.num_experts
        )
        layer = self.hidden_size * (2 * self.query_size + 2 * kv_size) + mlp
        linear = 6.0 * self.num_layers * layer * sum(lengths)
        attention = 6.0 * self.num_layers * self.query_size * sum(length**2 for length in lengths)
        return linear + attention + 6.0 * self.hidden_size * self.vocab_size * num_targets

    def padded_vocab_size(self, tensor_parallel: int) -> int:
        """Rows of the embedding, padded to a multiple of the tensor-parallel size."""
        return -(-self.vocab_size // tensor_parallel) * tensor_parallel
