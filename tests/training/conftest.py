"""Launches the engine worker under torchrun."""

import json
import os
import pickle
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from megavar.records import TrainSequence

WORKER = Path(__file__).with_name("engine_worker.py")
Launch = Callable[..., subprocess.CompletedProcess]


@pytest.fixture(scope="session")
def launch_engine(tmp_path_factory: pytest.TempPathFactory) -> Launch:
    """launch(cases, sequences, ranks): runs the cases on that many gloo ranks and expects success."""

    def launch(cases: Sequence[dict], sequences: Sequence[TrainSequence], ranks: int) -> subprocess.CompletedProcess:
        folder = tmp_path_factory.mktemp("launch")
        (folder / "sequences.pkl").write_bytes(pickle.dumps(list(sequences)))
        (folder / "cases.json").write_text(
            json.dumps([{"sequences": str(folder / "sequences.pkl"), **case} for case in cases])
        )
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
        done = subprocess.run(
            [*torchrun, str(WORKER), str(folder / "cases.json")],
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"},
            capture_output=True,
            text=True,
            timeout=600,
        )
        assert done.returncode == 0, (done.stdout + done.stderr)[:6000]
        return done

    return launch
