"""What a run will take, before it starts: tokens and steps of each stage, memory of a rank, disk, time."""

from collections import Counter
from collections.abc import Sequence
from statistics import mean
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

from megavar.config.schema import RunConfig, TrainConfig
from megavar.records import Question
from megavar.stages.check_questions import TokenCounts

if TYPE_CHECKING:
    from megavar.models.dims import ModelDims

PERCENTILES = (50, 90, 99, 100)


class Forecast:
    """Rows of the plan that `megavar check` prints.

    Args:
        num_parameters: of the whole model.
        ranks: of the run.
    """

    def __init__(
        self,
        config: RunConfig,
        dims: "ModelDims",
        num_parameters: int,
        ranks: int,
        questions: Sequence[Question],
        num_sampled: int,
        counts: TokenCounts,
    ) -> None:
        self._config, self._dims, self._ranks, self._counts = config, dims, ranks, counts
        self._num_parameters, self._num_sampled = num_parameters, num_sampled
        self._verifiers = Counter(question.verifier for question in questions)

    def rows(self, tokens_per_second: float | None) -> list[tuple[str, str]]:
        """(what, how much), in the order of the stages."""
        counts, config = self._counts, self._config
        verifiers = ", ".join(f"{count:,} {name}" for name, count in self._verifiers.most_common())
        found = [
            ("questions", f"{self._verifiers.total():,} ({verifiers}), {len(counts.traces):,} with a gold trace"),
            ("sampled", f"{self._num_sampled:,} questions in {config.rounds} round{'s' if config.rounds > 1 else ''}"),
        ]
        for name, lengths in (
            ("prompt", counts.prompts), ("prompt with hint", counts.hinted), ("gold trace", counts.traces),
            ("reference answer", counts.answers), ("gold sequence", counts.gold),
        ):  # fmt: skip
            if lengths:
                found.append((f"tokens of a {name}", _percentiles(lengths)))
        tokens = self._stage_tokens()
        found += [(f"stage {stage}", text) for stage, (text, _) in tokens.items()]
        total = sum(number for _, number in tokens.values())
        if tokens_per_second is not None:
            hours = total / tokens_per_second / 3600
            found.append(("time", f"{hours:,.1f} h at {tokens_per_second:,.0f} tokens/s over all stages"))
        found.append(("memory of a rank", self._memory()))
        found.append(("disk", f"about {self._disk() / 1e9:,.1f} GB for weights, checkpoints and exports"))
        return found

    def print(self, tokens_per_second: float | None) -> None:
        """Print the rows as a table."""
        table = Table(show_header=False, box=None)
        for row in self.rows(tokens_per_second):
            table.add_row(*row)
        Console(soft_wrap=True).print(table)

    def _stage_tokens(self) -> dict[str, tuple[str, float]]:
        """Stage -> description, tokens in all rounds; sampled lengths are those of the gold texts, or the limits."""
        config, counts = self._config, self._counts
        sample = config.sample
        trace = mean(counts.traces) if counts.traces else sample.max_trace_tokens
        answer = min(mean(counts.answers), sample.max_answer_tokens)
        prompt = mean(counts.prompts)
        hinted = mean(counts.hinted) if counts.hinted else prompt
        num_traces = self._num_sampled * sample.num_traces
        num_answers = num_traces * sample.num_answers
        found: dict[str, tuple[str, float]] = {}

        def train(stage: str, num_sequences: int, mean_tokens: float, job: TrainConfig, rounds: int = 1) -> None:
            steps = job.steps_of(num_sequences)
            tokens = steps * job.batch_sequences * mean_tokens * rounds
            found[stage] = (
                f"{steps * rounds:,} steps of {job.batch_sequences} sequences, {tokens:,.0f} tokens", tokens
            )  # fmt: skip

        if counts.gold:
            train("sft", len(counts.gold), mean(counts.gold), config.sft)
        if counts.gold_hinted:
            train("posterior", len(counts.gold_hinted), mean(counts.gold_hinted), config.posterior.train)
        sampled = num_traces * trace + num_answers * answer
        found["sample"] = (
            f"{num_traces:,} traces and {num_answers:,} answers, {sampled:,.0f} tokens if they are as long as the "
            f"gold ones, at most {num_traces * sample.max_trace_tokens + num_answers * sample.max_answer_tokens:,}",
            sampled,
        )
        scored = num_traces * (prompt + trace + answer)
        scored += num_traces * (hinted + trace) if sample.sampler == "posterior" else 0
        found["score"] = (f"{num_traces:,} traces, {scored:,.0f} tokens", scored)
        a_round = max(1, num_traces // config.rounds)
        train("policy", a_round, prompt + trace + answer, config.policy.train, config.rounds)
        description, tokens = found["policy"]
        found["policy"] = (f"at most {description}, if every trace has weight", tokens)
        return found

    def _memory(self) -> str:
        """At its peak, of the rank and the training that hold most."""
        # Not above: its package imports torch, and what is checked before needs none.
        from megavar.models.memory import training_bytes

        config, weights = self._config, 4 if self._config.precision.recipe == "fp32" else 2
        jobs = [
            training_bytes(self._dims, self._num_parameters, config.parallel, train, weights, self._ranks)
            for name, train in config.training_jobs.items()
            if name != "posterior.train" or config.trains_posterior
        ]
        parts = max(jobs, key=lambda parts: sum(parts.values()))
        listed = ", ".join(f"{name} {size / 1e9:,.2f}" for name, size in parts.items())
        return f"about {sum(parts.values()) / 1e9:,.2f} GB ({listed} GB) on {self._ranks} ranks"

    def _disk(self) -> float:
        """Bytes of checkpoints that are kept and of exported models."""
        config, weights = self._config, 4 if self._config.precision.recipe == "fp32" else 2
        checkpoint = self._num_parameters * (weights + (8 if weights == 4 else 12))
        jobs = [(config.sft, 1), (config.policy.train, config.rounds)]
        if config.trains_posterior:
            jobs.append((config.posterior.train, 1 if config.posterior.source == "gold" else config.rounds))
        return float(sum(
            rounds * (job.keep_checkpoints * checkpoint + self._num_parameters * weights) for job, rounds in jobs
        ))  # fmt: skip


def _percentiles(lengths: Sequence[int]) -> str:
    ordered = sorted(lengths)
    at = {share: ordered[min(len(ordered) - 1, share * len(ordered) // 100)] for share in PERCENTILES}
    return ", ".join(f"{at[share]:,} ({'longest' if share == 100 else f'{share} %'})" for share in PERCENTILES)
