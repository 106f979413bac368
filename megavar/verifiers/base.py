"""What a verifier is: a judgement of one response against one known answer."""

from typing import Protocol

from megavar.records import Verdict


class Verifier(Protocol):
    """Judges a response; may be slow, hang or crash, since it runs in a process that can be killed."""

    def __call__(self, response: str, gold: str) -> Verdict:
        """One of `correct`, `wrong` and `no_answer`; the last if the response holds nothing that could be an answer."""
        ...
