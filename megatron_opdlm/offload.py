"""What one phase of a step does not need waits in host memory: the optimizer's state while the
student generates and the teacher answers, the teacher's layers while it is not asked.

On a CPU there is one memory and nothing moves. Not run on a GPU yet.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from megatron.core.optimizer import MegatronOptimizer

from megatron_opdlm.errors import InputError
from megatron_opdlm.hardware import Hardware
from megatron_opdlm.model.gpt import LanguageModel

HOST = torch.device("cpu")


def check_optimizer_offload(dtype: torch.dtype, hardware: Hardware) -> None:
    """InputError where the master weights are the model's own: moving them would part the two."""
    if hardware.device != HOST and dtype is torch.float32:
        raise InputError(
            "optimizer.cpu_offload=true moves the optimizer's float32 weights, which with "
            "model.dtype=fp32 are the model's own; use model.dtype=bf16, or "
            "optimizer.cpu_offload=false"
        )


@contextmanager
def optimizer_away(optimizer: MegatronOptimizer, *, on: bool) -> Iterator[None]:
    """Master weights and moments wait in host memory during the body."""
    if not on:
        yield
        return
    optimizer.offload_to_cpu()
    try:
        yield
    finally:
        optimizer.restore_from_cpu()


def move_layers(model: LanguageModel, device: torch.device) -> None:
    """Move the weights of the transformer layers, in place of their tensors; embedding, final norm
    and output layer stay: the divergence projects the targets with them.
    """
    for parameter in model.decoder.layers.parameters():
        parameter.data = parameter.data.to(device)


@contextmanager
def layers_here(model: LanguageModel, device: torch.device, *, on: bool) -> Iterator[None]:
    """The layers, in host memory otherwise, are on the device during the body."""
    if not on:
        yield
        return
    move_layers(model, device)
    try:
        yield
    finally:
        move_layers(model, HOST)
