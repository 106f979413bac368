"""Proves the engine on one GPU within nine minutes: tests, log-probs, training in every precision, memory and speed.

    tools/gpu_kit.sh SITE [--out FOLDER]         SITE: a folder with Transformer Engine and megatron-core
    python tools/gpu_kit.py --dry                a short form on CPUs, which shows that the kit itself works

Sections run in the order of their worth, each in a process of its own with a limit of time, and each may fail alone.
`gpu_kit.json` and `gpu_kit.md` in FOLDER have what they found. Models have random weights. TFLOP/s count 6 FLOPs a
weight and token and causal attention, without recomputation; the MFU is relative to the dense bf16 peak of the data
sheet (`megavar/training/hardware.py`).
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
Row = dict[str, Any]


@dataclass(frozen=True)
class Size:
    """How much a section does: on a GPU, and in the short form."""

    microbatch_tokens: int
    lengths: tuple[int, ...]
    """Tokens of a sequence; a microbatch is packed with those of one length."""
    layers: int
    """Of the shapes with 4 billion parameters; the others have in proportion to theirs."""
    vocab_size: int
    divisor: int
    """Of all other sizes."""
    timed_steps: int
    curve_steps: int


FULL = Size(16384, (8192, 1024, 2048, 4096, 16384), 24, 151_936, 1, 5, 50)
DRY = Size(256, (128, 32, 64), 2, 1024, 16, 2, 3)
SHAPES = {
    # hidden, ffn, heads, groups, layers, tied; a share of 8B is what one of four tensor-parallel ranks computes
    "4B": (2560, 9728, 32, 8, 36, True),
    "0.6B": (1024, 3072, 16, 8, 28, True),
    "1.7B": (2048, 6144, 16, 8, 28, True),
    "8B, a quarter": (4096, 3072, 8, 2, 36, False),
}


def shape(name: str, size: Size, layers: int | None = None) -> Any:
    """Sizes of a model; `layers` of them, or a share that leaves room for the optimizer."""
    from megavar.models.dims import ModelDims

    hidden, ffn, heads, groups, all_layers, tied = SHAPES[name]
    return ModelDims(
        family="qwen3",
        num_layers=layers or max(2, size.layers * all_layers // 36),
        hidden_size=hidden // size.divisor,
        num_heads=max(2, heads // size.divisor),
        num_query_groups=max(2, groups // size.divisor),
        head_dim=128 if size.divisor == 1 else 32,
        ffn_size=ffn // size.divisor,
        vocab_size=size.vocab_size // (4 if "quarter" in name else 1),
        tied_embeddings=tied,
        rope_base=1e6,
        yarn=None,
        norm_eps=1e-6,
        max_positions=40_960,
        qkv_bias=False,
        qk_norm=True,
        num_experts=0,
        experts_per_token=0,
        normalise_routing=False,
    )


def recipes() -> list[str]:
    """The precisions of training that this machine has, bf16 first."""
    from megavar.training.precision import RECIPES, check_recipe

    found = []
    for recipe in ("bf16", *(name for name in RECIPES if name.startswith(("fp8", "mxfp8")))):
        try:
            check_recipe("precision.recipe", recipe)
        except ValueError as error:
            print(error, flush=True)
        else:
            found.append(recipe)
    return found


def randomize(chunks: list[Any]) -> None:
    """Weights as at a model's start."""
    import torch

    torch.manual_seed(0)
    for chunk in chunks:
        for parameter in chunk.parameters():
            parameter.data.fill_(1.0) if parameter.dim() == 1 else parameter.data.normal_(std=0.02)


def sequences_of(length: int, count: int, vocab_size: int) -> list[Any]:
    """Sequences of one length, a sixteenth of it prompt."""
    import numpy as np

    from megavar.records import TrainSequence

    random = np.random.default_rng(0)
    ids = random.integers(0, vocab_size, (count, length)).astype(np.int32)
    return [TrainSequence(row[: length // 16], row[length // 16 :], 1.0) for row in ids]


def synchronize() -> None:
    """Wait for the device."""
    import torch

    if torch.cuda.is_available():
        torch.cuda.synchronize()


def timed(step: Callable[[], Any], count: int) -> float:
    """Median seconds of a step, after two."""
    seconds = []
    for number in range(count + 2):
        started = time.perf_counter()
        step()
        synchronize()
        if number >= 2:
            seconds.append(time.perf_counter() - started)
    return statistics.median(seconds)


def reset_peak_memory() -> None:
    """Measure the most memory from here on."""
    import torch

    from megavar.training.hardware import release_memory

    release_memory()
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()


def train_row(dims: Any, length: int, recipe: str, size: Size, is_plain: bool = False) -> Row:
    """Speed and memory of a training step of one microbatch."""
    from bench_train import megatron_step

    from megavar.config.schema import ParallelConfig, PrecisionConfig
    from megavar.packing import pack
    from megavar.sequences import in_memory
    from megavar.training.forward_backward import pack_shape
    from megavar.training.hardware import peak_flops, peak_memory_gib

    reset_peak_memory()
    count = max(1, size.microbatch_tokens // length)
    given, precision = sequences_of(length, count, dims.vocab_size), PrecisionConfig(recipe)
    microbatch = pack(in_memory(given), range(count), pack_shape(ParallelConfig(), precision))
    step = megatron_step(dims, randomize, [microbatch], precision, is_plain)
    seconds, lengths = timed(step, size.timed_steps), [length] * count
    flops = dims.training_flops(lengths, sum(len(row.target_ids) for row in given)) / seconds
    peak = peak_flops()
    return {
        "layers": dims.num_layers,
        "tokens of a sequence": length,
        "precision": recipe,
        "loop": "plain Megatron" if is_plain else "megavar",
        "s a step": seconds,
        "tokens/s": sum(lengths) / seconds,
        "TFLOP/s": flops / 1e12,
        "MFU": None if peak is None else flops / peak,
        "peak GiB": peak_memory_gib(),
    }


# -- the sections: each returns rows of a table --


def tests(size: Size) -> list[Row]:
    """tests/gpu."""
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/gpu"],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    print(done.stdout[-3000:], flush=True)
    return [{"tests/gpu": done.stdout.strip().splitlines()[-1], "exit code": done.returncode}]


def logps(size: Size) -> list[Row]:
    """Log-probs in each precision against transformers in float32, nats a token."""
    import numpy as np
    from transformers import Qwen3Config, Qwen3ForCausalLM

    from megavar.checkpoints.convert import Model
    from megavar.config.schema import ParallelConfig, PrecisionConfig
    from megavar.sequences import in_memory
    from megavar.training.scorer import Scorer
    from megavar.training.text_logps import transformers_logps

    dims, rows = shape("0.6B", size, 4), []
    given = [row for length in size.lengths[1:3] for row in sequences_of(length, 3, dims.vocab_size)]
    with tempfile.TemporaryDirectory() as name:
        config = Qwen3Config(
            vocab_size=dims.vocab_size, hidden_size=dims.hidden_size, intermediate_size=dims.ffn_size,
            num_hidden_layers=dims.num_layers, num_attention_heads=dims.num_heads, head_dim=dims.head_dim,
            num_key_value_heads=dims.num_query_groups, tie_word_embeddings=True,
        )  # fmt: skip
        Qwen3ForCausalLM(config).save_pretrained(name)
        model = Model(Path(name))
        expected = np.concatenate(transformers_logps(model, given, 1.0))
        for recipe in ("fp32", *recipes()):
            if recipe == "fp8_delayed":
                continue  # whose scales need a backward pass
            scorer = Scorer(model, ParallelConfig(), PrecisionConfig(recipe))
            found = scorer.score_all(in_memory(given), 1.0, size.microbatch_tokens)
            scorer.release()
            assert found is not None
            difference = np.abs(np.concatenate(found) - expected)
            rows.append({"precision": recipe, "mean": float(difference.mean()), "largest": float(difference.max())})
    return rows


def speed(size: Size) -> list[Row]:
    """Training steps of the 4B shape in every precision, and the plain loop; ratios are to megavar in bf16."""
    dims, rows = shape("4B", size), []
    for recipe in recipes():
        rows.append(train_row(dims, size.lengths[0], recipe, size))
        if recipe == "bf16":
            rows.append(train_row(dims, size.lengths[0], recipe, size, is_plain=True))
    for row in rows:
        row["ratio"] = rows[0]["s a step"] / row["s a step"]
    return rows


def curves(size: Size) -> list[Row]:
    """Loss of the same steps from the same weights in every precision."""
    from bench_train import megatron_step

    from megavar.config.schema import ParallelConfig, PrecisionConfig, TrainConfig
    from megavar.packing import pack
    from megavar.sequences import in_memory
    from megavar.training.forward_backward import pack_shape

    dims, losses = shape("0.6B", size, 8 if size is FULL else 2), {}
    train = TrainConfig(learning_rate=1e-3, warmup_ratio=0.0, decay="constant")
    given = sequences_of(size.lengths[1], 4, dims.vocab_size)
    for recipe in recipes():
        precision = PrecisionConfig(recipe)
        microbatch = pack(in_memory(given), range(len(given)), pack_shape(ParallelConfig(), precision))
        step = megatron_step(dims, randomize, [microbatch], precision, False, train)
        losses[recipe] = [step() for _ in range(size.curve_steps)]
        reset_peak_memory()
    reference = losses["bf16"]
    return [
        {
            "precision": recipe,
            "first loss": found[0],
            "last loss": found[-1],
            "largest relative difference": max(
                abs(ours - other) / abs(other) for ours, other in zip(found, reference, strict=True)
            ),
            "losses": found,
        }
        for recipe, found in losses.items()
    ]


def memory(size: Size) -> list[Row]:
    """Free device memory before and after a training, GiB, and what weights, gradients and optimizer are by count."""
    from megavar.training.hardware import free_memory, release_memory

    dims = shape("1.7B", size)
    release_memory()
    before = free_memory()
    row = train_row(dims, size.lengths[1], "bf16", size)
    release_memory()
    after = free_memory()
    layer = 2 * dims.hidden_size * dims.head_dim * (dims.num_heads + dims.num_query_groups)
    parameters = dims.num_layers * (layer + 3 * dims.hidden_size * dims.ffn_size) + dims.vocab_size * dims.hidden_size
    return [
        {
            "free before": before / 2**30,
            "peak": row["peak GiB"],
            "18 bytes a parameter": 18 * parameters / 2**30,
            "free after": after / 2**30,
            "share": after / before,
        }
    ]


def shapes(size: Size) -> list[Row]:
    """Training steps of the other shapes in bf16."""
    names = [name for name in SHAPES if name != "4B"]
    return [{"shape": name, **train_row(shape(name, size), size.lengths[0], "bf16", size)} for name in names]


def lengths(size: Size) -> list[Row]:
    """Training steps of half the 4B shape with shorter and longer sequences, and the head's share of a step."""
    half = shape("4B", size, size.layers // 2)
    rows = [train_row(half, length, "bf16", size) for length in size.lengths]
    fewer = train_row(replace(half, num_layers=half.num_layers // 2 or 1), size.lengths[0], "bf16", size)
    a_layer = (rows[0]["s a step"] - fewer["s a step"]) / max(1, half.num_layers - fewer["layers"])
    outside = rows[0]["s a step"] - half.num_layers * a_layer
    rows[0]["share of head, embedding and optimizer"] = outside / rows[0]["s a step"]
    return rows


def score(size: Size) -> list[Row]:
    """Scoring: forward passes alone."""
    from megatron.core.utils import unwrap_model

    from megavar.config.schema import ParallelConfig, PrecisionConfig
    from megavar.sequences import in_memory
    from megavar.training.hardware import peak_flops, peak_memory_gib
    from megavar.training.model import build_model, transformer_config
    from megavar.training.scorer import Scorer

    rows = []
    for recipe in recipes():
        if recipe == "fp8_delayed":
            continue
        reset_peak_memory()
        dims, precision = shape("4B", size), PrecisionConfig(recipe)
        chunks = build_model(transformer_config(dims, ParallelConfig(), precision, "none"), dims)
        randomize([unwrap_model(chunk) for chunk in chunks])
        scorer = Scorer(None, ParallelConfig(), precision, chunks)  # type: ignore[arg-type]
        count = max(1, size.microbatch_tokens // size.lengths[0])
        given = in_memory(sequences_of(size.lengths[0], count, dims.vocab_size))
        budget = 2 * size.microbatch_tokens
        seconds = timed(lambda: scorer.score_all(given, 1.0, budget), size.timed_steps)  # noqa: B023
        flops = dims.training_flops(given.num_tokens.tolist(), int(given.num_targets.sum())) / 3 / seconds
        peak = peak_flops()
        rows.append(
            {
                "precision": recipe,
                "tokens/s": int(given.num_tokens.sum()) / seconds,
                "TFLOP/s": flops / 1e12,
                "MFU": None if peak is None else flops / peak,
                "peak GiB": peak_memory_gib(),
            }
        )
        scorer.release()
    return rows


def profile(size: Size) -> list[Row]:
    """Where the device's time goes in a bf16 step of half the 4B shape."""
    import torch
    from bench_train import megatron_step
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as profiled

    from megavar.config.schema import ParallelConfig, PrecisionConfig
    from megavar.packing import pack
    from megavar.sequences import in_memory
    from megavar.training.forward_backward import pack_shape

    dims, precision = shape("4B", size, size.layers // 2), PrecisionConfig("bf16")
    count = max(1, size.microbatch_tokens // size.lengths[0])
    given = in_memory(sequences_of(size.lengths[0], count, dims.vocab_size))
    step = megatron_step(
        dims, randomize, [pack(given, range(count), pack_shape(ParallelConfig(), precision))], precision, False
    )
    step()
    on_gpu = torch.cuda.is_available()
    with profiled(activities=[ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU]) as found:
        step()
        synchronize()
    name = "self_device_time_total" if on_gpu else "self_cpu_time_total"
    events = sorted(found.key_averages(), key=lambda event: -getattr(event, name))
    total = sum(getattr(event, name) for event in events)
    return [
        {"kernel": event.key[:80], "ms": getattr(event, name) / 1e3, "share": getattr(event, name) / total,
         "calls": event.count}
        for event in events[:20]
    ]  # fmt: skip


SECTIONS: dict[str, tuple[Callable[[Size], list[Row]], int]] = {
    "tests": (tests, 100),
    "logps": (logps, 50),
    "speed": (speed, 110),
    "curves": (curves, 60),
    "memory": (memory, 30),
    "shapes": (shapes, 60),
    "lengths": (lengths, 60),
    "score": (score, 40),
    "profile": (profile, 30),
}
"""In the order of their worth, with the seconds that each may take; nine minutes in all."""


def run_section(name: str, size: Size, target: Path) -> None:
    """In a process of its own: write the rows of one section."""
    from megavar.training import parallel

    if name != "tests":
        parallel.start_alone()
    rows = SECTIONS[name][0](size)
    target.write_text(json.dumps(rows))


def environment() -> Row:
    """What the figures belong to."""
    code = (
        "import json, torch, megatron.core, importlib.metadata as m\n"
        "def version(name):\n"
        "    try: return m.version(name)\n"
        "    except m.PackageNotFoundError: return None\n"
        "on = torch.cuda.is_available()\n"
        "print(json.dumps({'device': torch.cuda.get_device_name() if on else 'CPU', 'torch': torch.__version__,\n"
        "  'cuda': torch.version.cuda, 'megatron-core': megatron.core.__version__,\n"
        "  'transformer-engine': version('transformer-engine'), 'transformers': version('transformers')}))"
    )
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=True)
    found: Row = json.loads(done.stdout.strip().splitlines()[-1])
    return {"date": datetime.now(UTC).isoformat(timespec="minutes"), "python": sys.version.split()[0], **found}


def main() -> int:
    """Run the sections; exit code 1 if one failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("gpu_kit"), metavar="FOLDER", help="default: gpu_kit")
    parser.add_argument("--sections", nargs="+", choices=SECTIONS, default=list(SECTIONS), metavar="NAME")
    parser.add_argument("--dry", action="store_true", help="short, small, on CPUs too")
    parser.add_argument("--section", choices=SECTIONS, help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.section:
        run_section(chosen.section, DRY if chosen.dry else FULL, chosen.out)
        return 0
    chosen.out.mkdir(parents=True, exist_ok=True)
    result: Row = {"environment": environment(), "sections": {}}
    for name in chosen.sections:
        began = time.monotonic()
        result["sections"][name] = found = measured(name, chosen.out, chosen.dry)
        found["seconds"] = time.monotonic() - began
        print(f"{name}: {found['status']} in {found['seconds']:.0f} s", flush=True)
        (chosen.out / "gpu_kit.json").write_text(json.dumps(result, indent=2) + "\n")
        (chosen.out / "gpu_kit.md").write_text(markdown(result))
    print((chosen.out / "gpu_kit.md").read_text())
    rows = [row for found in result["sections"].values() for row in found["rows"]]
    failed = any(found["status"] != "done" for found in result["sections"].values())
    return int(failed or any(row.get("exit code") for row in rows))


def measured(name: str, out: Path, dry: bool) -> Row:
    """Run one section in a process of its own."""
    target = out / f"{name}.rows.json"
    command = [sys.executable, "-W", "ignore", __file__, "--section", name, "--out", str(target)]
    with (out / f"{name}.log").open("w") as log:
        try:
            limit = None if dry else SECTIONS[name][1]
            done = subprocess.run(
                [*command, *(["--dry"] if dry else [])], stdout=log, stderr=log, timeout=limit, check=False
            )
        except subprocess.TimeoutExpired:
            return {"status": f"not done within {limit} s", "rows": []}
    if done.returncode or not target.exists():
        return {"status": f"failed with exit code {done.returncode}, see {name}.log", "rows": []}
    rows = json.loads(target.read_text())
    target.unlink()
    return {"status": "done", "rows": rows}


def markdown(result: Row) -> str:
    """The tables, each under the first line of what its section says of itself."""
    lines = ["# On this GPU", "", ", ".join(f"{key} {value}" for key, value in result["environment"].items()), ""]
    for name, found in result["sections"].items():
        lines += [f"## {name}", "", f"{SECTIONS[name][0].__doc__} ({found['status']}, {found['seconds']:.0f} s)", ""]
        columns = list(dict.fromkeys(key for row in found["rows"] for key in row if key != "losses"))
        if columns:
            lines += [f"| {' | '.join(columns)} |", "|" + "---|" * len(columns)]
            lines += [f"| {' | '.join(cell(row.get(column)) for column in columns)} |" for row in found["rows"]]
            lines.append("")
    return "\n".join(lines)


def cell(value: Any) -> str:
    """A value as the table shows it."""
    if value is None:
        return "–"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    sys.exit(main())
