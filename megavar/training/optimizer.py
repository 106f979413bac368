"""Megatron's DDP wrapper, AdamW and schedule for one training job."""

import math
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from megavar.config.schema import TrainConfig

NOT_FINITE = (
    "the weights were not updated, and the last checkpoint is as it was. Lower the learning rate or train in another "
    "precision (docs/troubleshooting.md#loss-not-finite)."
)


def wrap_for_gradients(config: Any, chunks: list[torch.nn.Module], train: TrainConfig) -> list[torch.nn.Module]:
    """Wrap each chunk in Megatron's DistributedDataParallel: gradients are added up in float32."""
    overlaps = train.distributed_optimizer and train.overlap_communication
    ddp_config = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        use_distributed_optimizer=train.distributed_optimizer,
        overlap_grad_reduce=overlaps,
        overlap_param_gather=overlaps,
    )
    wrapped = [
        DistributedDataParallel(config, ddp_config, chunk, disable_bucketing=index > 0)
        for index, chunk in enumerate(chunks)
    ]
    for chunk in wrapped:
        _count_padding(chunk)
    if overlaps:  # gradients of all but a step's last microbatch stay on their rank
        no_syncs = [chunk.no_sync for chunk in wrapped]
        config.no_sync_func = no_syncs if len(no_syncs) > 1 else no_syncs[0]
    return wrapped


def _count_padding(chunk: Any) -> None:
    """Let checkpoints find optimizer states where they are in a buffer of several buckets.

    The padding at the end of a bucket is left out of what is saved, but not of where a parameter is looked for in it
    (distrib_optimizer.py:1027 and :1500, also in 0.19): resumed, states were shifted and cut off.
    """
    for buffer in (*chunk.buffers, *chunk.expert_parallel_buffers):
        for bucket in buffer.buckets:
            bucket.numel_unpadded = bucket.grad_data.numel()
        buffer.numel_unpadded = sum(bucket.numel_unpadded for bucket in buffer.buckets)


def gather_parameters(chunks: list[torch.nn.Module]) -> None:
    """Complete the parameters after an update; with overlap they are otherwise gathered as the next step needs them."""
    for chunk in chunks:
        if chunk.use_forward_hook:
            chunk.disable_forward_pre_hook(param_sync=True)  # type: ignore[operator]
            chunk.enable_forward_pre_hook()  # type: ignore[operator]


def optimizer_config_arguments(train: TrainConfig, bf16: bool) -> dict[str, Any]:
    """The values of Megatron's OptimizerConfig."""
    arguments: dict[str, Any] = {
        "optimizer": "adam",
        "lr": train.learning_rate,
        "min_lr": train.learning_rate * train.min_learning_rate_ratio,
        "weight_decay": train.weight_decay,
        "adam_beta1": train.adam_beta1,
        "adam_beta2": train.adam_beta2,
        "adam_eps": train.adam_eps,
        "clip_grad": train.clip_grad,
        "bf16": bf16,
        "params_dtype": torch.bfloat16 if bf16 else torch.float32,
        "use_distributed_optimizer": train.distributed_optimizer,
    }
    if train.optimizer_moments == "bf16":
        moments = dict.fromkeys(("exp_avg_dtype", "exp_avg_sq_dtype"), torch.bfloat16)
        # Not only the bits that the weights lack: checkpoints would hold those instead of the float32 copy, and not
        # load again (distrib_optimizer.py:932, Transformer Engine's fused_adam.py, set_scaled_state).
        arguments |= {"use_precision_aware_optimizer": True, "store_param_remainders": False, **moments}
    if train.optimizer_offload > 0:
        arguments |= {
            "optimizer_cpu_offload": True,
            "optimizer_offload_fraction": train.optimizer_offload,
            "overlap_cpu_optimizer_d2h_h2d": True,
        }
    return arguments


def build_optimizer(
    chunks: list[torch.nn.Module], train: TrainConfig, bf16: bool, num_steps: int
) -> tuple[Any, OptimizerParamScheduler]:
    """AdamW without weight decay on norms and biases, and its schedule over `num_steps` steps.

    The schedule applies the learning rate and also the weight-decay groups, which Megatron writes nowhere else: it is
    to be stepped before the first update, or restored.
    """
    optimizer = get_megatron_optimizer(OptimizerConfig(**optimizer_config_arguments(train, bf16)), chunks)
    _refuse_nonfinite_norm(optimizer)
    warmup_steps = round(train.warmup_ratio * num_steps)
    scheduler = OptimizerParamScheduler(
        optimizer,
        init_lr=0.0,
        max_lr=train.learning_rate,
        min_lr=train.learning_rate * train.min_learning_rate_ratio,
        lr_warmup_steps=warmup_steps,
        lr_decay_steps=max(num_steps, warmup_steps + 1),
        lr_decay_style=train.decay,
        start_wd=train.weight_decay,
        end_wd=train.weight_decay,
        wd_incr_steps=num_steps,
        wd_incr_style="constant",
    )
    return optimizer, scheduler


def _refuse_nonfinite_norm(optimizer: Any) -> None:
    """Raise FloatingPointError inside `step`, between computing the gradient norm and using it.

    Megatron's ChainedOptimizer.step (optimizer.py) asks for the norm once, before it clips and updates; without a loss
    scaler it would clip by a norm of NaN and write NaN into every weight.
    """
    norm_of = optimizer.get_grad_norm

    def finite_norm() -> float:
        norm = float(norm_of())
        if not math.isfinite(norm):
            raise FloatingPointError(f"the gradient norm is {norm}; {NOT_FINITE}")
        return norm

    optimizer.get_grad_norm = finite_norm
