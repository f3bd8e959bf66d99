"""A segmenter's whole prediction as one CUDA graph: static mode, recorded once, replayed on images with other token counts."""

from __future__ import annotations

import functools
import itertools
import threading
import weakref
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ... import checks, selected_backend
from ...backend import why_not_triton
from ...checks import check_tensor, describe
from ..policies.base import Policy
from ..trace import Batch, Trace
from .cuda_graph import CudaGraph

if TYPE_CHECKING:
    from ..segmenter import StepSegmenter

__all__ = ["CapturedSegmenter"]

FOLDED = "its policy's weights changed"


@dataclass(frozen=True, eq=False)
class Recording:
    """One recorded graph with everything that it reads and writes, which lives as long as it does."""

    graph: CudaGraph
    policy: nn.Module | None  # as deployed
    labels: Tensor
    decisions: Trace
    seen: Fingerprint


class CapturedSegmenter:
    """``segmenter.capture(images)``: `predict` as the replay of one CUDA graph, with no host sync.

    What it computes is `StepSegmenter.predict` in static mode; a `PolicyNet` runs in its `deployed` form, whose scores agree to rounding. The graph
    reads the segmenter's own parameters and thresholds: changes in place act at once, but for a policy's weights, which `refresh` folds again. What
    is no tensor is fixed at the capture: ``keep_per_class``, PyTorch's matmul precision, the backend.

    Several captures live side by side, each with a memory pool of its own. `predict` may be called from several threads and streams: calls of one
    capture run one after another, on the device too; those of different captures may overlap. During a capture or a `refresh`, one at a time in a
    process, no other thread may wait for the device: it would raise, or break the recording.

    Args:
        segmenter: on a CUDA device that runs the Triton kernels; shared, not copied.
        images: [B, C, H, W], contents like those to come: kernels choose tiles by the token counts of these.
        replay: record with decisions replayed; `predict` then takes a replay each time.

    Attributes:
        compile_seconds: what warm-up and recording took, the compilation of kernels included.
        memory_bytes: by how much the recording raised the device memory that PyTorch has reserved, and its inputs.

    Raises:
        TypeError, ValueError: as `StepSegmenter.predict`.
        RuntimeError: images not on a CUDA device, Triton kernels that cannot run there, ``STEP_KERNELS_CHECK=1``, or a
            policy, exit or decoder that waits for the host.
    """

    @torch.inference_mode(False)  # buffers made in inference mode could not be written outside of it
    @torch.no_grad()
    def __init__(self, segmenter: StepSegmenter, images: Tensor, replay: Trace | None = None) -> None:
        check_tensor("images", images, ("B", "C", "H", "W"))
        refuse_unless_capturable(images)
        if replay is not None and not isinstance(replay, Trace):
            raise TypeError(f"replay: expected a Trace or None, got {describe(replay)}")
        self._segmenter = segmenter
        self._lock = threading.Lock()
        self._images = images.contiguous().clone()
        self._replay = None if replay is None else replay.untrim().clone()
        self._counts: tuple[int, ...] = ()
        self._finalizer: weakref.finalize | None = None
        self._recording: Recording
        self._install(self._record())

    @property
    def batch_size(self) -> int:
        """The most images that one `predict` takes."""
        return self._images.shape[0]

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of the images."""
        return self._images.shape[1], self._images.shape[2], self._images.shape[3]

    @torch.no_grad()
    def predict(self, images: Tensor, replay: Trace | None = None) -> Tensor:
        """Labels of new images. Launches the graph on the current stream and returns without waiting for it.

        Args:
            images: [b, C, H, W], 1 <= b <= `batch_size`, else as captured. The time is that of `batch_size` images: the missing ones are blank.
            replay: decisions to repeat, for exactly `batch_size` images; given if and only if the capture had one.

        Returns:
            Class numbers [b, H, W] as `StepSegmenter.predict`; a new tensor, which no later call overwrites.

        Raises:
            TypeError, ValueError: images of another shape, dtype or device than captured; a replay that does not fit.
            RuntimeError: a module, parameter or buffer was replaced or moved, or a policy's weights changed, since the capture: call `refresh`.
                (Changes through ``.data``, or of tensors made in inference mode, go unnoticed in a policy; call it after those too.)
        """
        count = self._check_images(images)
        decisions = self._checked_replay(replay)
        with self._lock, self._recording.graph.turn():
            self._images[:count].copy_(images)
            if count < self.batch_size:
                self._images[count:].zero_()
            if self._replay is not None and decisions is not None:
                torch._foreach_copy_(self._replay.tensors(), decisions.tensors())
            self._recording.graph.replay()
            labels = self._recording.labels[:count].clone()
            what = self._recording.seen.changed()  # while the device works
        if what is not None:
            raise RuntimeError(f"predict: expected the segmenter as captured, but {what}; call refresh()")
        return labels

    @torch.inference_mode(False)  # a trace is for training, too
    @torch.no_grad()
    def trace(self) -> Trace:
        """The decisions of the last `predict` (of the capture before the first one), trimmed. Waits for the device.

        Blank images of a smaller batch are included. `Trace.token_counts` over typical images tells whether the images of
        the capture were like them.
        """
        with self._lock, self._recording.graph.turn():
            return self._recording.decisions.clone().trim()

    @torch.inference_mode(False)
    @torch.no_grad()
    def refresh(self) -> None:
        """Follow the segmenter after a change.

        Weights changed in place: the policy is folded again, the graph stays. Modules, parameters or buffers that were
        replaced or moved (``to``, ``load_state_dict(assign=True)``): the graph is recorded again, its tiles for the token
        counts of the first capture. For a change of anything but modules and tensors, capture anew.

        Raises:
            TypeError, ValueError, RuntimeError: as the capture; the segmenter's dtype or device is no longer the images'.
                The capture is then as before.
        """
        with self._lock:
            recording, policy = self._recording, self._segmenter.encoder.policy
            if recording.seen.changed() not in (None, FOLDED):
                self._install(self._record())
            elif isinstance(policy, Policy) and isinstance(recording.policy, Policy):
                with recording.graph.turn():
                    recording.policy.refresh_from(policy)
                recording.seen.follow()

    def _record(self) -> Recording:
        """A new recording of the segmenter as it is now."""
        segmenter, policy = self._segmenter, self._segmenter.encoder.policy
        deployed = policy.deployed() if isinstance(policy, Policy) else policy
        seen = Fingerprint(segmenter, folded=None if policy is deployed else policy)
        predict = segmenter.with_policy(deployed).decide_and_predict
        run = functools.partial(predict, self._images, self._replay, static=True)
        graph = CudaGraph(self._images.device)
        _, trace = graph.warm_up(run, syncs=True)
        if len(self._counts) != 1 + len(trace.stages):
            self._counts = trace.token_counts()
        run = functools.partial(run, expected_tokens=self._counts)
        graph.warm_up(run, syncs=True)  # with the tiles for these counts: other kernels, and their compilation
        try:
            graph.warm_up(run, syncs=False)
            labels, decisions = graph.record(run)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            what = "capture: the prediction cannot be recorded; a policy, an exit or a decoder waits for the host?"
            raise RuntimeError(f"{what} {error}") from error
        with graph.turn():
            graph.replay()  # recording runs nothing: until now its results hold nothing
        return Recording(graph, deployed, labels, decisions, seen)

    def _install(self, recording: Recording) -> None:
        if self._finalizer is not None:
            self._finalizer.detach()  # it holds on to the graph before
        self._recording = recording
        # The device may still be at work on what is freed with this object.
        self._finalizer = weakref.finalize(self, recording.graph.wait)
        self._finalizer.atexit = False
        self.compile_seconds = recording.graph.seconds
        inputs = [self._images, *([] if self._replay is None else self._replay.tensors())]
        self.memory_bytes = recording.graph.memory_bytes + sum(tensor.nbytes for tensor in inputs)

    def _check_images(self, images: Tensor) -> int:
        check_tensor("images", images, ("b", *self.image_shape), like=self._images, like_name="the captured images")
        count, most = images.shape[0], self.batch_size
        if not 1 <= count <= most:
            raise ValueError(f"images: expected 1 to {most} images, as many as were captured, got {count}")
        if self._replay is not None and count != most:
            raise ValueError(f"images: expected {most} images with a replay, got {count}")
        return count

    def _checked_replay(self, replay: Trace | None) -> Trace | None:
        recorded = self._replay
        if (recorded is None) != (replay is None):
            expected = "None" if recorded is None else "a Trace"
            raise ValueError(f"replay: expected {expected}, as when captured, got {describe(replay)}")
        if recorded is None or replay is None:
            return None
        if not isinstance(replay, Trace):
            raise TypeError(f"replay: expected a Trace, got {describe(replay)}")
        layout = recorded.layout
        batch = Batch(self.batch_size, layout.grid, layout.num_prefix, layout.device)
        replay.check(batch, [stage.block for stage in recorded.stages], trimmed=False)
        return replay.untrim()


class Fingerprint:
    """``root`` as a graph has seen it: its modules and hooks, where its tensors lie, and how often ``folded``'s were changed in place.

    A graph reads the values of tensors each time, but of ``folded`` it reads a copy. Every prediction looks: no walk over modules.
    """

    def __init__(self, root: nn.Module, folded: nn.Module | None) -> None:
        parts, sizes, places = list[tuple[str, Any]](), list[tuple[str, Any]](), list[tuple[str, Any]]()
        for path, module in root.named_modules():
            where = path or "the segmenter"
            parts.append((f"a submodule of {where} was replaced", module._modules))
            hooks = module._forward_pre_hooks, module._forward_hooks
            parts += ((f"a hook of {where} came or went", own) for own in hooks)
            for own in (module._parameters, module._buffers):
                sizes.append((f"a tensor of {where} came or went", own))
                places += ((f"{path}.{name} moved".removeprefix("."), (own, name)) for name in own)
        inner = [] if folded is None else [own for x in folded.modules() for own in (x._parameters, x._buffers)]
        # Thresholds are shared, not folded.
        versions = [(FOLDED, (own, name)) for own in inner for name in own if not name.startswith("threshold")]
        lists = parts, sizes, places, versions
        self._words = [what for what, _ in itertools.chain(*lists)]
        self._parts, self._sizes, self._places, self._versions = ([one for _, one in found] for found in lists)
        # Aliases hold on to the memory that the graph reads.
        self._held = [tensor.detach() for tensor in itertools.chain(root.parameters(), root.buffers())]
        self.follow()

    def follow(self) -> None:
        """What the graph reads is as it is now."""
        self._then = [dict(one) if isinstance(one, dict) else one for one in self._now()]

    def changed(self) -> str | None:
        """What is no longer as it was, in words; `FOLDED` when it is that alone, None when nothing is. No tensor is read."""
        now = self._now()
        if now == self._then:
            return None
        return next(what for what, one, then in zip(self._words, now, self._then, strict=True) if one != then)

    def _now(self) -> list[Any]:
        """Modules and hooks, which compare by identity; how many tensors; their addresses; versions, which inference mode does not count."""
        addresses = [None if (x := own.get(name)) is None else x.data_ptr() for own, name in self._places]
        folded = [own.get(name) for own, name in self._versions]
        versions = [None if x is None or x.is_inference() else x._version for x in folded]
        return [*self._parts, *map(len, self._sizes), *addresses, *versions]


def refuse_unless_capturable(images: Tensor) -> None:
    """RuntimeError, with the reason, where static mode cannot be a CUDA graph."""
    device = images.device
    if device.type != "cuda":
        raise RuntimeError(
            f"capture: expected images on a CUDA device, got {device}; predict(images) runs on any device"
        )
    if selected_backend("ragged_linear", device, images.dtype) != "triton":
        reason = why_not_triton(device, images.dtype) or "the backend is set to 'reference'"
        raise RuntimeError(f"capture: expected Triton kernels, whose token counts stay on the device, but {reason}")
    if checks.values():
        raise RuntimeError("capture: expected STEP_KERNELS_CHECK unset, since its checks wait for the host, got 1")
