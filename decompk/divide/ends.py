"""Where a network begins and ends: its last layers, and whether its first ones read features."""

from __future__ import annotations

from torch import fx, nn

from .divided_layer import CONV_OR_LINEAR
from .operations import FUNCTIONAL_LAYERS, SHAPE_QUERIES, module_key, operation_name


def heads(model: nn.Module, graph: fx.Graph) -> set[str]:
    """The layers whose output reaches the network's output through no other layer: the last layers (2.14)."""
    modules = dict(model.named_modules(remove_duplicate=False))
    found: set[str] = set()
    seen: set[fx.Node] = set()
    pending = [node for node in graph.nodes if node.op == "output"]
    while pending:
        node = pending.pop()
        for source in node.all_input_nodes:
            if source in seen:
                continue
            seen.add(source)
            name = operation_name(source)
            if source.op == "call_module" and isinstance(modules[source.target], nn.RNNBase):
                continue
            if source.op == "call_module" and isinstance(modules[source.target], CONV_OR_LINEAR):
                found.add(source.target)
            elif name in FUNCTIONAL_LAYERS:
                found.add(module_key(source))
            elif name not in SHAPE_QUERIES or source.args[1:] in (("data",), ("T",), ("mT",)):  # a size has no values
                pending.append(source)
    return found


def reads_features(modules: dict[str, nn.Module], graph: fx.Graph) -> bool:
    """Whether the first layers with parameters read the last axis as features: linear and recurrent ones."""
    pending = [node for node in graph.nodes if node.op == "placeholder"]
    seen: set[fx.Node] = set()
    while pending:
        node = pending.pop()
        for user in node.users:
            if user in seen:
                continue
            seen.add(user)
            module = modules.get(user.target) if user.op == "call_module" else None
            if isinstance(module, nn.RNNBase | nn.Linear):
                return True
            if module is None or not any(True for _ in module.parameters()):
                pending.append(user)
    return False
