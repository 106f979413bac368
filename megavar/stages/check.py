"""Refuses what is wrong with a run before anything is started or written.

What needs least is checked first: configuration and question files within a second, then the model folder, then
everything that needs the tokenizer.
"""

import logging
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from megavar.config.schema import RolloutConfig, RunConfig, VerifyConfig
from megavar.data.overlap import Overlap
from megavar.data.questions import MOST_SHOWN, Problems, read_questions
from megavar.data.templates import Templates
from megavar.objectives import check_objective
from megavar.records import Question
from megavar.runs.folder import Run
from megavar.runs.names import suite_names
from megavar.runs.reuse import open_others
from megavar.stages.check_model import check_model_files
from megavar.stages.check_questions import count_tokens, require_gold_traces
from megavar.stages.forecast import Forecast
from megavar.stages.references import bad_references
from megavar.verifiers import NO_VERIFIER, check_verifiers

if TYPE_CHECKING:
    from megavar.models.dims import ModelDims

logger = logging.getLogger(__name__)


def check_run(config: RunConfig, ranks: int | None) -> Forecast:
    """Check settings, questions, reference answers, model, parallel layout, precision and servers of a run.

    Args:
        ranks: world size, or None for a stage that runs without torchrun.

    Returns:
        What the run will take.

    Raises:
        ValueError: for the first thing that is wrong; of questions, all that are.
    """
    objective = check_objective(config.objective, config.sample)
    open_others(config)
    _check_packages(config)
    _check_microbatches(config)
    train = usable_questions(config, config.data.train)
    held_out = [] if config.data.eval is None else usable_questions(config, config.data.eval)
    suites = {file: usable_questions(config, file) for file in config.eval.suites}
    suite_names(config.eval.suites)
    _warn_of_overlap(config, train, "data.eval", config.data.eval, held_out)
    for file, questions in suites.items():
        require_verifiers(file, questions)
        _warn_of_overlap(config, train, "eval.suites", file, questions)
    sampled = _sampled_questions(config, train)
    if config.objective.on_no_correct_trace == "gold":
        require_gold_traces(sampled, Path(config.data.train), "objective.on_no_correct_trace=gold")
    if objective.needs_gold_traces:
        judged = [question for question in sampled if question.verifier != NO_VERIFIER]
        require_gold_traces(judged, Path(config.data.train), f"objective.name={config.objective.name}")
    check_servers(config.rollout)
    dims, num_parameters = _check_model(config, ranks)
    limit, longest = config.data.max_sequence_tokens, dims.max_positions
    if limit > longest:
        source = "max_position_embeddings"
        source += ", or the length that YaRN extends to" if dims.yarn else ""
        raise ValueError(f"data.max_sequence_tokens={limit} is more than the model's {source}={longest}; lower it.")
    templates = Templates(Path(config.model), config.templates)
    check_model_files(Path(config.model), dims, templates, train[0])
    counts = count_tokens(Path(config.data.train), train, sampled, templates, config)
    _check_gold(config, train)
    if config.data.eval is not None:
        count_tokens(Path(config.data.eval), [], held_out, templates, config)
        if all(question.verifier == NO_VERIFIER for question in held_out):
            raise ValueError(f"{config.data.eval}: every question has the verifier none, so there is nothing to count.")
    for file, questions in suites.items():
        count_tokens(Path(file), [], questions, templates, config)
    ranks = config.parallel.least_ranks if ranks is None else ranks
    return Forecast(config, dims, num_parameters, ranks, train, len(sampled), counts)


def usable_questions(config: RunConfig, file: str) -> list[Question]:
    """The questions of a file; those with a bad reference answer are refused, or left out with `on_bad_reference=drop`.

    Raises:
        ValueError: for bad rows, reference answers that are not correct by their own verifier, an unknown verifier.
    """
    questions = read_judged(file, config.verify)
    bad = bad_references(Path(file), questions, config.verify, config.templates.solution)
    problems = Problems(Path(file))
    for question in questions:
        if question.id in bad:
            problems.add(bad[question.id][0], question, f"question {question.id!r}: {bad[question.id][1]}")
    if config.data.on_bad_reference == "refuse":
        problems.refuse(len(questions), " Correct them, or leave them out with data.on_bad_reference=drop.")
    elif bad:
        logger.warning("check: %s; left out (data.on_bad_reference=drop).", problems.summary(len(questions)))
    if len(bad) == len(questions):
        raise ValueError(f"{file}: no question has a reference answer that is correct by its own verifier.")
    return [question for question in questions if question.id not in bad]


def require_verifiers(file: str, questions: Sequence[Question]) -> None:
    """Refuse (ValueError) a suite with questions that nobody judges: its results would be of other questions."""
    unjudged = [question.id for question in questions if question.verifier == NO_VERIFIER]
    if unjudged:
        raise ValueError(
            f"{file}: {len(unjudged)} of {len(questions)} questions have the verifier {NO_VERIFIER}, such as "
            f"{unjudged[0]!r}; a suite needs one that judges every answer, so name it or leave these questions out."
        )


def _warn_of_overlap(
    config: RunConfig, train: list[Question], key: str, file: str | None, held_out: list[Question]
) -> None:
    """Say which questions are trained on and held out."""
    known = Overlap(question.question for question in held_out)
    shared = [question.id for question in train if question.question in known] if held_out else []
    if shared:
        logger.warning(
            "check: %d of %d questions of data.train=%s are those of %s=%s, or have 13 words in a row in common "
            "with one (%s%s); leave them out with `megavar import %s --exclude %s --out NEW.jsonl`.",
            len(shared), len(train), config.data.train, key, file, ", ".join(shared[:MOST_SHOWN]),
            ", ..." if len(shared) > MOST_SHOWN else "", config.data.train, file,
        )  # fmt: skip


def _check_packages(config: RunConfig) -> None:
    if config.logging.wandb_project is not None and find_spec("wandb") is None:
        raise ValueError(
            f"logging.wandb_project={config.logging.wandb_project} needs the package wandb, which is not installed; "
            "run pip install -e '.[wandb]' in megavar's folder, or leave it out."
        )


def _check_microbatches(config: RunConfig) -> None:
    limit = config.data.max_sequence_tokens
    for name, budget in (
        ("sft", config.sft.microbatch_tokens),
        ("posterior.train", config.posterior.train.microbatch_tokens),
        ("policy.train", config.policy.train.microbatch_tokens),
        ("score", config.score.microbatch_tokens),
    ):
        if budget < limit:
            raise ValueError(
                f"{name}.microbatch_tokens={budget} is less than data.max_sequence_tokens={limit}: a longest "
                "sequence would fit in no microbatch; raise the first or lower the second."
            )


def read_judged(file: str, config: VerifyConfig) -> list[Question]:
    """The questions of a file, each with a known verifier."""
    questions = read_questions(Path(file))
    try:
        check_verifiers((question.verifier for question in questions), config.plugins)
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from error
    return questions


def _sampled_questions(config: RunConfig, train: list[Question]) -> list[Question]:
    """The questions that any round samples."""
    number, rounds = config.data.questions_per_round, config.rounds
    if number is None:
        return train
    needed = number * rounds
    if config.data.fresh_questions and needed > len(train):
        raise ValueError(
            f"data.fresh_questions=true needs rounds x questions_per_round = {rounds} x {number} = {needed} "
            f"questions, but {config.data.train} has {len(train)}."
        )
    return train[: needed if config.data.fresh_questions else number]


def check_servers(config: RolloutConfig) -> None:
    """Check that managed servers can be started here, or that the key of external ones is there."""
    from megavar.rollout.sglang_servers import check_interpreter, device_slices, external_key, visible_gpus

    if config.mode == "external":
        external_key(config)
    if config.mode == "managed":
        check_interpreter(config.python)
        device_slices(visible_gpus(), config.num_servers, config.tensor_parallel_size)


def _check_model(config: RunConfig, ranks: int | None) -> tuple["ModelDims", int]:
    """Check the model's files, and that it can be split and computed as configured; returns also its parameters."""
    # Not above: these import torch, and what is checked before needs none.
    from megavar.checkpoints.convert import Model
    from megavar.models.config_json import read_dims
    from megavar.models.parallel_layout import check_layout

    dims = read_dims(Path(config.model))
    if ranks is not None:
        check_layout(config.parallel, dims, ranks)
        if {config.precision.recipe, config.score_recipe} - {"fp32", "bf16"}:
            from megavar.training.precision import check_recipe

            check_recipe("precision.recipe", config.precision.recipe)
            check_recipe("score.precision", config.score_recipe)
        for name, train in config.training_jobs.items():
            if train.overlap_tensor_parallel:
                from megavar.training.tensor_overlap import check_tensor_overlap

                check_tensor_overlap(f"{name}.overlap_tensor_parallel", config.parallel.tensor)
            if train.optimizer_moments == "bf16" or train.optimizer_offload > 0:
                from megavar.training.precision import has_transformer_engine

                if not has_transformer_engine():
                    raise ValueError(
                        f"{name}.optimizer_moments={train.optimizer_moments} and {name}.optimizer_offload="
                        f"{train.optimizer_offload:g} need a GPU and Transformer Engine's AdamW; use fp32 and 0."
                    )
    model = Model(Path(config.model))
    model.check_tied_head()
    return dims, model.num_parameters


def _check_gold(config: RunConfig, train: list[Question]) -> None:
    """Check that there are gold traces where gold ones are trained on."""
    needed = [(train, "sft trains on")]
    if config.policy.mix_gold:
        for round_index in range(1, config.rounds + 1):
            needed.append((Run(config, round_index).take_questions(train), "policy.mix_gold=true adds"))
    for questions, purpose in needed:
        if all(question.trace is None for question in questions):
            raise ValueError(
                f"{config.data.train}: no question has a gold trace, which {purpose}; add `trace` to the question file."
            )
