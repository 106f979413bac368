"""Questions of the hard tasks are what they say, whoever generates them, and every gold trace leads to its answer."""

import importlib.util
import json
import subprocess
import sys
from itertools import permutations, product
from pathlib import Path

import pytest

from megavar.records import Verdict

DATA = Path(__file__).parents[2] / "examples" / "data"
SPEC = importlib.util.spec_from_file_location("swaps", DATA / "swaps.py")
swaps = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(swaps)


def made(folder, task, *flags):
    """The rows of each file that the generator writes."""
    command = [sys.executable, DATA / "hard.py", "--task", task, "--out", folder, *flags]
    subprocess.run(command, check=True, capture_output=True)
    return {file.stem: list(map(json.loads, file.read_text().splitlines())) for file in folder.glob("*.jsonl")}


@pytest.mark.parametrize("task", ["sort", "search"])
def test_files_are_of_their_levels_share_no_question_and_repeat(task, tmp_path):
    files = made(tmp_path / "a", task, "--train-levels", "3", "--num-train", "40", "--num-gold", "9", "--num-eval", "8")
    assert {name: len(rows) for name, rows in files.items()} == {
        "train": 49, "answers": 49, "eval_1": 8, "eval_2": 8, "eval_3": 8
    }  # fmt: skip
    assert {row["source"] for row in files["train"][:40]} == {"level 3"}
    assert [("trace" in row) for row in files["train"]] == [False] * 40 + [True] * 9
    assert [row["source"] for row in files["train"][40:43]] == ["level 1", "level 2", "level 3"]
    held_out = [row["question"] for level in (1, 2, 3) for row in files[f"eval_{level}"]]
    assert len({*held_out, *(row["question"] for row in files["train"])}) == 24 + 49
    assert [{**row, "id": ""} for row in files["answers"]] == [
        {**row, "id": "", "trace": "-\n"} for row in files["train"]
    ]
    flags = ("--train-levels", "1", "--num-train", "3", "--num-gold", "9", "--num-eval", "8")
    others = made(tmp_path / "b", task, *flags)
    assert others["eval_3"] == files["eval_3"]  # whatever is trained on
    assert [row["question"] for row in others["train"][3:]] == [row["question"] for row in files["train"][40:]]


def test_a_sorting_trace_carries_out_its_answer(tmp_path):
    for row in made(tmp_path, "sort", "--num-gold", "60", "--num-train", "1")["train"][1:]:
        digits, lines = row["question"].split()[1], row["trace"].splitlines()
        for line, place in zip(lines[:-1], map(int, row["answer"]), strict=True):
            assert line == f"{digits}:{place}"
            digits = digits[: place - 1] + digits[place] + digits[place - 1] + digits[place + 1 :]
        assert digits == lines[-1] == "".join(sorted(digits))
        assert int(row["question"].split()[3]) == len(row["answer"])


def test_a_search_trace_rejects_wrong_numbers_and_ends_with_the_one_that_fits(tmp_path):
    tries = []
    for row in made(tmp_path, "search", "--num-gold", "90", "--num-train", "1")["train"][1:]:
        chains = [chain.split("=") for chain in row["question"].split(" left")[0].split()]

        def value(digit, text):
            result = int(digit)
            for operator, right in zip(text[1::2], map(int, text[2::2]), strict=True):
                result = {"+": result + right, "-": result - right, "*": result * right}[operator] % 10
            return result

        fits = [
            "".join(digits)
            for digits in product("0123456789", repeat=len(chains))
            if all(value(digit, text) == int(target) for digit, (text, target) in zip(digits, chains, strict=True))
        ]
        assert fits == [row["answer"]]
        lines = row["trace"].splitlines()
        numbers = [line for line in lines if line.isdigit()]
        assert numbers[-1] == row["answer"] and len(set(numbers)) == len(numbers) <= 4
        for line in lines:
            if "=" in line:
                result, target = line.removesuffix(" no").split("=")
                assert (result == target) is not line.endswith(" no")
        assert sum(line.endswith(" no") for line in lines) == len(numbers) - 1
        tries.append(len(numbers))
    assert 0.3 < tries.count(1) / len(tries) < 0.7 and set(tries) == {1, 2, 3, 4}


def test_swaps_are_right_that_do_the_same_in_as_many():
    def verdict(answer, gold):
        return swaps.same_permutation(f"\n\\boxed{{{answer}}}", gold)

    assert verdict("121", "212") == Verdict.CORRECT
    assert verdict("131", "313") == Verdict.WRONG
    assert verdict("13", "31") == Verdict.CORRECT
    assert verdict("1211", "12") == Verdict.WRONG  # the same, by a detour
    assert verdict("12x", "121") == verdict("", "1") == Verdict.WRONG
    assert swaps.same_permutation("121", "121") == Verdict.NO_ANSWER
    with pytest.raises(ValueError, match="places"):
        verdict("1", "1 2")


def test_as_many_sequences_are_right_as_there_are_ways_to_sort():
    """Counted by trying all of them on all orders of four digits."""
    for row in permutations("0123"):
        gold, digits = "", list(row)
        while digits != sorted(digits):
            place = next(place for place in range(1, 4) if digits[place - 1] > digits[place])
            digits[place - 1], digits[place] = digits[place], digits[place - 1]
            gold += str(place)
        if 0 < len(gold) <= 4:
            tries = [""]
            for _ in gold:
                tries = [text + place for text in tries for place in "123"]
            right = [text for text in tries if swaps.same_permutation(f"\\boxed{{{text}}}", gold) == Verdict.CORRECT]

            def sorts(text, row=row):
                digits = list(row)
                for place in map(int, text):
                    digits[place - 1], digits[place] = digits[place], digits[place - 1]
                return digits == sorted(digits)

            assert right == [text for text in tries if sorts(text)]
