"""Verifier registry, keyed by `Question.verifier`; `package.module:function` names one from another package."""

from collections.abc import Sequence
from importlib import import_module

from megavar.verifiers import code, math
from megavar.verifiers.base import Verifier

VERIFIERS: dict[str, Verifier] = {"math": math.verify, "code": code.verify}


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
        raise ValueError(f"verifier {name!r} is unknown; use one of {', '.join([*VERIFIERS, *plugins])}{advice}.")
    module, _, function = name.partition(":")
    try:
        verifier: Verifier = getattr(import_module(module), function)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(
            f"verify.plugins: {name!r} cannot be imported ({error}); use package.module:function of a module that is "
            "installed or on PYTHONPATH."
        ) from error
    return verifier
