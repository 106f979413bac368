"""Importance log-weights of traces, their normalisation, and trace selection (docs/method.md, equation 8); float64.

log rho_k = d_k + log a_k: d_k is the log-ratio of policy and posterior on the trace, a_k estimates pi(Y_x | x, z_k).
Runs on rank 0, on records; needs no torch.
"""

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import replace
from hashlib import blake2b
from math import isfinite
from typing import NoReturn

import numpy as np
from numpy.typing import NDArray

from megavar.config.schema import ObjectiveConfig
from megavar.records import LogProbs, Score, Weight, WeightStatus


def log_ratio(score: Score, ratio: str) -> float:
    """d_k of equation 8: mean (`geometric_mean`) or sum (`sequence`) over the trace of log pi - log q; 0 for `none`.

    Raises:
        ValueError: if log-probs are missing, not finite or differ in length, or `ratio` is unknown.
    """
    _check_choice("objective.ratio", ratio, ("geometric_mean", "sequence", "none"))
    if ratio == "none":
        return 0.0
    policy = _given(score, "logp_policy", score.logp_policy)
    posterior = _given(score, "logp_posterior", score.logp_posterior)
    if len(policy) != len(posterior):
        raise ValueError(
            f"{_describe(score)}: logp_policy has {len(policy)} tokens, logp_posterior {len(posterior)}; rerun the "
            "score stage."
        )
    total = float(np.subtract(policy, posterior, dtype=np.float64).sum())
    if not isfinite(total):
        _refuse_infinite(score, logp_policy=policy, logp_posterior=posterior)
    return total / len(policy) if ratio == "geometric_mean" else total


def log_answer(score: Score, estimator: str) -> float:
    """log a_k of equation 8, nats; -inf for accuracy 0.

    Args:
        estimator: `accuracy`: num_correct / num_answers; `geometric_mean`: mean of the reference answer's token
            log-probs; `likelihood`: their sum.

    Raises:
        ValueError: if a column that the estimator needs is missing or invalid, or `estimator` is unknown.
    """
    _check_choice("objective.answer_estimator", estimator, ("accuracy", "geometric_mean", "likelihood"))
    if estimator == "accuracy":
        if score.num_answers is None or score.num_correct is None:
            raise ValueError(f"{_describe(score)} has no verified answers; run the sample and verify stages.")
        if score.num_answers < 1 or not 0 <= score.num_correct <= score.num_answers:
            raise ValueError(
                f"{_describe(score)} has num_correct={score.num_correct} of num_answers={score.num_answers}; "
                "rerun the sample and verify stages."
            )
        return float(np.log(score.num_correct / score.num_answers)) if score.num_correct else -np.inf
    logps = _given(score, "logp_answer", score.logp_answer)
    total = float(logps.sum(dtype=np.float64))
    if not isfinite(total):
        _refuse_infinite(score, logp_answer=logps)
    return total / len(logps) if estimator == "geometric_mean" else total


def normalise(log_weights: Sequence[float]) -> NDArray[np.float64]:
    """Softmax of [K] log-weights in float64; all 0 if every log-weight is -inf.

    Raises:
        ValueError: if a log-weight is NaN or +inf.
    """
    values = np.asarray(log_weights, np.float64)
    if np.isnan(values).any() or np.isposinf(values).any():
        raise ValueError(f"log-weights {values.tolist()} contain NaN or +inf; expected finite values or -inf.")
    largest = values.max(initial=-np.inf)
    if largest == -np.inf:
        return np.zeros_like(values)
    shifted = np.exp(values - largest)
    normalised: NDArray[np.float64] = shifted / shifted.sum()
    return normalised


def effective_sample_size(weights: NDArray[np.float64]) -> float:
    """ESS = (sum w)^2 / sum w^2 of [K] nonnegative weights, in traces (1 to K); 0 if all weights are 0."""
    largest = weights.max(initial=0.0)
    if largest == 0.0:
        return 0.0
    scaled = weights / largest
    return float(scaled.sum() ** 2 / (scaled**2).sum())


def check_traces(scores: Sequence[Score], truncated: Sequence[bool]) -> None:
    """Validate the arguments of `Weigh`: one question, unique trace indices, one `truncated` flag per score.

    Raises:
        ValueError: naming the question(s).
    """
    questions = sorted({score.question_id for score in scores})
    if len(questions) != 1:
        raise ValueError(f"expected scores of one question, got scores of {questions}; call once per question.")
    if len(scores) != len(truncated):
        raise ValueError(
            f"question {questions[0]!r} has {len(scores)} scores but {len(truncated)} truncated flags; pass one each."
        )
    indices = sorted(score.trace_index for score in scores)
    if len(set(indices)) != len(indices):
        raise ValueError(
            f"question {questions[0]!r} has duplicate trace indices {indices}; remove the stage's folder and rerun it."
        )


def make_weights(
    scores: Sequence[Score],
    truncated: Sequence[bool],
    log_ratios: Sequence[float],
    log_answers: Sequence[float],
    raw_weights: Sequence[float] | None = None,
    normalised: bool = True,
) -> list[Weight]:
    """Build the `Weight` records of one question, in the order of `scores`.

    A trace's log-weight is log-ratio + log-answer, -inf if it is truncated. If all weights are 0, closed traces get the
    status `no_correct_trace`.

    Args:
        log_ratios: [K] d_k, nats.
        log_answers: [K] log a_k, nats.
        raw_weights: [K] weights to use instead of exp(log-weight), 0 for truncated traces.
        normalised: divide `raw_weights` by their sum.
    """
    log_weights = [
        -np.inf if cut else ratio + answer
        for cut, ratio, answer in zip(truncated, log_ratios, log_answers, strict=True)
    ]
    if raw_weights is None:
        weights = normalise(log_weights)
    else:
        weights = np.array(raw_weights, np.float64)
        if normalised and weights.any():
            weights = weights / weights.sum()
    closed_status = WeightStatus.OK if weights.any() else WeightStatus.NO_CORRECT_TRACE
    return [
        Weight(
            score.question_id,
            score.trace_index,
            score.round,
            ratio,
            answer,
            log_weight,
            float(weight),
            WeightStatus.TRUNCATED if cut else closed_status,
        )
        for score, cut, ratio, answer, log_weight, weight in zip(
            scores, truncated, log_ratios, log_answers, log_weights, weights, strict=True
        )
    ]


def importance_weights(
    scores: Sequence[Score], truncated: Sequence[bool], ratio: str, answer_estimator: str
) -> list[Weight]:
    """Normalised rho_k of one question's traces (equation 8), in the order of `scores`."""
    pairs = list(zip(scores, truncated, strict=True))
    ratios = [0.0 if cut else log_ratio(score, ratio) for score, cut in pairs]
    answers = [-np.inf if cut else log_answer(score, answer_estimator) for score, cut in pairs]
    return make_weights(scores, truncated, ratios, answers)


def weigh_by_reference(
    scores: Sequence[Score],
    truncated: Sequence[bool],
    config: ObjectiveConfig,
    status: WeightStatus = WeightStatus.UNVERIFIABLE,
) -> list[Weight]:
    """Weights by the geometric mean of the reference answer, which training then uses, whatever was sampled.

    Args:
        status: of closed traces.
    """
    weights = importance_weights(scores, truncated, config.ratio, "geometric_mean")
    return [row if row.status == WeightStatus.TRUNCATED else replace(row, status=status) for row in weights]


def implied_weights(
    scores: Sequence[Score],
    truncated: Sequence[bool],
    config: ObjectiveConfig,
    question_weight: Callable[[float], float],
) -> list[Weight]:
    """Normalised weights of one question's traces times a weight of the question (equations 10 to 12).

    Weights within the question follow `config.ratio` and `config.answer_estimator`.

    Args:
        question_weight: weight of the question as a function of P = P(Y_x | x), see `correct_probability`.

    Raises:
        ValueError: if a column that the settings need is missing, or the scores belong to several questions.
    """
    check_traces(scores, truncated)
    pairs = list(zip(scores, truncated, strict=True))
    ratios = [0.0 if cut else log_ratio(score, config.ratio) for score, cut in pairs]
    answers = [-np.inf if cut else log_answer(score, config.answer_estimator) for score, cut in pairs]
    factor = question_weight(correct_probability(scores, truncated, config.answer_estimator))
    return [replace(row, weight=row.weight * factor) for row in make_weights(scores, truncated, ratios, answers)]


def correct_probability(scores: Sequence[Score], truncated: Sequence[bool], answer_estimator: str) -> float:
    """Estimate P = P(Y_x | x) under the scored policy, clipped to 1; truncated traces contribute 0.

    The estimate is the mean over traces of a_k pi(z_k | x) / q(z_k | x, y'); the ratio is 1 for traces sampled from the
    policy. The sequence ratio is used whatever `objective.ratio` is, since no other ratio gives the policy's
    probability. `geometric_mean` is not a probability either and is replaced by `likelihood`.
    """
    estimator = "likelihood" if answer_estimator == "geometric_mean" else answer_estimator
    terms = [
        -np.inf
        if cut
        else (log_ratio(score, "sequence") if score.logp_posterior is not None else 0.0) + log_answer(score, estimator)
        for score, cut in zip(scores, truncated, strict=True)
    ]
    return min(1.0, float(np.mean(np.exp(terms))))


def best_trace(
    scores: Sequence[Score], truncated: Sequence[bool], log_ratios: Sequence[float], log_answers: Sequence[float]
) -> list[Weight]:
    """Weight 1 for the trace with the largest log-weight (ties: the first); all 0 if every log-weight is -inf."""
    log_weights = np.add(log_ratios, log_answers)
    weights = np.zeros(len(scores))
    if log_weights.max(initial=-np.inf) > -np.inf:
        weights[int(log_weights.argmax())] = 1.0
    return make_weights(scores, truncated, log_ratios, log_answers, raw_weights=weights.tolist())


def gold_weight(score: Score) -> Weight:
    """Weight 1 (log-weight 0) for the gold trace, index -1, of this score's question."""
    return Weight(score.question_id, -1, score.round, 0.0, 0.0, 0.0, 1.0, WeightStatus.GOLD)


def select(weights: Sequence[Weight], selection: str, min_weight: float, seed: int) -> tuple[list[Weight], float]:
    """Select the traces to train on, over all questions.

    Args:
        weights: of all questions, in any order.
        selection: `weighted`: every trace with its weight, except those below `min_weight`; the remaining weights are
            not renormalised. `resample`: one trace per question, sampled with probability proportional to its weight.
            `best`: the trace with the largest weight. The one trace of `resample` and `best` gets the question's total
            weight.
        seed: for `resample`; a question's sample depends only on the seed and its id.

    Returns:
        The selected weights, sorted by question id and trace index, and the pruned weight mass (`min_weight`): the mean
        over questions of the weight removed.

    Raises:
        ValueError: if `selection` is unknown.
    """
    _check_choice("objective.selection", selection, ("weighted", "resample", "best"))
    groups: dict[str, list[Weight]] = defaultdict(list)
    for weight in sorted(weights, key=lambda row: (row.question_id, row.trace_index)):
        if weight.weight > 0:
            groups[weight.question_id].append(weight)
    if selection == "weighted":
        kept = [row for group in groups.values() for row in group if row.weight >= min_weight]
        pruned = sum(row.weight for group in groups.values() for row in group if row.weight < min_weight)
        return kept, pruned / max(len(groups), 1)
    selected = []
    for question_id, group in groups.items():
        values = np.array([row.weight for row in group])
        if selection == "best":
            index = int(values.argmax())
        else:
            digest = blake2b(f"{seed}/{question_id}".encode(), digest_size=8).digest()
            index = int(np.random.default_rng(int.from_bytes(digest)).choice(len(group), p=values / values.sum()))
        selected.append(replace(group[index], weight=float(values.sum())))
    return selected, 0.0


def _given(score: Score, column: str, logps: LogProbs | None) -> LogProbs:
    if logps is None or len(logps) == 0:
        raise ValueError(
            f"{_describe(score)} has no {column}; run the score stage, or use settings that do not need it."
        )
    return logps


def _refuse_infinite(score: Score, **columns: LogProbs) -> NoReturn:
    """Name the first column with a value that is not finite: a sum of float32 in float64 is finite if its terms are."""
    wrong = next(column for column, logps in columns.items() if not np.isfinite(logps).all())
    raise ValueError(f"{_describe(score)}: {wrong} is not finite; check the weights of the scored model for NaN.")


def _check_choice(key: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{key}={value!r} is unknown; use one of {', '.join(choices)}.")


def _describe(score: Score) -> str:
    return f"trace {score.trace_index} of question {score.question_id!r}"
