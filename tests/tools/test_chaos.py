"""A short campaign of kills: nothing lost, doubled or different, and nothing left."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
@pytest.mark.sglang
def test_killed_runs_end_as_undisturbed_ones(tmp_path):
    command = [sys.executable, "tools/chaos.py", "--kills", "4", "--seed", "5", "--out", str(tmp_path / "chaos")]
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert done.returncode == 0, done.stdout[-5000:]
    result = json.loads((tmp_path / "chaos" / "chaos.json").read_text())
    assert result["kills"] == 4 and result["problems"] == []
