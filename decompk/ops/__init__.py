"""Operations on K members at once: contracts only (schema, checks, fake, autograd, cost)."""

from .batch_norm import batch_norm
from .conv import conv2d, grouped_conv2d
from .fused import conv2d_moments, fused_conv2d

__all__ = ["batch_norm", "conv2d", "conv2d_moments", "fused_conv2d", "grouped_conv2d"]
