"""Managed SGLang servers: started for a run in SGLang's own interpreter, restarted when they die, stopped with it.

`sglang_launcher.py` starts SGLang, each server on its own slice of the visible devices, with an API key that all
requests must name. Each runs under `watchdog.py`, so none outlives this process. What they serve after a restart is the
model they were started with; `SGLangEngine` notices and loads the current weights again.
"""

import asyncio
import json
import logging
import os
import random
import secrets
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from types import TracebackType

import aiohttp

from megavar.config.schema import RolloutConfig
from megavar.ranks import environment_without_torchrun
from megavar.rollout.engine import RolloutError
from megavar.rollout.gpu_memory import require_free_memory
from megavar.rollout.sglang_client import SGLangEngine, read_vocab_size
from megavar.rollout.sglang_launcher import KEY
from megavar.rollout.sglang_replies import HEALTH_TIMEOUT_SECONDS
from megavar.rollout.watchdog import remove_stale_folders

logger = logging.getLogger(__name__)

FOLDER = Path(__file__).resolve().parent
PORTS = range(20_000, 32_768)
"""Below Linux's ephemeral range, so that no outgoing connection takes the port while SGLang loads."""
PORT_TRIES = 4
MAX_RESTARTS = 3
"""Of one server in a run."""
POLL_SECONDS = 0.5
STOP_SECONDS = 10.0
"""Limit of waiting for killed processes, which may have much memory to give back."""
LOG_TAIL_LINES = 30
BIND_ERROR = "error while attempting to bind on address"
"""In the log of a server whose port was taken while it loaded (uvicorn, asyncio)."""
CPU_MAX_TOTAL_TOKENS = 65_536
"""Size of the KV cache on CPU if the configuration names none: SGLang would take most of the memory."""


class ServerDied(RolloutError):
    """A server process ended before it was healthy."""

    def __init__(self, message: str, log_tail: str) -> None:
        super().__init__(
            f"{message} See docs/troubleshooting.md#server-does-not-start. The end of its log:\n{log_tail}"
        )
        self.port_taken = "already in use" in log_tail.lower()


class Server:
    """One server process; its URL stays the same over restarts."""

    def __init__(
        self, index: int, config: RolloutConfig, model: Path, log_dir: Path, gpus: list[str], api_key: str
    ) -> None:
        self._config, self._model = config, model
        self._gpus, self._api_key = gpus, api_key
        self.log = log_dir / f"server_{index:02d}.log"
        self.name = f"SGLang server {index}"
        self.port = 0
        self.num_restarts = 0
        self._process: subprocess.Popen[bytes] | None = None
        self._log_start = 0
        self._reviving = asyncio.Lock()

    @property
    def url(self) -> str:
        """Base URL; of this machine only."""
        return f"http://127.0.0.1:{self.port}"

    @property
    def pid(self) -> int:
        """Process id of the watchdog, which is the id of the server's process group too."""
        assert self._process is not None, f"{self.name} was not started"
        return self._process.pid

    async def start(self) -> None:
        """Start the process, if `spawn` has not, and wait until it is healthy; with another port if ours was taken."""
        for tries_left in reversed(range(PORT_TRIES)):
            if self._process is None:
                self.spawn()
            try:
                return await self._wait_until_healthy()
            except ServerDied as error:
                if not (error.port_taken and tries_left):
                    raise
                logger.warning("%s: port %d was taken while it started; trying another.", self.name, self.port)

    def spawn(self) -> None:
        """Start the process on a free port, without waiting for it."""
        self.port = free_port()
        self._launch()

    async def revive(self) -> None:
        """Restart the server if it is dead or does not answer; return once it is healthy.

        Raises:
            RolloutError: it was restarted MAX_RESTARTS times already, or does not start.
        """
        async with self._reviving:
            if self._alive() and await self._healthy():
                return
            if self.num_restarts >= MAX_RESTARTS:
                raise RolloutError(f"{self.name} was restarted {MAX_RESTARTS} times and died again; see {self.log}.")
            self.num_restarts += 1
            logger.warning("%s is dead; restart %d of %d (%s).", self.name, self.num_restarts, MAX_RESTARTS, self.log)
            await self.stop()
            self._launch()
            await self._wait_until_healthy()

    def _launch(self) -> None:
        server = self._command()
        command = [sys.executable, "-I", "-S", str(FOLDER / "watchdog.py"), str(os.getpid()), *server]
        own: dict[str, str] = {}
        if self._gpus:
            own["CUDA_VISIBLE_DEVICES"] = ",".join(self._gpus)
        longest = extended_length(self._model)
        if longest and (self._config.context_length or 0) <= longest:
            # SGLang takes max_position_embeddings for the limit, which is less where YaRN was switched on afterwards.
            own["SGLANG_ALLOW_OVERWRITE_LONGER_CONTEXT_LEN"] = "1"
        self.log.parent.mkdir(parents=True, exist_ok=True)
        with self.log.open("ab") as log:
            # What starts the server by hand too, as the watchdog's command would not.
            by_hand = [*(f"{name}={value}" for name, value in own.items()), *server]
            log.write(f"\n$ {shlex.join(by_hand)}\n".encode())
            log.flush()
            self._log_start = log.tell()
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env={**inherited_environment(), **own, KEY: self._api_key},
                start_new_session=True,
            )

    def _command(self) -> list[str]:
        config = self._config
        command = [config.python, str(FOLDER / "sglang_launcher.py")]
        dtype, max_total_tokens = config.dtype, config.max_total_tokens
        if not self._gpus:
            command += ["--device", "cpu"]
            dtype = cpu_dtype(dtype, self._model)
            max_total_tokens = max_total_tokens or CPU_MAX_TOTAL_TOKENS
        options = {
            "--model-path": self._model.resolve(),
            "--host": "127.0.0.1",
            "--port": self.port,
            "--dtype": dtype,
            "--tensor-parallel-size": config.tensor_parallel_size,
            "--max-total-tokens": max_total_tokens,
            "--context-length": config.context_length or extended_length(self._model),
            "--mem-fraction-static": config.mem_fraction,
        }
        for option, value in options.items():
            if value is not None:
                command += [option, str(value)]
        # Without it each scheduler polls on one core for as long as it lives.
        command.append("--sleep-on-idle")
        if self._gpus and config.between_stages == "release":
            command.append("--enable-memory-saver")
        if config.deterministic:
            command.append("--enable-deterministic-inference")
        return command + config.server_args

    def _alive(self) -> bool:
        return self._process is not None and self._process.poll() is None

    async def _healthy(self) -> bool:
        timeout = aiohttp.ClientTimeout(total=HEALTH_TIMEOUT_SECONDS)
        try:
            async with aiohttp.ClientSession(timeout=timeout) as http, http.get(self.url + "/health") as response:
                return response.status == 200
        except (aiohttp.ClientError, ConnectionError, TimeoutError):
            return False

    async def _wait_until_healthy(self) -> None:
        """Return once the process serves; if it does not, it is stopped."""
        try:
            await self._poll_health()
        except BaseException:
            await self.stop()
            raise

    async def _poll_health(self) -> None:
        start = time.monotonic()
        healthy = False
        while not healthy:
            probe = asyncio.create_task(self._healthy())
            try:
                while not (await asyncio.wait([probe], timeout=POLL_SECONDS))[0]:
                    self._check_start(start)
                self._check_start(start)
                healthy = probe.result()
            finally:
                probe.cancel()
            if not healthy:
                await asyncio.sleep(POLL_SECONDS)
        logger.info("%s serves %s at %s after %.0f s.", self.name, self._model, self.url, time.monotonic() - start)

    def _check_start(self, start: float) -> None:
        tail = self._log_tail()
        if not self._alive():
            raise ServerDied(f"{self.name} ended before it was healthy ({self.log}).", tail)
        if BIND_ERROR in tail:  # SGLang lives on then, without serving
            raise ServerDied(f"{self.name} could not listen on port {self.port} ({self.log}).", tail)
        limit_seconds = self._config.start_timeout_seconds
        if time.monotonic() - start > limit_seconds:
            reason = f"was not healthy after rollout.start_timeout_seconds={limit_seconds:g}"
            raise ServerDied(f"{self.name} {reason} ({self.log}).", tail)

    def _log_tail(self) -> str:
        """Of the current process only."""
        with self.log.open(errors="replace") as log:
            log.seek(self._log_start)
            return "".join(log.readlines()[-LOG_TAIL_LINES:])

    async def stop(self) -> None:
        """End the server, whatever it is doing."""
        if self._process is None:
            return
        self.kill()
        deadline = time.monotonic() + STOP_SECONDS
        while self._alive() and time.monotonic() < deadline:
            await asyncio.sleep(0.05)
        group = self._process.pid
        while group_exists(group) and time.monotonic() < deadline + STOP_SECONDS:  # the watchdog was killed, or hangs
            with suppress(ProcessLookupError):
                os.killpg(group, signal.SIGKILL)
            await asyncio.sleep(0.05)
        remove_stale_folders()
        self._process = None

    def kill(self) -> None:
        """Have the watchdog kill the server and clean up, without waiting for it."""
        if self._process is not None:
            self._process.terminate()
            self._process.send_signal(signal.SIGCONT)  # a stopped one could not


class ManagedServers:
    """The servers of one run; use it with `async with`, which starts and stops them.

    Args:
        config: rollout section; `mode` and `urls` are not looked at.
        model: Hugging Face folder to serve.
        log_dir: gets `server_NN.log`.

    Raises:
        ValueError: before anything is started, if the interpreter, the model or the devices are not there.
        RolloutError: likewise, if others hold the memory of the devices.
    """

    def __init__(self, config: RolloutConfig, model: Path, log_dir: Path) -> None:
        check_interpreter(config.python)
        read_vocab_size(model)  # refuses a folder that is no model
        slices = device_slices(visible_gpus(), config.num_servers, config.tensor_parallel_size)
        require_free_memory([gpu for gpus in slices for gpu in gpus], config.mem_fraction)
        self.api_key = secrets.token_urlsafe(32)
        self.servers = [Server(index, config, model, log_dir, gpus, self.api_key) for index, gpus in enumerate(slices)]

    @property
    def urls(self) -> list[str]:
        """Base URLs, once started."""
        return [server.url for server in self.servers]

    async def restart(self, url: str) -> None:
        """Bring back the server of `url`; `SGLangEngine` calls this."""
        await next(server for server in self.servers if server.url == url).revive()

    def spawn(self) -> None:
        """Start the processes without waiting for them; entering waits."""
        for server in self.servers:
            server.spawn()

    async def __aenter__(self) -> "ManagedServers":
        try:
            await asyncio.gather(*(server.start() for server in self.servers))
        except BaseException:
            await self.stop()
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.stop()

    async def stop(self) -> None:
        """Stop every server."""
        for server in self.servers:
            server.kill()  # at once: whoever waits below may be interrupted
        await asyncio.gather(*(server.stop() for server in self.servers))


@asynccontextmanager
async def open_engine(
    config: RolloutConfig,
    model: Path,
    log_dir: Path,
    spawned: ManagedServers | None = None,
    base: Path | None = None,
) -> AsyncIterator[SGLangEngine]:
    """The engine that the configuration describes, serving `model`, checked and ready.

    External servers must serve `model` already, or `base`, or weights that an earlier run of ours loaded; these two are
    replaced.

    Args:
        spawned: managed servers of `model` that were spawned before.
        base: a model of the same architecture that external servers may have been started with.

    Raises:
        ValueError: the servers cannot be used as they are, or their key is not there.
    """

    def client(urls: list[str], api_key: str | None, servers: ManagedServers | None) -> SGLangEngine:
        return SGLangEngine(
            urls,
            api_key=api_key,
            concurrency=config.concurrency,
            request_timeout_seconds=config.request_timeout_seconds,
            max_retries=config.max_retries,
            deterministic=config.deterministic,
            restart=servers.restart if servers else None,
        )

    if config.mode == "managed":
        async with (
            spawned or ManagedServers(config, model, log_dir) as servers,
            client(servers.urls, servers.api_key, servers) as engine,
        ):
            await engine.check_model(model)
            yield engine
        return
    async with client(config.urls, external_key(config), None) as engine:
        await engine.find_servers(config.worker_urls)
        if await engine.replaceable(None if base == model else base):
            await engine.load_weights(model)
        await engine.check_model(model)
        yield engine


def external_key(config: RolloutConfig) -> str | None:
    """The API key of external servers, from the environment or a file; None if they need none.

    Raises:
        ValueError: the variable or the file is not there or holds no key, or others may read the file.
    """
    if config.api_key_env is not None:
        source, key = f"rollout.api_key_env={config.api_key_env}", os.environ.get(config.api_key_env)
        if key is None:
            raise ValueError(f"{source}, but this variable is not set; export it before the run starts.")
    elif config.api_key_file is not None:
        source, file = f"rollout.api_key_file={config.api_key_file}", Path(config.api_key_file)
        if not file.is_file():
            raise ValueError(f"{source} is no file; write the key into it, for its owner alone (chmod 600).")
        if file.stat().st_mode & 0o077:
            raise ValueError(f"{source} may be read by other users; run chmod 600 {file}.")
        key = file.read_text(errors="replace").rstrip("\r\n")
    else:
        return None
    if not (key.isascii() and key.isprintable() and key.strip() == key != ""):
        raise ValueError(f"{source} holds no key (visible characters of ASCII).")
    return key


def inherited_environment() -> dict[str, str]:
    """This process's environment, without what would mislead a server.

    Paths of this interpreter's packages must not reach the other one. What torchrun set up for its ranks must not
    either: a server that sees it waits for ever to join their process group.
    """
    of_packages = ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV")
    return {name: value for name, value in environment_without_torchrun().items() if name not in of_packages}


def check_interpreter(python: str) -> None:
    """Refuse (ValueError) an interpreter that is not there or cannot import SGLang."""
    advice = "run `make sglang`, or set rollout.python to the interpreter of an environment with SGLang"
    if shutil.which(python) is None:
        raise ValueError(f"rollout.python={python} is not an executable; {advice}.")
    # find_spec: importing sglang itself takes seconds.
    probe = "import importlib.util, sys; sys.exit(importlib.util.find_spec('sglang') is None)"
    result = subprocess.run([python, "-c", probe], capture_output=True, text=True)
    if result.returncode:
        raise ValueError(f"rollout.python={python} cannot import sglang; {advice}. {result.stderr.strip()}")


def visible_gpus() -> list[str]:
    """Devices of this process as CUDA_VISIBLE_DEVICES names them; empty on a machine without an NVIDIA GPU."""
    smi = shutil.which("nvidia-smi")
    if smi is None:
        return []
    listed = os.environ.get("CUDA_VISIBLE_DEVICES")
    if listed is not None:
        return [device.strip() for device in listed.split(",") if device.strip() not in ("", "-1")]
    result = subprocess.run([smi, "--query-gpu=index", "--format=csv,noheader"], capture_output=True, text=True)
    return result.stdout.split() if result.returncode == 0 else []


def device_slices(gpus: list[str], num_servers: int, tensor_parallel_size: int) -> list[list[str]]:
    """The devices of each server, `tensor_parallel_size` in a row; empty lists on CPU.

    Raises:
        ValueError: there are too few, or tensor parallelism is asked for on CPU.
    """
    if not gpus:
        if tensor_parallel_size > 1:
            raise ValueError(
                f"rollout.tensor_parallel_size={tensor_parallel_size} needs GPUs, and none is visible; use 1."
            )
        return [[] for _ in range(num_servers)]
    needed = num_servers * tensor_parallel_size
    if needed > len(gpus):
        raise ValueError(
            f"rollout.num_servers={num_servers} x rollout.tensor_parallel_size={tensor_parallel_size} need {needed} "
            f"GPUs, visible are {len(gpus)} ({','.join(gpus)}); lower one of them."
        )
    return [gpus[index * tensor_parallel_size :][:tensor_parallel_size] for index in range(num_servers)]


def cpu_dtype(dtype: str, model: Path) -> str:
    """On CPU, float32 for float32 weights: SGLang's `auto` would serve them as float16, which CPUs compute slowly."""
    config = json.loads((model / "config.json").read_text())
    stored = config.get("dtype", config.get("torch_dtype", "float32"))
    return "float32" if dtype == "auto" and stored == "float32" else dtype


def extended_length(model: Path) -> int | None:
    """Positions of a model with YaRN, tokens; None without it: SGLang finds the length of such a model itself."""
    from megavar.models.config_json import read_dims  # imports torch, which a command without servers does not need

    dims = read_dims(model)
    return dims.max_positions if dims.yarn else None


def free_port() -> int:
    """A port of this machine that nobody listens on now."""
    for port in random.SystemRandom().sample(PORTS, k=200):
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("127.0.0.1", port))
                return port
            except OSError:
                continue
    raise RolloutError(f"no free port in {PORTS.start}-{PORTS.stop - 1}.")


def group_exists(group: int) -> bool:
    """Whether a process of the group is left."""
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True
