"""Reading checkpoint files: tensors by name, without running anything that a file brings along."""

from __future__ import annotations

import os
import pickle
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...checks import FLOATING, describe
from ...extras import import_extra

SUFFIXES = (".safetensors", ".pth", ".pt", ".bin", ".ckpt", ".tar")
# What scripts, DataParallel, torch.compile and Lightning put before a model's own names; other words may tell several models apart.
WRAPPERS = re.compile(r"((state_dict|model|module|net|network|_orig_mod|model_state_dict|state_dict_ema|model_ema)\.)*")
# By this tensor models are found: Segmenter's, mmsegmentation's and timm's.
EMBEDDING = re.compile(r"(|.*?\.)((encoder\.)?patch_embed\.proj|backbone\.patch_embed\.projection)\.weight")

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


@dataclass
class CheckpointFile:
    """One file, read. ``parts`` are its dicts by the names that lead there: "", "model.", "state_dict.ema."."""

    path: Path  # of the weights
    parts: dict[str, dict[str, Any]]
    meta: dict[str, Any]  # what mmengine and mmcv keep beside the tensors
    tensors: dict[str, Tensor] = field(default_factory=dict)  # one model's, by its own names: see `select`

    def select(self, prefix: str | None) -> None:
        """Choose the tensors whose names begin with ``prefix``. None: those of the one model that is there, which must be all of its dict."""
        named = {path + key: value for path, part in self.parts.items() for key, value in part.items()}
        found = sorted({match[1] for match in map(EMBEDDING.fullmatch, named) if match})
        hint = f"tell one as prefix=: {', '.join(map(repr, found))}"
        if prefix is None:
            if len(found) > 1 or not all(map(WRAPPERS.fullmatch, found)):
                wanted = "the tensors of one model (or the config beside a file of save_checkpoint)"
                raise refusal(self.path, wanted, f"several, or parts of others: {hint}")
            prefix = found[0] if found else ""
            home = max((path for path in self.parts if prefix.startswith(path)), key=len)
            beside = sorted(home + key for key, value in self.parts[home].items() if isinstance(value, Tensor))
            if beside := [key for key in beside if not key.startswith(prefix)]:
                raise refusal(self.path, f"names that begin with {prefix}", f"unused keys: {shortened(beside)}; {hint}")
            named = named if found else {key: value for key, value in named.items() if isinstance(value, Tensor)}
        self.tensors = {key.removeprefix(prefix): value for key, value in named.items() if key.startswith(prefix)}
        for key, value in self.tensors.items():
            kind = f"{value.dtype}, {value.layout}" if isinstance(value, Tensor) else type(value).__name__
            dense = isinstance(value, Tensor) and value.layout == torch.strided and not value.is_quantized
            if not dense or (value.is_floating_point() and value.dtype not in FLOATING):
                raise refusal(
                    self.path, "tensors by name, dense, floating-point ones of 16 to 64 bits", f"{kind} at {key!r}"
                )
        if not self.tensors:
            raise refusal(self.path, f"tensors by name{f' under {prefix!r}' if prefix else ''}", f"nothing; {hint}")


def refusal(source: object, wanted: str, got: object) -> ValueError:
    """The error about a file, or an argument that it needs."""
    return ValueError(f"{source}: expected {wanted}, got {got}")


def shortened(names: list[str]) -> str:
    """Names in a message, the first ones of a long list."""
    return ", ".join(names[:20]) + (f" and {len(names) - 20} more" if len(names) > 20 else "")


def read_file(path: object) -> CheckpointFile:
    """The content of a .pth or safetensors file, or of the only such file of a folder, on the CPU."""
    file = find_file(path)
    content = read_safetensors(file) if file.suffix == ".safetensors" else read_pickle(file)
    if not isinstance(content, dict):
        raise refusal(file, "a dict of tensors", describe(content))
    parts: dict[str, dict[str, Any]] = {}
    waiting, seen = list[tuple[str, dict[Any, Any]]]([("", content)]), {id(content)}  # a pickle may hold itself
    for name, own in waiting:
        inside = [(f"{name}{key}.", value) for key, value in own.items() if isinstance(value, dict)]
        waiting += [each for each in inside if id(each[1]) not in seen]
        seen |= {id(value) for _, value in inside}
        parts[name] = {str(key): value for key, value in own.items() if not isinstance(value, dict)}
    return CheckpointFile(file, parts, mapping(content.get("meta")))


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
        except (pickle.UnpicklingError, EOFError, RuntimeError, LookupError, UnicodeDecodeError, OSError) as error:
            if refused := re.search(r"GLOBAL (\S+)", str(error)):
                advice = "which this loader refuses to unpickle; save the state dict alone, or as safetensors"
                wanted = "tensors, plain containers and mmengine's metadata"
                raise refusal(file, wanted, f"a pickled {refused[1]}, {advice}") from error
            raise refusal(file, "a file of torch.save", f"one that cannot be read: {error!r}") from error


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
