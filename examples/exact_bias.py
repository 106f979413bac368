"""The bias of the weights as K grows, against exact values in worlds whose traces can all be listed.

    python examples/exact_bias.py [--out docs/evidence]

writes `exact_bias.json` and `exact_bias.png` and prints the table of docs/objectives.md, in half a minute of CPU time.
There is no randomness but that of the worlds' fixed seeds.

A world's traces are the strings of at most `length` symbols of {a, b} and a close marker, with a softmax over the three
at every node; the probability of a correct answer after a trace is a number of its own. The posterior's logits are the
policy's plus `lean` times the way to the true posterior's, plus a tenth of normal noise: 1/2 does not know the answer
well enough, 1 nearly is the true posterior, 4 overrates it.

Expectations over K traces are not sums over K-tuples but one integral each, since 1 / s = int_0^inf exp(-t s) dt:

    E sum_k [z_k = z] rho_k / sum_j rho_j = K q(z) rho(z) int exp(-t rho(z)) phi(t)^(K-1) dt,  phi(t) = E_q exp(-t rho)

It is taken by the trapezoidal rule in log t, which is exact to 1e-9 here (`tests/examples/test_exact_bias.py`).

Shape suffixes: S traces, N nodes x symbols and answers (the parameters), T points of the integral.
"""

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray

from megavar.disk import atomic_write
from megavar.objectives.importance import log_answer, log_ratio
from megavar.records import LogProbs, Score

RATIOS = ("sequence", "geometric_mean", "none")
COUNTS = (1, 2, 4, 8, 16, 32, 64)
LENGTHS = (2, 4, 8)
LEANS = (0.5, 1.0, 4.0)
SEEDS = range(5)
COLOURS = ("#0b6e99", "#d9730d", "#6b5b4b")
DASHES = {2: ":", 4: "--", 8: "-"}

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class World:
    """Everything about one question, exact."""

    logits: Floats
    """[nodes, 3] the policy's: nodes by length, then by alphabet; a, b, close."""
    answers_S: Floats
    """The logit of a correct answer after each trace; traces in the order of the nodes, the longest last."""
    scores: list[Score]
    """[S] one for each trace; `logp_answer` is log pi(Y | x, z), as one token."""
    log_q_S: Floats
    log_policy_S: Floats
    true_S: Floats
    """The true posterior, P(z | x, Y)."""
    gradients_SN: Floats
    """Of log pi(z, Y | x) by the policy's parameters."""


@dataclass(frozen=True)
class Bias:
    """What the weights of K traces are in expectation, and how far one draw of them is from the exact gradient."""

    total_variation: float
    """Of the expected weight of each trace to the true posterior."""
    cosine: float
    """Of the expected gradient with that of log P(Y | x)."""
    norm: float
    """Of the expected gradient, over that of log P(Y | x)."""
    error: float
    """Root mean square distance of the gradient from one draw of K traces to that of log P(Y | x), over its norm."""


def make_world(length: int, lean: float, seed: int) -> World:
    """A random policy and answers, and the posterior that leans to the truth by `lean`."""
    random = np.random.default_rng(seed)
    nodes = [""]
    for node in nodes:  # grows while it is read: breadth first
        if len(node) < length - 1:
            nodes += [node + "a", node + "b"]
    traces = [*nodes, *(node + symbol for node in nodes if len(node) == length - 1 for symbol in "ab")]
    logits = random.normal(size=(len(nodes), 3)) - [0.0, 0.0, 2.0]  # most traces are long
    answers_S = random.normal(-2.0, 2.0, len(traces))
    log_answers_S = -np.logaddexp(0.0, -answers_S)
    policy = logits - np.logaddexp.reduce(logits, axis=1, keepdims=True)
    log_policy_S = np.array([sum(_token_logps(policy, nodes, trace)) for trace in traces])
    log_joint_S = log_policy_S + log_answers_S
    true_S = np.exp(log_joint_S - np.logaddexp.reduce(log_joint_S))
    truth = _logits_of(true_S, traces, nodes)
    leaning = policy + lean * (truth - policy) + 0.1 * random.normal(size=logits.shape)
    posterior = leaning - np.logaddexp.reduce(leaning, axis=1, keepdims=True)
    pairs = [(_token_logps(policy, nodes, trace), _token_logps(posterior, nodes, trace)) for trace in traces]
    scores = [
        Score("q", index, 1, _float32(p), _float32(q), _float32([answer]), None, None)
        for index, ((p, q), answer) in enumerate(zip(pairs, log_answers_S, strict=True))
    ]
    gradients = np.stack([_gradient(policy, nodes, trace) for trace in traces])
    answers = np.diag(1.0 - np.exp(log_answers_S))
    log_q_S = np.array([sum(q) for _, q in pairs])
    gradients_SN = np.concatenate([gradients, answers], axis=1)
    return World(logits, answers_S, scores, log_q_S, log_policy_S, true_S, gradients_SN)


def log_weights(world: World, ratio: str) -> Floats:
    """[S] log rho of each trace, by the package."""
    return np.array([log_ratio(score, ratio) + log_answer(score, "likelihood") for score in world.scores])


def expected_weights(log_rho_S: Floats, log_q_S: Floats, count: int) -> tuple[Floats, Floats]:
    """Exact moments of the normalised weights of `count` traces from q.

    Returns:
        [S] the expected weight of each trace, all its copies together, and [S, S] the expected products of two.
    """
    log_rho_S = log_rho_S - log_rho_S.max()
    log_t_T = np.arange(np.log(1e-18), np.log(60.0) - log_rho_S.min(), 0.2)
    exponents_TS = -np.exp(log_t_T[:, None] + log_rho_S)
    log_phi_T = np.logaddexp.reduce(exponents_TS + log_q_S, axis=1)
    mass_TS = np.exp(exponents_TS + log_q_S + log_rho_S)  # q rho exp(-t rho)
    step = np.exp(log_t_T) * 0.2  # dt
    first_T = step * count * np.exp((count - 1) * log_phi_T)
    same_T = step * np.exp(log_t_T) * count * np.exp((count - 1) * log_phi_T)
    pair_T = step * np.exp(log_t_T) * count * (count - 1) * np.exp(max(count - 2, 0) * log_phi_T)
    weights_S = first_T @ mass_TS
    products_SS = (pair_T[:, None] * mass_TS).T @ mass_TS
    products_SS[np.diag_indices(len(log_q_S))] += same_T @ (mass_TS * np.exp(log_rho_S))
    return weights_S, products_SS


def bias(world: World, ratio: str, count: int | None) -> Bias:
    """Of the weights by this ratio of `count` traces; None: of infinitely many."""
    log_rho_S = log_weights(world, ratio)
    if count is None:
        mass_S = np.exp(world.log_q_S + log_rho_S - (world.log_q_S + log_rho_S).max())
        weights_S = mass_S / mass_S.sum()
        products_SS = np.outer(weights_S, weights_S)
    else:
        weights_S, products_SS = expected_weights(log_rho_S, world.log_q_S, count)
    exact_N, found_N = world.true_S @ world.gradients_SN, weights_S @ world.gradients_SN
    size = float(np.linalg.norm(exact_N))
    second_moment = float(((products_SS @ world.gradients_SN) * world.gradients_SN).sum())
    squared_error = second_moment - 2 * float(found_N @ exact_N) + size**2
    return Bias(
        total_variation=0.5 * float(np.abs(weights_S - world.true_S).sum()),
        cosine=float(found_N @ exact_N) / float(np.linalg.norm(found_N)) / size,
        norm=float(np.linalg.norm(found_N)) / size,
        error=max(squared_error, 0.0) ** 0.5 / size,
    )


def measure() -> list[dict[str, Any]]:
    """Means over the seeds' worlds, a row for each length, posterior, ratio and K (`null`: infinitely many)."""
    rows = []
    for length in LENGTHS:
        for lean in LEANS:
            worlds = [make_world(length, lean, seed) for seed in SEEDS]
            of_pair: dict[str, Any] = {
                "length": length,
                "lean": lean,
                "mean_tokens": _mean([np.exp(w.log_q_S) @ [len(s.logp_policy) for s in w.scores] for w in worlds]),
                "kl_posterior_policy": _mean([np.exp(w.log_q_S) @ (w.log_q_S - w.log_policy_S) for w in worlds]),
                "kl_posterior_truth": _mean([np.exp(w.log_q_S) @ (w.log_q_S - np.log(w.true_S)) for w in worlds]),
            }
            for ratio in RATIOS:
                for count in (*COUNTS, None):
                    found = [asdict(bias(world, ratio, count)) for world in worlds]
                    means = {key: _mean([row[key] for row in found]) for key in found[0]}
                    rows.append(of_pair | {"ratio": ratio, "k": count} | means)
    return rows


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Of the longest traces: what docs/objectives.md shows, in Markdown."""
    shown = (1, 4, 16, 64, None)
    heads = [f"K = {'∞' if count is None else count}" for count in shown]
    lines = [
        f"| q leans, KL(q‖π) | ratio | {' | '.join(heads)} | cosine | norm |",
        "|---" * (4 + len(shown)) + "|",
    ]
    for lean, ratio in product(LEANS, RATIOS):
        of_pair = [row for row in rows if (row["length"], row["lean"], row["ratio"]) == (max(LENGTHS), lean, ratio)]
        of_k = {row["k"]: row for row in of_pair}
        cells = [f"{lean:g}, {of_k[None]['kl_posterior_policy']:.2f}", f"`{ratio}`"]
        cells += [f"{of_k[count]['total_variation']:.3f}, {of_k[count]['error']:.2f}" for count in shown]
        cells += [f"{of_k[None]['cosine']:.2f}", f"{of_k[None]['norm']:.2f}"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def plot(rows: Sequence[dict[str, Any]], file: Path) -> None:
    """Total variation and error against K: a column for each posterior, a line for each ratio and length."""
    figure = Figure(figsize=(10, 6), layout="constrained")
    axes = figure.subplots(2, len(LEANS), sharex=True, sharey="row")
    labels = {"total_variation": "total variation", "error": "error of one draw"}
    for column, lean in enumerate(LEANS):
        for row, (key, label) in enumerate(labels.items()):
            for ratio, colour in zip(RATIOS, COLOURS, strict=True):
                for length in LENGTHS:
                    line = [item for item in rows if (item["lean"], item["ratio"]) == (lean, ratio) and item["k"]]
                    values = [item[key] for item in line if item["length"] == length]
                    name = f"{ratio}, {length} symbols"
                    axes[row, column].plot(COUNTS, values, DASHES[length], color=colour, label=name)
            axes[row, column].set_xscale("log", base=2)
            axes[0, column].set_title(f"q leans to the truth by {lean:g}")
            axes[row, 0].set_ylabel(label)
        axes[1, column].set_xlabel("K")
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
    with atomic_write(file) as partial:
        figure.savefig(partial, dpi=90, format="png")


def _token_logps(log_probs: Floats, nodes: Sequence[str], trace: str) -> list[float]:
    """Log-probs of a trace's tokens, the close marker included: it is certain after the last possible symbol."""
    tokens = trace + "."
    prefixes = [trace[:place] for place in range(len(tokens))]
    return [
        float(log_probs[nodes.index(prefix), "ab.".index(token)]) if len(prefix) <= len(nodes[-1]) else 0.0
        for prefix, token in zip(prefixes, tokens, strict=True)
    ]


def _gradient(log_probs: Floats, nodes: Sequence[str], trace: str) -> Floats:
    """Of log pi(z) by the logits, flat."""
    gradient = np.zeros_like(log_probs)
    for place, token in enumerate(trace + "."):
        if place <= len(nodes[-1]):
            node = nodes.index(trace[:place])
            gradient[node] -= np.exp(log_probs[node])
            gradient[node, "ab.".index(token)] += 1.0
    return gradient.ravel()


def _logits_of(p_S: Floats, traces: Sequence[str], nodes: Sequence[str]) -> Floats:
    """Log-probs at the nodes under which the traces have probabilities `p_S`."""
    probability = dict(zip(traces, p_S, strict=True))
    below = {"": 1.0}
    for trace in traces:
        for place in range(1, len(trace) + 1):
            below[trace[:place]] = below.get(trace[:place], 0.0) + probability[trace]
    mass = np.array([[below[node + "a"], below[node + "b"], probability[node]] for node in nodes])
    log_mass: Floats = np.log(mass / mass.sum(1, keepdims=True))
    return log_mass


def _float32(values: Sequence[float]) -> LogProbs:
    return np.array(values, np.float32)


def _mean(values: Sequence[Any]) -> float:
    return float(np.mean(values))


def main() -> None:
    """Measure, and write both files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("docs/evidence"), help="folder of the two files")
    out = parser.parse_args().out
    out.mkdir(parents=True, exist_ok=True)
    rows = measure()
    rounded = [{key: float(f"{v:.6g}") if isinstance(v, float) else v for key, v in row.items()} for row in rows]
    with atomic_write(out / "exact_bias.json") as partial:
        partial.write_text("[\n" + ",\n".join(json.dumps(row) for row in rounded) + "\n]\n")
    plot(rows, out / "exact_bias.png")
    print(table(rows))


if __name__ == "__main__":
    main()
