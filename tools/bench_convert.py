"""Benchmarks conversion of a model with the sizes of Qwen3-4B (8 GB) against `cp` of the same files.

    python tools/bench_convert.py [--folder DIR] [--layers N]

Both read files that are in the page cache, write the same number of bytes onto the same disk, and are timed until
these are there: `cp -r` and then `sync` of its files, against a conversion with its fsync and renames. They take turns;
figures are medians, ratios those of pairs of turns. Memory is the peak RSS of a process that converts, minus that of a
process that only imports the same modules. CPU time is the user's and the system's. All output is removed at the end.
"""

import argparse
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from megavar.checkpoints.convert import MAX_SHARD_BYTES
from megavar.checkpoints.huggingface import HuggingFaceWriter, TensorInfo
from megavar.models import operators
from megavar.models.config_json import read_dims
from megavar.models.ops import names_at, pieces

SIZES = {
    "model_type": "qwen3",
    "architectures": ["Qwen3ForCausalLM"],
    "hidden_size": 2560,
    "intermediate_size": 9728,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 151_936,
    "max_position_embeddings": 32_768,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e6,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
}
CONVERT = """
import json, resource, sys, time
from pathlib import Path
from megavar.checkpoints.convert import MAX_SHARD_BYTES, to_hugging_face, to_megatron
direction, source, target = sys.argv[1], *map(Path, sys.argv[2:])
started, cpu = time.perf_counter(), time.process_time()
if direction == "to-megatron":
    to_megatron(source, target, None, False)
elif direction == "to-hf":
    assert to_hugging_face(source, target, None, MAX_SHARD_BYTES, False).same_as_source, "the round trip is not exact"
seconds, cpu = time.perf_counter() - started, time.process_time() - cpu
print(json.dumps([seconds, cpu, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024]))
"""


def make_model(folder: Path, num_layers: int) -> int:
    """Write a Hugging Face folder with random bfloat16 weights; returns the size of its tensors in bytes."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({**SIZES, "num_hidden_layers": num_layers}))
    dims, random = read_dims(folder), torch.Generator().manual_seed(0)
    rows = [
        (name, TensorInfo(torch.bfloat16, shape))
        for operator, index in pieces(operators(dims), dims)
        for name, shape in zip(names_at(operator, index), operator.hf_shapes(dims), strict=True)
    ]
    writer = HuggingFaceWriter(folder, rows, MAX_SHARD_BYTES)
    for name, info in rows:
        writer.write(name, torch.empty(info.shape, dtype=torch.bfloat16).normal_(std=0.02, generator=random))
    writer.finish()
    return sum(info.num_bytes for _, info in rows)


@dataclass(frozen=True)
class Cost:
    """Of one copy or conversion."""

    seconds: float
    cpu_seconds: float
    peak_bytes: int = 0


def copy(source: Path, target: Path) -> Cost:
    """Cost of `cp -r` and fsync of its files."""
    os.sync()
    started, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run(["cp", "-r", str(source), str(target)], check=True)
    subprocess.run(["sync", *map(str, sorted(target.rglob("*")))], check=True)
    seconds, after = time.perf_counter() - started, resource.getrusage(resource.RUSAGE_CHILDREN)
    return Cost(seconds, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)


def convert(direction: str, *paths: Path) -> Cost:
    """Cost and peak RSS of one conversion in a separate process."""
    os.sync()
    command = [sys.executable, "-W", "ignore", "-c", CONVERT, direction, *map(str, paths)]
    return Cost(*json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout.splitlines()[-1]))


def main() -> None:
    """Run both directions and their baselines; print throughput, ratio and memory."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--folder", type=Path, default=Path(tempfile.gettempdir()), help="where to write; on a physical disk"
    )
    parser.add_argument("--layers", type=int, default=36, help="number of layers; fewer for a smaller model")
    parser.add_argument("--turns", type=int, default=3, help="of cp and of the converter, in each direction")
    chosen = parser.parse_args()
    needed, free = 3.3 * (0.8e9 + 0.21e9 * chosen.layers), shutil.disk_usage(chosen.folder).free
    if free < needed:
        sys.exit(
            f"{chosen.folder} has {free / 1e9:.0f} GB free, {needed / 1e9:.0f} GB are needed; pass another --folder."
        )
    with tempfile.TemporaryDirectory(dir=chosen.folder) as name:
        folder = Path(name)
        source, copied, megatron, back = (folder / part for part in ("hf", "copy", "megatron", "back"))
        num_bytes = make_model(source, chosen.layers)
        print(f"{num_bytes / 1e9:.2f} GB in {len(list(source.glob('*.safetensors')))} files")
        idle = convert("nothing", source, source).peak_bytes
        for direction, origin, target in (("to-megatron", source, megatron), ("to-hf", megatron, back)):
            turns: list[tuple[Cost, Cost]] = []
            for _ in range(chosen.turns):
                shutil.rmtree(target, ignore_errors=True)
                baseline = copy(origin, copied)
                shutil.rmtree(copied)
                turns.append((convert(direction, origin, target), baseline))
            speeds = [num_bytes / 1e9 / statistics.median(turn[side].seconds for turn in turns) for side in (0, 1)]
            cpus = [statistics.median(turn[side].cpu_seconds for turn in turns) / num_bytes * 1e9 for side in (0, 1)]
            ratio = statistics.median(baseline.seconds / ours.seconds for ours, baseline in turns)
            memory = max(ours.peak_bytes for ours, _ in turns) - idle
            print(
                f"{direction:12s} {speeds[0]:5.2f} GB/s {cpus[0]:5.2f} CPU s/GB   cp {speeds[1]:5.2f} GB/s "
                f"{cpus[1]:5.2f} CPU s/GB   ratio {ratio:.2f}   memory {memory / 2**30:.2f} GiB over "
                f"{idle / 2**30:.2f} GiB"
            )


if __name__ == "__main__":
    main()
