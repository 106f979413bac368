"""Registry of the verifiers, by the name that questions carry; `package.module:function` brings one from outside."""

from collections.abc import Sequence
from importlib import import_module

from megavar.verifiers import math
from megavar.verifiers.base import Verifier

VERIFIERS: dict[str, Verifier] = {"math": math.verify}


def get_verifier(name: str, plugins: Sequence[str] = ()) -> Verifier:
    """The verifier of that name.

    Args:
        plugins: the `package.module:function` names that the configuration allows (`verify.plugins`). Names come from
            data files, which must not choose what code runs.

    Raises:
        ValueError: listing the known ones, or saying why a plugin cannot be imported.
    """
    if name in VERIFIERS:
        return VERIFIERS[name]
    if name not in plugins:
        advice = f"; list it in verify.plugins if you trust it: verify.plugins=[{name}]" if ":" in name else ""
        raise ValueError(f"verifier {name!r} is unknown; known are {', '.join([*VERIFIERS, *plugins])}{advice}.")
    module, _, function = name.partition(":")
    try:
        verifier: Verifier = getattr(import_module(module), function)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(
            f"verify.plugins: {name!r} cannot be imported ({error}); give package.module:function of an importable "
            "module, on PYTHONPATH or installed."
        ) from error
    return verifier
