"""What a run consists of: its stages in order, and what the result of each depends on. Works on nothing itself."""

import re
from pathlib import Path
from typing import Any

from megavar.config.schema import RunConfig
from megavar.stages.run import Manifest, NotFinished, Run, file_digest, flat

STAGES = ("sft", "rollouts", "posterior", "sample", "verify", "score", "weigh", "policy", "export", "eval")
"""In order; `pipeline.py` says what each does."""


def stages_of(config: RunConfig) -> list[tuple[str, int]]:
    """The run's stages and their rounds, in order."""
    unused = set()
    if config.posterior.source != "rollout":
        unused.add("rollouts")
    if config.sample.sampler == "policy":
        unused |= {"rollouts", "posterior"}
    if config.data.eval is None:
        unused.add("eval")
    once = {"sft"}
    if config.posterior.source == "gold":
        once.add("posterior")
    if "policy" not in config.eval.models:
        once.add("eval")
    return [
        (stage, round_index)
        for round_index in range(1, config.rounds + 1)
        for stage in STAGES
        if stage not in unused and not (round_index > 1 and stage in once)
    ]


def find_stage(config: RunConfig, name: str) -> tuple[str, int]:
    """A stage and its round by a name such as `policy`, or `policy_02` for that of the second round.

    Raises:
        ValueError: for an unknown stage, or one that this configuration has no use for.
    """
    known = {Run(config, round_index).entry(stage): (stage, round_index) for stage, round_index in stages_of(config)}
    if name not in known:
        raise ValueError(f"no stage {name!r} in this run; its stages are {', '.join(known)}.")
    return known[name]


def needs_every_rank(name: str) -> bool:
    """Whether a stage, of whichever round, trains or scores and so runs under torchrun."""
    return re.sub(r"_\d+$", "", name) in ("sft", "posterior", "score", "policy")


def check_made(config: RunConfig) -> None:
    """Check that everything the run has made so far was made under these settings.

    A stage alone reads what others left, and a report the configuration: neither may differ from what they describe.

    Raises:
        ValueError: naming the stage and the differing key.
    """
    manifest = Manifest(Run(config).folder)
    for stage, round_index in stages_of(config):
        run = Run(config, round_index)
        if run.entry(stage) in manifest.entries():
            try:
                settings = settings_of(run, stage)
            except NotFinished:  # what it was made from is to be made anew: then it is refused when its turn comes
                continue
            manifest.check(run.entry(stage), settings)


def settings_of(run: Run, stage: str) -> dict[str, Any]:
    """Every setting that the stage's result depends on, and the digests of the stages whose records it reads.

    Raises:
        NotFinished: if one of those is not finished.
    """
    config = run.config
    match stage:
        case "sft":
            return {**_common(run), **flat("sft", config.sft)}
        case "rollouts":
            return {
                **_common(run),
                **_sampled(run),
                **flat("verify", config.verify),
                "posterior.num_rollouts": config.posterior.num_rollouts,
                "reference": _reference(run),
            }
        case "posterior":
            train = flat("posterior.train", config.posterior.train)
            found = {**_common(run), **train, "posterior.source": config.posterior.source}
            if config.posterior.source == "rollout":
                found["rollouts"] = _after(run, "rollouts")
            elif run.learns_by_reverse_kl:
                found["weigh"] = _after(run.before, "weigh")
            return found
        case "sample":
            found = {**_common(run), **_sampled(run), "reference": _reference(run)}
            if config.sample.sampler == "posterior":
                of = Run(config) if config.posterior.source == "gold" else run
                found["posterior"] = _after(of, "posterior")
            return found
        case "verify":
            return {**_common(run), **flat("verify", config.verify), "sample": _after(run, "sample")}
        case "score":
            return {**_common(run), "score.temperature": config.score.temperature, "verify": _after(run, "verify")}
        case "weigh":
            return {**flat("objective", config.objective), "score": _after(run, "score")}
        case "policy":
            return {
                **_common(run),
                **flat("policy.train", config.policy.train),
                **flat("objective", config.objective),
                "policy.init": config.policy.init,
                "policy.mix_gold": config.policy.mix_gold,
                "weigh": _after(run, "weigh"),
            }
        case "export":
            return {"policy": _after(run, "policy")}
        case "eval":
            return {
                **_common(run),
                **flat("eval", config.eval),
                **_sampled(run),
                **flat("verify", config.verify),
                "data.eval": file_digest(Path(config.data.eval or "")),
                "trained": _after(run, "export" if "policy" in config.eval.models else "sft"),
            }
    raise AssertionError(stage)


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


def _sampled(run: Run) -> dict[str, Any]:
    return flat("sample", run.config.sample)


def _reference(run: Run) -> str:
    """Digest of the policy that the round starts with."""
    return _after(run, "sft") if run.round_index == 1 else _after(run.before, "export")


def _after(run: Run, stage: str) -> str:
    return Manifest(run.folder).digest(run.entry(stage))
