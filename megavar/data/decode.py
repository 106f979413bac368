"""Decodes token ids for display with a model folder's tokenizer.json; needs neither transformers nor torch."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from megavar.records import TokenIds

Decoder = Callable[[TokenIds], str]
"""[T] int32 token ids -> text, special tokens included."""


def open_decoder(model: Path) -> Decoder:
    """Load the tokenizer of a Hugging Face folder and return its decoder.

    Raises:
        ValueError: if the folder has no tokenizer.json.
    """
    tokenizer = open_tokenizer(model)

    def decode(ids: TokenIds) -> str:
        text: str = tokenizer.decode(ids.tolist(), skip_special_tokens=False)
        return text

    return decode


def end_token(model: Path) -> int:
    """The id of the end-of-sequence token that a Hugging Face folder's tokenizer names.

    Raises:
        ValueError: if the folder's tokenizer names none, or one that it does not have.
    """
    file = model / "tokenizer_config.json"
    try:
        named: Any = json.loads(file.read_text(encoding="utf-8"))["eos_token"]
        text = named["content"] if isinstance(named, dict) else named
        token = open_tokenizer(model).token_to_id(text)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{file} names no eos_token ({error!r:.200}); copy it again.") from error
    if token is None:
        raise ValueError(f"{file} names the eos_token {text!r:.100}, which tokenizer.json lacks; copy both again.")
    return int(token)


def open_tokenizer(model: Path) -> Tokenizer:
    """Load the tokenizer of a Hugging Face folder.

    Raises:
        ValueError: if the folder has no tokenizer.json, or it cannot be loaded.
    """
    file = model / "tokenizer.json"
    if not file.is_file():
        raise ValueError(f"{model} has no tokenizer.json; give the folder of a model with a fast tokenizer.")
    try:
        return Tokenizer.from_file(str(file))
    except Exception as error:  # tokenizers raises nothing narrower
        raise ValueError(f"{file} cannot be loaded ({' '.join(str(error).split()):.300}); copy it again.") from error
