"""Compares the files of a model that must agree: tokenizer, embedding, stop tokens and chat template."""

import json
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megavar.data.decode import end_token
from megavar.data.templates import Templates
from megavar.records import Question

if TYPE_CHECKING:
    from megavar.models.dims import ModelDims

logger = logging.getLogger(__name__)


def check_model_files(model: Path, dims: "ModelDims", templates: Templates, question: Question) -> None:
    """Check what would be trained or sampled wrongly without an error; a stop token that differs is only said.

    Args:
        question: any of the run's, to render.

    Raises:
        ValueError: naming the files, and what to change.
    """
    if templates.largest_token >= dims.vocab_size:
        raise ValueError(
            f"{model}: its tokenizer has token ids up to {templates.largest_token}, its embedding only "
            f"{dims.vocab_size} rows (vocab_size); use the tokenizer that belongs to the model, or add the rows."
        )
    if (named := end_token(model)) != templates.end_token:
        raise ValueError(
            f"{model}: tokenizer_config.json names the eos_token {named}, transformers reads {templates.end_token}; "
            "make the tokenizer's files agree."
        )
    stops = stop_tokens(model)
    _check_close_marker(templates, {templates.end_token}.union(*stops.values()))
    _check_prompt(model, templates, question)
    for name, tokens in stops.items():
        if tokens and templates.end_token not in tokens:
            logger.warning(
                "check: %s/%s ends a text at token %s, the tokenizer at %d, which answers are trained to end with; "
                "exports name the tokenizer's.",
                model,
                name,
                " or ".join(map(str, sorted(tokens))),
                templates.end_token,
            )


def stop_tokens(model: Path) -> dict[str, set[int]]:
    """File of a model's folder -> the token ids that end a text by it."""
    return {name: _stop_tokens(model / name) for name in ("config.json", "generation_config.json")}


def _stop_tokens(file: Path) -> set[int]:
    """The token ids of `eos_token_id`; none if the file, or the key, is missing."""
    if not file.is_file():
        return set()
    try:
        config: Any = json.loads(file.read_text(encoding="utf-8"))
        tokens = config.get("eos_token_id")
    except (ValueError, AttributeError) as error:
        raise ValueError(f"{file} cannot be read ({error}); copy it again.") from error
    found = tokens if isinstance(tokens, list) else [] if tokens is None else [tokens]
    if not all(type(token) is int and token >= 0 for token in found):
        raise ValueError(f"{file} has eos_token_id={tokens!r:.100}, expected token ids; copy it again.")
    return set(found)


def _check_close_marker(templates: Templates, stops: set[int]) -> None:
    marker = templates.config.close_marker
    if not marker.strip():
        raise ValueError(
            f"templates.close_marker={marker!r} is empty: no trace would ever end; give the text that ends one, such "
            "as </think>."
        )
    if templates.close_token in stops:
        raise ValueError(
            f"templates.close_marker={marker!r} is a token that ends the turn (eos_token_id): no answer would follow a "
            "trace; give a marker of its own, such as </think>."
        )


def _check_prompt(model: Path, templates: Templates, question: Question) -> None:
    """The policy's prompt must hold the question, and open exactly one trace."""
    text, message = templates.policy_text(question)
    opened, closed = templates.config.open_marker.strip(), templates.config.close_marker.strip()
    where = f"{model}: the prompt that its chat template makes"
    if message.strip() not in text:
        raise ValueError(f"{where} does not hold the question; correct chat_template.jinja. It is {text!r:.300}.")
    # What the user's own messages say of the markers, as instructions on the form of an answer do, is no trace.
    around = text.replace(message.strip(), "").replace((templates.config.system or "").strip(), "")
    if closed in around:
        raise ValueError(
            f"{where} closes a trace ({closed!r}) before the model has begun one, as templates for answers without "
            f"thinking do; use the model's thinking template, or remove the block from the end of its chat template. "
            f"The prompt ends with {text[-100:]!r}."
        )
    if opened and around.count(opened) != 1:
        raise ValueError(
            f"{where} has {opened!r} {around.count(opened)} times, expected once, at its end; correct "
            "chat_template.jinja, or templates.open_marker."
        )
