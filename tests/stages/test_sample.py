"""What the sampling stage asks the engine for; the engine is one of this file, which continues every prompt alike."""

import asyncio
from pathlib import Path

import numpy as np
import pytest

from megavar.config.schema import SampleConfig, TemplateConfig
from megavar.data.templates import Templates
from megavar.record_files import read_records
from megavar.records import Answer, Question, Trace
from megavar.rollout.engine import Generation
from megavar.stages.sample import QUESTIONS_WITH_LOGPS, Loaded, Sampling, sample_policy

BASE = Path(__file__).parents[2] / "examples" / "base" / "qwen3-tiny"
QUESTIONS = [Question(f"q{n}", "1+1", "2", verifier="none" if n == 1 else "math") for n in range(70)]


class Echo:
    """Ends every trace and answer at once."""

    capacity = 4

    def __init__(self, close):
        self.close = close

    async def generate(self, request):
        ids = np.array([self.close], np.int32)
        logps = np.array([-0.5], np.float32) if request.return_logps else None
        return [Generation(ids, logps, "stop", "\\boxed{2}", request.seed + n) for n in range(request.num_samples)]


class Service:
    """Has one engine, whatever the model."""

    def __init__(self, engine):
        self.engine = engine

    def on_nodes(self, work):
        work()

    def run(self, model, work):
        return asyncio.run(work(self.engine))


def sample(folder, **settings):
    templates = Templates(BASE, TemplateConfig())
    sampling = Sampling(SampleConfig(**settings), 1, 1, lambda: Loaded(QUESTIONS, templates, templates))
    sample_policy(Service(Echo(templates.close_token)), BASE, 2, 3, sampling, folder)
    kinds = {"traces": Trace, "answers": Answer}
    return [read_records(folder / name / "data.parquet", kind) for name, kind in kinds.items()]


@pytest.mark.parametrize(("kept", "count"), [("some", 2 * QUESTIONS_WITH_LOGPS), ("all", 2 * len(QUESTIONS))])
def test_log_probs_are_asked_for_as_far_as_they_are_kept(tmp_path, kept, count):
    traces, _ = sample(tmp_path, keep_logps=kept)
    assert len(traces) == 140 and sum(trace.logp_engine is not None for trace in traces) == count


def test_questions_without_a_verifier_get_traces_and_no_answers(tmp_path):
    traces, answers = sample(tmp_path)
    assert {trace.question_id for trace in traces} == {question.id for question in QUESTIONS}
    assert {answer.question_id for answer in answers} == {question.id for question in QUESTIONS} - {"q1"}
    assert len(answers) == 69 * 2 * 3
