"""What the stages read from a run and log into it: questions, templates, earlier outputs, metrics; on rank 0."""

from pathlib import Path

from megavar.data.questions import read_questions
from megavar.data.templates import Templates
from megavar.records import Question, Record, read_records
from megavar.runs.folder import Run
from megavar.runs.metrics import Metrics


def train_questions(run: Run) -> list[Question]:
    """All questions of the train file."""
    return read_questions(Path(run.config.data.train))


def round_questions(run: Run) -> list[Question]:
    """Those that this round samples."""
    return run.take_questions(train_questions(run))


def templates(run: Run) -> Templates:
    """The base model's tokenizer with the run's templates."""
    return Templates(run.base, run.config.templates)


def read_output(folder: Path, record_type: type[Record]) -> list[Record]:
    """The records that a finished stage left in `folder`."""
    return read_records(folder / "data.parquet", record_type)


def sampler_folder(run: Run) -> Path:
    """The model that traces are sampled from, as a Hugging Face folder: q, or the policy that the round starts with."""
    return run.posterior / "hf" if run.config.sample.sampler == "posterior" else run.reference


def log_values(run: Run, stage: str, values_of: dict[int, dict[str, float]]) -> None:
    """Log a stage's values a round (0: before the first), replacing earlier ones, as curves over the rounds."""
    metrics = Metrics(run.folder, run.config.logging, run.config.name)
    metrics.drop(stage, list(values_of))
    for round_index, values in values_of.items():
        metrics.log(stage, round_index, values)
    metrics.close()
