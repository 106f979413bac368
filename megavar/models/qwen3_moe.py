"""Qwen3 with a mixture of experts in every layer: Qwen3's attention, a router, and an MLP for each expert."""

from megavar.models import qwen2, qwen3
from megavar.models.dims import ModelDims
from megavar.models.family import Family
from megavar.models.ops import Operator, Rename, StackGateUp

EXPERT = qwen2.LAYER + "mlp.experts.{expert}."
EXPERTS = qwen2.DECODER + "mlp.experts.experts."


def operators(dims: ModelDims) -> list[Operator]:
    """All parameters of the model."""
    return [*qwen2.outer(dims), *qwen2.attention(), *qwen3.head_norms(), *_mixture()]


def _mixture() -> list[Operator]:
    """A layer's router and experts, and the norm before them, which Megatron keeps apart from what follows it."""
    layer, decoder = qwen2.LAYER, qwen2.DECODER
    return [
        Rename(layer + "post_attention_layernorm.weight", decoder + "pre_mlp_layernorm.weight", ("hidden_size",)),
        Rename(layer + "mlp.gate.weight", decoder + "mlp.router.weight", ("num_experts", "hidden_size")),
        StackGateUp(EXPERT + "gate_proj.weight", EXPERT + "up_proj.weight", EXPERTS + "linear_fc1.weight"),
        Rename(EXPERT + "down_proj.weight", EXPERTS + "linear_fc2.weight", ("hidden_size", "ffn_size")),
    ]


FAMILY = Family(
    operators,
    qk_norm=True,
    is_mixture=True,
    required={"attention_bias": False, "decoder_sparse_step": 1, "mlp_only_layers": []},
)
