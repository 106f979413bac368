"""Accuracy of the round's policy, and in the first round of pi_0, on the held-out questions."""

from pathlib import Path

from megavar.evaluation.pass_at_k import evaluate_model
from megavar.ranks import on_rank_zero
from megavar.records import Answer, Question
from megavar.rollout.engine import Engine
from megavar.rollout.service import RolloutService
from megavar.runs.folder import Run
from megavar.stages.run_files import eval_questions, eval_tokens, log_values, output, templates
from megavar.stages.sample import Sampling, sample_policy
from megavar.stages.verify import verify_answers


def execute(run: Run, service: RolloutService) -> None:
    """Sample, verify and count; the accuracies go to eval/MODEL.json and into the metrics."""
    on_rank_zero(lambda: _evaluate(run, service))


def _evaluate(run: Run, service: RolloutService) -> None:
    config = run.config
    questions = eval_questions(run)
    models = {"pi_0": run.sft / "hf"} if run.round_index == 1 and "pi_0" in config.eval.models else {}
    if "policy" in config.eval.models:
        models[f"pi_{run.round_index}"] = run.policy / "hf"
    accuracies = {}
    for name, model in models.items():
        folder = run.folder / "eval" / name
        _sample(run, service, model, questions, folder)
        answers = folder / "answers" / "data.parquet"
        verify_answers(questions, answers, config.verify, config.sample.flush_seconds, folder / "verified")
        verified = output(folder / "verified", Answer, "question_id", "trace_index", "answer_index", "correct")
        rows = evaluate_model(questions, list(verified.rows()), config.eval, config.seed, folder.with_suffix(".json"))
        accuracies[int(name.removeprefix("pi_"))] = {f"pass@{row.k}": row.mean for row in rows}
    log_values(run, "eval", accuracies)


def _sample(run: Run, service: RolloutService, model: Path, questions: list[Question], folder: Path) -> None:
    config = run.config
    # Round 0: equal seeds for all policies.
    sampling = Sampling(config.sample, templates(run), eval_tokens(run), config.seed, round_index=0)

    async def sample(engine: Engine) -> None:
        await sample_policy(engine, questions, sampling, config.eval.num_samples, 1, folder)

    service.run(model, sample)
