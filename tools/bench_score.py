"""Benchmarks scoring (memory, throughput) against transformers with a full float32 log_softmax.

    python tools/bench_score.py

Both score the same sequences of 300 to 1,500 tokens with the same 4-layer Qwen3 (hidden size 1,024, vocabulary
151,936, float32), in separate processes that take turns. Figures are medians, ratios (megavar / transformers) those of
pairs of turns; processor time is that of all threads. The rates of the head's matrix product
are those of a microbatch's positions and as many rows of the table as a chunk has, over 8 chunks, and of these at once.
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from megavar.records import TrainSequence
from megavar.sequences import in_memory

TURNS = 3
VOCAB_SIZE = 151_936
HIDDEN_SIZE = 1024
MICROBATCH_TOKENS = 2048


def make_model(folder: Path) -> None:
    """Save the model that both sides load."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=VOCAB_SIZE,
        hidden_size=HIDDEN_SIZE,
        intermediate_size=3072,
        num_hidden_layers=4,
        num_attention_heads=16,
        num_key_value_heads=8,
        head_dim=128,
        tie_word_embeddings=True,
    )
    Qwen3ForCausalLM(config).save_pretrained(folder)


def make_sequences(count: int) -> list[TrainSequence]:
    """Sequences of 300 to 1,500 tokens with 100 prompt tokens each; one has the maximum length."""
    random = np.random.default_rng(0)
    lengths = [1500, *random.integers(300, 1501, count - 1)]
    ids = [random.integers(0, VOCAB_SIZE, length).astype(np.int32) for length in lengths]
    return [TrainSequence(row[:100], row[100:], 1.0) for row in ids]


Scored = tuple[list[np.ndarray], float, float]
"""[target tokens] log-probs of each sequence, seconds, and processor time in seconds."""


def score_with_transformers(model_folder: Path, sequences: list[TrainSequence]) -> Scored:
    """Score one sequence at a time."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32).eval()

    def score(some: list[TrainSequence]) -> list[np.ndarray]:
        logps_of_targets = []
        for sequence in some:
            ids = torch.from_numpy(np.concatenate([sequence.prompt_ids, sequence.target_ids])).long()
            logps = model(input_ids=ids[None]).logits[0].float().log_softmax(-1)[:-1]
            chosen = logps.gather(1, ids[1:, None]).squeeze(1)[len(sequence.prompt_ids) - 1 :]
            logps_of_targets.append(chosen.numpy().copy())
        return logps_of_targets

    with torch.no_grad():
        return timed(score, sequences)


def score_with_megavar(model_folder: Path, sequences: list[TrainSequence]) -> Scored:
    """Score with the training engine on one rank."""
    from megavar.checkpoints.convert import Model
    from megavar.config.schema import ParallelConfig, PrecisionConfig
    from megavar.training import parallel
    from megavar.training.scorer import Scorer

    parallel.start_alone()
    scorer = Scorer(Model(model_folder), ParallelConfig(), PrecisionConfig(recipe="fp32"))

    def score(some: list[TrainSequence]) -> list[np.ndarray]:
        found = scorer.score(in_memory(some), range(len(some)), 1.0, MICROBATCH_TOKENS)
        return [found[index] for index in range(len(some))]

    scored = timed(score, sequences)
    parallel.stop()
    return scored


def timed(score: Callable[[list[TrainSequence]], list[np.ndarray]], sequences: list[TrainSequence]) -> Scored:
    """Score the sequences, after one of them that is not timed: what a process does once is not its speed."""
    score(sequences[:1])
    started, started_cpu = time.perf_counter(), time.process_time()
    logps = score(sequences)
    return logps, time.perf_counter() - started, time.process_time() - started_cpu


def product_rates() -> tuple[float, float]:
    """GFLOP/s of hidden x table^T a chunk of the vocabulary at a time, and at once; medians of 5, in turn."""
    from megavar.training.logprobs import SCORED_ELEMENTS

    rows = SCORED_ELEMENTS // MICROBATCH_TOKENS
    hidden, table = torch.randn(MICROBATCH_TOKENS, HIDDEN_SIZE), torch.randn(8 * rows, HIDDEN_SIZE)
    seconds: dict[int, list[float]] = {rows: [], len(table): []}
    outputs = {size: torch.empty(MICROBATCH_TOKENS, size) for size in seconds}
    for _ in range(6):
        for size, times in seconds.items():
            started = time.perf_counter()
            for part in table.split(size):
                torch.mm(hidden, part.T, out=outputs[size])
            times.append(time.perf_counter() - started)
    chunks, whole = (2e-9 * table.numel() * len(hidden) / statistics.median(times[1:]) for times in seconds.values())
    return chunks, whole


SIDES = {"transformers": score_with_transformers, "megavar": score_with_megavar}


def run_side(side: str, folder: Path, count: int) -> None:
    """Measure one side in this process and write log-probs and metrics to `folder`."""
    sequences = make_sequences(count)
    logps, seconds, cpu_seconds = SIDES[side](folder / "model", sequences)
    np.savez(folder / f"{side}.npz", *logps)
    metrics = {
        "seconds": seconds,
        "cpu_seconds": cpu_seconds,
        "tokens": sum(sequence.num_tokens for sequence in sequences),
        "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }
    (folder / f"{side}.json").write_text(json.dumps(metrics))


def ratio(results: dict[str, list[dict[str, float]]], key: str, turn: int) -> float:
    """megavar / transformers in one turn."""
    return results["megavar"][turn][key] / results["transformers"][turn][key]


def main() -> None:
    """Run both sides in turn; print throughput, peak memory, ratios and the largest difference."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=12, help="number of sequences")
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.side:
        run_side(chosen.side, chosen.folder, chosen.count)
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_model(folder / "model")
        results: dict[str, list[dict[str, float]]] = {side: [] for side in SIDES}
        logps = {}
        for turn in range(TURNS):
            for side in SIDES:
                arguments = ["--side", side, "--folder", name, "--count", str(chosen.count)]
                environment = {**os.environ, "OMP_NUM_THREADS": str(os.cpu_count())}
                subprocess.run([sys.executable, "-W", "ignore", __file__, *arguments], check=True, env=environment)
                results[side].append(json.loads((folder / f"{side}.json").read_text()))
                with np.load(folder / f"{side}.npz") as arrays:
                    logps[side] = [arrays[key] for key in arrays.files]
            print(
                f"turn {turn + 1} of {TURNS}: {ratio(results, 'seconds', turn):.2f} of transformers' time", flush=True
            )
    for side, rows in results.items():
        rate, cpu, peak = (
            statistics.median(values)
            for values in zip(
                *((row["tokens"] / row["seconds"], row["cpu_seconds"], row["peak_bytes"] / 2**30) for row in rows),
                strict=True,
            )
        )
        print(f"{side:13s} {rate:8.1f} tokens/s   processor time {cpu:6.1f} s   peak {peak:.2f} GiB")
    for key in ("seconds", "cpu_seconds", "peak_bytes"):
        ratios = [ratio(results, key, turn) for turn in range(TURNS)]
        of_turns = ", ".join(f"{value:.2f}" for value in ratios)
        print(f"ratio of {key:12s} {statistics.median(ratios):.2f}  (of each turn: {of_turns})")
    difference = max(np.abs(a - b).max() for a, b in zip(logps["megavar"], logps["transformers"], strict=True))
    print(f"largest difference of a log-prob {difference:.1e}")
    chunks, whole = product_rates()
    print(f"head's product {chunks:.0f} GFLOP/s in chunks, {whole:.0f} at once (ratio {chunks / whole:.2f})")


if __name__ == "__main__":
    main()
