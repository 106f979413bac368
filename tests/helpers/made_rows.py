"""Made rows in every published layout: its columns and kinds of values, sentences of our own."""

import base64
import json
import pickle
import zlib

TESTS = {"inputs": ["3\n", "10\n"], "outputs": ["6\n", "20\n"]}
PROGRAM = "print(2 * int(input()))"
PRIVATE = base64.b64encode(
    zlib.compress(pickle.dumps(json.dumps([{"input": "7\n", "output": "14\n", "testtype": "stdin"}])))
).decode()
DAPO = (
    "Solve the following math problem step by step. The last line of your response should be of the form Answer: "
    "$Answer (without quotes) where $Answer is the answer to the problem.\n\n{}\n\n"
    'Remember to put your answer on its own line after "Answer:".'
)


def stratos(user, thought, solution):
    said = f"<|begin_of_thought|>\n\n{thought}\n\n<|end_of_thought|>\n\n"
    said += f"<|begin_of_solution|>\n\n{solution}\n\n<|end_of_solution|>"
    return {
        "system": "Think, then answer.",
        "conversations": [{"from": "user", "value": user}, {"from": "assistant", "value": said}],
    }


ROWS = {
    "bespoke_stratos": stratos(
        "Return your final response within \\boxed{}. Add three and four.", "3+4 is 7.", "It is $\\boxed{7}$."
    ),
    "openthoughts3": {
        "difficulty": 7,
        "source": "ai2-adapt",
        "domain": "math",
        "conversations": [
            {"from": "human", "value": "Add three and four."},
            {"from": "gpt", "value": "<think>\n3+4 is 7.\n</think>\n\nIt is $\\boxed{7}$."},
        ],
    },
    "openthoughts_114k_meta": {
        "problem": "Add three and four.",
        "deepseek_reasoning": "3+4 is 7.",
        "deepseek_solution": "It is $\\boxed{7}$.",
        "ground_truth_solution": "So $\\boxed{7}$.",
        "domain": "math",
        "source": "made",
        "test_cases": None,
        "starter_code": None,
    },
    "openr1_220k": {
        "problem": "Add three and four.",
        "solution": "Count on your fingers.",
        "answer": "7",
        "problem_type": "Algebra",
        "question_type": "math-word-problem",
        "source": "made",
        "uuid": "u-1",
        "is_reasoning_complete": [False, True, True],
        "generations": [
            "<think>\n3+4 is",
            "<think>\n3+4 is 8.\n</think>\n\\boxed{8}",
            "<think>\n3+4 is 7.\n</think>\n\nIt is $\\boxed{7}$.",
        ],
        "correctness_math_verify": [False, False, True],
        "correctness_llama": None,
        "finish_reasons": None,
        "correctness_count": 1,
        "messages": [],
    },
    "s1k": {
        "question": "Add three and four.",
        "solution": "7",
        "cot_type": "math",
        "source_type": "made",
        "metadata": "{}",
        "cot": None,
        "thinking_trajectories": ["3+4 is 7."],
        "attempt": "It is $\\boxed{7}$.",
    },
    "s1k_1.1": {
        "question": "Add three and four.",
        "solution": "We get $\\boxed{7}$.",
        "cot_type": "math",
        "source_type": "made",
        "metadata": "{}",
        "cot": None,
        "gemini_thinking_trajectory": "3+4 is 7.",
        "gemini_attempt": "It is $\\boxed{7}$.",
        "deepseek_thinking_trajectory": "3+4 is 9.",
        "deepseek_attempt": "It is $\\boxed{9}$.",
        "gemini_grade": "Yes",
        "gemini_grade_reason": "right",
        "deepseek_grade": "No",
        "deepseek_grade_reason": "wrong",
    },
    "limo": {
        "question": "Add three and four.",
        "solution": "3+4 is 7.\n\n**Final Answer**\n\nIt is $\\boxed{7}$.",
        "answer": "7",
    },
    "numinamath_cot": {
        "source": "made",
        "problem": "Add three and four.",
        "solution": "It is $\\boxed{7}$.",
        "messages": [],
    },
    "numinamath_1.5": {
        "problem": "Add three and four.",
        "solution": "Count on your fingers.",
        "answer": "7",
        "problem_type": "Algebra",
        "question_type": "math-word-problem",
        "source": "made",
        "problem_is_valid": "Yes",
        "solution_is_valid": "Yes",
        "synthetic": False,
    },
    "gsm8k": {"question": "Add three and four.", "answer": "3+4=<<3+4=7>>7.\n#### 7"},
    "gsm8k_idx": {"question": "Add three and four.", "answer": "3+4=<<3+4=7>>7.\n#### 7", "idx": 0},
    "math": {
        "problem": "Add three and four.",
        "level": "Level 1",
        "type": "Algebra",
        "solution": "It is $\\boxed{7}$.",
    },
    "math500": {
        "problem": "Add three and four.",
        "solution": "It is $\\boxed{7}$.",
        "answer": "7",
        "subject": "Algebra",
        "level": 1,
        "unique_id": "test/made/1.json",
    },
    "aime_2024_h4": {
        "id": 3,
        "problem": "Add three and four.",
        "solution": "It is $\\boxed{007}$.",
        "answer": "007",
        "url": "x",
        "year": "2024",
    },
    "aime_2024_ids": {"ID": "2024-I-3", "Problem": "Add three and four.", "Solution": "It is 7.", "Answer": 7},
    "aime_2024_boxed": {"id": 3, "problem": "Add three and four.", "solution": "\\boxed{7}", "url": "x"},
    "aime_2024_twice": {
        "id": 3,
        "problem": "Add three and four.",
        "question": "Add three and four.",
        "solution": "It is 7.",
        "answer": "7",
        "url": "x",
    },
    "aime_2024_expected": {
        "id": "aime24-3",
        "problem": "Add three and four.",
        "reference_solution": "It is $\\boxed{7}$.",
        "expected_answer": "7",
        "source": "aime24",
    },
    "aime_2025_matharena": {
        "problem_idx": 1,
        "problem": "Add three and four.",
        "answer": 7,
        "problem_type": ["Algebra"],
    },
    "aime_2025_math_ai": {"problem": "Add three and four.", "answer": "7", "id": "0"},
    "aime_2025_opencompass": {"question": "Add three and four.", "answer": "7"},
    "aime_1983_2024": {
        "ID": "2000-3",
        "Year": 2000,
        "Problem Number": 3,
        "Question": "Add three and four.",
        "Answer": "7",
        "Part": None,
    },
    "amc_aimo": {"id": 0, "problem": "Add three and four.", "answer": 7.0, "url": "x"},
    "amc23": {"id": 0, "question": "Add three and four.", "answer": "7.0", "url": "x"},
    "minerva": {"problem": "Add three and four.", "solution": "It is $\\boxed{7}$.", "type": "made", "idx": 5},
    "olympiadbench": {
        "id": 2,
        "question": "Add three and four.",
        "solution": ["Count."],
        "final_answer": ["$7$"],
        "context": None,
        "image_1": None,
        "modality": "Text-only",
        "difficulty": "Competition",
        "is_multiple_answer": False,
        "unit": None,
        "answer_type": "Numerical",
        "error": None,
        "question_type": "Open-ended",
        "subfield": "Algebra",
        "subject": "Math",
        "language": "English",
    },
    "dapo_17k": {
        "data_source": "math_dapo",
        "prompt": [{"role": "user", "content": DAPO.format("Add three and four.")}],
        "ability": "MATH",
        "reward_model": {"ground_truth": "7", "style": "rule"},
        "extra_info": {"index": "ab12"},
    },
    "gpqa": {
        "Record ID": "rec1",
        "Question": "Which one is blue?",
        "Correct Answer": "the\nsky",
        "Incorrect Answer 1": "grass",
        "Incorrect Answer 2": "snow",
        "Incorrect Answer 3": "coal",
        "Explanation": "Look up.",
        "Subdomain": "made",
        "High-level domain": "Physics",
    },
    "mmlu_pro": {
        "question_id": 9,
        "question": "Which one is blue?",
        "options": ["grass", "snow", "sky"],
        "answer": "C",
        "answer_index": 2,
        "cot_content": "",
        "category": "physics",
        "src": "made",
    },
    "countdown": {"target": 100, "nums": [3, 5, 7, 20]},
    "apps": {
        "problem_id": 4,
        "question": "Double a number.",
        "solutions": json.dumps(["print(1)", PROGRAM]),
        "input_output": json.dumps(TESTS),
        "difficulty": "introductory",
        "url": "x",
        "starter_code": "",
    },
    "apps_file": {
        "id": 4,
        "question": "Double a number.",
        "solutions": json.dumps([PROGRAM]),
        "input_output": json.dumps(TESTS),
        "difficulty": "introductory",
        "url": "x",
        "starter_code": "",
    },
    "taco": {
        "question": "Double a number.",
        "starter_code": "",
        "input_output": json.dumps(TESTS),
        "difficulty": "EASY",
        "raw_tags": "[]",
        "name": None,
        "source": "made",
        "tags": "[]",
        "skill_types": "[]",
        "url": "x",
        "Expected Auxiliary Space": None,
        "time_limit": None,
        "date": None,
        "picture_num": None,
        "memory_limit": None,
        "Expected Time Complexity": None,
        "solutions": json.dumps([PROGRAM]),
    },
    "livecodebench": {
        "question_title": "Double",
        "question_content": "Double a number.",
        "platform": "made",
        "question_id": "d_1",
        "contest_id": "d",
        "contest_date": "2024-01-01T00:00:00",
        "starter_code": "",
        "difficulty": "easy",
        "public_test_cases": json.dumps([{"input": "2\n", "output": "4\n", "testtype": "stdin"}]),
        "private_test_cases": PRIVATE,
        "metadata": "{}",
    },
    "questions": {
        "id": "own",
        "question": "Add three and four.",
        "answer": "7",
        "trace": "3+4 is 7.",
        "verifier": "math",
    },
}
"""Name -> a good row."""
