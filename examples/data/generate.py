"""Writes questions about chains of operations on single digits, worked modulo 10, with gold traces.

    python examples/data/generate.py --out examples/data/chains [--task chains|unknown]

`chains`, the demo's task: `7+3*4-8 left to right mod 10` has the answer 2 and a trace whose lines are what is left of
the chain after each step: `7+3*4-8`, `0*4-8`, `0-8`, `2`. Answers and solutions are always right. Traces are of mixed
quality, as those of distilled data are: a step may slip in the way people slip (and the right answer is given
nevertheless, although it does not follow), be left out, or be done wrong first and then again.

`unknown`, hard to search and easy once the answer is known: `?*3+4=9 left to right mod 10` asks for the one digit that
fits, 5. Half of the gold traces try the right digit at once, as those of people who know the answer do (`5*3+4`, `5+4`,
`9=9`); the others try wrong ones before it, and say so (`3=9 no`).

The output depends on the flags only, and no question occurs twice.
"""

import argparse
import json
import os
import random
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

NUM_OPERATIONS = (3, 4)
SLIP_PROBABILITY = 0.2
"""Of each step."""
SKIP_PROBABILITY = 0.04
UNKNOWN_OPERATIONS = (2, 3)
SEARCH_PROBABILITY = 0.5
"""Of a gold trace of `unknown` that tries wrong digits first."""
MOST_TRIES = 4
DETOUR_PROBABILITY = 0.04

Step = tuple[str, int]
"""An operator and its right operand."""


def calculate(left: int, operator: str, right: int) -> int:
    """The step's result modulo 10."""
    return {"+": left + right, "-": left - right, "*": left * right}[operator] % 10


def slip(left: int, operator: str, right: int) -> int:
    """What a careless step gives: one too much carried, subtracted backwards, added instead of multiplied."""
    return {"+": left + right + 1, "-": right - left, "*": left + right}[operator] % 10


def write_chain(start: int, steps: list[Step]) -> str:
    """The chain as one line of text."""
    return str(start) + "".join(f"{operator}{right}" for operator, right in steps)


def write_trace(start: int, steps: list[Step], rng: random.Random) -> str:
    """The chain and what each step leaves of it, a line each; of mixed quality."""
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
    """A question's fields but its id."""
    solution = f"\n\\boxed{{{answer}}}"
    named = {"question": text, "answer": str(answer), "solution": solution, "trace": trace}
    return {**named, "verifier": "math", "source": source}


def draw_chains(rng: random.Random) -> Iterator[dict[str, str]]:
    """Endlessly, chains that all differ."""
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
    """The lines of a chain that begins with this digit, without the last one, and its value."""
    value, lines = digit, ""
    for done, (operator, right) in enumerate(steps):
        lines += write_chain(value, steps[done:]) + "\n"
        value = calculate(value, operator, right)
    return lines, value


def draw_unknowns(rng: random.Random) -> Iterator[dict[str, str]]:
    """Endlessly, chains with an unknown first digit that all differ; every step can be undone, so one digit fits."""
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
            for other in rng.sample(wrong, rng.randint(1, MOST_TRIES - 1)):
                lines, value = work_out(other, steps)
                tries += f"{lines}{value}={target} no\n"
        yield question(text, digit, f"{tries}{last}{target}={target}\n", "unknown_mod_10")


TASKS: dict[str, Callable[[random.Random], Iterator[dict[str, str]]]] = {
    "chains": draw_chains,
    "unknown": draw_unknowns,
}


def write_jsonl(file: Path, rows: Iterable[dict[str, str]]) -> None:
    """Write one JSON object a line; the file appears when it is complete."""
    aside = file.with_name(file.name + ".part")
    aside.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    os.replace(aside, file)


def main() -> None:
    """Read the flags, write train.jsonl and eval.jsonl."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder to write to")
    parser.add_argument("--task", choices=TASKS, default="chains")
    parser.add_argument("--num-train", type=int, default=3000)
    parser.add_argument("--num-eval", type=int, default=400)
    parser.add_argument("--seed", type=int, default=1)
    chosen = parser.parse_args()
    for flag, number in (("--num-train", chosen.num_train), ("--num-eval", chosen.num_eval)):
        if not 1 <= number <= 1_000_000:
            parser.error(f"{flag}={number} is out of range; give 1 to 1,000,000 questions.")
    chosen.out.mkdir(parents=True, exist_ok=True)
    questions = TASKS[chosen.task](random.Random(chosen.seed))
    # The held-out questions are drawn first, so they stay the same whatever --num-train is.
    for split, number in (("eval", chosen.num_eval), ("train", chosen.num_train)):
        file = chosen.out / f"{split}.jsonl"
        write_jsonl(file, ({"id": f"{split}-{index:05d}", **next(questions)} for index in range(number)))
        print(f"{file}: {number} questions")


if __name__ == "__main__":
    main()
