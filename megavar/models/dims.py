"""The sizes of a model, read from its Hugging Face folder; what the operators and the engine need to know of it."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig


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


KNOWN_FAMILIES = ("qwen2", "qwen3", "qwen3_moe")

_PLAIN: dict[str, list[tuple[str, Any]]] = {
    "qwen2": [("use_sliding_window", False), ("hidden_act", "silu")],
    "qwen3": [("use_sliding_window", False), ("hidden_act", "silu"), ("attention_bias", False)],
    "qwen3_moe": [
        ("use_sliding_window", False),
        ("hidden_act", "silu"),
        ("attention_bias", False),
        ("decoder_sparse_step", 1),
        ("mlp_only_layers", []),
    ],
}
"""What a family's configuration may hold, where the engine does nothing else."""


def read_dims(folder: Path) -> ModelDims:
    """Read the sizes of the model in a Hugging Face folder.

    Raises:
        ValueError: for a folder without config.json, an unknown `model_type`, or features that the training
            engine would silently do otherwise (RoPE scaling, sliding windows, biases, dense layers among experts).
    """
    if not (folder / "config.json").is_file():
        raise ValueError(f"{folder} has no config.json; give a Hugging Face model folder.")
    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, KeyError, StrictDataclassError) as error:
        raise ValueError(f"{folder}/config.json cannot be read: {error}") from error
    if config.model_type not in KNOWN_FAMILIES:
        raise ValueError(
            f"{folder}/config.json has model_type={config.model_type!r}; known are {', '.join(KNOWN_FAMILIES)}."
        )
    mixture = config.model_type == "qwen3_moe"
    for key, plain in _PLAIN[config.model_type]:
        if getattr(config, key, plain) != plain:
            raise ValueError(
                f"{folder}/config.json has {key}={getattr(config, key)!r}, which is not supported; only {plain!r} is."
            )
    if mixture and config.num_experts_per_tok == 1 and config.norm_topk_prob:
        raise ValueError(
            f"{folder}/config.json has num_experts_per_tok=1 and norm_topk_prob=true: every expert's weight would be "
            "1, whatever the router says; this is not supported."
        )
    return ModelDims(
        family=config.model_type,
        num_layers=config.num_hidden_layers,
        hidden_size=config.hidden_size,
        num_heads=config.num_attention_heads,
        num_query_groups=config.num_key_value_heads,
        head_dim=getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads,
        ffn_size=config.moe_intermediate_size if mixture else config.intermediate_size,
        vocab_size=config.vocab_size,
        tied_embeddings=config.tie_word_embeddings,
        rope_base=_rope_base(config, folder),
        norm_eps=config.rms_norm_eps,
        max_positions=config.max_position_embeddings,
        qkv_bias=config.model_type == "qwen2",
        qk_norm=config.model_type != "qwen2",
        num_experts=config.num_experts if mixture else 0,
        experts_per_token=config.num_experts_per_tok if mixture else 0,
        normalise_routing=mixture and config.norm_topk_prob,
    )


def _rope_base(config: Any, folder: Path) -> float:
    """The RoPE base: transformers 5 keeps it in `rope_parameters`, 4 in `rope_theta`; there is no default."""
    rope = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind != "default":
        raise ValueError(f"{folder}/config.json has RoPE scaling {kind!r}, which is not supported; use a plain one.")
    base = rope.get("rope_theta", getattr(config, "rope_theta", None))
    # transformers 5 fills a base in where there is none: only the file itself tells.
    written = json.loads((folder / "config.json").read_text())
    places = (written, written.get("rope_parameters") or {}, written.get("rope_scaling") or {})
    if base is None or not any("rope_theta" in place for place in places):
        raise ValueError(f"{folder}/config.json has no rope_theta; a RoPE base is never guessed.")
    return float(base)
