"""Verifier registry, keyed by `Question.verifier`; `package.module:function` names one from another package."""

from collections.abc import Iterable, Sequence
from importlib import import_module

from megavar.records import Question
from megavar.verifiers import choice, code, countdown, math, text
from megavar.verifiers.base import Verifier
from megavar.verifiers.sandbox import check_sandbox

VERIFIERS: dict[str, Verifier] = {
    "math": math.verify,
    "choice": choice.verify,
    "text": text.verify,
    "countdown": countdown.verify,
    "code": code.verify,
}
NO_VERIFIER = "none"
"""The `Question.verifier` of questions whose answers are not judged."""


def get_verifier(name: str, plugins: Sequence[str] = ()) -> Verifier:
    """Look up a verifier by name.

    Args:
        name: a registry key or one of `plugins`.
        plugins: `package.module:function` names allowed by the configuration (`verify.plugins`). Question files choose
            the name, and data must not choose which code runs.

    Raises:
        ValueError: if the name is unknown (lists the allowed ones) or a plugin cannot be imported.
    """
    if name in VERIFIERS:
        return VERIFIERS[name]
    if name not in plugins:
        advice = f", or allow it if you trust the code: verify.plugins=[{name}]" if ":" in name else ""
        allowed = ", ".join([*VERIFIERS, NO_VERIFIER, *plugins])
        raise ValueError(f"verifier {name!r} is unknown; use one of {allowed}{advice}.")
    module, _, function = name.partition(":")
    try:
        verifier: Verifier = getattr(import_module(module), function)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(
            f"verify.plugins: {name!r} cannot be imported ({error}); use package.module:function of a module that is "
            "installed or on PYTHONPATH."
        ) from error
    return verifier


def check_verifiers(names: Iterable[str], plugins: Sequence[str] = ()) -> None:
    """Check that questions with these verifiers can be judged on this machine.

    Raises:
        ValueError: if one is unknown, or programs cannot be run in a sandbox here.
    """
    for name in sorted(set(names) - {NO_VERIFIER}):
        if get_verifier(name, plugins) is code.verify:
            try:
                check_sandbox()
            except RuntimeError as error:
                raise ValueError(f"verifier {name!r}: {error}") from error


def ground_truth(question: Question) -> str:
    """What the question's verifier compares with: its answer, and for `choice` the options as well."""
    if question.verifier == "choice":
        return choice.with_options(question.answer, question.question)
    return question.answer
