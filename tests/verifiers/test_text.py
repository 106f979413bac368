"""Verdicts on short texts."""

import pytest

from megavar.verifiers import get_verifier

TABLE = [
    ("\\boxed{Grey}", "grey | gray", "correct"),
    ("\\boxed{gray.}", "grey | gray", "correct"),
    ("\\boxed{\\text{The Beatles}}", "beatles", "correct"),
    ("The answer is Paris.", "Paris", "correct"),
    ("\\boxed{London}", "Paris", "wrong"),
    ("\\boxed{}", "x", "no_answer"),
    ("", "x", "no_answer"),
    ("Long reasoning\nParis", "Paris", "correct"),
    ("\\boxed{-5}", "5", "wrong"),
    ("\\boxed{1.5}", "15", "wrong"),
    ("\\boxed{A}", "a", "correct"),
    ("\\boxed{the}", "the", "correct"),
    ("\\boxed{St. Louis}", "st louis", "correct"),
    ("\\boxed{don't}", "dont", "correct"),
    ("\\boxed{New  York}", "new york", "correct"),
    ("\\boxed{\uff11\uff12}", "12", "correct"),
    ("\\boxed{Stra\u00dfe}", "STRASSE", "correct"),
    ("\\boxed{\u65e0\u89e3}", "\u65e0\u89e3", "correct"),
    ("\\boxed{silent}", "listen", "wrong"),
    ("\\boxed{Z\u00fcrich}", "Zu\u0308rich", "correct"),
    ("The capital is old. The answer is Paris. It lies on the Seine.", "Paris", "correct"),
]


@pytest.mark.parametrize(("response", "gold", "verdict"), TABLE)
def test_verdicts(response, gold, verdict):
    assert get_verifier("text")(response, gold) == verdict


@pytest.mark.parametrize("gold", ["", "grey |", "?"])
def test_an_alias_without_words_is_an_error(gold):
    with pytest.raises(ValueError, match="has an alias without letters or digits"):
        get_verifier("text")("\\boxed{x}", gold)
