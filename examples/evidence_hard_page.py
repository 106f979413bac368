"""Tables and figures of the hard tasks in docs/evidence.md; `evidence_page.py` prints them.

Intervals are 95 % hierarchical bootstrap intervals: seeds are drawn, and questions of each drawn seed, since each seed
has questions of its own. Differences are between methods on the same seeds and questions.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray

from megavar.evaluation.pass_at_k import pass_at_k

NUM_SAMPLES = 64
NUM_BOOTSTRAP = 4000
BASELINE = "iwae"
SUITES = ("eval_1", "eval_2", "eval_3")
HARD_TITLES = {
    "sort": "sort, questions of all levels",
    "sort_level_3": "sort, hard questions only",
    "search": "search, questions of all levels",
}
HARD_NAMES = {
    "pi_0": "π₀",
    "more_sft": "more SFT on the 60 gold traces",
    "answers_only": "SFT on all answers, no traces",
    "rft": "RFT, 16 of π₀'s own traces",
    "grpo": "GRPO weights, 16 of π₀'s own traces",
    "iwae": "IWAE, 8 traces of q",
    "ratio_sequence": "— ratio `sequence`",
    "ratio_none": "— ratio `none`",
    "max_leakage": "— without traces of leakage above 3 nats",
    "prompt": "— q is π₀ with the hint in its prompt",
}
CURVES = ("pi_0", "more_sft", "answers_only", "rft", "grpo", "iwae", "ratio_sequence")
COLOURS = ("#6b5b4b", "#9065b0", "#c14c8a", "#d9730d", "#448361", "#0b6e99", "#2fa8d5")
STAGES = {"q": ("posterior",), "sampling": ("rollouts", "sample"), "scoring": ("score",), "policy": ("policy",)}
"""Column -> stages whose FLOPs it has."""

Rates = NDArray[np.float64]
"""[seeds, questions] pass@k."""
Results = Mapping[str, Mapping[str, Any]]
"""Method -> seed -> result of `examples/evidence.py`."""


def rates(results: Results, method: str, suite: str, k: int, seeds: Sequence[str] | None = None) -> Rates:
    """pass@k of each question; [0, 0] without results.

    Args:
        seeds: of the rows; None: all that the method has.
    """
    known = results.get(BASELINE if method == "pi_0" else method, {})
    rows = []
    for seed in seeds if seeds is not None else sorted(known):
        policies = known[seed]["correct"][suite]
        name = "pi_0" if method == "pi_0" else max(policies)  # the last one
        rows.append([pass_at_k(NUM_SAMPLES, count, k) for count in policies[name]])
    return np.array(rows, float) if rows else np.zeros((0, 0))


def interval(values: Rates) -> tuple[float, float, float]:
    """Mean of [seeds, questions] values and the bounds of its hierarchical bootstrap interval."""
    random, (num_seeds, num_questions) = np.random.default_rng(0), values.shape
    seeds = random.integers(0, num_seeds, (NUM_BOOTSTRAP, num_seeds, 1))
    questions = random.integers(0, num_questions, (NUM_BOOTSTRAP, num_seeds, num_questions))
    low, high = np.quantile(values[seeds, questions].mean((1, 2)), (0.025, 0.975))
    return float(values.mean()), float(low), float(high)


def difference(results: Results, method: str, suite: str, k: int, other: str = BASELINE) -> tuple[float, float, float]:
    """Mean of a method's pass@k minus another's, on the seeds that both have, and its interval."""
    both = sorted(set(results[BASELINE if method == "pi_0" else method]) & set(results[BASELINE]))
    return interval(rates(results, method, suite, k, both) - rates(results, other, suite, k, both))


def shown_methods(results: Results) -> list[str]:
    """Those with results, in the order of the tables."""
    return [method for method in HARD_NAMES if rates(results, method, SUITES[0], 1).size]


def level_table(results: Results) -> list[str]:
    """Markdown table: pass@1 by level, pass@64 at level 3, and the differences to IWAE there."""
    rows = [
        "| method | seeds | level 1 | level 2 | level 3 | against IWAE | level 3, pass@64 | against IWAE |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for method in shown_methods(results):
        found = [interval(rates(results, method, suite, 1)) for suite in SUITES]
        found.append(interval(rates(results, method, SUITES[2], NUM_SAMPLES)))
        cells = [f"{mean:.3f} [{low:.3f}, {high:.3f}]" for mean, low, high in found]
        against = ["", ""]
        if method != BASELINE:
            pairs = [difference(results, method, SUITES[2], k) for k in (1, NUM_SAMPLES)]
            against = [f"{mean:+.3f} [{low:+.3f}, {high:+.3f}]" for mean, low, high in pairs]
        count = len(rates(results, method, SUITES[0], 1))
        cells = [*cells[:3], against[0], cells[3], against[1]]
        rows.append(f"| {HARD_NAMES[method]} | {count} | {' | '.join(cells)} |")
    return rows


def compute_table(results: Results) -> list[str]:
    """Markdown table: TFLOPs by stage after π₀, mean over seeds, and correct answers after sampled traces."""
    rows = [
        f"| method | {' | '.join(STAGES)} | sum, TFLOPs | of IWAE's | correct answers | ESS | leakage, nats |",
        "|---" * (len(STAGES) + 6) + "|",
    ]
    pi_0 = float(np.mean([run["flops"]["sft"] for run in results[BASELINE].values()]))
    sums = {method: np.mean([_spent(run, pi_0) for run in runs.values()]) for method, runs in results.items()}
    for method in shown_methods(results):
        if method == "pi_0":
            continue
        runs = list(results[method].values())
        by_stage = [
            np.mean([sum(run["flops"].get(s, 0) for s in stages) for run in runs]) for stages in STAGES.values()
        ]
        traces = [part for run in runs for part in run["traces"].values()]
        weigh = [row for run in runs for row in run["weigh"].values()]
        right = [part["correct_answers"] / max(part["answers"], 1) for part in traces]
        cells = [
            *(f"{spent / 1e12:.1f}" for spent in by_stage),
            f"{sums[method] / 1e12:.1f}",
            f"{sums[method] / sums[BASELINE]:.2f}",
            f"{np.mean(right):.3f}" if right else "",
            f"{np.mean([row['ess'] for row in weigh]):.1f}" if weigh else "",
            _mean_of(weigh, "leakage"),
        ]
        rows.append(f"| {HARD_NAMES[method]} | {' | '.join(cells)} |")
    return rows


def _spent(run: Mapping[str, Any], pi_0: float) -> float:
    """FLOPs of everything after π₀, which took `pi_0`; for a run of SFT alone, what it takes beyond."""
    after = [spent for stage, spent in run["flops"].items() if stage != "sft"]
    return float(sum(after) if after else run["flops"]["sft"] - pi_0)


def _mean_of(rows: Sequence[Mapping[str, float]], name: str) -> str:
    values = [row[name] for row in rows if name in row]
    return f"{np.mean(values):.2f}" if values else ""


def draw_pass_at_k(results: Results) -> Figure:
    """Plot pass@k against k at each level."""
    figure = Figure(figsize=(10, 3.4), layout="constrained")
    plots = figure.subplots(1, len(SUITES), sharey=True)
    ks = 2 ** np.arange(7)
    for plot, suite in zip(plots, SUITES, strict=True):
        for colour, method in zip(COLOURS, CURVES, strict=True):
            means = [rates(results, method, suite, int(k)).mean() for k in ks if method in shown_methods(results)]
            if means:
                plot.plot(ks, means, "o-", markersize=3, color=colour, label=HARD_NAMES[method].strip("— "))
        plot.set_xscale("log", base=2)
        plot.set(xlabel="k", title=f"level {suite[-1]}", ylim=(0, 1))
        plot.grid(alpha=0.3)
    plots[0].set_ylabel("pass@k")
    plots[-1].legend(fontsize=6)
    return figure


HARD_TABLES: tuple[Callable[[Results], list[str]], ...] = (level_table, compute_table)
HARD_FIGURES: dict[str, Callable[[Results], Figure]] = {"pass_at_k": draw_pass_at_k}
