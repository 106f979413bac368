"""Accuracy of the round's policy, and in the first round of pi_0, on the held-out questions."""

from megavar.evaluation.pass_at_k import evaluate_model
from megavar.ranks import on_rank_zero
from megavar.records import Answer
from megavar.rollout.service import RolloutService
from megavar.runs.folder import Run
from megavar.stages.run_files import eval_questions, eval_tokens, log_values, output, templates
from megavar.stages.sample import Loaded, Sampling, sample_policy
from megavar.stages.verify import verify_answers


def execute(run: Run, service: RolloutService) -> None:
    """Sample, verify and count; the accuracies go to eval/MODEL.json and into the metrics."""
    config = run.config
    models = {"pi_0": run.sft / "hf"} if run.round_index == 1 and "pi_0" in config.eval.models else {}
    if "policy" in config.eval.models:
        models[f"pi_{run.round_index}"] = run.policy / "hf"

    def load() -> Loaded:
        return Loaded(eval_questions(run), templates(run), eval_tokens(run))

    sampling = Sampling(config.sample, config.seed, 0, load)  # round 0: equal seeds for all policies
    for name, model in models.items():
        folder = run.folder / "eval" / name
        sample_policy(service, model, config.eval.num_samples, 1, sampling, folder)
        answers, verified = folder / "answers" / "data.parquet", folder / "verified"
        verify_answers(lambda: eval_questions(run), answers, config.verify, config.sample.flush_seconds, verified)
    on_rank_zero(lambda: _count(run, list(models)))


def _count(run: Run, models: list[str]) -> None:
    questions, config = eval_questions(run), run.config
    accuracies = {}
    for name in models:
        folder = run.folder / "eval" / name
        verified = output(folder / "verified", Answer, "question_id", "trace_index", "answer_index", "correct")
        rows = evaluate_model(questions, list(verified.rows()), config.eval, config.seed, folder.with_suffix(".json"))
        accuracies[int(name.removeprefix("pi_"))] = {f"pass@{row.k}": row.mean for row in rows}
    log_values(run, "eval", accuracies)
