"""What the round's policy, and in the first round pi_0, do on the held-out questions."""

from dataclasses import replace
from pathlib import Path

from megavar.evaluation.pass_at_k import evaluate_model
from megavar.ranks import on_rank_zero
from megavar.records import Answer
from megavar.rollout.service import RolloutService
from megavar.runs.folder import Run
from megavar.runs.names import suite_names
from megavar.stages.run_files import eval_questions, eval_tokens, log_values, output, templates
from megavar.stages.sample import Loaded, Sampling
from megavar.stages.suites import Suite, answer_suite, compare_models, write_suites

OWN = "data.eval"
"""Name of the suite that this file is."""


def execute(run: Run, service: RolloutService) -> None:
    """Sample, verify and count; the results go to eval/results.json, eval/MODEL.json and into the metrics."""
    for suite in _suites(run):

        def load(file: str = suite.file) -> Loaded:
            return Loaded(eval_questions(run, file), templates(run), eval_tokens(run, file))

        sampling = Sampling(run.config.sample, run.config.seed, 0, load)  # round 0: equal seeds for all policies
        for name, model in _models(run).items():
            answer_suite(service, model, sampling, run.config.evaluation, suite.folder / name)
    on_rank_zero(lambda: conclude(run))


def _suites(run: Run) -> list[Suite]:
    """`data.eval`, whose models' folders are those of eval/, then `eval.suites`."""
    own = [] if run.config.data.eval is None else [run.config.data.eval]
    names = suite_names(run.config.eval.suites)
    others = [Suite(name, file, run.eval / name) for name, file in zip(names, run.config.eval.suites, strict=True)]
    return [*(Suite(OWN, file, run.eval) for file in own), *others]


def _models(run: Run) -> dict[str, Path]:
    """Name -> folder of what this round evaluates."""
    models = {"pi_0": run.sft / "hf"} if run.round_index == 1 and "pi_0" in run.config.eval.models else {}
    if "policy" in run.config.eval.models:
        models[f"pi_{run.round_index}"] = run.policy / "hf"
    return models


def conclude(run: Run) -> None:
    """Write the results of all rounds until this one; rank 0 only."""
    config = run.config.evaluation
    suites, models = _suites(run), dict[str, Path]()
    for index in range(1, run.round_index + 1):
        models |= _models(replace(run, round_index=index))
    judged = Path("verified") / "data.parquet"
    finished = [name for name in models if all((suite.folder / name / judged).exists() for suite in suites)]
    results = {suite.name: compare_models(suite, eval_questions(run, suite.file), finished, config) for suite in suites}
    write_suites(results, {name: models[name] for name in finished}, config, run.eval)
    average = f"avg@{config.eval.num_samples}"
    values: dict[int, dict[str, float]] = {}
    for name in _models(run):
        averages = {suite.name: results[suite.name].models[name][average].mean for suite in suites}
        of_suites = {f"{suite}/{average}": mean for suite, mean in averages.items() if suite != OWN}
        values[int(name.removeprefix("pi_"))] = _accuracies(run, name) | of_suites
    log_values(run, "eval", values)


def _accuracies(run: Run, name: str) -> dict[str, float]:
    """Write eval/MODEL.json, of `data.eval`."""
    config, folder = run.config, run.eval / name
    if config.data.eval is None:
        return {}
    verified = output(folder / "verified", Answer, "question_id", "trace_index", "answer_index", "correct")
    questions = eval_questions(run, config.data.eval)
    rows = evaluate_model(questions, list(verified.rows()), config.eval, config.seed, folder.with_suffix(".json"))
    return {f"pass@{row.k}": row.mean for row in rows}
