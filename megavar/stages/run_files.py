"""What the stages read from a run and log into it: questions, templates, earlier outputs, metrics; on rank 0."""

import json
from collections.abc import Sequence
from pathlib import Path

from megavar.checksums import file_digest
from megavar.data.question_tokens import QuestionTokens
from megavar.data.questions import read_questions
from megavar.data.templates import Templates
from megavar.disk import atomic_write, make_folder
from megavar.record_files import RecordFile
from megavar.records import Question, Record
from megavar.runs.folder import Run
from megavar.runs.metrics import Metrics
from megavar.stages.references import bad_references
from megavar.verifiers import NO_VERIFIER


def train_questions(run: Run) -> list[Question]:
    """All questions of the train file but those that were left out (`data.on_bad_reference=drop`)."""
    return _kept(run, run.config.data.train)


def eval_questions(run: Run, file: str) -> list[Question]:
    """The held-out questions of a file whose answers are judged."""
    return [question for question in _kept(run, file) if question.verifier != NO_VERIFIER]


def _kept(run: Run, file: str) -> list[Question]:
    questions = read_questions(Path(file))
    if run.config.data.on_bad_reference == "refuse":
        return questions
    bad = left_out(run, Path(file), questions)
    return [question for question in questions if question.id not in bad]


def left_out(run: Run, file: Path, questions: Sequence[Question]) -> set[str]:
    """Ids of the questions with a bad reference answer; kept with the run, so that every stage leaves out the same."""
    kept = run.folder / "left_out" / f"{file_digest(file)}.json"
    if not kept.exists():
        bad = bad_references(file, questions, run.config.verify, run.config.templates.solution)
        make_folder(kept.parent)
        with atomic_write(kept) as aside:
            aside.write_text(json.dumps(sorted(bad)))
    try:
        return set(json.loads(kept.read_text()))
    except (ValueError, TypeError) as error:
        raise ValueError(f"{kept} is damaged ({error}); remove it, and the same command writes it again.") from error


def round_questions(run: Run) -> list[Question]:
    """Those that this round samples."""
    return run.take_questions(train_questions(run))


def templates(run: Run) -> Templates:
    """The base model's tokenizer with the run's templates."""
    return Templates(run.base, run.config.templates)


def question_tokens(run: Run) -> QuestionTokens:
    """Token ids of the questions of the train file."""
    return QuestionTokens(train_questions(run), templates(run))


def eval_tokens(run: Run, file: str) -> QuestionTokens:
    """Token ids of the held-out questions of a file."""
    return QuestionTokens(_kept(run, file), templates(run))


def output(folder: Path, record_type: type[Record], *columns: str) -> RecordFile[Record]:
    """The records that a finished stage left in `folder`.

    Args:
        columns: that are read; none: all.
    """
    return RecordFile(folder / "data.parquet", record_type, columns or None)


def sampler_folder(run: Run) -> Path:
    """The model that traces are sampled from, as a Hugging Face folder: q, or the policy that the round starts with."""
    return run.posterior / "hf" if run.config.trains_posterior else run.reference


def log_values(run: Run, stage: str, values_of: dict[int, dict[str, float]]) -> None:
    """Log a stage's values a round (0: before the first), replacing earlier ones, as curves over the rounds."""
    metrics = Metrics(run.folder, run.config.logging, run.config.name)
    metrics.drop(stage, list(values_of))
    for round_index, values in values_of.items():
        metrics.log(stage, round_index, values)
    metrics.close()
