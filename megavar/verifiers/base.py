"""The verifier protocol: compare one response with the ground-truth answer."""

from typing import Protocol

from megavar.records import Verdict


class Verifier(Protocol):
    """Verifies a response. It may be slow, hang or crash: it runs in a worker process with a timeout."""

    def __call__(self, response: str, gold: str) -> Verdict:
        """Verify one response.

        Args:
            response: text after the trace.
            gold: `Question.answer`.

        Returns:
            `correct`, `wrong`, or `no_answer` if no answer can be extracted from the response.
        """
        ...
