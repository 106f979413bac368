"""Reads a model's sizes from the config.json of its Hugging Face folder, without transformers.

Optional keys have transformers' defaults. Sizes and the RoPE base have none: a missing one is an error.
"""

import json
from math import isfinite
from pathlib import Path
from typing import Any

from megavar.models import FAMILIES
from megavar.models.dims import ModelDims
from megavar.models.family import Family
from megavar.models.rope import read_rope

_REFUSED = {
    "quantization_config": "a leftover of quantized weights; give the folder of the original weights, or remove the "
    "key if these are not quantized",
    "dual_chunk_attention_config": "attention in chunks, which is not supported; remove the key to use full attention",
}


def read_dims(folder: Path) -> ModelDims:
    """Read the sizes of the model in a Hugging Face folder.

    Raises:
        ValueError: if config.json is missing, a key is missing or has the wrong type, `model_type` is unknown, or the
            model has features that the training engine would silently compute differently (RoPE scaling other than
            YaRN, sliding windows, attention biases, dense layers in an MoE model).
    """
    file = folder / "config.json"
    if not file.is_file():
        raise ValueError(f"{folder} has no config.json; give a Hugging Face model folder.")
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} cannot be read: {error}; re-download it.") from error
    if not isinstance(config, dict):
        raise ValueError(f"{file} contains {config!r:.80}, expected a JSON object; re-download it.")
    model_type = config.get("model_type")
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        raise ValueError(f"{file} has model_type={model_type!r:.100}; supported are {', '.join(FAMILIES)}.")
    family = FAMILIES[model_type]
    required = {"use_sliding_window": False, "hidden_act": "silu", "partial_rotary_factor": 1.0, **family.required}
    for key, value in required.items():
        if config.get(key, value) not in (value, None):
            raise ValueError(f"{file} has {key}={config[key]!r}, which is not supported; only {value!r} is.")
    for key, what in _REFUSED.items():
        if config.get(key) is not None:
            raise ValueError(f"{file} has {key}, {what}.")
    layer_types, num_layers = config.get("layer_types"), config.get("num_hidden_layers")
    if layer_types is not None and layer_types != ["full_attention"] * (num_layers if type(num_layers) is int else 0):
        raise ValueError(
            f"{file} has layer_types={layer_types!r:.200}, expected full_attention for each of num_hidden_layers="
            f"{num_layers!r}; other attention is not supported."
        )
    return _dims(model_type, family, config, file)


def _dims(model_type: str, family: Family, config: dict[str, Any], file: Path) -> ModelDims:
    def get(key: str, kind: type, default: Any = None) -> Any:
        value = config.get(key)
        value = default if value is None else value
        if kind is float and type(value) is int and abs(value) < 2**63:
            value = float(value)
        if type(value) is not kind:
            raise ValueError(
                f"{file} has {key}={value!r:.100}, expected a value of type {kind.__name__}; re-download it."
            )
        if isinstance(value, float) and not isfinite(value):
            raise ValueError(f"{file} has {key}={value}, expected a finite number; re-download it.")
        if isinstance(value, int) and kind is int and not 1 <= value < 2**31:
            raise ValueError(f"{file} has {key}={value!r:.100}, expected 1 to 2^31 - 1; re-download it.")
        return value

    is_moe = family.is_moe
    num_heads, hidden_size = get("num_attention_heads", int), get("hidden_size", int)
    norm_topk_prob = is_moe and get("norm_topk_prob", bool, False)
    if is_moe and get("num_experts_per_tok", int) == 1 and norm_topk_prob:
        raise ValueError(
            f"{file} has num_experts_per_tok=1 and norm_topk_prob=true: the routing weight would always be 1, whatever "
            "the router computes; this is not supported."
        )
    rope_base, yarn = read_rope(config, file)
    return ModelDims(
        family=model_type,
        num_layers=get("num_hidden_layers", int),
        hidden_size=hidden_size,
        num_heads=num_heads,
        num_query_groups=get("num_key_value_heads", int),
        head_dim=get("head_dim", int, family.head_dim or hidden_size // num_heads),
        ffn_size=get("moe_intermediate_size" if is_moe else "intermediate_size", int),
        vocab_size=get("vocab_size", int),
        tied_embeddings=get("tie_word_embeddings", bool, False),
        rope_base=rope_base,
        yarn=yarn,
        norm_eps=get("rms_norm_eps", float),
        max_positions=max(get("max_position_embeddings", int), yarn.positions if yarn else 0),
        qkv_bias=family.qkv_bias,
        qk_norm=family.qk_norm,
        num_experts=get("num_experts" if "num_experts" in config else "num_local_experts", int) if is_moe else 0,
        experts_per_token=get("num_experts_per_tok", int) if is_moe else 0,
        normalise_routing=norm_topk_prob,
    )
