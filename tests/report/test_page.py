"""The report's page: what it says of a small real run, that it is sound HTML, and that a browser draws it."""

import base64
import json
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from html.parser import HTMLParser

import numpy as np
import pytest
from helpers.small_run import (
    EVIL,
    NUM_CORRECT,
    QUESTIONS,
    ROUND_STAGES,
    make_run,
    round_records,
    trace_text,
    write_eval,
    write_round,
)

from megavar.cli import main
from megavar.config.load import load_config
from megavar.config.schema import ObjectiveConfig
from megavar.data.decode import open_decoder
from megavar.evaluation.results import Outcomes, Results, compare, write_results
from megavar.record_files import read_records, write_records
from megavar.records import Question, Score, Trace, Weight
from megavar.report import run_view
from megavar.report.browser import MAX_CHARACTERS, shorten
from megavar.report.page import write_page
from megavar.report.run_view import RunView, labels, open_run, spread
from megavar.runs.metrics import Metrics
from megavar.stages.weigh import weigh_traces

VOID = {"meta", "img", "br", "input"}
FIGURES = ["training", "pass_at_k", "traces", "densities", "implied_weight", "effective_sample_size", "leakage"]


def in_browser(test):
    skip = pytest.mark.skipif(shutil.which("chromium") is None, reason="needs a chromium binary on the PATH")
    return pytest.mark.browser(skip(test))


class Page(HTMLParser):
    """Tags and texts; fails on an element that is closed where it is not the last open one."""

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.attributes, self.texts = [], [], [], {}
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(tag, *pair) for pair in attrs]
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.setdefault(self.open[-1] if self.open else "", []).append(data)

    def values(self, name):
        return [value for _, found, value in self.attributes if found == name]


def make_evaluated_run(folder):
    found = make_run(folder)
    write_eval(found, "pi_0", {"easy": 3, "mixed": 1, "hard": 0, "cut": 0})
    write_eval(found, "pi_1", {"easy": 3, "mixed": 3, "hard": 1, "cut": 0})
    return found


@pytest.fixture
def run(tmp_path):
    """A run that a test may change."""
    return make_evaluated_run(tmp_path)


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    """The page of such a run, for the tests that only look at it."""
    return write_page([make_evaluated_run(tmp_path_factory.mktemp("drawn")).folder])


def data_of(text):
    (data,) = re.findall(r'<script type="application/json" id="data">(.*?)</script>', text, re.DOTALL)
    return {row["id"]: row for row in json.loads(data)}


def test_the_page_is_sound_html_that_asks_for_nothing(drawn):
    text = drawn.read_text()
    page = Page(text)
    images = page.values("src")
    assert len(images) == len(FIGURES) and all(source.startswith("data:image/png;base64,") for source in images)
    assert all(link.startswith("#") for link in page.values("href"))
    assert not re.search(r"https?://|@import|url\(", text)
    assert "default-src 'none'" in " ".join(page.values("content"))
    for name, source in zip(FIGURES, images, strict=True):
        file = drawn.with_name(f"{name}.png")
        assert base64.b64decode(source.split(",")[1]) == file.read_bytes()
        assert file.read_bytes().startswith(b"\x89PNG")


def test_leakage_and_what_was_left_out_are_said(run):
    """Of 15 closed traces 11 say the answer, at half a nat each, which is above the limit."""
    config = load_config(run.folder / "config.yaml", ["objective.max_leakage=0.4"])
    traces, _, scores = round_records()
    values = weigh_traces([(traces, scores)], "iwae", config.objective, run.round / "weights")
    assert values["answer_in_trace"] == 11 / 15 and values["traces_leaky"] == 11
    Metrics(run.folder, config.logging, "small").log("weigh", 1, values)
    replace(run, config=config).open()
    text = write_page([run.folder]).read_text()
    easy = data_of(text)["easy"]["traces"]
    assert [(trace["leakage"], trace["status"]) for trace in easy[:2]] == [(None, "ok"), (0.5, "leaky")]
    left_out = f"{values['leaky_weight']:.1%} of the weight"
    assert f"11 traces above objective.max_leakage=0.4 nats were left out, which had {left_out}." in text
    assert f"<td>traces left out as leaky</td><td>11, {left_out}</td>" in text
    under_q = f"(under the sampler {values['leakage_posterior']:.2f})"
    assert f"<td>leakage</td><td>0.50 nats {under_q}; 73% of the traces say the answer</td>" in text


def test_the_rollouts_of_the_policy_are_read_beside_the_traces_of_q(run):
    traces, _, _ = round_records()
    weights = [Weight(trace.question_id, trace.trace_index, 1, 0.0, 0.0, 0.0, 0.25, "ok") for trace in traces]
    write_records(run.round / "rollouts" / "traces" / "data.parquet", traces, Trace)
    write_records(run.round / "rollouts" / "weights" / "data.parquet", weights, Weight)
    shown = open_run(run.folder).last_round()
    assert len(shown.rollouts) == len(shown.rollout_weights) == 16


def test_text_of_a_question_never_becomes_markup(drawn):
    text = drawn.read_text()
    page = Page(text)
    assert page.tags.count("script") == 2 and EVIL not in text
    assert not page.values("onerror")
    assert data_of(text)["mixed"]["question"] == f"2+2 & {EVIL}"


def test_the_browser_data_joins_traces_weights_and_answers(drawn):
    found = data_of(drawn.read_text())
    assert list(found) == [question.id for question in QUESTIONS]
    mixed = found["mixed"]
    assert (mixed["hint"], mixed["num_correct"], mixed["num_answers"]) == ("4", 3, 8)
    assert [trace["num_correct"] for trace in mixed["traces"]] == list(NUM_CORRECT["mixed"])
    assert [trace["text"] for trace in mixed["traces"]] == [trace_text(index) for index in range(4)]
    assert [trace["log_ratio"] for trace in mixed["traces"]] == pytest.approx([0, 0.1, 0.2, 0.3], abs=1e-6)
    assert sum(trace["weight"] for trace in mixed["traces"]) == pytest.approx(1)
    assert mixed["traces"][1]["answers"] == [
        {"text": "\\boxed{0}", "verdict": "correct", "count": 1},
        {"text": "\\boxed{1}", "verdict": "wrong", "count": 1},
    ]
    assert {trace["status"] for trace in found["hard"]["traces"]} == {"no_correct_trace"}
    assert found["hard"]["ess"] == 0 and found["cut"]["traces"][3]["status"] == "truncated"
    assert found["cut"]["traces"][3]["answers"] == []


def test_a_gold_trace_is_shown_by_the_question_s_own_text(run):
    scores = read_records(run.round / "scores" / "data.parquet", Score)
    traces = open_run(run.folder).last_round().traces
    config = ObjectiveConfig(on_no_correct_trace="gold")
    weigh_traces([(traces, scores)], "iwae", config, run.round / "weights")
    rows = [{"id": row.id, "question": row.question, "answer": row.answer, "trace": "own"} for row in QUESTIONS]
    (run.folder.parents[1] / "questions.jsonl").write_text("\n".join(map(json.dumps, rows)))
    gold = data_of(write_page([run.folder]).read_text())["hard"]["traces"][-1]
    assert (gold["index"], gold["status"], gold["weight"], gold["text"]) == (-1, "gold", 1, "own")


def test_long_texts_keep_their_ends_and_many_questions_are_spread():
    text = "a" * MAX_CHARACTERS + "z" * 10
    assert shorten(text[:MAX_CHARACTERS]) == text[:MAX_CHARACTERS]
    assert "[… 10 characters omitted …]" in shorten(text)
    assert shorten(text).startswith("aaa") and shorten(text).endswith("zzz")
    questions = [Question(str(index), "x", "1") for index in range(10)]
    assert [row.id for row in spread(questions, 4)] == ["0", "3", "6", "9"]
    assert spread(questions, 10) == questions


def test_of_a_large_round_some_questions_are_read_and_the_page_says_so(run, monkeypatch):
    monkeypatch.setattr(run_view, "MOST_QUESTIONS", 2)
    last_round = open_run(run.folder).last_round()
    weighted = {row.question_id for row in last_round.weights}
    assert last_round.num_weighted == len(QUESTIONS) and len(weighted) == 2
    for records in (last_round.traces, last_round.answers, last_round.scores):
        assert {row.question_id for row in records} <= weighted and records
    page = write_page([run.folder]).read_text()
    assert f"figures of the round: of 2 of its {len(QUESTIONS)} weighted questions" in page
    assert set(data_of(page)) == weighted


def test_runs_named_after_the_first_are_compared(run, tmp_path):
    other = make_run(tmp_path, "sft_only", stages=("sft",))
    write_eval(other, "pi_0", {"easy": 3, "mixed": 0, "hard": 0, "cut": 0})
    page = Page(write_page([run.folder, other.folder]).read_text())
    cells = page.texts["td"]
    at = cells.index("sft_only")
    assert cells[at : at + 3] == ["sft_only", "pi_0", "1"] and cells[at + 3].startswith("0.250")
    assert any("Compared with: sft_only" in text for text in page.texts["p"])
    assert not (other.folder / "report").exists()


def test_the_suites_of_a_run_are_a_table_and_a_figure(run):
    def outcomes(*num_correct):
        zeros = np.zeros(len(num_correct))
        return Outcomes(np.array(num_correct, float), zeros, zeros + 12, zeros)

    suite = compare("<b>.jsonl", {"pi_0": outcomes(0, 2), "pi_1": outcomes(3, 3)}, 3, [3], 50, 0)
    results = Results(3, 50, 0, {"pi_0": "a", "pi_1": "b"}, {"data.eval": suite, "<b>": suite})
    write_results(results, run.folder / "eval" / "results.json")
    page = Page(write_page([run.folder]).read_text())
    assert len(page.values("src")) == len(FIGURES) + 1 and (run.folder / "report" / "suites.png").exists()
    assert "<b>, 2 questions" in page.texts["th"] and "b" not in page.tags
    at = page.texts["td"].index("pi_1 − pi_0")
    assert page.texts["td"][at + 1].startswith("+0.667\n[") and page.texts["td"][at + 4].startswith("+0\n[")


def test_what_is_not_finished_yet_is_said(tmp_path):
    run = make_run(tmp_path, stages=ROUND_STAGES)
    page = Page(write_page([run.folder]).read_text())
    assert any("Not finished yet: policy, export, eval." in text for text in page.texts["p"])
    assert len(page.values("src")) == len(FIGURES) - 1


@pytest.mark.parametrize("finished", range(len(ROUND_STAGES)))
def test_a_run_without_weights_is_refused_by_the_first_missing_stage(tmp_path, finished, capsys):
    run = make_run(tmp_path, stages=ROUND_STAGES[:finished])
    assert main(["report", str(run.folder)]) == 2
    missing = ROUND_STAGES[finished]
    assert f"stage {missing} is not finished; run `megavar {missing}` first." in capsys.readouterr().out
    assert not (run.folder / "report").exists()


@pytest.mark.parametrize(
    ("settings", "made", "missing"),
    [
        ("sample.sampler=policy objective.ratio=none", ["sft"], ["sample", "verify", "score", "weigh"]),
        ("posterior.source=rollout", ["sft"], ["rollouts", "posterior", "sample", "verify", "score", "weigh"]),
        ("rounds=2 eval.models=[pi_0]", [*ROUND_STAGES, "policy", "export", "eval"], ["sample_02", "verify_02"]),
    ],
)
def test_missing_stages_are_those_of_the_run(tmp_path, settings, made, missing):
    run = make_run(tmp_path, stages=tuple(made))
    config = load_config(tmp_path / "run.yaml", settings.split())
    found = RunView(run.folder, config).unfinished()
    assert found[: len(missing)] == missing and "eval_02" not in found
    if made == ["sft"]:
        with pytest.raises(ValueError, match=f"stage {missing[0]} is not finished"):
            RunView(run.folder, config).round_folder()


def test_files_that_are_gone_and_folders_of_something_else_are_named(run, tmp_path):
    (run.round / "scores" / "data.parquet").unlink()
    with pytest.raises(ValueError, match=r"no round_\* folder contains traces, verified, scores, weights"):
        write_page([run.folder])
    with pytest.raises(ValueError, match=r"is not a run folder: it has no config\.yaml"):
        write_page([tmp_path])


def test_lost_metrics_are_said(run):
    (run.folder / "metrics.jsonl").unlink()
    message = r"small/metrics\.jsonl has no complete row of stage weigh in round 1; .* entry weigh from"
    with pytest.raises(ValueError, match=message):
        write_page([run.folder])


def test_questions_that_moved_are_named_with_their_key(run):
    (run.folder.parents[1] / "questions.jsonl").rename(run.folder / "moved.jsonl")
    with pytest.raises(ValueError, match=r"data\.train: No question file .*the folder the run was started in"):
        write_page([run.folder])


def test_the_last_complete_round_is_shown_and_a_moved_run_is_found(run, tmp_path):
    write_round(run, 2)
    (run.folder / "round_03" / "traces").mkdir(parents=True)
    moved = run.folder.rename(tmp_path / "elsewhere")
    assert open_run(moved).last_round().folder.name == "round_02"
    assert "round_02 · 4 questions" in write_page([moved]).read_text()


def test_runs_of_one_name_are_told_apart_by_their_paths(run, tmp_path):
    (tmp_path / "b").mkdir()
    other = make_run(tmp_path / "b", "small")
    assert list(labels([open_run(run.folder), open_run(other.folder)])) == [str(run.folder), str(other.folder)]
    assert list(labels([open_run(run.folder)] * 2)) == ["small"]


def test_ids_are_decoded_as_transformers_does():
    from helpers.small_run import BASE, ids
    from transformers import AutoTokenizer

    tokens = ids(339, 279, 198, 23, 9, 17, 341)
    assert open_decoder(BASE)(tokens) == AutoTokenizer.from_pretrained(BASE).decode(tokens.tolist())


def test_looking_needs_no_torch_and_no_megatron(run):
    code = "import sys; from megavar.cli import main; main(sys.argv[1:]); print([m for m in sys.modules if m in %r])"
    command = [sys.executable, "-c", code % (("torch", "megatron", "transformers"),), "report", str(run.folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


def browse(page, address="", script=""):
    """The page's elements as Chromium has them after `script` ran, and what its console said."""
    shown = page.with_name("shown.html")
    inserted = f"<script>{script}</script></body>" if script else "</body>"
    shown.write_text(page.read_text().replace("</body>", inserted))
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", "--virtual-time-budget=2000"]
    options += ["--no-first-run", "--disable-background-networking", "--disable-component-update", "--disable-sync"]
    profile = f"--user-data-dir={page.parent}/profile"
    done = subprocess.run(
        ["chromium", *options, profile, "--dump-dom", f"file://{shown}{address}"],
        capture_output=True, text=True, timeout=120, check=True,
    )  # fmt: skip
    return Page(done.stdout), [line for line in done.stderr.splitlines() if "CONSOLE" in line]


@in_browser
def test_a_browser_draws_the_traces_without_a_complaint(drawn):
    page, console = browse(drawn)
    assert console == []
    assert page.values("data-id") == ["easy", "mixed", "hard", "cut"]
    assert page.texts["h3"] == ["easy"] and page.tags.count("article") == 4
    assert page.values("class").count("verdict correct") == 8


@in_browser
def test_a_link_opens_its_question_and_its_text_stays_text(drawn):
    page, console = browse(drawn, "#question=mixed")
    assert console == [] and page.texts["h3"] == ["mixed"]
    assert f"2+2 & {EVIL}" in "".join(page.texts["pre"]) and page.tags.count("img") == len(FIGURES)


@in_browser
@pytest.mark.parametrize(
    ("control", "value", "shown"),
    [
        ("filter", "none", ["hard"]),
        ("filter", "low", ["mixed", "cut"]),
        ("filter", "mixed", ["mixed", "cut"]),
        ("filter", "truncated", ["cut"]),
        ("sort", "id", ["cut", "easy", "hard", "mixed"]),
        ("sort", "ess", ["hard", "cut", "mixed", "easy"]),
        ("sort", "correct", ["hard", "cut", "mixed", "easy"]),
        ("search", "9*9", ["hard"]),
    ],
)
def test_questions_are_searched_filtered_and_sorted(drawn, control, value, shown):
    script = f"{control}.value = {json.dumps(value)}; {control}.dispatchEvent(new Event('input'));"
    page, console = browse(drawn, script=script)
    assert console == [] and page.values("data-id") == shown
    assert page.texts["h3"] == ["easy" if "easy" in shown else shown[0]]


@in_browser
def test_the_check_sees_a_page_that_complains(drawn):
    assert browse(drawn, script="undefined_name()")[1]
