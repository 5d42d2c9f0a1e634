"""One number per hidden state, as value functions and reward models give: in float32, whatever the weights' precision.

bfloat16 knows 4.0 and 4.03, nothing between: scores of like responses would be equal, and advantages, which are differences of values,
mostly rounding.
"""

from __future__ import annotations

from torch import Tensor, nn


class ScalarHead(nn.Linear):
    """[..., D] → [..., 1] float32."""

    def __init__(self, width: int, bias: bool = True) -> None:
        super().__init__(width, 1, bias=bias)

    @classmethod
    def like(cls, head: nn.Linear) -> ScalarHead:
        """With the very parameters of `head`."""
        own = cls(head.in_features, head.bias is not None)
        own.weight, own.bias = head.weight, head.bias
        return own

    def forward(self, states: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias.float()
        return nn.functional.linear(states.float(), self.weight.float(), bias)
