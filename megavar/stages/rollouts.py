"""Samples the policy's own traces and weighs them by accuracy, for the posterior to learn from (equation 9)."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from megavar.joins import by_question
from megavar.ranks import on_rank_zero
from megavar.record_files import rows
from megavar.records import Answer, Question, Trace
from megavar.rollout.service import RolloutService
from megavar.runs.folder import Run
from megavar.stages.run_files import log_values, output, question_tokens, round_questions, templates
from megavar.stages.sample import Loaded, Sampling, sample_policy
from megavar.stages.verify import verify_answers
from megavar.stages.weigh import Group, counted_scores, weigh_traces
from megavar.verifiers import NO_VERIFIER


def execute(run: Run, service: RolloutService) -> None:
    """Write traces, answers, verdicts and weights of the policy that the round starts with."""
    config, folder = run.config, run.round / "rollouts"

    def questions() -> list[Question]:
        return [question for question in round_questions(run) if question.verifier != NO_VERIFIER]

    def load() -> Loaded:
        return Loaded(questions(), templates(run), question_tokens(run))

    def weigh() -> None:
        # Which are about q's traces.
        all_traces = replace(config.objective, num_traces=None, max_leakage=None)
        values = weigh_traces(_groups(folder), "forward_kl", all_traces, folder / "weights")
        log_values(run, "rollouts", {run.round_index: values})

    sampling = Sampling(config.sample, config.seed, run.round_index, load)
    num_traces, num_answers = config.posterior.num_rollouts, config.sample.num_answers
    sample_policy(service, run.reference, num_traces, num_answers, sampling, folder)
    answers = folder / "answers" / "data.parquet"
    verify_answers(questions, answers, config.verify, config.sample.flush_seconds, folder / "verified")
    on_rank_zero(weigh)


def _groups(folder: Path) -> Iterator[Group]:
    traces = output(folder / "traces", Trace, "question_id", "trace_index", "round", "logp_engine", "finish")
    answers = output(folder / "verified", Answer, "question_id", "trace_index", "answer_index", "correct")
    for some_traces, some_answers in by_question(traces, answers):
        found = rows(some_traces, Trace)
        yield found, counted_scores(found, rows(some_answers, Answer))
