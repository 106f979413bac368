"""Finds where a trace first says its question's answer, and which tokens say it (docs/method.md#leakage).

A byte-level token may hold a part of a character, so tokens are joined as bytes, and places in the text are counted
back into bytes. Needs neither transformers nor torch.
"""

import re
from functools import lru_cache
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer, decoders

from megavar.data.decode import open_tokenizer
from megavar.data.templates import shown_answer
from megavar.records import Question, TokenIds

Span = tuple[int, int]
"""First token, and the one after the last."""

_IN_WORDS = r"[^\W\u2e80-\u9fff\uac00-\ud7af\uf900-\ufaff\U00020000-\U0003ffff]"
"""Letters, digits and _, but for those of scripts that are written without spaces: Chinese, Japanese, Korean."""
_NUMBER_BEFORE = r"(?<!\d[.,])(?<!\A[-\u2212])(?<![^\w)\]}][-\u2212])"
"""Not after a number's point or comma, nor after a sign: `-` is one where nothing stands before it to subtract from."""
_NUMBER_AFTER = r"(?![.,]\d)"


class AnswerFinder:
    """Finds answers in traces by token ids.

    Args:
        model: Hugging Face folder with the tokenizer.

    Raises:
        ValueError: if the folder has no tokenizer.json.
    """

    def __init__(self, model: Path) -> None:
        bytes_of = token_bytes(open_tokenizer(model))
        pieces = [bytes_of.get(token, b"") for token in range(max(bytes_of, default=-1) + 2)]  # the last: of no token
        self._sizes = np.array(list(map(len, pieces)), np.int64)
        self._starts = np.cumsum(self._sizes) - self._sizes
        self._bytes = np.frombuffer(b"".join(pieces), np.uint8)

    def find(self, trace_ids: TokenIds, answer: str | None) -> Span | None:
        """The tokens that cover the first appearance of an answer in a trace, [trace tokens] int32.

        It appears as a whole: not as a part of another word or number. None: it does not, or there is no answer.
        """
        if answer is None:
            return None
        tokens = np.minimum(trace_ids, len(self._sizes) - 1)
        sizes = self._sizes[tokens]
        ends = np.cumsum(sizes)
        places = np.arange(sizes.sum()) + np.repeat(self._starts[tokens] - (ends - sizes), sizes)
        joined, wanted = self._bytes[places].tobytes(), answer.encode()
        if wanted not in joined:
            return None
        text = joined.decode("utf-8", "surrogateescape")
        place = first_appearance(text, answer)
        if place < 0:
            return None
        first = len(text[:place].encode("utf-8", "surrogateescape"))
        start, last = np.searchsorted(ends, [first, first + len(wanted) - 1], "right").tolist()
        return start, last + 1


def answer_to_find(question: Question) -> str | None:
    """The answer that the hint shows, without space around it; None if it has neither letter nor digit."""
    answer = shown_answer(question).strip()
    return answer if any(char.isalnum() for char in answer) else None


def first_appearance(text: str, answer: str) -> int:
    """Place of the first appearance of the answer as a whole, not as a part of another word or number; -1: none."""
    whole, place = _whole(answer), text.find(answer)
    while place >= 0 and not whole.match(text, place):
        place = text.find(answer, place + 1)
    return place


@lru_cache(maxsize=64)
def _whole(answer: str) -> re.Pattern[str]:
    before = _NUMBER_BEFORE if answer[0].isdigit() else ""
    after = _NUMBER_AFTER if answer[-1].isdigit() else ""
    return re.compile(f"(?<!{_IN_WORDS}){before}{re.escape(answer)}(?!{_IN_WORDS}){after}")


def token_bytes(tokenizer: Tokenizer) -> dict[int, bytes]:
    """The bytes of each token; none where the tokenizer is not byte-level, as those of all known families are."""
    if not isinstance(tokenizer.decoder, decoders.ByteLevel):
        return {}
    visible = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]  # other bytes are written from U+0100 on
    hidden = [byte for byte in range(256) if byte not in visible]
    byte_of = {chr(byte): byte for byte in visible} | {chr(256 + place): byte for place, byte in enumerate(hidden)}
    return {
        token: bytes(byte_of[char] for char in text) if byte_of.keys() >= set(text) else text.encode()
        for text, token in tokenizer.get_vocab(with_added_tokens=True).items()
    }
