"""What is counted of a suite's samples, compared with hand arithmetic; the verifiers and their processes are real."""

import asyncio
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from megavar.cli import main
from megavar.config.load import load_config, load_evaluation
from megavar.data.templates import Templates
from megavar.evaluation.results import read_results
from megavar.record_files import write_records
from megavar.records import Answer, Question, Trace
from megavar.rollout.engine import Generation
from megavar.runs.folder import Run
from megavar.runs.metrics import Metrics
from megavar.runs.names import distinct_names, suite_names
from megavar.runs.plan import find_stage
from megavar.stages import eval as evaluation_stage
from megavar.stages.suites import read_outcomes
from megavar.stages.verify import verify_answers

ROOT = Path(__file__).parents[2]
BASE = ROOT / "examples" / "base" / "qwen3-tiny"
NUM_SAMPLES = 6
CUT, NOTHING = "cut", "I do not know, sorry"
QUESTIONS = {
    "half": (
        Question("half", "1/2?", "0.5"),
        [r"\boxed{\frac12}", r"\boxed{0.5}", r"\boxed{2}", r"\boxed{3}", CUT, CUT],
    ),
    # Three ways to write one wrong answer outvote two correct ones; by their texts they would not.
    "merged": (
        Question("merged", "1/2?", "0.5"),
        [r"\boxed{1/2}", r"\boxed{.5}", r"\boxed{\frac{1}{4}}", r"\boxed{0.25}", r"\boxed{1/4}", NOTHING],
    ),
    "tied": (
        Question("tied", "1/2?", "0.5"),
        [r"\boxed{1/2}", r"\boxed{.5}", r"\boxed{1/4}", r"\boxed{0.25}", r"\boxed{7}", r"\boxed{x+1}"],
    ),
    "letters": (
        Question("letters", "Even?\nA. 1\nB. 2\nC. 3", "B", verifier="choice"),
        [r"\boxed{B}", "The answer is (B).", r"\boxed{A}", "The answer is A.", r"\boxed{(A)}", r"\boxed{C}"],
    ),
    "words": (
        Question("words", "Sky?", "grey | gray", verifier="text"),
        [r"\boxed{gray}", r"\boxed{The Grey}", r"\boxed{blue}", r"\boxed{Blue!}", r"\boxed{red}", r"\boxed{a}"],
    ),
    "never": (Question("never", "1/2?", "0.5"), [CUT] * 6),
}
CORRECT = {"half": 2, "merged": 2, "tied": 2, "letters": 2, "words": 2, "never": 0}
MAJORITY = {"half": 1, "merged": 0, "tied": 1 / 2, "letters": 0, "words": 1 / 2, "never": 0}
TRACE_TOKENS, ANSWER_TOKENS = 3, 2


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    folder, ids = tmp_path_factory.mktemp("suite"), np.arange
    traces, answers = [], []
    for name in sorted(QUESTIONS):
        for index, text in enumerate(QUESTIONS[name][1]):
            finish = "length" if text == CUT else "closed"
            trace_ids = ids(TRACE_TOKENS, dtype=np.int32)
            traces.append(Trace(name, index, 0, "policy", trace_ids, trace_ids, None, finish, 0))
            if text != CUT:
                finish = "length" if text == NOTHING else "stop"
                answers.append(Answer(name, index, 0, 0, ids(ANSWER_TOKENS, dtype=np.int32), text, finish, 0))
    write_records(folder / "traces" / "data.parquet", traces, Trace)
    write_records(folder / "answers" / "data.parquet", answers, Answer)
    config = load_evaluation(None, [f"eval.num_samples={NUM_SAMPLES}"])
    questions = [question for question, _ in QUESTIONS.values()]
    verify_answers(lambda: questions, folder / "answers" / "data.parquet", config.verify, 1.0, folder / "verified")
    return read_outcomes(folder, questions, config)


def test_correct_answers_tokens_and_truncated_samples_are_counted_in_the_order_of_the_questions(found):
    assert found.num_correct.tolist() == list(CORRECT.values())
    num_cut = [texts.count(CUT) for _, texts in QUESTIONS.values()]
    tokens = [(6 * TRACE_TOKENS + (6 - cut) * ANSWER_TOKENS) / 6 for cut in num_cut]
    assert found.tokens == pytest.approx(np.array(tokens))
    assert found.truncated == pytest.approx(np.array([2, 1, 0, 0, 0, 6]) / 6)


def test_wrong_answers_that_the_verifier_calls_equal_vote_together_and_ties_are_drawn(found):
    assert found.majority == pytest.approx(np.array(list(MAJORITY.values())))


def test_names_take_as_many_folders_as_they_need():
    assert distinct_names([Path("/m/base"), Path("runs/a/hf"), Path("runs/b/hf")]) == ["base", "a-hf", "b-hf"]
    assert distinct_names([Path("/m/Qwen2.5-7B")]) == ["Qwen2.5-7B"]
    assert suite_names(["x/a/test.jsonl", "x/b/test.parquet", "aime24.jsonl"]) == ["a-test", "b-test", "aime24"]
    assert distinct_names([Path("/a-b/c"), Path("/x/a/b/c"), Path("/b/c")]) == ["a-b-c", "x-a-b-c", "b-c"]
    with pytest.raises(ValueError, match="a and a cannot be told apart"):
        suite_names(["a.jsonl", "./a.jsonl"])


GOOD = {"id": "a", "question": "1+1", "answer": "2"}


@pytest.mark.parametrize(
    ("rows", "arguments", "message"),
    [
        ([GOOD, GOOD], [], "line 2: id 'a' was already on line 1."),
        ([GOOD, {**GOOD, "id": "b", "verifier": "none"}], [],
         "1 of 2 questions have the verifier none, such as 'b'; a suite needs one that judges every answer"),
        ([GOOD, {**GOOD, "id": "b", "verifier": "odd"}], [], "verifier 'odd' is unknown"),
        ([{**GOOD, "solution": "\\boxed{3}"}], [], "`solution` is wrong by the verifier math"),
        ([GOOD], ["--model", "{folder}"], "--model {folder} is no Hugging Face folder: it has no config.json."),
        ([GOOD], ["--model", "{base}"], "cannot be told apart; give each once."),
        ([GOOD], ["--samples", "4", "--k", "8"], "eval.pass_at=[8] (--k): pass@k needs 1 to eval.num_samples=4"),
        ([GOOD], ["--samples", "0"], "eval.num_samples=0 is too small"),
        ([GOOD], ["--suite", "{folder}/none.jsonl"], "No question file {folder}/none.jsonl"),
        ([GOOD], ["sample.max_trace_tokens=4090"], "over the positions of {base}=4096"),
        ([GOOD], ["rollout.context_length=64"], "over rollout.context_length=64"),
        ([GOOD], ["sft.epochs=2"], "has no effect on an evaluation, which reads seed, templates, rollout"),
        ([GOOD], ["rollout.mode=external"], "rollout.mode=external needs rollout.urls"),
        ([GOOD], ["rollout.python=/nowhere/python"], "make sglang"),
    ],
)  # fmt: skip
def test_a_mistake_is_one_line_before_anything_starts(tmp_path, capsys, rows, arguments, message):
    (tmp_path / "s.jsonl").write_text("\n".join(map(json.dumps, rows)))
    python = [] if any("rollout." in item for item in arguments) else [f"rollout.python={ROOT}/.venv-sglang/bin/python"]
    given = [item.format(folder=tmp_path, base=BASE) for item in arguments]
    out = tmp_path / "out"
    command = ["eval", *python, "--out", str(out), "--model", str(BASE), "--suite", str(tmp_path / "s.jsonl"), *given]
    assert main(command) == 2
    printed = capsys.readouterr().out
    assert printed.startswith("error: ") and printed.count("\n") == 1
    assert message.format(folder=tmp_path, base=BASE) in printed
    assert not out.exists()


def test_without_models_or_suites_there_is_nothing_to_evaluate(tmp_path, capsys):
    assert main(["eval", "--model", str(BASE)]) == 2
    assert main(["eval", "--samples", "2"]) == 2
    assert capsys.readouterr().out.count("error: nothing to evaluate: give --model and --suite (or eval.suites).") == 2
    with pytest.raises(SystemExit, match="2"):
        main(["eval"])


class Two:
    """Thinks nothing and answers 2."""

    capacity = 4

    def __init__(self, close):
        self.close = close

    async def generate(self, request):
        ids = np.array([self.close], np.int32)
        return [
            Generation(ids, None, "stop", "\\boxed{2}", request.seed + number) for number in range(request.num_samples)
        ]


class Service:
    """Has one engine, whatever the model, of which it writes down the folder."""

    def __init__(self, engine):
        self.engine, self.models = engine, []

    def on_nodes(self, work):
        work()

    def run(self, model, work):
        self.models.append(model)
        return asyncio.run(work(self.engine))


def test_a_runs_own_evaluation_counts_data_eval_and_each_suite_over_the_rounds(tmp_path):
    rows = {
        "held_out": ["2", "2", "3", "4"],
        "right": ["2"],
        "wrong": ["7", "8"],
    }
    for name, answers in rows.items():
        lines = [json.dumps({**GOOD, "id": f"q{n}", "answer": answer}) for n, answer in enumerate(answers)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines))
    (tmp_path / "run.yaml").write_text(
        f"name: a\nruns_dir: {tmp_path}\nmodel: {BASE}\nrounds: 2\nlogging: {{tensorboard: false}}\n"
        f"data: {{train: {tmp_path}/held_out.jsonl, eval: {tmp_path}/held_out.jsonl}}\n"
        f"eval: {{num_samples: 2, num_bootstrap: 20, suites: ['{tmp_path}/right.jsonl', '{tmp_path}/wrong.jsonl']}}\n"
    )
    config = load_config(tmp_path / "run.yaml", [])
    run, service = Run(config), Service(Two(Templates(BASE, config.templates).close_token))
    run.open()
    evaluation_stage.execute(run, service)
    assert dict.fromkeys(service.models) == dict.fromkeys([run.sft / "hf", run.policy / "hf"])
    assert list(read_results(run.eval / "results.json").models) == ["pi_0", "pi_1"]
    second = replace(run, round_index=2)
    evaluation_stage.execute(second, service)
    results = read_results(run.eval / "results.json")
    assert list(results.models) == ["pi_0", "pi_1", "pi_2"] and list(results.suites) == ["data.eval", "right", "wrong"]
    for name, mean in (("data.eval", 0.5), ("right", 1), ("wrong", 0)):
        suite = results.suites[name]
        for model in results.models:
            assert [suite.models[model][metric].mean for metric in ("avg@2", "pass@2", "maj@2", "tokens")] == [
                *[mean] * 3,
                2,  # one of the trace, one of the answer
            ]
        pairs = [(pair.model, pair.minus) for pair in suite.differences]
        assert pairs == [("pi_1", "pi_0"), ("pi_2", "pi_0"), ("pi_2", "pi_1")]
    logged = {row["step"]: row for row in Metrics.read(run.folder)}
    assert all(logged[step] | {"pass@1": 0.5, "right/avg@2": 1, "wrong/avg@2": 0} == logged[step] for step in (0, 1, 2))
    for some, stage in ((run, "eval"), (second, "eval_02")):
        assert all(file.exists() for file in find_stage(config, stage)[0].outputs(some))
