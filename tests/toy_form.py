"""A form in one file: what whoever adds one has to write, and a line in kernels.conv.FORMS."""

import torch.nn.functional as F

from decompk.kernels.conv.torch_form import TorchForm


class Toy(TorchForm):
    """Patches laid out in memory, then one product a member."""

    name = "toy"

    def why_not(self, problem, config, device):
        return "the toy form is for undilated kernels" if problem.dilation != (1, 1) else None

    def convolve(self, x, weight, bias, geometry, differentiable=False):
        stride, padding, dilation = geometry
        K, N, C, H, W = x.shape
        patches = F.unfold(x.reshape(K * N, C, H, W), weight.shape[3:], dilation, padding, stride)
        y = weight.flatten(2).unsqueeze(1) @ patches.unflatten(0, (K, N))
        height = (H + 2 * padding[0] - weight.shape[3]) // stride[0] + 1
        y = y.unflatten(-1, (height, -1))
        return y if bias is None else y + bias[:, None, :, None, None]

    def backward(self, dy, x, weight, geometry, wanted):
        raise NotImplementedError("a toy")

    def predicted(self, problem, device):
        return 0, {"library": 1e-6}, "a toy"
