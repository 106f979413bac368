"""The Megatron model of a Hugging Face model's sizes, whose output is log-probs of chosen tokens."""

from dataclasses import dataclass
from importlib.util import find_spec
from shutil import which
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_layer_local_spec,
    get_gpt_layer_with_transformer_engine_spec,
)
from megatron.core.tensor_parallel import copy_to_tensor_model_parallel_region, gather_from_sequence_parallel_region
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.module import Float16Module
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from torch import Tensor

from megavar.config.schema import ParallelConfig, PrecisionConfig
from megavar.models.dims import ModelDims
from megavar.training.attention import PackedAttention, RMSNorm
from megavar.training.logprobs import token_logps, weighted_loss
from megavar.training.megatron_on_cpu import device
from megavar.training.precision import has_transformer_engine, transformer_config_arguments
from megavar.training.rope import yarn_frequencies


@dataclass(frozen=True)
class Targets:
    """What the last pipeline stage is asked for: the log-prob of `ids[i]` following position `positions[i]`."""

    positions: Tensor
    ids: Tensor
    temperature: float


@dataclass(frozen=True)
class WeightedTargets(Targets):
    """As `Targets`, to be trained: the sum of `weights[i]` x -log-prob is asked for as well, and its gradients."""

    weights: Tensor


class LogProbModel(GPTModel):  # type: ignore[misc]
    """GPTModel whose `labels` are `Targets` and whose output on the last stage is their log-probs [S], float32.

    For `WeightedTargets` it is the loss, a float32 scalar with gradients, and the log-probs without.
    """

    vocab_rows: int
    """Real rows of the vocabulary; the rest is padding."""

    def __init__(self, *args: Any, **arguments: Any) -> None:
        super().__init__(*args, **arguments)
        if self.post_process:
            # A module of its own, before whose forward Megatron waits for weights that are still being gathered.
            self.output_layer.forward = _log_probs

    def _postprocess(self, hidden_states: Tensor, labels: Targets, **_: Any) -> Tensor | tuple[Tensor, Tensor]:
        if not self.post_process:
            return hidden_states
        table = self.shared_embedding_or_output_weight() if self.share_embeddings_and_output_weights else None
        if self.config.sequence_parallel:
            gathered = gather_from_sequence_parallel_region(hidden_states, tensor_parallel_output_grad=True)
            chosen = gathered.squeeze(1)[labels.positions]
        else:
            chosen = copy_to_tensor_model_parallel_region(hidden_states.squeeze(1)[labels.positions])
        table = self.output_layer.weight if table is None else table
        found: Tensor | tuple[Tensor, Tensor] = self.output_layer(chosen, table, labels, self.vocab_rows)
        return found


def _log_probs(chosen: Tensor, table: Tensor, labels: Targets, vocab_rows: int) -> Tensor | tuple[Tensor, Tensor]:
    group = parallel_state.get_tensor_model_parallel_group()
    if isinstance(labels, WeightedTargets):
        return weighted_loss(chosen, table, labels.ids, labels.weights, vocab_rows, labels.temperature, group)
    return token_logps(chosen, table, labels.ids, vocab_rows, labels.temperature, group)


def transformer_config(
    dims: ModelDims,
    parallel: ParallelConfig,
    precision: PrecisionConfig,
    recompute: str,
    fixed_tokens: int = 0,
    overlap_tensor_parallel: bool = False,
) -> TransformerConfig:
    """Megatron's configuration of a model of these sizes in this parallel layout; the rest is of `TrainConfig`."""
    recomputations: dict[str, dict[str, Any]] = {
        "none": {},
        "selective": {"recompute_granularity": "selective", "recompute_modules": ["core_attn"]},
        "full": {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1},
    }
    interleaved = parallel.virtual_pipeline > 1
    return TransformerConfig(
        num_layers=dims.num_layers,
        hidden_size=dims.hidden_size,
        num_attention_heads=dims.num_heads,
        num_query_groups=dims.num_query_groups,
        kv_channels=dims.head_dim,
        ffn_hidden_size=dims.ffn_size,
        normalization="RMSNorm",
        layernorm_epsilon=dims.norm_eps,
        gated_linear_unit=True,
        activation_func=torch.nn.functional.silu,
        add_bias_linear=False,
        add_qkv_bias=dims.qkv_bias,
        qk_layernorm=dims.qk_norm,
        # YaRN's factor on rotated queries and keys, as one on their products: fused rotations know no factor.
        softmax_scale=dims.yarn.attention_factor**2 / dims.head_dim**0.5 if dims.yarn else None,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        tensor_model_parallel_size=parallel.tensor,
        pipeline_model_parallel_size=parallel.pipeline,
        virtual_pipeline_model_parallel_size=parallel.virtual_pipeline if interleaved else None,
        context_parallel_size=parallel.context,
        sequence_parallel=parallel.sequence_parallel,
        expert_model_parallel_size=parallel.expert,
        expert_tensor_parallel_size=1,
        **_mixture(dims),
        # Packed microbatches differ in length: pipeline ranks tell each other, unless all are padded to one. Megatron
        # allows that with this dispatcher only (experts or not).
        variable_seq_lengths=not fixed_tokens,
        moe_token_dispatcher_type="alltoall",
        tp_comm_overlap=overlap_tensor_parallel,
        # Interleaving with batched point-to-point calls is silently wrong at two pipeline ranks.
        overlap_p2p_comm=interleaved,
        batch_p2p_comm=not interleaved,
        deallocate_pipeline_outputs=True,
        # Weights come from a checkpoint, which fills every parameter. Initialisation stays on, as it is also what
        # marks weights as split over tensor-parallel ranks (layers.py:127); unmarked, the gradient norm is wrong.
        init_method=_leave_uninitialised,
        output_layer_init_method=_leave_uninitialised,
        # The loss has its own constant normaliser: Megatron shall divide by nothing.
        calculate_per_token_loss=True,
        # Into the float32 gradients within the matrix product; layers.py:924 refuses it without Apex's kernel.
        gradient_accumulation_fusion=find_spec("fused_weight_gradient_mlp_cuda") is not None,
        bias_activation_fusion=_can_fuse_activation(),
        masked_softmax_fusion=False,
        apply_rope_fusion=has_transformer_engine(),
        **recomputations[recompute],
        **transformer_config_arguments(precision, dims.num_experts),
    )


def _can_fuse_activation() -> bool:
    """SwiGLU in one kernel each way, which torch makes with a C compiler as it is first used; on CPUs it has no use."""
    return has_transformer_engine() and any(map(which, ("cc", "gcc", "clang")))


def _mixture(dims: ModelDims) -> dict[str, Any]:
    """Routing as Qwen3 does it: no capacity, no auxiliary loss, probabilities in float32."""
    if not dims.num_experts:
        return {}
    return {
        "num_moe_experts": dims.num_experts,
        "moe_ffn_hidden_size": dims.ffn_size,
        "moe_router_topk": dims.experts_per_token,
        # Softmax over the chosen experts only is softmax over all of them, made to sum to one again.
        "moe_router_pre_softmax": not dims.normalise_routing,
        "moe_router_load_balancing_type": "none",
        "moe_router_dtype": "fp32",
        "moe_grouped_gemm": has_transformer_engine(),
    }


def _leave_uninitialised(weight: Tensor) -> Tensor:
    return weight


def build_model(config: TransformerConfig, dims: ModelDims) -> list[torch.nn.Module]:
    """This rank's model chunks, on its device, with uninitialised weights.

    Returns:
        One chunk, or `virtual_pipeline` chunks; wrapped for bf16 where asked.
    """
    stages = range(config.virtual_pipeline_model_parallel_size or 1)
    chunks: list[torch.nn.Module] = []
    for stage in stages:
        vp_stage = stage if len(stages) > 1 else None
        chunk = LogProbModel(
            config,
            _layer_spec(config, vp_stage),
            vocab_size=dims.padded_vocab_size(config.tensor_model_parallel_size),
            max_sequence_length=dims.max_positions,
            pre_process=parallel_state.is_pipeline_first_stage(ignore_virtual=vp_stage is None, vp_stage=vp_stage),
            post_process=parallel_state.is_pipeline_last_stage(ignore_virtual=vp_stage is None, vp_stage=vp_stage),
            position_embedding_type="rope",
            rotary_base=dims.rope_base,
            share_embeddings_and_output_weights=dims.tied_embeddings,
            vp_stage=vp_stage,
        ).to(device())
        chunk.vocab_rows = dims.vocab_size
        if config.tensor_model_parallel_size > 1:
            _mark_experts(chunk)
        if dims.yarn:
            frequencies = yarn_frequencies(dims.yarn, dims.rope_base, dims.head_dim)
            chunk.rotary_pos_emb.inv_freq = frequencies.to(device())
        chunks.append(Float16Module(config, chunk) if config.bf16 else chunk)
    return chunks


def _mark_experts(chunk: torch.nn.Module) -> None:
    """Make every tensor-parallel rank's experts count: they are other experts, or see other tokens.

    Before 0.19 Megatron sums their gradients over those ranks only with expert parallelism (layers.py:886), and counts
    them in the gradient norm as far as the layers mark them (NVIDIA/Megatron-LM pull request 5916).
    """
    for name, parameter in chunk.named_parameters():
        if ".experts." in name:
            parameter.allreduce = False  # type: ignore[attr-defined]
            parameter.tensor_model_parallel = True  # type: ignore[attr-defined]


def _layer_spec(config: TransformerConfig, vp_stage: int | None) -> Any:
    if has_transformer_engine():
        spec = get_gpt_layer_with_transformer_engine_spec(
            num_experts=config.num_moe_experts,
            moe_grouped_gemm=config.moe_grouped_gemm,
            qk_layernorm=config.qk_layernorm,
        )
        if config.params_dtype == torch.float32:
            # Its fused attention has 16 bits only (dot_product_attention/utils.py); what remains is quadratic in memory
            # and has no context parallelism.
            spec.submodules.self_attention.submodules.core_attention = PackedAttention
        return spec
    spec = get_gpt_layer_local_spec(
        num_experts=config.num_moe_experts, qk_layernorm=config.qk_layernorm, normalization="RMSNorm"
    )
    layer, attention = spec.submodules, spec.submodules.self_attention.submodules
    attention.core_attention = PackedAttention
    layer.input_layernorm = layer.pre_mlp_layernorm = RMSNorm
    if config.num_moe_experts:
        # Before experts the norm is not part of a linear layer, and Transformer Engine's layers save it apart.
        layer.sharded_state_dict_keys_map.pop("pre_mlp_layernorm.")
    if config.qk_layernorm:
        attention.q_layernorm = attention.k_layernorm = RMSNorm
    num_layers = get_num_layers_to_build(config, vp_stage)
    return TransformerBlockSubmodules(layer_specs=[spec] * num_layers, layer_norm=RMSNorm)
