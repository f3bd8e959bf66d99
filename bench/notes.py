"""What a reader has to know to read the main job's rows rightly."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from .case import Case
from .schema import Row
from .settings import PATCH_SIZE

BASELINE = "dense"
MISSED_BY = 0.05  # a reduction of the tokens that is further off the asked one gets a note
BUSY_NOTE = "This machine was busy with other work"
BUSY_SHARE = 0.5  # of the cores, by load average before the start; above it other work has touched the times


def busy_notes(device: str, facts: Mapping[str, object]) -> list[str]:
    """One sentence where other work has touched the times of a CPU, for any job.

    Args:
        device: that was measured.
        facts: of `bench.environment.describe`, before the start.
    """
    load, cores = facts["load_average"], facts["cores"]
    if device == "cpu" and isinstance(load, float) and isinstance(cores, int) and load > BUSY_SHARE * cores:
        return [f"{BUSY_NOTE} (load {load} before the start): times are too long, and their ratios may be others."]
    return []


def notes_of(case: Case, rows: Sequence[Row]) -> list[str]:
    """One sentence or two each; what the machine and the pictures have to say comes on top of it."""
    settings = case.settings
    notes = [
        f"Weights are random (seed {settings.seed}): labels mean nothing, speed does not depend on them.",
        "dense is the same ViT and decoder in plain PyTorch (eager, scaled_dot_product_attention).",
        "All contenders share one output tail, step_kernels.upsample_argmax, so that a faster tail is not credited to "
        f"saved tokens. {_tail_note(rows)}",
        *_input_notes(len(case.inputs), case.inputs[0].shape[0], rows),
        "GFLOPs: matmuls and convolutions, attention's two matmuls counted, 1 MAC = 2 FLOPs, without the tail. "
        "realised = speed-up / fewer FLOPs.",
    ]
    if settings.policy == "given":
        notes.append("The policy's layouts are given: computed before the clock starts.")
    elif settings.policy != "none":
        notes.append(f"The {settings.policy} policy is executed and counted in every timed call.")
    reached = max((settings.size // PATCH_SIZE) ** 2 / row.tokens_mean for row in rows)
    if settings.policy != "none" and abs(reached / settings.tokens - 1) > MISSED_BY:
        notes.append(
            f"--tokens {settings.tokens:g} was not reached: on these photographs the policy leaves "
            f"{reached:.3g} times fewer tokens."
        )
    if settings.exits:
        notes.append(
            f"Untrained confidences mean nothing: the exit thresholds are set so that {settings.halt:.0%} of the tokens "
            f"halt after block {', '.join(map(str, settings.exits))}."
        )
    return notes


def _input_notes(inputs: int, batch: int, rows: Sequence[Row]) -> list[str]:
    """What was timed and what was compared, of everything that rotates."""
    notes = [
        f"Every contender repeats the same recorded decisions; {inputs} inputs rotate, from round to round the next one: the same "
        "pictures as they are, mirrored, and turned, so that a picture has about as many tokens in each of them. Rounds go forth and back "
        "through the contenders in one process. Before every timed call the input is written anew, with its colours exchanged and its "
        "brightness changed at random.",
        f"The gate runs every input and compares one image of it with the oracle, over all inputs {min(batch, inputs)} of the "
        f"{batch} positions in the batch, drawn anew in every run; after the clock one image of one timed answer. Free runs are of the "
        "first and the last input, by the code that recorded the decisions: they show that it decides alike again.",
    ]
    timed = max((row.rounds for row in rows if row.rounds is not None), default=inputs)
    if timed < inputs:
        notes.append(f"The clock saw {timed} of the {inputs} inputs, the same ones for every contender.")
    return notes


def _tail_note(rows: Sequence[Row]) -> str:
    timed = [row for row in rows if row.realised_without_tail is not None and row.provider != BASELINE]
    if not timed:
        return "It is in every time."
    without = ", ".join(f"{row.provider} {row.realised_without_tail:.2f}" for row in timed)
    return f"It takes {timed[0].tail_ms:.0f} ms of every time and no GFLOPs; realised without it: {without}."
