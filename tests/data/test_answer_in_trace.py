"""Where a trace first says the answer: by hand, and with tokens that cut numbers and characters."""

import json
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoTokenizer

from megavar.data.answer_in_trace import AnswerFinder, answer_to_find, first_appearance, token_bytes
from megavar.records import Question

BASE = Path(__file__).parents[2] / "examples" / "base" / "qwen3-tiny"


@pytest.mark.parametrize(
    ("text", "answer", "place"),
    [
        ("12", "12", 0),
        ("The sum is 12.", "12", 11),
        ("112, 12.5, 1,124, 1.12, 12,5, x12, 12x, n_12: no", "12", -1),
        ("so 1,234 or 234", "234", 12),
        ("0.5 but .5", ".5", 8),
        ("3/14, then 3/4", "3/4", 11),
        ("x = -5, so 5", "5", 11),
        ("\u22125 = 5", "5", 5),
        ("3-5 and (2)-5", "5", 2),
        ("3-5 is not -5", "-5", 11),
        ("20 - 5", "5", 5),
        ("grabs [B]", "B", 7),
        ("naïve na", "na", 6),
        ("éa a", "a", 3),
        ("答案是42。", "42", 3),
        ("x\\frac{1}{2} = \\frac{1}{2}", "\\frac{1}{2}", 15),
        ("a.b aXb", "a.b", 0),
        ("nothing", "12", -1),
        ("", "12", -1),
    ],
)
def test_an_answer_appears_where_it_is_no_part_of_another_word_or_number(text, answer, place):
    assert first_appearance(text, answer) == place


@pytest.mark.parametrize(
    ("question", "answer"),
    [
        (Question("a", "q", " 12 "), "12"),
        (Question("a", "q", "Paris| paris, France", verifier="text"), "Paris"),
        (Question("a", "q", "[1, 2] 3", "1+2", verifier="countdown"), "1+2"),
        (Question("a", "q", "..."), None),
        (Question("a", "q", "é"), "é"),
    ],
)
def test_the_answer_is_what_the_hint_shows(question, answer):
    assert answer_to_find(question) == answer


def finder(folder, tokens):
    """(finder, encode) of a byte-level tokenizer in which these texts are tokens, beside single bytes."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {char: number for number, char in enumerate(alphabet)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.decoder = decoders.ByteLevel()
    folder.mkdir(exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    byte_of = {piece: token for token, piece in token_bytes(tokenizer).items()}
    config = json.loads((folder / "tokenizer.json").read_text())
    char_of = {byte_of[bytes([byte])]: byte for byte in range(256)}
    names = {token: name for name, token in vocab.items()}
    of_byte = {byte: names[token] for token, byte in char_of.items()}
    for place, token in enumerate(tokens):
        config["model"]["vocab"]["".join(of_byte[byte] for byte in token)] = 256 + place
    (folder / "tokenizer.json").write_text(json.dumps(config))
    ids = {bytes([byte]): token for token, byte in char_of.items()}
    ids |= {token: 256 + place for place, token in enumerate(tokens)}
    return AnswerFinder(folder), lambda *pieces: np.array([ids[piece] for piece in pieces], np.int32)


@pytest.mark.parametrize(
    ("pieces", "answer", "span"),
    [
        ([b"is", b" 4", b"2", b"."], "42", (1, 3)),  # begins within a token
        ([b"is", b" 42.", b" 42"], "42", (1, 2)),  # ends within it too
        ([b"1", b" 42", b"42", b" ", b"42"], "42", (4, 5)),  # first " 4242", a part of another number
        ([b"42", b"0", b" 4", b"2"], "42", (2, 4)),
        ([b"\xe7\xad", b"\x94", b"42"], "42", (2, 3)),  # a character of two tokens before it
        ([b"a \xc3", b"\xa9", b"."], "\u00e9", (0, 2)),  # the answer's own character in two tokens
        ([b"\xff", b" 4", b"2", b"\x80"], "42", (1, 3)),  # bytes that are no text
        ([b"1", b"2"], "42", None),
    ],
)
def test_tokens_are_those_that_hold_a_byte_of_the_answer(tmp_path, pieces, answer, span):
    longer = sorted({piece for piece in pieces if len(piece) > 1})
    found, encode = finder(tmp_path / "model", longer)
    assert found.find(encode(*pieces), answer) == span


def test_without_an_answer_or_a_token_nothing_is_found():
    assert AnswerFinder(BASE).find(np.array([16, 17], np.int32), None) is None
    assert AnswerFinder(BASE).find(np.zeros(0, np.int32), "1") is None
    assert AnswerFinder(BASE).find(np.array([100_000, 16], np.int32), "1") == (1, 2)  # of an embedding's spare rows


def test_bytes_of_tokens_join_to_what_transformers_decodes():
    tokenizer = AutoTokenizer.from_pretrained(BASE)
    bytes_of = token_bytes(tokenizer.backend_tokenizer)
    text = "naïve 答案 12 \\boxed{é}\n\t7+3*4 mod 10</think>"
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert b"".join(bytes_of[token] for token in ids).decode() == tokenizer.decode(ids) == text
    assert len(bytes_of) == len(tokenizer)


def test_a_tokenizer_that_is_not_byte_level_finds_nothing(tmp_path):
    Tokenizer(models.WordLevel({"12": 0}, "12")).save(str(tmp_path / "tokenizer.json"))
    assert AnswerFinder(tmp_path).find(np.array([0], np.int32), "12") is None
