"""Text of token ids by a model folder's tokenizer.json alone, for people to read: no transformers, no torch."""

from collections.abc import Callable
from pathlib import Path

from tokenizers import Tokenizer

from megavar.records import TokenIds

Decoder = Callable[[TokenIds], str]


def open_decoder(model: Path) -> Decoder:
    """A function from ids to their text, special tokens and all.

    Raises:
        ValueError: if the folder has no tokenizer.json.
    """
    file = model / "tokenizer.json"
    if not file.is_file():
        raise ValueError(f"{model} has no tokenizer.json; give the folder of a model with a fast tokenizer.")
    tokenizer = Tokenizer.from_file(str(file))

    def decode(ids: TokenIds) -> str:
        text: str = tokenizer.decode(ids.tolist(), skip_special_tokens=False)
        return text

    return decode
