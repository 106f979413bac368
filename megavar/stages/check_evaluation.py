"""Refuses what is wrong with an evaluation before a server is started or anything is written."""

from collections.abc import Sequence
from pathlib import Path

from megavar.config.schema import EvaluationConfig
from megavar.data.questions import Problems
from megavar.data.templates import Templates
from megavar.records import Question
from megavar.stages.check import check_servers, read_judged, require_verifiers
from megavar.stages.check_model import check_model_files, stop_tokens
from megavar.stages.check_questions import check_room
from megavar.stages.references import bad_references


def check_evaluation(models: Sequence[Path], config: EvaluationConfig) -> None:
    """Check the suites, whose questions all need a verifier that accepts their reference answer, servers and models.

    Raises:
        ValueError: for the first thing that is wrong; of a suite's questions, all that are.
    """
    if not (models and config.eval.suites):
        raise ValueError("nothing to evaluate: give --model and --suite (or eval.suites).")
    suites = {file: _questions(file, config) for file in config.eval.suites}
    for model in models:
        if not (model / "config.json").is_file():
            raise ValueError(f"--model {model} is no Hugging Face folder: it has no config.json.")
    check_servers(config.rollout)
    for model in models:
        _check_model(model, suites, config)
    if config.rollout.mode == "external":
        _check_exchange(models)


def _questions(file: str, config: EvaluationConfig) -> list[Question]:
    questions = read_judged(file, config.verify)
    require_verifiers(file, questions)
    problems = Problems(Path(file))
    bad = bad_references(Path(file), questions, config.verify, config.templates.solution)
    for question in questions:
        if question.id in bad:
            problems.add(bad[question.id][0], question, f"question {question.id!r}: {bad[question.id][1]}")
    problems.refuse(len(questions), " Correct them, or leave them out of the suite.")
    return questions


def _check_model(model: Path, suites: dict[str, list[Question]], config: EvaluationConfig) -> None:
    from megavar.models.config_json import read_dims  # imports torch, which what is checked before does not need

    dims = read_dims(model)
    templates = Templates(model, config.templates)
    limits = {"rollout.context_length": config.rollout.context_length, f"the positions of {model}": dims.max_positions}
    for file, questions in suites.items():
        check_model_files(model, dims, templates, questions[0])
        check_room(Path(file), questions, templates, config.sample, limits)


def _check_exchange(models: Sequence[Path]) -> None:
    """External servers keep the architecture and the stop tokens of the model that they were started with."""
    from megavar.models.config_json import read_dims

    for model in models[1:]:
        if (read_dims(model), stop_tokens(model)) != (read_dims(models[0]), stop_tokens(models[0])):
            raise ValueError(
                f"{model} has another architecture or other stop tokens than {models[0]}, which the external servers "
                "(rollout.urls) cannot change; evaluate each with servers of its own, into the same --out."
            )
