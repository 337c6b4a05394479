"""What the operations of a graph are called, and which of them behave alike."""

from __future__ import annotations

from torch import fx


def operation_name(node: fx.Node) -> str:
    """One name for an operation in functional, method and in-place form."""
    if node.op not in ("call_function", "call_method"):
        return ""
    name = node.target if node.op == "call_method" else getattr(node.target, "__name__", str(node.target))
    if not name.startswith("__"):
        name = name.rstrip("_")
    return _ALIASES.get(name, name)


def module_key(node: fx.Node) -> str:
    """What a layer is known by in a division: its module's path, or its weight's name where a functional is called."""
    if node.op == "call_module":
        return str(node.target)
    weight = node.args[1] if len(node.args) > 1 else node.kwargs.get("weight")
    return str(getattr(weight, "target", node.name))


_ALIASES = {
    "iadd": "add", "imul": "mul", "isub": "sub", "itruediv": "div", "truediv": "div", "true_divide": "div",
    "multiply": "mul", "subtract": "sub", "divide": "div", "radd": "add", "rmul": "mul", "concat": "cat",
    "concatenate": "cat", "swapaxes": "transpose", "max_pool2d_with_indices": "max_pool2d", "upsample": "interpolate",
    "split_with_sizes": "split", "tensor_split": "chunk", "reshape": "view",
}  # fmt: skip
# What commutes with the sum over members, so that a head may still be followed by it.
LINEAR = {
    "add", "sub", "neg", "contiguous", "clone", "detach", "to", "float", "double", "half", "mean", "sum", "view",
    "flatten", "unflatten", "squeeze", "unsqueeze", "permute", "transpose", "chunk", "split", "getitem", "cat", "stack",
    "dropout", "dropout2d", "Dropout", "Dropout2d", "Identity", "Flatten", "interpolate", "Upsample", "avg_pool1d",
    "avg_pool2d", "avg_pool3d", "adaptive_avg_pool1d", "adaptive_avg_pool2d", "adaptive_avg_pool3d", "AvgPool1d",
    "AvgPool2d", "AvgPool3d", "AdaptiveAvgPool1d", "AdaptiveAvgPool2d", "AdaptiveAvgPool3d",
}  # fmt: skip
# What asks a tensor only for its shape, dtype or device: the answer holds none of its values.
SHAPE_QUERIES = {
    "size", "dim", "ndimension", "numel", "getattr", "is_floating_point", "stride", "new_empty", "new_zeros",
    "new_ones", "new_full", "len",
}  # fmt: skip
FUNCTIONAL_LAYERS = {
    "conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d", "linear",
}  # fmt: skip
ELEMENTWISE_FUNCTIONS = {
    "relu", "relu6", "gelu", "silu", "mish", "elu", "selu", "celu", "leaky_relu", "hardswish", "hardsigmoid",
    "hardtanh", "sigmoid", "tanh", "softplus", "softsign", "logsigmoid", "threshold", "hardshrink", "softshrink",
    "tanhshrink", "dropout", "dropout1d", "dropout2d", "dropout3d", "alpha_dropout", "feature_alpha_dropout",
    "feature_dropout", "stochastic_depth", "drop_path", "clamp", "clamp_min", "clamp_max", "neg", "abs", "sqrt",
    "rsqrt", "square", "exp", "log", "log1p", "erf", "sign", "reciprocal", "pow", "nan_to_num", "contiguous", "clone",
    "detach", "to", "float", "double", "half", "bfloat16", "type", "zeros_like", "ones_like", "empty_like", "rand_like",
    "bernoulli", "requires_grad", "add", "sub", "rsub", "mul", "div", "maximum", "minimum", "where", "lerp", "addcmul",
    "type_as", "gt", "ge", "lt", "le", "eq", "ne", "floor", "round", "fill", "zero", "copy",
}  # fmt: skip
ELEMENTWISE_MODULES = {
    "Identity", "ReLU", "ReLU6", "GELU", "SiLU", "Mish", "ELU", "SELU", "CELU", "LeakyReLU", "RReLU", "Hardswish",
    "Hardsigmoid", "Hardtanh", "Hardshrink", "Softshrink", "Tanhshrink", "Sigmoid", "LogSigmoid", "Tanh", "Softplus",
    "Softsign", "Threshold", "Dropout", "Dropout1d", "Dropout2d", "Dropout3d", "AlphaDropout", "FeatureAlphaDropout",
}  # fmt: skip
