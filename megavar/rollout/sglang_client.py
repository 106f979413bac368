"""Client of SGLang servers, one or many, directly or through routers in front of them.

What is said over HTTP is in `sglang_replies.py`. Every answer carries the version of the weights it was sampled
with, and is refused if that is not the version last loaded: a server that was restarted behind our back, or that a
router got meanwhile, never mixes other samples in.

Through routers go the requests for samples only; what is served is checked, loaded and watched at the servers.
"""

import asyncio
import json
import logging
import random
from collections.abc import Awaitable, Callable
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import orjson

from megavar.rollout.engine import (
    GenerateRequest,
    Generation,
    RequestRejected,
    RolloutError,
    sample_seed,
)
from megavar.rollout.sglang_replies import (
    HEALTH_TIMEOUT_SECONDS,
    Exchanges,
    NotFound,
    ServerFault,
    listed_servers,
    read_generation,
    sampling_params,
)
from megavar.rollout.workers import Worker, Workers

logger = logging.getLogger(__name__)

FIRST_BACKOFF_SECONDS = 0.5
MAX_BACKOFF_SECONDS = 30.0
CONTROL_TIMEOUT_SECONDS = 900.0  # /update_weights_from_disk reads all weights
SERVED = ("model_path", "weight_version")
LOADED_BY_US = "megavar:"  # prefix of the weight version that `load_weights` sets
WATCH_SECONDS = 5.0
"""Between two looks at the servers behind routers, which hide that one is gone."""


class SGLangEngine:
    """SGLang servers as one engine (`megavar.rollout.engine.Engine`); use it with `async with`.

    Args:
        urls: base URLs of servers, or of routers if `find_servers` is awaited before anything else.
        concurrency: samples in flight for each server.
        request_timeout_seconds: deadline of one try of a request.
        max_retries: further tries after a 5xx status, a broken connection or a time-out.
        deterministic: require servers that honour seeds.
        api_key: sent with every request; None: none is.
        restart: restarts the server of a URL that stopped answering and returns once it is healthy; None:
            somebody else does, so the server is asked from time to time.
    """

    def __init__(
        self,
        urls: list[str],
        *,
        concurrency: int,
        request_timeout_seconds: float,
        max_retries: int,
        deterministic: bool,
        api_key: str | None = None,
        restart: Callable[[str], Awaitable[None]] | None = None,
    ) -> None:
        if not urls:
            raise ValueError("urls is empty; give the base URL of at least one SGLang server.")
        self._urls = [url.rstrip("/") for url in urls]
        self._concurrency = concurrency
        self._exchanges = Exchanges(api_key, request_timeout_seconds)
        self._max_retries = max_retries
        self._deterministic = deterministic
        self._restart = restart
        self._vocab_size: int | None = None
        self._shares_prefixes = False
        self._warned_of_seeds = False
        self._weight_version: str | None = None
        self._loaded: Path | None = None
        """Folder last given to `load_weights`; None: the servers serve what they started with."""

    async def __aenter__(self) -> "SGLangEngine":
        await self._exchanges.open()
        self._workers = Workers(self._urls, self._concurrency, self._revive)
        self._routers: Workers | None = None
        self._asks_routers = False
        self._watch: asyncio.Task[None] | None = None
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._routers is not None and self._watch is not None:
            self._watch.cancel()
            await asyncio.gather(self._watch, return_exceptions=True)
            await self._routers.close()
        await self._workers.close()
        await self._exchanges.close()

    @property
    def capacity(self) -> int:
        """Samples in flight over all servers."""
        return self._concurrency * len(self._workers.all)

    # -- routers --

    async def find_servers(self, behind: list[str]) -> None:
        """Find out whether the URLs are those of routers, which then get the requests for samples and nothing else.

        Args:
            behind: base URLs of the routers' servers; empty: the URLs are asked what they are.

        Raises:
            ValueError: some are routers and some are not, or a router names no servers that can be reached.
            RolloutError: one does not answer.
        """
        self._asks_routers = not behind
        if self._asks_routers:
            found = await self._on_every_worker(self._servers_of)
            if not any(found):
                return
            if not all(found):
                kinds = ", ".join(
                    f"{url} {'a router' if of else 'none'}" for url, of in zip(self._urls, found, strict=True)
                )
                raise ValueError(f"rollout.urls must name routers or servers, not both: {kinds}.")
            behind = [url for of in found for url in of]
        servers = list(dict.fromkeys(url.rstrip("/") for url in behind))
        share = -(-self._concurrency * len(servers) // len(self._urls))
        self._routers = Workers(self._urls, share, self._revive_router)
        self._workers = Workers(servers, self._concurrency, self._revive)
        self._watch = asyncio.create_task(self._watch_servers())
        logger.info("SGLang servers behind %s: %s.", ", ".join(self._urls), ", ".join(servers))

    async def _servers_of(self, router: Worker) -> list[str]:
        """Base URLs of the servers behind a router; none if it is a server itself."""
        try:
            answer = await self._exchanges.get(router.url, "/workers")
        except NotFound:
            return []
        return listed_servers(answer, router.url)

    async def _revive_router(self, router: Worker) -> None:
        """Return once the router answers and one of its servers serves the current weights; the others get them too."""
        await self._exchanges.get(router.url, "/health")
        known = {server.url for server in self._workers.all}
        for url in await self._servers_of(router) if self._asks_routers else ():
            if url not in known:
                logger.info("SGLang router %s has a new server %s.", router.url, url)
                self._workers.add(url)
        revived = await asyncio.gather(*map(self._revive, self._workers.all), return_exceptions=True)
        failures = [failure for failure in revived if isinstance(failure, BaseException)]
        if len(failures) == len(revived):
            raise RolloutError(f"none of its servers can be used: {failures[0]}") from failures[0]

    async def _watch_servers(self) -> None:
        """Take servers that stop answering out of use, until they are back with the current weights."""
        while True:
            await asyncio.sleep(WATCH_SECONDS)
            with suppress(RequestRejected):  # something else listens there now, and can serve no sample of our weights
                await self._on_every_worker(
                    lambda server: self._exchanges.get(server.url, "/health"), must_answer=False
                )

    # -- what the servers serve --

    async def check_model(self, model: Path) -> None:
        """Check that every server serves the model in the Hugging Face folder `model`, and how it treats seeds.

        Raises:
            ValueError: other weights or another vocabulary are served, or seeds must be honoured and are not.
            RolloutError: a server does not answer.
        """
        self._vocab_size = read_vocab_size(model)
        versions = await self._on_every_worker(lambda worker: self._check_worker(worker, model))
        if len(set(versions)) > 1:
            raise ValueError(f"the SGLang servers serve different weight versions {versions}; call load_weights.")
        self._weight_version = versions[0]

    async def _check_worker(self, worker: Worker, model: Path) -> str:
        info = await self._exchanges.info(worker.url, "/model_info", *SERVED)
        served = str(info["model_path"])
        if not _same_folder(served, model):
            raise ValueError(
                f"{worker.url} serves {served!r:.300}, expected {model}; start it with --model-path "
                f"{model.resolve()}, or correct rollout.urls."
            )
        await self._check_vocabulary(worker)
        await self._check_seeds(worker)
        return str(info["weight_version"])

    async def _check_vocabulary(self, worker: Worker) -> None:
        """Compare vocabulary sizes.

        No endpoint tells the server's. Yet it must be the expected one: a prompt token outside of it is not refused
        but kills the server (IndexError in the scheduler, on CPU). The size is asked for through the validation of
        `logit_bias` (sglang/srt/sampling/sampling_params.py, `verify`), which names it when it refuses a key.
        """
        assert self._vocab_size is not None
        for token, accepted in ((self._vocab_size - 1, True), (self._vocab_size, False)):
            sampling = {"max_new_tokens": 1, "temperature": 0.0, "logit_bias": {str(token): 0.0}}
            try:
                await self._exchanges.post(worker.url, "/generate", {"input_ids": [0], "sampling_params": sampling})
                answer = None
            except RequestRejected as error:
                answer = str(error)
            if (answer is None) != accepted:
                raise ValueError(
                    f"{worker.url} has another vocabulary than the expected {self._vocab_size} rows "
                    f"({answer or f'it knows token {token}'}); serve the model that the run is configured with."
                )

    async def _check_seeds(self, worker: Worker) -> None:
        info = await self._exchanges.info(worker.url, "/server_info")
        self._shares_prefixes = not info.get("disable_radix_cache", False)
        if info.get("enable_deterministic_inference", False):
            return
        if self._deterministic:
            raise ValueError(
                f"rollout.deterministic=true, but {worker.url} runs without deterministic inference and would ignore "
                "seeds; start it with --enable-deterministic-inference or set rollout.deterministic=false."
            )
        if self._warned_of_seeds:
            return
        self._warned_of_seeds = True
        logger.warning(
            "SGLang server %s runs without deterministic inference: seeds are recorded but NOT replayable. "
            "Set rollout.deterministic=true if samples must repeat (docs/troubleshooting.md#seeds-are-not-replayable).",
            worker.url,
        )

    async def replaceable(self, base: Path | None) -> bool:
        """Whether the weights of all servers may be exchanged.

        They may if they are those of `base`, or `load_weights` loaded them, in this process or an earlier one.
        """
        infos = await self._on_every_worker(lambda worker: self._exchanges.info(worker.url, "/model_info", *SERVED))
        return all(
            str(info["weight_version"]).startswith(LOADED_BY_US)
            or (base is not None and _same_folder(str(info["model_path"]), base))
            for info in infos
        )

    async def release_memory(self) -> None:
        """Have every server give the memory of its devices back; none can be asked before `resume_memory`.

        Raises:
            RolloutError: a server did not.
        """
        await self._on_every_worker(lambda worker: self._exchanges.post(worker.url, "/release_memory_occupation", {}))

    async def resume_memory(self) -> None:
        """Undo `release_memory`; what the servers serve is undefined until `load_weights`.

        Raises:
            RolloutError: a server did not.
        """
        await self._on_every_worker(lambda worker: self._exchanges.post(worker.url, "/resume_memory_occupation", {}))

    async def load_weights(self, model: Path) -> None:
        """Load the weights in `model` into every server, drop cached prefixes, and check that all serve the same.

        No request may be in flight. A server that is out of use meanwhile gets the weights when it is back.

        Raises:
            ValueError: a server refuses them, or serves other weights afterwards.
            NoWorkerLeft: no server is left to load them.
        """
        vocab_size = read_vocab_size(model)
        if self._vocab_size is None:
            self._vocab_size = vocab_size
            await self._on_every_worker(self._check_vocabulary)
        if vocab_size != self._vocab_size:
            raise ValueError(
                f"{model} has a vocabulary of {vocab_size} rows, the served model {self._vocab_size}; weights "
                "can be exchanged within one architecture only."
            )
        self._loaded, self._weight_version = model, f"{LOADED_BY_US}{model.resolve()}"
        digests = await self._on_every_worker(self._load_worker, must_answer=False)
        if len(set(digests)) > 1:
            urls = ", ".join(worker.url for worker in self._workers.all)
            raise ValueError(f"after loading {model} the servers {urls} hold different weights.")
        async with self._workers.lease(1):  # waits for a server to come back if none was left
            await self._on_every_worker(lambda worker: self._check_worker(worker, model), must_answer=False)

    async def _load_worker(self, worker: Worker) -> str:
        assert self._loaded is not None
        body = {
            "model_path": str(self._loaded.resolve()),
            "weight_version": self._weight_version,
            "flush_cache": True,  # prefixes computed with the old weights
        }
        try:
            await self._exchanges.post(worker.url, "/update_weights_from_disk", body, CONTROL_TIMEOUT_SECONDS)
        except RequestRejected as error:
            raise ValueError(
                f"{worker.url} did not load {self._loaded}: {error}. The folder must be readable by the server."
            ) from error
        checksum = await self._exchanges.post(
            worker.url, "/weights_checker", {"action": "checksum"}, CONTROL_TIMEOUT_SECONDS
        )
        try:
            return json.dumps([rank["checksums"] for rank in checksum["ranks"]], sort_keys=True)
        except (TypeError, KeyError) as error:
            raise RolloutError(
                f"{worker.url}/weights_checker answered {str(checksum)[:200]!r}, expected checksums"
            ) from error

    async def _revive(self, worker: Worker) -> None:
        """Return once the worker is healthy; load the current weights if a restart has dropped them."""
        if self._restart is not None:
            await self._restart(worker.url)
        await self._exchanges.get(worker.url, "/health", HEALTH_TIMEOUT_SECONDS)
        if self._weight_version is None:
            return
        info = await self._exchanges.info(worker.url, "/model_info", "weight_version")
        if str(info["weight_version"]) == self._weight_version:
            return
        if self._loaded is None:
            raise RolloutError(f"serves weight version {info['weight_version']}, expected {self._weight_version}")
        await self._load_worker(worker)

    async def _on_every_worker(self, call: Callable[[Worker], Awaitable[Any]], must_answer: bool = True) -> list[Any]:
        """What `call` returns for each worker in use; one that does not answer is an error or goes out of use."""

        async def attempt(worker: Worker) -> list[Any]:
            try:
                return [await call(worker)]
            except ServerFault as fault:
                if must_answer:
                    raise RolloutError(f"{fault}; is an SGLang server running there?") from fault
                self._workers.failed(worker, str(fault), out_of_use=True)
                return []

        answers = await asyncio.gather(*(attempt(worker) for worker in self._workers.all if worker.available))
        return [answer for of_worker in answers for answer in of_worker]

    # -- sampling --

    async def generate(self, request: GenerateRequest) -> list[Generation]:
        """Sample from the least loaded server or router; see `Engine.generate`."""
        self._check_request(request)
        workers = self._routers or self._workers
        for attempt in range(self._max_retries + 1):
            if attempt:
                backoff_seconds = min(FIRST_BACKOFF_SECONDS * 2 ** (attempt - 1), MAX_BACKOFF_SECONDS)
                await asyncio.sleep(backoff_seconds * random.uniform(0.5, 1.5))
            async with workers.lease(request.num_samples) as worker:
                try:
                    generations = await self._generate_on(worker, request)
                except ServerFault as fault:
                    last_fault = fault
                    workers.failed(worker, str(fault), out_of_use=fault.broken)
                else:
                    workers.succeeded(worker)
                    return generations
        raise RolloutError(
            f"gave up after {self._max_retries + 1} tries; the last: {last_fault} "
            "(docs/troubleshooting.md#requests-fail)"
        ) from last_fault

    def _check_request(self, request: GenerateRequest) -> None:
        if self._vocab_size is None:
            raise RuntimeError("check_model must be awaited before generate.")
        if len(request.prompt_ids) == 0:
            raise RequestRejected("prompt_ids is empty; a prompt has at least one token.")
        prompt_ids = np.asarray(request.prompt_ids)
        low, high = prompt_ids.min(), prompt_ids.max()
        if low < 0 or high >= self._vocab_size:
            raise RequestRejected(
                f"prompt_ids has token {low if low < 0 else high}, outside of the served vocabulary of "
                f"{self._vocab_size} (SGLang would die of it); tokenize with the tokenizer of the served model."
            )

    async def _generate_on(self, worker: Worker, request: GenerateRequest) -> list[Generation]:
        # Written once: the samples of a request repeat it (SGLang takes no list of seeds for one prompt).
        prompt = np.ascontiguousarray(request.prompt_ids)
        prompt_ids = orjson.Fragment(orjson.dumps(prompt, option=orjson.OPT_SERIALIZE_NUMPY))
        seeds = [sample_seed(request.seed, index) for index in range(request.num_samples)]
        ask = self._ask_server if self._routers is None else self._ask_router
        answers = await ask(worker, prompt_ids, [sampling_params(request, seed) for seed in seeds], request)
        assert self._vocab_size is not None
        generations = []
        for answer, seed in zip(answers, seeds, strict=True):
            try:
                version = answer["meta_info"]["weight_version"]
                generation = read_generation(answer, request, seed, self._vocab_size)
            except (TypeError, KeyError, ValueError, AttributeError, IndexError, OverflowError) as error:
                what = f"{type(error).__name__}: {error!s:.100}"
                message = f"{worker.url} sent a malformed sample ({what}): {str(answer)[:200]!r}"
                raise ServerFault(message, broken=False) from error
            if version != self._weight_version:
                message = f"{worker.url} sampled with weight version {version}, expected {self._weight_version}"
                raise ServerFault(message, broken=True)
            generations.append(generation)
        return generations

    async def _ask_server(
        self, server: Worker, prompt_ids: orjson.Fragment, samplings: list[dict[str, Any]], request: GenerateRequest
    ) -> list[Any]:
        """Answers of a server, one for each sampling, by one HTTP request."""
        body: dict[str, Any]
        if len(samplings) > 1 and self._shares_prefixes:
            # Fills the prefix cache, so that the samples compute the prompt once. SGLang's own `n` does the same,
            # but gives all samples one seed (sglang/srt/managers/tokenizer_manager.py, _handle_batch_request).
            body = {"input_ids": prompt_ids, "sampling_params": {"max_new_tokens": 0}}
            await self._exchanges.post(server.url, "/generate", body)
        body = {
            "input_ids": [prompt_ids] * len(samplings),
            "sampling_params": samplings,
            "return_logprob": request.return_logps,
        }
        answers = await self._exchanges.post(server.url, "/generate", body)
        if not isinstance(answers, list) or len(answers) != len(samplings):
            raise ServerFault(f"{server.url} answered {str(answers)[:200]!r}, expected {len(samplings)} samples", False)
        return answers

    async def _ask_router(
        self, router: Worker, prompt_ids: orjson.Fragment, samplings: list[dict[str, Any]], request: GenerateRequest
    ) -> list[Any]:
        """Answers through a router, each by an HTTP request: it refuses lists of sampling parameters (HTTP 422)."""
        bodies = (
            {"input_ids": prompt_ids, "sampling_params": sampling, "return_logprob": request.return_logps}
            for sampling in samplings
        )
        # All are waited for, so that none is in flight any more when the request is tried again.
        answers = await asyncio.gather(
            *(self._exchanges.post(router.url, "/generate", body) for body in bodies), return_exceptions=True
        )
        for answer in answers:
            if isinstance(answer, BaseException):
                raise answer
        return answers


def _same_folder(served: str, model: Path) -> bool:
    try:
        return Path(served).resolve() == model.resolve()
    except (OSError, ValueError):  # not a path
        return False


def read_vocab_size(model: Path) -> int:
    """Embedding rows of the model in a Hugging Face folder."""
    path = model / "config.json"
    if not path.is_file():
        raise ValueError(f"{model} has no config.json; give a Hugging Face model folder.")
    return int(json.loads(path.read_text())["vocab_size"])
