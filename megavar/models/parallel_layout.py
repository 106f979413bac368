"""Which parallel layouts a model of given sizes can be split over."""

from megavar.config.schema import ParallelConfig
from megavar.models.dims import ModelDims


def check_layout(config: ParallelConfig, dims: ModelDims, ranks: int) -> None:
    """Check that a model of these sizes can be split over this many ranks.

    Raises:
        ValueError: naming the setting, the size it must divide, and the values that would do.
    """
    product = config.ranks_per_replica
    if ranks % product:
        raise ValueError(
            f"parallel.tensor={config.tensor} x parallel.pipeline={config.pipeline} x parallel.context="
            f"{config.context} = {product} does not divide the world size {ranks}; start a multiple of {product} "
            "ranks or choose smaller sizes."
        )
    for name, size in (
        ("num_attention_heads", dims.num_heads),
        ("num_key_value_heads (query groups)", dims.num_query_groups),
        ("intermediate_size", 0 if dims.num_experts else dims.ffn_size),  # experts are not split
    ):
        if size % config.tensor:
            fitting = [str(tensor) for tensor in range(1, 65) if size % tensor == 0]
            raise ValueError(
                f"parallel.tensor={config.tensor} does not divide {name}={size}; use one of {', '.join(fitting)}."
            )
    copies = ranks // config.pipeline
    if config.expert > 1 and (copies % config.expert or dims.num_experts == 0 or dims.num_experts % config.expert):
        raise ValueError(
            f"parallel.expert={config.expert} does not divide both num_experts={dims.num_experts} and the {copies} "
            "ranks of a pipeline stage; use 1 or a divisor of both."
        )
    if dims.num_experts and config.tensor > 1 and not config.sequence:
        raise ValueError(
            f"parallel.tensor={config.tensor} of a mixture of experts needs parallel.sequence=true (--sp): Megatron "
            "routes tokens that are split over the tensor-parallel ranks."
        )
    stages = config.pipeline * config.virtual_pipeline
    if dims.num_layers % stages:
        raise ValueError(
            f"parallel.pipeline={config.pipeline} x parallel.virtual_pipeline={config.virtual_pipeline} = {stages} "
            f"does not divide num_hidden_layers={dims.num_layers}; use stages of equally many layers."
        )
