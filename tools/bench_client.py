"""Benchmarks the client of SGLang servers (CPU time, throughput) against a bare aiohttp loop.

    python tools/bench_client.py [--output-tokens N] [--samples N]

A server in its own process answers /generate at once with replies of the form of sglang 0.5.23. Both sides send it the
same requests, with the one that fills the prefix cache before several samples; the bare loop parses the replies with
orjson and checks nothing. They take turns, after a warm-up. Ratios are megavar / bare loop, of CPU time in this process
and of requests a second, each the median over pairs of turns; the server takes CPU time of its own.
"""

import argparse
import asyncio
import itertools
import json
import multiprocessing
import re
import statistics
import tempfile
import time
from collections.abc import Awaitable, Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import aiohttp
import numpy as np
import orjson
from rich.console import Console
from rich.table import Table

from megavar.rollout.engine import GenerateRequest, Generation, sample_seed
from megavar.rollout.requests import run_requests
from megavar.rollout.sglang_client import SGLangEngine
from megavar.rollout.sglang_replies import sampling_params

VOCAB_SIZE = 151_936
TIMEOUT_SECONDS = 60.0


class Replies(asyncio.Protocol):
    """One connection of the server; `sample` is what it answers for each sample asked for."""

    def __init__(self, model: str, samples: dict[bool, bytes]) -> None:
        self._fixed = {
            b"/model_info": orjson.dumps({"model_path": model, "weight_version": "default"}),
            b"/server_info": b"{}",
        }
        self._samples, self._received = samples, bytearray()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Keep where to answer."""
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        """Answer every request that is complete."""
        self._received += data
        while (end := self._received.find(b"\r\n\r\n") + 4) > 3:
            length = re.search(rb"content-length: (\d+)", self._received[:end], re.IGNORECASE)
            stop = end + (int(length[1]) if length else 0)
            if len(self._received) < stop:
                return
            status, reply = self._answer(bytes(self._received[:end]).split(b" ", 2)[1], bytes(self._received[end:stop]))
            head = f"HTTP/1.1 {status}\r\ncontent-type: application/json\r\ncontent-length: {len(reply)}\r\n\r\n"
            self._transport.write(head.encode() + reply)
            del self._received[:stop]

    def _answer(self, path: bytes, body: bytes) -> tuple[str, bytes]:
        if path != b"/generate":
            return "200 OK", self._fixed[path]
        if f'"{VOCAB_SIZE}":'.encode() in body:  # the check of the vocabulary
            return "400 Bad Request", orjson.dumps({"error": {"message": "logit_bias: no such token"}})
        num_samples = body.count(b'"sampling_seed"')
        if not num_samples:
            return "200 OK", sample_reply(0, with_logps=False)
        sample = self._samples[b'"return_logprob":true' in body]
        return "200 OK", b"[" + b",".join([sample] * num_samples) + b"]"


def sample_reply(num_tokens: int, with_logps: bool) -> bytes:
    """One sample of /generate's reply, as sglang 0.5.23 writes it."""
    random = np.random.default_rng(0)
    ids, logps = random.integers(0, VOCAB_SIZE, num_tokens).tolist(), (-random.exponential(1, num_tokens)).tolist()
    meta: dict[str, Any] = {
        "id": "0" * 32,
        "finish_reason": {"type": "length", "length": num_tokens},
        "prompt_tokens": 512,
        "weight_version": "default",
        "num_retractions": 0,
    }
    if with_logps:
        rows = [[float(np.float32(logp)), token, None] for logp, token in zip(logps, ids, strict=True)]
        meta |= {"input_token_logprobs": [], "output_token_logprobs": rows, "output_token_logprobs_length": num_tokens}
    meta |= {"completion_tokens": num_tokens, "cached_tokens": 0, "e2e_latency": 1.25}
    return orjson.dumps({"text": "word" * num_tokens, "output_ids": ids, "meta_info": meta})


def serve(connection: Connection, model: str, num_tokens: int) -> None:
    """Main function of the server's process: sends its port, and answers until the pipe is closed."""

    async def main() -> None:
        samples = {with_logps: sample_reply(num_tokens, with_logps) for with_logps in (False, True)}
        loop = asyncio.get_running_loop()
        server = await loop.create_server(lambda: Replies(model, samples), "127.0.0.1", 0, backlog=1024)
        connection.send(server.sockets[0].getsockname()[1])
        await loop.run_in_executor(None, connection.poll, None)

    asyncio.run(main())


def bodies(request: GenerateRequest) -> Iterator[dict[str, Any]]:
    """What is posted for one request."""
    prompt_ids = np.asarray(request.prompt_ids).tolist()
    if request.num_samples > 1:
        yield {"input_ids": prompt_ids, "sampling_params": {"max_new_tokens": 0}}
    seeds = [sample_seed(request.seed, index) for index in range(request.num_samples)]
    yield {
        "input_ids": [prompt_ids] * len(seeds),
        "sampling_params": [sampling_params(request, seed) for seed in seeds],
        "return_logprob": request.return_logps,
    }


@dataclass(frozen=True)
class Cost:
    """Of one turn."""

    cpu_seconds: float
    """Of this process."""
    seconds: float
    num_tokens: int
    """Generated, as the side counts them."""


async def timed(run: Awaitable[int]) -> Cost:
    """Cost of a coroutine that returns the number of generated tokens."""
    cpu, wall = time.process_time(), time.perf_counter()
    num_tokens = await run
    return Cost(time.process_time() - cpu, time.perf_counter() - wall, num_tokens)


async def bare_loop(url: str, requests: list[GenerateRequest], in_flight: int) -> Cost:
    """Post the requests and parse the replies."""
    pending, num_tokens = iter(requests), 0

    async def run_some(http: aiohttp.ClientSession) -> None:
        nonlocal num_tokens
        for request in pending:
            for body in bodies(request):
                headers = {"Content-Type": "application/json"}
                async with http.post(f"{url}/generate", data=orjson.dumps(body), headers=headers) as response:
                    answers = orjson.loads(await response.read())
            num_tokens += sum(len(answer["output_ids"]) for answer in answers)

    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as http:

        async def run() -> int:
            await asyncio.gather(*(run_some(http) for _ in range(in_flight)))
            return num_tokens

        return await timed(run())


async def our_client(url: str, model: Path, requests: list[GenerateRequest], in_flight: int) -> Cost:
    """The same by the client of the sampling stage."""
    engine = SGLangEngine(
        [url],
        concurrency=in_flight * requests[0].num_samples,
        request_timeout_seconds=TIMEOUT_SECONDS,
        max_retries=0,
        deterministic=False,
    )
    received: list[list[Generation]] = []

    async def run() -> int:
        await run_requests(
            engine,
            enumerate(requests),
            lambda _, generations: received.append(generations),
            description="bench",
            total=len(requests),
        )
        return sum(len(generation.ids) for generations in received for generation in generations)

    async with engine:
        await engine.check_model(model)
        return await timed(run())


def main() -> None:
    """Run both sides in turn for every concurrency, with and without log-probs, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompt-tokens", type=int, default=512)
    parser.add_argument("--output-tokens", type=int, default=512)
    parser.add_argument("--samples", type=int, default=4, help="of each request")
    parser.add_argument("--requests", type=int, default=384, help="of each turn")
    parser.add_argument("--in-flight", type=int, nargs="+", default=[32, 128], help="requests")
    parser.add_argument("--turns", type=int, default=9, help="of each side")
    chosen = parser.parse_args()
    table = Table("in flight", "log-probs", "CPU ms", "bare", "ratio", "requests/s", "bare", "ratio")
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as name:
        (Path(name) / "config.json").write_text(json.dumps({"vocab_size": VOCAB_SIZE}))
        connection, child_end = context.Pipe()
        server = context.Process(target=serve, args=(child_end, name, chosen.output_tokens), daemon=True)
        server.start()
        url = f"http://127.0.0.1:{connection.recv()}"
        for in_flight, with_logps in itertools.product(chosen.in_flight, (True, False)):
            random = np.random.default_rng(0)
            requests = [
                GenerateRequest(
                    random.integers(0, VOCAB_SIZE, chosen.prompt_tokens).astype(np.int32),
                    max_tokens=chosen.output_tokens,
                    temperature=1.0,
                    seed=index,
                    num_samples=chosen.samples,
                    return_logps=with_logps,
                )
                for index in range(chosen.requests)
            ]
            turns: list[tuple[Cost, Cost]] = []
            for _ in range(1 + chosen.turns):
                ours = asyncio.run(our_client(url, Path(name), requests, in_flight))
                turns.append((ours, asyncio.run(bare_loop(url, requests, in_flight))))
            expected = len(requests) * chosen.samples * chosen.output_tokens
            assert all(side.num_tokens == expected for turn in turns for side in turn)
            del turns[0]
            cpu = [statistics.median(turn[side].cpu_seconds for turn in turns) for side in (0, 1)]
            wall = [statistics.median(turn[side].seconds for turn in turns) for side in (0, 1)]
            table.add_row(
                str(in_flight),
                "yes" if with_logps else "no",
                *(f"{1000 * seconds / len(requests):.2f}" for seconds in cpu),
                f"{statistics.median(ours.cpu_seconds / bare.cpu_seconds for ours, bare in turns):.2f}",
                *(f"{len(requests) / seconds:,.0f}" for seconds in wall),
                f"{statistics.median(bare.seconds / ours.seconds for ours, bare in turns):.2f}",
            )
        connection.close()
        server.kill()
        server.join()
    console = Console()
    console.print(table)
    console.print("CPU ms: of this process, for one request")


if __name__ == "__main__":
    main()
