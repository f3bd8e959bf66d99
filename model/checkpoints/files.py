"""Reading checkpoint files: tensors by name, without running anything that a file brings along."""

from __future__ import annotations

import json
import os
import pickle
import re
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...checks import FLOATING, describe
from ..extras import import_extra

__all__ = ["PICKLED", "CheckpointFile", "config_path", "read_file", "read_json", "read_yaml"]

PICKLED = (".pth", ".pt", ".bin", ".ckpt", ".tar")
SUFFIXES = (".safetensors", *PICKLED)
# Where training scripts put the weights: mmengine and timm, Segmenter and DeiT, and both with averaged weights.
WRAPPERS = ("state_dict", "model", "state_dict_ema", "model_ema")

# The classes that mmengine's runner pickles beside the weights: its log history, and what numpy arrays are made of.
# The histories of some versions also hold their own methods, pickled as getattr(HistoryBuffer, name).
METADATA_GLOBALS = (
    "mmengine.logging.history_buffer.HistoryBuffer",
    "numpy.core.multiarray._reconstruct",
    "numpy.core.multiarray.scalar",
    "numpy._core.multiarray._reconstruct",
    "numpy._core.multiarray.scalar",
    "numpy.ndarray",
    "numpy.dtype",
    "builtins.getattr",
)


class Inert:
    """Stands in for a pickled class or function whose value nobody needs: takes any arguments and state, does nothing."""

    def __new__(cls, *arguments: object) -> Inert:
        return super().__new__(cls)

    def __init__(self, *arguments: object) -> None:
        pass

    def __setstate__(self, state: object) -> None:
        pass


class CheckpointFile:
    """One file, read.

    Attributes:
        path: the weights' file.
        tensors: the state dict, by the file's own names.
        extras: what else a .pth file holds beside the state dict; empty for safetensors.
    """

    def __init__(self, path: Path, tensors: dict[str, Tensor], extras: dict[str, Any]) -> None:
        self.path = path
        self.tensors = tensors
        self.extras = extras


def read_file(path: object) -> CheckpointFile:
    """The tensors of a .pth or safetensors file, or of the only such file of a folder, on the CPU.

    Raises:
        TypeError: ``path`` is no path.
        FileNotFoundError: nothing is there.
        ValueError: an unknown suffix, a folder with no or with several such files, a damaged file, a pickled class that is
            refused (by its name), or no state dict in it.
        ImportError: safetensors is needed and missing.
    """
    file = find_file(path)
    content = read_safetensors(file) if file.suffix == ".safetensors" else read_pickle(file)
    tensors, extras = unwrap(content, file)
    return CheckpointFile(file, tensors, extras)


def find_file(path: object) -> Path:
    """The file that ``path`` means: itself, or the one with weights in that folder."""
    if not isinstance(path, (str, os.PathLike)):
        raise TypeError(f"path: expected a str or a path, got {describe(path)}")
    file = Path(path)
    if not file.exists():
        raise FileNotFoundError(
            f"path: expected a checkpoint file or a folder with one, got {file}, which does not exist"
        )
    if file.is_dir():
        found = sorted(child for child in file.iterdir() if child.suffix in SUFFIXES)
        if len(found) != 1:
            names = ", ".join(child.name for child in found) or "none"
            raise ValueError(
                f"path: expected a folder with one file of weights ({', '.join(SUFFIXES)}), got {file} with {names}"
            )
        file = found[0]
    if file.suffix not in SUFFIXES:
        raise ValueError(f"path: expected a file named {', '.join('*' + suffix for suffix in SUFFIXES)}, got {file}")
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
        except pickle.UnpicklingError as error:
            refused = refused_globals(file, str(error))
            if not refused:
                raise ValueError(
                    f"{file}: expected a file of torch.save, got one that cannot be read: {error}"
                ) from error
            raise ValueError(
                f"{file}: expected tensors, plain containers and mmengine's metadata, got pickled {', '.join(refused)}, "
                "which this loader refuses to unpickle; save the state dict alone, or as safetensors"
            ) from error
        except (EOFError, RuntimeError, KeyError, IndexError, UnicodeDecodeError) as error:
            raise ValueError(f"{file}: expected a file of torch.save, got one that cannot be read: {error}") from error


def refused_globals(file: Path, message: str) -> list[str]:
    """Names of the pickled classes and functions that stopped ``torch.load`` with ``message``."""
    if zipfile.is_zipfile(file):
        listed = torch.serialization.get_unsafe_globals_in_checkpoint(file)
        if listed:
            return sorted(listed)
    return re.findall(r"GLOBAL (\S+)", message)[:1]


def unwrap(content: object, file: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The state dict in a file's content, and the rest."""
    if not isinstance(content, dict):
        raise ValueError(f"{file}: expected a dict of tensors, got {describe(content)}")
    wrappers = [name for name in WRAPPERS if isinstance(content.get(name), dict)]
    if len(wrappers) > 1:
        raise ValueError(f"{file}: expected one state dict, got {', '.join(wrappers)}; save the wanted one alone")
    wrapper = wrappers[0] if wrappers else None
    extras = {} if wrapper is None else {key: value for key, value in content.items() if key != wrapper}
    tensors: dict[str, Any] = content if wrapper is None else content[wrapper]
    unnamed = [describe(key) for key in tensors if not isinstance(key, str)]
    if unnamed:
        raise ValueError(f"{file}: expected tensors by name (str), got the keys {', '.join(unnamed[:10])}")
    others = [str(key) for key, value in tensors.items() if not isinstance(value, Tensor)]
    if others or not tensors:
        raise ValueError(
            f"{file}: expected tensors by name, at the top or under one of {', '.join(WRAPPERS)}, "
            f"got {'nothing' if not tensors else 'no tensors at ' + ', '.join(others[:10])}"
        )
    for key, value in tensors.items():
        narrow = value.is_floating_point() and value.dtype not in FLOATING
        if narrow or value.layout != torch.strided or value.is_quantized:
            raise ValueError(
                f"{file}: expected dense tensors, floating-point ones of 16 to 64 bits, got {key} of {value.dtype}, {value.layout}"
            )
    if all(key.startswith("module.") for key in tensors):  # saved from inside DistributedDataParallel
        tensors = {key.removeprefix("module."): value for key, value in tensors.items()}
    return dict(tensors), extras


def config_path(file: Path) -> Path:
    """Where the config of a safetensors file of ours lies."""
    return file.with_name("config.json") if file.name == "model.safetensors" else file.with_suffix(".json")


def read_json(file: Path) -> object:
    """The content of a JSON file; None where there is none."""
    if not file.is_file():
        return None
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file}: expected JSON, got a file that cannot be read: {error}") from error


def read_yaml(file: Path) -> dict[str, Any]:
    """A YAML file by the safe loader, which here also knows tuples: Segmenter's variant.yml writes them as !!python/tuple.

    Returns:
        Its content; an empty dict where there is no such file.

    Raises:
        ImportError: PyYAML is missing.
        ValueError: the file is no YAML mapping, or has other tags than the safe ones.
    """
    if not file.is_file():
        return {}
    yaml = import_extra("yaml", "pyyaml", "checkpoints")

    class Loader(yaml.SafeLoader):  # type: ignore[name-defined]
        pass

    Loader.add_constructor(
        "tag:yaml.org,2002:python/tuple", lambda loader, node: tuple(loader.construct_sequence(node, deep=True))
    )
    try:
        content = yaml.load(file.read_text(encoding="utf-8"), Loader=Loader)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{file}: expected plain YAML, got a file that cannot be read: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{file}: expected a YAML mapping, got {describe(content)}")
    return content
