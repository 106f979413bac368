"""What SGLang servers are told over HTTP and what they answer: one exchange, its failures, and the samples of a reply.

Written against sglang 0.5.23 and sglang-router 0.3.2. Which server is asked, and when again, is for `sglang_client.py`.
"""

import struct
from typing import Any

import aiohttp
import numpy as np
import orjson

from megavar.records import TokenIds
from megavar.rollout.engine import GenerateRequest, Generation, RequestRejected, RolloutError

HEALTH_TIMEOUT_SECONDS = 30.0  # /health generates a token, and waits up to 20 s for it
MAX_REPLY_BYTES = 2**28
READ_BUFFER_BYTES = 2**21  # aiohttp stops and starts reading whenever twice this is unread; its 64 KiB are little
MAX_LOGP = 1e-3
"""Rounding may put the log-prob of a certain token a little above 0."""


class ServerFault(Exception):
    """A try failed by the server's or the network's fault; `broken` if the server itself seems to be gone."""

    def __init__(self, message: str, broken: bool) -> None:
        super().__init__(message)
        self.broken = broken


class NotFound(RequestRejected):
    """The server does not know this path."""


class Exchanges:
    """HTTP exchanges with servers and routers, between `open` and `close`.

    Args:
        api_key: sent with every request; None: none is.
        timeout_seconds: deadline of a POST.
    """

    def __init__(self, api_key: str | None, timeout_seconds: float) -> None:
        self._api_key = api_key
        self._timeout_seconds = timeout_seconds

    async def open(self) -> None:
        """Get ready; in the event loop of all exchanges."""
        # The caller bounds what is in flight. Idle connections are dropped before the server does (uvicorn: after 5 s):
        # a request sent on one that it is just closing would look like a dying server.
        authorization = {} if self._api_key is None else {"Authorization": f"Bearer {self._api_key}"}
        self._http = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=2.0),
            headers={**authorization, "Content-Type": "application/json"},
            cookie_jar=aiohttp.DummyCookieJar(),
            read_bufsize=READ_BUFFER_BYTES,
            trust_env=False,
        )

    async def close(self) -> None:
        """Drop all connections."""
        await self._http.close()

    async def info(self, url: str, path: str, *keys: str) -> dict[str, Any]:
        """What the server says of itself: an object with these keys."""
        info = await self.get(url, path)
        if not isinstance(info, dict) or not info.keys() >= set(keys):
            wanted = f" with {', '.join(keys)}" if keys else ""
            raise RolloutError(f"{url}{path} answered {str(info)[:200]!r}, expected an object{wanted}")
        return info

    async def get(self, url: str, path: str, timeout_seconds: float = HEALTH_TIMEOUT_SECONDS) -> Any:
        """What a server answers to a GET; see `_send`."""
        return await self._send("GET", url + path, None, timeout_seconds)

    async def post(self, url: str, path: str, body: Any, timeout_seconds: float | None = None) -> Any:
        """What it answers to a POST, by default within the deadline of a request; see `_send`."""
        return await self._send("POST", url + path, body, timeout_seconds or self._timeout_seconds)

    async def _send(self, method: str, url: str, body: Any, timeout_seconds: float) -> Any:
        """One HTTP exchange.

        Raises:
            RequestRejected: on a 4xx status, with the server's message.
            ServerFault: on a 5xx status, a broken connection, a time-out, or an answer cut short.
        """
        timeout = aiohttp.ClientTimeout(total=timeout_seconds)
        try:
            data = None if body is None else orjson.dumps(body)
            async with self._http.request(method, url, data=data, timeout=timeout, allow_redirects=False) as response:
                text = await read_body(response)
                if response.status >= 500 or response.status in (408, 429):
                    raise ServerFault(
                        f"{url}: HTTP {response.status}: {text[:500].decode(errors='replace')!r}", broken=False
                    )
                if response.status == 401:
                    raise RequestRejected(
                        f"{url}: HTTP 401, the server wants an API key and got "
                        f"{'none' if self._api_key is None else 'another one'}; see rollout.api_key_env and "
                        "rollout.api_key_file."
                    )
                if response.status == 404:
                    raise NotFound(f"{url}: HTTP 404: {error_message(text)}")
                if response.status >= 300:
                    raise RequestRejected(f"{url}: HTTP {response.status}: {error_message(text)}")
                return orjson.loads(text) if text else None
        except TimeoutError as error:
            raise ServerFault(f"{url}: no answer within {timeout_seconds:g} s", broken=False) from error
        except (aiohttp.ClientError, ConnectionError) as error:
            raise ServerFault(f"{url}: {type(error).__name__}: {error}", broken=True) from error
        except orjson.JSONDecodeError as error:
            raise ServerFault(
                f"{url}: the answer is not JSON: {text[:200].decode(errors='replace')!r}", broken=False
            ) from error


def listed_servers(answer: Any, router: str) -> list[str]:
    """Base URLs in a router's answer to /workers.

    Raises:
        ValueError: it lists none, or one that cannot be asked over HTTP.
    """
    advice = "give the base URLs of its servers in rollout.worker_urls"
    try:
        urls = [str(worker["url"]) for worker in answer["workers"]]
    except (TypeError, KeyError) as error:
        raise ValueError(f"{router}/workers answered {str(answer)[:200]!r}, expected workers; {advice}.") from error
    if not urls:
        raise ValueError(f"the router {router} has no servers; start it with --worker-urls.")
    for url in urls:  # gRPC has its own scheme, and ranks of data parallelism follow an @
        if not url.startswith(("http://", "https://")) or "@" in url:
            raise ValueError(f"the router {router} lists {url!r:.200}, which cannot be asked over HTTP; {advice}.")
    return urls


def sampling_params(request: GenerateRequest, seed: int) -> dict[str, Any]:
    """SGLang's sampling parameters of one sample."""
    return {
        "max_new_tokens": request.max_tokens,
        "temperature": request.temperature,
        "top_p": request.top_p,
        "sampling_seed": seed,
        "stop_token_ids": list(request.stop_token_ids) or None,
        "stop": list(request.stop) or None,
        "no_stop_trim": True,  # the text keeps the stop string, as the ids do
    }


async def read_body(response: aiohttp.ClientResponse) -> bytes:
    """Body of an answer; raises ServerFault if it is larger than any answer to us can be."""
    chunks, num_bytes = [], 0
    async for chunk in response.content.iter_any():
        chunks.append(chunk)
        num_bytes += len(chunk)
        if num_bytes > MAX_REPLY_BYTES:
            raise ServerFault(f"{response.url}: the answer has more than {MAX_REPLY_BYTES:,} bytes", broken=False)
    return b"".join(chunks)


def read_generation(answer: dict[str, Any], request: GenerateRequest, seed: int, vocab_size: int) -> Generation:
    """One sample of /generate's answer.

    Raises:
        RolloutError: the answer contradicts itself, or the model computed NaN.
        ValueError, KeyError, TypeError: it is not of the form of a sample.
    """
    meta, ids, logps, text = answer["meta_info"], answer["output_ids"], None, answer["text"]
    tokens = _token_ids(ids, vocab_size)
    if len(tokens) > request.max_tokens:
        raise ValueError(f"{len(tokens)} tokens, more than max_new_tokens={request.max_tokens}")
    if not isinstance(text, str):
        raise ValueError("text is not a string")
    if request.return_logps:
        rows = meta["output_token_logprobs"]
        if ids != [token for _, token, _ in rows]:
            raise RolloutError(
                f"SGLang's log-probs are of other tokens than its output: {rows[:5]!s:.300} against {ids[:5]}"
            )
        logps = np.array([logp for logp, _, _ in rows], dtype=np.float32)
        if len(logps) and not (logps.min() > -np.inf and logps.max() <= MAX_LOGP):  # NaN is either, where there is one
            raise ValueError("log-probs that are not finite, or positive")
    finish = meta["finish_reason"]
    if finish.get("matched") == "NaN happened" and "NaN happened" not in request.stop:
        # sglang/srt/managers/schedule_batch.py, _check_vocab_boundary_finish: it replaces the token and says "stop"
        raise RolloutError("the served model computes NaN; check the checkpoint, or serve it in another dtype.")
    if finish["type"] not in ("stop", "length", "abort"):
        raise ValueError(f"finish reason {finish['type']!r:.50}")
    return Generation(ids=tokens, logps=logps, finish=finish["type"], text=text, seed=seed)


def _token_ids(ids: Any, vocab_size: int) -> TokenIds:
    """Ids of a reply as [tokens] int32; raises ValueError if they are anything else."""
    try:
        if not isinstance(ids, list) or bool in map(type, ids[:1]):
            raise ValueError
        tokens = np.empty(len(ids), dtype=np.int32)
        struct.pack_into(
            f"{len(ids)}i", tokens.data, 0, *ids
        )  # refuses all but integers, in a third of np.array's time
        if len(tokens) and tokens.view(np.uint32).max() >= vocab_size:  # unsigned, a negative one is large
            raise ValueError
    except (ValueError, struct.error):
        raise ValueError("output_ids are not tokens of the vocabulary") from None
    return tokens


def error_message(body: bytes) -> str:
    """The message in an error answer, or the answer itself."""
    try:
        error = orjson.loads(body)
        error = error.get("error", error.get("message", error))
        return str(error["message"] if isinstance(error, dict) and "message" in error else error)
    except (ValueError, AttributeError):
        return body[:1000].decode(errors="replace")
