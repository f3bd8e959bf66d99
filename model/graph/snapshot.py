"""A module tree as a CUDA graph has seen it: which modules, and where their tensors lie."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor, nn

__all__ = ["Snapshot"]


@dataclass(frozen=True)
class _Node:
    """One module: its children and hooks, and its tensors with an alias of each, which holds on to the memory that the graph reads."""

    path: str
    module: nn.Module
    children: dict[str, nn.Module | None]
    hooks: tuple[dict[int, object], ...]
    tensors: tuple[Mapping[str, Tensor | None], ...]  # parameters and buffers
    held: tuple[dict[str, Tensor | None], ...]


class Snapshot:
    """Modules, their forward hooks, parameters and buffers of ``root`` now. Their values are not looked at: a graph reads those each time."""

    def __init__(self, root: nn.Module) -> None:
        self._root = root
        self._nodes = [_node(path, module) for path, module in root.named_modules()]

    def changed(self, root: nn.Module) -> str | None:
        """What is no longer as it was, in words; None when nothing is. Under a millisecond: no tensor is read."""
        if root is not self._root:
            return "it is another module"
        for node in self._nodes:
            if node.module._modules != node.children:  # by identity
                return f"a submodule of {node.path or 'the segmenter'} was replaced"
            if _hooks(node.module) != node.hooks:
                return f"a hook of {node.path or 'the segmenter'} came or went"
            for current, held in zip(node.tensors, node.held, strict=True):
                if current.keys() != held.keys():
                    return f"a tensor of {node.path or 'the segmenter'} came or went"
                for name, tensor in current.items():
                    if _address(tensor) != _address(held[name]):
                        return f"{node.path}.{name}".removeprefix(".") + " moved"
        return None


def _node(path: str, module: nn.Module) -> _Node:
    tensors = (module._parameters, module._buffers)
    held = tuple({name: None if tensor is None else tensor.detach() for name, tensor in own.items()} for own in tensors)
    return _Node(path, module, dict(module._modules), _hooks(module), tensors, held)


def _hooks(module: nn.Module) -> tuple[dict[int, object], ...]:
    """What runs before and after its forward."""
    return dict(module._forward_pre_hooks), dict(module._forward_hooks)


def _address(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()
