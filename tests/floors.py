"""An op on its floors: what it returns on the reference, and the one comparison that every kernel is held to."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
from gpu.syncs import no_sync
from tensors import error_rule
from torch import Tensor

import step_kernels as sk


def reference(function: Callable[..., Any], *arguments: Any, **named: Any) -> Any:
    """What ``function`` returns where every op of it runs its reference."""
    with sk.use_backend("reference"):
        return function(*arguments, **named)


def changed(value: Any, change: Callable[[Any], Any]) -> Any:
    """The same with every tensor and layout changed, in sequences and dictionaries too."""
    if isinstance(value, Tensor | sk.SupertokenLayout):
        return change(value)
    if isinstance(value, list | tuple):
        return type(value)(changed(item, change) for item in value)
    if isinstance(value, dict):
        return {name: changed(item, change) for name, item in value.items()}
    return value


def double(value: Any) -> Any:
    """Floating-point tensors in fp64."""
    return changed(value, lambda x: x.double() if isinstance(x, Tensor) and x.is_floating_point() else x)


def hold(
    run: Callable[..., Sequence[Tensor]],
    *arguments: Any,
    exact: Sequence[Any] | None = None,
    device: str = "cpu",
    plain_device: str = "cpu",
) -> Sequence[Tensor]:
    """What ``run`` returns on the backend in force, each tensor found within the error rule.

    Truth: the reference in fp64, of ``exact`` where converting the arguments does not give it. Yardstick: the reference in the arguments'
    dtypes; on the GPU where a vendor's matmul takes part on both sides. On a GPU the call is made without one wait for the device.
    """
    truths = reference(run, *double(exact or arguments))
    plains = reference(run, *changed(arguments, lambda x: x.to(plain_device)))
    given = changed(arguments, lambda x: x.to(device))
    if device == "cpu":
        found = run(*given)
    else:
        run(*given)  # compiles
        with no_sync():
            found = run(*given)
    for ours, plain, truth in zip(found, plains, truths, strict=True):
        assert ours.stride() == plain.stride()
        error_rule(ours.cpu(), plain.cpu(), truth)
    return found


@contextlib.contextmanager
def refused(error: type[Exception], words: Sequence[str]) -> Iterator[None]:
    """What is done inside raises, and the message holds these words."""
    with pytest.raises(error) as caught:
        yield
    for word in words:
        assert word in str(caught.value)
