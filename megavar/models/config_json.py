"""Reads the sizes of a model from the config.json of its Hugging Face folder. Needs no transformers.

A key that transformers may leave out has transformers' default here too; a size or the RoPE base is never guessed.
"""

import json
from pathlib import Path
from typing import Any

from megavar.models import FAMILIES
from megavar.models.dims import ModelDims
from megavar.models.family import Family


def read_dims(folder: Path) -> ModelDims:
    """Read the sizes of the model in a Hugging Face folder.

    Raises:
        ValueError: for a folder without config.json, a missing key or one of the wrong type, an unknown `model_type`,
            or features that the training engine would silently compute differently (RoPE scaling, sliding windows,
            biases, dense layers among experts).
    """
    file = folder / "config.json"
    if not file.is_file():
        raise ValueError(f"{folder} has no config.json; give a Hugging Face model folder.")
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} cannot be read: {error}; copy it again.") from error
    if not isinstance(config, dict):
        raise ValueError(f"{file} holds {config!r:.80}, expected an object; copy it again.")
    model_type = config.get("model_type")
    if model_type not in FAMILIES:
        raise ValueError(f"{file} has model_type={model_type!r}; known are {', '.join(FAMILIES)}.")
    family = FAMILIES[model_type]
    for key, value in {"use_sliding_window": False, "hidden_act": "silu", **family.required}.items():
        if config.get(key, value) not in (value, None):
            raise ValueError(f"{file} has {key}={config[key]!r}, which is not supported; only {value!r} is.")
    return _dims(model_type, family, config, file)


def _dims(model_type: str, family: Family, config: dict[str, Any], file: Path) -> ModelDims:
    def get(key: str, kind: type, default: Any = None) -> Any:
        value = config.get(key)
        value = default if value is None else value
        if kind is float and type(value) is int:
            value = float(value)
        if type(value) is not kind:
            raise ValueError(f"{file} has {key}={value!r}, expected a value of type {kind.__name__}; copy it again.")
        if isinstance(value, int) and kind is int and value < 1:
            raise ValueError(f"{file} has {key}={value}, expected at least 1; copy it again.")
        return value

    mixture = family.is_mixture
    num_heads, hidden_size = get("num_attention_heads", int), get("hidden_size", int)
    normalises = mixture and get("norm_topk_prob", bool, False)
    if mixture and get("num_experts_per_tok", int) == 1 and normalises:
        raise ValueError(
            f"{file} has num_experts_per_tok=1 and norm_topk_prob=true: every expert's weight would be "
            "1, whatever the router says; this is not supported."
        )
    return ModelDims(
        family=model_type,
        num_layers=get("num_hidden_layers", int),
        hidden_size=hidden_size,
        num_heads=num_heads,
        num_query_groups=get("num_key_value_heads", int),
        head_dim=get("head_dim", int, family.head_dim or hidden_size // num_heads),
        ffn_size=get("moe_intermediate_size" if mixture else "intermediate_size", int),
        vocab_size=get("vocab_size", int),
        tied_embeddings=get("tie_word_embeddings", bool, False),
        rope_base=_rope_base(config, file),
        norm_eps=get("rms_norm_eps", float),
        max_positions=get("max_position_embeddings", int),
        qkv_bias=family.qkv_bias,
        qk_norm=family.qk_norm,
        num_experts=get("num_experts" if "num_experts" in config else "num_local_experts", int) if mixture else 0,
        experts_per_token=get("num_experts_per_tok", int) if mixture else 0,
        normalise_routing=normalises,
    )


def _rope_base(config: dict[str, Any], file: Path) -> float:
    """transformers 5 writes the base into `rope_parameters`, 4 as `rope_theta`; there is no default."""
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind != "default":
        raise ValueError(f"{file} has RoPE scaling {kind!r}, which is not supported; use a model without it.")
    base = rope.get("rope_theta", config.get("rope_theta"))
    if not isinstance(base, int | float) or isinstance(base, bool):
        raise ValueError(f"{file} has no rope_theta; a RoPE base is never guessed.")
    return float(base)
