"""Operations on K members at once: contracts only (schema, checks, fake, autograd, cost)."""

from .block import block_conv2d, block_linear
from .conv import conv2d, grouped_conv2d
from .fused import conv2d_moments, fused_conv2d
from .norm import batch_norm

__all__ = ["batch_norm", "block_conv2d", "block_linear", "conv2d", "conv2d_moments", "fused_conv2d", "grouped_conv2d"]
