"""The passes of whatever form a Config is for, on the views that kernels take."""

from decompk.kernels import call, conv
from decompk.kernels.conv.form import Choice


def fprop(problem, config, x, weight, y, *around, **more):
    return conv.named(config.form).fprop(problem, config, x, weight, y, *around, **more)


def dgrad(problem, config, dy, weight, dx):
    return conv.named(config.form).dgrad(problem, config, dy, weight, dx)


def wgrad(problem, config, dy, x, dw, offsets=None):
    return call.wgrad(Choice(conv.named(config.form), config, 0.0, ""), problem, dy, x, dw, offsets)


def why_not(problem, config, device):
    return conv.named(config.form).why_not(problem, config, device)


def moments_pieces(problem, config):
    return conv.named(config.form).moments_pieces(problem, config)
