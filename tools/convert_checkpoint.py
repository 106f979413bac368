"""Converts Qwen checkpoints between Hugging Face and Megatron, bit-exactly, and compares them.

    python tools/convert_checkpoint.py to-megatron --hf DIR --out DIR [--dtype bf16|fp32|keep]
    python tools/convert_checkpoint.py to-hf --megatron DIR --out DIR [--hf-template DIR] [--max-shard-size 5GB]
    python tools/convert_checkpoint.py verify A B [--logits FILE]
    python tools/convert_checkpoint.py inspect DIR

Exit code: 0 on success; 1 if `verify` finds a difference; 2 for invalid arguments, sources or targets.
"""

import argparse
import itertools
import re
import sys
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from megavar.checkpoints.convert import ConversionResult, Model, differences, to_hugging_face, to_megatron
from megavar.progress import ProgressLine, in_megabytes

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32, "keep": None}
UNITS = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
SHOWN_DIFFERENCES = 10


def size_in_bytes(text: str) -> int:
    """Parse a size such as 5GB, 500MB or 2GiB."""
    match = re.fullmatch(r"([0-9.]+)\s*([KMG]?i?B)", text, re.IGNORECASE)
    if not match or float(match[1]) <= 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a size; use for example 5GB or 512MiB")
    return int(float(match[1]) * UNITS[match[2].upper()])


def convert_to_megatron(chosen: argparse.Namespace) -> int:
    """Hugging Face folder -> Megatron checkpoint."""
    with ProgressLine("to-megatron") as line:
        result = to_megatron(chosen.hf, chosen.out, DTYPES[chosen.dtype], chosen.overwrite, in_megabytes(line))
    return print_result(result, chosen.out)


def convert_to_hugging_face(chosen: argparse.Namespace) -> int:
    """Megatron checkpoint -> Hugging Face folder."""
    with ProgressLine("to-hf") as line:
        result = to_hugging_face(
            chosen.megatron, chosen.out, chosen.hf_template, chosen.max_shard_size, chosen.overwrite, in_megabytes(line)
        )
    return print_result(result, chosen.out)


def print_result(result: ConversionResult, target: Path) -> int:
    """Print size and digest, and warn about NaN and infinite values."""
    print(f"{target}: {result.num_bytes / 1e9:.3f} GB, digest of the source {result.digest}")
    if result.same_as_source:
        print("The tensors are bit for bit those that the checkpoint was converted from.")
    for name, count in itertools.islice(result.nonfinite.items(), SHOWN_DIFFERENCES):
        print(f"WARNING: {name} has {count} values that are NaN or infinite")
    if result.nonfinite:
        total = sum(result.nonfinite.values())
        print(f"WARNING: {total} values in {len(result.nonfinite)} tensors are NaN or infinite.")
    return 0


def verify(chosen: argparse.Namespace) -> int:
    """Compare two models; with --logits also their log-probs on a text."""
    text = chosen.logits.read_text(encoding="utf-8") if chosen.logits is not None else None
    first, second = Model(chosen.a, chosen.hf_template), Model(chosen.b, chosen.hf_template)
    with ProgressLine("verify") as line:
        unequal = list(differences(first, second, in_megabytes(line)))
    shown = unequal[:SHOWN_DIFFERENCES]
    for difference in shown:
        print(difference)
    if unequal:
        print(f"{len(unequal)} differences between {chosen.a} and {chosen.b}; {len(shown)} shown.")
    else:
        print(f"{chosen.a} and {chosen.b} are equal: every key, shape, dtype and bit.")
    if text is None:
        return 1 if unequal else 0
    from megavar.training.text_logps import text_logps

    logps, others = text_logps(first, text), text_logps(second, text)
    if len(logps) != len(others):
        print(f"the text has {len(logps) + 1} tokens for the first model and {len(others) + 1} for the second.")
        return 1
    largest = (logps - others).abs().max().item()
    print(f"log-probs of {len(logps)} tokens: largest difference {largest:.2e}, tolerance {chosen.tolerance:.0e}")
    return 1 if unequal or not largest <= chosen.tolerance else 0


def inspect(chosen: argparse.Namespace) -> int:
    """Print the architecture, format and size of a model."""
    model = Model(chosen.dir, chosen.hf_template)
    infos = [info for item in model.pieces() for _, info in model.infos(*item)]
    table = Table(title=str(model.path), show_header=False)
    rows = {
        "format": "Megatron torch_dist" if model.is_megatron else "Hugging Face",
        **{key: str(value) for key, value in vars(model.dims).items()},
        "parameters": f"{sum(torch.Size(info.shape).numel() for info in infos):,}",
        "dtypes": ", ".join(sorted({str(info.dtype).removeprefix("torch.") for info in infos})),
        "bytes": f"{model.num_bytes:,}",
        "copy of the tied embedding": "stored" if model.tied_head_written else "not stored",
    }
    if model.description is not None:
        rows["digest of the source"] = model.description.source_digest or "none (saved by training)"
    for key, value in rows.items():
        table.add_row(key, value)
    Console(width=120).print(table)
    return 0


def main() -> int:
    """Parse the command line and run the command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    command = commands.add_parser("to-megatron", help="Hugging Face folder -> Megatron checkpoint")
    command.add_argument("--hf", type=Path, required=True)
    command.add_argument("--out", type=Path, required=True)
    command.add_argument("--dtype", choices=DTYPES, default="keep")
    command.add_argument("--overwrite", action="store_true")
    command.set_defaults(run=convert_to_megatron)

    command = commands.add_parser("to-hf", help="Megatron checkpoint -> Hugging Face folder")
    command.add_argument("--megatron", type=Path, required=True)
    command.add_argument("--out", type=Path, required=True)
    command.add_argument("--max-shard-size", type=size_in_bytes, default="5GB")
    command.add_argument("--overwrite", action="store_true")
    command.set_defaults(run=convert_to_hugging_face)
    add_template(command)

    command = commands.add_parser("verify", help="compare two models of either format, bit by bit")
    command.add_argument("a", type=Path)
    command.add_argument("b", type=Path)
    command.add_argument("--logits", type=Path, metavar="FILE", help="also compare log-probs on this text")
    command.add_argument("--tolerance", type=float, default=1e-4, help="maximum difference of a log-prob (float32)")
    command.set_defaults(run=verify)
    add_template(command)

    command = commands.add_parser("inspect", help="print the architecture, format and size of a model")
    command.add_argument("dir", type=Path)
    command.set_defaults(run=inspect)
    add_template(command)

    chosen = parser.parse_args()
    try:
        code: int = chosen.run(chosen)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return code


def add_template(command: argparse.ArgumentParser) -> None:
    """Add --hf-template, which checkpoints from other tools need."""
    command.add_argument(
        "--hf-template", type=Path, help="Hugging Face folder of the architecture of a checkpoint without huggingface/"
    )


if __name__ == "__main__":
    sys.exit(main())
