"""The graph of a packed network rewritten for members side by side: the layout of every value, and who converts it."""

from __future__ import annotations

import inspect
import operator
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

from torch import fx, nn
from torch.fx.node import map_arg

from ..errors import UnsupportedOperation
from . import side_layers
from .conv import PackedConv2d, PackedConvTranspose2d
from .fusion import augmented
from .linear import PackedPReLU
from .norm import PackedBatchNorm2d, PackedGroupNorm, PackedInstanceNorm2d
from .norm_then import ALONE
from .twin import Twin, channel_grouped


@dataclass(eq=False)
class _Value:
    """What nodes of the network's graph give: the same tensor in one layout or several.

    forms: layout → node of the new graph. "side": (N, K·C, H, W); "shared": (N, C, H, W), the same for all members;
    "rows": (K·N, …), or what is no activation; "parts": a tuple of what lies side by side; "split": (N, H, W, K, a, b).
    contiguous: whether its rows are channels first. number: whether it is made of sizes alone. of: the value that was
    split. nodes: of the old graph. family: the values that may share its memory.
    """

    forms: dict[str, fx.Node]
    contiguous: bool = False
    number: bool = False
    of: _Value | None = None
    nodes: list[fx.Node] = field(default_factory=list)
    family: set[_Value] = field(default_factory=set)

    def __post_init__(self) -> None:
        self.family.add(self)

    def join(self, others: Iterable[_Value]) -> None:
        family = self.family.union(*(other.family for other in others))
        for one in family:
            one.family = family


class SideGraph:
    """The new graph, in `new`. shared: whether it takes the image (N, C, H, W) of all members, else (N, K·C, H, W).

    paths: the layers that run side by side, which the graph has taken to pieces. Raises UnsupportedOperation where no
    convolution does, and where something is written into that was copied meanwhile.
    """

    def __init__(self, net: nn.Module, K: int, graph: fx.Graph, shared: bool):
        self.new = fx.Graph()
        self.paths: set[str] = set()
        self._K = K
        self._modules = {n: net.get_submodule(str(n.target)) for n in graph.nodes if n.op == "call_module"}
        self._order = {node: i for i, node in enumerate(graph.nodes)}
        self._values: dict[fx.Node, _Value] = {}
        self._convolved = False
        for node in graph.nodes:
            if node.op == "output":
                self.new.output(map_arg(node.args[0], self._rows))
                continue
            if node.op == "placeholder":
                value = self._input = _Value({"shared" if shared else "side": self.new.placeholder(node.name)})
            else:
                value = self._kept(node) or self._in_rows(node)
            value.nodes.append(node)
            self._values[node] = value
        if not self._convolved:
            raise UnsupportedOperation("no 2-d convolution reads what lies side by side.")
        self.new.lint()

    # ---- values in a layout -----------------------------------------------------------------------------------------

    def _call(self, function: Callable, *args: Any, **kwargs: Any) -> fx.Node:
        return self.new.call_function(function, args, kwargs)

    def _value(self, arg: Any) -> _Value | None:
        """The activation that an argument is, where it does not lie in rows alone."""
        value = self._values[arg] if isinstance(arg, fx.Node) else None
        return value if value and value.forms.keys() & {"side", "shared"} else None

    def _side(self, value: _Value) -> fx.Node:
        forms = value.forms
        if "side" not in forms:
            forms["side"] = self._call(side_layers.repeat, forms["shared"], self._K)
        return forms["side"]

    def _rows(self, node: fx.Node, contiguous: bool = False) -> fx.Node:
        value, K = self._values[node], self._K
        forms = value.forms
        if "rows" not in forms:
            if "side" in forms:
                made = self._call(side_layers.rows, forms["side"], K, contiguous or value.contiguous)
            elif "shared" in forms:
                made = self._call(side_layers.repeated_rows, forms["shared"], K)
            elif "parts" in forms:
                made = self._call(side_layers.rows_of_each, forms["parts"], K)
            else:
                made = self._call(side_layers.rows_of_split, forms["split"])
            forms["rows"] = made
        return forms["rows"]

    # ---- what is written into ---------------------------------------------------------------------------------------

    def _is_read_later(self, value: _Value, node: fx.Node) -> bool:
        return any(self._order[user] > self._order[node] for one in value.nodes for user in one.users)

    def _written(self, value: _Value, node: fx.Node, form: str, made: fx.Node) -> _Value:
        """`value`, of which nothing holds any more but what `node` wrote into it, in that form."""
        copied = any(set(one.forms) != {"rows"} for one in value.family)
        if copied and any(self._is_read_later(one, node) for one in value.family - {value}):
            raise UnsupportedOperation(f"'{node.name}' writes into a tensor of which another view is read afterwards.")
        value.forms = {form: made}
        return value

    def _refuse_input(self, value: _Value, node: fx.Node) -> None:
        if self._input in value.family:
            raise UnsupportedOperation(f"'{node.name}' writes into the network's input.")

    # ---- operations -------------------------------------------------------------------------------------------------

    def _in_rows(self, node: fx.Node) -> _Value:
        """As the network's own code does it."""
        module = self._modules.get(node)
        flat = _name(node) in _VIEWS or type(module) is nn.Flatten
        read = {self._values[arg]: self._rows(arg, flat) for arg in node.all_input_nodes}
        tensors = [one for one in read if not one.number]
        writes, torchs = _writes(node, module), module is None and _is_torchs(node)
        sides = {one: one.forms["side"] for one in tensors if writes and not torchs and "side" in one.forms}
        versions = {one: self._call(side_layers.version, read[one]) for one in sides}
        value = _Value({"rows": self.new.node_copy(node, self._rows)}, number=len(read) > 0 and not tensors)
        for one in tensors if writes else ():
            self._written(one, node, "rows", read[one])
        for one, side in sides.items():  # other code mostly only reads
            one.forms["side"] = self._call(side_layers.as_written, side, read[one], versions[one], self._K)
        if not _is_fresh(node, module):
            value.join(tensors)
        return value

    def _kept(self, node: fx.Node) -> _Value | None:
        """What the operation gives side by side; None where it takes rows."""
        if node.op == "call_module":
            return self._layer(node, self._modules[node])
        if node.op not in ("call_function", "call_method"):
            return None
        name = _name(node)
        if name in _CONCATENATES and _is_torchs(node):
            return self._concatenated(node)
        if _method(node) is not None:
            return self._combined(node)
        first = self._values.get(node.args[0]) if node.args and isinstance(node.args[0], fx.Node) else None
        if first is None:
            return None
        if name == "getitem" and "parts" in first.forms and isinstance(node.args[1], int):
            return self._view("side", self._call(operator.getitem, first.forms["parts"], node.args[1]), first)
        if "split" in first.forms:
            return self._of_split(node, name, first)
        if name == "expand_as" and _is_torchs(node):
            return self._expanded(node, first)
        x = self._value(node.args[0])
        if x is None:
            return None
        if name in _DRAWING:
            return self._dropped(node, x)
        if not _is_torchs(node):
            return None
        if name in _EACH and node.kwargs.get("return_indices") is not True:
            return self._each(node, x)
        handler = _HANDLERS.get(name)
        return None if handler is None else handler(self, node, x)

    def _layer(self, node: fx.Node, module: nn.Module) -> _Value | None:
        x = self._value(node.args[0]) if len(node.args) == 1 and not node.kwargs else None
        kind, path = type(module), str(node.target).removesuffix(f".{ALONE}")
        if x is None or kind not in _LAYERS or getattr(module, "return_indices", False):
            return None
        self.paths.add(path)
        if kind is nn.Identity:
            return x
        function = _LAYERS[kind]
        if function is None:
            return self._each(node, x)
        if function in (side_layers.convolve, side_layers.convolve_transposed):
            self._convolved = True
        layer = self.new.get_attr(str(node.target))
        if function is side_layers.convolve and module.groups == 1 and "shared" in x.forms:
            made = self._call(side_layers.convolve_shared, x.forms["shared"], layer)
        else:
            made = self._call(function, self._side(x), layer, self._K)
        if function is not side_layers.dropout:
            return _Value({"side": made}, isinstance(module, Twin) and module._twin_contiguous)
        if module.inplace:
            self._refuse_input(x, node)
            return self._written(x, node, "side", made)
        return self._view("side", made, x)

    def _view(self, form: str, made: fx.Node, x: _Value, of: _Value | None = None) -> _Value:
        """A value that may share x's memory."""
        value = _Value({form: made}, x.contiguous, of=of)
        value.join([x])
        return value

    def _each(self, node: fx.Node, x: _Value) -> _Value | None:
        """What is done to every number or every channel by itself, with nothing else that lies by members."""
        others = [arg for arg in node.all_input_nodes if self._values[arg] is not x]
        if not all(self._values[arg].number for arg in others):
            return None
        form = "shared" if "shared" in x.forms else "side"
        made = self.new.node_copy(node, lambda arg: x.forms[form] if self._values[arg] is x else self._rows(arg))
        if _writes(node, self._modules.get(node)):
            self._refuse_input(x, node)
            return self._written(x, node, form, made)
        return _Value({form: made}, x.contiguous)

    def _dropped(self, node: fx.Node, x: _Value) -> _Value | None:
        """A function that drops samples, channels or numbers: what it draws, it draws for rows, in their order."""
        try:
            bound = inspect.signature(node.target).bind(*node.args, **node.kwargs)  # type: ignore[arg-type]
        except (TypeError, ValueError):
            return None
        bound.apply_defaults()
        if bound.arguments.get("training") is False:
            return x
        if bound.arguments.get("inplace", False) is not False:
            return None
        made = self.new.node_copy(node, self._rows)
        return self._view("side", self._call(channel_grouped, made, self._K), x)

    def _combined(self, node: fx.Node) -> _Value | None:
        """A sum, product or the like: of what lies side by side and a number, the like, or rows."""
        name, *pair = _method(node)  # type: ignore[misc]
        if node.kwargs.keys() - {"alpha", "rounding_mode"} or not all(
            isinstance(one, fx.Node | int | float) for one in pair
        ):
            return None
        held = [self._values[one] if isinstance(one, fx.Node) else None for one in pair]
        values = [self._value(one) for one in pair]
        if values == [None, None] or any(v and v.forms.keys() & {"parts", "split"} for v in held):
            return None
        left, right = values
        alone = held[0] is None or held[1] is None or held[0].number or held[1].number
        if alone or (left and right and "shared" in left.forms and "shared" in right.forms):
            form = "shared" if all(v is None or "shared" in v.forms for v in values) else "side"
            made = self.new.node_copy(node, lambda arg: v.forms[form] if (v := self._value(arg)) else self._rows(arg))
        else:
            form = "side"
            if name.endswith("_") and left is None:
                assert held[0] is not None
                if any(self._is_read_later(one, node) for one in held[0].family):
                    return None
                name = name[:-1]
            like = self._side(next(v for v in values if v))
            a, b = (
                self._side(v) if v else self._call(side_layers.beside, self._rows(one), like, self._K)
                for v, one in zip(values, pair, strict=True)
            )
            made = self._call(side_layers.combine, name, a, b, self._K, **node.kwargs)
        if name.endswith("_"):
            assert left is not None
            self._refuse_input(left, node)
            return self._written(left, node, form, made)
        return _Value({form: made}, any(v.contiguous for v in values if v))

    def _expanded(self, node: fx.Node, first: _Value) -> _Value | None:
        """x.expand_as(y): of a gate in rows, and y side by side."""
        y = self._value(node.args[1])
        if y is None or first.forms.keys() & {"parts", "split"} or first.number:
            return None
        like = self._side(y)
        x = self._side(first) if first.forms.keys() & {"side", "shared"} else None
        x = x or self._call(side_layers.beside, self._rows(node.args[0]), like, self._K)  # type: ignore[arg-type]
        return self._view("side", self._call(side_layers.combine, "expand_as", x, like, self._K), first)

    def _concatenated(self, node: fx.Node) -> _Value | None:
        parts, dim = _argument(node, 0, "tensors"), _argument(node, 1, "dim", node.kwargs.get("axis", 0))
        if not isinstance(parts, list | tuple) or dim not in (1, -3) or "out" in node.kwargs:
            return None
        held = [self._values[part] for part in parts]
        if not any(map(self._value, parts)) or any(v.forms.keys() & {"parts", "split"} for v in held):
            return None
        sides = [
            self._side(v) if self._value(part) else self._call(channel_grouped, self._rows(part), self._K)
            for v, part in zip(held, parts, strict=True)
        ]
        return _Value({"side": self._call(side_layers.concatenate, sides, self._K)}, any(v.contiguous for v in held))

    # ---- sizes and other questions ----------------------------------------------------------------------------------

    def _size(self, node: fx.Node, x: _Value) -> _Value:
        """x.size() or x.size(i), of rows."""
        made, dim = self._shape(x), _argument(node, 1, "dim")
        if dim is not None:
            made = self._call(operator.getitem, made, dim)
        return _Value({"rows": made}, number=True)

    def _shape(self, x: _Value) -> fx.Node:
        form = "side" if "side" in x.forms else "shared"
        return self._call(side_layers.shape_of_rows, x.forms[form], self._K, form == "shared")

    def _attribute(self, node: fx.Node, x: _Value) -> _Value | None:
        if node.args[1] == "shape":
            return _Value({"rows": self._shape(x)}, number=True)
        return self._asked(node, x) if node.args[1] in ("dtype", "device", "ndim", "is_cuda") else None

    def _asked(self, node: fx.Node, x: _Value) -> _Value:
        """What is the same in every layout."""
        made = self.new.node_copy(node, lambda arg: next(iter(x.forms.values())))
        return _Value({"rows": made}, number=True)

    def _is_size(self, arg: Any, dim: int, of: _Value | None = None) -> bool:
        """Whether an argument is the size of that dimension of a value that lies side by side."""
        if not isinstance(arg, fx.Node):
            return False
        asked: Any = arg
        if _name(arg) == "getitem":
            asked, found = arg.args
        else:
            found = _argument(arg, 1, "dim") if _name(arg) == "size" else None
        is_shape = _name(asked) == "size" or (_name(asked) == "getattr" and asked.args[1] == "shape")
        if not isinstance(found, int) or found % 4 != dim or not is_shape:
            return False
        source = self._values[asked.args[0]]
        return source is of if of else not source.forms.keys().isdisjoint({"side", "shared"})

    # ---- what moves channels or looks over pixels -------------------------------------------------------------------

    def _reduced(self, node: fx.Node, x: _Value) -> _Value | None:
        """A mean or the like over pixels; without keepdim, as its rows."""
        dims, keeps = _argument(node, 1, "dim"), _argument(node, 2, "keepdim", False)
        dims = (dims,) if isinstance(dims, int) else dims
        if not isinstance(dims, list | tuple) or not dims or not all(isinstance(d, int) and d % 4 > 1 for d in dims):
            return None
        reduced = self._each(node, x)
        if keeps or reduced is None:
            return reduced
        (form, made), K = next(iter(reduced.forms.items())), self._K
        into = self._call(side_layers.repeated_rows, made, K) if form == "shared" else None
        return _Value({"rows": into or self._call(side_layers.rows, made, K, True)})

    def _padded(self, node: fx.Node, x: _Value) -> _Value | None:
        pad, mode = _argument(node, 1, "pad"), _argument(node, 2, "mode", "constant")
        if isinstance(pad, list | tuple) and len(pad) <= 4:
            return self._each(node, x)
        if not isinstance(pad, list | tuple) or len(pad) != 6 or mode != "constant":
            return None
        pad = map_arg(list(pad), self._rows)
        value = _argument(node, 3, "value")
        return _Value({"side": self._call(side_layers.pad_channels, self._side(x), self._K, pad, value)}, x.contiguous)

    def _indexed(self, node: fx.Node, x: _Value) -> _Value | None:
        """x[:, channels, rows, columns] of slices."""
        index: Any = node.args[1]
        if not (isinstance(index, tuple) and 2 <= len(index) <= 4 and all(isinstance(i, slice) for i in index)):
            return None
        if index[0] != slice(None):
            return None
        channels, pixels = map_arg((index[1], index[2:]), self._rows)
        return self._view("side", self._call(side_layers.index, self._side(x), self._K, channels, pixels), x)

    def _parted(self, node: fx.Node, x: _Value) -> _Value | None:
        """chunk or split along channels."""
        name = _name(node)
        count = _argument(
            node, 1, {"chunk": "chunks", "split": "split_size"}[name], node.kwargs.get("split_size_or_sections")
        )
        if _argument(node, 2, "dim", 0) not in (1, -3) or count is None:
            return None
        made = self._call(getattr(side_layers, name), self._side(x), self._K, map_arg(count, self._rows))
        return self._view("parts", made, x)

    def _laid_out(self, node: fx.Node, x: _Value) -> _Value:
        """x.contiguous(), in whatever format."""
        value = self._view(*next(iter(x.forms.items())), x)
        value.forms = {form: made for form, made in x.forms.items() if form != "rows"}
        value.contiguous = not (node.args[1:] or node.kwargs)
        return value

    def _detached(self, node: fx.Node, x: _Value) -> _Value | None:
        value = self._each(node, x)
        if value is not None:
            value.join([x])
        return value

    def _shuffled(self, node: fx.Node, x: _Value) -> _Value:
        groups = map_arg(_argument(node, 1, "groups"), self._rows)
        split = self._call(side_layers.split_channels, self._side(x), self._K, groups, -1)
        made = self._call(side_layers.join_channels, self._call(side_layers.swap_channels, split))
        return _Value({"side": made}, x.contiguous)

    def _viewed(self, node: fx.Node, x: _Value) -> _Value | None:
        """x.view(N, groups, channels, H, W), as a shuffle of channels begins."""
        dims = _sizes(node)
        if len(dims) != 5 or not (self._is_size(dims[0], 0) and all(self._is_size(dims[i + 1], i, x) for i in (2, 3))):
            return None
        groups, each = map_arg(dims[1:3], self._rows)
        made = self._call(side_layers.split_channels, self._side(x), self._K, groups, each)
        return self._view("split", made, x, of=x)

    def _of_split(self, node: fx.Node, name: str, split: _Value) -> _Value | None:
        """What goes on with it: groups and channels swapped, and joined again."""
        dims, made = _sizes(node), split.forms["split"]
        if name == "contiguous" and not dims and not node.kwargs:
            return split
        swaps = name in ("transpose", "swapaxes") and sorted(dims) == [1, 2]
        if swaps or (name == "permute" and tuple(dims) == (0, 2, 1, 3, 4)):
            return self._view("split", self._call(side_layers.swap_channels, made), split, of=split.of)
        joins = len(dims) == 4 and self._is_size(dims[0], 0)
        joins = joins and all(self._is_size(dims[i], i, split.of) for i in (2, 3))
        if (name in ("view", "reshape") and joins) or (name == "flatten" and tuple(dims) == (1, 2)):
            return self._view("side", self._call(side_layers.join_channels, made), split)
        return None


# ---- what operations are called -------------------------------------------------------------------------------------


def _name(node: fx.Node) -> str:
    return node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")


def _home(node: fx.Node) -> str:
    return (getattr(node.target, "__module__", None) or "torch").split(".")[0]


def _is_torchs(node: fx.Node) -> bool:
    return node.op == "call_method" or _home(node) in ("torch", "_operator", "builtins")


def _argument(node: fx.Node, place: int, name: str, default: Any = None) -> Any:
    return node.args[place] if len(node.args) > place else node.kwargs.get(name, default)


def _sizes(node: fx.Node) -> Any:
    """The numbers behind the first argument, one by one or as a tuple."""
    rest = node.args[1:]
    return rest[0] if len(rest) == 1 and isinstance(rest[0], list | tuple) else rest


def _method(node: fx.Node) -> tuple[str, Any, Any] | None:
    """The method of tensors that combines two, and what it combines; None of anything else."""
    name, pair = _name(node), node.args
    if node.target is augmented:
        name, pair = f"{str(pair[0]).removeprefix('i')}_", pair[1:]
    stem = name.rstrip("_")
    if len(pair) != 2 or stem not in _COMBINES or not (_is_torchs(node) or node.target is augmented):
        return None
    return _COMBINES[stem] + "_" * name.endswith("_"), *pair


def _writes(node: fx.Node, module: nn.Module | None) -> bool:
    """Whether a node may change a tensor that is not its own result; code that is not torch's may."""
    if node.op == "call_module":
        known = isinstance(module, Twin) or type(module).__module__.startswith("torch.nn.")
        return not known or bool(getattr(module, "inplace", False))
    if node.op not in ("call_function", "call_method"):
        return False
    name = _name(node)
    if not _is_torchs(node) or (name.endswith("_") and not name.endswith("__")):
        return True
    in_place = name == "setitem" or (_home(node) == "_operator" and name.startswith("i") and name[1:] in _COMBINES)
    return in_place or "out" in node.kwargs or node.kwargs.get("inplace", False) is not False


def _is_fresh(node: fx.Node, module: nn.Module | None) -> bool:
    """Whether what it gives is known to have memory of its own."""
    if _writes(node, module):
        return False
    if node.op == "call_module":
        return isinstance(module, (Twin, *_ACTIVATIONS, *_OVER_PIXELS))
    return _is_torchs(node) and (_name(node) in _EACH | _COMBINES.keys() | _REDUCES | _CONCATENATES | {"softmax"})


_COMBINES = {
    **{name: name for name in ("add", "sub", "mul", "div", "maximum", "minimum", "pow")},
    "subtract": "sub",
    "multiply": "mul",
    "divide": "div",
    "truediv": "div",
    "true_divide": "div",
}
_CONCATENATES = {"cat", "concat", "concatenate"}
_REDUCES = {"mean", "sum", "amax", "amin"}
_VIEWS = {"flatten", "view", "reshape"}
_DRAWING = {"dropout", "dropout2d", "alpha_dropout", "feature_alpha_dropout", "stochastic_depth"}
_PLAIN = {
    *("relu", "relu6", "elu", "selu", "celu", "gelu", "silu", "mish", "leaky_relu", "hardtanh", "hardswish"),
    *("hardsigmoid", "hardshrink", "softshrink", "tanhshrink", "softplus", "softsign", "logsigmoid", "sigmoid", "tanh"),
    *("threshold", "clamp", "clamp_min", "clamp_max", "neg", "abs", "sqrt", "rsqrt", "square", "exp", "log", "log1p"),
    *("erf", "sign", "sin", "cos", "reciprocal", "floor", "round"),
}
_EACH = {
    *_PLAIN,
    *(f"{name}_" for name in _PLAIN),
    *("clone", "max_pool2d", "avg_pool2d", "lp_pool2d", "adaptive_avg_pool2d", "adaptive_max_pool2d", "interpolate"),
}
_HANDLERS: dict[str, Callable[[SideGraph, fx.Node, _Value], _Value | None]] = {
    "size": SideGraph._size,
    "getattr": SideGraph._attribute,
    **dict.fromkeys(("dim", "ndimension", "is_floating_point", "get_device"), SideGraph._asked),
    **dict.fromkeys(_REDUCES, SideGraph._reduced),
    "pad": SideGraph._padded,
    "getitem": SideGraph._indexed,
    **dict.fromkeys(("chunk", "split"), SideGraph._parted),
    "contiguous": SideGraph._laid_out,
    "detach": SideGraph._detached,
    "channel_shuffle": SideGraph._shuffled,
    **dict.fromkeys(("view", "reshape"), SideGraph._viewed),
}
_ACTIVATIONS = (
    *(nn.ReLU, nn.ReLU6, nn.ELU, nn.SELU, nn.CELU, nn.GELU, nn.SiLU, nn.Mish, nn.LeakyReLU, nn.Hardtanh, nn.Hardswish),
    *(nn.Hardsigmoid, nn.Hardshrink, nn.Softshrink, nn.Tanhshrink, nn.Softplus, nn.Softsign, nn.LogSigmoid, nn.Sigmoid),
    *(nn.Tanh, nn.Threshold),
)
_OVER_PIXELS = (
    *(nn.MaxPool2d, nn.AvgPool2d, nn.LPPool2d, nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d, nn.Upsample, nn.ZeroPad2d),
    *(nn.ConstantPad2d, nn.ReflectionPad2d, nn.ReplicationPad2d, nn.CircularPad2d),
    *(nn.UpsamplingNearest2d, nn.UpsamplingBilinear2d),
)
_LAYERS: dict[type, Callable | None] = {  # None: the layer itself runs, side by side
    nn.Identity: None,
    **dict.fromkeys((*_ACTIVATIONS, *_OVER_PIXELS)),
    **dict.fromkeys((nn.Dropout, nn.Dropout2d, nn.AlphaDropout, nn.FeatureAlphaDropout), side_layers.dropout),
    PackedConv2d: side_layers.convolve,
    PackedConvTranspose2d: side_layers.convolve_transposed,
    PackedBatchNorm2d: side_layers.batch_norm,
    PackedInstanceNorm2d: side_layers.instance_norm,
    nn.InstanceNorm2d: side_layers.instance_norm,
    PackedGroupNorm: side_layers.group_norm,
    nn.GroupNorm: side_layers.group_norm,
    PackedPReLU: side_layers.prelu,
}
