"""Lets unmodified megatron-core run on CPUs with gloo; does nothing where CUDA is present.

megatron-core names a CUDA device in a few dozen places although hardly any of its training path calls a CUDA
kernel. `retarget_megatron` points those at the CPU. Nothing of Megatron is reimplemented here: schedules,
parallel layers, DDP, optimizers and dist_checkpointing run as shipped. Each retargeting names the megatron lines
that need it (numbers: megatron-core 0.16.1) and fails if they no longer look as expected.
"""

import importlib
import inspect
import logging
import types
from collections.abc import Callable
from typing import Any

import torch

# Modules whose functions spell the device as a string: every one must still contain such a string.
_MODULES_NAMING_CUDA = (
    "pipeline_parallel.schedules",  # 596, 983, 2138: token counters
    "optimizer.clip_grads",  # 90 to 207: norms and clip coefficients
    "optimizer.optimizer",  # 473 to 907: found_inf and tensor types
    "optimizer.distrib_optimizer",  # 361, 420, 582: tensor types
    "distributed.param_and_grad_buffer",  # 768: gradient buffers
    "utils",  # 1207: the local norm of gradients
    "dist_checkpointing.strategies.state_dict_saver",  # 204: plan reduction
    "dist_checkpointing.exchange_utils",  # 104, 110, 326: fully parallel loading
)
_CPU_NAMES = {
    "cuda": "cpu",
    "torch.cuda.FloatTensor": "torch.FloatTensor",
    "torch.cuda.HalfTensor": "torch.HalfTensor",
    "torch.cuda.BFloat16Tensor": "torch.BFloat16Tensor",
}
_retargeted = False


def device() -> torch.device:
    """The device of this rank."""
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


def retarget_megatron() -> None:
    """Point megatron-core at the CPU, once; to be called before the first import of megatron.

    Raises:
        RuntimeError: if the installed megatron-core no longer has the lines a retargeting is for.
    """
    global _retargeted
    if _retargeted or torch.cuda.is_available():
        return
    _import_without_compiling()
    _replace_cuda_calls()
    _replace_rng_state()
    for name in _MODULES_NAMING_CUDA:
        if not _retarget_module(importlib.import_module(f"megatron.core.{name}")):
            raise _mismatch(name, "names 'cuda'")
    _give_torch_adam_a_step()
    _step_without_dynamo()
    _keep_routing_on_the_host()
    _retargeted = True


def _mismatch(module: str, expected: str) -> RuntimeError:
    import megatron.core

    return RuntimeError(
        f"megatron.core.{module} of megatron-core {megatron.core.__version__} no longer {expected}: "
        "CPU training with this version needs megavar/training/megatron_on_cpu.py adapted; 0.16.1 is known to work."
    )


def _import_without_compiling() -> None:
    """jit.py:26 binds torch.compile as `jit_fuser`: seconds of C++ compiling in each CPU process."""
    compile_ = torch.compile
    torch.compile = lambda model=None, **_: model or (lambda function: function)  # type: ignore[assignment]
    try:
        importlib.import_module("megatron.core.jit")
        importlib.import_module("megatron.core.tensor_parallel.random")
    finally:
        torch.compile = compile_


def _step_without_dynamo() -> None:
    """torch/optim/optimizer.py imports torch._dynamo to keep torch.compile out of an optimizer's methods: two seconds
    of imports in each process, which never compiles.
    """
    for name in ("add_param_group", "state_dict", "load_state_dict", "zero_grad"):
        function: Any = inspect.unwrap(getattr(torch.optim.Optimizer, name))
        function.__dynamo_disable = function  # where torch/_compile.py looks for it
    adam: Any = torch.optim.Adam  # AdamW's step too
    adam.step = torch.no_grad()(inspect.unwrap(adam.step))


def _replace_cuda_calls() -> None:
    # device=torch.cuda.current_device() in about 60 places, such as mappings.py:91 and layers.py:552.
    torch.cuda.current_device = lambda: torch.device("cpu")  # type: ignore[assignment, return-value]
    # p2p_communication.py:242, timers.py:152, filesystem_async.py:230 synchronize; 0.19 asks for the stream.
    torch.cuda.synchronize = lambda device=None: None
    torch.cuda.current_stream = lambda device=None: None  # type: ignore[assignment, return-value]
    # language_module.py:244 (tied embeddings under PP), data.py:84, optimizer.py:375.
    torch.Tensor.cuda = lambda self, *_, **__: self  # type: ignore[method-assign]


def _replace_rng_state() -> None:
    """random.py:41, 72, 235 keep the state of "the CUDA generator": here the CPU's own."""
    torch.cuda.get_rng_state = lambda device=None: torch.get_rng_state()
    torch.cuda.set_rng_state = lambda state, device=None: torch.set_rng_state(state)  # type: ignore[assignment]
    torch.cuda.manual_seed = torch.manual_seed  # type: ignore[assignment]
    random = importlib.import_module("megatron.core.tensor_parallel.random")
    for name in ("_get_cuda_rng_state", "_set_cuda_rng_state"):
        if not hasattr(random, name):
            raise _mismatch("tensor_parallel.random", f"has {name}")
    setattr(random, "_get_cuda_rng_state", lambda *_, **__: torch.get_rng_state())  # noqa: B010
    setattr(random, "_set_cuda_rng_state", lambda state, *_, **__: torch.set_rng_state(state))  # noqa: B010
    # random.py:264 warns that a fork moved the CPU state, which is now its purpose.
    logging.getLogger(random.__name__).addFilter(lambda record: "CPU RNG state changed" not in record.getMessage())


def _retarget_module(module: types.ModuleType) -> int:
    """Swap device strings in all functions a module owns; returns how many were swapped."""
    count = 0
    for value in list(vars(module).values()):
        if getattr(value, "__module__", None) != module.__name__:
            continue
        members = list(vars(value).values()) if inspect.isclass(value) else [value]
        for member in members:
            function = getattr(member, "__func__", getattr(member, "fget", member))
            function = inspect.unwrap(function) if callable(function) else function
            if isinstance(function, types.FunctionType):
                function.__code__, swapped = _retarget_code(function.__code__)
                count += swapped
    return count


def _retarget_code(code: types.CodeType) -> tuple[types.CodeType, int]:
    count = 0

    def swap(constant: Any) -> Any:
        nonlocal count
        if isinstance(constant, str) and constant in _CPU_NAMES:
            count += 1
            return _CPU_NAMES[constant]
        if isinstance(constant, tuple):
            return tuple(swap(item) for item in constant)
        if isinstance(constant, types.CodeType):
            inner, swapped = _retarget_code(constant)
            count += swapped
            return inner
        return constant

    return code.replace(co_consts=tuple(swap(constant) for constant in code.co_consts)), count


def _keep_routing_on_the_host() -> None:
    """token_dispatcher.py:445 makes a CUDA stream, by which :862 copies the routing to the host, where it is already;
    what remains is that it makes the splits arrays.
    """
    # moe_utils.py:1192 asks for a name that :39 binds with Transformer Engine only.
    vars(importlib.import_module("megatron.core.transformer.moe.moe_utils")).setdefault("te_general_gemm", None)
    module = importlib.import_module("megatron.core.transformer.moe.token_dispatcher")
    dispatcher = module.MoEAlltoAllTokenDispatcher
    for name in ("cuda_dtoh_stream", "_maybe_dtoh_and_synchronize"):
        if not hasattr(dispatcher, name):
            raise _mismatch("transformer.moe.token_dispatcher", f"has MoEAlltoAllTokenDispatcher.{name}")

    def take_splits(self: Any, point: str, tokens_per_expert: torch.Tensor | None = None) -> torch.Tensor | None:
        if point == self.cuda_dtoh_point:
            for name in ("input_splits", "output_splits", "output_splits_tp"):
                if isinstance(splits := getattr(self, name), torch.Tensor):
                    setattr(self, name, splits.numpy())
        return tokens_per_expert

    dispatcher.cuda_dtoh_stream = object()
    dispatcher._maybe_dtoh_and_synchronize = take_splits


def _give_torch_adam_a_step() -> None:
    """Make checkpoints of DistributedOptimizer right with torch's AdamW, which stands in for TE's.

    distrib_optimizer.py:641 expects "step" before the first one was made; :825 lets all parameters share one
    "step" tensor, which from then on advances once for every parameter; :940 wants a "step" that loading dropped.
    """
    module = importlib.import_module("megatron.core.optimizer.distrib_optimizer")
    optimizer_class = module.DistributedOptimizer
    for name in ("state_dict", "load_state_dict", "_set_main_param_and_optimizer_states"):
        if not hasattr(optimizer_class, name):
            raise _mismatch("optimizer.distrib_optimizer", f"has DistributedOptimizer.{name}")
    get_state, set_state = optimizer_class.state_dict, optimizer_class.load_state_dict
    set_tensors: Callable[..., None] = optimizer_class._set_main_param_and_optimizer_states

    def state_dict(self: Any) -> Any:
        for group in self.optimizer.param_groups:
            for param in group["params"]:
                if not self.optimizer.state[param]:
                    zeros = {key: torch.zeros_like(param) for key in ("exp_avg", "exp_avg_sq")}
                    self.optimizer.state[param] = {"step": torch.zeros(()), **zeros}
        return get_state(self)

    def load_state_dict(self: Any, *args: Any, **kwargs: Any) -> None:
        set_state(self, *args, **kwargs)
        for state in self.optimizer.state.values():
            state["step"] = state["step"].clone()

    def set_main_param_and_optimizer_states(self: Any, model_param: Any, tensors: dict[str, Any]) -> None:
        group, order = self.model_param_group_index_map[model_param]
        param = self.optimizer.param_groups[group]["params"][order]
        with torch.no_grad():
            set_tensors(self, model_param, {**tensors, "step": self.optimizer.state[param]["step"]})

    optimizer_class.state_dict = state_dict
    optimizer_class.load_state_dict = load_state_dict
    optimizer_class._set_main_param_and_optimizer_states = set_main_param_and_optimizer_states
