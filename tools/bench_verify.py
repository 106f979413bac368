"""Verdicts a second: plain numbers, expressions, and programs in the sandbox, against math-verify called directly.

    python tools/bench_verify.py

The pool of two workers judges answers of each kind; the baseline is math-verify's own parse and verify in this process,
one answer after the other, which decides nothing that the pool does not decide. Kinds are timed in turn, after a
warm-up. Memory and CPU time of this process are measured while plain numbers stream through it.
"""

import argparse
import logging
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator

from rich.console import Console
from rich.table import Table

from megavar.verifiers import get_verifier
from megavar.verifiers.pool import VerifyJob, verify_all
from megavar.verifiers.sandbox import Sandbox

EXPRESSIONS = (
    ("x^2+{n}x+1", "{n}x+x^2+1"), ("\\sqrt{{{n}}}", "\\sqrt{{{n}}}+0"), ("\\frac{{x}}{{{n}}}", "x/{n}"),
    ("(1,{n})", "(1,{n}.0)"), ("\\{{1,{n}\\}}", "{n},1"), ("x>{n}", "({n},\\infty)"),
)  # fmt: skip


def numbers(count: int) -> Iterator[tuple[str, str]]:
    """Integers, decimals, fractions and powers of ten; every third one is wrong."""
    for index in range(count):
        n = 1000 + index
        answer, gold = (
            (f"{n}", f"{n}"), (f"{n}.0", f"{n}"), (f"\\frac{{{n}}}{{7}}", f"{n}/7"),
            (f"{n}\\times 10^{{3}}", f"{n}000"),
        )[index % 4]  # fmt: skip
        yield f"so the answer is \\boxed{{{answer}}}.", gold if index % 3 else f"{gold}1"


def expressions(count: int) -> Iterator[tuple[str, str]]:
    """What needs a parser."""
    for index in range(count):
        answer, gold = EXPRESSIONS[index % len(EXPRESSIONS)]
        yield f"so \\boxed{{{answer.format(n=2 + index)}}}", gold.format(n=2 + index)


def jobs(kind: str, pairs: Iterator[tuple[str, str]]) -> Iterator[VerifyJob]:
    """Jobs of one verifier."""
    return (VerifyJob(get_verifier(kind), response, gold) for response, gold in pairs)


def pool_rate(kind: str, pairs: Iterator[tuple[str, str]], workers: int) -> tuple[float, float]:
    """What the pool takes.

    Returns:
        Verdicts a second, from the first to the last, so without the workers' start; and CPU seconds of this process
        for 100,000 answers, with making them here.
    """
    first = last = 0.0

    def keep(index: int, verdict: str) -> None:
        nonlocal first, last
        last = time.perf_counter()
        first = first or last

    started = time.process_time()
    count = verify_all(jobs(kind, pairs), workers, 60.0, keep)
    return (count - 1) / (last - first), 1e5 * (time.process_time() - started) / count


def direct_rate(pairs: Iterator[tuple[str, str]]) -> float:
    """Answers a second that math-verify parses and compares here."""
    from math_verify import parse, verify

    logging.getLogger("math_verify").setLevel(logging.ERROR)
    verify(parse("\\boxed{x}", parsing_timeout=None), parse("\\boxed{y}", parsing_timeout=None), timeout_seconds=None)
    count, started = 0, time.perf_counter()
    for response, gold in pairs:
        expected = parse(f"\\boxed{{{gold}}}", parsing_timeout=None)
        verify(expected, parse(response, parsing_timeout=None), timeout_seconds=None)
        count += 1
    return count / (time.perf_counter() - started)


def sandbox_seconds(count: int) -> tuple[float, float]:
    """Median seconds of an empty program in the sandbox, and of the bare interpreter, taken in turn."""
    times: tuple[list[float], list[float]] = ([], [])
    bare = [sys.executable, "-P", "-s", "-S", "-X", "utf8", "-c", "pass"]
    for index in range(2 * count):
        started = time.perf_counter()
        if index % 2:
            subprocess.run(bare, check=True, stdout=subprocess.PIPE)
        else:
            with Sandbox("pass") as sandbox:
                sandbox.run("")
        times[index % 2].append(time.perf_counter() - started)
    return statistics.median(times[0]), statistics.median(times[1])


def main() -> None:
    """Time every kind and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--numbers", type=int, default=20_000)
    parser.add_argument("--expressions", type=int, default=300)
    parser.add_argument("--programs", type=int, default=40)
    parser.add_argument("--workers", type=int, default=2)
    chosen = parser.parse_args()
    table = Table("answers", "count", "pool, a second", "math-verify, a second", "ratio")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    rate, cpu_seconds = pool_rate("math", numbers(chosen.numbers), chosen.workers)
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    baseline = direct_rate(numbers(min(chosen.numbers, 2000)))
    table.add_row("plain numbers", f"{chosen.numbers:,}", f"{rate:,.0f}", f"{baseline:,.0f}", f"{rate / baseline:.1f}")
    rate, _ = pool_rate("math", expressions(chosen.expressions), chosen.workers)
    baseline = direct_rate(expressions(chosen.expressions))
    table.add_row(
        "expressions", f"{chosen.expressions:,}", f"{rate:,.0f}", f"{baseline:,.0f}", f"{rate / baseline:.1f}"
    )
    console = Console()
    console.print(table)
    boxed, bare = sandbox_seconds(chosen.programs)
    console.print(
        f"one program in the sandbox {1000 * boxed:.1f} ms, the same interpreter without it {1000 * bare:.1f} ms: "
        f"{1000 * (boxed - bare):.1f} ms for the sandbox"
    )
    console.print(
        f"over {chosen.numbers:,} streamed answers this process grew by {grown / 1024:.1f} MiB and took "
        f"{cpu_seconds:.1f} s of CPU for every 100,000"
    )


if __name__ == "__main__":
    main()
