"""Runs engine cases under torchrun for test_engine.py: `engine_worker.py CASES.json`.

Many grids in one launch, since starting four processes costs more than most cases.
"""

import itertools
import json
import pickle
import sys
from pathlib import Path

from megavar.config.schema import ParallelConfig, PrecisionConfig, TrainConfig

if __name__ == "__main__":  # the writer of checkpoints spawns a process a rank, which imports this file again
    from megavar import ranks
    from megavar.checkpoints.convert import Model
    from megavar.training import parallel


def main() -> None:
    cases = json.loads(Path(sys.argv[1]).read_text())
    for sizes, same_grid in itertools.groupby(cases, key=lambda case: case["grid"]):
        grid = ParallelConfig(**sizes)
        parallel.start(grid)
        for case in same_grid:
            RUNNERS[case["kind"]](case, grid)
            ranks.barrier()
        take_down_grid()
    parallel.stop()


def take_down_grid() -> None:
    """Every process group has threads of its own, hundreds after a few grids: end all but the default group."""
    import torch.distributed as dist
    from megatron.core import parallel_state

    parallel_state.destroy_model_parallel()
    for group in list(dist.distributed_c10d._world.pg_map):
        if group is not dist.group.WORLD:
            dist.destroy_process_group(group)


def run_score(case: dict, grid: ParallelConfig) -> None:
    from megavar.training.scorer import Scorer

    scorer = Scorer(Model(Path(case["model"])), grid, PrecisionConfig(dtype="fp32"))
    logps = scorer.score(load_sequences(case), case.get("temperature", 1.0), case["microbatch_tokens"])
    if ranks.is_rank_zero():
        Path(case["out"]).write_bytes(pickle.dumps(logps))


def run_gradient(case: dict, grid: ParallelConfig) -> None:
    """Writes the gradients of the weighted loss as if they were a model's weights."""
    from megatron.core import dist_checkpointing

    from megavar.checkpoints.convert import MAX_SHARD_BYTES, to_hugging_face
    from megavar.training import loop
    from megavar.training.forward_backward import configure_gradients, gradient_pass, pack_shape
    from megavar.training.load_weights import load_weights
    from megavar.training.model import build_model, transformer_config
    from megavar.training.optimizer import wrap_for_gradients

    model, precision = Model(Path(case["model"])), PrecisionConfig(dtype="fp32")
    config = transformer_config(model.dims, grid, precision, case.get("recompute", "none"))
    configure_gradients(config)
    chunks = build_model(config, model.dims)
    load_weights(chunks, model)
    wrapped = wrap_for_gradients(config, chunks, TrainConfig(distributed_optimizer=False))
    for chunk in wrapped:
        chunk.zero_grad_buffer()
    microbatches = loop._microbatches(
        load_sequences(case), case["microbatch_tokens"], grid, pack_shape(grid, precision)
    )
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


def run_train(case: dict, grid: ParallelConfig) -> None:
    from megavar.checkpoints.convert import MAX_SHARD_BYTES, to_hugging_face
    from megavar.training.checkpoint import list_checkpoints
    from megavar.training.loop import train_model

    out, losses = Path(case["out"]), []
    train, precision = TrainConfig(**case["train"]), PrecisionConfig(dtype="fp32")
    sequences, model = load_sequences(case), Path(case["model"])

    def report(step: int, num_steps: int, metrics: dict[str, float]) -> None:
        losses.append(metrics["loss"])
        if step == case.get("stop_after"):
            raise StopIteration

    try:
        train_model(model, sequences, train, grid, precision, 1, out, report)
    except StopIteration:
        return
    if ranks.is_rank_zero():
        to_hugging_face(list_checkpoints(out)[-1], out / "hf", None, MAX_SHARD_BYTES, overwrite=True)
        (out / "losses.json").write_text(json.dumps(losses))


def run_reload(case: dict, grid: ParallelConfig) -> None:
    """Loads a converted checkpoint by Megatron's own means into this grid's model, and saves that as another one."""
    from megatron.core import dist_checkpointing

    from megavar.training.model import build_model, transformer_config

    dims = Model(Path(case["model"])).dims
    chunks = build_model(transformer_config(dims, grid, PrecisionConfig(dtype="fp32"), "none"), dims)
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


def load_sequences(case: dict) -> list:
    return pickle.loads(Path(case["sequences"]).read_bytes())


RUNNERS = {"score": run_score, "gradient": run_gradient, "train": run_train, "reload": run_reload}

if __name__ == "__main__":
    main()
