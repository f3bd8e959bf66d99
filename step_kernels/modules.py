"""Modules whose tensors ops read without calling them: a hook, an adapter or another part there must not be passed over in silence."""

from __future__ import annotations

import operator
from weakref import WeakKeyDictionary

from torch import nn
from torch.utils.hooks import RemovableHandle

HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
WATCHING = "transformers.utils.output_capturing"  # hooks of this module record outputs, and change nothing
_hooks_of = operator.itemgetter(*HOOKS)
_untouched: WeakKeyDictionary[nn.Module, tuple[int, tuple[nn.Module, ...]]] = WeakKeyDictionary()


def refused(path: str, name: str, reason: str) -> NotImplementedError:
    return NotImplementedError(f"{path}: {name} does not run on packed tokens: {reason}")


def passed_over(module: nn.Module) -> str | None:
    """What would not happen if nobody called the module: its hooks, a ``forward`` put in place of its class's. None: nothing."""
    own = module.__dict__
    for kind in HOOKS:
        if own.get(kind) and any(getattr(hook, "__module__", None) != WATCHING for hook in own[kind].values()):
            return "it has hooks, and nothing calls it"
    if "forward" in own and getattr(own["forward"], "__func__", None) is not type(module).forward:
        return "its forward was replaced, and nothing calls it"
    return None


def are_untouched(owner: nn.Module, modules: tuple[nn.Module, ...]) -> bool:
    """No hook and no replaced ``forward`` of the owner and the modules inside it. Looks at hooks again once any was registered, anywhere."""
    found = RemovableHandle.next_id, modules
    if _untouched.get(owner) != found:
        if any([any(_hooks_of(module.__dict__)) for module in (owner, *modules)]):
            return False
        _untouched[owner] = found
    return "forward" not in owner.__dict__ and not any(["forward" in module.__dict__ for module in modules])


def is_pytorchs(found: type, kind: type) -> bool:
    """Whether a class is PyTorch's ``kind``, or timm's of the same name, which computes the same."""
    return found is kind or (found.__name__ == kind.__name__ and found.__module__.startswith("timm.layers."))


def is_plain(module: nn.Module, kind: type) -> bool:
    """Whether the module is that layer and nothing else: else (adapters, hooks, parametrised or pruned weights) it has to be called."""
    if not is_pytorchs(type(module), kind) or "forward" in module.__dict__:
        return False
    hooked = module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    return not hooked  # by their names, which torch.compile can trace


def is_linear(module: nn.Module) -> bool:
    """A linear layer, also with an adapter: one that derives from PyTorch's (parametrised, say) or wraps it as ``base_layer`` (LoRA in peft)."""
    return isinstance(module, nn.Linear) or isinstance(getattr(module, "base_layer", None), nn.Linear)


def check_uncalled(path: str, module: nn.Module, kind: type | None = None) -> None:
    """Refuse, by its path, what nobody calls and what has hooks, another ``forward``, or another class than its owner expects (``kind``).

    ``uncalled``, an attribute of a module's class, says which of its submodules are read and not called, each with its class.

    Raises:
        NotImplementedError: its path, class and why.
    """
    name = type(module).__name__
    if kind is not None and type(module) is not kind:
        name = f"{type(module).__module__}.{name}" if name == kind.__name__ else name  # peft's Conv2d
        raise refused(path, name, f"expected {kind.__name__}, which is read and not called")
    reason = passed_over(module)
    if reason is not None:
        raise refused(path, name, reason)
    for child, expected in getattr(type(module), "uncalled", {}).items():
        check_uncalled(f"{path}.{child}", getattr(module, child), expected)
