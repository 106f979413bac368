"""What the tests of the engine have ranks compute: many cases in one call of `run_cases`, grid after grid."""

import itertools
import json
import pickle
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch.distributed as dist

import megavar.training  # noqa: F401  (before megatron, which it makes usable on CPUs)

# isort: split

from megatron.core import dist_checkpointing, parallel_state
from megatron.core.distributed import DistributedDataParallelConfig

from megavar import ranks
from megavar.checkpoints.convert import MAX_SHARD_BYTES, Model, to_hugging_face
from megavar.config.schema import ParallelConfig, PrecisionConfig, TrainConfig
from megavar.records import TrainSequence
from megavar.sequences import in_memory
from megavar.training import loop, optimizer, parallel
from megavar.training.checkpoint import list_checkpoints
from megavar.training.forward_backward import configure_gradients, gradient_pass, pack_shape
from megavar.training.load_weights import load_weights
from megavar.training.model import build_model, transformer_config
from megavar.training.optimizer import wrap_for_gradients
from megavar.training.scorer import Scorer

FP32 = PrecisionConfig(recipe="fp32")


def run_cases(cases: Sequence[dict], sequences: Sequence[TrainSequence]) -> None:
    """On every rank: each case by the function of its `kind`, which writes its results to `out`."""
    for sizes, same_grid in itertools.groupby(cases, key=lambda case: case["grid"]):
        grid = ParallelConfig(**sizes)
        parallel.start(grid)
        for case in same_grid:
            KINDS[case["kind"]](case, grid, sequences)
            ranks.barrier()
        take_down_grid()
    parallel.stop()


def take_down_grid() -> None:
    """Every process group has threads of its own, hundreds after a few grids: end all but the default group."""
    parallel_state.destroy_model_parallel()
    for group in list(dist.distributed_c10d._world.pg_map):
        if group is not dist.group.WORLD:
            dist.destroy_process_group(group)


def run_score(case: dict, grid: ParallelConfig, sequences: Sequence[TrainSequence]) -> None:
    scorer = Scorer(Model(Path(case["model"])), grid, FP32)
    indices = range(len(sequences))
    own = scorer.score(in_memory(sequences), indices, case.get("temperature", 1.0), case["microbatch_tokens"])
    of_ranks = [None] * dist.get_world_size()
    dist.all_gather_object(of_ranks, own)
    assert sorted(index for found in of_ranks for index in found) == list(indices)
    if ranks.is_rank_zero():
        logps = [next(found[index] for found in of_ranks if index in found) for index in indices]
        Path(case["out"]).write_bytes(pickle.dumps(logps))


def run_gradient(case: dict, grid: ParallelConfig, sequences: Sequence[TrainSequence]) -> None:
    """Writes the gradients of the weighted loss as if they were a model's weights."""
    model = Model(Path(case["model"]))
    config = transformer_config(model.dims, grid, FP32, case.get("recompute", "none"))
    configure_gradients(config)
    chunks = build_model(config, model.dims)
    load_weights(chunks, model)
    wrapped = wrap_for_gradients(config, chunks, TrainConfig(distributed_optimizer=False))
    for chunk in wrapped:
        chunk.zero_grad_buffer()
    held, shape = in_memory(sequences), pack_shape(grid, FP32)
    microbatches, _ = loop.own_microbatches(held, range(len(held)), case["microbatch_tokens"], grid, shape)
    sums = gradient_pass(wrapped, microbatches, case["normalizer"])
    for chunk in chunks:
        for parameter in chunk.parameters():
            parameter.data.copy_(parameter.main_grad)
    out = Path(case["out"])
    saved = out.with_name(out.name + "-megatron")
    if ranks.is_rank_zero():
        saved.mkdir()
    ranks.barrier()
    dist_checkpointing.save({str(index): chunk.sharded_state_dict() for index, chunk in enumerate(chunks)}, str(saved))
    ranks.barrier()
    if ranks.is_rank_zero():
        to_hugging_face(saved, out, model.side_files, MAX_SHARD_BYTES, overwrite=True)
        (Path(case["out"]) / "loss.json").write_text(json.dumps(sums.loss))


def run_train(case: dict, grid: ParallelConfig, sequences: Sequence[TrainSequence]) -> None:
    """`bucket_size`: parameters in a bucket of Megatron's DDP, whose own 40 million hold all of a tiny model."""
    out, losses, norms = Path(case["out"]), [], []
    optimizer.DistributedDataParallelConfig = partial(
        DistributedDataParallelConfig, bucket_size=case.get("bucket_size")
    )
    train = TrainConfig(**case["train"])
    model = Path(case["model"])

    def report(step: int, num_steps: int, metrics: dict[str, float]) -> None:
        losses.append(metrics["loss"])
        norms.append(metrics["grad_norm"])
        if step == case.get("stop_after"):
            raise StopIteration

    try:
        loop.train_model(model, in_memory(sequences), train, grid, FP32, 1, out, report)
    except StopIteration:
        return
    if ranks.is_rank_zero():
        to_hugging_face(list_checkpoints(out)[-1], out / "hf", None, MAX_SHARD_BYTES, overwrite=True)
        (out / "losses.json").write_text(json.dumps(losses))
        (out / "norms.json").write_text(json.dumps(norms))


def run_reload(case: dict, grid: ParallelConfig, sequences: Sequence[TrainSequence]) -> None:
    """Loads a converted checkpoint by Megatron's own means into this grid's model, and saves that as another one."""
    dims = Model(Path(case["model"])).dims
    chunks = build_model(transformer_config(dims, grid, FP32, "none"), dims)
    for chunk in chunks:
        for parameter in chunk.parameters():
            parameter.data.fill_(float("nan"))
    state = {str(index): chunk.sharded_state_dict() for index, chunk in enumerate(chunks)}
    loaded = dist_checkpointing.load(state, case["model"])
    for index, chunk in enumerate(chunks):
        chunk.load_state_dict(loaded[str(index)])
    out = Path(case["out"])
    if ranks.is_rank_zero():
        out.mkdir()
    ranks.barrier()
    dist_checkpointing.save({str(index): chunk.sharded_state_dict() for index, chunk in enumerate(chunks)}, str(out))


KINDS = {"score": run_score, "gradient": run_gradient, "train": run_train, "reload": run_reload}
