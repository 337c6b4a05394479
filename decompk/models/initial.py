"""How the papers' networks start: He's initialisation for convolutions, torch's own for the rest."""

from __future__ import annotations

from torch import nn


def he(model: nn.Module) -> None:
    """Draw every convolution's kernel from N(0, 2 / fan_out) and set its bias to zero, in place."""
    for module in model.modules():
        if isinstance(module, nn.modules.conv._ConvNd) and not module.weight.is_meta:
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)
