"""What `examples/evidence.py` runs: the tasks, the methods on each, their settings, and what was expected of them.

**Two easy tasks** (`chains`, `unknown` of examples/data/generate.py): every question has a gold trace, and all policies
take the same number of optimizer steps. Which parts of the method matter?

**Two hard tasks, few traces** (examples/data/hard.py): 60 gold traces, and answers for all of 600 questions, of
three levels that π₀ solves by about 30 %, 3 % and 0.3 % of its traces. All methods take about the same FLOPs after π₀,
which is not counted: q's training, sampling, scoring and the policy's training. `..._level_3` samples hard questions
only. Policies are trained from π₀. Each seed has questions of its own. Expected before the runs, after trials of `sort`
with one seed that fixed its settings:

- H1. `sort`: at level 3 RFT and GRPO have next to nothing to learn from, q has; IWAE's policy is better there in pass@1
  and in pass@64, and on `sort_level_3` RFT and GRPO stay at π₀.
- H2. `sort`: on the mixture RFT and GRPO learn to choose from the easy questions, and it carries over: they close part
  of the gap of `sort_level_3`.
- H3. `sort`: answers without traces (`answers_only`, whose trace is a dash) are enough at levels 1 and 2, and fail at
  level 3; more SFT on the 60 gold traces (`more_sft`) stays below IWAE at every level.
- H4. `search`: the sequence ratio keeps traces that search, the geometric mean and no ratio keep those that leap: with
  it the policy is better in pass@64.
- H5. `search`: leaving out leaky traces (`max_leakage`) does what the sequence ratio does.
- H6. π₀ with the hint in its prompt (`prompt`) is a worse q than the trained one where π₀ has not learnt to use hints.
"""

from dataclasses import dataclass

EASY_DATA = ("examples/data/generate.py", "--num-eval", "200")
HARD_DATA = ("examples/data/hard.py", "--seed", "{seed}")


@dataclass(frozen=True)
class Method:
    """One way to train: how its runs differ from the task's settings."""

    overrides: tuple[str, ...] = ()
    evaluates_pi_0: bool = False
    """Besides its policy; the others' π₀ is the same."""
    takes_steps: tuple[str, ...] = ()
    """Training stages; the first one trains for the total optimizer steps of all of them."""
    only_sft: bool = False
    """No round: π₀ is what is evaluated."""
    num_seeds: int | None = None
    """The first ones of the task's; None: all."""


@dataclass(frozen=True)
class Task:
    """Questions, the settings of all runs on them, and the methods."""

    data: tuple[str, ...]
    """Command that makes the question files, but for `--out`; `{seed}` stands for the run's seed."""
    overrides: tuple[str, ...]
    """Relative to conf/demo.yaml; `{data}` stands for the folder of the question files."""
    steps: dict[str, int]
    """Training stage -> optimizer steps of 64 sequences."""
    methods: dict[str, Method]
    seeds: tuple[int, ...]
    suites: tuple[str, ...] = ()
    """Held-out files, where there are several."""
    corpus: str | None = None
    """Of the base, which `examples/base/make_base.py` makes; None: the demo's base."""
    data_of_seed: bool = False
    """Each seed has questions of its own."""


EIGHT = ("sample.num_traces=8",)
OWN_TRACES = (*EIGHT, "sample.sampler=policy", "objective.ratio=none")
ROLLOUT = (*EIGHT, "posterior.source=rollout")
EASY_METHODS = {
    "iwae": Method(evaluates_pi_0=True),
    "more_sft": Method(
        ("eval.models=[pi_0]",),
        evaluates_pi_0=True,
        takes_steps=("sft", "posterior.train", "policy.train"),
        only_sft=True,
    ),
    "ratio_none": Method(("objective.ratio=none",)),
    "ratio_sequence": Method(("objective.ratio=sequence",)),
    "no_hint": Method(OWN_TRACES),
    "rft": Method((*OWN_TRACES, "objective.name=rft")),
    "rft_more_steps": Method((*OWN_TRACES, "objective.name=rft"), takes_steps=("policy.train", "posterior.train")),
    "grpo": Method((*OWN_TRACES, "objective.name=grpo")),
    "forward_kl": Method(ROLLOUT),
    "forward_kl_ratio_sequence": Method((*ROLLOUT, "objective.ratio=sequence")),
    "answer_geometric_mean": Method(("objective.answer_estimator=geometric_mean", "objective.train_answers=reference")),
    "answer_likelihood": Method(("objective.answer_estimator=likelihood", "objective.train_answers=reference")),
    **{f"k{k}": Method((f"objective.num_traces={k}",)) for k in (1, 2, 4, 16)},
    "rounds_3": Method((*ROLLOUT, "rounds=3")),
    "reverse_kl_rounds_3": Method((*EIGHT, "rounds=3", "posterior.source=reverse_kl", "posterior.allow_collapse=true")),
}
EASY = (
    "data.train={data}/train.jsonl",
    "data.eval={data}/eval.jsonl",
    "data.questions_per_round=200",
    "data.max_sequence_tokens=224",
    "sample.num_traces=16",
    "sample.num_answers=2",
    "sample.max_trace_tokens=128",
    "objective.num_traces=8",
)

MORE_OWN_TRACES = ("sample.num_traces=16", "sample.sampler=policy", "objective.ratio=none")
HARD_ABLATIONS = {
    "ratio_sequence": Method(("objective.ratio=sequence",), num_seeds=3),
    "prompt": Method(("posterior.source=prompt",), num_seeds=3),
    "ratio_none": Method(("objective.ratio=none",), num_seeds=3),
}
SEARCH_ABLATIONS = {**HARD_ABLATIONS, "max_leakage": Method(("objective.max_leakage=3",), num_seeds=3)}


def own_traces(num_steps: int) -> dict[str, Method]:
    """IWAE, and RFT and GRPO with policy steps for as many FLOPs, by pilot runs of seed 1."""
    steps = f"policy.train.num_steps={num_steps}"
    return {
        "iwae": Method(evaluates_pi_0=True),
        "rft": Method((*MORE_OWN_TRACES, "objective.name=rft", steps)),
        "grpo": Method((*MORE_OWN_TRACES, "objective.name=grpo", steps)),
    }


def only_sft(more_sft: int, answers_only: int) -> dict[str, Method]:
    """Controls without a round, with steps for as many FLOPs."""
    pi_0 = "eval.models=[pi_0]"
    answers = (pi_0, f"sft.num_steps={answers_only}", "data.train={data}/answers.jsonl")
    return {
        "more_sft": Method((pi_0, f"sft.num_steps={more_sft}"), evaluates_pi_0=True, only_sft=True),
        "answers_only": Method(answers, evaluates_pi_0=True, only_sft=True),
    }


HARD = (
    "data.train={data}/train.jsonl",
    "data.eval=null",
    "eval.suites=[{data}/eval_1.jsonl,{data}/eval_2.jsonl,{data}/eval_3.jsonl]",
    "eval.num_samples=64",
    "data.questions_per_round=600",
    "sample.num_traces=8",
    "sample.num_answers=2",
    "sample.max_answer_tokens=20",
    "policy.init=sft",
    "verify.plugins=[swaps:same_permutation]",
)
SETTINGS = {
    "sort": (*HARD, "data.max_sequence_tokens=184", "sample.max_trace_tokens=112"),
    "search": (*HARD, "data.max_sequence_tokens=224", "sample.max_trace_tokens=144"),
}
HARD_STEPS = {"sft": 40, "posterior.train": 50, "policy.train": 120}
CORPORA = {"sort": "swaps", "search": "tries"}
SUITES = ("eval_1", "eval_2", "eval_3")


def hard(task: str, levels: tuple[str, ...], methods: dict[str, Method], num_seeds: int) -> Task:
    """A task of examples/data/hard.py, with the round's questions of these levels."""
    data, seeds = (*HARD_DATA, "--task", task, "--train-levels", *levels), tuple(range(1, num_seeds + 1))
    return Task(data, SETTINGS[task], HARD_STEPS, methods, seeds, SUITES, CORPORA[task], data_of_seed=True)


ALL_LEVELS = ("1", "2", "3")
TASKS = {
    "chains": Task(EASY_DATA, EASY, {"sft": 52, "posterior.train": 52, "policy.train": 64}, EASY_METHODS, (1, 2, 3)),
    "unknown": Task(
        (*EASY_DATA, "--task", "unknown"),
        EASY,
        {"sft": 80, "posterior.train": 100, "policy.train": 120},
        EASY_METHODS,
        (1, 2, 3),
    ),
    "sort": hard("sort", ALL_LEVELS, {**own_traces(320), **only_sft(280, 640), **HARD_ABLATIONS}, num_seeds=5),
    "sort_level_3": hard("sort", ("3",), own_traces(180), num_seeds=3),
    "search": hard("search", ALL_LEVELS, {**own_traces(210), **only_sft(270, 650), **SEARCH_ABLATIONS}, num_seeds=5),
}
