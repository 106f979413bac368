"""The serving engine of a run, over its stages: opened when first needed, kept where keeping it costs nothing.

On CPUs managed servers live from the first stage that serves to the last, and start while the stage before it runs;
new weights are loaded in place. On GPUs they hold the memory that training needs, so they end with each stage, or
release it (`rollout.between_stages`).
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Coroutine
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any, TypeVar

from megavar.config.schema import RolloutConfig
from megavar.ranks import node, on_every_node, on_rank_zero
from megavar.rollout.engine import RequestRejected, RolloutError
from megavar.rollout.sglang_client import SGLangEngine
from megavar.rollout.sglang_servers import ManagedServers, open_engine, visible_gpus
from megavar.stopping import Stopped, stop_requested

logger = logging.getLogger(__name__)

STOP_POLL_SECONDS = 0.2
Value = TypeVar("Value")


class RolloutService:
    """Gives each stage an engine that serves the model it names; each process that uses one has its own.

    Args:
        config: rollout section.
        base: a model of the architecture that will be served, for servers that start before that model exists; external
            ones may serve it.
        log_dir: gets `server_NN.log`, of later nodes in `node_NN`.
    """

    def __init__(self, config: RolloutConfig, base: Path, log_dir: Path) -> None:
        self._config, self._base = config, base
        self._log_dir = log_dir / f"node_{node():02d}" if node() else log_dir
        on_gpus = bool(visible_gpus())
        self._keeps_servers = config.mode == "managed" and not on_gpus
        self._releases = config.mode == "managed" and on_gpus and config.between_stages == "release"
        self._released = False
        self._early: ManagedServers | None = None
        self._engine: SGLangEngine | None = None
        self._served: Path | None = None
        self._loop = asyncio.Runner()  # makes its event loop when first used
        self._open = AsyncExitStack()

    def on_nodes(self, work: Callable[[], None]) -> None:
        """Run work that asks servers: on every node with its own ones, or on rank 0 if they are elsewhere."""
        (on_every_node if self._config.mode == "managed" else on_rank_zero)(work)

    def start_early(self) -> None:
        """Start the servers without waiting for them, if they may run alongside other stages."""
        if self._keeps_servers and self._early is None:
            self._early = ManagedServers(self._config, self._base, self._log_dir)
            self._early.spawn()

    def run(self, model: Path, work: Callable[[SGLangEngine], Awaitable[Value]]) -> Value:
        """What `work` returns on an engine that serves the weights in the Hugging Face folder `model`.

        Raises:
            Stopped: if this process was asked to stop; what `work` has kept by then is on disk.
        """

        async def serve() -> Value:
            if self._released:
                await self._resume()
            if self._engine is None:
                self._served = model if self._early is None else self._base
                opened = open_engine(self._config, self._served, self._log_dir, self._early, self._base)
                self._engine = await self._open.enter_async_context(opened)
            if self._served != model:
                await self._engine.load_weights(model)
                self._served = model
            return await work(self._engine)

        return self._loop.run(_until_stopped(serve()))

    async def _resume(self) -> None:
        """Give released servers their memory again; end them if one does not come back, so that new ones start."""
        assert self._engine is not None
        self._released = False
        try:
            await self._engine.resume_memory()
        except (RolloutError, RequestRejected) as error:
            logger.warning("%s; new servers are started.", error)
            await self._open.aclose()
            self._engine = None

    def end_stage(self) -> None:
        """Stop what must not outlive a stage, or have it release its memory."""
        if self._releases and self._engine is not None and not self._released:
            try:
                self._loop.run(self._engine.release_memory())
                self._released, self._served = True, None
            except (RolloutError, RequestRejected) as error:
                logger.warning("%s; the servers are stopped.", error)
                self.close()
        elif not (self._keeps_servers or self._releases):
            self.close()

    def close(self) -> None:
        """Stop the servers; nothing if there are none."""
        if self._early is not None and self._engine is None:
            self._loop.run(self._early.stop())
        if self._engine is not None:
            self._loop.run(self._open.aclose())
        self._engine = self._early = None
        self._released = False


async def _until_stopped(work: Coroutine[Any, Any, Value]) -> Value:
    task = asyncio.ensure_future(work)
    while not (await asyncio.wait([task], timeout=STOP_POLL_SECONDS))[0]:
        if stop_requested():
            task.cancel()
            await asyncio.wait([task])
            raise Stopped("all finished samples are on disk")
    return task.result()
