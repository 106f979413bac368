"""Registry of the verifiers, by the name that questions carry."""

from megavar.verifiers import math
from megavar.verifiers.base import Verifier

VERIFIERS: dict[str, Verifier] = {"math": math.verify}


def get_verifier(name: str) -> Verifier:
    """The verifier of that name.

    Raises:
        ValueError: listing the known ones.
    """
    if name not in VERIFIERS:
        raise ValueError(f"verifier {name!r} is unknown; known are {', '.join(VERIFIERS)}.")
    return VERIFIERS[name]
