"""`megavar selftest`: whether model, grid and servers of a configuration give the same numbers in every way they can.

Some of the run's own sequences are scored in two packings and by transformers, trained on for one step in two packings,
and scored again after that step was exported; samples of a server are scored by the training engine. Nothing of it is
part of the run.
"""

import json
import shutil
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from megavar.checkpoints.convert import Model
from megavar.config.schema import PrecisionConfig, RunConfig
from megavar.disk import atomic_write, make_folder
from megavar.ranks import ExplainedFailure, from_rank_zero, on_rank_zero
from megavar.records import LogProbs, TrainSequence
from megavar.rollout.engine import GenerateRequest
from megavar.rollout.service import RolloutService
from megavar.rollout.sglang_client import SGLangEngine
from megavar.runs.folder import Run
from megavar.runs.owner import owned
from megavar.sequences import in_memory
from megavar.stages.export import export_newest
from megavar.stages.run_files import question_tokens, train_questions
from megavar.training.hardware import free_memory
from megavar.training.one_step import Gradients, take_one_step
from megavar.training.scorer import Scorer
from megavar.training.text_logps import transformers_logps

NUM_SEQUENCES, NUM_SERVED, SERVED_TOKENS = 32, 4, 256
ALLOWED = {"fp32": 1e-4, "bf16": 0.03, "fp8": 0.15}
"""By arithmetic: mean difference of a token's log-prob in nats, relative difference of a loss or gradient norm."""
MEMORY_MARGIN = 1.3
"""transformers needs this many times the bytes of its float32 weights."""


@dataclass(frozen=True)
class Comparison:
    """Two ways to the same numbers."""

    what: str
    difference: float | None
    """Mean over tokens, nats, or relative; None: could not be compared."""
    allowed: float
    note: str

    @property
    def verdict(self) -> str:
        """What the table says; a difference that is not a number is one."""
        if self.difference is None:
            return "not compared"
        return "same" if self.difference <= self.allowed else "DIFFERS"


def selftest(config: RunConfig) -> None:
    """Make all comparisons and print them; every rank of the run's grid calls it.

    Raises:
        ExplainedFailure: on rank 0, if something differs by more than its arithmetic allows.
    """
    run = Run(config)
    folder = run.folder / "selftest"
    with ExitStack() as ownership:

        def begin() -> None:
            ownership.enter_context(owned(run.folder))
            shutil.rmtree(folder, ignore_errors=True)
            make_folder(folder)

        on_rank_zero(begin)
        comparisons = _compare(run, folder)
        on_rank_zero(lambda: _report(comparisons, folder))


def _compare(run: Run, folder: Path) -> list[Comparison]:
    """All comparisons; complete on rank 0."""
    config, base = run.config, Model(run.base)
    parallel, scored_in = config.parallel, PrecisionConfig(config.score_recipe)
    # of the parameters: what a step has changed is compared without the noise of 8 bits
    exact = PrecisionConfig("fp32" if config.precision.recipe == "fp32" else "bf16")
    own, served, served_logps = from_rank_zero(lambda: (_own_sequences(run), *_served(run, folder)))
    sequences, samples = in_memory(own), in_memory(served)
    train, budget, least = config.policy.train, config.score.microbatch_tokens, int(sequences.num_tokens.max())

    scorer = Scorer(base, parallel, scored_in)
    packed = scorer.score_all(sequences, 1.0, budget)
    packed_otherwise = scorer.score_all(sequences, 1.0, least)
    scored = scorer.score_all(samples, config.score.temperature, budget)
    scorer.release()
    others = from_rank_zero(lambda: _by_transformers(base, own))
    budgets = train.microbatch_tokens, least
    gradients, trained = take_one_step(
        base, sequences, budgets, train, parallel, config.precision, exact, folder / "checkpoints"
    )
    export_newest(folder, folder / "hf")
    scorer = Scorer(Model(folder / "hf"), parallel, exact)
    exported = scorer.score_all(sequences, 1.0, budget)
    scorer.release()

    allowed = _allowed(scored_in)
    return [
        _of_logps("log-probs: one packing, another", packed, packed_otherwise, allowed),
        _of_logps("log-probs: this grid, transformers", packed, others, allowed),
        *_of_gradients(gradients, _allowed(config.precision)),
        _of_logps("log-probs after a step: in memory, exported", trained, exported, _allowed(exact)),
        # A server computes in the arithmetic of its own kernels.
        _of_logps("log-probs of samples: server, this grid", served_logps, scored, max(allowed, ALLOWED["bf16"])),
    ]


def _own_sequences(run: Run) -> list[TrainSequence]:
    """Of questions spread over the train file: prompt, gold trace if there is one, reference answer."""
    texts, questions = question_tokens(run), train_questions(run)
    places = np.linspace(0, len(questions) - 1, min(NUM_SEQUENCES, len(questions))).round().astype(int)
    found = []
    for question in (questions[place] for place in places):
        trace = texts.answer(question)[:0] if question.trace is None else texts.trace(question)
        found.append(TrainSequence(texts.policy_prompt(question), trace, 1.0, texts.answer(question)))
    return [sequence for sequence in found if sequence.num_tokens <= run.config.data.max_sequence_tokens]


def _served(run: Run, folder: Path) -> tuple[list[TrainSequence], list[LogProbs]]:
    """Samples of the base model, and the server's log-probs of their tokens."""
    texts, temperature = question_tokens(run), run.config.score.temperature
    max_tokens = min(SERVED_TOKENS, run.config.sample.max_trace_tokens)

    async def ask(engine: SGLangEngine) -> tuple[list[TrainSequence], list[LogProbs]]:
        sequences, logps = [], []
        for question in train_questions(run)[:NUM_SERVED]:
            prompt = texts.policy_prompt(question)
            request = GenerateRequest(prompt, max_tokens, temperature, seed=run.config.seed)
            (sample,) = await engine.generate(request)
            assert sample.logps is not None
            sequences.append(TrainSequence(prompt, sample.ids, 1.0))
            logps.append(sample.logps)
        return sequences, logps

    service = RolloutService(run.config.rollout, run.base, folder / "servers")
    try:
        return service.run(run.base, ask)
    finally:
        service.close()


def _by_transformers(base: Model, sequences: list[TrainSequence]) -> list[LogProbs] | None:
    """None where this rank's memory does not hold the model in float32."""
    if 4 * MEMORY_MARGIN * base.num_parameters > free_memory():
        return None
    return transformers_logps(base, sequences, 1.0)


def _of_logps(what: str, ones: list[LogProbs] | None, others: list[LogProbs] | None, allowed: float) -> Comparison:
    if ones is None or others is None:
        return Comparison(what, None, allowed, "does not fit into the memory of one rank")
    differences = np.concatenate([np.abs(one - other) for one, other in zip(ones, others, strict=True)])
    note = f"{len(differences):,} tokens, at most {differences.max():.1e} nats"
    return Comparison(what, float(differences.mean()), allowed, note)


def _of_gradients(gradients: Sequence[Gradients], allowed: float) -> list[Comparison]:
    one, other = gradients

    def relative(first: float, second: float) -> float:
        return abs(first - second) / max(abs(first), 1e-30)

    return [
        Comparison("loss of a step: one packing, another", relative(one.loss, other.loss), allowed, f"{one.loss:.6f}"),
        Comparison("gradient norm: one packing, another", relative(one.norm, other.norm), allowed, f"{one.norm:.6f}"),
    ]


def _allowed(precision: PrecisionConfig) -> float:
    return ALLOWED.get(precision.recipe, ALLOWED["fp8"])


def _report(comparisons: list[Comparison], folder: Path) -> None:
    with atomic_write(folder / "result.json") as aside:
        rows = [{**asdict(row), "verdict": row.verdict} for row in comparisons]
        aside.write_text(json.dumps(rows, indent=2) + "\n")
    table = Table("compared", "difference", "allowed", "", "", title=f"{folder.parent.name}: selftest")
    for row in comparisons:
        shown = "–" if row.difference is None else f"{row.difference:.1e}"
        table.add_row(row.what, shown, f"{row.allowed:.0e}", row.verdict, row.note)
    Console().print(table)
    for name in ("checkpoints", "hf"):
        shutil.rmtree(folder / name)
    wrong = [row.what for row in comparisons if row.verdict == "DIFFERS"]
    if wrong:
        raise ExplainedFailure(
            f"{len(wrong)} of {len(comparisons)} comparisons differ by more than their arithmetic allows, first "
            f"{wrong[0]!r} ({folder}/result.json); do not train with these settings before you know why "
            "(docs/troubleshooting.md#the-selftest-differs)."
        )
