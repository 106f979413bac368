"""A short run of the fuzzer: no traceback, no half output, no hang."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_mutated_inputs_are_accepted_or_refused_in_one_line():
    command = [sys.executable, "tools/fuzz.py", "--inputs", "800", "--seed", "11"]
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert done.returncode == 0, done.stdout[-5000:]
    assert "seed 11, 800 inputs" in done.stdout
