"""Benchmarks scoring (memory, throughput) against transformers with a full float32 log_softmax.

    python tools/bench_score.py

Both score the same sequences of 300 to 1,500 tokens with the same 4-layer Qwen3 (hidden size 1,024, vocabulary
151,936, float32), each in a separate process. Ratios are megavar / transformers. The rates of the head's matrix product
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
from pathlib import Path

import numpy as np
import torch

from megavar.records import TrainSequence
from megavar.sequences import in_memory

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


def score_with_transformers(model_folder: Path, sequences: list[TrainSequence]) -> tuple[list[np.ndarray], float]:
    """Score one sequence at a time; returns [target tokens] log-probs per sequence, and seconds."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32).eval()
    started, logps_of_targets = time.perf_counter(), []
    with torch.no_grad():
        for sequence in sequences:
            ids = torch.from_numpy(np.concatenate([sequence.prompt_ids, sequence.target_ids])).long()
            logps = model(input_ids=ids[None]).logits[0].float().log_softmax(-1)[:-1]
            chosen = logps.gather(1, ids[1:, None]).squeeze(1)[len(sequence.prompt_ids) - 1 :]
            logps_of_targets.append(chosen.numpy().copy())
    return logps_of_targets, time.perf_counter() - started


def score_with_megavar(model_folder: Path, sequences: list[TrainSequence]) -> tuple[list[np.ndarray], float]:
    """Score with the training engine on one rank; returns the same."""
    from megavar.checkpoints.convert import Model
    from megavar.config.schema import ParallelConfig, PrecisionConfig
    from megavar.training import parallel
    from megavar.training.scorer import Scorer

    parallel.start_alone()
    scorer = Scorer(Model(model_folder), ParallelConfig(), PrecisionConfig(recipe="fp32"))
    started = time.perf_counter()
    found = scorer.score(in_memory(sequences), range(len(sequences)), 1.0, MICROBATCH_TOKENS)
    seconds = time.perf_counter() - started
    parallel.stop()
    return [found[index] for index in range(len(sequences))], seconds


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
    logps, seconds = SIDES[side](folder / "model", sequences)
    np.savez(folder / f"{side}.npz", *logps)
    metrics = {
        "seconds": seconds,
        "tokens": sum(sequence.num_tokens for sequence in sequences),
        "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }
    (folder / f"{side}.json").write_text(json.dumps(metrics))


def main() -> None:
    """Run both sides; print throughput, peak memory, ratios and the largest difference."""
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
        results, logps = {}, {}
        for side in SIDES:
            arguments = ["--side", side, "--folder", name, "--count", str(chosen.count)]
            environment = {**os.environ, "OMP_NUM_THREADS": str(os.cpu_count())}
            subprocess.run([sys.executable, "-W", "ignore", __file__, *arguments], check=True, env=environment)
            results[side] = json.loads((folder / f"{side}.json").read_text())
            with np.load(folder / f"{side}.npz") as arrays:
                logps[side] = [arrays[key] for key in arrays.files]
    for side, row in results.items():
        rate, peak = row["tokens"] / row["seconds"], row["peak_bytes"] / 2**30
        print(f"{side:13s} {rate:8.1f} tokens/s   peak {peak:.2f} GiB")
    ours, theirs = results["megavar"], results["transformers"]
    difference = max(np.abs(a - b).max() for a, b in zip(logps["megavar"], logps["transformers"], strict=True))
    print(f"speed ratio   {theirs['seconds'] / ours['seconds']:.2f}")
    print(f"memory ratio  {ours['peak_bytes'] / theirs['peak_bytes']:.2f}")
    print(f"largest difference of a log-prob {difference:.1e}")
    chunks, whole = product_rates()
    print(f"head's product {chunks:.0f} GFLOP/s in chunks, {whole:.0f} at once (ratio {chunks / whole:.2f})")


if __name__ == "__main__":
    main()
