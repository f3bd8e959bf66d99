"""Reading checkpoint files: tensors by name, without running anything that a file brings along."""

from __future__ import annotations

import json
import os
import pickle
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...checks import FLOATING, describe
from ..extras import import_extra

__all__ = ["CheckpointFile", "config_path", "read_file", "read_json", "read_yaml", "target_file"]

PICKLED = (".pth", ".pt", ".bin", ".ckpt", ".tar")
SUFFIXES = (".safetensors", *PICKLED)
# Where training scripts put the weights: mmengine and timm, Segmenter and DeiT, and both with averaged weights.
WRAPPERS = ("state_dict", "model", "state_dict_ema", "model_ema")

# The classes that mmengine's runner pickles beside the weights: its log history, and what numpy arrays are made of.
# The histories of some versions also hold their own methods, pickled as getattr(HistoryBuffer, name).
METADATA_GLOBALS = (
    "mmengine.logging.history_buffer.HistoryBuffer",
    *(f"numpy.{core}.multiarray.{name}" for core in ("core", "_core") for name in ("_reconstruct", "scalar")),
    *("numpy.ndarray", "numpy.dtype", "builtins.getattr"),
)


class Inert:
    """Stands in for a pickled class or function whose value nobody needs: takes any arguments and state, does nothing."""

    def __new__(cls, *arguments: object) -> Inert:
        return super().__new__(cls)

    def __setstate__(self, state: object) -> None:
        pass


@dataclass(frozen=True)
class CheckpointFile:
    """One file, read."""

    path: Path  # of the weights
    tensors: dict[str, Tensor]  # the state dict, by the file's own names
    extras: dict[str, Any]  # what else a .pth file holds


def read_file(path: object) -> CheckpointFile:
    """The tensors of a .pth or safetensors file, or of the only such file of a folder, on the CPU."""
    file = find_file(path)
    return unwrap(read_safetensors(file) if file.suffix == ".safetensors" else read_pickle(file), file)


def as_path(path: object) -> Path:
    if not isinstance(path, (str, os.PathLike)):
        raise TypeError(f"path: expected a str or a path, got {describe(path)}")
    return Path(path)


def find_file(path: object) -> Path:
    """The file that ``path`` means: itself, or the one with weights in that folder."""
    file = as_path(path)
    if not file.exists():
        raise FileNotFoundError(
            f"path: expected a checkpoint file or a folder with one, got {file}, which does not exist"
        )
    if file.is_dir():
        found = sorted(child for child in file.iterdir() if child.suffix in SUFFIXES)
        if len(found) == 1:
            return found[0]
        names = ", ".join(child.name for child in found) or "none"
        raise ValueError(
            f"path: expected a folder with one file of weights ({', '.join(SUFFIXES)}), got {file} with {names}"
        )
    if file.suffix not in SUFFIXES:
        raise ValueError(f"path: expected a file named *{', *'.join(SUFFIXES)}, got {file}")
    return file


def target_file(path: object) -> Path:
    """The safetensors file to write where ``path`` says; makes folders that are missing."""
    file = as_path(path)
    if file.suffix != ".safetensors":
        if file.suffix in PICKLED or file.is_file():
            raise ValueError(f"path: expected a folder or a file named *.safetensors, got {file}")
        file /= "model.safetensors"
    file.parent.mkdir(parents=True, exist_ok=True)
    return file


def read_safetensors(file: Path) -> dict[str, Tensor]:
    safetensors = import_extra("safetensors", "safetensors", "checkpoints")
    try:
        tensors = import_extra("safetensors.torch", "safetensors", "checkpoints").load_file(file)
    except safetensors.SafetensorError as error:
        raise ValueError(f"{file}: expected a safetensors file, got one that cannot be read: {error}") from error
    # Copies: the tensors lie anywhere in one buffer, and matmuls round otherwise on memory of another alignment.
    return {name: tensor.clone() for name, tensor in tensors.items()}


def read_pickle(file: Path) -> object:
    """``torch.load`` with weights_only=True and inert stand-ins for mmengine's metadata."""
    with torch.serialization.safe_globals([(Inert, name) for name in METADATA_GLOBALS]):
        try:
            return torch.load(file, map_location="cpu", weights_only=True)
        except (pickle.UnpicklingError, EOFError, RuntimeError, KeyError, IndexError, UnicodeDecodeError) as error:
            if refused := re.search(r"GLOBAL (\S+)", str(error)):
                raise ValueError(
                    f"{file}: expected tensors, plain containers and mmengine's metadata, got a pickled {refused[1]}, "
                    "which this loader refuses to unpickle; save the state dict alone, or as safetensors"
                ) from error
            raise ValueError(f"{file}: expected a file of torch.save, got one that cannot be read: {error}") from error


def unwrap(content: object, file: Path) -> CheckpointFile:
    """The state dict in a file's content, and the rest."""
    if not isinstance(content, dict):
        raise ValueError(f"{file}: expected a dict of tensors, got {describe(content)}")
    wrappers = [name for name in WRAPPERS if isinstance(content.get(name), dict)]
    if len(wrappers) > 1:
        raise ValueError(f"{file}: expected one state dict, got {', '.join(wrappers)}; save the wanted one alone")
    tensors: dict[Any, Any] = content[wrappers[0]] if wrappers else content
    extras = {key: value for key, value in content.items() if key != wrappers[0]} if wrappers else {}
    for key, value in tensors.items():
        if not isinstance(key, str) or not isinstance(value, Tensor):
            raise ValueError(
                f"{file}: expected tensors by name, at the top or under one of {', '.join(WRAPPERS)}, "
                f"got {type(value).__name__} at {key!r}"
            )
        narrow = value.is_floating_point() and value.dtype not in FLOATING
        if narrow or value.layout != torch.strided or value.is_quantized:
            raise ValueError(
                f"{file}: expected dense tensors, floating-point ones of 16 to 64 bits, got {key} of {value.dtype}, {value.layout}"
            )
    if not tensors:
        raise ValueError(f"{file}: expected tensors by name, got nothing")
    if all(key.startswith("module.") for key in tensors):  # saved from inside DistributedDataParallel
        tensors = {key.removeprefix("module."): value for key, value in tensors.items()}
    return CheckpointFile(file, dict(tensors), extras)


def config_path(file: Path) -> Path:
    """Where the config of a safetensors file of ours lies."""
    return file.with_name("config.json") if file.name == "model.safetensors" else file.with_suffix(".json")


def read_json(file: Path) -> object:
    """The content of a JSON file; None where there is none."""
    try:
        return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else None
    except ValueError as error:
        raise ValueError(f"{file}: expected JSON, got a file that cannot be read: {error}") from error


def read_yaml(file: Path) -> dict[str, Any]:
    """The mapping in a YAML file, by the safe loader; an empty one where there is no file."""
    if not file.is_file():
        return {}
    yaml = import_extra("yaml", "pyyaml", "checkpoints")
    loader: Any = type("Loader", (yaml.SafeLoader,), {})
    # Segmenter's own files write tuples so.
    loader.add_constructor("tag:yaml.org,2002:python/tuple", loader.construct_sequence)
    try:
        content = yaml.load(file.read_text(encoding="utf-8"), Loader=loader)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{file}: expected plain YAML, got a file that cannot be read: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{file}: expected a YAML mapping, got {describe(content)}")
    return content
