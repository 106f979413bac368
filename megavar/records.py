"""The records that stages exchange: one frozen dataclass for each, and its columns (docs/records.md).

Field names are a public interface: users read the files. How they are read and written: `record_files.py`.
"""

import types
import typing
from dataclasses import dataclass, field, fields
from enum import StrEnum
from typing import Annotated, Any, TypeVar

import numpy as np
import pyarrow as pa

TokenIds = np.ndarray[Any, np.dtype[np.int32]]
"""[tokens] int32."""
LogProbs = np.ndarray[Any, np.dtype[np.float32]]
"""[tokens] float32 natural-log probabilities."""
Int32 = Annotated[int, pa.int32()]
Float64 = Annotated[float, pa.float64()]


class Sampler(StrEnum):
    """The model that a trace was sampled from (its proposal distribution)."""

    POLICY = "policy"
    POSTERIOR = "posterior"
    GOLD = "gold"


class TraceFinish(StrEnum):
    """Finish reason of a trace."""

    CLOSED = "closed"
    """Generated the close marker; only these traces get weight."""
    LENGTH = "length"
    """Truncated at `sample.max_trace_tokens`."""
    ABORTED = "aborted"
    """Stopped without the close marker, or aborted by the server."""


class AnswerFinish(StrEnum):
    """Finish reason of an answer."""

    STOP = "stop"
    """Generated the end-of-sequence token."""
    LENGTH = "length"
    """Truncated at `sample.max_answer_tokens`."""
    ABORTED = "aborted"
    """Aborted by the server."""


class Verdict(StrEnum):
    """A verifier's result for one answer. If the verifier raises or crashes, the verdict is the text `error: ...`."""

    CORRECT = "correct"
    WRONG = "wrong"
    NO_ANSWER = "no_answer"
    """No answer could be extracted from the response."""
    TIMEOUT = "timeout"
    """The verifier exceeded `verify.timeout_seconds`."""


class WeightStatus(StrEnum):
    """How a trace got its weight."""

    OK = "ok"
    """Computed by the objective; can be 0."""
    TRUNCATED = "truncated"
    """The trace is not closed: weight 0."""
    LEAKY = "leaky"
    """Its leakage is above `objective.max_leakage`: weight 0."""
    UNUSED = "unused"
    """Trace index at or above `objective.num_traces`: weight 0."""
    GOLD = "gold"
    """The question's gold trace (trace index -1), a fallback."""
    NO_CORRECT_TRACE = "no_correct_trace"
    """No trace of the question has weight by its sampled answers. If the weight is positive, it is computed from the
    reference answer."""
    UNVERIFIABLE = "unverifiable"
    """The question has no verifier: the weight is computed from the reference answer, or 0."""


@dataclass(frozen=True)
class Question:
    """Input: one question x with its ground-truth answer y'."""

    id: str
    """Unique in the file."""
    question: str
    answer: str
    """Short verifiable answer; also the posterior's hint."""
    solution: str | None = None
    """The solution in the reference answer (`templates.reply`); None: made of `answer` by `templates.solution`."""
    trace: str | None = None
    """Gold trace, without markers."""
    verifier: str = "math"
    """Registry key, or `package.module:function`; `none`: its answers are not judged, and not sampled."""
    source: str | None = None
    """Origin of the question; informative only."""


@dataclass(frozen=True, eq=False)
class Trace:
    """One sampled (or gold) thinking trace z."""

    question_id: str
    trace_index: Int32
    """0 to K - 1 within the question."""
    round: Int32
    """From 1."""
    sampler: Sampler
    prompt_ids: TokenIds
    """The sampler's prompt, as sent to the server."""
    trace_ids: TokenIds
    """As generated, close marker included; never decoded and re-encoded."""
    logp_engine: LogProbs | None
    """[trace tokens] by the serving engine, of logits / temperature, before top-p; None: not asked for
    (`sample.keep_logps`)."""
    finish: TraceFinish
    seed: int
    """Sampling seed of the request."""


@dataclass(frozen=True, eq=False)
class Answer:
    """One answer y that the policy sampled after trace z."""

    question_id: str
    trace_index: Int32
    answer_index: Int32
    """0 to n - 1 within the trace."""
    round: Int32
    answer_ids: TokenIds
    """As generated, end-of-sequence token included."""
    text: str
    finish: AnswerFinish
    seed: int
    correct: bool | None = None
    """None until verified."""
    verdict: str | None = None
    """A `Verdict` or `error: ...`; None until verified."""


@dataclass(frozen=True, eq=False)
class Score:
    """Log-probs of one trace under policy and posterior, by the training engine; empty for a truncated trace."""

    question_id: str
    trace_index: Int32
    round: Int32
    logp_policy: LogProbs
    """[trace tokens] log pi(z_t | x, z_<t)."""
    logp_posterior: LogProbs | None
    """[trace tokens] log q(z_t | x, y', z_<t); `logp_policy` if the policy sampled the trace. None: not scored."""
    logp_answer: LogProbs | None
    """[answer tokens] log pi(y'_t | x, z, y'_<t) of the reference answer. None: not scored."""
    num_answers: Int32 | None
    """Verified answers of the trace; None if it has none, 0 if the question has no verifier."""
    num_correct: Int32 | None
    answer_start: Int32 | None = None
    """First token of the trace's first appearance of the question's answer. None, like all that follow, if it does not
    appear (docs/method.md#leakage)."""
    answer_stop: Int32 | None = None
    """The token after its last."""
    leakage: Float64 | None = None
    """-log pi(answer | x, the trace before it): minus the sum of `logp_policy` from start to stop, nats."""
    leakage_posterior: Float64 | None = None
    """The same of `logp_posterior`."""


@dataclass(frozen=True)
class Weight:
    """Training weight of one trace (docs/method.md, equation 8)."""

    question_id: str
    trace_index: Int32
    """-1: the question's gold trace."""
    round: Int32
    log_ratio: Float64
    """d_k, nats."""
    log_answer: Float64
    """log a_k, nats."""
    log_weight: Float64
    """log rho_k = log_ratio + log_answer, unnormalised; -inf if truncated."""
    weight: Float64
    """Weight in the loss; iwae: rho_k / sum_j rho_j over the question's traces."""
    status: WeightStatus


@dataclass(frozen=True, eq=False)
class Bound:
    """Estimates of the bounds on log pi(y' | x) from a question's closed traces, nats (docs/method.md, equation 5)."""

    question_id: str
    round: Int32
    num_traces: int
    """Closed traces K."""
    bounds: LogProbs
    """[K] estimates of L_1 to L_K."""
    bounds_geometric_mean: LogProbs
    """[K] the same with means over tokens instead of sums: not bounds, but the quantities of `ratio=geometric_mean`."""
    kl_posterior_policy: Float64
    """Estimate of KL(q || pi) over traces, nats."""
    ess: Float64
    """Effective sample size of the weights, in traces."""
    weight_entropy: Float64
    """Entropy of the normalised weights, nats."""


@dataclass(frozen=True, eq=False)
class Judgement:
    """Verdict of one answer, until all of a stage's answers have theirs; only in part files."""

    question_id: str
    trace_index: Int32
    answer_index: Int32
    answer_digest: int
    """Of the answer's ids: one that was sampled again has none."""
    verdict: str


@dataclass(frozen=True, eq=False)
class Scored:
    """Log-probs of one trace under one model, until all have theirs under both; only in part files."""

    row: int
    """Of the trace in its file, from 0."""
    logp_trace: bytes
    """[trace tokens] float32: as bytes, Parquet copies them whole instead of one number after another."""
    logp_answer: bytes
    """Likewise of the reference answer after it, under the policy; otherwise none."""


_NOTHING = np.zeros(0, np.int32)


@dataclass(frozen=True, eq=False)
class TrainSequence:
    """Input of training and scoring; on disk a `SequenceSet`."""

    prompt_ids: TokenIds
    """Context without loss."""
    trace_ids: TokenIds
    """Trained or scored, as is what follows it."""
    weight: float
    """Of every target token in the loss."""
    answer_ids: TokenIds = field(default_factory=lambda: _NOTHING)

    @property
    def target_ids(self) -> TokenIds:
        """[target tokens] trace and answer."""
        return np.concatenate([self.trace_ids, self.answer_ids]) if len(self.answer_ids) else self.trace_ids

    @property
    def num_tokens(self) -> int:
        """Length of prompt and target together."""
        return len(self.prompt_ids) + len(self.trace_ids) + len(self.answer_ids)


Record = TypeVar("Record", Question, Trace, Answer, Score, Weight, Bound, Judgement, Scored)

_ARROW_TYPES: dict[Any, pa.DataType] = {
    str: pa.string(),
    int: pa.int64(),
    bool: pa.bool_(),
    bytes: pa.binary(),
    TokenIds: pa.list_(pa.int32()),
    LogProbs: pa.list_(pa.float32()),
}


def column_type(kind: Any) -> Any:
    """Type of a field without `| None`."""
    if typing.get_origin(kind) in (typing.Union, types.UnionType):
        return next(part for part in typing.get_args(kind) if part is not type(None))
    return kind


def is_enum(kind: Any) -> bool:
    """Whether a field's type is one of the enums above."""
    return isinstance(kind, type) and issubclass(kind, StrEnum)


def schema_of(record_type: type[Record]) -> pa.Schema:
    """Parquet schema of a record type: one column per field; enums are string columns."""
    columns = []
    for item in fields(record_type):
        kind = column_type(item.type)
        if typing.get_origin(kind) is Annotated:
            arrow = kind.__metadata__[0]
        else:
            arrow = _ARROW_TYPES[str if is_enum(kind) else kind]
        columns.append(pa.field(item.name, arrow, kind is not item.type))
    return pa.schema(columns)


def identity(record: Any) -> tuple[str, int, int]:
    """(question_id, trace_index, answer_index) of a record; -1 for a field that it does not have."""
    return record.question_id, getattr(record, "trace_index", -1), getattr(record, "answer_index", -1)


def identity_columns(record_type: type[Any]) -> list[str]:
    """The columns that tell a record from the others of its file, which is sorted by them."""
    of_any = ("question_id", "trace_index", "answer_index", "row")
    names = [item.name for item in fields(record_type)]
    return [name for name in of_any if name in names]
