"""Prints the tables and plots the figures of `docs/evidence.md` from the results of `make evidence`.

    python examples/evidence_page.py [--results docs/evidence/results.json] [--figures docs/evidence]

Those of the hard tasks are made by `evidence_hard_page.py`. Of the easy ones, intervals are 95 % bootstrap intervals
over the held-out questions, for the mean over seeds. Differences are to `iwae` on the same questions and seeds.
"""

import argparse
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from evidence_hard_page import HARD_FIGURES, HARD_TABLES, HARD_TITLES
from matplotlib.figure import Figure
from numpy.typing import NDArray

NUM_SAMPLES = 4
"""Per held-out question."""
NUM_BOOTSTRAP = 2000
BASELINE = "iwae"
TITLES = {"chains": "chains", "unknown": "unknowns"}
NAMES = {
    "pi_0": "π₀",
    "more_sft": "more SFT",
    "iwae": "IWAE, K = 8: geometric mean, accuracy",
    "ratio_sequence": "— ratio `sequence`",
    "ratio_none": "— ratio `none`",
    "answer_geometric_mean": "— answer by geometric mean (GML)",
    "answer_likelihood": "— answer by likelihood",
    "forward_kl": "— q from π₀'s rollouts (forward KL)",
    "forward_kl_ratio_sequence": "— q from π₀'s rollouts, ratio `sequence`",
    **{f"k{k}": f"— K = {k}" for k in (1, 2, 4, 16)},
    "no_hint": "no hint: π₀'s own traces × accuracy",
    "rft": "RFT",
    "rft_more_steps": "— for the steps of q and policy",
    "grpo": "GRPO weights",
    "rounds_3": "T = 3 rounds, forward KL",
    "reverse_kl_rounds_3": "T = 3 rounds, reverse KL",
}
ROUNDS = {"rounds_3": "forward KL", "reverse_kl_rounds_3": "reverse KL"}
NUM_TRACES = {"k1": 1, "k2": 2, "k4": 4, BASELINE: 8, "k16": 16}
BY_DIFFICULTY = (BASELINE, "ratio_sequence", "no_hint", "rft", "grpo", "more_sft")
MIN_QUESTIONS = 20
"""Minimum number of questions, over all seeds, for a mean by difficulty."""
COLOURS = ("#0b6e99", "#d9730d", "#448361", "#9065b0", "#c14c8a", "#6b5b4b")

Counts = NDArray[np.float64]
"""[seeds, questions] or [questions] number of correct samples, or a rate computed from it."""
Results = Mapping[str, Mapping[str, Any]]
"""Method -> seed -> result of `examples/evidence.py`."""


def read_counts(results: Results, method: str, policy: str | None = None) -> dict[str, Counts]:
    """Seed -> [questions] correct samples of a method's policy.

    Args:
        policy: name such as `pi_1`; None: the policy of the last round, which a collapsed run does not have. The method
            `pi_0` is `pi_0` of the run `iwae`.
    """
    if method == "pi_0":
        method, policy = BASELINE, "pi_0"
    counts_of = {}
    for seed, result in sorted(results.get(method, {}).items()):
        counts = result["correct"]
        name = policy or f"pi_{len(result['traces'])}"
        if name in counts:
            counts_of[seed] = np.array(list(counts[name]), float)
    return counts_of


def pass_at_1(counts: Counts) -> Counts:
    """Fraction of correct samples per question."""
    return counts / NUM_SAMPLES


def pass_at_4(counts: Counts) -> Counts:
    """1 for a question with a correct sample, else 0."""
    return (counts > 0).astype(float)


def interval(rates: Counts) -> tuple[float, float, float]:
    """Mean of [seeds, questions] rates and the bounds of its bootstrap interval over questions."""
    per_question = rates.mean(0)
    resampled = np.random.default_rng(0).integers(0, len(per_question), (NUM_BOOTSTRAP, len(per_question)))
    low, high = np.quantile(per_question[resampled].mean(1), (0.025, 0.975))
    return float(per_question.mean()), float(low), float(high)


def difference(results: Results, method: str, measure: Callable[[Counts], Counts]) -> str:
    """Mean difference to the baseline on the same questions and seeds, with its interval, as text."""
    counts, baseline = read_counts(results, method), read_counts(results, BASELINE)
    seeds = sorted(counts.keys() & baseline.keys())
    if method == BASELINE or not seeds:
        return ""
    mean, low, high = interval(np.array([measure(counts[seed]) - measure(baseline[seed]) for seed in seeds]))
    return f"{mean:+.3f} [{low:+.3f}, {high:+.3f}]"


def accuracy_table(results: Results) -> list[str]:
    """Markdown table with one row per method: accuracy over seeds and per seed, difference to the baseline, tokens."""
    rows = [
        "| method | pass@1 | of each seed | against IWAE | pass@4 | trained tokens | sampled tokens |",
        "|---|---|---|---|---|---|---|",
    ]
    for method, name in NAMES.items():
        counts = read_counts(results, method)
        if not counts:
            continue
        rates = np.array([pass_at_1(row) for row in counts.values()])
        mean, low, high = interval(rates)
        four = interval(np.array([pass_at_4(row) for row in counts.values()]))[0]
        seeds = " ".join(f"{rate:.3f}" for rate in rates.mean(1))
        rows.append(
            f"| {name} | {mean:.3f} [{low:.3f}, {high:.3f}] | {seeds} | {difference(results, method, pass_at_1)} "
            f"| {four:.3f} | {' | '.join(cost(results, method))} |"
        )
    return rows


def cost(results: Results, method: str) -> list[str]:
    """Trained tokens of all stages, and sampled tokens of traces and rollouts (not of evaluation), as text."""
    runs = list(results[BASELINE if method == "pi_0" else method].values())
    if method == "pi_0":
        trained, sampled = [run["target_tokens"]["sft"] for run in runs], [0]
    else:
        trained = [sum(run["target_tokens"].values()) for run in runs]
        parts = [[*run["traces"].values(), *run["rollouts"].values()] for run in runs]
        sampled = [sum(part["tokens"] for part in run_parts) for run_parts in parts]
    return [f"{np.mean(tokens) / 1000:.0f} k" for tokens in (trained, sampled)]


def rounds_table(results: Results) -> list[str]:
    """Markdown table of accuracy after each round and statistics of the traces of q."""
    rows = [
        "| | round | seeds | pass@1 | truncated traces | distinct traces | tokens a trace | correct answers | ESS "
        "| KL(q‖π) |",
        "|---" * 10 + "|",
    ]
    for method, name in ROUNDS.items():
        for index in (1, 2, 3):
            runs = [run for run in results.get(method, {}).values() if f"round_{index:02d}" in run["traces"]]
            if not runs:
                continue
            counts = read_counts(results, method, f"pi_{index}")
            mean, low, high = (
                interval(np.array([pass_at_1(row) for row in counts.values()])) if counts else [np.nan] * 3
            )
            traces = [run["traces"][f"round_{index:02d}"] for run in runs]
            weigh = [run["weigh"][str(index)] for run in runs]
            # Absent if all traces were truncated.
            kls = [row["kl_posterior_policy"] for row in weigh if "kl_posterior_policy" in row]
            partial = "" if len(counts) == len(runs) else f" of {len(counts)}"
            figures = [
                f"{len(runs)}",
                f"{mean:.3f} [{low:.3f}, {high:.3f}]{partial}" if counts else "collapsed",
                f"{np.mean([row['truncated'] / row['traces'] for row in traces]):.3f}",
                f"{np.mean([row['distinct'] / row['traces'] for row in traces]):.3f}",
                f"{np.mean([row['tokens'] / row['traces'] for row in traces]):.1f}",
                f"{np.mean([row['correct_answers'] / max(row['answers'], 1) for row in traces]):.3f}",
                f"{np.mean([row['ess'] for row in weigh]):.2f}",
                f"{np.mean(kls):.2f}" if kls else "–",
            ]
            rows.append(f"| {name} | {index} | {' | '.join(figures)} |")
    return rows


def difficulty_table(results: Results) -> list[str]:
    """Markdown table of accuracy by the number of pi_0's correct samples on the question, at the same seed."""
    rows = [
        f"| π₀ correct | {' | '.join(f'{count} of {NUM_SAMPLES}' for count in range(NUM_SAMPLES + 1))} |",
        "|---" * (NUM_SAMPLES + 2) + "|",
    ]
    first = read_counts(results, "pi_0")
    num_correct = np.concatenate([first[seed] for seed in first])
    rows.append(f"| questions | {' | '.join(str(int((num_correct == c).sum())) for c in range(NUM_SAMPLES + 1))} |")
    for method, means in by_difficulty(results).items():
        rows.append(f"| {NAMES[method]} | {' | '.join('' if np.isnan(mean) else f'{mean:.3f}' for mean in means)} |")
    return rows


def by_difficulty(results: Results) -> dict[str, list[float]]:
    """Method -> pass@1 by the number of pi_0's correct samples (0 to 4); NaN if there are too few questions."""
    first, means_of = read_counts(results, "pi_0"), {}
    for method in BY_DIFFICULTY:
        counts = read_counts(results, method)
        seeds = sorted(counts.keys() & first.keys())
        if seeds:
            bins = np.concatenate([first[seed] for seed in seeds])
            rates = np.concatenate([pass_at_1(counts[seed]) for seed in seeds])
            means_of[method] = [
                float(rates[bins == count].mean()) if (bins == count).sum() >= MIN_QUESTIONS else np.nan
                for count in range(NUM_SAMPLES + 1)
            ]
    return means_of


def draw_methods(results: Results) -> Figure:
    """Plot accuracy of every method with its interval, and of each seed."""
    shown = [method for method in NAMES if read_counts(results, method)]
    figure = Figure(figsize=(7, 0.32 * len(shown) + 1), layout="constrained")
    plot = figure.subplots()
    for row_index, method in enumerate(reversed(shown)):
        rates = np.array([pass_at_1(row) for row in read_counts(results, method).values()])
        mean, low, high = interval(rates)
        plot.errorbar([mean], [row_index], xerr=[[mean - low], [high - mean]], fmt="o", capsize=3, color=COLOURS[0])
        plot.plot(rates.mean(1), [row_index] * len(rates), "|", color=COLOURS[1], markersize=9)
    plot.set_yticks(range(len(shown)), [NAMES[method].replace("`", "") for method in reversed(shown)])
    plot.set_xlabel("pass@1: mean over seeds with interval, and each seed")
    plot.grid(alpha=0.3)
    return figure


def draw_numbers(results: Results) -> Figure:
    """Plot accuracy against the number of traces K, and against rounds."""
    figure = Figure(figsize=(8, 3), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    numbers = {k: read_counts(results, method) for method, k in NUM_TRACES.items()}
    draw_line(left, {k: counts for k, counts in numbers.items() if counts}, "IWAE", COLOURS[0])
    left.set_xscale("log", base=2)
    left.set_xticks(list(NUM_TRACES.values()), [str(k) for k in NUM_TRACES.values()])
    left.set(xlabel="K", ylabel="pass@1")
    for colour, (method, label) in zip(COLOURS[1:], ROUNDS.items(), strict=False):
        after = {index: read_counts(results, method, f"pi_{index}") for index in (1, 2, 3)}
        draw_line(right, {index: counts for index, counts in after.items() if counts}, label, colour)
    right.set_xticks([1, 2, 3])
    right.set(xlabel="rounds T")
    for plot in (left, right):
        plot.grid(alpha=0.3)
        if plot.get_legend_handles_labels()[0]:
            plot.legend(fontsize=8)
    return figure


def draw_line(plot: Any, counts_at: Mapping[int, Mapping[str, Counts]], label: str, colour: str) -> None:
    """Plot means with intervals against the keys of `counts_at`."""
    points = [
        (number, *interval(np.array([pass_at_1(row) for row in counts.values()])))
        for number, counts in counts_at.items()
    ]
    if points:
        numbers, means, lows, highs = (np.array(column) for column in zip(*points, strict=True))
        plot.errorbar(numbers, means, (means - lows, highs - means), fmt="o-", capsize=3, color=colour, label=label)


def draw_difficulty(results: Results) -> Figure:
    """Plot accuracy against the number of pi_0's correct samples on the same questions."""
    figure = Figure(figsize=(6, 3.6), layout="constrained")
    plot = figure.subplots()
    for colour, (method, means) in zip(COLOURS, by_difficulty(results).items(), strict=False):
        plot.plot(
            range(NUM_SAMPLES + 1),
            means,
            "o-",
            color=colour,
            label=NAMES[method].split(",")[0].strip("— ").replace("`", ""),
        )
    plot.set_xticks(range(NUM_SAMPLES + 1))
    plot.set(xlabel=f"correct of π₀'s {NUM_SAMPLES} samples", ylabel="pass@1")
    plot.grid(alpha=0.3)
    plot.legend(fontsize=8)
    return figure


TABLES: tuple[Callable[[Results], list[str]], ...] = (accuracy_table, rounds_table, difficulty_table)
FIGURES: dict[str, Callable[[Results], Figure]] = {
    "methods": draw_methods,
    "numbers": draw_numbers,
    "difficulty": draw_difficulty,
}


def main() -> None:
    """Print the tables and save the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=Path("docs/evidence/results.json"))
    parser.add_argument("--figures", type=Path, default=Path("docs/evidence"))
    chosen = parser.parse_args()
    for task, results in json.loads(chosen.results.read_text()).items():
        hard = task in HARD_TITLES
        print(f"## {HARD_TITLES[task] if hard else TITLES[task]}\n")
        for table in HARD_TABLES if hard else TABLES:
            if len(rows := table(results)) > 2:
                print("\n".join(rows) + "\n")
        for name, draw in (HARD_FIGURES if hard else FIGURES).items():
            draw(results).savefig(chosen.figures / f"{task}_{name}.png", dpi=110)


if __name__ == "__main__":
    main()
