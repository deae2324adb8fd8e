"""Tensor files of checkpoints: they are mapped into memory, and nothing but tensors is unpickled."""

from __future__ import annotations

import hashlib
import pickle
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from convllava.errors import InputError
from convllava.io import one_line, read_json, write_json

VOCABULARY = "tokenizer.model"
PIECE = 512 * 2**20
"""Bytes of tensors that are held before they are written."""
_LOOKED_AT = 1024
"""Numbers of a tensor that `weights_digest` looks at."""


def tensor_files(folder: Path, required: bool = True) -> list[Path]:
    """The files that hold a checkpoint's tensors: an index's shards, or the single file.

    Raises:
        InputError: there are none where they are required, or one that the index names is missing.
    """
    for stem in ("model.safetensors", "pytorch_model.bin"):
        index = folder / f"{stem}.index.json"
        if index.is_file():
            names = sorted(set(_weight_map(index).values()))
            for name in names:
                if not (folder / name).is_file():
                    raise InputError(f"{folder / name} is missing; {index.name} names it")
            return [folder / name for name in names]
        if (folder / stem).is_file():
            return [folder / stem]
    if not required:
        return []
    raise InputError(f"{folder} holds neither model.safetensors nor pytorch_model.bin nor an index of shards")


def _weight_map(index: Path) -> dict[str, str]:
    places = read_json(index).get("weight_map")
    if not isinstance(places, dict) or not all(isinstance(name, str) for name in places.values()):
        raise InputError(f"{index} has no weight_map from tensors to files")
    return places


def tensors_in(path: Path) -> Mapping[str, Tensor]:
    """The tensors of a file by name, mapped into memory; nothing but tensors is unpickled.

    Raises:
        InputError: the file is damaged, or holds more than tensors.
    """
    try:
        if path.suffix == ".safetensors":
            return _Lazy(safe_open(path, framework="pt"))
        # Only the zip format of today's torch.save can be mapped.
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except pickle.UnpicklingError:
        raise InputError(f"{path} is damaged, or holds code beside tensors, which is never run") from None
    except Exception as error:  # a damaged file makes torch raise nearly anything
        raise InputError(f"{path} is not a readable file of tensors: {one_line(error)}") from None
    pairs = content.items() if isinstance(content, dict) else [(None, None)]
    if not all(isinstance(name, str) and isinstance(value, Tensor) for name, value in pairs):
        raise InputError(f"{path} holds more than tensors by name")
    return content


def in_pieces(tensors: Iterable[tuple[str, Tensor]], size: int = PIECE) -> Iterator[dict[str, Tensor]]:
    """Tensors by name, as many at a time as fit into so many bytes, at least one."""
    piece: dict[str, Tensor] = {}
    held = 0
    for name, tensor in tensors:
        if piece and held + tensor.nbytes > size:
            yield piece
            piece, held = {}, 0
        piece[name] = tensor
        held += tensor.nbytes
    if piece:
        yield piece


def write_tensors(tensors: Iterable[tuple[str, Tensor]], folder: Path) -> None:
    """Write tensors as they come: `model.safetensors`, or shards with an index where they are more than a piece."""
    _write(tensors, folder, "model", "safetensors", _save_safe)


def write_pickled(tensors: Iterable[tuple[str, Tensor]], folder: Path) -> None:
    """As `write_tensors`, as `pytorch_model.bin`."""
    _write(tensors, folder, "pytorch_model", "bin", _save_pickled)


def _save_pickled(piece: dict[str, Tensor], path: Path) -> None:
    # Cloned, so that each is saved alone and not with the file that it was mapped from.
    torch.save({name: tensor.clone() for name, tensor in piece.items()}, path)


def _save_safe(piece: dict[str, Tensor], path: Path) -> None:
    save_file(piece, path, metadata={"format": "pt"})


def _write(
    tensors: Iterable[tuple[str, Tensor]],
    folder: Path,
    stem: str,
    suffix: str,
    save: Callable[[dict[str, Tensor], Path], None],
) -> None:
    shards: list[tuple[Path, list[str]]] = []
    for number, piece in enumerate(in_pieces(tensors)):
        path = folder / f"shard-{number}"
        save(piece, path)
        shards.append((path, list(piece)))
        piece.clear()  # before the next is read
    if len(shards) == 1:
        shards[0][0].rename(folder / f"{stem}.{suffix}")
        return
    index: dict[str, str] = {}
    for number, (path, names) in enumerate(shards, start=1):
        final = path.with_name(f"{stem}-{number:05}-of-{len(shards):05}.{suffix}")
        path.rename(final)
        index |= dict.fromkeys(names, final.name)
    write_json(folder / f"{stem}.{suffix}.index.json", {"metadata": {}, "weight_map": index})


class _Lazy(Mapping[str, Tensor]):
    """A safetensors file as a mapping that reads a tensor when it is asked for."""

    def __init__(self, file: Any) -> None:
        self.file, self.names = file, list(file.keys())

    def __getitem__(self, name: str) -> Tensor:
        return self.file.get_tensor(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)


def weights_digest(model: nn.Module) -> str:
    """The precision of a model's weights, and a digest that other weights do not have, wherever their files lie.

    Of each tensor at most 1024 numbers count, evenly spaced: training changes nearly all numbers of what trains, and a
    model of many gigabytes is not read as a whole.
    """
    content, precisions = hashlib.blake2b(digest_size=8), set()
    for name, weight in model.named_parameters():
        numbers = weight.detach().flatten()
        some = numbers[:: max(1, -(-len(numbers) // _LOOKED_AT))].cpu().contiguous()
        content.update(f"{name} {tuple(weight.shape)}".encode() + some.view(torch.uint8).numpy().tobytes())
        precisions.add(str(weight.dtype).removeprefix("torch."))
    return f"{' and '.join(sorted(precisions))} {content.hexdigest()}"
