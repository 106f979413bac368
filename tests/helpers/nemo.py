"""The environment with NeMo-Run, and executors for its tests."""

from pathlib import Path

import pytest

NEMO_PYTHON = Path(__file__).parents[2] / ".venv-nemo" / "bin" / "python"
needs_nemo = pytest.mark.skipif(not NEMO_PYTHON.exists(), reason="no .venv-nemo (make nemo)")

EXECUTORS = """
import nemo_run as run

def two_nodes(nodes=2, time="0:10:00", **more):
    return run.SlurmExecutor(
        account="tests", partition="low", nodes=nodes, time=time, cpus_per_task=4, signal="TERM@90", **more
    )

def here(ranks=2, **more):
    return run.LocalExecutor(ntasks_per_node=ranks, **more)

def four_ranks():
    return here(4)

def three_ranks():
    return here(3)

def two_local_nodes():
    return here(nodes=2)

def wrong_key():
    return two_nodes(partitoin="low")

def restarted():
    return two_nodes(retries=3)

def launched():
    return two_nodes(launcher="torchrun")

def by_ssh():
    return two_nodes(tunnel=run.SSHTunnel(host="login", user="me", job_dir="/jobs"))

def text():
    return "two_nodes"
"""
