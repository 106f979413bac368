"""The GPU kit's short form runs all its sections on CPUs, and one that fails does not take the others with it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def kit(*arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "tools/gpu_kit.py", "--dry", *arguments],
        cwd=ROOT, capture_output=True, text=True, check=False,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"},
    )  # fmt: skip


@pytest.mark.slow
def test_every_section_measures_on_cpus_in_short(tmp_path):
    done = kit("--out", str(tmp_path))
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((tmp_path / "gpu_kit.json").read_text())
    rows = {name: section["rows"] for name, section in found["sections"].items()}
    assert all(rows.values())
    tolerance = {"fp32": 1e-5, "bf16": 0.02}
    assert [row["precision"] for row in rows["logps"]] == list(tolerance)
    assert all(row["mean"] < tolerance[row["precision"]] for row in rows["logps"])
    assert [row["loop"] for row in rows["speed"]] == ["megavar", "plain Megatron"]
    assert rows["curves"][0]["last loss"] < rows["curves"][0]["first loss"]
    assert "| fp32 |" in (tmp_path / "gpu_kit.md").read_text()


def test_a_section_that_fails_is_reported_and_the_next_one_runs(tmp_path):
    code = (
        "import sys; sys.path.insert(0, 'tools'); import gpu_kit\n"
        "from pathlib import Path\n"
        "print(gpu_kit.measured('no_such_section', Path(sys.argv[1]), True)['status'])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "failed with exit code 2, see no_such_section.log"
    assert "invalid choice" in (tmp_path / "no_such_section.log").read_text()
