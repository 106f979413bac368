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
    assert [row["loop"] for row in rows["plain"]] == ["megavar", "plain Megatron"]
    settings = {row["settings"]: row["padding"] for row in rows["settings"]}
    assert settings["many lengths"] == 0 < settings["many lengths, pack_length=fixed"] < 0.6
    assert not any("error" in row for found in rows.values() for row in found)
    assert rows["curves"][0]["last loss"] < rows["curves"][0]["first loss"]
    assert "| fp32 |" in (tmp_path / "gpu_kit.md").read_text()


def in_kit(code: str, folder: Path) -> str:
    """What code that has imported the kit, and the folder as `out`, prints."""
    code = (
        "import sys; sys.path.insert(0, 'tools'); import gpu_kit\n"
        f"from pathlib import Path; out = Path({str(folder)!r})\n{code}"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    return done.stdout.strip()


def test_a_section_that_fails_is_reported_and_the_next_one_runs(tmp_path):
    status = in_kit("print(gpu_kit.measured('no_such_section', out, None)['status'])", tmp_path)
    assert status == "failed with exit code 2, see no_such_section.log"
    assert "invalid choice" in (tmp_path / "no_such_section.log").read_text()


def test_a_row_that_fails_leaves_the_others(tmp_path):
    code = "def fail(): raise MemoryError('all of it')\n"
    code += "print(gpu_kit.attempt({'precision': 'bf16'}, fail), gpu_kit.attempt({}, lambda: {'s': 1}))"
    assert in_kit(code, tmp_path) == "{'precision': 'bf16', 'error': 'MemoryError: all of it'} {'s': 1}"


def test_a_section_out_of_time_is_ended_with_what_it_started_and_keeps_its_rows(tmp_path):
    section = tmp_path / "section.py"
    section.write_text(
        "import pathlib, subprocess, sys, time\n"
        "pathlib.Path(sys.argv[4]).write_text('[1]')\n"
        "print(subprocess.Popen(['sleep', '600']).pid, flush=True)\n"
        "time.sleep(600)\n"
    )
    code = f"gpu_kit.__file__ = {str(section)!r}; gpu_kit.LEAST_SECONDS = 0; print(gpu_kit.measured('speed', out, 5))"
    assert in_kit(code, tmp_path) == "{'status': 'not done within 5 s', 'rows': [1]}"
    process = Path("/proc") / (tmp_path / "speed.log").read_text().strip() / "stat"
    assert not process.exists() or ") Z " in process.read_text()
    assert in_kit("print(gpu_kit.measured('speed', out, 5))", tmp_path).startswith("{'status': 'not begun")
