"""What operations and layers do to divided channels: importing this package registers every rule."""

from . import combine, elementwise, layers, pieces, reshape, spatial

__all__ = ["combine", "elementwise", "layers", "pieces", "reshape", "spatial"]
