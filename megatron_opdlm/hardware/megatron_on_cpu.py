"""The compatibility file: lets unmodified megatron-core 0.16 run on CPU with gloo. A no-op where
CUDA is available.

Megatron names CUDA in a few places on our path (``torch.cuda.current_device``, ``device="cuda"``,
tensor type strings). Instead of patching torch itself, every ``megatron.core`` module gets a
private view of the torch namespace in which these names mean the CPU. Real torch stays untouched:
``torch.cuda.is_available()`` stays honest and other libraries notice nothing.

Megatron's optimizer takes the code path of production runs here, too (``group_adam.py``).
"""

import functools
import importlib
import sys
import types
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.nn import functional

from megatron_opdlm.hardware import buffer_exchange
from megatron_opdlm.hardware.elementwise import swiglu
from megatron_opdlm.hardware.group_adam import replace_in, use_in_megatron

# Modules that megatron-core imports lazily on our path; a module must be imported before it can get
# its view.
_MODULES = (
    "megatron.core.parallel_state",
    "megatron.core.tensor_parallel",
    "megatron.core.transformer.moe.token_dispatcher",
    "megatron.core.models.gpt",
    "megatron.core.models.gpt.gpt_layer_specs",
    "megatron.core.distributed",
    "megatron.core.optimizer",
    "megatron.core.pipeline_parallel",
    "megatron.core.dist_checkpointing",
    "megatron.core.dist_checkpointing.strategies.torch",
    "megatron.core.dist_checkpointing.strategies.filesystem_async",
    "megatron.core.dist_checkpointing.strategies.state_dict_saver",
    "megatron.core.dist_checkpointing.strategies.common",
    "megatron.core.dist_checkpointing.strategies.fully_parallel",
    "megatron.core.dist_checkpointing.exchange_utils",
    "megatron.core.inference.contexts",
    "megatron.core.rerun_state_machine",
)
_FACTORIES = (
    "tensor",
    "zeros",
    "ones",
    "empty",
    "full",
    "arange",
    "empty_like",
    "zeros_like",
    "as_tensor",
)


def _on_cpu(factory: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """A tensor factory that reads every CUDA device as the CPU and drops pinned memory."""

    @functools.wraps(factory)
    def build(*args: Any, **kwargs: Any) -> torch.Tensor:
        if "cuda" in str(kwargs.get("device", "")):
            kwargs["device"] = "cpu"
        kwargs.pop("pin_memory", None)
        return factory(*args, **kwargs)

    return build


class _Stub:
    """Stands in for CUDA streams and events on paths that are not taken on CPU."""

    def __init__(self, *args: Any, **kwargs: Any) -> None: ...

    def __getattr__(self, name: str) -> Callable[..., "_Stub"]:
        return lambda *args, **kwargs: _Stub()  # a stream's record_event() is an event

    def __enter__(self) -> "_Stub":
        return self

    def __exit__(self, *args: object) -> None: ...


def _cuda_stand_in() -> types.ModuleType:
    cuda = types.ModuleType("torch.cuda (CPU stand-in for megatron.core)")
    cuda.__dict__.update({k: v for k, v in torch.cuda.__dict__.items() if not k.startswith("__")})
    cpu = torch.device("cpu")
    replacements = {
        "current_device": lambda: cpu,
        "device_count": lambda: 1,
        "set_device": lambda device: None,
        "synchronize": lambda *args, **kwargs: None,
        "empty_cache": lambda: None,
        "is_available": lambda: False,
        "manual_seed": torch.manual_seed,
        "get_rng_state": lambda *args: torch.get_rng_state(),
        "set_rng_state": lambda state, *args: torch.set_rng_state(state),
        "Stream": _Stub,
        "Event": _Stub,
        "current_stream": lambda *args: _Stub(),
        "default_stream": lambda *args: _Stub(),
        "stream": lambda *args: _Stub(),
        "memory_allocated": lambda *args: 0,
        "max_memory_allocated": lambda *args: 0,
    }
    cuda.__dict__.update(replacements)
    return cuda


@functools.cache
def _torch_view() -> types.ModuleType:
    view = types.ModuleType("torch")
    view.__dict__.update(torch.__dict__)
    for name in _FACTORIES:
        setattr(view, name, _on_cpu(getattr(torch, name)))
    vars(view)["cuda"] = _cuda_stand_in()
    return view


def _patch_tensor_methods() -> None:
    """``Tensor.cuda()`` returns the tensor; ``Tensor.type()`` says ``torch.cuda.…`` to Megatron
    alone, which tests for it.
    """
    original_type = torch.Tensor.type

    def cuda(self: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        return self

    def type_(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        result = original_type(self, *args, **kwargs)
        caller = sys._getframe(1).f_globals.get("__name__", "")
        if isinstance(result, str) and caller.startswith("megatron.core."):
            return result.replace("torch.", "torch.cuda.", 1)
        return result

    torch.Tensor.cuda = cuda
    torch.Tensor.type = type_


def _use_cpu_generator() -> None:
    replace_in(
        "megatron.core.tensor_parallel.random",
        _set_cuda_rng_state=lambda state, *args, **kwargs: torch.set_rng_state(state),
        _get_cuda_rng_state=lambda *args, **kwargs: torch.get_rng_state(),
    )


def _use_host_splits() -> None:
    """An all-to-all takes its splits as numbers of the host. Megatron's dispatcher of tokens to
    experts copies them there from a GPU only; without one they would stay tensors.
    """

    def on_host(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
        return tensor.numpy() if as_numpy and torch.is_tensor(tensor) else tensor

    replace_in("megatron.core.transformer.moe.token_dispatcher", maybe_move_tensor_to_cpu=on_host)


def _use_single_nodes() -> None:
    """A gated activation, and a product that no rank shares, are one node each of PyTorch's
    autograd: Megatron's own fused activation is written out for a compiler, and its product goes
    forward and back through Python.
    """
    module = "megatron.core.tensor_parallel.layers"
    name = "linear_with_grad_accumulation_and_async_allreduce"
    of_megatron = vars(importlib.import_module(module))[name]

    @functools.wraps(of_megatron)  # with what Megatron notes on it
    def product(input: torch.Tensor, weight: torch.Tensor, bias: Any, **options: Any) -> Any:
        shared = "gradient_accumulation_fusion", "allreduce_dgrad", "sequence_parallel"
        if any(options[name] for name in shared) or options.get("grad_output_buffer") is not None:
            return of_megatron(input, weight, bias, **options)
        made = functional.linear(input, weight)
        return made if bias is None else made + bias

    replace_in(module, **{name: product})

    def activation(x: torch.Tensor, bias: torch.Tensor | None, *args: Any) -> torch.Tensor:
        return swiglu(x if bias is None else x + bias)

    replace_in("megatron.core.transformer.mlp", bias_swiglu_impl=activation)


def _pass_when_alone() -> None:
    """A rank alone in its tensor group exchanges nothing, forwards and backwards, and needs no node
    for that. The view is what Megatron's node returns: its strides decide by which kernel PyTorch
    multiplies.
    """
    module = "megatron.core.tensor_parallel.layers"

    def unless_alone(exchange: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        @functools.wraps(exchange)
        def wrapped(input_: torch.Tensor, group: Any = None) -> torch.Tensor:
            if group is not None and group.size() == 1:
                return input_.view_as(input_)
            return exchange(input_, group)

        return wrapped

    region = "tensor_model_parallel_region"
    names = (f"copy_to_{region}", f"reduce_from_{region}")
    of_megatron = vars(importlib.import_module(module))
    replace_in(module, **{name: unless_alone(of_megatron[name]) for name in names})


def _pad_uneven_exchanges() -> None:
    """Ranks that share tensors and experts exchange unequal numbers of tokens, which gloo refuses:
    every rank's share is padded to the largest.
    """
    module = "megatron.core.tensor_parallel.mappings"
    of_megatron = importlib.import_module(module)
    gather_even = of_megatron._gather_along_first_dim
    reduce_even = of_megatron._reduce_scatter_along_first_dim

    def padded(part: torch.Tensor, rows: int) -> torch.Tensor:
        return torch.cat((part, part.new_zeros(rows - len(part), *part.shape[1:])))

    def gather(
        input_: torch.Tensor, group: Any, output_split_sizes: Any = None, *args: Any, **kwargs: Any
    ) -> torch.Tensor:
        if output_split_sizes is None:
            return gather_even(input_, group, None, *args, **kwargs)
        sizes = [int(size) for size in output_split_sizes]
        gathered = gather_even(padded(input_, max(sizes)), group).split(max(sizes))
        return torch.cat([part[:size] for part, size in zip(gathered, sizes, strict=False)])

    def reduce_scatter(
        input_: torch.Tensor, group: Any, input_split_sizes: Any = None, *args: Any, **kwargs: Any
    ) -> torch.Tensor:
        if input_split_sizes is None:
            return reduce_even(input_, group, None, *args, **kwargs)
        sizes = [int(size) for size in input_split_sizes]
        parts = [padded(part, max(sizes)) for part in input_.split(sizes)]
        return reduce_even(torch.cat(parts), group)[: sizes[group.rank()]]

    replace_in(
        module, _gather_along_first_dim=gather, _reduce_scatter_along_first_dim=reduce_scatter
    )


def _use_sparse_embedding_gradients() -> None:
    """The embedding's gradient is that of the tokens that were there, not a matrix of the whole
    vocabulary with zeros for all others; the wrapper adds it to its sums just the same.
    """
    view = types.ModuleType("torch.nn.functional")
    view.__dict__.update(torch.nn.functional.__dict__)
    vars(view)["embedding"] = functools.partial(torch.nn.functional.embedding, sparse=True)
    replace_in("megatron.core.tensor_parallel.layers", F=view)


def _quiet_expected_warnings() -> None:
    """Megatron warns of what a CPU run is: no Transformer Engine, no Apex, gradients read from
    views.
    """
    for message in (
        "Transformer Engine and Apex are not installed",
        "Apex is not installed",
        "full scope is deprecated",
        r"The \.grad attribute of a Tensor that is not a leaf Tensor",
        r"`torch\.distributed\.\w+` is deprecated",
    ):
        warnings.filterwarnings("ignore", message=message)


@contextmanager
def _lean_imports() -> Iterator[None]:
    """Without what Megatron loads for no CPU run, which would be half of every start: the compiler
    for its small functions (``torch.compile`` loads it when it decorates) and W&B for its server.
    """
    compile_, unknown = torch.compile, "wandb" not in sys.modules
    torch.compile = lambda function=None, **_: function or (lambda decorated: decorated)
    if unknown:
        sys.modules["wandb"] = None  # pyright: ignore[reportArgumentType] -- as if not installed
    try:
        yield
    finally:
        torch.compile = compile_
        if unknown:
            del sys.modules["wandb"]


_installed = False


def install() -> None:
    """Import Megatron's modules of our path and, where there is no CUDA, adapt them to the CPU.
    Idempotent.
    """
    global _installed
    if torch.cuda.is_available():
        return
    _quiet_expected_warnings()
    with _lean_imports():
        for name in _MODULES:
            importlib.import_module(name)
    for name, module in list(sys.modules.items()):
        if (
            name.startswith(("megatron.core", "modelopt.torch"))
            and module.__dict__.get("torch") is torch
        ):
            module.__dict__["torch"] = _torch_view()
    if not _installed:
        _patch_tensor_methods()
        use_in_megatron()
        _use_cpu_generator()
        _use_host_splits()
        _use_single_nodes()
        _pass_when_alone()
        _pad_uneven_exchanges()
        buffer_exchange.use_in_megatron()
        _use_sparse_embedding_gradients()
        _installed = True
