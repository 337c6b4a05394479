"""A stretch of a fused network, layers, poolings and the like on a CPU, in one C++ call each way.

What the interpreter does around each layer takes longer than a narrow member's layer itself. So the first call of a
kind notes, node by node, what the kernels were called with; further calls hand all of it over at once. They compute the
same bits: the kernels and their order are the same.
"""

from __future__ import annotations

import ctypes
import operator
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from ..crops import Crop
from ..fx.held import held_at
from ..fx.wrapper import compiled, source_of
from ..kernels import cpu, cpu_pool
from ..kernels.backend import ANY, forced, resumed
from ..kernels.call import follows, runs_cpu, settle, unwatched
from ..kernels.conv.direct import sizes_of
from ..kernels.handles import TENSORS
from ..ops.cpu_layer import needs_dy
from ..ops.followed import activated, by_torch, gradients
from ..ops.norm import torch_norm
from .fused_layer import affines, on_cpu, relu_of, run_layer, run_shared_layer, unhooked
from .fused_linear import linear_on_cpu, run_linear
from .fused_pool import cpu_pools, run_pool, window_of

NONE, GIVEN, RESULT = -1, -2, -3  # places: see kernels/cpu/stretch.cpp
LINE = 16  # floats of a line of the cache, with which each place begins
POOL, FLATTEN = 1, 2  # kinds of steps that are no layers, as there
LEAST = 2  # steps that are worth it


class _Step(ctypes.Structure):
    """As kernels/cpu/stretch.cpp has it."""

    _fields_ = [
        *((name, ctypes.c_long) for name in ("kind", "relu", "by", "by_back")),
        *((name, ctypes.c_long) for name in ("x", "residual", "y", "z", "saved")),
        *((name, ctypes.c_long) for name in ("dz", "dx", "g", "dy", "room_dx", "room_g")),
        *((name, ctypes.c_double) for name in ("momentum", "eps")),
        ("sizes", ctypes.c_long * 14),
    ]


class _Layer(NamedTuple):
    """A layer of the stretch: what it reads, by number, 0 what the stretch is given and i + 1 what step i gives."""

    reads: int
    adds: int | None
    conv: Any
    norm: Any
    relu: int
    activation: nn.Module | str | None
    how: Any
    shape: torch.Size

    def tensors(self) -> list[tuple[dict, str]]:
        """Where its weight, bias, gamma, beta and running statistics are held, by which name."""
        conv, norm = self.conv._parameters, {} if self.norm is None else self.norm._parameters
        buffers = {} if self.norm is None else self.norm._buffers
        here = [(conv, "weight"), (conv, "bias"), (norm, "weight"), (norm, "bias")]
        return [*here, (buffers, "running_mean"), (buffers, "running_var")]

    def as_read(self) -> tuple:
        """What its modules are asked at each call, and the stretch was made by."""
        conv, norm = vars(self.conv), {} if self.norm is None else vars(self.norm)
        of_conv = map(conv.get, ("stride", "padding", "dilation"))
        of_norm = norm.get("training"), norm.get("track_running_stats"), norm.get("momentum") is None
        laid = self.conv._twin_contiguous, self.norm is not None and self.norm._twin_contiguous
        return *of_conv, *of_norm, *laid, relu_of(self.activation)


class _Pool(NamedTuple):
    reads: int
    pool: nn.MaxPool2d
    window: tuple
    images: torch.Size
    shape: torch.Size

    def tensors(self) -> list[tuple[dict, str]]:
        return [({}, "")] * 6

    def as_read(self) -> tuple:
        return window_of(self.pool)


class _Flatten(NamedTuple):
    """Of images, as a linear layer reads them."""

    reads: int
    module: nn.Module | None
    images: torch.Size
    shape: torch.Size

    def tensors(self) -> list[tuple[dict, str]]:
        return [({}, "")] * 6

    def as_read(self) -> tuple:
        return () if self.module is None else (self.module.start_dim, self.module.end_dim)


def _makes_rows(flatten: nn.Flatten) -> bool:
    return (flatten.start_dim, flatten.end_dim) == (1, -1)


@dataclass
class Whole:
    """A network of which a stretch is one call: its code with what the stretch gives as a further argument."""

    stretch: Stretch
    code: Callable
    modules: Sequence[tuple[dict[str, Any], str, nn.Module]]  # that it stands for: where each is held, by which name
    flattens: bool  # the input, before the stretch
    flatten: nn.Flatten | None  # the module that does

    def tensors(self) -> list[Tensor | None] | None:
        """Those of the stretch; None where it is no longer what the network would do."""
        same = all(held.get(name) is module for held, name, module in self.modules)
        same = same and (self.flatten is None or _makes_rows(self.flatten))
        return self.stretch.tensors() if same else None

    def run(self, net: nn.Module, x: Tensor, crops: Sequence[Crop] | None, tensors: list[Tensor | None]) -> Any:
        """What the network gives; tensors: of the stretch."""
        rows = x if crops is None else torch.cat([crop.cut(x) for crop in crops])
        return self.code(net, x, crops, True, self.stretch(rows.flatten(1) if self.flattens else rows, tensors))


class Reader(fx.Interpreter):
    """Runs a fused graph node by node, and finds the stretch of it that begins with its input."""

    def __init__(self, net: nn.Module, graph: fx.Graph):
        super().__init__(net, garbage_collect_values=False, graph=graph)
        self.extra_traceback = False  # errors are those of the layers alone
        self._steps: list[_Layer | _Pool | _Flatten] = []
        self._values: list[Tensor] = []  # what the stretch is given and what each step gives
        self._number: dict[fx.Node, int] = {}
        self._ended = False
        self._first: fx.Node | None = None  # what flattens the input before the stretch, which reads that
        self._flat: Any = None

    def run_node(self, node: fx.Node) -> Any:
        args: Any = self.fetch_args_kwargs_from_env(node)[0]
        if not self._values and self._flattens(node, args) and node.all_input_nodes[0].op == "placeholder":
            self._first, self._flat = node, super().run_node(node)
            return self._flat
        step = None
        if not self._ended and not self._is_read(node):
            step = self._step(node, args)
            passes = node.target is operator.getitem or isinstance(self._called(node), nn.Identity)
            self._ended = step is None and not (passes and self._find(args[0]) is not None)
        value = super().run_node(node)
        if step is not None:
            if self._values[0] is not self._flat:
                self._first = None
            self._steps.append(step)
            self._values.append(value[0] if node.target is run_shared_layer else value)
        found = None if self._ended or node.op == "output" else self._find(value)
        if found is not None:
            self._number[node] = found
        return value

    @staticmethod
    def _is_read(node: fx.Node) -> bool:
        """Whether it only reads what steps are given."""
        of = node.args[0] if node.target is operator.getitem else node
        return node.op in ("placeholder", "get_attr", "output") or (isinstance(of, fx.Node) and of.target is affines)

    def _called(self, node: fx.Node) -> Any:
        return self.fetch_attr(str(node.target)) if node.op == "call_module" else None

    def _find(self, value: Any) -> int | None:
        """Which value of the stretch it is."""
        value = value[0] if isinstance(value, tuple) and value else value
        return next((i for i, one in enumerate(self._values) if one is value), None)

    def _step(self, node: fx.Node, args: Any) -> _Layer | _Pool | _Flatten | None:
        if node.target is run_pool:
            x, pool = args
            reads = self._find(x)
            return self._pool(reads, x, pool) if reads is not None else None
        if node.target is run_linear:
            return self._linear(*args)
        if self._flattens(node, args):
            return self._flatten(args[0], self._called(node))
        if node.target not in (run_layer, run_shared_layer):
            return None
        x, crops, conv, norm, _, residual, _, relu = args[2 if node.target is run_shared_layer else 1 :]
        if not self._values:
            x = x if crops is None else torch.cat([crop.cut(x) for crop in crops])
            self._values.append(x)
        elif crops is not None:
            return None
        reads, adds = self._find(x), None if residual is None else self._find(residual)
        last = conv if norm is None else norm
        if reads is None or (residual is not None and adds is None) or last._twin_contiguous:
            return None
        way = on_cpu(x, conv, norm, residual, relu)
        if way is None or (reads and way[0] is not x):
            return None
        call, by = way[3]
        return _Layer(reads, adds, conv, norm, relu_of(relu), relu, (call, by), torch.Size(call.shape))

    def _linear(self, x: Tensor, linear: Any, relu: nn.Module | str | None) -> _Layer | None:
        if not self._values:
            self._values.append(x)
        reads, how = self._find(x), linear_on_cpu(x, linear, relu)
        if reads is None or how is None or linear._twin_contiguous:
            return None
        return _Layer(reads, None, linear, None, relu_of(relu), relu, how, torch.Size(how[0].shape[:2]))

    def _flattens(self, node: fx.Node, args: Any) -> bool:
        """Whether it makes rows of images."""
        module = self._called(node)
        if type(module) is nn.Flatten:
            return unhooked(module) and _makes_rows(module)
        return node.target in (torch.flatten, "flatten") and args[1:] in ((1,), (1, -1)) and not node.kwargs

    def _flatten(self, x: Tensor, module: nn.Module | None) -> _Flatten | None:
        reads = self._find(x)
        if reads is None or x.dim() != 4 or not runs_cpu(x) or settle(x) is not x:
            return None
        return _Flatten(reads, module, x.shape, torch.Size((len(x), x[0].numel())))

    def _pool(self, reads: int, x: Tensor, pool: Any) -> _Pool | None:
        if not cpu_pools(x, pool) or settle(x) is not x:
            return None
        window = window_of(pool)
        return _Pool(reads, pool, window, x.shape, torch.Size(cpu_pool.sizes_of(x.shape, *window)[0]))

    def whole(self) -> Whole | None:
        """The network with the longest stretch that has one result; None where none is worth it."""
        for count in range(len(self._steps), LEAST - 1, -1):
            inside = {node: i for node, i in self._number.items() if 0 < i <= count}
            read = {i for node, i in inside.items() if any(user not in inside for user in node.users)}
            used = {i for step in self._steps[:count] for i in (step.reads, getattr(step, "adds", None))}
            if read == {count} and used.issuperset(range(1, count)):
                stretch = Stretch(self._steps[:count], self._values[0], self._values[count])
                whole = Whole(
                    stretch,
                    self._behind(inside, count),
                    self._modules([*inside, self._first] if self._first else inside),
                    self._first is not None,
                    self._called(self._first) if self._first else None,
                )
                return whole if stretch.is_possible() else None
        return None

    def _modules(self, inside: Collection[fx.Node]) -> list[tuple[dict[str, Any], str, nn.Module]]:
        """The modules that `inside` calls or reads, and those around them."""
        read = {
            node for one in inside for node in (one, *one.all_input_nodes) if node.op in ("call_module", "get_attr")
        }
        return held_at(self.module, [str(node.target) for node in read])

    def _behind(self, inside: dict[fx.Node, int], count: int) -> Callable:
        """The code of what comes behind the first `count` steps, whose result it takes."""
        graph = fx.Graph()
        new: dict[fx.Node, fx.Node] = {}
        for node in self.graph.nodes:
            if node.op == "placeholder":
                new[node] = graph.node_copy(node)
        result = graph.placeholder("result", default_value=None)
        for node in self.graph.nodes:
            if node.op != "placeholder":
                new[node] = result if node in inside else graph.node_copy(node, new.__getitem__)
        for node in reversed(graph.nodes):
            reads = node.op == "get_attr" or node.target in (affines, operator.getitem)
            if not node.users and (reads or (self._first and node is new[self._first])):
                graph.erase_node(node)
        return compiled(*source_of(graph))


class Room:
    """Places of one memory, handed out and taken back; `size` is what all of them take, in floats."""

    def __init__(self) -> None:
        self.size = 0
        self._free: list[tuple[int, int]] = []  # (place, size)

    def take(self, count: int) -> int:
        count = -(-count // LINE) * LINE
        fitting = [one for one in self._free if one[1] >= count]
        if not fitting:
            self.size += count
            return self.size - count
        place, size = best = min(fitting, key=operator.itemgetter(1))
        self._free.remove(best)
        if size > count:
            self._free.append((place + count, size - count))
        return place

    def give_back(self, place: int, count: int) -> None:
        self._free.append((place, -(-count // LINE) * LINE))
        joined: list[tuple[int, int]] = []
        for first, size in sorted(self._free):
            if joined and sum(joined[-1]) == first:
                first, size = joined[-1][0], joined.pop()[1] + size
            joined.append((first, size))
        self._free = joined


class Stretch:
    """Steps from the network's input on, of the shapes and by the kernels that they had when they were read."""

    def __init__(self, steps: Sequence[_Layer | _Pool | _Flatten], given: Tensor, result: Tensor):
        self._steps = list(steps)
        self._wants_dx = given.requires_grad
        self._K = next(step.how[0].as_given.K for step in steps if isinstance(step, _Layer))
        self._shapes = [given.shape, *(step.shape for step in steps)]
        self._places = [place for step in steps for place in step.tensors()]
        self._as_read = [step.as_read() for step in steps]
        self._result = result.shape, result.stride()
        self._lies, self._needs = self._look(self._tensors())
        self._table = (_Step * len(steps))()
        self.size = self._lay_out()
        self.gradients_size = self._lay_out_gradients()

    # ---- what the calls have in common ------------------------------------------------------------------------------

    def _tensors(self) -> list[Tensor | None]:
        return [held.get(name) for held, name in self._places]

    @staticmethod
    def _look(tensors: Sequence[Tensor | None]) -> tuple[list, list]:
        """How each lies, and whether it wants a gradient."""
        lies = [None if t is None else (type(t), t.dtype, t.shape, t.stride()) for t in tensors]
        return lies, [t is not None and t.requires_grad for t in tensors]

    def is_possible(self) -> bool:
        """Whether every weight and vector can be read as it lies, and has a gradient."""
        for i, (t, needs) in enumerate(zip(self._tensors(), self._needs, strict=True)):
            if t is None:
                continue
            moved = i % 6 > 3
            dense = (t.movedim(2, -1) if i % 6 == 0 else t).is_contiguous()
            if type(t) not in TENSORS or t.dtype is not torch.float32 or not dense or needs == moved:
                return False
        return True

    def reads_result(self) -> bool:
        """Whether the backward asks the result what the last ReLU let pass."""
        last = self._table[len(self._steps) - 1]
        return last.relu != 0 and (last.z == NONE or last.residual != NONE)

    def fits(self, tensors: Sequence[Tensor | None]) -> bool:
        """Whether they lie as they did when the stretch was made."""
        return self._look(tensors)[0] == self._lies

    def tensors(self) -> list[Tensor | None] | None:
        """The weights, vectors and statistics of all steps; None where a step is no longer what it was."""
        tensors = self._tensors()
        same = self._look(tensors) == (self._lies, self._needs)
        return tensors if same and [step.as_read() for step in self._steps] == self._as_read else None

    # ---- where everything lies --------------------------------------------------------------------------------------

    def _lay_out(self) -> int:
        """Gives activations their places; the floats that they take."""
        room, places = Room(), [GIVEN]
        for i, (step, row) in enumerate(zip(self._steps, self._table, strict=True)):
            last = i == len(self._steps) - 1
            result = RESULT if last else room.take(step.shape.numel())
            row.x, row.residual, row.y, row.z, row.saved = places[step.reads], NONE, result, NONE, NONE
            places.append(result)
            if isinstance(step, _Pool):
                row.kind, row.saved = POOL, room.take(-(-step.shape.numel() // 4))  # bytes
                row.sizes[:] = cpu_pool.sizes_of(step.images, *step.window)[1]
                continue
            if isinstance(step, _Flatten):
                N, C, H, W = step.images
                row.kind, row.sizes[:] = FLATTEN, (1, N, C, C, H, W, 1, 1, 1, 1, 0, 0, H, W)
                continue
            call, by = step.how
            row.relu, row.by, row.by_back = step.relu, cpu.BY[by.forward], cpu.BY[by.backward]
            row.sizes[:] = sizes_of(call.as_given)
            if step.adds is not None:
                row.residual = places[step.adds]
            if step.norm is not None:
                row.y, row.z = room.take(step.shape.numel()), result
                row.saved = room.take(4 * call.as_given.K * call.as_given.O)
        return room.size

    def _lay_out_gradients(self) -> int:
        """Gives gradients theirs, in a member's part, from the last step that reads a value to the one that made it."""
        room = Room()
        places: dict[int, int] = {len(self._steps): RESULT, **({0: GIVEN} if self._wants_dx else {})}
        written = {len(self._steps)}

        def place(value: int | None, count: int) -> tuple[int, int]:
            """Of a value's gradient, and of what is added to it, if there is some already."""
            if value is None or (value == 0 and not self._wants_dx):
                return NONE, NONE
            if value not in places:
                places[value] = room.take(count)
            if value in written:
                return places[value], room.take(count)
            written.add(value)
            return places[value], NONE

        for i in reversed(range(len(self._steps))):
            step, row = self._steps[i], self._table[i]
            own = step.shape.numel() // self._K
            of_x = self._shapes[step.reads].numel() // self._K
            row.dz, row.dy = places[i + 1], NONE
            row.dx, row.room_dx = place(step.reads, of_x)
            row.g, row.room_g = NONE, NONE
            after = [(row.room_dx, of_x)]
            if isinstance(step, _Layer):
                row.g, row.room_g = place(step.adds, own)
                if row.dx != NONE and needs_dy(step.how[0].as_given, step.how[1]):
                    row.dy = room.take(own)
                after += [(row.room_g, own), (row.dy, own)]
            for used, count in (*after, (row.dz, own)):
                if used >= 0:
                    room.give_back(used, count)
        return room.size

    # ---- a call -----------------------------------------------------------------------------------------------------

    def __call__(self, x: Tensor, tensors: list[Tensor | None]) -> Tensor:
        """What the stretch gives for rows x (K·N, C, H, W); tensors: as `tensors` gave them."""
        learned = [t for i, t in enumerate(tensors) if t is not None and i % 6 < 4]
        return _Stretch.apply(_settled(x), self, tensors, *learned)

    def run(self, x: Tensor, tensors: list[Tensor | None]) -> tuple[Tensor, Tensor]:
        """The result and the room that holds what the backward reads."""
        result = x.new_empty_strided(*self._result)
        room = x.new_empty(self.size)
        layers = [(row, s) for row, s in zip(self._table, self._steps, strict=True) if isinstance(s, _Layer)]
        norms = [(row, layer.norm) for row, layer in layers if layer.norm is not None]
        for row, norm in norms:
            row.momentum, row.eps = norm.momentum or 0.0, norm.eps
        pointers = _pointers(tensors)
        cpu.stretch(self._table, self._K, x, result, room, pointers)
        moved = [t for i, t in enumerate(tensors) if t is not None and i % 6 > 3]
        counters = [
            n.num_batches_tracked for _, n in norms if n.track_running_stats and n.num_batches_tracked is not None
        ]
        if counters:
            torch._foreach_add_(counters, 1)
        torch.autograd.graph.increment_version(moved)
        return result, room

    def run_back(
        self, dz: Tensor, x: Tensor, result: Tensor | None, room: Tensor, tensors: list[Tensor | None]
    ) -> tuple[Tensor | None, list[Tensor]]:
        """dx and the gradients of the weights and vectors that there are."""
        dx = torch.empty_like(x) if self._wants_dx else None
        found: list[Tensor | None] = []
        grads: list[Tensor] = []
        biases: list[tuple[int, Tensor]] = []  # in front of a norm, which takes off again what they add
        for i, step in enumerate(self._steps):
            if not isinstance(step, _Layer):
                found += [None] * 3
                continue
            weight, bias, gamma, beta = tensors[6 * i : 6 * i + 4]
            assert weight is not None
            p = step.how[0].as_given
            dw = x.new_empty(p.K, p.O, *p.kernel, weight.shape[2])
            grads.append(dw.view(weight.shape) if weight.dim() == 3 else dw.movedim(-1, 2))
            if step.norm is None:
                db = None if bias is None else x.new_empty(p.K, p.O)
                found += [dw, None, db]
                grads += [] if db is None else [db]
                continue
            dgamma, dbeta = x.new_empty(p.K, p.O), x.new_empty(p.K, p.O)
            found += [dw, dgamma, dbeta]
            if bias is not None:
                biases.append((len(grads), dbeta))
                grads.append(dbeta)
            grads += [one for one, of in ((dgamma, gamma), (dbeta, beta)) if of is not None]
        gradients = x.new_empty(self._K * self.gradients_size)
        cpu.stretch_backward(
            self._table, self._K, x, result, room, dz, dx, gradients, _pointers(tensors), _pointers(found)
        )
        for at, dbeta in biases:
            grads[at] = 0 * dbeta
        return dx, grads

    def by_torch(self, x: Tensor, *learned: Tensor) -> Tensor:
        """The same by torch's own operators; statistics stay as they are."""
        given = iter(learned)
        values = [x]
        for i, step in enumerate(self._steps):
            x = values[step.reads]
            if isinstance(step, _Pool):
                values.append(F.max_pool2d(x, *step.window))
                continue
            if isinstance(step, _Flatten):
                values.append(x.flatten(1))
                continue
            weight, bias, gamma, beta = (None if t is None else next(given) for t in self._tensors()[6 * i : 6 * i + 4])
            assert weight is not None
            if weight.dim() == 3:  # of a linear layer
                x, weight = x[..., None, None], weight[..., None, None]
            y = by_torch(x.unflatten(0, (len(weight), -1)), weight, bias, *step.how[0].ends.geometry)
            if step.norm is not None:
                y = torch_norm(y, gamma, beta, None, None, True, 0.0, step.norm.eps)
            y = y.flatten(0, 1).view(step.shape)
            y = y if step.adds is None else y + values[step.adds]
            values.append(activated(y, step.relu))
        return values[-1]


def _settled(t: Tensor) -> Tensor:
    """Rows without gaps, the channels of images inside."""
    return settle(t) if t.dim() == 4 else t.contiguous()


def _pointers(tensors: Sequence[Tensor | None]) -> Any:
    return (ctypes.c_void_p * len(tensors))(*(None if t is None else t.data_ptr() for t in tensors))


class _Stretch(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, stretch: Stretch, tensors: list[Tensor | None], *learned: Tensor) -> Tensor:
        result, room = stretch.run(x, tensors)
        ctx.stretch, ctx.tensors, ctx.asked = stretch, tensors, forced.get()
        ctx.learned = learned
        read = [t for i, t in enumerate(tensors) if t is not None and i % 6 in (0, 2, 3)]  # biases may change
        ctx.save_for_backward(x, result if stretch.reads_result() else None, room, *read)
        return result

    @staticmethod
    def backward(ctx: Any, dz: Tensor) -> tuple[Tensor | None, ...]:
        x, result, room, *_ = ctx.saved_tensors
        if follows(dz) or not unwatched(dz) or not ctx.stretch.fits(ctx.tensors):
            with resumed(ctx.asked or ANY):
                wanted = ctx.needs_input_grad
                found = gradients(ctx.stretch.by_torch, (x, *ctx.learned), dz, (wanted[0], *wanted[3:]))
            return found[0], None, None, *found[1:]
        dx, grads = ctx.stretch.run_back(_settled(dz), x, result, room, ctx.tensors)
        return dx, None, None, *grads
