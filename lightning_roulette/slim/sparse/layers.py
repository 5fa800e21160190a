"""Linear layers and convolutions whose weights are sparse tensors in CSR format. For inference only."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, unfold

Way = Literal["columns", "rows"]
"""How a sparse matrix is multiplied: with inputs as the columns of a matrix, or as its rows."""


class Sparse(nn.Module):
    """A layer with a sparse weight. Its state dict has the dense weight, under the name that it had before.

    Args:
        layer: The layer with a dense weight.
        way: How the weight is multiplied.
    """

    rows: Tensor
    columns: Tensor
    values: Tensor
    _csr: Tensor | None

    def __init__(self, layer: nn.Linear | nn.Conv2d, way: Way) -> None:
        super().__init__()
        self.bias, self.way, self.training = layer.bias, way, layer.training
        self.shape, self.trained = layer.weight.shape, layer.weight.requires_grad
        for name in ("rows", "columns", "values"):
            self.register_buffer(name, None, persistent=False)
        self._store(layer.weight)

    @property
    def csr(self) -> Tensor:
        """The weight as a sparse matrix of shape `(outputs, inputs)`, which shares the memory of the buffers."""
        if self._csr is None:
            size = (self.shape[0], self.shape[1:].numel())
            with _quietly():
                self._csr = torch.sparse_csr_tensor(self.rows, self.columns, self.values, size)
        return self._csr

    @property
    def weight(self) -> Tensor:
        """The dense weight, computed anew."""
        return self.csr.to_dense().view(self.shape)

    def dense(self) -> nn.Linear | nn.Conv2d:
        """Return the layer with a dense weight, without copying the bias."""
        raise NotImplementedError

    def _product(self, rows: Tensor) -> Tensor:
        """Return `rows @ weight.T`, plus the bias. `rows` has shape `(n, inputs)`."""
        if self.way == "rows":
            return linear(rows, self.csr, self.bias)
        found = (self.csr @ rows.t()).t()
        return (found if self.bias is None else found + self.bias).contiguous()

    def _given_back(self, layer: nn.Linear | nn.Conv2d) -> nn.Linear | nn.Conv2d:
        layer.weight = nn.Parameter(self.weight, requires_grad=self.trained)
        layer.bias = self.bias
        return layer.train(self.training)

    def _store(self, weight: Tensor) -> None:
        with _quietly():
            csr = weight.detach().flatten(1).to_sparse_csr()
        self.rows, self.columns, self.values = csr.crow_indices(), csr.col_indices(), csr.values()
        self._csr = None

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        self._csr = None
        return super()._apply(fn, recurse)  # type: ignore[no-untyped-call]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_csr": None}  # torch cannot copy a sparse matrix

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        destination[f"{prefix}weight"] = self.weight
        super()._save_to_state_dict(destination, prefix, keep_vars)

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, metadata: Any, strict: bool, missing: list[str], *rest: Any
    ) -> None:
        rest_of = {name: value for name, value in state_dict.items() if name != f"{prefix}weight"}
        super()._load_from_state_dict(rest_of, prefix, metadata, strict, missing, *rest)
        if f"{prefix}weight" not in state_dict:
            missing.append(f"{prefix}weight")
        elif state_dict[f"{prefix}weight"].shape != self.shape:
            found = tuple(state_dict[f"{prefix}weight"].shape)
            rest[1].append(f"size mismatch for {prefix}weight: {found} in the file, {tuple(self.shape)} in the layer.")
        else:
            self._store(state_dict[f"{prefix}weight"].to(self.values))


class SparseLinear(Sparse):
    """`torch.nn.Linear` with a sparse weight."""

    def forward(self, x: Tensor) -> Tensor:
        """Return `x @ weight.T + bias`. `x` has shape `(..., inputs)`."""
        return self._product(x.reshape(-1, self.shape[1])).view(*x.shape[:-1], self.shape[0])

    def dense(self) -> nn.Linear | nn.Conv2d:
        """See `Sparse`."""
        outputs, inputs = self.shape
        return self._given_back(nn.Linear(inputs, outputs, bias=False, device="meta"))


class SparseConv2d(Sparse):
    """`torch.nn.Conv2d` with one group, zero padding, and a sparse weight.

    Its windows are multiplied as columns of a matrix. A 1 x 1 convolution has no windows to gather.
    """

    def __init__(self, layer: nn.Conv2d, way: Way) -> None:
        super().__init__(layer, way)
        self.stride, self.dilation = layer.stride, layer.dilation
        self.padding = padding_of(layer)

    def forward(self, x: Tensor) -> Tensor:
        """Return the convolution of images, shape `(n, channels, height, width)` or without `n`."""
        images = x if x.dim() == 4 else x.unsqueeze(0)
        windows, size = self._windows(images)
        inputs = windows.shape[1]
        found = self._product(windows.transpose(0, 1).reshape(inputs, -1).t())
        found = found.view(len(images), *size, self.shape[0]).permute(0, 3, 1, 2).contiguous()
        return found if x.dim() == 4 else found[0]

    def dense(self) -> nn.Linear | nn.Conv2d:
        """See `Sparse`."""
        outputs, inputs, *kernel = self.shape
        same: dict[str, Any] = {"stride": self.stride, "padding": self.padding, "dilation": self.dilation}
        layer = nn.Conv2d(inputs, outputs, (kernel[0], kernel[1]), **same, bias=False, device="meta")
        return self._given_back(layer)

    def _windows(self, images: Tensor) -> tuple[Tensor, list[int]]:
        """Return the windows, shape `(n, inputs of a window, windows)`, and their number in each direction."""
        kernel = self.shape[2:]
        size = [
            (length + 2 * pad - dilation * (reach - 1) - 1) // stride + 1
            for length, pad, dilation, reach, stride in zip(
                images.shape[2:], self.padding, self.dilation, kernel, self.stride, strict=True
            )
        ]
        if tuple(kernel) == (1, 1) and not any(self.padding):
            down, right = self.stride
            return images[:, :, ::down, ::right].flatten(2), size
        return unfold(images, tuple(kernel), self.dilation, self.padding, self.stride), size


def sparse_layer(layer: nn.Linear | nn.Conv2d, way: Way) -> Sparse:
    """Return a layer with a sparse weight, without copying the bias."""
    return SparseLinear(layer, way) if isinstance(layer, nn.Linear) else SparseConv2d(layer, way)


@contextmanager
def _quietly() -> Iterator[None]:
    """Leave out torch's warning that its sparse tensors may change."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*Sparse (CSR|invariant).*", category=UserWarning)
        yield


def padding_of(layer: nn.Conv2d) -> tuple[int, int]:
    """Return the zeros on each side of an image. Both sides of a direction have the same number."""
    if layer.padding == "valid":
        return (0, 0)
    if layer.padding == "same":
        reach = [dilation * (size - 1) // 2 for dilation, size in zip(layer.dilation, layer.kernel_size, strict=True)]
        return (reach[0], reach[1])
    return (int(layer.padding[0]), int(layer.padding[1]))
