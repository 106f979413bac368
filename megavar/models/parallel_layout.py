"""Validates a parallel layout against the sizes of a model."""

from megavar.config.schema import ParallelConfig
from megavar.models.dims import ModelDims


def check_layout(config: ParallelConfig, dims: ModelDims, ranks: int) -> None:
    """Check that a model of these sizes can be sharded over this many ranks.

    Args:
        ranks: the world size.

    Raises:
        ValueError: naming the setting, the size it must divide, and values that work.
    """
    product = config.ranks_per_replica
    if ranks % product:
        raise ValueError(
            f"parallel.tensor={config.tensor} x parallel.pipeline={config.pipeline} x parallel.context="
            f"{config.context} = {product} does not divide the world size {ranks}; start a multiple of {product} "
            "ranks or use smaller sizes."
        )
    for name, size in (
        ("num_attention_heads", dims.num_heads),
        ("num_key_value_heads (query groups)", dims.num_query_groups),
        ("intermediate_size", 0 if dims.num_experts else dims.ffn_size),  # experts are not sharded
    ):
        if size % config.tensor:
            divisors = [str(tensor) for tensor in range(1, 65) if size % tensor == 0]
            raise ValueError(
                f"parallel.tensor={config.tensor} does not divide {name}={size}; use one of {', '.join(divisors)}."
            )
    stage_ranks = ranks // config.pipeline
    if config.expert > 1 and (stage_ranks % config.expert or dims.num_experts == 0 or dims.num_experts % config.expert):
        raise ValueError(
            f"parallel.expert={config.expert} does not divide both num_experts={dims.num_experts} and the "
            f"{stage_ranks} ranks of a pipeline stage; use 1 or a divisor of both."
        )
    if dims.num_experts and config.tensor > 1 and not config.sequence_parallel:
        raise ValueError(
            f"parallel.tensor={config.tensor} with an MoE model needs parallel.sequence=true (--sp): Megatron's router "
            "expects tokens that are sharded over the tensor-parallel ranks."
        )
    stages = config.pipeline * config.virtual_pipeline
    if dims.num_layers % stages:
        raise ValueError(
            f"parallel.pipeline={config.pipeline} x parallel.virtual_pipeline={config.virtual_pipeline} = {stages} "
            f"does not divide num_hidden_layers={dims.num_layers}; every stage must have the same number of layers."
        )
