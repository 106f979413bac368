"""The stages of a run: one `Stage` record each, in order. What a stage does is `execute` in `megavar/stages/NAME.py`.

Nothing here does any work, and nothing needs torch.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megavar.config.schema import RunConfig
from megavar.runs.folder import Run
from megavar.runs.manifest import Manifest, NotFinished, file_digest, flat


@dataclass(frozen=True)
class Stage:
    """Everything about a stage but its work."""

    name: str
    """Of the stage in the manifest and on the command line, and of its module in `megavar/stages/`."""
    summary: str
    reads: str
    writes: str
    settings: Callable[[Run], dict[str, Any]]
    """Every setting that the result depends on, and the digests of the stages whose outputs it reads.

    Raises `NotFinished` if one of those is not finished."""
    is_used: Callable[[RunConfig], bool] = lambda config: True
    first_round_only: Callable[[RunConfig], bool] = lambda config: False
    all_ranks: bool = False
    """Trains or scores, so it runs under torchrun; the others run on rank 0."""
    serves: bool = False
    """Samples from SGLang servers."""


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


def _common(run: Run) -> dict[str, Any]:
    """Settings that every trained or sampled result depends on."""
    config = run.config
    return {
        "seed": config.seed,
        "model": config.model,
        "data.train": file_digest(Path(config.data.train)),
        "data.questions_per_round": config.data.questions_per_round,
        "data.fresh_questions": config.data.fresh_questions,
        **flat("templates", config.templates),
        **flat("precision", config.precision),
    }


def _digest(run: Run, stage: str) -> str:
    return Manifest(run.folder).digest(run.entry(stage))


def _reference(run: Run) -> str:
    """Digest of the policy that the round starts with."""
    return _digest(run, "sft") if run.round_index == 1 else _digest(run.previous, "export")


def _sft(run: Run) -> dict[str, Any]:
    return {**_common(run), **flat("sft", run.config.sft)}


def _rollouts(run: Run) -> dict[str, Any]:
    return {
        **_common(run),
        **flat("sample", run.config.sample),
        **flat("verify", run.config.verify),
        "posterior.num_rollouts": run.config.posterior.num_rollouts,
        "reference": _reference(run),
    }


def _posterior(run: Run) -> dict[str, Any]:
    posterior = run.config.posterior
    settings = {**_common(run), **flat("posterior.train", posterior.train), "posterior.source": posterior.source}
    if posterior.source == "rollout":
        settings["rollouts"] = _digest(run, "rollouts")
    elif run.learns_by_reverse_kl:
        settings["weigh"] = _digest(run.previous, "weigh")
    return settings


def _sample(run: Run) -> dict[str, Any]:
    config = run.config
    settings = {**_common(run), **flat("sample", config.sample), "reference": _reference(run)}
    if config.sample.sampler == "posterior":
        settings["posterior"] = _digest(Run(config) if config.posterior.source == "gold" else run, "posterior")
    return settings


def _verify(run: Run) -> dict[str, Any]:
    return {**_common(run), **flat("verify", run.config.verify), "sample": _digest(run, "sample")}


def _score(run: Run) -> dict[str, Any]:
    return {**_common(run), "score.temperature": run.config.score.temperature, "verify": _digest(run, "verify")}


def _weigh(run: Run) -> dict[str, Any]:
    return {**flat("objective", run.config.objective), "score": _digest(run, "score")}


def _policy(run: Run) -> dict[str, Any]:
    policy = run.config.policy
    return {
        **_common(run),
        **flat("policy.train", policy.train),
        **flat("objective", run.config.objective),
        "policy.init": policy.init,
        "policy.mix_gold": policy.mix_gold,
        "weigh": _digest(run, "weigh"),
    }


def _export(run: Run) -> dict[str, Any]:
    return {"policy": _digest(run, "policy")}


def _eval(run: Run) -> dict[str, Any]:
    config = run.config
    return {
        **_common(run),
        **flat("eval", config.eval),
        **flat("sample", config.sample),
        **flat("verify", config.verify),
        "data.eval": file_digest(Path(config.data.eval or "")),
        "trained": _digest(run, "export" if "policy" in config.eval.models else "sft"),
    }


STAGES = (
    Stage(
        "sft",
        "train pi_0 from the base model on the gold traces",
        "base model, gold traces",
        "sft/ (pi_0)",
        _sft,
        first_round_only=lambda config: True,
        all_ranks=True,
    ),
    Stage(
        "rollouts",
        "sample traces of the policy and weigh them by accuracy, for the posterior (posterior.source=rollout)",
        "the policy that the round starts with",
        "round_NN/rollouts/ (traces, answers, verdicts, weights)",
        _rollouts,
        is_used=lambda config: config.posterior.source == "rollout" and config.sample.sampler == "posterior",
        serves=True,
    ),
    Stage(
        "posterior",
        "train the posterior q, which sees the answer as a hint",
        "base model, gold traces or weighted rollouts",
        "round_NN/posterior/ (q)",
        _posterior,
        is_used=lambda config: config.sample.sampler == "posterior",
        first_round_only=lambda config: config.posterior.source == "gold",
        all_ranks=True,
    ),
    Stage(
        "sample",
        "sample K traces a question from q, then n answers a trace from the policy",
        "q, the policy that the round starts with",
        "round_NN/traces/, round_NN/answers/",
        _sample,
        serves=True,
    ),
    Stage(
        "verify",
        "judge every answer, in processes that can be killed",
        "round_NN/answers/",
        "round_NN/verified/ (verdicts)",
        _verify,
    ),
    Stage(
        "score",
        "log-probs of every trace under the policy and q, by the training engine",
        "round_NN/traces/, round_NN/verified/, both models",
        "round_NN/scores/",
        _score,
        all_ranks=True,
    ),
    Stage(
        "weigh",
        "turn scores and verdicts into one weight a trace, by the objective",
        "round_NN/traces/, round_NN/scores/",
        "round_NN/weights/ (weights, bounds)",
        _weigh,
    ),
    Stage(
        "policy",
        "train the round's policy on the weighted traces",
        "base model or the policy before, round_NN/{traces,verified,weights}/",
        "round_NN/policy/checkpoints/",
        _policy,
        all_ranks=True,
    ),
    Stage(
        "export",
        "write the round's policy as a Hugging Face folder",
        "round_NN/policy/checkpoints/",
        "round_NN/policy/hf/, and the symlink hf",
        _export,
    ),
    Stage(
        "eval",
        "accuracy on the held-out questions, before and after",
        "data.eval, pi_0, the round's policy",
        "eval/",
        _eval,
        is_used=lambda config: config.data.eval is not None,
        first_round_only=lambda config: "policy" not in config.eval.models,
        serves=True,
    ),
)
"""In order."""
