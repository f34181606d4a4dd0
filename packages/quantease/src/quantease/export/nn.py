"""A linear layer that computes from packed codes and sparse outliers."""

import torch
from core_tensor import pack_bits, quantized_linear, unpack_bits
from core_tensor.checks import check_number, check_tensor
from torch import Tensor, nn

from quantease.problem.layer import QuantizedLayer, check_outliers

_STORAGE = (torch.float16, torch.bfloat16, torch.float32)


class QuantizedLinear(nn.Module):
    r"""$y = x \hat W^\top + b$ with $\hat W$ as packed codes, scales, zero points and outliers; for inference.

    Weights are never stored unpacked. The gradient with respect to x flows; the weights are constants.

    Args:
        in_features: p.
        out_features: q.
        bits: Bits per code, 1 to 8.
        group_size: Consecutive inputs that share a scale, a multiple of 8; -1 for one scale per row.
        outliers: Number of outliers.
        bias: Whether there is one.
        dtype: Of scales, outliers and bias.
        device: Where the tensors are.
    """

    words: Tensor
    scales: Tensor
    zeros: Tensor
    outlier_offsets: Tensor
    outlier_columns: Tensor
    outlier_values: Tensor

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bits: int,
        *,
        group_size: int = -1,
        outliers: int = 0,
        bias: bool = False,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        for name, value in (("in_features", in_features), ("out_features", out_features)):
            check_number(name, value, low=1, integer=True)
        check_number("bits", bits, low=1, high=8, integer=True)
        check_number("outliers", outliers, low=0, high=in_features * out_features, integer=True)
        check_number("group_size", group_size, low=-1, integer=True)
        if group_size != -1 and (group_size < 8 or group_size % 8):
            raise ValueError(f"group_size: expected -1 or a multiple of 8, got {group_size}")
        self.in_features, self.out_features, self.bits, self.group_size = in_features, out_features, bits, group_size
        groups = 1 if group_size == -1 else -(-in_features // group_size)

        def buffer(name: str, shape: tuple[int, ...], kind: torch.dtype) -> None:
            self.register_buffer(name, torch.zeros(shape, dtype=kind, device=device))

        buffer("words", (out_features, -(-in_features * bits // 32)), torch.int32)
        buffer("scales", (out_features, groups), dtype)
        buffer("zeros", (out_features, groups), torch.uint8)
        if outliers:
            buffer("outlier_offsets", (out_features + 1,), torch.int64)
            buffer("outlier_columns", (outliers,), torch.int32)
            buffer("outlier_values", (outliers,), dtype)
        self.outliers, self._checked = outliers, False
        self.register_load_state_dict_post_hook(lambda module, _: module.check_weights())  # type: ignore[no-untyped-call]
        self.bias = nn.Parameter(torch.zeros(out_features, dtype=dtype, device=device)) if bias else None

    @classmethod
    def from_layer(cls, layer: QuantizedLayer, bias: Tensor | None = None) -> "QuantizedLinear":
        """Pack a quantized layer.

        Args:
            layer: The layer; its groups must be consecutive inputs of equal number (but for the last).
            bias: Bias, shape (q,), or None.

        Returns:
            The module.

        Raises:
            ValueError: If the groups are something else.
        """
        features, groups = len(layer.group), layer.scales.shape[1]
        size = -1 if groups == 1 else int((layer.group == 0).sum())
        if groups > 1 and not torch.equal(layer.group, torch.arange(features, device=layer.group.device) // size):
            raise ValueError("layer: expected groups of consecutive inputs")
        outliers = layer.outliers
        module = cls(
            features,
            layer.codes.shape[0],
            layer.bits,
            group_size=size,
            outliers=0 if outliers is None else len(outliers.values),
            bias=bias is not None,
            dtype=layer.scales.dtype,
            device=layer.codes.device,
        )
        module.words.copy_(pack_bits(layer.codes, layer.bits))
        module.scales.copy_(layer.scales)
        module.zeros.copy_(layer.zeros)
        if outliers is not None and module.outliers:
            module.outlier_offsets.copy_(outliers.offsets)
            module.outlier_columns.copy_(outliers.columns)
            module.outlier_values.copy_(outliers.values)
        if bias is not None and module.bias is not None:
            module.bias.data.copy_(bias)
        module.check_weights()
        return module

    def check_weights(self, name: str = "QuantizedLinear") -> None:
        """Refuse stored tensors that point outside the layer; called whenever weights are loaded.

        Args:
            name: Name of the layer, for the message.

        Raises:
            ValueError: If scales are not finite, or an outlier is outside the matrix.
            TypeError: If a dtype does not fit.
        """
        if self.words.is_meta:
            return
        groups = 1 if self.group_size == -1 else -(-self.in_features // self.group_size)
        words = -(-self.in_features * self.bits // 32)
        try:
            check_tensor("words", self.words, shape=(self.out_features, words), dtype=torch.int32)
            check_tensor("scales", self.scales, shape=(self.out_features, groups), dtype=_STORAGE, finite=True)
            check_tensor("zeros", self.zeros, shape=(self.out_features, groups), dtype=torch.uint8)
            if self.outliers:
                stored = (self.outlier_offsets, self.outlier_columns, self.outlier_values)
                check_outliers(*stored, self.out_features, self.in_features)
        except (TypeError, ValueError) as error:
            raise type(error)(f"{name}: {error}") from error
        self._checked = True

    def forward(self, x: Tensor) -> Tensor:
        """Apply the layer.

        Args:
            x: Shape (..., p).

        Returns:
            Shape (..., q), in the dtype of x.
        """
        sparse = (self.outlier_offsets, self.outlier_columns, self.outlier_values) if self.outliers else None
        weights = (self.words, self.scales, self.zeros)
        y = quantized_linear(x, *weights, self.bits, self.group_size, sparse, check=not self._checked)
        return y if self.bias is None else y + self.bias

    def dequantize(self) -> Tensor:
        r"""The weights, unpacked.

        Returns:
            $\hat W$, shape (q, p), float32.
        """
        size = self.in_features if self.group_size == -1 else self.group_size
        group = torch.arange(self.in_features, device=self.words.device) // size
        codes = unpack_bits(self.words, self.bits, self.in_features).float()
        weight = (codes - self.zeros.float()[:, group]) * self.scales.float()[:, group]
        if self.outliers:
            rows = torch.arange(self.out_features, device=group.device).repeat_interleave(self.outlier_offsets.diff())
            weight[rows, self.outlier_columns.long()] += self.outlier_values.float()
        return weight

    def extra_repr(self) -> str:
        """What `print` shows.

        Returns:
            Sizes and bits.
        """
        return (
            f"{self.in_features}, {self.out_features}, bits={self.bits}, group_size={self.group_size}, "
            f"outliers={self.outliers}, bias={self.bias is not None}"
        )
