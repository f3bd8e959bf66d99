"""``step-kernels COMMAND``, which ``python -m step_kernels`` and ``python -m step_kernels.model`` are, too.

Beside the package, whose import takes PyTorch's: here the words are read first, so that help and typing errors take no time. A command is
a line in `COMMANDS`, a function that adds its words to a parser, and the module whose ``run(given)`` returns the exit status.
"""

from __future__ import annotations

import argparse
import faulthandler
import importlib
import io
import sys
from collections.abc import Callable, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

PRESETS = ("tiny", "small", "base", "large")  # of ViT.preset
DTYPES = ("float32", "bfloat16", "float16")


class UsageError(Exception):
    """What was asked cannot be run; the message is one line that says why and what would work."""


class OneLineParser(argparse.ArgumentParser):
    """argparse without the usage text in front of an error."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message} (see {self.prog} --help)")


def main(arguments: Sequence[str] | None = None, *, otherwise: str = "--help") -> int:
    """Runs the command that the first word names, or ``otherwise`` where there are no words.

    Returns:
        The command's status: 0, or 1 when a part of the work failed; 2, with one line on stderr, for what cannot be run;
        130 when interrupted.
    """
    if arguments is None:
        faulthandler.enable()  # where a compiler or the driver dies: in which call
    words = list(sys.argv[1:] if arguments is None else arguments) or [otherwise]
    return told("step-kernels", lambda: run(parser().parse_args(words)))


def run(given: argparse.Namespace) -> int:
    return importlib.import_module(COMMANDS[given.command].module).run(given)


def told(name: str, run: Callable[[], int]) -> int:
    """The exit status of ``run()``, or of what ended it, in one line on stderr."""
    if isinstance(sys.stdout, io.TextIOWrapper):  # a letter that the terminal lacks becomes its number, as on stderr
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        return run()
    except (UsageError, ImportError, OSError) as error:  # a missing package (import_extra tells which), a full disk
        # One line, whatever line breaks a path or a package has put into the reason.
        print(f"{name}: " + " ".join(line for line in str(error).splitlines() if line), file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"{name}: interrupted", file=sys.stderr)
        return 130


def parser() -> OneLineParser:
    made = OneLineParser(prog="step-kernels", description="Vision Transformers on fewer tokens.")
    made.add_argument("--version", action=Version, nargs=0, help="show this package's version and exit")
    commands = made.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, command in COMMANDS.items():
        command.add_words(commands.add_parser(name, help=command.about, description=command.description))
    return made


class Version(argparse.Action):
    def __call__(self, *_: Any) -> NoReturn:
        try:
            version = metadata.version("step-kernels")
        except metadata.PackageNotFoundError:  # a checkout that is not installed
            from step_kernels import __version__ as version
        print("step-kernels", version)
        sys.exit()


def image_size(text: str) -> tuple[int, int]:
    """(height, width) of "512" or "512x768"."""
    try:
        sizes = [int(part) for part in text.split("x")]
    except ValueError:
        sizes = []
    if len(sizes) not in (1, 2) or min(sizes) < 1:
        raise argparse.ArgumentTypeError(f"expects positive pixels such as 512, or HEIGHTxWIDTH, got {text!r}")
    return sizes[0], sizes[-1]


def channel_values(text: str) -> tuple[float, ...]:
    """Red, green and blue of "0.485,0.456,0.406"."""
    try:
        values = tuple(float(part) for part in text.split(","))
    except ValueError:
        values = ()
    if len(values) != 3 or not all(0 <= value <= 1 for value in values):
        raise argparse.ArgumentTypeError(
            f"expects red,green,blue for pixels scaled to 0..1, such as 0.5,0.5,0.5, got {text!r}"
        )
    return values


def deviations(text: str) -> tuple[float, ...]:
    """`channel_values` to divide by."""
    values = channel_values(text)
    if 0 in values:
        raise argparse.ArgumentTypeError(f"expects positive values, got {text}")
    return values


def at_least(least: float) -> Callable[[str], float]:
    """A finite number of the kind of ``least``, int or float, and no smaller."""

    def number(text: str) -> float:
        try:
            value = type(least)(text)
        except ValueError:
            value = least - 1
        if not least <= value < float("inf"):
            raise argparse.ArgumentTypeError(f"expects a number of at least {least}, got {text!r}")
        return value

    return number


def add_no_words(parser: argparse.ArgumentParser) -> None:
    """Of a command that takes none."""


def window_size(text: str) -> tuple[int, int] | str:
    """(height, width), or "whole"."""
    return text if text == "whole" else image_size(text)


def resize_size(text: str) -> tuple[int, int] | int | str:
    """Of "512" the shorter side alone; or "own"."""
    if text == "own":
        return text
    return image_size(text) if "x" in text else image_size(text)[0]


def add_words_of_views(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    what = "run on crops of this size, such as 512 or 512x1024 (height x width), or whole (default: as the checkpoint tells)"
    add("--window", type=window_size, help=what)
    add("--stride", type=image_size, help="pixels from crop to crop; overlaps are averaged (default: --window)")
    what = "run at N pixels of the shorter side, with M at most M of the longer one, or at its own size (default: as the checkpoint tells); labels keep the picture's size"
    add("--resize", type=resize_size, metavar="N[xM]|own", help=what)
    add(
        "--scales",
        type=numbers,
        default=(1.0,),
        metavar="A,B",
        help="average over these factors of the size (default: 1)",
    )
    add("--mirror", action="store_true", help="average with the mirrored picture")


def add_words_of_checkpoint(parser: argparse.ArgumentParser) -> None:
    """What its file may not tell."""
    add = parser.add_argument
    add("--mean", type=channel_values, help="red,green,blue in 0..1 (default: the checkpoint's, else ImageNet's)")
    add("--std", type=deviations, help="standard deviations likewise")
    add("--img-size", type=image_size, help="that position embeddings are for, where the checkpoint does not tell")
    add("--num-heads", type=at_least(1), metavar="N", help="attention heads, where the checkpoint does not tell")
    add("--quota", type=at_least(0), metavar="N", help="CTS: 2x2 blocks merged per image, where no variant.yml tells")
    add(
        "--prefix",
        metavar="NAME.",
        help="before the names of the tensors to read, where a checkpoint has several models",
    )


def add_words_of_predict(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("checkpoint", type=Path, metavar="CHECKPOINT", help="file or folder")
    add("images", nargs="+", metavar="IMAGE", help="pictures, folders of them, or patterns such as 'photos/**/*.jpg'")
    add("--out", type=Path, required=True, metavar="DIR", help="folder for the results, made if missing")
    add(
        "--reduction",
        type=at_least(1.0),
        metavar="N",
        help="merge to N times fewer tokens, in the calm parts of the pictures",
    )
    add("--compare", action="store_true", help="also label densely: how many pixels agree, and what either way takes")
    add("--palette", help="cityscapes, voc, none, or a file of lines R G B or #rrggbb (default: the checkpoint's)")
    add("--overlay", action="store_true", help="also write DIR/NAME_overlay.png: picture and colours, half and half")
    add_words_of_views(parser)
    add("--max-crops", type=at_least(1), metavar="N", help="crops that run at a time (default: all of a picture)")
    add("--device", help="cpu, cuda or cuda:N (default: cuda if there is one)")
    add("--dtype", choices=DTYPES, help="of weights and images (default: the checkpoint's)")
    add_words_of_checkpoint(parser)


def add_words_of_tune(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--model", default="large", metavar="NAME", help="tiny, small, base, large or a timm model (default: large)")
    add("--size", type=at_least(1), default=1024, metavar="N", help="height and width in pixels (default: 1024)")
    add("--batch", type=at_least(1), default=8, metavar="N", help="images at a time (default: 8)")
    add("--classes", type=at_least(1), default=150, metavar="N", help="of the exits and the canvas (default: 150)")
    add("--dtype", choices=DTYPES, default="bfloat16", help="of the model (default: bfloat16)")
    add("--minutes", type=at_least(0.01), default=5.0, metavar="N", help="to take, about (default: 5)")
    what = "default: the file that kernels read (STEP_KERNELS_TUNED, or the user's cache)"
    add("--out", type=Path, metavar="FILE", help=what)


def numbers(text: str) -> list[float]:
    """Of "1.5,2,2.5"."""
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"expects numbers such as 1.5,2, got {text!r}") from None


def integers(text: str) -> list[int]:
    """Of "3,6,9"."""
    found = numbers(text)
    if not all(number.is_integer() for number in found):
        raise argparse.ArgumentTypeError(f"expects whole numbers such as 3,6,9, got {text!r}")
    return [int(number) for number in found]


def add_words_of_data(parser: argparse.ArgumentParser, split: str, batch: int = 1) -> None:
    add = parser.add_argument
    add("--data", metavar="DIR", help="folder of pictures and labels, or scenes:COUNT:SIZE:SEED, which are generated")
    add("--split", default=split, help=f"part of the data (default: {split})")
    layouts = ("folders", "cityscapes", "ade20k")
    add("--layout", choices=layouts, help="of the folder (default: as its folders are called)")
    add("--ignore-index", type=at_least(0), default=255, metavar="N", help="label of no class (default: 255)")
    add("--batch", type=at_least(1), default=batch, metavar="N", help=f"pictures at a time (default: {batch})")
    add("--device", help="cpu, cuda or cuda:N (default: cuda if there is one)")
    add("--dtype", choices=DTYPES[:2], help="of the model (default: the checkpoint's; in training bfloat16 on a GPU)")


def add_words_of_train(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--out", type=Path, required=True, metavar="DIR", help="folder for checkpoints and log, made if missing")
    add("--smoke", action="store_true", help="instead of all else: the whole recipe on generated scenes, in minutes")
    add("--init", metavar="CHECKPOINT", help="file or folder, or timm:NAME for pretrained weights")
    add("--stage", choices=("heads", "policy", "exits", "all"), help="what learns: see docs/training.md")
    add_words_of_data(parser, "train", 8)
    add("--val-split", help="evaluate on this part after each epoch")
    add("--classes", type=at_least(1), metavar="N", help="number of classes; another than the decoder's: new heads")
    add("--decoder", choices=("linear", "mask"), default="linear", help="made where there is none (default: linear)")
    add("--exits", type=integers, metavar="N,N", help="blocks that new exits follow")
    add(
        "--policy", action="store_true", help="add an untrained policy where there is none, in other stages than policy"
    )
    add("--sides", type=integers, metavar="N,N", help="block sides of a new policy (default: 2,4,8,16)")
    add("--epochs", type=at_least(1), default=10, metavar="N", help="passes over the data (default: 10)")
    add("--lr", type=at_least(0.0), metavar="X", help="peak learning rate (default: 1e-3; stage all: 5e-5)")
    add("--weight-decay", type=at_least(0.0), default=0.05, metavar="X", help="of matrices (default: 0.05)")
    add("--warmup", type=at_least(0.0), default=0.05, metavar="X", help="share of the steps (default: 0.05)")
    add("--clip", type=at_least(0.0), default=1.0, metavar="X", help="norm of the gradients; 0: none (default: 1)")
    add("--accumulate", type=at_least(1), default=1, metavar="N", help="batches per step (default: 1)")
    add("--layer-decay", type=at_least(0.0), default=1.0, metavar="X", help="of the rate, per block (default: 1)")
    add("--ema", type=at_least(0.0), default=0.0, metavar="X", help="decay of averaged weights (default: 0, none)")
    add("--exit-weight", type=at_least(0.0), default=0.4, metavar="X", help="of each exit's loss (default: 0.4)")
    add(
        "--consistency",
        type=at_least(0.0),
        default=0.0,
        metavar="X",
        help="weight of the loss against dense (default: 0)",
    )
    add(
        "--tolerance",
        type=at_least(0.0),
        default=0.0,
        metavar="X",
        help="policy: learn what merging a block would cost, rare classes more, worth its tokens up to this (default: 0, "
        "learn which blocks are of one class)",
    )
    add("--views", type=at_least(0), default=2, metavar="N", help="kept features per picture; 0: none are (default: 2)")
    add("--crop", type=image_size, metavar="HxW", help="of the pictures (default: none, for one size and --scale 1,1)")
    add("--scale", type=numbers, default=[0.5, 2.0], metavar="A,B", help="range of random sizes (default: 0.5,2)")
    add("--no-flip", action="store_true", help="no mirror images")
    add("--no-colour", action="store_true", help="no changes of colour")
    add("--workers", type=at_least(0), default=0, metavar="N", help="processes that read pictures (default: 0)")
    add("--seed", type=at_least(0), default=0, metavar="N", help="of all draws (default: 0)")
    add("--resume", action="store_true", help="go on from DIR/train.state, where there is one")
    add("--dry-run", action="store_true", help="one batch: sizes, memory, seconds per epoch; nothing is written")
    add_words_of_checkpoint(parser)


def add_words_of_calibrate(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("checkpoint", type=Path, metavar="CHECKPOINT", help="file or folder")
    add("--out", type=Path, required=True, metavar="FILE", help="folder or *.safetensors, with the new thresholds")
    add_words_of_data(parser, "val")
    add(
        "--unlabelled",
        metavar="DIR",
        help="pictures without labels, or a pattern: points are percent of changed labels then",
    )
    add("--reduction", type=at_least(1.0), metavar="N", help="policy: so many times fewer tokens")
    add("--purity", type=at_least(0.0), metavar="X", help="policy: this share of merged blocks holds one class")
    add("--halted", type=at_least(0.0), metavar="X", help="exits: this share of the supertokens halts")
    add("--points", type=at_least(0.0), metavar="X", help="exits: at most so many mIoU points lost")
    add_words_of_checkpoint(parser)


def add_words_of_evaluate(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("checkpoint", type=Path, metavar="CHECKPOINT", help="file or folder")
    add("--out", type=Path, metavar="FILE", help="JSON, and a plot beside it")
    add_words_of_data(parser, "val")
    add_words_of_views(parser)
    names = "dense,merged,merged + exits,random merging,random halting,variance,oracle"
    add("--variants", type=lambda text: text.split(","), metavar="A,B", help=f"some of {names}")
    add("--reductions", type=numbers, metavar="N,N", help="also with the policy at so many times fewer tokens")
    add("--halts", type=numbers, metavar="X,X", help="also with such shares halted at the exits")
    add("--calibrate-split", default="train", help="part that those thresholds are chosen on (default: train)")
    add("--border", type=at_least(1), default=3, metavar="N", help="pixels that are near a border (default: 3)")
    add_words_of_checkpoint(parser)


def add_words_of_tokens(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("checkpoint", type=Path, metavar="CHECKPOINT", help="file or folder")
    add("images", nargs="+", metavar="IMAGE", help="pictures, folders of them, or patterns such as 'photos/**/*.jpg'")
    add("--out", type=Path, required=True, metavar="DIR", help="folder for the results, made if missing")
    add("--labels", type=Path, metavar="DIR", help="the truth: DIR/NAME.png of class numbers for each picture NAME")
    add("--ignore-index", type=at_least(0), default=255, metavar="N", help="label of no class (default: 255)")
    add("--pictures", type=at_least(0), default=12, metavar="N", help="how many the page shows (default: 12)")
    add(
        "--sweep",
        type=at_least(0),
        default=16,
        metavar="N",
        help="how many sizes and thresholds are tried on (default: 16)",
    )
    add("--scales", type=numbers, default=[0.5, 2.0], metavar="X,X", help="other sizes (default: 0.5,2)")
    add("--thresholds", type=numbers, metavar="X,X", help="of exits, to try (default: 0.5 to 0.99)")
    add(
        "--policy-thresholds",
        type=numbers,
        metavar="X,X",
        help="likewise (default: 0.3 to 0.97, or around the variance's)",
    )
    add("--device", help="cpu, cuda or cuda:N (default: cuda if there is one)")
    add("--dtype", choices=DTYPES[:2], help="of the model (default: the checkpoint's)")
    add_words_of_checkpoint(parser)


class Command(NamedTuple):
    module: str
    add_words: Callable[[argparse.ArgumentParser], None]
    about: str
    description: str


INFO = """
Versions, devices, the backend and why, and a check of every op against its reference. On a GPU that runs the Triton kernels also a small
model's prediction, as a replayed CUDA graph and compiled. Exit status 1 where something failed; the last lines are then what a report needs.
"""
PREDICT = """
Label pictures with a checkpoint that load_checkpoint reads. Each IMAGE becomes DIR/NAME.png, of the picture's size
(as it is seen: EXIF rotation applied), whose values are class numbers: 8-bit, with a palette if one is given or the
checkpoint has one; 16-bit for more than 256 classes. Files of these names are overwritten. What cannot be labelled is
named at the end, and the exit status is 1. Under torchrun every process labels its share.
"""
TUNE = """
Tiles of attention (forward and backward), the linear layers, LayerNorm, the exit head, the halting decision and its compaction, and of what moves
blocks: merging pixels, pooling, scattering, gathering; and whether attention runs by varlen_attn. Every candidate is known to compile for the architecture, without spills. Here each must first agree with the PyTorch reference;
then they run in turns, and the fastest right one is written to a file that the kernels read from then on.
"""
TRAIN = """
Train one stage of a segmenter on supertokens. Stages, in the order of the recipe: heads (decoder and exits on the frozen dense backbone), policy,
exits (the heads on merged tokens), all (backbone and heads, on merged tokens with halting). torchrun runs it on several GPUs.
"""
CALIBRATE = """
Choose the thresholds of policy and exits for a budget, on labelled pictures, and write the checkpoint with them.
"""
EVALUATE = """
Accuracy, tokens, GFLOPs and speed of a checkpoint, of the same model without merging and halting, and of controls.
"""
TOKENS = """
Where tokens go on your pictures: which regions merge, where they halt, what that changes against the dense model and, with labels, what is
right. DIR/tokens.html is a page that opens from disk, DIR/tokens.json its figures, DIR/traces/NAME.npz each picture's decisions, which
step_kernels.model.Trace.load reads. What cannot be counted is named at the end, and the exit status is 1.
"""
COMMANDS = {
    "calibrate": Command(
        "step_kernels.model.cli.calibrate", add_words_of_calibrate, "thresholds for a budget", CALIBRATE
    ),
    "evaluate": Command("step_kernels.model.cli.evaluate", add_words_of_evaluate, "accuracy against tokens", EVALUATE),
    "info": Command("step_kernels.info", add_no_words, "check every op on this machine", INFO),
    "predict": Command("step_kernels.model.cli.predict", add_words_of_predict, "pictures to label PNGs", PREDICT),
    "tokens": Command("step_kernels.model.cli.tokens", add_words_of_tokens, "where tokens go, as a page", TOKENS),
    "train": Command("step_kernels.model.cli.train", add_words_of_train, "learn policy, exits and heads", TRAIN),
    "tune": Command("step_kernels.tune", add_words_of_tune, "measure the kernels' tiles on this GPU", TUNE),
}
