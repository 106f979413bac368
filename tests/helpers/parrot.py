"""An engine without a model, for tests of what is around it."""

import asyncio
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from megavar.rollout.engine import Generation

BASE = Path(__file__).parents[2] / "examples" / "base" / "qwen3-tiny"


class Parrot:
    """An engine that thinks the same of every question, longer in later samples, and answers 2."""

    def __init__(self) -> None:
        self.tokenizer = Tokenizer.from_file(str(BASE / "tokenizer.json"))

    async def generate(self, request):
        thinks = bool(request.stop or request.stop_token_ids)
        return [self._continue(request, "7+3\n" * n + "0\n</think>" if thinks else "\\boxed{2}", n)
                for n in range(request.num_samples)]  # fmt: skip

    def _continue(self, request, text, n):
        ids = np.array(self.tokenizer.encode(text, add_special_tokens=False).ids, np.int32)
        logps = np.full(len(ids), -0.5, np.float32) if request.return_logps else None
        return Generation(ids, logps, "stop", text, request.seed + n)

    @property
    def capacity(self) -> int:
        return 4


class ParrotService:
    """In place of `RolloutService`, without servers."""

    def __init__(self, *_):
        pass

    def on_nodes(self, work):
        work()

    def start_early(self):
        pass

    def end_stage(self):
        pass

    def close(self):
        pass

    def run(self, model, work):
        return asyncio.run(work(Parrot()))
