"""What the sampling stage asks of a serving engine: requests in, generated token ids and log-probs out.

The stages know this file only; `sglang_client.py` is the one engine there is. A new engine implements `Engine` and
passes the tests of `tests/rollout/test_generation.py`.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from megavar.ranks import ExplainedFailure

Finish = Literal["stop", "length", "abort"]


class RolloutError(ExplainedFailure):
    """A request or a server failed in a way that trying again has not cured."""


class NoWorkerLeft(RolloutError):
    """No server answers any more; further requests are pointless."""


class RequestRejected(ValueError):
    """The request itself is wrong (a prompt too long, an unknown token); trying again would not help."""


@dataclass(frozen=True, eq=False)
class GenerateRequest:
    """One prompt and how to continue it."""

    prompt_ids: Sequence[int] | NDArray[np.int32]
    """[prompt tokens] ids, sent as they are."""
    max_tokens: int
    temperature: float
    """0 is greedy."""
    top_p: float = 1.0
    seed: int = 0
    """Seed of the first sample; `sample_seed` derives those of the others."""
    stop_token_ids: tuple[int, ...] = ()
    """Ends a sample besides the model's own end-of-sequence tokens."""
    stop: tuple[str, ...] = ()
    """Strings that end a sample as soon as its text holds one of them."""
    num_samples: int = 1
    return_logps: bool = True
    """Ask for the log-prob of each id, which costs the server time."""


@dataclass(frozen=True, eq=False)
class Generation:
    """One sample of a request."""

    ids: NDArray[np.int32]
    """[tokens] as generated, with the token that ended it (stop token, end of sequence, or the last token of a
    stop string)."""
    logps: NDArray[np.float32] | None
    """[tokens] natural log-prob of each id, of the logits divided by the temperature and before top-p cuts, at
    temperature 0 of the plain logits; None if they were not asked for."""
    finish: Finish
    """`stop`: ended by itself; `length`: cut by max_tokens or the context length; `abort`: by the server."""
    text: str
    """`ids` decoded without special tokens, up to and with the stop string."""
    seed: int
    """The seed of this sample."""


def sample_seed(seed: int, index: int) -> int:
    """Seed of sample `index` of a request, in [0, 2^63); sample 0 has the request's own seed."""
    if index == 0:
        return seed
    digest = hashlib.blake2b(f"{seed}:{index}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


class Engine(Protocol):
    """A serving engine, used from one event loop."""

    @property
    def capacity(self) -> int:
        """Samples worth having in flight at once, over all servers."""
        ...

    async def check_model(self, model: Path) -> None:
        """Refuse (ValueError) servers that do not serve the model in this Hugging Face folder."""
        ...

    async def load_weights(self, model: Path) -> None:
        """Make every server serve the weights in this Hugging Face folder; none is sampled from before that."""
        ...

    async def generate(self, request: GenerateRequest) -> list[Generation]:
        """Sample `num_samples` continuations.

        Raises:
            RequestRejected: the request is wrong.
            RolloutError: it failed after all retries; `NoWorkerLeft` if no server answers any more.
        """
        ...
