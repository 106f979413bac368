"""Decodes token ids for display with a model folder's tokenizer.json; needs neither transformers nor torch."""

from collections.abc import Callable
from pathlib import Path

from tokenizers import Tokenizer

from megavar.records import TokenIds

Decoder = Callable[[TokenIds], str]
"""[T] int32 token ids -> text, special tokens included."""


def open_decoder(model: Path) -> Decoder:
    """Load the tokenizer of a Hugging Face folder and return its decoder.

    Raises:
        ValueError: if the folder has no tokenizer.json.
    """
    file = model / "tokenizer.json"
    if not file.is_file():
        raise ValueError(f"{model} has no tokenizer.json; give the folder of a model with a fast tokenizer.")
    try:
        tokenizer = Tokenizer.from_file(str(file))
    except Exception as error:  # tokenizers raises nothing narrower
        raise ValueError(f"{file} cannot be loaded ({' '.join(str(error).split()):.300}); copy it again.") from error

    def decode(ids: TokenIds) -> str:
        text: str = tokenizer.decode(ids.tolist(), skip_special_tokens=False)
        return text

    return decode
