"""What each stage of a run does: the records it reads and writes, and the library it calls.

Every rank calls every stage: training and scoring use all of them, the rest runs on rank 0 while the others wait.
"""

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from megavar.config.schema import RunConfig, TrainConfig
from megavar.data.questions import read_questions
from megavar.data.templates import Templates
from megavar.data.tokens import (
    gold_posterior_sequences,
    gold_sequences,
    policy_sequences,
    rollout_posterior_sequences,
)
from megavar.objectives.weights import select
from megavar.records import Answer, Question, Record, Score, Trace, TrainSequence, Weight, read_records
from megavar.rollout.engine import Engine
from megavar.rollout.servers import open_engine
from megavar.stages import plan, report
from megavar.stages.evaluate import evaluate_model
from megavar.stages.metrics import Metrics
from megavar.stages.run import Run, run_once
from megavar.stages.sample import Sampling, sample_answers, sample_traces
from megavar.stages.score import score_traces
from megavar.stages.train import export_stage, link, train_stage
from megavar.stages.verify import verify_answers
from megavar.stages.weigh import counted_scores, engine_difference, weigh_traces
from megavar.training.parallel import is_rank_zero, on_rank_zero


def run_pipeline(config: RunConfig) -> None:
    """Run every stage that is not finished, then print the table of results."""
    _open(config)
    for stage, round_index in plan.stages_of(config):
        _run(Run(config, round_index), stage)
    if is_rank_zero():
        report.print_summary(Run(config, config.rounds))


def run_stage(config: RunConfig, name: str) -> None:
    """Run one stage, such as `policy`, or `policy_02` for that of the second round; those it reads must be finished.

    Raises:
        ValueError: for an unknown stage, or one that this configuration has no use for, or if what the run has made
            so far was made under other settings.
    """
    stage, round_index = plan.find_stage(config, name)
    _open(config)
    _run(Run(config, round_index), stage)


def _open(config: RunConfig) -> None:
    def work() -> None:
        plan.check_made(config)
        Run(config).open()

    on_rank_zero(work)


def _run(run: Run, stage: str) -> None:
    run_once(run, stage, plan.settings_of(run, stage), lambda: WORK[stage](run))


def run_sft(run: Run) -> None:
    """pi_0 from the base on the gold data."""
    _train(run, "sft", run.base, gold_sequences(*_gold(run)), run.config.sft, run.sft)
    export_stage(run.sft, run.sft / "hf")


def run_rollouts(run: Run) -> None:
    """Traces of pi_0 with verdicts and weights, for the posterior to learn from (equation 9)."""
    config, folder = run.config, run.round / "rollouts"

    async def draw(questions: list[Question], templates: Templates) -> tuple[list[Trace], list[Answer]]:
        sampling = Sampling(config.sample, templates, config.seed, run.round_index)
        async with open_engine(config.rollout, run.reference, run.folder / "servers") as engine:
            return await _draw_policy(engine, questions, sampling, config.posterior.num_rollouts, folder)

    def work() -> None:
        questions = _round_questions(run)
        traces, answers = asyncio.run(draw(questions, _templates(run)))
        verified = _verify(run, questions, answers, folder / "verified")
        every = replace(config.objective, num_traces=None)  # K is about q's traces
        values = weigh_traces(traces, counted_scores(traces, verified), "forward_kl", every, folder / "weights")
        _log(run, "rollouts", {run.round_index: values})

    on_rank_zero(work)


def run_posterior(run: Run) -> None:
    """q on the gold traces, on weighted rollouts of the policy, or by the reverse KL on its own last traces."""
    config, rollouts, init = run.config, run.round / "rollouts", run.base
    if config.posterior.source == "rollout":
        sequences = rollout_posterior_sequences(
            _round_questions(run), _read(rollouts / "traces", Trace), _read(rollouts / "weights", Weight),
            _templates(run),
        )  # fmt: skip
    elif run.learns_by_reverse_kl:
        init, last, weights = run.before.posterior / "hf", run.before.round, run.round / "reverse_kl"
        traces, scores = _read(last / "traces", Trace), _read(last / "scores", Score)
        on_rank_zero(lambda: _weigh_reverse(run, traces, scores, weights))
        sequences = rollout_posterior_sequences(
            _round_questions(run.before), traces, _read(weights, Weight), _templates(run)
        )
    else:
        sequences = gold_posterior_sequences(*_gold(run))
    _train(run, "posterior", init, sequences, config.posterior.train, run.posterior)
    export_stage(run.posterior, run.posterior / "hf")


def run_sample(run: Run) -> None:
    """K traces a question from q or the policy, and n answers a trace from the policy."""
    config = run.config

    async def draw() -> None:
        questions, templates = _round_questions(run), _templates(run)
        sampling = Sampling(config.sample, templates, config.seed, run.round_index)
        sampler = config.sample.sampler
        prompt_of = templates.posterior_prompt if sampler == "posterior" else templates.policy_prompt
        async with open_engine(config.rollout, _sampler(run), run.folder / "servers") as engine:
            traces = await sample_traces(
                engine, questions, prompt_of, sampler, config.sample.num_traces, sampling, run.round / "traces"
            )
            await engine.load_weights(run.reference)
            await sample_answers(engine, traces, questions, config.sample.num_answers, sampling, run.round / "answers")

    on_rank_zero(lambda: asyncio.run(draw()))


def run_verify(run: Run) -> None:
    """A verdict for every answer."""

    def work() -> None:
        _verify(run, _round_questions(run), _read(run.round / "answers", Answer), run.round / "verified")

    on_rank_zero(work)


def run_score(run: Run) -> None:
    """Log-probs of every trace under the policy that the round starts with, and under who drew it."""
    config = run.config
    score_traces(
        _round_questions(run), _read(run.round / "traces", Trace), _read(run.round / "verified", Answer),
        run.reference, _sampler(run), config.score, config.parallel, config.precision, _templates(run),
        run.round / "scores",
    )  # fmt: skip


def run_weigh(run: Run) -> None:
    """The weight of every trace among those of its question."""

    def work() -> None:
        traces, scores = _read(run.round / "traces", Trace), _read(run.round / "scores", Score)
        objective = run.config.objective
        values = weigh_traces(traces, scores, objective.name, objective, run.round / "weights")
        if run.config.score.temperature == run.config.sample.temperature:
            values["largest_engine_difference"] = engine_difference(traces, scores)
        _log(run, "weigh", {run.round_index: values})

    on_rank_zero(work)


def run_policy(run: Run) -> None:
    """The round's policy, on the weighted traces and, by configuration, the gold data."""
    config, objective = run.config, run.config.objective
    weights, lost = select(_read(run.round / "weights", Weight), objective.selection, objective.min_weight, config.seed)
    if is_rank_zero():
        print(f"policy: {len(weights)} weighted traces; weight left out by min_weight: {lost:.4f}", flush=True)
    traces, answers = _read(run.round / "traces", Trace), _read(run.round / "verified", Answer)
    sequences = policy_sequences(_round_questions(run), traces, answers, weights, _templates(run), objective.answers)
    if config.policy.mix_gold:
        sequences += gold_sequences(_round_questions(run), _templates(run), config.data.max_sequence_tokens)
    init = run.base if config.policy.init == "base" else run.reference
    _train(run, "policy", init, sequences, config.policy.train, run.policy)


def run_export(run: Run) -> None:
    """The round's policy as a Hugging Face folder, to which the run's `hf` then leads."""
    export_stage(run.policy, run.policy / "hf")
    if not Run(run.config, run.round_index + 1).policy.exists():  # a later round's policy keeps its place
        on_rank_zero(lambda: link(run.final, run.policy / "hf"))


def run_eval(run: Run) -> None:
    """Held-out accuracy of the round's policy and, in the first round, of pi_0."""
    config = run.config
    models = {"pi_0": run.sft / "hf"} if run.round_index == 1 and "pi_0" in config.eval.models else {}
    if "policy" in config.eval.models:
        models[f"pi_{run.round_index}"] = run.policy / "hf"

    async def draw(questions: list[Question]) -> dict[str, list[Answer]]:
        sampling = Sampling(config.sample, _templates(run), config.seed, round_index=0)  # the same for all policies
        found = {}
        async with open_engine(config.rollout, next(iter(models.values())), run.folder / "servers") as engine:
            for name, model in models.items():
                await engine.load_weights(model)
                folder = run.folder / "eval" / name
                found[name] = (
                    await _draw_policy(engine, questions, sampling, config.eval.num_samples, folder, num_answers=1)
                )[1]
        return found

    def work() -> None:
        assert config.data.eval is not None
        questions = read_questions(Path(config.data.eval))
        accuracies = {}
        for name, answers in asyncio.run(draw(questions)).items():
            verified = _verify(run, questions, answers, run.folder / "eval" / name / "verified")
            file = run.folder / "eval" / f"{name}.json"
            found = evaluate_model(questions, verified, config.eval, config.seed, file)
            accuracies[int(name.removeprefix("pi_"))] = {f"pass@{item.k}": item.mean for item in found}
        _log(run, "eval", accuracies)

    on_rank_zero(work)


WORK: dict[str, Callable[[Run], None]] = {
    "sft": run_sft,
    "rollouts": run_rollouts,
    "posterior": run_posterior,
    "sample": run_sample,
    "verify": run_verify,
    "score": run_score,
    "weigh": run_weigh,
    "policy": run_policy,
    "export": run_export,
    "eval": run_eval,
}
"""What each stage of `plan.STAGES` does."""


async def _draw_policy(
    engine: Engine, questions: list[Question], sampling: Sampling, num_traces: int, folder: Path, num_answers: int = 0
) -> tuple[list[Trace], list[Answer]]:
    """Traces of the served policy and answers after them."""
    prompt_of = sampling.templates.policy_prompt
    traces = await sample_traces(engine, questions, prompt_of, "policy", num_traces, sampling, folder / "traces")
    num_answers = num_answers or sampling.config.num_answers
    answers = await sample_answers(engine, traces, questions, num_answers, sampling, folder / "answers")
    return traces, answers


def _sampler(run: Run) -> Path:
    """Who draws the traces, as a Hugging Face folder."""
    return run.posterior / "hf" if run.config.sample.sampler == "posterior" else run.reference


def _templates(run: Run) -> Templates:
    return Templates(run.base, run.config.templates)


def _gold(run: Run) -> tuple[list[Question], Templates, int]:
    questions = read_questions(Path(run.config.data.train))
    return questions, _templates(run), run.config.data.max_sequence_tokens


def _round_questions(run: Run) -> list[Question]:
    return run.take_questions(read_questions(Path(run.config.data.train)))


def _weigh_reverse(run: Run, traces: Sequence[Trace], scores: Sequence[Score], folder: Path) -> None:
    weigh_traces(traces, scores, "reverse_kl", run.config.objective, folder)


def _read(folder: Path, record_type: type[Record]) -> list[Record]:
    return read_records(folder / "data.parquet", record_type)


def _verify(run: Run, questions: Sequence[Question], answers: Sequence[Answer], folder: Path) -> list[Answer]:
    return verify_answers(questions, answers, run.config.verify, run.config.sample.flush_seconds, folder)


def _train(
    run: Run, stage: str, init: Path, sequences: Sequence[TrainSequence], train: TrainConfig, folder: Path
) -> None:
    train_stage(run.entry(stage), init, sequences, train, run.config, folder, run.folder)


def _log(run: Run, stage: str, values_of: dict[int, dict[str, float]]) -> None:
    """Log what a stage found, of each round (0: before the first), so that a curve over the rounds comes of it."""
    metrics = Metrics(run.folder, run.config.logging, run.config.name)
    metrics.drop(stage, list(values_of))
    for round_index, values in values_of.items():
        metrics.log(stage, round_index, values)
    metrics.close()
