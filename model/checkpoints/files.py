"""Reading checkpoint files: tensors by name, without running anything that a file brings along."""

from __future__ import annotations

import os
import pickle
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...checks import FLOATING, describe
from ...extras import import_extra

SUFFIXES = (".safetensors", ".pth", ".pt", ".bin", ".ckpt", ".tar")
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
    meta: dict[str, Any]  # what mmengine and mmcv keep beside it


def refusal(source: object, wanted: str, got: object) -> ValueError:
    """The error about a file, or an argument that it needs."""
    return ValueError(f"{source}: expected {wanted}, got {got}")


def read_file(path: object) -> CheckpointFile:
    """The tensors of a .pth or safetensors file, or of the only such file of a folder, on the CPU."""
    file = find_file(path)
    content = read_safetensors(file) if file.suffix == ".safetensors" else read_pickle(file)
    if not isinstance(content, dict):
        raise refusal(file, "a dict of tensors", describe(content))
    wrappers = [name for name in WRAPPERS if isinstance(content.get(name), dict)]
    if len(wrappers) > 1:
        raise refusal(file, "one state dict", f"{', '.join(wrappers)}; save the wanted one alone")
    tensors: dict[Any, Any] = content[wrappers[0]] if wrappers else content
    for key, value in tensors.items():
        if not isinstance(key, str) or not isinstance(value, Tensor):
            wanted = f"tensors by name, at the top or under one of {', '.join(WRAPPERS)}"
            raise refusal(file, wanted, f"{type(value).__name__} at {key!r}")
        narrow = value.is_floating_point() and value.dtype not in FLOATING
        if narrow or value.layout != torch.strided or value.is_quantized:
            wanted = "dense tensors, floating-point ones of 16 to 64 bits"
            raise refusal(file, wanted, f"{key} of {value.dtype}, {value.layout}")
    if not tensors:
        raise refusal(file, "tensors by name", "nothing")
    if all(key.startswith("module.") for key in tensors):  # saved from inside DistributedDataParallel
        tensors = {key.removeprefix("module."): value for key, value in tensors.items()}
    return CheckpointFile(file, dict(tensors), mapping(content.get("meta")))


def find_file(path: object) -> Path:
    """The file that ``path`` means: itself, or the one with weights in that folder."""
    file = as_path(path)
    if not file.exists():
        raise FileNotFoundError(f"path: expected a checkpoint file or a folder with one, got {file}: does not exist")
    if file.is_dir():
        found = sorted(child for child in file.iterdir() if child.suffix in SUFFIXES)
        if len(found) == 1:
            return found[0]
        names = ", ".join(child.name for child in found) or "none"
        raise refusal("path", f"a folder with one file of weights ({', '.join(SUFFIXES)})", f"{file} with {names}")
    if file.suffix not in SUFFIXES:
        raise refusal("path", f"a file named *{', *'.join(SUFFIXES)}", file)
    return file


def as_path(path: object) -> Path:
    if not isinstance(path, (str, os.PathLike)):
        raise TypeError(f"path: expected a str or a path, got {describe(path)}")
    return Path(path)


def read_safetensors(file: Path) -> dict[str, Tensor]:
    safetensors = import_extra("safetensors", "safetensors", "checkpoints")
    try:
        tensors = import_extra("safetensors.torch", "safetensors", "checkpoints").load_file(file)
    except safetensors.SafetensorError as error:
        raise refusal(file, "a safetensors file", f"one that cannot be read: {error}") from error
    # Copies: the tensors lie anywhere in one buffer, and matmuls round otherwise on memory of another alignment.
    return {name: tensor.clone() for name, tensor in tensors.items()}


def read_pickle(file: Path) -> object:
    """``torch.load`` with weights_only=True and inert stand-ins for mmengine's metadata."""
    with torch.serialization.safe_globals([(Inert, name) for name in METADATA_GLOBALS]):
        try:
            return torch.load(file, map_location="cpu", weights_only=True)
        except (pickle.UnpicklingError, EOFError, RuntimeError, KeyError, IndexError, UnicodeDecodeError) as error:
            if refused := re.search(r"GLOBAL (\S+)", str(error)):
                advice = "which this loader refuses to unpickle; save the state dict alone, or as safetensors"
                wanted = "tensors, plain containers and mmengine's metadata"
                raise refusal(file, wanted, f"a pickled {refused[1]}, {advice}") from error
            raise refusal(file, "a file of torch.save", f"one that cannot be read: {error}") from error


def read_text(file: Path, kind: str, parse: Callable[[str], object], unreadable: type[Exception]) -> object:
    """What ``parse`` makes of a text file; None where there is none."""
    try:
        return parse(file.read_text(encoding="utf-8")) if file.is_file() else None
    except (UnicodeDecodeError, unreadable) as error:
        raise refusal(file, kind, f"a file that cannot be read: {error}") from error


def read_yaml(file: Path) -> dict[str, Any]:
    """The mapping in a YAML file, by the safe loader; an empty one where there is no file."""
    if not file.is_file():
        return {}
    yaml = import_extra("yaml", "pyyaml", "checkpoints")
    loader: Any = type("Loader", (yaml.SafeLoader,), {})
    loader.add_constructor("tag:yaml.org,2002:python/tuple", loader.construct_sequence)  # Segmenter writes them
    content = read_text(file, "plain YAML", lambda text: yaml.load(text, loader), yaml.YAMLError)
    if not isinstance(content, dict):
        raise refusal(file, "a YAML mapping", describe(content))
    return content


def mapping(value: object) -> dict[str, Any]:
    """``value`` if it is a dict; an empty one otherwise."""
    return value if isinstance(value, dict) else {}


def as_tuple(value: object) -> Any:
    """Lists as tuples, at every depth."""
    return tuple(map(as_tuple, value)) if isinstance(value, list) else value
