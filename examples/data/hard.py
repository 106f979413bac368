"""Generates questions that are hard to answer and easy once the answer is known, few of them with a trace.

    python examples/data/hard.py --task sort --out runs/sort_data [--train-levels 1 2 3]

The level is the difficulty. A policy that knows the notation, but cannot choose, is right on one trace in four at
level 1, in about thirty at level 2, and in hundreds at level 3.

`sort`: `Sort 40217 in 4 swaps` asks for swaps of neighbours, each named by the place of the left one. The
answer is their sequence, any that sorts the digits in as many swaps (`swaps.py`); the trace is what the digits are
before each swap, and the swap. Who knows the answer only carries it out; who does not must choose at each step. Levels:
1 swap of 5 digits, 3 of 5, 9 of 6.

`search`: `?*3+4=9 ?-2*7=1 left to right mod 10` asks for a number whose digits fit the chains, 53. The trace tries
numbers: it works out one chain after another and rejects a number at the first that does not come out. Half of the gold
traces try up to three wrong numbers first, the others leap to the right one. Levels: 1, 2 and 3 chains.

`train.jsonl` has the questions of a round without traces, of the training levels in turn, and after them the few with a
gold trace, of all levels; in `answers.jsonl` all have `-`. `eval_LEVEL.jsonl` are held out. The output is
deterministic given the flags; no question is held out and trained on.
"""

import argparse
import json
import os
import random
from collections.abc import Callable, Iterable, Iterator
from itertools import cycle, islice
from pathlib import Path

from generate import work_out

LEVELS = (1, 2, 3)
SORTS = {1: (5, 1), 2: (5, 3), 3: (6, 9)}
"""Level -> digits and swaps."""
OPERATIONS = 2
"""Of a chain of `search`."""
LEAP_PROBABILITY = 0.5
"""Fraction of the gold traces of `search` that begin with the right number."""
MOST_WRONG = 3
"""Wrong numbers tried in the others, at most."""

Row = dict[str, str]
"""Fields of a question, except its id."""


def inversions(digits: str) -> int:
    """Pairs in the wrong order: the least number of swaps of neighbours that sorts."""
    return sum(left > right for place, left in enumerate(digits) for right in digits[place + 1 :])


def sort_question(level: int, rng: random.Random) -> Row:
    """A question of `sort`; each swap of its gold trace is drawn from all that come nearer to the target."""
    num_digits, num_swaps = SORTS[level]
    digits = ""
    while inversions(digits) != num_swaps:
        digits = "".join(rng.sample("0123456789", num_digits))
    text, answer, trace = f"Sort {digits} in {num_swaps} swaps", "", ""
    for _ in range(num_swaps):
        place = rng.choice([place for place in range(1, num_digits) if digits[place - 1] > digits[place]])
        trace += f"{digits}:{place}\n"
        answer += str(place)
        digits = digits[: place - 1] + digits[place] + digits[place - 1] + digits[place + 1 :]
    return _row(text, answer, f"{trace}{digits}\n", "swaps:same_permutation")


def search_question(level: int, rng: random.Random) -> Row:
    """A question of `search`; every operation is invertible, so exactly one number fits."""
    operations = [(operator, right) for operator in "+-" for right in range(1, 10)]
    operations += [("*", right) for right in (3, 7, 9)] * 3
    number = "".join(rng.choice("0123456789") for _ in range(level))
    chains = [[rng.choice(operations) for _ in range(OPERATIONS)] for _ in number]
    targets = [work_out(int(digit), steps)[1] for digit, steps in zip(number, chains, strict=True)]
    tried = [number]
    if rng.random() >= LEAP_PROBABILITY:
        others = [str(other).zfill(level) for other in range(10**level)]
        others.remove(number)
        tried = [*rng.sample(others, rng.randint(1, MOST_WRONG)), number]
    trace = ""
    for candidate in tried:
        trace += f"{candidate}\n"
        for digit, steps, target in zip(candidate, chains, targets, strict=True):
            lines, value = work_out(int(digit), steps)
            trace += f"{lines}{value}={target}{'' if value == target else ' no'}\n"
            if value != target:
                break
    written = ("".join(f"{operator}{right}" for operator, right in steps) for steps in chains)
    text = " ".join(f"?{operations}={target}" for operations, target in zip(written, targets, strict=True))
    return _row(f"{text} left to right mod 10", number, trace, "text")


def _row(text: str, answer: str, trace: str, verifier: str) -> Row:
    solution = f"\n\\boxed{{{answer}}}"
    return {"question": text, "answer": answer, "solution": solution, "trace": trace, "verifier": verifier}


TASKS: dict[str, Callable[[int, random.Random], Row]] = {"sort": sort_question, "search": search_question}


def distinct(make: Callable[[int, random.Random], Row], rng: random.Random) -> Callable[[Iterable[int]], Iterator[Row]]:
    """A generator of questions of the given levels, none of which it gives twice."""
    seen: set[str] = set()

    def questions(levels: Iterable[int]) -> Iterator[Row]:
        for level in levels:
            row = make(level, rng)
            while row["question"] in seen:
                row = make(level, rng)
            seen.add(row["question"])
            yield {**row, "source": f"level {level}"}

    return questions


def write_questions(file: Path, rows: Iterable[Row]) -> None:
    """Write one JSON object per line, atomically; ids are of the file's name and the line."""
    temporary = file.with_name(file.name + ".part")
    lines = [json.dumps({"id": f"{file.stem}-{index:05d}", **row}) + "\n" for index, row in enumerate(rows)]
    temporary.write_text("".join(lines), encoding="utf-8")
    os.replace(temporary, file)
    print(f"{file}: {len(lines)} questions")


def main() -> None:
    """Parse the flags and write the files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder to write to")
    parser.add_argument("--task", choices=TASKS, required=True)
    parser.add_argument("--train-levels", type=int, nargs="+", choices=LEVELS, default=LEVELS)
    parser.add_argument("--num-train", type=int, default=600, help="questions without a trace")
    parser.add_argument("--num-gold", type=int, default=60, help="questions with one")
    parser.add_argument("--num-eval", type=int, default=30, help="of each level")
    parser.add_argument("--seed", type=int, default=1)
    chosen = parser.parse_args()
    for flag, number in (("train", chosen.num_train), ("gold", chosen.num_gold), ("eval", chosen.num_eval)):
        if not 1 <= number <= 3000:
            parser.error(f"--num-{flag}={number} is out of range; use 1 to 3,000.")
    chosen.out.mkdir(parents=True, exist_ok=True)
    questions = distinct(TASKS[chosen.task], random.Random(chosen.seed))
    # Held-out questions and gold ones are drawn first, so they do not depend on what a round trains on.
    for level in LEVELS:
        write_questions(chosen.out / f"eval_{level}.jsonl", questions([level] * chosen.num_eval))
    gold = list(questions(islice(cycle(LEVELS), chosen.num_gold)))
    of_round = questions(islice(cycle(chosen.train_levels), chosen.num_train))
    untraced = [{key: value for key, value in row.items() if key != "trace"} for row in of_round]
    write_questions(chosen.out / "train.jsonl", [*untraced, *gold])
    write_questions(chosen.out / "answers.jsonl", ({**row, "trace": "-\n"} for row in [*untraced, *gold]))


if __name__ == "__main__":
    main()
