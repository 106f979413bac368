"""Tokenizes the questions of a run before it starts: all that is trained on or sampled must fit and hold no control
token. Rows that do not are counted by kind, and the first ten described."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from megavar.config.schema import RunConfig, SampleConfig
from megavar.data.question_tokens import NO_TEXT, QuestionTokens
from megavar.data.questions import Problems
from megavar.data.templates import Templates
from megavar.records import Question


@dataclass
class TokenCounts:
    """Tokens of each question of a file that has the text."""

    prompts: list[int] = field(default_factory=list)
    """The policy's prompts."""
    hinted: list[int] = field(default_factory=list)
    """The posterior's prompts, if it is sampled or trained."""
    traces: list[int] = field(default_factory=list)
    """Gold traces."""
    answers: list[int] = field(default_factory=list)
    """Reference answers."""
    gold: list[int] = field(default_factory=list)
    """Prompt, gold trace and reference answer."""
    gold_hinted: list[int] = field(default_factory=list)
    """The posterior's prompt and gold trace."""


def count_tokens(
    file: Path, questions: Sequence[Question], sampled: Sequence[Question], templates: Templates, config: RunConfig
) -> TokenCounts:
    """Count the tokens of a question file.

    Args:
        questions: all of the file that are trained on.
        sampled: those that traces are sampled for; the longest trace and answer must fit after their prompts.

    Raises:
        ValueError: with the rows that cannot be used.
    """
    counts, problems = TokenCounts(), Problems(file)
    hinted = config.sample.sampler == "posterior"
    trained_by_hint = config.trains_posterior and config.posterior.source != "rollout"
    trained = {question.id for question in questions}
    sampled_ids = {question.id for question in sampled}
    every = list({question.id: question for question in (*questions, *sampled)}.values())
    limit = config.data.max_sequence_tokens
    room = {"data.max_sequence_tokens": limit, "rollout.context_length": config.rollout.context_length}
    unusable: dict[str, str] = {}

    def note(question: Question, text: str) -> None:
        unusable.setdefault(question.id, text)

    tokens = QuestionTokens(every, templates, note)
    kinds = ("policy_prompt", *(["posterior_prompt"] if hinted else []), "trace", "answer")
    lengths = dict(zip(kinds, (tokens.lengths(kind).tolist() for kind in kinds), strict=True))
    for row, question in enumerate(every):
        if question.id in unusable:
            problems.add("with text that cannot be used", question, unusable[question.id])
            continue
        prompt, trace, answer = (lengths[kind][row] for kind in ("policy_prompt", "trace", "answer"))
        with_hint = lengths["posterior_prompt"][row] if hinted else 0
        counts.prompts.append(prompt)
        counts.answers.append(answer)
        counts.hinted += [with_hint] if hinted else []
        if trace != NO_TEXT and question.id in trained:
            counts.traces.append(trace)
            counts.gold.append(prompt + trace + answer)
            counts.gold_hinted += [with_hint + trace] if trained_by_hint else []
            longest = max(counts.gold[-1], with_hint + trace if trained_by_hint else 0)
            if longest > limit:
                problems.add("longer than data.max_sequence_tokens", question, (
                    f"question {question.id!r} has a gold sequence of {longest} tokens, more than "
                    f"data.max_sequence_tokens={limit}; raise the limit or remove the question."
                ))  # fmt: skip
                continue
        if question.id in sampled_ids and (
            text := _without_room(question, max(prompt, with_hint), answer, config.sample, room)
        ):
            problems.add("without room for a longest trace and answer", question, text)
    problems.refuse(len(every))
    return counts


def check_room(
    file: Path,
    questions: Sequence[Question],
    templates: Templates,
    config: SampleConfig,
    limits: Mapping[str, int | None],
) -> None:
    """Check that the longest trace and answer that are sampled fit after the policy's prompt of each question.

    Args:
        limits: name -> tokens of prompt, trace and answer together.

    Raises:
        ValueError: with the rows that cannot be used.
    """
    problems = Problems(file)

    def note(question: Question, text: str) -> None:
        problems.add("with text that cannot be used", question, text)

    lengths = QuestionTokens(questions, templates, note).lengths("policy_prompt").tolist()
    for question, prompt in zip(questions, lengths, strict=True):
        if prompt != NO_TEXT and (text := _without_room(question, prompt, 0, config, limits)):
            problems.add("without room for a longest trace and answer", question, text)
    problems.refuse(len(questions))


def _without_room(
    question: Question, prompt_tokens: int, answer_tokens: int, config: SampleConfig, limits: Mapping[str, int | None]
) -> str | None:
    """What is wrong if the longest trace and the longest answer, sampled or reference, do not fit after a prompt."""
    answer_tokens = max(config.max_answer_tokens, answer_tokens)
    num_tokens = prompt_tokens + config.max_trace_tokens + answer_tokens
    for key, limit in limits.items():
        if limit is not None and num_tokens > limit:
            return (
                f"question {question.id!r}: its prompt, a trace of sample.max_trace_tokens="
                f"{config.max_trace_tokens} and an answer of {answer_tokens} tokens (the most sampled, or "
                f"the reference answer) make {num_tokens} tokens, over {key}={limit}; raise that or lower the rest."
            )
    return None


def require_gold_traces(questions: Sequence[Question], file: Path, setting: str) -> None:
    """Refuse questions without a gold trace, which this setting may train on instead of the sampled ones.

    Raises:
        ValueError: naming the rows.
    """
    problems = Problems(file)
    for question in questions:
        if question.trace is None:
            problems.add("without a trace", question, (
                f"question {question.id!r} has no trace, which {setting} may need; add it, or choose another setting."
            ))  # fmt: skip
    problems.refuse(len(questions))
