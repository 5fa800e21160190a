"""What a thread does not take over from the thread that starts it, and what threads share."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch
from torch import nn

_AUTOCAST = ("cpu", "cuda", "mps", "xpu", "hpu")  # devices


@dataclass(frozen=True)
class ThreadModes:
    """The modes of a thread. A new thread has the defaults of torch instead.

    Attributes:
        gradients: Whether gradients are recorded.
        inference: Whether it is in inference mode.
        autocast: Devices with autocast, each with its dtype.
        caches: Whether autocast caches the weights that it casts.
        device: Default device of new tensors; None if it is the CPU.
        stream: CUDA stream, which also names the current device; None if CUDA is not in use.
    """

    gradients: bool
    inference: bool
    autocast: tuple[tuple[str, torch.dtype], ...]
    caches: bool
    device: torch.device | None
    stream: torch.cuda.Stream | None

    @staticmethod
    def current() -> ThreadModes:
        """Return the modes of this thread."""
        device = torch.get_default_device()
        return ThreadModes(
            torch.is_grad_enabled(),
            torch.is_inference_mode_enabled(),
            tuple((one, torch.get_autocast_dtype(one)) for one in _AUTOCAST if torch.is_autocast_enabled(one)),
            torch.is_autocast_cache_enabled(),
            None if device.type == "cpu" else device,
            torch.cuda.current_stream() if torch.cuda.is_initialized() else None,
        )

    @contextmanager
    def entered(self) -> Iterator[None]:
        """Give this thread the modes inside the block."""
        torch.get_num_threads()  # torch.set_num_threads reaches a new thread only when it is asked for
        with ExitStack() as stack:
            stack.enter_context(torch.inference_mode(self.inference))
            stack.enter_context(torch.set_grad_enabled(self.gradients))
            for device, dtype in self.autocast:
                stack.enter_context(torch.autocast(device, dtype=dtype, cache_enabled=self.caches))
            if self.device is not None:
                stack.enter_context(self.device)
            if self.stream is not None:
                stack.enter_context(torch.cuda.stream(self.stream))
            yield


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Put a network into evaluation mode inside the block. Afterwards each of its modules is in its own mode again."""
    before = {part: part.training for part in module.modules()}
    module.eval()
    try:
        yield
    finally:
        for part, training in before.items():
            part.training = training


@contextmanager
def switches_put_back(module: nn.Module) -> Iterator[None]:
    """Put back, after the block, switches that a forward may set and put back itself.

    If several forwards do so by turns, one puts back what another has set. The switches are the training modes of
    modules, the default dtype, the kernels of attention, and the filters of warnings.
    """
    modes = {part: part.training for part in module.modules()}
    dtype, filters, kernels = torch.get_default_dtype(), warnings.filters, _attention_kernels()
    try:
        yield
    finally:
        for part, training in modes.items():
            part.training = training
        torch.set_default_dtype(dtype)
        for name, enabled in kernels.items():
            getattr(torch.backends.cuda, f"enable_{name}")(enabled)
        if warnings.filters is not filters:
            warnings.filters = filters
            with warnings.catch_warnings():  # its end makes the change known
                pass


def _attention_kernels() -> dict[str, bool]:
    names = ("flash_sdp", "mem_efficient_sdp", "math_sdp", "cudnn_sdp")
    return {
        one: getattr(torch.backends.cuda, f"{one}_enabled")()
        for one in names
        if hasattr(torch.backends.cuda, one + "_enabled")
    }
