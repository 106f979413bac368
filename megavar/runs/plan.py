"""The stages of a run: one `Stage` record each, in order. What a stage does is `execute` in `megavar/stages/NAME.py`.

Nothing here does any work, and nothing needs torch.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, is_dataclass
from operator import attrgetter
from pathlib import Path
from typing import Any

from megavar.checksums import CHECKSUMS, file_digest
from megavar.config.schema import EvaluationConfig, RunConfig
from megavar.runs.folder import Run
from megavar.runs.manifest import Manifest, NotFinished, flat, model_digest
from megavar.runs.names import suite_names


@dataclass(frozen=True)
class Stage:
    """Everything about a stage but its work."""

    name: str
    """Of the stage in the manifest and on the command line, and of its module in `megavar/stages/`."""
    summary: str
    reads: str
    writes: str
    keys: Callable[[RunConfig], Sequence[str]]
    """The configuration keys and sections that the result depends on."""
    inputs: Callable[[Run], dict[str, str]] = lambda run: {}
    """Name among the settings -> manifest entry of each stage whose outputs it reads."""
    outputs: Callable[[Run], Sequence[Path]] = lambda run: ()
    """Files that stand for its results; those that exist are recorded with their checksums."""
    is_used: Callable[[RunConfig], bool] = lambda config: True
    first_round_only: Callable[[RunConfig], bool] = lambda config: False
    all_ranks: bool = False
    """Trains or scores, so it runs under torchrun; the others run on rank 0."""
    serves: bool = False
    """Samples from SGLang servers."""
    logs: str = ""
    """What it leaves in metrics.jsonl: a row for each of its `steps`, or one for its round (`round`)."""
    concludes: bool = False
    """Its module has `conclude`, which makes from its outputs what the rounds share, and logs what it makes."""

    def settings(self, run: Run, digest: Callable[[str], str] | None = None) -> dict[str, Any]:
        """Every setting that the result depends on, and the digests of the stages whose outputs it reads.

        Args:
            digest: of a finished stage, by its entry; None: as the run's manifest has it.

        Raises:
            NotFinished: if one of those is not finished.
        """
        digest = digest or Manifest(run.folder).digest
        own = {name: value for key in self.keys(run.config) for name, value in _setting(run.config, key).items()}
        return own | {name: digest(entry) for name, entry in self.inputs(run).items()}


def stages_of(config: RunConfig) -> list[tuple[Stage, Run]]:
    """The stages of a run with their rounds, in order."""
    return [
        (stage, Run(config, round_index))
        for round_index in range(1, config.rounds + 1)
        for stage in STAGES
        if stage.is_used(config) and not (round_index > 1 and stage.first_round_only(config))
    ]


def find_stage(config: RunConfig, name: str) -> tuple[Stage, Run]:
    """A stage and its round by a name such as `policy`, or `policy_02` for that of the second round.

    Raises:
        ValueError: for an unknown stage, or one that this configuration has no use for.
    """
    known = {run.entry(stage.name): (stage, run) for stage, run in stages_of(config)}
    if name not in known:
        raise ValueError(f"no stage {name!r} in this run; its stages are {', '.join(known)}.")
    return known[name]


def check_outputs(config: RunConfig) -> None:
    """Check that every existing output of the run was produced under these settings.

    A stage that runs alone reads what others wrote, and a report reads the configuration: neither may differ from what
    it describes.

    Raises:
        ValueError: naming the stage and the differing key.
    """
    manifest = Manifest(Run(config).folder)
    for stage, run in stages_of(config):
        if run.entry(stage.name) in manifest.entries():
            try:
                settings = stage.settings(run)
            except NotFinished:  # upstream is to be rerun; this stage is refused when its turn comes
                continue
            manifest.check(run.entry(stage.name), settings)


def _setting(config: RunConfig, key: str) -> dict[str, Any]:
    """A key with its value, or the keys of a section; files and models are identified by content, not by path."""
    if key == "model":
        return {key: model_digest(Path(config.model))}
    if key in ("data.train", "data.eval"):
        file = attrgetter(key)(config)
        return {key: file and file_digest(Path(file))[:16]}
    if key == "eval":
        return flat(key, config.eval) | {"eval.suites": suite_digests(config.eval.suites)}
    return _values(config, key)


def _values(config: RunConfig | EvaluationConfig, key: str) -> dict[str, Any]:
    value = attrgetter(key)(config)
    return flat(key, value) if is_dataclass(value) else {key: value}


def suite_digests(files: Sequence[str]) -> dict[str, str]:
    """Name -> digest of files of held-out questions."""
    return {name: file_digest(Path(file))[:16] for name, file in zip(suite_names(files), files, strict=True)}


def evaluation_settings(config: EvaluationConfig, model: Path, file: Path) -> dict[str, Any]:
    """Every setting that the samples of a model on a question file, and their verdicts, depend on."""
    own = {name: value for key in _EVALUATED for name, value in _values(config, key).items()}
    return own | {"model": model_digest(model), "suite": file_digest(file)[:16]}


def _reference(run: Run) -> str:
    """Entry of the policy that the round starts with."""
    return "sft" if run.round_index == 1 else run.previous.entry("export")


def _posterior_keys(config: RunConfig) -> Sequence[str]:
    source = config.posterior.source
    keys = (*_TRAINED, *_POSTERIOR_PROMPT, *_TRAIN_FILE, "posterior.train", "posterior.source")
    if source == "gold":
        return keys
    weighed = ("num_traces", "answer_estimator", "on_unverifiable") if source == "reverse_kl" else ()
    return (*keys, *_ROUND_QUESTIONS, *(f"objective.{key}" for key in weighed))


def _posterior_inputs(run: Run) -> dict[str, str]:
    if run.config.posterior.source == "rollout":
        return {"rollouts": run.entry("rollouts")}
    if not run.learns_by_reverse_kl:
        return {}
    previous = run.previous
    return {stage: previous.entry(stage) for stage in ("posterior", "sample", "score", "weigh")}


def _sample_keys(config: RunConfig) -> Sequence[str]:
    prompts = _POSTERIOR_PROMPT if config.sample.sampler == "posterior" else ()
    return (*_SAMPLED, *prompts, *_ROUND_QUESTIONS, "sample")


def _sampler(run: Run) -> dict[str, str]:
    """The model that traces are sampled from, if it is not the policy's."""
    if not run.config.trains_posterior:
        return {}
    return {"posterior": (Run(run.config) if run.config.posterior.source == "gold" else run).entry("posterior")}


def _policy_inputs(run: Run) -> dict[str, str]:
    reference = {"reference": _reference(run)} if run.config.policy.init == "sft" else {}
    return {stage: run.entry(stage) for stage in ("sample", "verify", "weigh")} | reference


def _eval_inputs(run: Run) -> dict[str, str]:
    models = run.config.eval.models
    found = {"pi_0": "sft"} if "pi_0" in models and run.round_index == 1 else {}
    return found | ({"policy": run.entry("export")} if "policy" in models else {})


def _eval_outputs(run: Run) -> list[Path]:
    models = [model for model in _eval_inputs(run) if model == "pi_0"] + [f"pi_{run.round_index}"]
    own = [] if run.config.data.eval is None else [run.eval / model for model in models]
    others = [run.eval / suite / model for suite in suite_names(run.config.eval.suites) for model in models]
    return [
        *(folder.with_suffix(".json") for folder in own),
        *(file for folder in own + others for file in _data(folder, "traces", "answers", "verified")),
    ]


def _newest_checkpoint(folder: Path) -> list[Path]:
    return [checkpoint / CHECKSUMS for checkpoint in sorted((folder / "checkpoints").glob("step_*"))[-1:]]


def _data(folder: Path, *names: str) -> list[Path]:
    return [folder / name / "data.parquet" for name in names]


_MARKERS = ("templates.system", "templates.open_marker", "templates.close_marker")
"""What every prompt depends on, besides the model's tokenizer."""
_PROMPT_TEMPLATES = (*_MARKERS, "templates.policy")
_POLICY_PROMPT = ("model", *_PROMPT_TEMPLATES)
_POSTERIOR_PROMPT = ("model", *_MARKERS, "templates.posterior")
_TRAINED = ("seed", "precision")
_TRAIN_FILE = ("data.train", "data.on_bad_reference")
_ROUND_QUESTIONS = (*_TRAIN_FILE, "data.questions_per_round", "data.fresh_questions")
_SERVED = ("rollout.dtype", "rollout.deterministic")
_SAMPLED = ("seed", *_POLICY_PROMPT, *_SERVED)
_WEIGHED = tuple(
    f"objective.{key}"
    for key in (
        "name",
        "num_traces",
        "ratio",
        "answer_estimator",
        "on_no_correct_trace",
        "on_unverifiable",
        "max_leakage",
    )
)
_OF_A_SAMPLE = tuple(
    f"sample.{key}" for key in ("temperature", "top_p", "max_trace_tokens", "max_answer_tokens", "keep_logps")
)

_EVALUATED = ("seed", *_PROMPT_TEMPLATES, *_SERVED, *_OF_A_SAMPLE, "verify", "eval.num_samples")

STAGES = (
    Stage(
        "sft",
        "train pi_0 from the base model on the gold traces",
        "base model, gold traces",
        "sft/ (pi_0)",
        lambda config: (*_TRAINED, *_POLICY_PROMPT, "templates.solution", "templates.reply", *_TRAIN_FILE, "sft"),
        outputs=lambda run: [run.sft / "hf" / CHECKSUMS],
        first_round_only=lambda config: True,
        all_ranks=True,
        logs="steps",
    ),
    Stage(
        "rollouts",
        "sample traces of the policy and weigh them by accuracy, for the posterior (posterior.source=rollout)",
        "the policy that the round starts with",
        "round_NN/rollouts/ (traces, answers, verdicts, weights)",
        lambda config: (
            *_SAMPLED,
            *_ROUND_QUESTIONS,
            *_OF_A_SAMPLE,
            "sample.num_answers",
            "posterior.num_rollouts",
            "verify",
        ),
        inputs=lambda run: {"reference": _reference(run)},
        outputs=lambda run: _data(run.round / "rollouts", "traces", "answers", "verified", "weights"),
        is_used=lambda config: config.posterior.source == "rollout" and config.sample.sampler == "posterior",
        serves=True,
        logs="round",
    ),
    Stage(
        "posterior",
        "train the posterior q, which sees the answer as a hint",
        "base model, gold traces or weighted rollouts",
        "round_NN/posterior/ (q)",
        _posterior_keys,
        inputs=_posterior_inputs,
        outputs=lambda run: [run.posterior / "hf" / CHECKSUMS],
        is_used=lambda config: config.trains_posterior,
        first_round_only=lambda config: config.posterior.source == "gold",
        all_ranks=True,
        logs="steps",
    ),
    Stage(
        "sample",
        "sample K traces a question from q, then n answers a trace from the policy",
        "q, the policy that the round starts with",
        "round_NN/traces/, round_NN/answers/",
        _sample_keys,
        inputs=lambda run: {"reference": _reference(run)} | _sampler(run),
        outputs=lambda run: _data(run.round, "traces", "answers"),
        serves=True,
    ),
    Stage(
        "verify",
        "judge every answer, in processes that can be killed",
        "round_NN/answers/",
        "round_NN/verified/ (verdicts)",
        lambda config: (*_ROUND_QUESTIONS, "verify"),
        inputs=lambda run: {"sample": run.entry("sample")},
        outputs=lambda run: _data(run.round, "verified"),
    ),
    Stage(
        "score",
        "log-probs of every trace under the policy and q, by the training engine",
        "round_NN/traces/, round_NN/verified/, both models",
        "round_NN/scores/",
        lambda config: (
            *_POLICY_PROMPT,
            "templates.solution",
            "templates.reply",
            *_ROUND_QUESTIONS,
            "precision",
            "sample.sampler",
            "score",
        ),
        inputs=lambda run: (
            {stage: run.entry(stage) for stage in ("sample", "verify")} | {"reference": _reference(run)} | _sampler(run)
        ),
        outputs=lambda run: [*_data(run.round, "scores"), run.round / "scores" / "again.parquet"],
        all_ranks=True,
    ),
    Stage(
        "weigh",
        "turn scores and verdicts into one weight a trace, by the objective",
        "round_NN/traces/, round_NN/scores/",
        "round_NN/weights/ (weights, bounds)",
        lambda config: _WEIGHED,
        inputs=lambda run: {stage: run.entry(stage) for stage in ("sample", "score")},
        outputs=lambda run: [*_data(run.round, "weights"), run.round / "weights" / "bounds.parquet"],
        logs="round",
    ),
    Stage(
        "policy",
        "train the round's policy on the weighted traces",
        "base model or the policy before, round_NN/{traces,verified,weights}/",
        "round_NN/policy/checkpoints/",
        lambda config: (
            *_TRAINED,
            *_POLICY_PROMPT,
            "templates.solution",
            "templates.reply",
            *_ROUND_QUESTIONS,
            "policy.train",
            "policy.init",
            "policy.mix_gold",
            "objective.selection",
            "objective.min_weight",
            "objective.train_answers",
        ),
        inputs=_policy_inputs,
        outputs=lambda run: _newest_checkpoint(run.policy),
        all_ranks=True,
        logs="steps",
    ),
    Stage(
        "export",
        "write the round's policy as a Hugging Face folder",
        "round_NN/policy/checkpoints/",
        "round_NN/policy/hf/, and the symlink hf",
        lambda config: (),
        inputs=lambda run: {"policy": run.entry("policy")},
        outputs=lambda run: [run.policy / "hf" / CHECKSUMS],
        concludes=True,
    ),
    Stage(
        "eval",
        "accuracy on the held-out questions, before and after",
        "data.eval, eval.suites, pi_0, the round's policy",
        "eval/",
        lambda config: (*_SAMPLED, "data.eval", "data.on_bad_reference", *_OF_A_SAMPLE, "verify", "eval"),
        inputs=_eval_inputs,
        outputs=_eval_outputs,
        is_used=lambda config: config.data.eval is not None or bool(config.eval.suites),
        first_round_only=lambda config: "policy" not in config.eval.models,
        serves=True,
        concludes=True,
    ),
)
"""In order."""
