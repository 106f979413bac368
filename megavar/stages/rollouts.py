"""Samples the policy's own traces and weighs them by accuracy, for the posterior to learn from (equation 9)."""

from dataclasses import replace

from megavar.ranks import on_rank_zero
from megavar.records import Answer, Trace
from megavar.rollout.engine import Engine
from megavar.rollout.service import RolloutService
from megavar.runs.folder import Run
from megavar.stages.run_files import log_values, round_questions, templates
from megavar.stages.sample import Sampling, sample_policy
from megavar.stages.verify import verify_answers
from megavar.stages.weigh import counted_scores, weigh_traces
from megavar.verifiers import NO_VERIFIER


def execute(run: Run, service: RolloutService) -> None:
    """Write traces, answers, verdicts and weights of the policy that the round starts with."""
    config, folder = run.config, run.round / "rollouts"

    def work() -> None:
        questions = [question for question in round_questions(run) if question.verifier != NO_VERIFIER]
        sampling = Sampling(config.sample, templates(run), config.seed, run.round_index)

        async def sample(engine: Engine) -> tuple[list[Trace], list[Answer]]:
            num_traces, num_answers = config.posterior.num_rollouts, config.sample.num_answers
            return await sample_policy(engine, questions, sampling, num_traces, num_answers, folder)

        traces, answers = service.run(run.reference, sample)
        verified = verify_answers(questions, answers, config.verify, config.sample.flush_seconds, folder / "verified")
        all_traces = replace(config.objective, num_traces=None)  # objective.num_traces is about q's traces
        values = weigh_traces(traces, counted_scores(traces, verified), "forward_kl", all_traces, folder / "weights")
        log_values(run, "rollouts", {run.round_index: values})

    on_rank_zero(work)
