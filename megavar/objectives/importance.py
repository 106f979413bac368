"""Log-weights of traces and what is done with them (docs/method.md, equation 8); all arithmetic in float64.

log rho_k = d_k + log a_k: d_k compares policy and posterior on the trace, a_k estimates pi(Y_x | x, z_k).
"""

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import replace
from hashlib import blake2b

import numpy as np
from numpy.typing import NDArray

from megavar.config.schema import ObjectiveConfig
from megavar.records import LogProbs, Score, Weight, WeightStatus


def log_ratio(score: Score, ratio: str) -> float:
    """d_k: mean (`geometric_mean`) or sum (`sequence`) over the trace of log pi - log q, or 0 (`none`).

    Raises:
        ValueError: if log-probs are missing, of unequal lengths, or not finite, or `ratio` is unknown.
    """
    _check_choice("objective.ratio", ratio, ("geometric_mean", "sequence", "none"))
    if ratio == "none":
        return 0.0
    policy = _checked(score, "logp_policy", score.logp_policy)
    posterior = _checked(score, "logp_posterior", score.logp_posterior)
    if len(policy) != len(posterior):
        raise ValueError(
            f"{_name(score)}: logp_policy has {len(policy)} tokens, logp_posterior {len(posterior)}; score it again."
        )
    difference = policy - posterior
    return float(difference.mean() if ratio == "geometric_mean" else difference.sum())


def log_answer(score: Score, answer: str) -> float:
    """log a_k: share of correct sampled answers (`accuracy`), or mean (`geometric_mean`) or sum (`likelihood`) of the
    reference answer's log-probs.

    Raises:
        ValueError: if what the estimator needs is missing or impossible, or `answer` is unknown.
    """
    _check_choice("objective.answer_estimator", answer, ("accuracy", "geometric_mean", "likelihood"))
    if answer == "accuracy":
        if score.num_answers is None or score.num_correct is None:
            raise ValueError(f"{_name(score)} has no counted answers; run the sample and verify stages.")
        if score.num_answers < 1 or not 0 <= score.num_correct <= score.num_answers:
            raise ValueError(
                f"{_name(score)} has num_correct={score.num_correct} of num_answers={score.num_answers}; "
                "run the sample and verify stages again."
            )
        return float(np.log(score.num_correct / score.num_answers)) if score.num_correct else -np.inf
    logps = _checked(score, "logp_answer", score.logp_answer)
    return float(logps.mean() if answer == "geometric_mean" else logps.sum())


def normalise(log_weights: Sequence[float]) -> NDArray[np.float64]:
    """exp(log_weights) / sum, by log-sum-exp; all zero if every log-weight is -inf.

    Raises:
        ValueError: if one is NaN or +inf.
    """
    values = np.asarray(log_weights, np.float64)
    if np.isnan(values).any() or np.isposinf(values).any():
        raise ValueError(f"log-weights {values.tolist()} hold NaN or +inf; expected finite values or -inf.")
    largest = values.max(initial=-np.inf)
    if largest == -np.inf:
        return np.zeros_like(values)
    shifted = np.exp(values - largest)
    normalised: NDArray[np.float64] = shifted / shifted.sum()
    return normalised


def effective_sample_size(weights: NDArray[np.float64]) -> float:
    """(sum w)^2 / sum w^2: how many equally weighted traces the weights amount to; 0 if all weights are 0."""
    largest = weights.max(initial=0.0)
    if largest == 0.0:
        return 0.0
    shares = weights / largest
    return float(shares.sum() ** 2 / (shares**2).sum())


def check_traces(scores: Sequence[Score], truncated: Sequence[bool]) -> None:
    """Refuse what is not the traces of one question, each once and each with its `truncated` flag.

    Raises:
        ValueError: naming the question, or the questions.
    """
    questions = sorted({score.question_id for score in scores})
    if len(questions) != 1:
        raise ValueError(f"expected the traces of one question, got those of {questions}.")
    if len(scores) != len(truncated):
        raise ValueError(
            f"question {questions[0]!r} has {len(scores)} scores but {len(truncated)} truncated flags; give one each."
        )
    indices = sorted(score.trace_index for score in scores)
    if len(set(indices)) != len(indices):
        raise ValueError(f"question {questions[0]!r} has a trace twice: its trace indices are {indices}.")


def make_weights(
    scores: Sequence[Score],
    truncated: Sequence[bool],
    log_ratios: Sequence[float],
    log_answers: Sequence[float],
    shares: Sequence[float] | None = None,
    normalised: bool = True,
) -> list[Weight]:
    """Normalised weights of one question's traces; truncated traces are left out.

    If no trace has weight, those that are not truncated get the status `no_correct_trace`.

    Args:
        shares: what the traces count instead of exp(ratio + answer), one each, 0 for those left out.
        normalised: whether `shares` are made to sum to one.
    """
    sums = [
        -np.inf if cut else ratio + answer
        for cut, ratio, answer in zip(truncated, log_ratios, log_answers, strict=True)
    ]
    if shares is None:
        weights = normalise(sums)
    else:
        weights = np.array(shares, np.float64)
        if normalised and weights.any():
            weights = weights / weights.sum()
    usual = WeightStatus.OK if weights.any() else WeightStatus.NO_CORRECT_TRACE
    return [
        Weight(
            score.question_id,
            score.trace_index,
            score.round,
            ratio,
            answer,
            total,
            float(weight),
            WeightStatus.TRUNCATED if cut else usual,
        )
        for score, cut, ratio, answer, total, weight in zip(
            scores, truncated, log_ratios, log_answers, sums, weights, strict=True
        )
    ]


def implied_weights(
    scores: Sequence[Score],
    truncated: Sequence[bool],
    config: ObjectiveConfig,
    question_weight: Callable[[float], float],
) -> list[Weight]:
    """Normalised weights of one question's traces times the question's own weight (equations 10 to 12).

    The weights within the question are those of `config`; its own weight is a function of P, the probability that the
    policy answers it correctly.

    Raises:
        ValueError: if a score lacks what the settings need, or the scores are not those of one question.
    """
    check_traces(scores, truncated)
    pairs = list(zip(scores, truncated, strict=True))
    ratios = [0.0 if cut else log_ratio(score, config.ratio) for score, cut in pairs]
    answers = [-np.inf if cut else log_answer(score, config.answer_estimator) for score, cut in pairs]
    factor = question_weight(correct_probability(scores, truncated, config.answer_estimator))
    return [replace(row, weight=row.weight * factor) for row in make_weights(scores, truncated, ratios, answers)]


def correct_probability(scores: Sequence[Score], truncated: Sequence[bool], answer: str) -> float:
    """Estimate of P = P(Y_x | x) under the scored policy, at most 1; truncated traces count as 0.

    On the policy's own traces it is the share of correct answers; on the posterior's, which see the hint, each counts
    by pi(z | x) / q(z | x, y'), whatever `objective.ratio` does within the question: a mean of anything else is not the
    policy's probability. Where `answer` is the geometric mean, which is no probability, the likelihood stands for it.
    """
    estimator = "likelihood" if answer == "geometric_mean" else answer
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
    """Weight 1 for the trace of the largest log-weight, the first of equals; none where all are -inf."""
    sums = np.add(log_ratios, log_answers)
    shares = np.zeros(len(scores))
    if sums.max(initial=-np.inf) > -np.inf:
        shares[int(sums.argmax())] = 1.0
    return make_weights(scores, truncated, log_ratios, log_answers, shares=shares.tolist())


def gold_weight(score: Score) -> Weight:
    """Weight 1 for the gold trace of this score's question: trace index -1."""
    nothing, one = 0.0, 1.0
    return Weight(score.question_id, -1, score.round, nothing, nothing, nothing, one, WeightStatus.GOLD)


def select(weights: Sequence[Weight], selection: str, min_weight: float, seed: int) -> tuple[list[Weight], float]:
    """Choose the traces to train on, of all questions.

    Args:
        selection: `weighted`: every trace with its weight, without those under `min_weight` (the rest is not
            normalised again: a dropped share is lost, not given to others); `resample`: one trace a question
            drawn from its weights; `best`: the trace of the largest weight; either has the weight of all of them.
        seed: of the draw, which depends on it and the question's id only.

    Returns:
        The chosen weights, by question id and trace index, and the mean weight a question lost to `min_weight`.

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
        lost = sum(row.weight for group in groups.values() for row in group if row.weight < min_weight)
        return kept, lost / max(len(groups), 1)
    chosen = []
    for question_id, group in groups.items():
        shares = np.array([row.weight for row in group])
        if selection == "best":
            index = int(shares.argmax())
        else:
            digest = blake2b(f"{seed}/{question_id}".encode(), digest_size=8).digest()
            index = int(np.random.default_rng(int.from_bytes(digest)).choice(len(group), p=shares / shares.sum()))
        chosen.append(replace(group[index], weight=float(shares.sum())))
    return chosen, 0.0


def _checked(score: Score, column: str, logps: LogProbs | None) -> NDArray[np.float64]:
    if logps is None or len(logps) == 0:
        raise ValueError(f"{_name(score)} has no {column}; run the score stage, or choose settings without it.")
    values = np.asarray(logps, np.float64)
    if not np.isfinite(values).all():
        raise ValueError(f"{_name(score)}: {column} is not finite; the scored model is broken.")
    return values


def _check_choice(key: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise ValueError(f"{key}={value!r} is unknown; use one of {', '.join(known)}.")


def _name(score: Score) -> str:
    return f"trace {score.trace_index} of question {score.question_id!r}"
