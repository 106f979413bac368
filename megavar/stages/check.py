"""Everything that can be found wrong with a run before anything is started or written."""

from pathlib import Path

from megavar.config.schema import RunConfig
from megavar.data.questions import read_questions
from megavar.data.templates import Templates
from megavar.data.tokens import gold_sequences
from megavar.models import operators
from megavar.models.dims import read_dims
from megavar.models.folder import HuggingFaceFolder
from megavar.objectives import get_objective
from megavar.records import Question
from megavar.rollout.servers import check_interpreter
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
    HuggingFaceFolder(base).check(operators(dims), dims)
    if ranks is not None:
        check_parallel(config.parallel, dims, ranks)
        check_precision(config.precision)
    get_objective(config.objective.name)
    templates = Templates(base, config.templates)
    for file in (config.data.train, config.data.eval):
        if file is not None:
            check_questions(read_questions(Path(file)), file)
    limit = config.data.max_sequence_tokens
    gold_sequences(read_questions(Path(config.data.train)), templates, limit)
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
    if config.rollout.mode == "managed":
        check_interpreter(config.rollout.python)


def check_questions(questions: list[Question], file: str) -> None:
    """Check that every question's verifier exists."""
    for name in sorted({question.verifier for question in questions}):
        try:
            get_verifier(name)
        except ValueError as error:
            raise ValueError(f"{file}: {error}") from error
