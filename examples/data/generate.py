"""Makes the demo's questions: chains of operations modulo 10, with gold traces of mixed quality.

    python examples/data/generate.py --out runs/demo_data

A question is `7+3*4-2, left to right, mod 10`; a clean trace restates every operand, `7+3=0;0*4=0;0-2=8;`. As in
data distilled from models, a share of the traces is flawed though the final answer is right: a slip that is carried
on until the right result appears from nowhere, a step left out, or a step done wrong and then again.
"""

import argparse
import json
import os
import random
from pathlib import Path

OPERATIONS = "+-*"
NUM_STEPS = (3, 5)
FLAWS = {"clean": 0.45, "slip": 0.35, "skip": 0.1, "detour": 0.1}
"""Shares of the gold traces."""


def apply(left: int, operation: str, right: int) -> int:
    """One operation modulo 10."""
    return {"+": left + right, "-": left - right, "*": left * right}[operation] % 10


def draw_chain(random_: random.Random) -> tuple[int, list[tuple[str, int]]]:
    """A first digit and the operations on it."""
    steps = [(random_.choice(OPERATIONS), random_.randrange(10)) for _ in range(random_.randint(*NUM_STEPS))]
    return random_.randrange(10), steps


def write_trace(first: int, steps: list[tuple[str, int]], flaw: str, random_: random.Random) -> str:
    """The chain step by step, with one flaw that leaves the last result right."""
    place = random_.randrange(len(steps) - 1)
    written, true, shown = [], first, first
    for index, (operation, right) in enumerate(steps):
        true = apply(true, operation, right)
        result = apply(shown, operation, right)
        wrong = (result + random_.randrange(1, 10)) % 10
        if index == place and flaw == "slip":
            written.append(f"{shown}{operation}{right}={wrong};")
            result = wrong
        elif index == place and flaw == "detour":
            written.append(f"{shown}{operation}{right}={wrong};")
            written.append(f"{shown}{operation}{right}={result};")
        elif index == len(steps) - 1:
            written.append(f"{shown}{operation}{right}={true};")
        elif not (index == place and flaw == "skip"):
            written.append(f"{shown}{operation}{right}={result};")
        shown = result
    return "".join(written)


def make_question(identity: str, chain: tuple[int, list[tuple[str, int]]], random_: random.Random) -> dict[str, str]:
    """One row of the question file."""
    first, steps = chain
    answer = first
    for operation, right in steps:
        answer = apply(answer, operation, right)
    flaw = random_.choices(list(FLAWS), list(FLAWS.values()))[0]
    return {
        "id": identity,
        "question": f"{first}{''.join(f'{operation}{right}' for operation, right in steps)}, left to right, mod 10",
        "answer": str(answer),
        "solution": f"\n\\boxed{{{answer}}}",
        "trace": write_trace(first, steps, flaw, random_),
        "verifier": "math",
        "source": f"chain/{flaw}",
    }


def main() -> None:
    """Write train.jsonl and eval.jsonl, which share no question."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of the two files")
    parser.add_argument("--num-train", type=int, default=3000)
    parser.add_argument("--num-eval", type=int, default=400)
    parser.add_argument("--seed", type=int, default=1)
    chosen = parser.parse_args()
    random_ = random.Random(chosen.seed)
    chains: dict[str, tuple[int, list[tuple[str, int]]]] = {}
    while len(chains) < chosen.num_train + chosen.num_eval:
        chain = draw_chain(random_)
        chains[repr(chain)] = chain
    drawn = list(chains.values())
    chosen.out.mkdir(parents=True, exist_ok=True)
    for name, part in (("train", drawn[: chosen.num_train]), ("eval", drawn[chosen.num_train :])):
        rows = [make_question(f"{name}-{index:05d}", chain, random_) for index, chain in enumerate(part)]
        aside = chosen.out / f".{name}.jsonl.tmp"
        aside.write_text("".join(json.dumps(row) + "\n" for row in rows))
        os.replace(aside, chosen.out / f"{name}.jsonl")


if __name__ == "__main__":
    main()
