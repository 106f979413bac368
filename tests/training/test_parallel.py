"""Waiting ranks sleep, and a failure of rank 0 ends all of them with one message."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from megavar.training import device


def test_ranks_wait_without_burning_a_core_and_fail_with_rank_zero(tmp_path):
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*torchrun, str(Path(__file__).with_name("waiting_worker.py")), str(tmp_path / "out")],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    used, waited = map(float, (tmp_path / "out").read_text().split())
    assert waited >= 2.9 and used < 0.3
    assert done.returncode != 0
    assert done.stdout.count("error: the servers are gone") == 1


@pytest.mark.skipif(device.torch.cuda.is_available(), reason="nothing is retargeted where CUDA is present")
def test_a_megatron_that_no_longer_fits_is_refused_by_module(monkeypatch):
    monkeypatch.setattr(device, "_retargeted", False)
    monkeypatch.setattr(device, "_MODULES_NAMING_CUDA", ("packed_seq_params",))
    with pytest.raises(RuntimeError, match=r"megatron\.core\.packed_seq_params .* no longer names 'cuda'"):
        device.retarget_megatron()


def test_retargeting_reaches_nested_code_and_counts():
    def outer() -> str:
        def inner() -> tuple[str, str]:
            return "cuda", "other"

        return inner()[0]

    code, count = device._retarget_code(outer.__code__)
    outer.__code__ = code
    assert count == 1 and outer() == "cpu"
