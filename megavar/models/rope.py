"""Reads rotary position embeddings (RoPE) from a parsed config.json: the base, and YaRN's scaling of it."""

from math import isclose, isfinite, log
from pathlib import Path
from typing import Any

from megavar.models.dims import Yarn

_NAMES = {"type", "rope_type", "rope_theta"}
_YARN_KEYS = {
    "factor", "original_max_position_embeddings", "attention_factor", "attn_factor", "beta_fast", "beta_slow",
    "truncate", "mscale", "mscale_all_dim",
}  # fmt: skip


def read_rope(config: dict[str, Any], file: Path) -> tuple[float, Yarn | None]:
    """The RoPE base, and the scaling; None without one.

    Both are in `rope_parameters` (transformers 5), or in `rope_theta` and `rope_scaling` (transformers 4). The base has
    no default.

    Raises:
        ValueError: if the base is missing, or transformers or SGLang would compute anything else than the engine.
    """
    # transformers 5 looks at rope_scaling first where a file has both; transformers 4 knows no other.
    rope, other = (config.get(key) or {} for key in ("rope_scaling", "rope_parameters"))
    for found in (rope, other):
        if not isinstance(found, dict):
            raise ValueError(f"{file} has RoPE parameters {found!r:.100}, expected an object; re-download it.")
    if rope and other and _scaling(rope) != _scaling(other):
        raise ValueError(
            f"{file} has rope_scaling={rope!r:.200} and another scaling in rope_parameters={other!r:.200}; remove one."
        )
    rope = rope or other
    base = rope.get("rope_theta", config.get("rope_theta"))
    if not isinstance(base, int | float) or isinstance(base, bool) or not 0 < base < 2**63:
        raise ValueError(
            f"{file} has no rope_theta, and the RoPE base has no default; add it, or re-download the file."
        )
    kind = _kind(rope)
    if kind == "default":
        return float(base), None
    if kind != "yarn":
        raise ValueError(f"{file} has RoPE scaling {kind!r}, which is not supported; only 'yarn' is.")
    return float(base), _read_yarn(rope, config, file)


def _kind(rope: dict[str, Any]) -> Any:
    return rope.get("rope_type", rope.get("type", "default"))


def _scaling(rope: dict[str, Any]) -> dict[str, Any]:
    """Everything but the base, which `rope_theta` may have instead."""
    return {"rope_type": _kind(rope), **{key: value for key, value in rope.items() if key not in _NAMES}}


def _read_yarn(rope: dict[str, Any], config: dict[str, Any], file: Path) -> Yarn:
    unknown = sorted(rope.keys() - _YARN_KEYS - _NAMES)
    if unknown:
        raise ValueError(
            f"{file} has {unknown[0]}={rope[unknown[0]]!r:.100} in its YaRN scaling, which is not supported."
        )

    def number(key: str, default: float | None = None, least: float = 0.0) -> float:
        value: Any = rope.get(key, default)
        if type(value) not in (int, float) or not (isfinite(value) and value > 0 and value >= least):
            expected = f"a number of at least {least:g}" if least else "a number above 0"
            raise ValueError(f"{file} has {key}={value!r:.100} in its YaRN scaling, expected {expected}; correct it.")
        return float(value)

    original = rope.get("original_max_position_embeddings")
    if type(original) is not int or original < 1:
        raise ValueError(
            f"{file} has original_max_position_embeddings={original!r:.100} in its YaRN scaling, expected the length "
            "that the model was trained at before scaling; add it."
        )
    # transformers 5 prefers a value outside of the scaling, which SGLang does not know.
    outside = config.get("original_max_position_embeddings", original)
    if outside != original:
        raise ValueError(
            f"{file} has original_max_position_embeddings={outside!r:.100}, and {original} in its YaRN scaling; "
            "remove the first."
        )
    truncate = rope.get("truncate", True)
    if type(truncate) is not bool:
        raise ValueError(
            f"{file} has truncate={truncate!r:.100} in its YaRN scaling, expected true or false; correct it."
        )
    factor = number("factor", least=1.0)

    def magnitude(weight: float) -> float:
        return 0.1 * weight * log(factor) + 1.0

    usual = magnitude(1.0)
    if rope.get("mscale") is not None and rope.get("mscale_all_dim") is not None:
        usual = magnitude(number("mscale")) / magnitude(number("mscale_all_dim"))
    by_transformers = usual if rope.get("attention_factor") is None else number("attention_factor")
    by_sglang = usual * number("attn_factor", 1.0)
    if not isclose(by_transformers, by_sglang, rel_tol=1e-6):
        raise ValueError(
            f"{file} has attention_factor={rope.get('attention_factor')!r}, which only transformers reads, and "
            f"attn_factor={rope.get('attn_factor')!r}, which only SGLang reads: they scale queries and keys by "
            f"{by_transformers:.7g} and {by_sglang:.7g}. Have both keys say which is meant: "
            f"attention_factor={by_sglang!r} next to this attn_factor, or attn_factor={by_transformers / usual!r} next "
            "to this attention_factor."
        )
    return Yarn(
        factor=factor,
        original_positions=original,
        attention_factor=by_transformers,
        beta_fast=number("beta_fast", 32.0),
        beta_slow=number("beta_slow", 1.0),
        truncate=truncate,
    )
