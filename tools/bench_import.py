"""Rows a second of `megavar import`: made rows in Bespoke-Stratos's layout, with traces of 3,000 tokens.

    python tools/bench_import.py --rows 10000

The traces are words and numbers, 12 KB each, and every answer differs. Time and CPU are those of the whole command, its
workers included; memory is the peak of one process of it.
"""

import argparse
import json
import random
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

TRACE_CHARACTERS = 12_000
"""About 3,000 tokens: four characters a token, as in English."""


def write_rows(file: Path, count: int) -> None:
    """Questions of some 50 words whose answers are numbers, fractions and expressions."""
    draw = random.Random(1)
    words = ["".join(draw.choices("abcdefghijklmnopqrstuvwxyz", k=draw.randint(2, 9))) for _ in range(5000)]
    with file.open("w") as lines:
        for index in range(count):
            question = f"{' '.join(draw.choices(words, k=50))}: what is ${index}+{index}$?"
            answer = (str(2 * index), f"\\frac{{{2 * index}}}{{7}}", f"{index}\\sqrt{{2}}")[index % 3]
            trace = " ".join(draw.choices(words, k=TRACE_CHARACTERS // 6))[:TRACE_CHARACTERS]
            said = f"<|begin_of_thought|>\n\n{trace}\n\n<|end_of_thought|>\n\n"
            said += f"<|begin_of_solution|>\n\nSo \\boxed{{{answer}}}.\n\n<|end_of_solution|>"
            turns = [{"from": "user", "value": question}, {"from": "assistant", "value": said}]
            lines.write(json.dumps({"system": "Think first.", "conversations": turns}) + "\n")


def main() -> None:
    """Import once and print the rates."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=10_000)
    parser.add_argument(
        "arguments", nargs="*", help="of the command, after --, such as -- --max-trace-tokens 16384 ..."
    )
    chosen = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        source, target = Path(folder) / "rows.jsonl", Path(folder) / "train.jsonl"
        write_rows(source, chosen.rows)
        before, started = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
        command = [sys.executable, "-m", "megavar", "import", str(source), "--out", str(target), *chosen.arguments]
        subprocess.run(command, check=True)
        seconds = time.perf_counter() - started
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu_seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    print(
        f"{chosen.rows:,} rows in {seconds:.1f} s ({chosen.rows / seconds:,.0f} a second), {cpu_seconds:.1f} s of CPU, "
        f"peak of {after.ru_maxrss / 1024:,.0f} MiB"
    )


if __name__ == "__main__":
    main()
