"""Contenders of the main job that are wrong, skip work, or keep answers, and by what the gate must find them."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from bench.case import Case
from bench.images import VIEWS
from bench.providers import Contender
from step_kernels import upsample_argmax
from step_kernels.model import Trace

Scores = Callable[[Tensor, Trace], Tensor]


def with_scores(contender: Contender, change: Callable[[Tensor], Tensor]) -> Contender:
    return dataclasses.replace(contender, scores=lambda images, trace: change(contender.scores(images, trace)))


def with_labels(contender: Contender, change: Callable[[Tensor], Tensor]) -> Contender:
    return dataclasses.replace(contender, labels=lambda images, trace: change(contender.labels(images, trace)))


def cached(contender: Contender) -> Contender:
    """Computes the first input and returns that answer ever after."""
    kept: list[Tensor] = []

    def scores(images: Tensor, trace: Trace) -> Tensor:
        if not kept:
            kept.append(contender.scores(images, trace))
        return kept[0]

    return dataclasses.replace(contender, scores=scores)


def skipping_blocks(contender: Contender, case: Case, kept: slice) -> Contender:
    """Runs some of the blocks."""

    def scores(images: Tensor, trace: Trace) -> Tensor:
        blocks = case.vit.blocks
        case.vit.blocks = blocks[kept]
        try:
            return contender.scores(images, trace)
        finally:
            case.vit.blocks = blocks

    return dataclasses.replace(contender, scores=scores)


def halving_the_blocks(contender: Contender, case: Case) -> Contender:
    """Does half of the work."""
    half = len(case.vit.blocks) // 2
    return with_labels_of(skipping_blocks(contender, case, slice(half)))


def repeating_one_image(contender: Contender) -> Contender:
    """Computes one image of the batch, which takes no trace of the whole batch: here from the right answer."""
    changed = with_scores(contender, lambda scores: scores[:1].expand_as(scores))
    return with_labels(changed, lambda labels: labels[:1].expand_as(labels))


def keeping_answers(contender: Contender) -> Contender:
    """Right about every input that it has seen, and never computes one twice."""
    kept: dict[tuple[str, int], Tensor] = {}

    def keep(name: str, function: Scores) -> Scores:
        def call(images: Tensor, trace: Trace) -> Tensor:
            key = name, images.data_ptr()
            if key not in kept:
                kept[key] = function(images, trace)
            return kept[key]

        return call

    return dataclasses.replace(
        contender, scores=keep("scores", contender.scores), labels=keep("labels", contender.labels)
    )


def wrong_on(contender: Contender, images: Tensor, position: slice = slice(None)) -> Contender:
    """Takes another class for every pixel of some images of one input."""

    def change(function: Scores, by: float) -> Scores:
        def call(given: Tensor, trace: Trace) -> Tensor:
            found = function(given, trace).clone()
            found[position if given is images else slice(0)] += by
            return found

        return call

    return dataclasses.replace(contender, scores=change(contender.scores, 1.0), labels=change(contender.labels, 1))


def with_labels_of(contender: Contender) -> Contender:
    """Its labels are those of its own scores."""

    def labels(images: Tensor, trace: Trace) -> Tensor:
        return upsample_argmax(contender.scores(images, trace), (images.shape[2], images.shape[3]))

    return dataclasses.replace(contender, labels=labels)


def keeping_answers_by_content(contender: Contender) -> Contender:
    """The same, whatever the input's address or version: who has seen all inputs takes the answer to the one that is most like it."""
    known: dict[str, list[tuple[Tensor, Tensor]]] = {"scores": [], "labels": []}

    def keep(name: str, function: Scores) -> Scores:
        def call(images: Tensor, trace: Trace) -> Tensor:
            if len(known[name]) < VIEWS:
                known[name].append((images.clone(), function(images, trace)))
                return known[name][-1][1]
            return min(known[name], key=lambda pair: float((pair[0] - images).abs().sum()))[1]

        return call

    return dataclasses.replace(
        contender, scores=keep("scores", contender.scores), labels=keep("labels", contender.labels)
    )


def honest_when_watched(contender: Contender, under_the_clock: Callable[[Tensor, Trace], Any]) -> Contender:
    """The gate asks for scores before it asks for labels, the clock for labels alone."""
    watched: list[bool] = []

    def scores(images: Tensor, trace: Trace) -> Tensor:
        watched.append(True)
        return contender.scores(images, trace)

    def labels(images: Tensor, trace: Trace) -> Tensor:
        if watched:
            watched.clear()
            return contender.labels(images, trace)
        return under_the_clock(images, trace)

    return dataclasses.replace(contender, scores=scores, labels=labels)


def computing_every_other_image(contender: Contender, case: Case) -> Contender:
    """That of its input's number, as a gate might look at it."""

    def alone(function: Scores) -> Scores:
        def call(images: Tensor, trace: Trace) -> Tensor:
            number = next(number for number, own in enumerate(case.inputs) if own is images)
            found = function(images, trace).clone()
            found[(number + 1) % len(found)] = 0
            return found

        return call

    return dataclasses.replace(contender, scores=alone(contender.scores), labels=alone(contender.labels))


class Later(Tensor):
    """Labels that are worked out when somebody looks at them."""

    function: Callable[[], Tensor]

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        with torch._C.DisableTorchFunctionSubclass():
            now = [one.function() if isinstance(one, Later) else one for one in args]
            return function(*now, **(kwargs or {}))


def putting_it_off(contender: Contender) -> Contender:
    def labels(images: Tensor, trace: Trace) -> Tensor:
        later = torch.empty_like(images[:, 0], dtype=torch.int32).as_subclass(Later)
        later.function = functools.partial(contender.labels, images, trace)
        return later

    return dataclasses.replace(contender, labels=labels)


DISHONEST: dict[str, Callable[[Contender, Case], Contender]] = {
    "wrong": lambda contender, case: with_labels_of(with_scores(contender, lambda scores: -scores)),
    "half of the blocks": halving_the_blocks,
    "one image, repeated": lambda contender, case: repeating_one_image(contender),
    "the first answer again": lambda contender, case: with_labels_of(cached(contender)),
    "answers kept by input": lambda contender, case: keeping_answers(contender),
    "answers kept by content": lambda contender, case: keeping_answers_by_content(contender),
    "zeros when not watched": lambda contender, case: honest_when_watched(
        contender, lambda images, trace: torch.zeros_like(images[:, 0], dtype=torch.int32)
    ),
    "nothing when not watched": lambda contender, case: honest_when_watched(contender, lambda images, trace: None),
    "work put off when not watched": lambda contender, case: honest_when_watched(
        contender, putting_it_off(contender).labels
    ),
    "work put off": lambda contender, case: putting_it_off(contender),
    "wrong on one input": lambda contender, case: wrong_on(contender, case.inputs[5]),
    "wrong in one place of the batch": lambda contender, case: functools.reduce(
        lambda wrong, images: wrong_on(wrong, images, slice(1, 2)), case.inputs, contender
    ),
}


# These give right answers to everything before the clock.
FOUND_BY_THE_CLOCK = (
    "answers kept by input",
    "answers kept by content",
    "zeros when not watched",
    "nothing when not watched",
    "work put off when not watched",
)
