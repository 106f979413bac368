"""Generates questions about chains of single-digit operations modulo 10, with gold traces.

    python examples/data/generate.py --out examples/data/chains [--task chains|unknown]

`chains`, the demo's task: `7+3*4-8 left to right mod 10` has the answer 2. Each line of its trace is the remaining
chain after a step: `7+3*4-8`, `0*4-8`, `0-8`, `2`. Answers and solutions are always correct. Traces are of mixed
quality, like distilled data: a step may contain a human-like slip (the answer is still correct, although it does not
follow), be skipped, or be done wrong and then corrected.

`unknown`, hard to search but easy once the answer is known: `?*3+4=9 left to right mod 10` asks for the only digit that
fits, 5. Half of the gold traces try the correct digit first, as someone who knows the answer would (`5*3+4`, `5+4`,
`9=9`); the others first try wrong digits and reject them (`3=9 no`).

The output is deterministic given the flags and contains no duplicate questions.
"""

import argparse
import json
import os
import random
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

NUM_OPERATIONS = (3, 4)
SLIP_PROBABILITY = 0.2
"""Per step, like the next and `DETOUR_PROBABILITY`."""
SKIP_PROBABILITY = 0.04
UNKNOWN_OPERATIONS = (2, 3)
SEARCH_PROBABILITY = 0.5
"""Fraction of the gold traces of `unknown` that try wrong digits first."""
MAX_TRIES = 4
"""Digits tried in such a trace, the correct one included."""
DETOUR_PROBABILITY = 0.04

Step = tuple[str, int]
"""An operator and its right operand."""


def calculate(left: int, operator: str, right: int) -> int:
    """Result of one step, modulo 10."""
    return {"+": left + right, "-": left - right, "*": left * right}[operator] % 10


def slip(left: int, operator: str, right: int) -> int:
    """Wrong result of a careless step: off by one, subtraction reversed, addition instead of multiplication."""
    return {"+": left + right + 1, "-": right - left, "*": left + right}[operator] % 10


def write_chain(start: int, steps: list[Step]) -> str:
    """Format a chain as one line of text."""
    return str(start) + "".join(f"{operator}{right}" for operator, right in steps)


def write_trace(start: int, steps: list[Step], rng: random.Random) -> str:
    """Gold trace of mixed quality: the chain, then the remaining chain after each step, one line each."""
    value, text = start, write_chain(start, steps) + "\n"
    for done, (operator, right) in enumerate(steps, start=1):
        correct, wrong = calculate(value, operator, right), slip(value, operator, right)
        draw = rng.random()
        if draw < SLIP_PROBABILITY:
            value = wrong
        else:
            value = correct
            draw -= SLIP_PROBABILITY
            if draw < SKIP_PROBABILITY and done < len(steps):
                continue
            if SKIP_PROBABILITY <= draw < SKIP_PROBABILITY + DETOUR_PROBABILITY and wrong != correct:
                text += f"{write_chain(wrong, steps[done:])} no\n"
        text += f"{write_chain(value, steps[done:])}\n"
    return text


def question(text: str, answer: int, trace: str, source: str) -> dict[str, str]:
    """Fields of a question, except its id."""
    solution = f"\n\\boxed{{{answer}}}"
    named = {"question": text, "answer": str(answer), "solution": solution, "trace": trace}
    return {**named, "verifier": "math", "source": source}


def chain_questions(rng: random.Random) -> Iterator[dict[str, str]]:
    """Infinite stream of distinct `chains` questions."""
    seen: set[str] = set()
    while True:
        start = rng.randrange(10)
        steps = [(rng.choice("+-*"), rng.randrange(10)) for _ in range(rng.choice(NUM_OPERATIONS))]
        chain = write_chain(start, steps)
        if chain in seen:
            continue
        seen.add(chain)
        answer = start
        for operator, right in steps:
            answer = calculate(answer, operator, right)
        trace = write_trace(start, steps, rng)
        yield question(f"{chain} left to right mod 10", answer, trace, "chains_mod_10")


def work_out(digit: int, steps: list[Step]) -> tuple[str, int]:
    """Work out a chain with this first digit: its lines without the last one, and its result."""
    value, lines = digit, ""
    for done, (operator, right) in enumerate(steps):
        lines += write_chain(value, steps[done:]) + "\n"
        value = calculate(value, operator, right)
    return lines, value


def unknown_questions(rng: random.Random) -> Iterator[dict[str, str]]:
    """Infinite stream of distinct `unknown` questions; every operation is invertible, so exactly one digit fits."""
    seen: set[str] = set()
    operations = [(operator, right) for operator in "+-" for right in range(1, 10)]
    operations += [("*", right) for right in (3, 7, 9)] * 3
    while True:
        digit, steps = rng.randrange(10), [rng.choice(operations) for _ in range(rng.choice(UNKNOWN_OPERATIONS))]
        last, target = work_out(digit, steps)
        text = f"?{write_chain(digit, steps)[1:]}={target} left to right mod 10"
        if text in seen:
            continue
        seen.add(text)
        tries = ""
        if rng.random() < SEARCH_PROBABILITY:
            wrong = [other for other in range(10) if other != digit]
            for other in rng.sample(wrong, rng.randint(1, MAX_TRIES - 1)):
                lines, value = work_out(other, steps)
                tries += f"{lines}{value}={target} no\n"
        yield question(text, digit, f"{tries}{last}{target}={target}\n", "unknown_mod_10")


TASKS: dict[str, Callable[[random.Random], Iterator[dict[str, str]]]] = {
    "chains": chain_questions,
    "unknown": unknown_questions,
}


def write_jsonl(file: Path, rows: Iterable[dict[str, str]]) -> None:
    """Write one JSON object per line, atomically."""
    temporary = file.with_name(file.name + ".part")
    temporary.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    os.replace(temporary, file)


def main() -> None:
    """Parse the flags and write train.jsonl and eval.jsonl."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder to write to")
    parser.add_argument("--task", choices=TASKS, default="chains")
    parser.add_argument("--num-train", type=int, default=3000)
    parser.add_argument("--num-eval", type=int, default=400)
    parser.add_argument("--seed", type=int, default=1)
    chosen = parser.parse_args()
    for flag, number in (("--num-train", chosen.num_train), ("--num-eval", chosen.num_eval)):
        if not 1 <= number <= 1_000_000:
            parser.error(f"{flag}={number} is out of range; use 1 to 1,000,000.")
    chosen.out.mkdir(parents=True, exist_ok=True)
    questions = TASKS[chosen.task](random.Random(chosen.seed))
    # Held-out questions are generated first, so they do not depend on --num-train.
    for split, number in (("eval", chosen.num_eval), ("train", chosen.num_train)):
        file = chosen.out / f"{split}.jsonl"
        write_jsonl(file, ({"id": f"{split}-{index:05d}", **next(questions)} for index in range(number)))
        print(f"{file}: {number} questions")


if __name__ == "__main__":
    main()
