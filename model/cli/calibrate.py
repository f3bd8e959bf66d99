"""`step-kernels calibrate`: thresholds for a budget, kept in the checkpoint."""

from __future__ import annotations

import argparse

from step_kernels_cli import UsageError

from ..checkpoints import save_checkpoint
from ..checkpoints.files import SUFFIXES
from ..train.calibration import calibrate_exits, calibrate_policy
from .device import checked_device
from .pictures import check_writable
from .sources import Unlabelled, batches, open_data, trained

__all__ = ["run"]


def run(options: argparse.Namespace) -> int:
    """0, or UsageError where nothing can be as asked."""
    wanted = {name: getattr(options, name) for name in ("reduction", "purity", "halted", "points")}
    if all(value is None for value in wanted.values()):
        raise UsageError("one of --reduction, --purity, --halted, --points is needed")
    if options.unlabelled is not None and options.data is not None:
        raise UsageError("one of --data and --unlabelled is wanted, not both")
    check_writable(options.out.parent)
    if options.out.suffix in SUFFIXES[1:] or (options.out.suffix not in SUFFIXES and options.out.is_file()):
        raise UsageError(f"--out expects a folder or a file named *.safetensors, got {options.out}")
    segmenter = trained(options, checked_device(options.device))
    ignored = {"ignore_index": options.ignore_index}
    if options.unlabelled is not None:
        data = Unlabelled(options.unlabelled)
    else:
        data = open_data(options, segmenter.num_classes, options.split)
    try:
        if options.reduction is not None or options.purity is not None:
            read = batches(segmenter, data, options.batch, "policy")
            found = calibrate_policy(segmenter, read, reduction=options.reduction, purity=options.purity, **ignored)
            print(f"policy: thresholds {', '.join(f'{value:.4g}' for value in found)}")
        if options.halted is not None or options.points is not None:
            several = {"halted": options.halted, "points": options.points}
            threshold = calibrate_exits(
                segmenter, lambda: batches(segmenter, data, options.batch, "exits"), **several, **ignored
            )
            print(f"exits: threshold {threshold:.6g}")
        print(save_checkpoint(segmenter, options.out, info=segmenter.info))
    except (TypeError, ValueError, NotImplementedError, OSError) as error:
        raise UsageError(str(error)) from None
    return 0
