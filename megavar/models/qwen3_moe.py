"""Qwen3-MoE: Qwen3's attention and, in every layer, a router and experts."""

from megavar.models import qwen2, qwen3
from megavar.models.dims import ModelDims
from megavar.models.family import Family
from megavar.models.ops import Operator, Rename, StackGateUp

EXPERT = qwen2.LAYER + "mlp.experts.{expert}."
EXPERTS = qwen2.DECODER + "mlp.experts.experts."


def operators(dims: ModelDims) -> list[Operator]:
    """All parameters of the model."""
    return [*qwen2.outer(dims), *qwen2.attention(), *qwen3.qk_norms(), *_moe()]


def _moe() -> list[Operator]:
    """A layer's router and experts and their input norm, which in Megatron is a separate module for MoE layers."""
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
    is_moe=True,
    required={"attention_bias": False, "decoder_sparse_step": 1, "mlp_only_layers": []},
)
