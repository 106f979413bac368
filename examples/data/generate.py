"""Writes the questions of the demo: chains of operations on single digits, worked modulo 10, with gold traces.

    python examples/data/generate.py --out examples/data/chains

A question such as `7+3*4-8 left to right mod 10` has the trace `7+3=0`, `0*4=0`, `0-8=2`, a line each, and the answer
2. Answers and solutions are always right. The traces are of mixed quality, as those of distilled data are: a step may
slip in the way people slip (then the final answer is right nevertheless, it just does not follow), be left out,
or be done wrong first and then again. The output depends on the flags only; no question occurs twice.
"""

import argparse
import json
import os
import random
from collections.abc import Iterable, Iterator
from pathlib import Path

NUM_OPERATIONS = (3, 4, 5)
SLIP_PROBABILITY = 0.15
"""Of each step. A trace of four steps is then free of slips in about one case of two."""
SKIP_PROBABILITY = 0.04
DETOUR_PROBABILITY = 0.04


def apply(left: int, operator: str, right: int) -> int:
    """The step's result modulo 10."""
    return {"+": left + right, "-": left - right, "*": left * right}[operator] % 10


def slip(left: int, operator: str, right: int) -> int:
    """What a step gives that is done carelessly: carried one too much, subtracted backwards, added for multiplied."""
    return {"+": left + right + 1, "-": right - left, "*": left + right}[operator] % 10


def write_trace(start: int, steps: list[tuple[str, int]], rng: random.Random) -> str:
    """One line a step, each beginning with the result of the line before; of mixed quality."""
    lines, value = [], start
    for index, (operator, right) in enumerate(steps):
        restated, correct = f"{value}{operator}{right}=", apply(value, operator, right)
        wrong = slip(value, operator, right)
        draw = rng.random()
        if draw < SLIP_PROBABILITY:
            lines.append(f"{restated}{wrong}")
            value = wrong
            continue
        value = correct
        if draw < SLIP_PROBABILITY + SKIP_PROBABILITY and index < len(steps) - 1:
            continue
        if draw > 1 - DETOUR_PROBABILITY and wrong != correct:
            lines.append(f"{restated}{wrong} no")
        lines.append(f"{restated}{correct}")
    return "".join(line + "\n" for line in lines)


def questions(rng: random.Random) -> Iterator[dict[str, str]]:
    """Endlessly, questions that all differ."""
    seen: set[str] = set()
    while True:
        start = rng.randrange(10)
        steps = [(rng.choice("+-*"), rng.randrange(10)) for _ in range(rng.choice(NUM_OPERATIONS))]
        chain = str(start) + "".join(f"{operator}{right}" for operator, right in steps)
        if chain in seen:
            continue
        seen.add(chain)
        answer = start
        for operator, right in steps:
            answer = apply(answer, operator, right)
        yield {
            "question": f"{chain} left to right mod 10",
            "answer": str(answer),
            "solution": f"\n\\boxed{{{answer}}}",
            "trace": write_trace(start, steps, rng),
            "verifier": "math",
            "source": "chains_mod_10",
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
    parser.add_argument("--num-train", type=int, default=4000)
    parser.add_argument("--num-eval", type=int, default=400)
    parser.add_argument("--seed", type=int, default=1)
    chosen = parser.parse_args()
    for flag, number in (("--num-train", chosen.num_train), ("--num-eval", chosen.num_eval)):
        if number < 1:
            parser.error(f"{flag}={number} is too small; give at least 1 question.")
    chosen.out.mkdir(parents=True, exist_ok=True)
    stream = questions(random.Random(chosen.seed))
    # The held-out questions come first, so that they stay the same when --num-train changes.
    for split, number in (("eval", chosen.num_eval), ("train", chosen.num_train)):
        rows = [{"id": f"{split}-{index:05d}", **next(stream)} for index in range(number)]
        write_jsonl(chosen.out / f"{split}.jsonl", rows)
        print(f"{chosen.out / f'{split}.jsonl'}: {number} questions")


if __name__ == "__main__":
    main()
