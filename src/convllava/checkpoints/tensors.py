"""Tensor files of checkpoints. Files are mapped into memory, and only tensors are ever unpickled."""

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

from convllava.errors import CheckpointError
from convllava.io import one_line, read_json, write_json

VOCABULARY = "tokenizer.model"
SHARD_BYTES = 512 * 2**20
"""Size of a shard. The tensors of one shard are in memory at the same time."""
_DIGEST_SAMPLES = 1024
"""How many numbers of each tensor `weights_digest` reads at most."""


def tensor_files(folder: Path, required: bool = True) -> list[Path]:
    """Return the files with the tensors of a checkpoint: the shards of an index, or the single file.

    Raises:
        CheckpointError: if there are none but they are required, or a file of the index is missing.
    """
    for stem in ("model.safetensors", "pytorch_model.bin"):
        index = folder / f"{stem}.index.json"
        if index.is_file():
            files = read_json(index).get("weight_map")
            if not isinstance(files, dict) or not all(isinstance(name, str) for name in files.values()):
                raise CheckpointError(f"{index} has no weight_map from tensors to files")
            paths = [folder / name for name in sorted(set(files.values()))]
            for path in paths:
                if not path.is_file():
                    raise CheckpointError(f"{path} is missing; {index.name} names it")
            return paths
        if (folder / stem).is_file():
            return [folder / stem]
    if not required:
        return []
    raise CheckpointError(f"{folder} holds neither model.safetensors nor pytorch_model.bin nor an index of shards")


def tensors_in(path: Path) -> Mapping[str, Tensor]:
    """Return the tensors of a file by name, mapped into memory.

    Raises:
        CheckpointError: if the file is damaged, or holds more than tensors.
    """
    try:
        if path.suffix == ".safetensors":
            return _LazySafetensors(safe_open(path, framework="pt"))
        # Only the zip format of today's torch.save can be mapped.
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except pickle.UnpicklingError:
        raise CheckpointError(f"{path} is damaged, or holds code as well as tensors; code is never run") from None
    except Exception as error:  # a damaged file makes torch raise nearly anything
        raise CheckpointError(f"{path} is not a readable file of tensors: {one_line(error)}") from None
    pairs = content.items() if isinstance(content, dict) else [(None, None)]
    if not all(isinstance(name, str) and isinstance(value, Tensor) for name, value in pairs):
        raise CheckpointError(f"{path} holds more than tensors by name")
    return content


class _LazySafetensors(Mapping[str, Tensor]):
    """A safetensors file that reads a tensor when it is requested."""

    def __init__(self, file: Any) -> None:
        self.file, self.names = file, list(file.keys())

    def __getitem__(self, name: str) -> Tensor:
        return self.file.get_tensor(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)


def in_shards(tensors: Iterable[tuple[str, Tensor]], size: int = SHARD_BYTES) -> Iterator[dict[str, Tensor]]:
    """Group tensors into shards of at most `size` bytes, but at least one tensor each."""
    shard: dict[str, Tensor] = {}
    held = 0
    for name, tensor in tensors:
        if shard and held + tensor.nbytes > size:
            yield shard
            shard, held = {}, 0
        shard[name] = tensor
        held += tensor.nbytes
    if shard:
        yield shard


def write_tensors(tensors: Iterable[tuple[str, Tensor]], folder: Path) -> None:
    """Write tensors one shard at a time: `model.safetensors`, or several files with an index."""
    _write(tensors, folder, "model", "safetensors", lambda shard, path: save_file(shard, path, {"format": "pt"}))


def write_pickled(tensors: Iterable[tuple[str, Tensor]], folder: Path) -> None:
    """Write tensors one shard at a time: `pytorch_model.bin`, or several files with an index."""

    def save(shard: dict[str, Tensor], path: Path) -> None:
        # Without a copy torch would save the whole file that a tensor is mapped from.
        torch.save({name: tensor.clone() for name, tensor in shard.items()}, path)

    _write(tensors, folder, "pytorch_model", "bin", save)


def _write(
    tensors: Iterable[tuple[str, Tensor]],
    folder: Path,
    stem: str,
    suffix: str,
    save: Callable[[dict[str, Tensor], Path], None],
) -> None:
    shards: list[tuple[Path, list[str]]] = []
    for number, shard in enumerate(in_shards(tensors)):
        path = folder / f"shard-{number}"
        save(shard, path)
        shards.append((path, list(shard)))
        shard.clear()  # frees the memory before the next shard is read
    if len(shards) == 1:
        shards[0][0].rename(folder / f"{stem}.{suffix}")
        return
    index: dict[str, str] = {}
    for number, (path, names) in enumerate(shards, start=1):
        final = path.with_name(f"{stem}-{number:05}-of-{len(shards):05}.{suffix}")
        path.rename(final)
        index |= dict.fromkeys(names, final.name)
    write_json(folder / f"{stem}.{suffix}.index.json", {"metadata": {}, "weight_map": index})


def weights_digest(model: nn.Module) -> str:
    """Return the precision of a model's weights and a digest of them, which does not depend on their files.

    The digest reads at most 1024 evenly spaced numbers of each tensor, so that a model of many gigabytes is not read as
    a whole. Training changes nearly all numbers of the trained tensors, so the digest changes too.
    """
    content, precisions = hashlib.blake2b(digest_size=8), set()
    for name, weight in model.named_parameters():
        numbers = weight.detach().flatten()
        some = numbers[:: max(1, -(-len(numbers) // _DIGEST_SAMPLES))].cpu().contiguous()
        content.update(f"{name} {tuple(weight.shape)}".encode() + some.view(torch.uint8).numpy().tobytes())
        precisions.add(str(weight.dtype).removeprefix("torch."))
    return f"{' and '.join(sorted(precisions))} {content.hexdigest()}"
