"""How the surviving weights of a level are adapted: the settings of a refit, with the values that they allow."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from lightning_roulette.checks import as_group, check_choice, check_count, check_number
from lightning_roulette.values import Codebook, values_of

REFITS = ("batch_norm", "least_squares")


@dataclass(frozen=True)
class Refit:
    """A refit that computes the running statistics of batch normalisations again for the pruned network.

    Use it for networks with batch normalisation when weights must keep their values. It needs calibration batches, but
    no labels and no gradients.

    Args:
        batches: Number of training batches for calibration. Fewer run if these have rows enough; see `Calibration`.
        each_level: When levels are refitted:

            - `True`: before each level is compared with the floor. Reaches higher sparsity.
            - `False`: after the search, accepted levels only. Faster.
        finalists: Number of the best candidates of each level that are refitted and ranked again.
        cache_bytes: Memory for what the calibration keeps between layers: batches that wait while a layer is refitted,
            and outputs of the dense network. If it is too small, some batches run anew for some layers, which takes
            longer. The log says how often, and how much memory would suffice. See `Calibration`.

    Raises:
        TypeError: If a value has the wrong type.
        ValueError: If a value is not allowed.
    """

    batches: int = 100
    each_level: bool = True
    finalists: int = 1
    cache_bytes: int = field(default=2**31, kw_only=True)

    def __post_init__(self) -> None:
        check_count("batches", self.batches)
        if not isinstance(self.each_level, bool):
            raise TypeError(f"each_level is {self.each_level!r}, but must be True or False.")
        check_count("finalists", self.finalists)
        check_count("cache_bytes", self.cache_bytes, at_least=0)


@dataclass(frozen=True)
class LeastSquares(Refit):
    """A refit of the remaining weights: each layer's outputs come as close as possible to the dense network's.

    The remaining weights and the bias of each layer are solved by least squares on its inputs. Running statistics are
    also computed again. Use it to reach a high sparsity without training. It needs calibration batches, but no labels,
    and no gradients without `distill`. It refits Linear, Conv1d to Conv3d and their transposed forms,
    MultiheadAttention, LSTM, GRU and RNN.

    Args:
        batches: Number of training batches for calibration. Fewer run if these have rows enough; see `Calibration`.
        each_level: When levels are refitted:

            - `True`: before each level is compared with the floor. Reaches higher sparsity.
            - `False`: after the search, accepted levels only. Faster.
        finalists: Number of the best candidates of each level that are refitted and ranked again.
        cache_bytes: Memory for what the calibration keeps between layers: batches that wait while a layer is refitted,
            and outputs of the dense network. If it is too small, some batches run anew for some layers, which takes
            longer. The log says how often, and how much memory would suffice. See `Calibration`.
        damping: How strongly weights are pulled towards their dense values, in units of the mean square of a layer's
            inputs. Larger values are safer with few calibration batches.
        choose: Which weights of a layer stay:

            - `True`: as many of each output as the wheel drew, chosen on the layer's inputs so that the output comes
              closest. Units stay whole: of each group of coupled neurons or heads, and of each row of blocks, as many
              as the wheel drew are chosen. Levels may then bring back what an earlier level pruned. Between epochs
              they do not.
            - `False`: those that the wheel drew.
        values: How the weights will be stored. They are rounded to these values before a level is compared with the
            floor, so that what is confirmed is the network in the file:

            - `"float32"`: as they are. Nothing is rounded.
            - `"float16"`: half precision.
            - `"int8"`: whole numbers times a scale of each output. For small files, and for devices that compute in
              int8.
            - A `Codebook`: few values for each layer. For the smallest files.

            `"int8"` and a `Codebook` are chosen on the layer's inputs: when a weight is rounded, the rest of its output
            is solved again. See `values_of`. They need `each_level=True`.
        distill: Number of gradient steps after the layers are solved. They bring the outputs of the network closer to
            those of the dense network, also through its biases and batch normalisations. Use them at sparsities where
            least squares alone loses accuracy. They need gradients, but no labels. Each is as slow as a training step
            on 64 samples. Weights that are zero stay zero. 0: no steps.

    Raises:
        TypeError: If a value has the wrong type.
        ValueError: If a value is not allowed.
    """

    damping: float = 1e-3
    choose: bool = False
    values: str | Codebook = field(default="float32", kw_only=True)
    distill: int = field(default=0, kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count("distill", self.distill, at_least=0)
        object.__setattr__(self, "values", values_of(self.values))  # YAML gives a mapping
        check_number("damping", self.damping, at_least=0)
        if not isinstance(self.choose, bool):
            raise TypeError(f"choose is {self.choose!r}, but must be True or False.")
        if self.values != "float32" and not self.each_level:
            raise ValueError(
                f"each_level is False and values {self.values!r}, but a level must be rounded before it is compared "
                "with the floor. Pass each_level=True."
            )
        if self.values != "float32" and self.distill:
            raise ValueError(
                f"distill is {self.distill} and values {self.values!r}, but gradient steps move rounded weights. Pass "
                "distill=0, or values='float32'."
            )


def refit_of(refit: str | Refit | Mapping[str, Any] | None) -> Refit | None:
    """Return the settings of a refit; None without a refit.

    Args:
        refit: One of

            - `None`: no refit.
            - `"batch_norm"`: the default `Refit`.
            - `"least_squares"`: the default `LeastSquares`.
            - A `Refit` or `LeastSquares`, which is returned.
            - A mapping from fields of `LeastSquares` to their values.

    Raises:
        TypeError: If `refit` is none of these types.
        ValueError: If `refit` is another word.
    """
    if refit is None or isinstance(refit, Refit):
        return refit
    if isinstance(refit, Mapping):
        return as_group("refit", refit, LeastSquares)
    if not isinstance(refit, str):
        raise TypeError(f"refit is {refit!r}, but must be None, one of {', '.join(REFITS)}, or a LeastSquares(...).")
    check_choice("refit", refit, REFITS, remedy="Or pass a LeastSquares(...), or None.")
    return LeastSquares() if refit == "least_squares" else Refit()
