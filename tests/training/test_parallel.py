"""Waiting ranks sleep, and a failure of rank 0 ends all of them with one message."""

import contextlib
import sys
import time
from pathlib import Path

import pytest
from helpers.ranks import run_ranks

from megavar import ranks
from megavar.cli import reported
from megavar.config.schema import ParallelConfig
from megavar.training import megatron_on_cpu, parallel


def wait_then_fail(folder: Path) -> None:
    """Rank 0 works for three seconds, then fails; every rank leaves its times, what it printed and its exit code."""

    def fail() -> None:
        raise ValueError("the servers are gone")

    def work() -> None:
        parallel.start(ParallelConfig())
        before, began = time.process_time(), time.monotonic()
        ranks.on_rank_zero(lambda: time.sleep(3))
        times = f"{time.process_time() - before} {time.monotonic() - began}"
        (folder / f"times-{ranks.is_rank_zero()}").write_text(times)
        ranks.on_rank_zero(fail)

    with contextlib.redirect_stdout((folder / "printed").open("a")):
        code = reported(work)
        sys.stdout.close()
    (folder / f"code-{ranks.is_rank_zero()}").write_text(str(code))


def test_ranks_wait_without_burning_a_core_and_fail_with_rank_zero(tmp_path):
    run_ranks(2, wait_then_fail, tmp_path)
    used, waited = map(float, (tmp_path / "times-False").read_text().split())
    assert waited >= 2.9 and used < 0.3
    codes = {(tmp_path / f"code-{is_rank_zero}").read_text() for is_rank_zero in (True, False)}
    assert codes == {"2"}  # whichever torchrun sees first says that it was a mistake
    assert (tmp_path / "printed").read_text() == "error: the servers are gone\n"


@pytest.mark.skipif(megatron_on_cpu.torch.cuda.is_available(), reason="nothing is retargeted where CUDA is present")
def test_a_megatron_that_no_longer_fits_is_refused_by_module(monkeypatch):
    monkeypatch.setattr(megatron_on_cpu, "_retargeted", False)
    monkeypatch.setattr(megatron_on_cpu, "_MODULES_NAMING_CUDA", ("packed_seq_params",))
    with pytest.raises(RuntimeError, match=r"megatron\.core\.packed_seq_params .* no longer names 'cuda'"):
        megatron_on_cpu.retarget_megatron()


def test_retargeting_reaches_nested_code_and_counts():
    def outer() -> str:
        def inner() -> tuple[str, str]:
            return "cuda", "other"

        return inner()[0]

    code, count = megatron_on_cpu._retarget_code(outer.__code__)
    outer.__code__ = code
    assert count == 1 and outer() == "cpu"
