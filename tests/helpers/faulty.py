"""A server in front of a real one that breaks on demand: the faults a healthy server cannot be made to show."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import aiohttp
from aiohttp import web

from megavar.rollout.sglang_servers import free_port


@dataclass
class Faulty:
    """Forwards everything to `target`, but lets the next requests to /generate fail as `faults` says."""

    target: str
    faults: list[str] = field(default_factory=list)
    """Each `500` or `reset`; used up from the front."""
    always: str | None = None
    """The fault of every request once `faults` is used up."""
    num_generate: int = 0
    url: str = ""

    async def handle(self, request: web.Request) -> web.StreamResponse:
        if request.path == "/generate" and b"logit_bias" not in await request.read():  # the check's requests pass
            self.num_generate += 1
            fault = self.faults.pop(0) if self.faults else self.always
            if fault == "500":
                return web.Response(status=500, text="provoked")
            if fault == "reset":
                assert request.transport is not None
                request.transport.abort()
                return web.Response()
        async with (
            aiohttp.ClientSession() as http,
            http.request(
                request.method,
                self.target + request.path,
                data=await request.read(),
                headers={name: request.headers.get(name, "") for name in ("content-type", "authorization")},
            ) as answer,
        ):
            return web.Response(status=answer.status, body=await answer.read())


@asynccontextmanager
async def in_front_of(target: str, faults: list[str] | None = None, always: str | None = None) -> AsyncIterator[Faulty]:
    """A faulty server while the context lasts."""
    faulty = Faulty(target, faults or [], always)
    app = web.Application()
    app.router.add_route("*", "/{path:.*}", faulty.handle)
    serving = web.AppRunner(app)
    await serving.setup()
    port = free_port()
    await web.TCPSite(serving, "127.0.0.1", port).start()
    faulty.url = f"http://127.0.0.1:{port}"
    try:
        yield faulty
    finally:
        await serving.cleanup()
