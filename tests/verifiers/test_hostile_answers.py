"""Answers made to hang, to crash, to run code or to pass: judged in real workers, soon, and none of them correct."""

import statistics
import time
from pathlib import Path

import pytest

from megavar.verifiers import get_verifier
from megavar.verifiers.expression_size import is_too_large
from megavar.verifiers.pool import VerifyJob, verify_all

CODE = "__import__('os').system('touch MARKER')"
HOSTILE = [
    "9^9^9^9",
    "9^{9^{9^{9}}}",
    "9^{9^{9}}",
    "((((9^9)^9)^9)^9)^9",
    "9**9**9**9",
    "10^{10^{10}}",
    "2^{1000000000}",
    "(2^{999})^{999}",
    "e^{e^{e^{e^{10}}}}",
    "\\exp(\\exp(\\exp(\\exp(10))))",
    "99999!",
    "(10!)!",
    "100!!!!",
    "((5!)!)!",
    "\\sum_{n=1}^{10^{12}} n",
    "\\sum_{n=1}^{1000000000000} \\frac{1}{n^2}",
    "\\prod_{n=1}^{10^9} n",
    "\\sum_{i=1}^{99999}\\sum_{j=1}^{99999} ij",
    "\\lim_{n\\to 10^{99}} n!",
    "\\binom{1000000000}{500000000}",
    "\\dbinom{10^9}{10^8}",
    "{" * 5000 + "4" + "}" * 5000,
    "(" * 5000 + "4" + ")" * 5000,
    "\\frac{1}{" * 400 + "4" + "}" * 400,
    "\\sqrt{" * 1000 + "4" + "}" * 1000,
    "\\left(" * 500 + "4" + "\\right)" * 500,
    "1" * 100_000,
    "0." + "3" * 50_000,
    "1e999999999",
    "10^{-999999999}",
    "+".join(["1"] * 20_000),
    "x+" * 3000 + "x",
    "4" + " " * 1_000_000,
    "\\text{" + "4" * 10_000 + "}",
    "\\int" * 200 + " x dx",
    "\\int_0^{10^9} e^{x^{x^{x}}} dx",
    "\\begin{pmatrix}" + "1&" * 5000 + "1\\end{pmatrix}",
    "\\begin{matrix}" + "1\\\\" * 5000 + "\\end{matrix}",
    "\\sqrt[99999999]{4}",
    "\\log_{10^{-300}}{4}",
    "\\sin(10^{99999999})",
    "(x+y+z)^{999999}",
    "4^{0.5^{0.5^{0.5^{0.5}}}}",
    "\\{" + "1," * 50_000 + "1\\}",
    "\\boxed{" * 20_000,
    "}" * 50_000,
    "\\" * 9999,
    "$" * 9999,
    "\u202e4",
    "\0004",
    CODE,
    f"\\text{{{CODE}}}",
    f"eval({CODE!r})",
    f"\\operatorname{{{CODE}}}",
    "lambda: 4",
    "[4 for x in [4]]",
    "(4).__class__.__mro__",
    "\\input{/etc/passwd}",
    "\\neg 4",
    "\\leq 4",
    "\\approx 4",
    "\\neq 4",
    "\\not= 4",
    "\\sim 4",
    "> 4",
    "\u2248 4",
    "\\left< 4",
    "$\\geq$ 4",
]


def test_hostile_answers_are_judged_quickly_and_pass_or_run_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert len(HOSTILE) >= 60
    jobs = [VerifyJob(get_verifier("math"), f"so \\boxed{{{answer}}}", "4") for answer in HOSTILE]
    jobs += [VerifyJob(get_verifier("math"), answer, "4") for answer in HOSTILE if "4" not in answer]
    verdicts: dict[int, str] = {}
    ends: list[float] = []
    started = time.monotonic()

    def keep(index: int, verdict: str) -> None:
        verdicts[index] = verdict
        ends.append(time.monotonic() - started)

    assert verify_all(jobs, 2, 10.0, keep) == len(jobs)
    assert [jobs[index].response[:80] for index, verdict in verdicts.items() if verdict == "correct"] == []
    seconds = [later - earlier for earlier, later in zip([ends[0], *ends], ends, strict=False)]
    slow = [(jobs[index].response[:60], verdict) for index, verdict in verdicts.items() if verdict == "timeout"]
    print(f"median {statistics.median(seconds):.3f} s, in all {ends[-1] - ends[0]:.1f} s, time-outs {slow}")
    assert statistics.median(seconds) < 0.2 and len(slow) <= 2
    assert not Path("MARKER").exists() and list(tmp_path.iterdir()) == []


HONEST = [
    ("2^{100}", "1267650600228229401496703205376"),
    ("10^{50}", "1" + "0" * 50),
    ("20!", "2432902008176640000"),
    ("\\binom{100}{50}", "100891344545564193334812497256"),
    ("x^{10}-1", "x^{10}-1"),
    ("e^{2\\pi i/3}", "e^{\\frac{2\\pi i}{3}}"),
    ("(x-1)^{10}(x-2)^{20}", "(x-2)^{20}(x-1)^{10}"),
    ("2^{3^{4}}", "2^{81}"),
    ("\\sum_{k=1}^{10} k", "55"),
    ("\\left(\\left(\\frac{1}{2}\\right)^2+\\left(\\frac{1}{3}\\right)^2\\right)", "\\frac{13}{36}"),
    ("-4", "-4"),
    ("x \\leq 4", "x \\leq 4"),
    ("\\pm 4", "\\pm 4"),
    ("4.0", "4"),
    ("3^{2000}", "3^{2000}"),
    ("1,2,3,4,5,6,7,8,9,10", "10,9,8,7,6,5,4,3,2,1"),
    ("\\frac{1}{1+\\frac{1}{1+\\frac{1}{2}}}", "\\frac{3}{5}"),
]


@pytest.mark.parametrize(("answer", "gold"), HONEST)
def test_honest_answers_are_not_too_large(answer, gold):
    assert not is_too_large(answer, gold)
    assert get_verifier("math")(f"\\boxed{{{answer}}}", gold) == "correct"


def test_an_answer_over_the_limits_that_is_the_known_one_is_correct():
    assert get_verifier("math")("\\boxed{ 9^{9^{9^9}} }", "9^{9^{9^9}}") == "correct"
    assert get_verifier("math")("\\boxed{9^{9^{9^8}}}", "5") == "wrong"
