"""torchrun's agent of one node."""

import socket
import sys

from megavar.launch.agent import Nodes, start_ranks
from megavar.stopping import RUN_AGAIN


def test_a_taken_port_is_one_line_and_asks_for_another_start(capfd, monkeypatch):
    monkeypatch.setenv("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "600")  # which is set, and restored after the test
    with socket.create_server(("", 0)) as server:
        store = f"127.0.0.1:{server.getsockname()[1]}"
        assert start_ranks(1, Nodes(1, 0, store, "job"), sys.executable, "-c", "pass") == RUN_AGAIN
    assert capfd.readouterr().out == (
        f"error: {store}: another process has taken the port; the next start chooses another one\n"
    )
    assert start_ranks(1, Nodes(1, 0, store, "job"), sys.executable, "-c", "pass") == 0
