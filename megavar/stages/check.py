"""Everything that can be found wrong with a run before anything is started or written."""

from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

from megavar.config.schema import RunConfig
from megavar.data.questions import read_questions
from megavar.data.templates import Templates
from megavar.data.tokens import gold_posterior_sequences, gold_sequences
from megavar.models.convert import Model
from megavar.models.dims import read_dims
from megavar.objectives import get_objective
from megavar.records import Question, TokenIds
from megavar.rollout.servers import check_interpreter
from megavar.stages.run import Run
from megavar.training.parallel import check_parallel
from megavar.training.precision import check_precision
from megavar.verifiers import get_verifier


def check_run(config: RunConfig, ranks: int | None) -> None:
    """Check model, questions, grid, precision and servers of a run.

    Args:
        ranks: world size, or None for a stage that runs without torchrun.

    Raises:
        ValueError: for the first thing that is wrong.
    """
    base = Path(config.model)
    dims = read_dims(base)
    Model(base).check_tied_head()
    if ranks is not None:
        check_parallel(config.parallel, dims, ranks)
        check_precision(config.precision)
    get_objective(config.objective.name)
    templates, limit = Templates(base, config.templates), config.data.max_sequence_tokens
    train = read_questions(Path(config.data.train))
    check_questions(train, config.data.train)
    gold_sequences(train, templates, limit)
    if config.posterior.source != "rollout" and config.sample.sampler == "posterior":
        gold_posterior_sequences(train, templates, limit)
    sampled = train
    if config.data.questions_per_round is not None:
        sampled = train[: config.data.questions_per_round * (config.rounds if config.data.fresh_questions else 1)]
        needed = config.data.questions_per_round * config.rounds
        if config.data.fresh_questions and needed > len(train):
            raise ValueError(
                f"data.fresh_questions=true needs rounds x questions_per_round = {config.rounds} x "
                f"{config.data.questions_per_round} = {needed} questions, but {config.data.train} has {len(train)}."
            )
    check_room(sampled, templates.policy_prompt, templates.answer, config)
    if config.sample.sampler == "posterior":
        check_room(sampled, templates.posterior_prompt, templates.answer, config)
    if config.objective.on_no_correct_trace == "gold":
        check_traces_given(sampled, config.data.train, "objective.on_no_correct_trace=gold")
    if config.objective.name == "reference_acc":
        check_traces_given(sampled, config.data.train, "objective.name=reference_acc")
    if config.policy.mix_gold:
        for round_index in range(1, config.rounds + 1):
            gold_sequences(Run(config, round_index).take_questions(train), templates, limit)
    if config.data.eval is not None:
        held_out = read_questions(Path(config.data.eval))
        check_questions(held_out, config.data.eval)
        check_room(held_out, templates.policy_prompt, templates.answer, config)
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
    if limit > dims.max_positions:
        raise ValueError(
            f"data.max_sequence_tokens={limit} is more than the model's max_position_embeddings="
            f"{dims.max_positions}; lower it."
        )
    if config.logging.wandb_project is not None and find_spec("wandb") is None:
        raise ValueError(
            f"logging.wandb_project={config.logging.wandb_project} needs the package wandb, which is not installed; "
            "run pip install 'megavar[wandb]', or leave it out."
        )
    if config.rollout.mode == "managed":
        check_interpreter(config.rollout.python)


def check_room(
    questions: list[Question],
    prompt_of: Callable[[Question], TokenIds],
    answer_of: Callable[[Question], TokenIds],
    config: RunConfig,
) -> None:
    """Check that the longest trace and the longest answer, sampled or reference, fit after every prompt."""
    for question in questions:
        answer_tokens = max(config.sample.max_answer_tokens, len(answer_of(question)))
        num_tokens = len(prompt_of(question)) + config.sample.max_trace_tokens + answer_tokens
        for key, limit in (
            ("data.max_sequence_tokens", config.data.max_sequence_tokens),
            ("rollout.context_length", config.rollout.context_length),
        ):
            if limit is not None and num_tokens > limit:
                raise ValueError(
                    f"question {question.id!r}: its prompt, a trace of sample.max_trace_tokens="
                    f"{config.sample.max_trace_tokens} and an answer of {answer_tokens} tokens (the most sampled, or "
                    f"the reference answer) make {num_tokens} tokens, over {key}={limit}; raise that or lower the rest."
                )


def check_traces_given(questions: list[Question], file: str, setting: str) -> None:
    """Check that every question has a gold trace, which this setting may put in place of the sampled ones."""
    for question in questions:
        if question.trace is None:
            raise ValueError(
                f"{file}: question {question.id!r} has no trace, which {setting} may need; "
                "add it, or choose another setting."
            )


def check_questions(questions: list[Question], file: str) -> None:
    """Check that every question's verifier exists."""
    for name in sorted({question.verifier for question in questions}):
        try:
            get_verifier(name)
        except ValueError as error:
            raise ValueError(f"{file}: {error}") from error
