"""Published layouts become question files that the check accepts; what is left out is counted, with its reason."""

import csv
import json
import random
import re
import string
from collections import Counter
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from helpers.made_rows import DAPO, PROGRAM, ROWS, TESTS, stratos
from tokenizers import Tokenizer

from megavar.cli import main
from megavar.config.schema import TemplateConfig, VerifyConfig
from megavar.data.questions import read_questions
from megavar.data.templates import reference_solution
from megavar.stages import import_questions as stage
from megavar.stages.references import bad_references
from megavar.verifiers import get_verifier, ground_truth
from megavar.verifiers.code import read_tests

BASE = Path(__file__).parents[2] / "examples" / "base" / "qwen3-tiny"
FORTY = " ".join(f"{letter}{letter}" for letter in string.ascii_lowercase)


def write(folder, rows, name="data.jsonl"):
    file = folder / name
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def run(folder, files, *arguments):
    """Exit code, questions and rejected rows of an import."""
    out = folder / "out" / "train.jsonl"
    code = main(
        ["import", *map(str, files if isinstance(files, list) else [files]), "--out", str(out), *map(str, arguments)]
    )
    lines = [
        file.read_text().splitlines() if file.exists() else [] for file in (out, out.with_suffix(".rejected.jsonl"))
    ]
    return code, *([json.loads(line) for line in each] for each in lines)


@pytest.fixture(scope="module")
def imported(tmp_path_factory):
    """Every layout's row, imported from a file of its own in one command: source file -> question."""
    folder = tmp_path_factory.mktemp("all")
    # Questions that two layouts share would be duplicates of one another.
    rows = {
        name: json.loads(re.sub(r"Add three|Which one|Double a", rf"\g<0> ({name})", json.dumps(row)))
        for name, row in ROWS.items()
    }
    files = [write(folder, [row], f"{name}.jsonl") for name, row in rows.items()]
    code, kept, rejected = run(folder, files)
    assert (code, rejected) == (0, []) and len(kept) == len(rows)
    return folder / "out" / "train.jsonl", dict(zip(rows, kept, strict=True))


def test_every_layout_passes_the_check_of_reference_answers(imported):
    file, _ = imported
    questions = read_questions(file)
    assert len(questions) == len(ROWS)
    assert bad_references(file, questions, VerifyConfig(), TemplateConfig().solution) == {}


OTHERS = ("gpqa", "mmlu_pro", "countdown", "apps", "apps_file", "taco", "livecodebench")
WRONG = {
    "math": "It is \\boxed{8}.",
    "choice": "\\boxed{A}",
    "countdown": "\\boxed{3*5*7}",
    "code": "```python\nprint(1)\n```",
}


@pytest.mark.parametrize("name", ROWS)
def test_a_layouts_own_answer_is_verified_as_correct_and_another_as_wrong(imported, name):
    file, rows = imported
    (question,) = [question for question in read_questions(file) if question.id == rows[name]["id"]]
    verify, gold = get_verifier(question.verifier), ground_truth(question)
    own = (
        f"```python\n{PROGRAM}\n```"
        if name == "livecodebench"
        else reference_solution(question, TemplateConfig().solution)
    )
    wrong = WRONG[question.verifier]
    if question.verifier == "choice" and question.answer == "A":
        wrong = "\\boxed{B}"
    assert (verify(own, gold), verify(wrong, gold)) == ("correct", "wrong")


NUMBERS = [name for name in ROWS if name not in OTHERS]
TRACED = ("bespoke_stratos", "openthoughts3", "openthoughts_114k_meta", "openr1_220k", "s1k", "s1k_1.1")


@pytest.mark.parametrize("name", NUMBERS)
def test_a_number_is_the_answer_and_boilerplate_is_gone(imported, name):
    row = imported[1][name]
    assert row["answer"].lstrip("0").removesuffix(".0") == "7" and row["verifier"] == "math"
    assert row["question"] == f"Add three ({name}) and four."


@pytest.mark.parametrize("name", TRACED)
def test_the_trace_is_split_from_the_accepted_solution(imported, name):
    row = imported[1][name]
    assert (row["trace"], row["solution"]) == ("3+4 is 7.", "It is $\\boxed{7}$.")


def test_what_else_becomes_of_a_layout(imported):
    rows = imported[1]
    assert rows["limo"]["trace"] == "3+4 is 7." and rows["limo"]["solution"].startswith("**Final Answer**")
    assert rows["gsm8k"]["trace"] == "3+4=7." and "solution" not in rows["gsm8k"]
    assert rows["math"]["solution"] == "It is $\\boxed{7}$." and "trace" not in rows["math"]
    assert "solution" not in rows["numinamath_1.5"]  # it does not state the answer
    assert rows["amc_aimo"]["answer"] == "7"  # 7.0 is published
    assert rows["math500"]["id"] == "math500-test/made/1.json" and rows["questions"]["id"] == "own"
    assert rows["dapo_17k"]["source"] == "math_dapo"
    assert rows["countdown"]["verifier"] == "countdown" and "100" in rows["countdown"]["question"]
    for name in ("apps", "apps_file", "taco"):  # of APPS' two programs the first fails
        assert rows[name]["solution"] == f"```python\n{PROGRAM}\n```" and json.loads(rows[name]["answer"]) == TESTS
    assert rows["livecodebench"]["verifier"] == "code" and "solution" not in rows["livecodebench"]


@pytest.mark.parametrize(("name", "right"), [("gpqa", "the sky"), ("mmlu_pro", "sky")])
def test_options_are_in_the_question_and_the_letter_is_the_answer(imported, name, right):
    row = imported[1][name]
    options = dict(re.findall(r"^([A-J])\. (.*)$", row["question"], re.MULTILINE))
    assert row["verifier"] == "choice" and options[row["answer"]] == right
    assert len(options) == (4 if name == "gpqa" else 3)


def test_the_order_of_gpqas_options_is_the_ids_and_not_the_columns(tmp_path):
    rows = [ROWS["gpqa"] | {"Record ID": f"r{index}", "Question": f"Which {index}?"} for index in range(200)]
    letters = [row["answer"] for row in run(tmp_path, write(tmp_path, rows))[1]]
    again = [row["answer"] for row in run(tmp_path, write(tmp_path, rows[::-1]))[1]]
    assert letters == again[::-1]
    assert all(30 <= count <= 70 for count in Counter(letters).values())  # 50 are expected; 30 is 3.3 deviations off


REJECTED = {
    "no answer": [ROWS["math"] | {"solution": "It is 7."}, ROWS["numinamath_1.5"] | {"answer": "proof"},
                  ROWS["countdown"] | {"target": 99999}, ROWS["olympiadbench"] | {"final_answer": None}],
    "unreadable answer": [ROWS["math500"] | {"answer": "?", "solution": "None."},
                          ROWS["livecodebench"] | {"private_test_cases": "eJxr", "public_test_cases": "[]"},
                          ROWS["mmlu_pro"] | {"answer": "12"}],
    "contradiction": [ROWS["math500"] | {"answer": "8"}, ROWS["openr1_220k"] | {"answer": "9"},
                      ROWS["openthoughts_114k_meta"] | {"ground_truth_solution": "\\boxed{6}"},
                      ROWS["apps"] | {"solutions": json.dumps(["print(1)"])}],
    "unreadable row": [ROWS["mmlu_pro"] | {"options": None}, ROWS["math"] | {"problem": None},
                       ROWS["math"] | {"problem": "\ud800"}, ROWS["math"] | {"problem": " "}],
    "unfinished trace": [ROWS["openr1_220k"] | {"generations": ["<think>\n3+4 is"]}],
    "needs an image": [ROWS["olympiadbench"] | {"modality": "Multimodal"}],
    "marked invalid": [ROWS["numinamath_1.5"] | {"problem_is_valid": "Incomplete"}],
}  # fmt: skip


@pytest.mark.parametrize(("reason", "row"), [(reason, row) for reason, rows in REJECTED.items() for row in rows])
def test_a_row_is_left_out_with_its_reason(tmp_path, capsys, reason, row):
    code, kept, rejected = run(tmp_path, write(tmp_path, [row]))
    assert (code, kept) == (2, []) and not (tmp_path / "out" / "train.jsonl").exists()
    (one,) = rejected
    assert (one["reason"], one["row"], one["file"]) == (reason, 1, str(tmp_path / "data.jsonl"))
    assert one["source_row"] == row
    assert re.search(rf"left out: {reason} +1", capsys.readouterr().out)


def test_questions_without_a_verifier_keep_their_solution_as_the_answer(tmp_path):
    code, kept, _ = run(tmp_path, write(tmp_path, [stratos("Write a haiku.", "Five, seven, five.", "Old pond.")]))
    assert code == 0 and kept[0]["verifier"] == "none" and kept[0]["answer"] == kept[0]["solution"] == "Old pond."


def test_unreadable_private_tests_leave_the_public_ones_and_are_counted(tmp_path, capsys):
    rows = [ROWS["livecodebench"] | {"private_test_cases": "eJxr"}, ROWS["livecodebench"] | {"question_content": "2n?"}]
    code, kept, rejected = run(tmp_path, write(tmp_path, rows))
    assert (code, rejected) == (0, []) and len(kept) == 2
    assert [len(read_tests(row["answer"]).cases) for row in kept] == [1, 2]
    assert re.search(r"kept +2 *\n.*public tests alone \(private ones unreadable\) +1", capsys.readouterr().out)


def test_duplicates_are_left_out_and_rows_keep_their_order(tmp_path, capsys):
    # Answers that take longer to judge come first.
    answers = ["(x+1)^2", "x^2+2x+1", *map(str, range(300))]
    rows = [{"question": f"Number {index}?", "answer": answer} for index, answer in enumerate(answers)]
    again = [row | {"question": row["question"].upper() + " "} for row in rows[:40]]
    code, kept, rejected = run(tmp_path, write(tmp_path, [*rows, *again]))
    assert code == 0 and [row["answer"] for row in kept] == answers
    assert [row["reason"] for row in rejected] == ["duplicate question"] * 40
    said = capsys.readouterr().out
    assert re.search(r"read +342", said) and re.search(r"kept +302", said)


def test_a_later_duplicate_takes_the_place_of_one_that_is_left_out(tmp_path):
    bad = ROWS["openthoughts_114k_meta"] | {"deepseek_solution": "\\boxed{8}"}
    _, kept, rejected = run(tmp_path, write(tmp_path, [bad, ROWS["openthoughts_114k_meta"]]))
    assert len(kept) == 1 and [row["reason"] for row in rejected] == ["contradiction"]


def test_equal_ids_of_two_files_are_told_apart(tmp_path):
    files = [write(tmp_path, [{"id": 0, "problem": f"Number {n}?", "answer": n}], f"{n}.jsonl") for n in (1, 2)]
    _, kept, _ = run(tmp_path, files)
    assert kept[0]["id"] == "competition-0" and kept[1]["id"].startswith("competition-0-")


def test_held_out_questions_are_excluded(tmp_path):
    held_out = write(tmp_path, [ROWS["aime_2025_opencompass"] | {"question": f"Hello, {FORTY}!"},
                                ROWS["aime_2025_opencompass"] | {"question": "What is $2+2$?"}],
                     "eval.jsonl")  # fmt: skip
    words = FORTY.split()
    questions = {
        "what IS 2+2": True, "What is $2-2$?": False,
        "So: " + ", ".join(words[3:16]).upper() + "?": True, "So: " + " ".join(words[3:15]) + "?": False,
    }  # fmt: skip
    rows = [{"question": text, "answer": "4"} for text in questions]
    _, kept, rejected = run(tmp_path, write(tmp_path, rows), "--exclude", held_out)
    assert [row["question"] for row in kept] == [text for text, is_out in questions.items() if not is_out]
    assert {row["reason"] for row in rejected} == {"overlap with --exclude"}


def test_traces_that_are_too_long_by_the_models_tokens_are_left_out(tmp_path):
    text = " ".join(f"{n}+{n};" for n in range(100))
    tokens = len(Tokenizer.from_file(str(BASE / "tokenizer.json")).encode(text, add_special_tokens=False).ids)
    file = write(tmp_path, [ROWS["s1k"] | {"thinking_trajectories": [text]}, ROWS["s1k"] | {"question": "Another?"}])
    _, kept, _ = run(tmp_path, file, "--max-trace-tokens", tokens, "--model", BASE)
    assert len(kept) == 2
    _, kept, rejected = run(tmp_path, file, "--max-trace-tokens", tokens - 1, "--model", BASE)
    assert len(kept) == 1 and (rejected[0]["reason"], rejected[0]["detail"]) == ("trace too long", f"{tokens} tokens")


@pytest.mark.parametrize("form", ["array", "csv", "parquet"])
def test_files_of_every_kind_have_the_same_rows(tmp_path, monkeypatch, form):
    monkeypatch.setattr("megavar.data.importers.files._CHUNK_CHARACTERS", 100)  # less than a row
    draw = random.Random(1)
    rows = [{"id": str(n), "question": f"Ä, number\n{n} {draw.random()}?", "answer": str(n)} for n in range(300)]
    file = tmp_path / {"array": "a.json", "csv": "a.csv", "parquet": "a.parquet"}[form]
    if form == "array":
        file.write_text("\ufeff " + json.dumps(rows, indent=1, ensure_ascii=False))
    elif form == "csv":
        with file.open("w", newline="") as lines:
            writer = csv.DictWriter(lines, rows[0])
            writer.writeheader()
            writer.writerows(rows)
    else:
        pq.write_table(pa.Table.from_pylist(rows), file, row_group_size=70)
    code, kept, rejected = run(tmp_path, file)
    assert (code, rejected) == (0, [])
    assert [{name: row[name] for name in rows[0]} for row in kept] == rows


@pytest.mark.parametrize(
    ("columns", "row"),
    [
        ("question=prompt,answer=label.gold", {"prompt": "Add.", "label": {"gold": 7.0}, "odd": 1}),
        ("question=prompt,solution=output", {"prompt": "Add.", "output": "<think>3+4</think>It is \\boxed{7}."}),
        ("question=prompt,answer=a,trace=t", {"prompt": "Add.", "a": "7", "t": "3+4"}),
    ],
)
def test_an_unknown_layout_is_mapped(tmp_path, columns, row):
    code, kept, _ = run(tmp_path, write(tmp_path, [row]), "--map", columns)
    assert code == 0 and (kept[0]["question"], kept[0]["answer"]) == ("Add.", "7")
    assert kept[0].get("trace") == (None if "gold" in columns else "3+4")


def test_a_mapped_solution_is_split_at_given_markers(tmp_path):
    file = write(tmp_path, [{"q": "Add.", "out": "[z]3+4[/z]It is \\boxed{7}."}])
    _, kept, _ = run(tmp_path, file, "--map", "question=q,solution=out", "--trace-markers", "[z]", "[/z]")
    assert (kept[0]["trace"], kept[0]["solution"], kept[0]["answer"]) == ("3+4", "It is \\boxed{7}.", "7")


def test_a_known_layout_may_have_other_columns_if_it_is_named(tmp_path, capsys):
    file = write(tmp_path, [ROWS["math"] | {"odd": 1}])
    assert run(tmp_path, file)[0] == 2
    assert "--layout math takes it as that" in capsys.readouterr().out
    assert run(tmp_path, file, "--layout", "math")[0] == 0


MATH = json.dumps(ROWS["math"])
BROKEN = {
    "truncated line": ("a.jsonl", f"{MATH}\n{MATH[:40]}", "row 2: invalid JSON"),
    "truncated array": ("a.json", f"[{MATH},{MATH[:40]}", "row 2: invalid JSON"),
    "array without its end": ("a.json", f"[{MATH}", "row 2: invalid JSON"),
    "numbers": ("a.json", "[1, 2]", "expected an object with columns, got '1, 2]'"),
    "a number a line": ("a.jsonl", "1\n", "expected an object with columns, got 1"),
    "empty": ("a.jsonl", "", "has no rows"),
    "empty array": ("a.json", "[]", "has no rows"),
    "other columns": ("a.jsonl", '{"text": "x", "label": 1}', "has the columns text, label, which are those of no"),
    "mixed layouts": ("a.jsonl", f'{MATH}\n{json.dumps(ROWS["gsm8k"])}', "row 2 lacks the columns level, problem,"),
    "not UTF-8": ("a.jsonl", b'{"problem": "\xff\xfe"}', "is not UTF-8"),
    "CSV not UTF-8": ("a.csv", b"id,question,answer\n1,\xff,2\n", "is not UTF-8"),
    "ragged CSV": ("a.csv", "id,question,answer\n1,2\n", "another number of values"),
    "no Parquet": ("a.parquet", "x" * 100, "not a readable Parquet file"),
    "other kind": ("a.zip", "PK", "is none of .parquet, .csv, .json, .jsonl"),
}  # fmt: skip


@pytest.mark.parametrize(("name", "content", "message"), BROKEN.values(), ids=BROKEN)
def test_a_broken_file_is_refused_and_nothing_written(tmp_path, capsys, name, content, message):
    file = tmp_path / name
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    code, kept, rejected = run(tmp_path, file)
    said = capsys.readouterr().out
    assert (code, kept, rejected) == (2, [], []) and list((tmp_path / "out").iterdir()) == []
    assert said.startswith("error: ") and message in said and str(file) in said


@pytest.mark.parametrize("name", ["a.jsonl", "a.json"])
def test_a_row_of_200_megabytes_is_refused_in_bounded_memory(tmp_path, capsys, name):
    file = tmp_path / name
    with file.open("w") as lines:
        lines.write("[" if name == "a.json" else "")
        lines.write('{"problem": "')
        for _ in range(200):
            lines.write("x" * 2**20)
    assert run(tmp_path, file)[0] == 2
    assert "row 1 is larger than 128 MiB" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--max-trace-tokens", "5"], "--max-trace-tokens and --model go together"),
        (["--layout", "odd"], "--layout odd is unknown; known are questions, bespoke_stratos"),
        (["--layout", "gpqa"], "the layout gpqa needs Correct Answer"),
        (["--map", "question"], "give FIELD=COLUMN"),
        (["--map", "question=problem"], "needs question, and answer or solution"),
        (["--map", "question=odd,answer=solution"], "--map names odd, but"),
        (["--map", "odd=problem"], "unknown field odd"),
        (["--layout", "math", "--map", "question=problem,solution=solution"], "two ways"),
        (["--trace-markers", "a", "b"], "--trace-markers belong to --map"),
    ],
)  # fmt: skip
def test_settings_that_do_not_go_together_are_refused(tmp_path, capsys, arguments, message):
    assert run(tmp_path, write(tmp_path, [ROWS["math"]]), *arguments)[0] == 2
    assert message in capsys.readouterr().out


def test_what_waits_for_an_early_row_is_bounded(tmp_path, monkeypatch):
    monkeypatch.setattr(stage, "MOST_WAITING_ROWS", 3)
    rows = [{"question": f"Number {n}?", "answer": str(n)} for n in range(100)]
    assert [row["answer"] for row in run(tmp_path, write(tmp_path, rows))[1]] == [str(n) for n in range(100)]


def test_dapos_repeated_rows_are_judged_once(tmp_path):
    row = ROWS["dapo_17k"]
    rows = [row | {"prompt": [{"role": "user", "content": DAPO.format(f"Number {n % 5}?")}]} for n in range(500)]
    _, kept, rejected = run(tmp_path, write(tmp_path, rows))
    assert len(kept) == 5 and len(rejected) == 495
