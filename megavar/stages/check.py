"""Refuses what is wrong with a run before anything is started or written.

What needs least is checked first: configuration and question files within a second, then the model folder, then
everything that needs the tokenizer.
"""

from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from megavar.config.schema import RunConfig
from megavar.data.questions import read_questions
from megavar.data.templates import Templates
from megavar.data.tokens import gold_posterior_sequences, gold_sequences
from megavar.objectives import check_objective
from megavar.records import Question, TokenIds
from megavar.runs.folder import Run
from megavar.verifiers import get_verifier

if TYPE_CHECKING:
    from megavar.models.dims import ModelDims


def check_run(config: RunConfig, ranks: int | None) -> None:
    """Check settings, questions, model, parallel layout, precision and servers of a run.

    Args:
        ranks: world size, or None for a stage that runs without torchrun.

    Raises:
        ValueError: for the first thing that is wrong.
    """
    objective = check_objective(config.objective, config.sample)
    _check_packages(config)
    _check_microbatches(config)
    train = _read(config.data.train, config)
    held_out = [] if config.data.eval is None else _read(config.data.eval, config)
    sampled = _sampled_questions(config, train)
    if config.objective.on_no_correct_trace == "gold":
        _check_gold_traces(sampled, config.data.train, "objective.on_no_correct_trace=gold")
    if objective.needs_gold_traces:
        _check_gold_traces(sampled, config.data.train, f"objective.name={config.objective.name}")
    if config.rollout.mode == "managed":
        _check_servers(config)
    if config.rollout.mode == "external":
        _check_external_key(config)
    dims = _check_model(config, ranks)
    limit = config.data.max_sequence_tokens
    if limit > dims.max_positions:
        source = (
            "max_position_embeddings, or the length that YaRN extends to" if dims.yarn else "max_position_embeddings"
        )
        raise ValueError(
            f"data.max_sequence_tokens={limit} is more than the model's {source}={dims.max_positions}; lower it."
        )
    _check_tokens(config, train, sampled, held_out)


def _check_packages(config: RunConfig) -> None:
    if config.logging.wandb_project is not None and find_spec("wandb") is None:
        raise ValueError(
            f"logging.wandb_project={config.logging.wandb_project} needs the package wandb, which is not installed; "
            "run pip install 'megavar[wandb]', or leave it out."
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


def _read(file: str, config: RunConfig) -> list[Question]:
    """The questions of a file, each with a known verifier."""
    questions = read_questions(Path(file))
    for name in sorted({question.verifier for question in questions}):
        try:
            get_verifier(name, config.verify.plugins)
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


def _check_gold_traces(questions: list[Question], file: str, setting: str) -> None:
    """Check that every question has a gold trace, which this setting may train on instead of the sampled ones."""
    for question in questions:
        if question.trace is None:
            raise ValueError(
                f"{file}: question {question.id!r} has no trace, which {setting} may need; "
                "add it, or choose another setting."
            )


def _check_servers(config: RunConfig) -> None:
    from megavar.rollout.sglang_servers import check_interpreter, device_slices, visible_gpus

    check_interpreter(config.rollout.python)
    device_slices(visible_gpus(), config.rollout.num_servers, config.rollout.tensor_parallel_size)


def _check_external_key(config: RunConfig) -> None:
    from megavar.rollout.sglang_servers import external_key

    external_key(config.rollout)


def _check_model(config: RunConfig, ranks: int | None) -> "ModelDims":
    """Check the model's files, and that it can be split and computed as configured."""
    # Not above: these import torch, and what is checked before needs none.
    from megavar.checkpoints.convert import Model
    from megavar.models.config_json import read_dims
    from megavar.models.parallel_layout import check_layout

    dims = read_dims(Path(config.model))
    if ranks is not None:
        check_layout(config.parallel, dims, ranks)
        if config.precision.fp8 != "none":
            from megavar.training.precision import check_precision

            check_precision(config.precision)
    Model(Path(config.model)).check_tied_head()
    return dims


def _check_tokens(config: RunConfig, train: list[Question], sampled: list[Question], held_out: list[Question]) -> None:
    """Tokenize what will be trained on or sampled: all of it must fit, and nothing may hold a control token."""
    templates, limit = Templates(Path(config.model), config.templates), config.data.max_sequence_tokens
    gold_sequences(train, templates, limit)
    if config.posterior.source != "rollout" and config.sample.sampler == "posterior":
        gold_posterior_sequences(train, templates, limit)
    if config.policy.mix_gold:
        for round_index in range(1, config.rounds + 1):
            gold_sequences(Run(config, round_index).take_questions(train), templates, limit)
    _check_room([*sampled, *held_out], templates.policy_prompt, templates.answer, config)
    if config.sample.sampler == "posterior":
        _check_room(sampled, templates.posterior_prompt, templates.answer, config)


def _check_room(
    questions: list[Question],
    prompt_of: Callable[[Question], TokenIds],
    answer_of: Callable[[Question], TokenIds],
    config: RunConfig,
) -> None:
    """Check that the longest trace and the longest answer, sampled or reference, fit after every prompt."""
    limits = [
        (key, limit)
        for key, limit in (
            ("data.max_sequence_tokens", config.data.max_sequence_tokens),
            ("rollout.context_length", config.rollout.context_length),
        )
        if limit is not None
    ]
    for question in questions:
        answer_tokens = max(config.sample.max_answer_tokens, len(answer_of(question)))
        num_tokens = len(prompt_of(question)) + config.sample.max_trace_tokens + answer_tokens
        for key, limit in limits:
            if num_tokens > limit:
                raise ValueError(
                    f"question {question.id!r}: its prompt, a trace of sample.max_trace_tokens="
                    f"{config.sample.max_trace_tokens} and an answer of {answer_tokens} tokens (the most sampled, or "
                    f"the reference answer) make {num_tokens} tokens, over {key}={limit}; raise that or lower the rest."
                )
