"""Labelled pictures of a folder: an image file and a PNG of class numbers each, in the layouts that people have."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from ...checks import check_choice, check_int
from ..cli.pictures import read_picture

__all__ = ["LAYOUTS", "LabelledPictures", "class_weights"]

PICTURES = (".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp")
# Cityscapes: labelIds of its 19 evaluated classes, in the order of their trainIds (cityscapesScripts, labels.py).
CITYSCAPES_IDS = (7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33)


@dataclass(frozen=True)
class Pair:
    """The files of one labelled picture."""

    name: str
    picture: Path
    labels: Path


class LabelledPictures(Dataset[tuple[Tensor, Tensor]]):
    """Pictures and labels of a folder: (uint8 [3, H, W] red, green, blue; int64 [H, W]).

    Layouts, with ``split`` one of "train", "val", "test" or whatever the folders are called:

    - ``"folders"``: ``images/NAME.jpg`` and ``labels/NAME.png``, in ``root/split``, or as ``root/images/split``.
    - ``"cityscapes"``: ``leftImg8bit/split/CITY/*_leftImg8bit.png`` and ``gtFine/split/CITY/*_gtFine_labelIds.png``, whose
      ids become the 19 classes of the benchmark.
    - ``"ade20k"``: ``images/training``, ``annotations/training`` (or validation); 0 is no class, so label k becomes k - 1
      (mmsegmentation's reduce_zero_label).

    Args:
        root: the folder.
        split: which part of it; None: ``root`` itself holds ``images`` and ``labels``.
        num_classes: labels must be below it, or be ``ignore_index``.
        layout: one of the above; None: found by its folders.
        reduce_zero_label: label 0 becomes ``ignore_index``, k becomes k - 1. None: as the layout says.
        ignore_index: the label of pixels without a class, from 0 to 255.

    Raises:
        FileNotFoundError: no such folder, or none of these layouts in it.
        ValueError: a picture without labels, or labels without a picture (named). When read: labels out of range, of another size than their
            picture, in colours, or a file that cannot be read, each by the file's name.
        TypeError: an argument of a wrong type.
        ImportError: Pillow is missing.
    """

    def __init__(
        self,
        root: str | os.PathLike[str],
        split: str | None = None,
        *,
        num_classes: int,
        layout: str | None = None,
        reduce_zero_label: bool | None = None,
        ignore_index: int = 255,
    ) -> None:
        self.root, self.split = Path(root), split
        self.num_classes = check_int("num_classes", num_classes, minimum=1)
        self.ignore_index = check_int("ignore_index", ignore_index, minimum=0, maximum=255)
        if not self.root.is_dir():
            raise FileNotFoundError(f"root: expected a folder, got {self.root}")
        if layout is not None:
            check_choice("layout", layout, tuple(LAYOUTS))
        self.layout, folders = self._find(layout)
        self.reduce_zero_label = self.layout == "ade20k" if reduce_zero_label is None else reduce_zero_label
        self.pairs = paired(*folders, *LAYOUTS[self.layout].suffixes)

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, number: int) -> tuple[Tensor, Tensor]:
        pair = self.pairs[number]
        try:
            picture = read_picture(pair.picture)
        except ValueError as error:
            raise ValueError(f"{pair.picture}: {error}") from None
        labels = self._labels(pair.labels)
        if picture.shape[:2] != labels.shape:
            sizes = f"{picture.shape[0]} x {picture.shape[1]}, got {labels.shape[0]} x {labels.shape[1]}"
            raise ValueError(f"{pair.labels}: expected labels of the picture's size, {sizes}")
        return torch.from_numpy(picture.transpose(2, 0, 1).copy()), torch.from_numpy(labels)

    def _find(self, wanted: str | None) -> tuple[str, tuple[Path, Path]]:
        """The layout and its two folders."""
        for name, layout in LAYOUTS.items():
            for pattern in layout.folders if wanted in (None, name) else ():
                folders = [self.root / each.format(split=self.split or ".") for each in pattern]
                if all(folder.is_dir() for folder in folders):
                    return name, (folders[0], folders[1])
        tried = ", ".join(" + ".join(pattern) for layout in LAYOUTS.values() for pattern in layout.folders)
        raise FileNotFoundError(
            f"root: expected one of {tried.format(split=self.split or '.')} in {self.root}, got none of them"
        )

    def _labels(self, path: Path) -> np.ndarray[Any, Any]:
        """int64 [H, W], class numbers or ``ignore_index``."""
        found = class_numbers(path)
        if self.layout == "cityscapes" and path.name.endswith("labelIds.png"):
            table = np.full(256, self.ignore_index)
            table[list(CITYSCAPES_IDS)] = range(len(CITYSCAPES_IDS))
            found = table[found]
        elif self.reduce_zero_label:
            found = np.where((found == 0) | (found == self.ignore_index), self.ignore_index, found - 1)
        return checked_labels(path, found, self.num_classes, self.ignore_index)


def class_numbers(path: Path) -> np.ndarray[Any, Any]:
    """The values of a grey or palette PNG: int64 [H, W]."""
    from PIL import Image

    try:
        with Image.open(path) as opened:
            mode, found = opened.mode, np.asarray(opened)
    except Exception as error:  # decoders raise whatever a damaged file provokes
        raise ValueError(f"{path}: expected class numbers, got a file that cannot be read: {error}") from None
    if mode not in ("L", "P", "I", "I;16", "1"):
        raise ValueError(f"{path}: expected class numbers (grey or palette PNG), got mode {mode}")
    return found.astype(np.int64)


def checked_labels(
    path: Path, found: np.ndarray[Any, Any], num_classes: int, ignore_index: int
) -> np.ndarray[Any, Any]:
    """``found``, if all are classes or ``ignore_index``."""
    wrong = (found >= num_classes) & (found != ignore_index)
    if wrong.any():
        y, x = (int(each) for each in np.argwhere(wrong)[0])
        allowed = f"labels below {num_classes}, or {ignore_index}"
        raise ValueError(f"{path}: expected {allowed}, got {found[y, x]} in row {y}, column {x}")
    return found


@dataclass(frozen=True)
class Layout:
    folders: tuple[tuple[str, str], ...]  # of pictures and labels
    suffixes: tuple[tuple[str, ...], tuple[str, ...]]  # behind the name that both have


LAYOUTS = {
    "cityscapes": Layout(
        (("leftImg8bit/{split}", "gtFine/{split}"),),
        (("_leftImg8bit.png",), ("_gtFine_labelIds.png", "_gtFine_labelTrainIds.png")),
    ),
    "ade20k": Layout((("images/{split}", "annotations/{split}"),), (PICTURES, (".png",))),
    "folders": Layout(
        (("{split}/images", "{split}/labels"), ("images/{split}", "labels/{split}")), (PICTURES, (".png",))
    ),
}


def paired(pictures: Path, labels: Path, picture_ends: Sequence[str], label_ends: Sequence[str]) -> list[Pair]:
    """By the path below the two folders without the ending, ascending."""
    found, wanted = named(pictures, picture_ends), named(labels, label_ends)
    for name in sorted(found.keys() ^ wanted.keys()):
        if name in found:
            raise ValueError(f"{found[name]}: expected labels in {labels}, named {name}{label_ends[0]}, got none")
        raise ValueError(f"{wanted[name]}: expected a picture in {pictures}, got none")
    if not found:
        raise ValueError(f"{pictures}: expected pictures ({', '.join(picture_ends)}), got none")
    return [Pair(name, found[name], wanted[name]) for name in sorted(found)]


def named(folder: Path, ends: Sequence[str]) -> dict[str, Path]:
    """The folder's files by name. Where one has several endings, the first of ``ends`` wins."""
    files = {}
    for end in reversed(ends):
        for path in folder.rglob("*"):
            if path.name.lower().endswith(end.lower()) and not path.name.startswith("."):
                files[str(path.relative_to(folder))[: -len(end)]] = path
    return files


def class_weights(data: Any, num_classes: int, ignore_index: int, *, most: int = 512) -> Tensor:
    """[C]: the inverse square root of each class's share of the pixels, 1 on a pixel's average; 0 for a class that is not seen.

    ``data`` as `train` takes it; up to ``most`` of its pictures count, evenly spread.
    """
    counts = torch.zeros(num_classes)
    for i in range(0, len(data), -(-len(data) // most)):
        labels = data[i][1].long()
        counts += torch.bincount(labels[(labels != ignore_index) & (labels >= 0)], minlength=num_classes)[:num_classes]
    share = counts / counts.sum().clamp(min=1)
    weights = torch.where(share > 0, share.rsqrt(), 0.0)
    return weights / (weights * share).sum().clamp(min=torch.finfo(share.dtype).tiny)
