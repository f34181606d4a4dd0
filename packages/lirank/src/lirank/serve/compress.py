"""Tables of 8 bits per value for serving."""

import torch
from core_tensor.ops.quantized_gather import dequantize_rows, quantize_rows, quantized_gather
from torch import Tensor, nn

from lirank.layers.table import FusedTable


class QuantizedTable(nn.Module):
    """A fused table in 8-bit rows, each with a float16 scale and a float32 bias.

    Args:
        table: The trained table.
    """

    codes: Tensor
    scale: Tensor
    bias: Tensor
    rows: Tensor

    def __init__(self, table: FusedTable) -> None:
        super().__init__()
        rows = quantize_rows(table.weight.detach().float())
        self.dim = table.dim
        self.register_buffer("rows", rows, persistent=False)  # what the kernel reads
        self.register_buffer("codes", rows[:, : self.dim].clone())
        self.register_buffer("scale", rows[:, self.dim : self.dim + 2].clone().view(torch.float16))
        self.register_buffer("bias", rows[:, self.dim + 2 :].clone().view(torch.float32))

    def forward(self, ids: Tensor) -> Tensor:
        """Look up rows, any shape -> the same with D behind; in plain operations in compiled or exported programs."""
        if torch.compiler.is_compiling():
            flat = ids.reshape(-1)
            found = self.codes[flat].float() * self.scale[flat].float() + self.bias[flat]
            return found.view(*ids.shape, self.dim)
        return quantized_gather(self.rows, ids.reshape(-1, 1)).view(*ids.shape, self.dim)

    def memory(self) -> dict[str, float]:
        """Bytes of the table, of the same in float32, and their ratio."""
        bytes_ = self.rows.numel()
        plain = 4 * len(self.rows) * self.dim
        return {"bytes": bytes_, "float32_bytes": plain, "ratio": plain / bytes_}

    def error(self, table: FusedTable) -> float:
        """Root mean square error over that of the values."""
        weight = table.weight.detach()
        return float((dequantize_rows(self.rows) - weight).square().mean().sqrt() / weight.square().mean().sqrt())
