"""Qwen2 and Qwen2.5, dense: biases on query, key and value."""

from megavar.models.dims import ModelDims
from megavar.models.ops import InterleaveQkv, Operator, Replicate, SplitColumns, StackGateUp, Vocabulary

LAYER = "model.layers.{layer}."
DECODER = "decoder.layers.{layer}."


def operators(dims: ModelDims) -> list[Operator]:
    """All parameters of the model; names with `{layer}` exist once a layer."""
    attention, mlp = LAYER + "self_attn.", LAYER + "mlp."
    found: list[Operator] = [
        Vocabulary("model.embed_tokens.weight", "embedding.word_embeddings.weight"),
        Replicate(
            LAYER + "input_layernorm.weight", DECODER + "self_attention.linear_qkv.layer_norm_weight", "hidden_size"
        ),
        InterleaveQkv(attention, DECODER + "self_attention.linear_qkv.weight", "weight"),
        SplitColumns(attention + "o_proj.weight", DECODER + "self_attention.linear_proj.weight"),
        Replicate(
            LAYER + "post_attention_layernorm.weight", DECODER + "mlp.linear_fc1.layer_norm_weight", "hidden_size"
        ),
        StackGateUp(mlp + "gate_proj.weight", mlp + "up_proj.weight", DECODER + "mlp.linear_fc1.weight"),
        SplitColumns(mlp + "down_proj.weight", DECODER + "mlp.linear_fc2.weight"),
        Replicate("model.norm.weight", "decoder.final_layernorm.weight", "hidden_size"),
    ]
    if dims.qkv_bias:
        found.append(InterleaveQkv(attention, DECODER + "self_attention.linear_qkv.bias", "bias"))
    if not dims.tied_embeddings:
        found.append(Vocabulary("lm_head.weight", "output_layer.weight"))
    return found
