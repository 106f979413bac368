"""The real sglang-router, started in front of SGLang servers."""

import os
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from helpers.tiny_serving import CONFIG

from megavar.rollout.sglang_servers import free_port

# It imports sglang for tracing if there is one; beside a CPU build of torch that import fails with other errors than
# ImportError, which is the only one that sglang_router/mini_lb.py expects.
START = "import sys; sys.modules['sglang'] = None; from sglang_router.launch_router import main; main()"
START_SECONDS = 120


@contextmanager
def router_of(urls: list[str], api_key: str, folder: Path) -> Iterator[str]:
    """Base URL of a router in front of the servers at `urls`, once it knows that all of them are healthy."""
    port, log = free_port(), folder / "router.log"
    command = [
        CONFIG.python, "-c", START, "--worker-urls", *urls, "--host", "127.0.0.1", "--port", str(port),
        "--prometheus-port", str(free_port()), "--api-key", api_key, "--worker-startup-check-interval", "1",
    ]  # fmt: skip
    with log.open("w") as output:
        process = subprocess.Popen(command, stdout=output, stderr=output, env={**os.environ, "NO_COLOR": "1"})
    try:
        url = f"http://127.0.0.1:{port}"
        wait_until_ready(url, len(urls), process, log)
        yield url
    finally:
        process.kill()
        process.wait()


def wait_until_ready(url: str, num_servers: int, process: subprocess.Popen[bytes], log: Path) -> None:
    """Return once all servers are known to the router."""
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline and process.poll() is None:
        try:
            with urllib.request.urlopen(url + "/readiness") as response:
                if f'"healthy_workers":{num_servers}' in response.read().decode():
                    return
        except OSError:  # not listening yet, or HTTP 503
            pass
        time.sleep(0.2)
    raise AssertionError(f"the router did not start:\n{log.read_text()[-2000:]}")
