"""What may stand where in a model of another library that runs on packed tokens. Everything else is refused by name: never another network in silence.

Classes are known by name, not imported: libraries move them between modules, and this package does not need them. A subclass, a class of
somebody else's, an extra parameter, buffer or submodule, a hook or a replaced ``forward`` is not what a catalogue describes; linear layers
may have them, and adapters: such ones are called.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from ...modules import is_linear, passed_over, refused

__all__ = ["ACTIVATION", "BLOCKS", "HEAD", "LEAVES", "Catalogue", "Parts", "check_convolution", "class_name", "refused"]

ACTIVATION = (  # of each element by itself
    *("GELU", "GELUTanh", "QuickGELU", "ReLU", "SiLU", "Sigmoid", "Swish", "Tanh"),
    *(f"{name}Activation" for name in ("GELU", "NewGELU", "FastGELU", "QuickGELU", "SiLU")),  # transformers'
)
BLOCKS = ("Sequential", "ModuleList")
HEAD = None  # runs on the restored grid, by the model itself


@dataclass(frozen=True)
class Parts:
    """The submodules of a class, each with the classes it may have, and its own parameters and buffers."""

    children: Mapping[str, tuple[str, ...] | None] = field(default_factory=dict)
    tensors: frozenset[str] = frozenset()


LEAVES = {
    **{name: Parts(tensors=frozenset({"weight", "bias"})) for name in ("Linear", "Conv2d", "LayerNorm")},
    **{name: Parts() for name in (*ACTIVATION, *BLOCKS, "Identity", "Dropout", "DropPath")},
}


def class_name(module: nn.Module) -> str:
    """The bare name of a class of timm's or PyTorch's; that of any other with its module, so that no table knows it."""
    kind = type(module)
    if kind.__module__.startswith(("timm.", "torch.nn.modules.")) or kind.__module__ == "transformers.activations":
        return kind.__name__
    return f"{kind.__module__}.{kind.__qualname__}"


def check_convolution(proj: Any, path: str) -> None:
    """Refuse a patch embedding that is no square, non-overlapping convolution."""
    size = proj.kernel_size
    found = proj.stride, proj.groups, proj.dilation, size[1]
    if found != (size, 1, (1, 1), size[0]) or proj.padding not in ((0, 0), "valid"):
        raise refused(path, "Conv2d", f"expected square patches side by side, got {proj}")


@dataclass(frozen=True)
class Catalogue:
    """What the models of one library are made of."""

    parts: Mapping[str, Parts]
    lists: Mapping[str, tuple[str, ...]]  # the blocks that a list in a class may hold
    reasons: Mapping[str, str]  # why a class is not among the parts
    models: tuple[str, ...]
    name: Callable[[nn.Module], str] = class_name

    def check(self, model: nn.Module) -> None:
        """Refuse a model with any part, parameter or hook that the packed runner would pass over.

        NotImplementedError names the part, its class, and why.
        """
        self._check(model, "vit", self.models, ())

    def _check(self, module: nn.Module, path: str, allowed: tuple[str, ...], items: tuple[str, ...]) -> None:
        name = self.name(module)
        if name not in allowed:
            raise refused(path, name, self.reasons.get(name, f"expected {' or '.join(allowed)}"))
        parts = self.parts[name]
        for key, tensor in {**module._parameters, **module._buffers}.items():
            if tensor is not None and key not in parts.tensors:
                raise refused(f"{path}.{key}", name, "it is not expected to have this parameter or buffer")
        reason = passed_over(module)
        if reason is not None and not name.endswith(("Norm", "NormFp32")):  # norms with hooks are called
            raise refused(path, name, reason)
        for key, child in module.named_children():
            where = f"{path}.{key}"
            kinds = items if name in BLOCKS else parts.children.get(key, ())
            if kinds == ():
                raise refused(where, self.name(child), f"{name} is not expected to have it")
            if kinds is not HEAD and not (kinds == ("Linear",) and is_linear(child)):
                self._check(child, where, kinds, self.lists.get(name, ()))
