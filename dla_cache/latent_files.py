"""Files of latents that somebody else wrote, .npy, .safetensors or .pt: which is whose, read and never executed."""

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from dla_cache.errors import SourceError, name_some
from dla_cache.manifest import Manifest

if TYPE_CHECKING:
    import torch

SUFFIXES = (".npy", ".safetensors", ".pt")


def read_latent(path: Path, key: str | None) -> tuple[NDArray[np.generic], str]:
    """The array in a file, and the name of its dtype; bfloat16, which numpy does not have, comes as float32.

    Args:
        key: of the tensor in a file that holds several; None takes the only one.

    Raises:
        SourceError: if the file is damaged, holds something else, has no or several tensors, or would run code.
    """
    try:
        array, dtype = _read_npy(path, key) if path.suffix.lower() == ".npy" else _read_tensor(path, key)
    except SourceError:
        raise
    except Exception as error:  # what a reader of strangers' files raises on damaged bytes has no common class
        raise SourceError(
            f"latent `{shown(path)}` cannot be read: {type(error).__name__}: {_first_line(error)}",
            hint="it must hold plain numbers; a file of pickled objects is never opened. Save the tensor alone",
        ) from error
    if array.dtype.kind not in "fiu" or not array.size or not array.ndim:
        raise SourceError(f"latent `{shown(path)}` holds `{dtype}` {list(array.shape)}", hint="save one real tensor")
    return array, dtype


def _read_npy(path: Path, key: str | None) -> tuple[NDArray[np.generic], str]:
    if key is not None:
        raise SourceError(f"`{shown(path)}` holds one array and no keys", hint="leave out --key")
    array = np.load(path, allow_pickle=False)
    if not isinstance(array, np.ndarray):  # np.load goes by content: an archive of arrays may bear any name
        array.close()
        raise SourceError(f"`{shown(path)}` is an archive of arrays", hint="save one array a file, with `numpy.save`")
    return array, array.dtype.name


def _read_tensor(path: Path, key: str | None) -> tuple[NDArray[np.generic], str]:
    import torch
    from safetensors.torch import load_file

    content: Any
    if path.suffix.lower() == ".pt":
        content = torch.load(path, map_location="cpu", weights_only=True)
    else:
        content = load_file(path)
    tensor = _choose_tensor(path, content, key)
    dtype = str(tensor.dtype).removeprefix("torch.")
    wide = tensor.float() if tensor.dtype == torch.bfloat16 else tensor
    return np.ascontiguousarray(wide.detach().numpy()), dtype


def _choose_tensor(path: Path, content: Any, key: str | None) -> "torch.Tensor":
    import torch

    if isinstance(content, torch.Tensor) and key is None:
        return content
    if not isinstance(content, Mapping):
        what = "one tensor and no keys" if isinstance(content, torch.Tensor) else f"a `{type(content).__name__}`"
        hint = "leave out --key" if isinstance(content, torch.Tensor) else "save a tensor, or a dict of tensors"
        raise SourceError(f"`{shown(path)}` holds {what}", hint=hint)
    tensors = {str(name): value for name, value in content.items() if isinstance(value, torch.Tensor)}
    if key is None and len(tensors) == 1:
        return next(iter(tensors.values()))
    if key is None or key not in tensors:
        raise SourceError(
            f"`{shown(path)}` {f'has no tensor `{key}`' if key else f'holds {len(tensors)} tensors'}",
            hint=f"--key with one of {name_some(sorted(tensors), 8)}" if tensors else "save a tensor",
        )
    return tensors[key]


def shown(path: Path) -> str:
    """A path for a message: names that are no UTF-8, or hold control characters, with escapes."""
    text = str(path).encode("utf-8", "backslashreplace").decode()
    return "".join(character if character.isprintable() else repr(character)[1:-1] for character in text)


def _first_line(error: Exception) -> str:
    lines = str(error).splitlines()
    return lines[0] if lines else "no reason given"


@dataclass(frozen=True, slots=True)
class LatentFiles:
    """Which file is which image's latent."""

    file_of: dict[str, Path]
    """By image ID."""
    missing: tuple[str, ...]
    """IDs of the images without a file, in the manifest's order."""
    extra: tuple[str, ...]
    """Latent files without an image, as paths from the folder."""
    ignored: tuple[str, ...]
    """Files that are no latents, by their names."""


def match_files(folder: Path, manifest: Manifest) -> LatentFiles:
    """Which file below `folder` is which image's latent.

    A file belongs to the image whose URI is its path from the folder, or, right in the folder, whose ID is its name,
    both without their extension. Hidden files and those of other types are no latents.

    Raises:
        SourceError: if the folder cannot be read, a file fits several images, or an image has several files.
    """
    if not folder.is_dir():
        raise SourceError(f"`{folder}` is no folder", hint="name the folder that holds the latents")
    ids_of_path: defaultdict[str, list[str]] = defaultdict(list)
    for row in manifest.rows():
        if "#" not in row.uri:  # a byte range of a tar has no name of its own
            ids_of_path[PurePosixPath(row.uri).with_suffix("").as_posix()].append(row.image_id)
    image_ids = manifest.image_ids
    known = set(image_ids)
    files_of: defaultdict[str, list[Path]] = defaultdict(list)
    ambiguous: list[str] = []
    extra: list[str] = []
    ignored: list[str] = []
    for path in sorted(path for path in folder.rglob("*") if not path.is_dir()):
        relative = path.relative_to(folder)
        if path.suffix.lower() not in SUFFIXES or any(part.startswith(".") for part in relative.parts):
            ignored.append(shown(relative))
            continue
        fitting = set(ids_of_path.get(relative.with_suffix("").as_posix(), ()))
        if len(relative.parts) == 1:  # further down a bare name may be that of another folder's image
            fitting |= {path.stem} & known
        if len(fitting) > 1:
            ambiguous.append(f"{shown(relative)} fits {' and '.join(sorted(fitting))}")
        elif fitting:
            files_of[fitting.pop()].append(path)
        else:
            extra.append(shown(relative))
    twice = [
        f"{image_id}: {', '.join(shown(path.relative_to(folder)) for path in paths)}"
        for image_id, paths in files_of.items()
        if len(paths) > 1
    ]
    if ambiguous:
        raise SourceError(
            f"{len(ambiguous)} files in `{folder}` fit more than one image: {name_some(ambiguous)}",
            hint="name each file after its image's ID",
        )
    if twice:
        raise SourceError(
            f"{len(twice)} images have more than one file in `{folder}`: {name_some(twice)}",
            hint="keep one file an image, or name a folder that has one",
        )
    return LatentFiles(
        file_of={image_id: paths[0] for image_id, paths in files_of.items()},
        missing=tuple(image_id for image_id in image_ids if image_id not in files_of),
        extra=tuple(extra),
        ignored=tuple(ignored),
    )
