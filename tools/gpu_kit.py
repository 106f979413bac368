"""Proves the engine on one GPU within nine minutes: tests, log-probs, training in every precision, memory and speed.

    tools/gpu_kit.sh SITE [--out FOLDER]         SITE: a folder with Transformer Engine and megatron-core
    python tools/gpu_kit.py --dry                a short form on CPUs, which shows that the kit itself works

Sections run in the order of their worth, each in a process of its own with a limit of time. A section or a row of one
may fail alone; what was found until then stays. `gpu_kit.json` and `gpu_kit.md` in FOLDER are written after each
section, and FOLDER/NAME.log has what it printed. Models have random weights. TFLOP/s count 6 FLOPs a weight and token
and causal attention, without recomputation; the MFU is relative to the dense bf16 peak of the data sheet
(`megavar/training/hardware.py`). The forecast is that of `megavar check`, in GiB.
"""

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
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


FULL = Size(16384, (8192, 1024, 2048, 4096, 16384), 16, 151_936, 1, 5, 50)
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


def num_parameters(dims: Any) -> int:
    """Of a dense model, its norms aside."""
    layer = 2 * dims.hidden_size * dims.head_dim * (dims.num_heads + dims.num_query_groups)
    layer += 3 * dims.hidden_size * dims.ffn_size
    tables = 1 if dims.tied_embeddings else 2
    return int(dims.num_layers * layer + tables * dims.vocab_size * dims.hidden_size)


def train_row(
    dims: Any,
    lengths: list[int],
    recipe: str,
    size: Size,
    is_plain: bool = False,
    changes: Row | None = None,
    **settings: Any,
) -> Row:
    """Speed and memory of a training step of sequences of these lengths.

    Args:
        changes: of Megatron's TransformerConfig.
        settings: of `TrainConfig`.
    """
    import torch
    from bench_train import TRAIN, megatron_step

    from megavar.config.schema import ParallelConfig, PrecisionConfig
    from megavar.models.memory import training_bytes
    from megavar.sequences import in_memory
    from megavar.training.forward_backward import pack_shape
    from megavar.training.hardware import peak_flops, peak_memory_gib
    from megavar.training.loop import own_microbatches

    reset_peak_memory()
    one, precision = ParallelConfig(), PrecisionConfig(recipe)
    train = replace(TRAIN, microbatch_tokens=size.microbatch_tokens, **settings)
    given = [row for length in lengths for row in sequences_of(length, 1, dims.vocab_size)]
    shape = pack_shape(one, precision, train.fixed_tokens)
    microbatches, padding = own_microbatches(
        in_memory(given), range(len(given)), train.microbatch_tokens, one, shape
    )  # fmt: skip
    step = megatron_step(dims, randomize, microbatches, precision, is_plain, train, changes)
    seconds = timed(step, size.timed_steps)
    flops = dims.training_flops(lengths, sum(len(row.target_ids) for row in given)) / seconds
    forecast = sum(training_bytes(dims, num_parameters(dims), one, train, 2, 1).values()) / 2**30
    # On a CPU: of the whole process, with all that the sections before held.
    peak, held = peak_flops(), peak_memory_gib() if torch.cuda.is_available() else None
    return {
        "s a step": seconds,
        "tokens/s": sum(lengths) / seconds,
        "TFLOP/s": flops / 1e12,
        "MFU": None if peak is None else flops / peak,
        "padding": padding,
        "peak GiB": held,
        "forecast GiB": forecast,
        "peak / forecast": None if held is None else held / forecast,
    }


def alike(length: int, size: Size) -> list[int]:
    """As many sequences of one length as a microbatch holds."""
    return [length] * max(1, size.microbatch_tokens // length)


def attempt(row: Row, work: Callable[[], Row]) -> Row:
    """The row with what `work` finds, or with why it failed: the next one goes on."""
    try:
        return {**row, **work()}
    except Exception as error:
        traceback.print_exc()
        return {**row, "error": f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]:.150}"}


# -- the sections: each yields rows of a table --


def tests(size: Size) -> Iterator[Row]:
    """tests/gpu."""
    command = [sys.executable, "-m", "pytest", "-q", "-rs", "-p", "no:cacheprovider", "tests/gpu"]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as running:
        assert running.stdout is not None
        last = ""
        for line in running.stdout:
            print(line, end="", flush=True)
            last = line.strip() or last
    yield {"tests/gpu": last, "exit code": running.returncode}


def logps(size: Size) -> Iterator[Row]:
    """Log-probs in each precision against transformers in float32, nats a token."""
    import numpy as np
    from transformers import Qwen3Config, Qwen3ForCausalLM

    from megavar.checkpoints.convert import Model
    from megavar.config.schema import ParallelConfig, PrecisionConfig
    from megavar.sequences import in_memory
    from megavar.training.scorer import Scorer
    from megavar.training.text_logps import transformers_logps

    dims = shape("0.6B", size, 4)
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

        def compare(recipe: str) -> Row:
            reset_peak_memory()
            scorer = Scorer(model, ParallelConfig(), PrecisionConfig(recipe))
            found = scorer.score_all(in_memory(given), 1.0, size.microbatch_tokens)
            scorer.release()
            assert found is not None
            difference = np.abs(np.concatenate(found) - expected)
            return {"mean": float(difference.mean()), "largest": float(difference.max())}

        for recipe in ("fp32", *recipes()):
            if recipe != "fp8_delayed":  # whose scales need a backward pass
                yield attempt({"precision": recipe}, lambda: compare(recipe))  # noqa: B023


def speed(size: Size) -> Iterator[Row]:
    """Training steps of the 4B shape in every precision; ratios are to bf16."""
    dims, lengths, bf16 = shape("4B", size), alike(size.lengths[0], size), 0.0
    for recipe in recipes():
        row = {"layers": dims.num_layers, "tokens of a sequence": lengths[0], "precision": recipe}
        row = attempt(row, lambda: train_row(dims, lengths, recipe, size))  # noqa: B023
        seconds = row.get("s a step")
        bf16 = seconds or 0.0 if recipe == "bf16" else bf16
        yield {**row, "times as fast as bf16": bf16 / seconds if seconds and bf16 else None}


def plain(size: Size) -> Iterator[Row]:
    """Steps of half the 4B shape (full logits of the whole need more memory) by the engine and by a plain loop."""
    dims, lengths, own = shape("4B", size, size.layers // 2), alike(size.lengths[0], size), 0.0
    for loop in ("megavar", "plain Megatron"):
        row = {"layers": dims.num_layers, "loop": loop}
        row = attempt(row, lambda: train_row(dims, lengths, "bf16", size, is_plain=loop != "megavar"))  # noqa: B023
        seconds = row.get("s a step")
        own = seconds or 0.0 if loop == "megavar" else own
        # The forecast is that of the engine's own head.
        yield {**{key: value for key, value in row.items() if "forecast" not in key},
               "megavar's time / this": own / seconds if seconds and own else None}  # fmt: skip


def curves(size: Size) -> Iterator[Row]:
    """Loss of the same steps from the same weights in every precision."""
    from bench_train import megatron_step

    from megavar.config.schema import ParallelConfig, PrecisionConfig, TrainConfig
    from megavar.packing import pack
    from megavar.sequences import in_memory
    from megavar.training.forward_backward import pack_shape

    dims = shape("0.6B", size, 8 if size is FULL else 2)
    train = TrainConfig(learning_rate=1e-3, warmup_ratio=0.0, decay="constant")
    given, reference = sequences_of(size.lengths[1], 4, dims.vocab_size), list[float]()

    def losses(recipe: str) -> Row:
        reset_peak_memory()
        precision = PrecisionConfig(recipe)
        microbatch = pack(in_memory(given), range(len(given)), pack_shape(ParallelConfig(), precision))
        step = megatron_step(dims, randomize, [microbatch], precision, False, train)
        return {"losses": [step() for _ in range(size.curve_steps)]}

    for recipe in recipes():
        row = attempt({"precision": recipe}, lambda: losses(recipe))  # noqa: B023
        found = row.get("losses", [])
        reference = found if recipe == "bf16" else reference
        if found:
            row |= {"first loss": found[0], "last loss": found[-1]}
        if found and reference:
            differences = (abs(ours - other) / abs(other) for ours, other in zip(found, reference, strict=True))
            row["largest relative difference to bf16"] = max(differences)
        yield row


def memory(size: Size) -> Iterator[Row]:
    """Free memory of the device before and after a training, GiB; nothing on CPUs, where others use it too."""
    import torch

    from megavar.training.hardware import free_memory, release_memory

    if not torch.cuda.is_available():
        yield {"free before": None, "free after": None, "after / before": None}
        return
    release_memory()
    before = free_memory()

    def work() -> Row:
        train_row(shape("1.7B", size), alike(size.lengths[1], size), "bf16", size)
        release_memory()
        return {"free after": free_memory() / 2**30, "after / before": free_memory() / before}

    yield attempt({"free before": before / 2**30}, work)


def settings(size: Size) -> Iterator[Row]:
    """Settings on and off, 1.7B shape in bf16; the first three rows have sequences of many lengths, several packs."""
    import numpy as np

    from megavar.config.schema import ParallelConfig, PrecisionConfig
    from megavar.training.model import transformer_config

    dims = shape("1.7B", size)
    shortest, longest = size.microbatch_tokens // 16, size.microbatch_tokens // 2
    mixed = np.random.default_rng(0).integers(shortest, longest, 12).tolist()
    usual = alike(size.lengths[0], size)
    rows: list[tuple[str, list[int], Row]] = [
        ("many lengths", mixed, {}),
        ("many lengths, pack_length=fixed", mixed, {"pack_length": "fixed"}),
        ("many lengths, overlap_communication=false", mixed, {"overlap_communication": False}),
        ("as they are", usual, {}),
        ("distributed_optimizer=false", usual, {"distributed_optimizer": False}),
        ("recompute=selective", usual, {"recompute": "selective"}),
        ("recompute=full", usual, {"recompute": "full"}),
    ]
    config = transformer_config(dims, ParallelConfig(), PrecisionConfig("bf16"), "none")
    for name in ("apply_rope_fusion", "bias_activation_fusion", "gradient_accumulation_fusion"):
        if getattr(config, name):
            rows.append((f"without {name}", usual, {"changes": {name: False}}))
    if config.apply_rope_fusion:  # Transformer Engine, whose AdamW these need
        rows.append(("optimizer_moments=bf16", usual, {"optimizer_moments": "bf16"}))
        rows.append(("optimizer_offload=1", usual, {"optimizer_offload": 1.0}))
    for label, lengths, given in rows:
        yield attempt({"settings": label}, lambda: train_row(dims, lengths, "bf16", size, **given))  # noqa: B023


def shapes(size: Size) -> Iterator[Row]:
    """Training steps of the other shapes in bf16."""
    for name in SHAPES:
        if name != "4B":
            dims = shape(name, size)
            row = {"shape": name, "layers": dims.num_layers}
            yield attempt(row, lambda: train_row(dims, alike(size.lengths[0], size), "bf16", size))  # noqa: B023


def lengths(size: Size) -> Iterator[Row]:
    """Training steps of half the 4B shape with shorter and longer sequences, and the share outside of its layers."""
    half, found = shape("4B", size, size.layers // 2), {}
    fewer = replace(half, num_layers=half.num_layers // 2 or 1)
    for length, dims in ((size.lengths[0], fewer), *((length, half) for length in size.lengths)):
        row = {"layers": dims.num_layers, "tokens of a sequence": length}
        row = attempt(row, lambda: train_row(dims, alike(length, size), "bf16", size))  # noqa: B023
        found[dims.num_layers, length] = row.get("s a step")
        few, all_layers = (found.get((part.num_layers, size.lengths[0])) for part in (fewer, half))
        if few and all_layers and (dims, length) == (half, size.lengths[0]) and half.num_layers > fewer.num_layers:
            a_layer = (all_layers - few) / (half.num_layers - fewer.num_layers)
            row["share of head, embedding and optimizer"] = 1 - half.num_layers * a_layer / all_layers
        yield row


def score(size: Size) -> Iterator[Row]:
    """Scoring: forward passes of the 4B shape."""
    import torch
    from megatron.core.utils import unwrap_model

    from megavar.config.schema import ParallelConfig, PrecisionConfig
    from megavar.sequences import in_memory
    from megavar.training.hardware import peak_flops, peak_memory_gib
    from megavar.training.model import build_model, transformer_config
    from megavar.training.scorer import Scorer

    dims = shape("4B", size)
    given = in_memory(
        [row for length in alike(size.lengths[0], size) for row in sequences_of(length, 1, dims.vocab_size)]
    )

    def work(recipe: str) -> Row:
        reset_peak_memory()
        precision = PrecisionConfig(recipe)
        chunks = build_model(transformer_config(dims, ParallelConfig(), precision, "none"), dims)
        randomize([unwrap_model(chunk) for chunk in chunks])
        scorer = Scorer(None, ParallelConfig(), precision, chunks)  # type: ignore[arg-type]
        seconds = timed(lambda: scorer.score_all(given, 1.0, size.microbatch_tokens), size.timed_steps)
        flops = dims.training_flops(given.num_tokens.tolist(), int(given.num_targets.sum())) / 3 / seconds
        peak = peak_flops()
        scorer.release()
        return {
            "tokens/s": int(given.num_tokens.sum()) / seconds,
            "TFLOP/s": flops / 1e12,
            "MFU": None if peak is None else flops / peak,
            "peak GiB": peak_memory_gib() if torch.cuda.is_available() else None,
        }

    for recipe in recipes():
        if recipe != "fp8_delayed":
            yield attempt({"precision": recipe}, lambda: work(recipe))  # noqa: B023


def profile(size: Size) -> Iterator[Row]:
    """Where the device's time goes in a bf16 step of half the 4B shape; the first row's share is of the step's time.

    What is missing to 1 there is what the device waits for the host.
    """
    import torch
    from bench_train import TRAIN, megatron_step
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as profiled

    from megavar.config.schema import ParallelConfig, PrecisionConfig
    from megavar.packing import pack
    from megavar.sequences import in_memory
    from megavar.training.forward_backward import pack_shape

    dims, precision = shape("4B", size, size.layers // 2), PrecisionConfig("bf16")
    count = len(alike(size.lengths[0], size))
    given = in_memory(sequences_of(size.lengths[0], count, dims.vocab_size))
    packed = pack(given, range(count), pack_shape(ParallelConfig(), precision))
    step = megatron_step(dims, randomize, [packed], precision, False, TRAIN)
    seconds = timed(step, size.timed_steps)
    on_gpu = torch.cuda.is_available()
    with profiled(activities=[ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU]) as found:
        step()
        synchronize()
    name = "self_device_time_total" if on_gpu else "self_cpu_time_total"
    events = sorted(found.key_averages(), key=lambda event: -getattr(event, name))
    total = sum(getattr(event, name) for event in events)
    yield {"kernel": f"all, in a step of {seconds * 1e3:.1f} ms", "ms": total / 1e3, "share": total / 1e6 / seconds,
           "calls": sum(event.count for event in events)}  # fmt: skip
    for event in events[:20]:
        yield {"kernel": event.key[:80], "ms": getattr(event, name) / 1e3, "share": getattr(event, name) / total,
               "calls": event.count}  # fmt: skip


SECTIONS: dict[str, tuple[Callable[[Size], Iterator[Row]], int]] = {
    "tests": (tests, 110),
    "logps": (logps, 60),
    "speed": (speed, 90),
    "plain": (plain, 45),
    "curves": (curves, 60),
    "memory": (memory, 30),
    "settings": (settings, 90),
    "shapes": (shapes, 40),
    "lengths": (lengths, 50),
    "score": (score, 40),
    "profile": (profile, 30),
}
"""In the order of their worth, with the seconds that each may take; the last ones only if time is left."""
ALL_SECONDS = 530
LEAST_SECONDS = 20
"""Before which no section is begun: importing takes most of it."""


def run_section(name: str, size: Size, target: Path) -> None:
    """In a process of its own: write the rows of one section, after each of them."""
    from megavar.training import parallel

    if name != "tests":
        parallel.start_alone()
    rows = []
    for row in SECTIONS[name][0](size):
        rows.append(row)
        print(row, flush=True)
        target.write_text(json.dumps(rows))


def environment() -> Row:
    """What the figures belong to."""
    code = (
        "import json, shutil, torch, importlib.metadata as m\n"
        "def version(name):\n"
        "    try: return m.version(name)\n"
        "    except m.PackageNotFoundError: return None\n"
        "on = torch.cuda.is_available()\n"
        "device = torch.cuda.get_device_properties(0) if on else None\n"
        "print(json.dumps({'device': device.name if on else 'CPU',\n"
        "  'GiB': round(device.total_memory / 2**30, 1) if on else None, 'torch': torch.__version__,\n"
        "  'cuda': torch.version.cuda, 'cudnn': torch.backends.cudnn.version() if on else None,\n"
        "  'megatron-core': version('megatron-core'), 'transformer-engine': version('transformer-engine'),\n"
        "  'transformers': version('transformers'),\n"
        "  'C compiler': next(filter(shutil.which, ('cc', 'gcc', 'clang')), None)}))"
    )
    row: Row = {"date": datetime.now(UTC).isoformat(timespec="minutes"), "python": sys.version.split()[0]}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, timeout=120, check=False
    )
    lines = (done.stdout if done.returncode == 0 else done.stderr).strip().splitlines() or ["nothing was printed"]
    return row | (json.loads(lines[-1]) if done.returncode == 0 else {"error": lines[-1]})


def main() -> int:
    """Run the sections; exit code 1 if one failed, or a row of one."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("gpu_kit"), metavar="FOLDER", help="default: gpu_kit")
    parser.add_argument("--sections", nargs="+", choices=SECTIONS, default=list(SECTIONS), metavar="NAME")
    parser.add_argument("--dry", action="store_true", help="short, small, on CPUs too, without limits of time")
    parser.add_argument("--section", choices=SECTIONS, help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.section:
        run_section(chosen.section, DRY if chosen.dry else FULL, chosen.out)
        return 0
    ends = time.monotonic() + ALL_SECONDS
    chosen.out.mkdir(parents=True, exist_ok=True)
    result: Row = {"environment": environment(), "sections": {}}
    for name in chosen.sections:
        began = time.monotonic()
        limit = None if chosen.dry else min(SECTIONS[name][1], ends - began)
        result["sections"][name] = found = measured(name, chosen.out, limit)
        found["seconds"] = time.monotonic() - began
        print(f"{name}: {found['status']} in {found['seconds']:.0f} s", flush=True)
        (chosen.out / "gpu_kit.json").write_text(json.dumps(result, indent=2) + "\n")
        (chosen.out / "gpu_kit.md").write_text(markdown(result))
    print((chosen.out / "gpu_kit.md").read_text())
    rows = [row for found in result["sections"].values() for row in found["rows"]]
    failed = any(found["status"] != "done" for found in result["sections"].values())
    return int(failed or any(row.get("exit code") or "error" in row for row in rows))


def measured(name: str, out: Path, limit: float | None) -> Row:
    """Run one section, with all that it starts, in a session of its own; `limit`: seconds, None for the short form."""
    if limit is not None and limit < LEAST_SECONDS:
        return {"status": "not begun: no time left", "rows": []}
    target = out / f"{name}.rows.json"
    target.unlink(missing_ok=True)
    command = [sys.executable, "-W", "ignore", __file__, "--section", name, "--out", str(target)]
    command += ["--dry"] if limit is None else []
    with (out / f"{name}.log").open("w") as log:
        running = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)
        try:
            running.wait(limit)
            code = running.returncode
            status = "done" if code == 0 else f"failed with exit code {code}, see {name}.log"
        except subprocess.TimeoutExpired:
            status = f"not done within {limit:.0f} s"
        finally:
            if running.poll() is None:  # what it started would hold the device
                os.killpg(running.pid, signal.SIGKILL)
                running.wait()
    rows = json.loads(target.read_text()) if target.exists() else []
    target.unlink(missing_ok=True)
    return {"status": status, "rows": rows}


def markdown(result: Row) -> str:
    """The tables, each under the first line of what its section says of itself."""
    found = result["environment"].items()
    lines = ["# On this GPU", "", ", ".join(f"{key} {value}" for key, value in found if value is not None), ""]
    for name, found in result["sections"].items():
        about = (SECTIONS[name][0].__doc__ or "").splitlines()[0]
        lines += [f"## {name}", "", f"{about} ({found['status']}, {found['seconds']:.0f} s)", ""]
        columns = list(dict.fromkeys(key for row in found["rows"] for key in row if key != "losses"))
        shown = [column for column in columns if any(row.get(column) is not None for row in found["rows"])]
        if shown:
            lines += [f"| {' | '.join(shown)} |", "|" + "---|" * len(shown)]
            lines += [f"| {' | '.join(cell(row.get(column)) for column in shown)} |" for row in found["rows"]]
            lines.append("")
    return "\n".join(lines)


def cell(value: Any) -> str:
    """A value as the table shows it."""
    if value is None:
        return "–"
    return f"{value:.4g}" if isinstance(value, float) else str(value).replace("|", "/")


if __name__ == "__main__":
    sys.exit(main())
