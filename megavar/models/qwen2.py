"""Qwen2 and Qwen2.5 (dense): query, key and value projections have biases."""

from megavar.models.dims import ModelDims
from megavar.models.family import Family
from megavar.models.ops import InterleaveQkv, Operator, Rename, StackGateUp

LAYER = "model.layers.{layer}."
DECODER = "decoder.layers."


def operators(dims: ModelDims) -> list[Operator]:
    """All parameters of the model."""
    bias = InterleaveQkv(LAYER + "self_attn.", DECODER + "self_attention.linear_qkv.bias", "bias")
    return [*outer(dims), *attention(), bias, *dense_mlp()]


def outer(dims: ModelDims) -> list[Operator]:
    """Parameters outside the layers: embedding (first), final norm and, unless tied, the output layer."""
    table = ("vocab_size", "hidden_size")
    parameters: list[Operator] = [
        Rename("model.embed_tokens.weight", "embedding.word_embeddings.weight", table),
        Rename("model.norm.weight", "decoder.final_layernorm.weight", ("hidden_size",)),
    ]
    if not dims.tied_embeddings:
        parameters.append(Rename("lm_head.weight", "output_layer.weight", table))
    return parameters


def attention() -> list[Operator]:
    """A layer's attention without biases, and its input norm."""
    source, target = LAYER + "self_attn.", DECODER + "self_attention."
    return [
        Rename(LAYER + "input_layernorm.weight", target + "linear_qkv.layer_norm_weight", ("hidden_size",)),
        InterleaveQkv(source, target + "linear_qkv.weight", "weight"),
        Rename(source + "o_proj.weight", target + "linear_proj.weight", ("hidden_size", "query_size")),
    ]


def dense_mlp() -> list[Operator]:
    """A layer's MLP and its input norm."""
    source, target = LAYER + "mlp.", DECODER + "mlp."
    return [
        Rename(LAYER + "post_attention_layernorm.weight", target + "linear_fc1.layer_norm_weight", ("hidden_size",)),
        StackGateUp(source + "gate_proj.weight", source + "up_proj.weight", target + "linear_fc1.weight"),
        Rename(source + "down_proj.weight", target + "linear_fc2.weight", ("hidden_size", "ffn_size")),
    ]


FAMILY = Family(operators, qkv_bias=True)
