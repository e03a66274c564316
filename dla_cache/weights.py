"""Where weights are found, and the one hash that names them: of a hub's snapshot and a plain folder alike.

Nothing here reaches for the network: `dla sources fetch` does, so that a build cannot begin on weights that are not
there, or go on with others than it began with.
"""

import hashlib
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dla_cache.errors import SourceError
from dla_cache.remembered import sha256_of
from dla_cache.spec import canonical_json

WEIGHTS = ".safetensors"
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".msgpack", ".h5")
TEXTS = (".json", ".txt", ".model", ".jinja", ".tiktoken")
"""What configures models, schedulers, tokenizers and processors."""
CONFIGURATIONS = (
    "config.json",
    "model_index.json",
    "tokenizer_config.json",
    "preprocessor_config.json",
    "processor_config.json",
)
"""Those of them that may name code."""
INDEX = re.compile(r"[^.]+(?:\.([^.]+))?\.safetensors\.index(?:\.([^.]+))?\.json")
"""The file that says which weights lie in which of several files, and maybe of which variant."""
VOCABULARIES = ("tokenizer.json", "vocab.json", "vocab.txt", "*.model", "*.tiktoken")
"""Files of which a tokenizer has one."""


@dataclass(frozen=True, slots=True)
class Weights:
    """A checkpoint on this machine."""

    path: Path
    """A folder that `from_pretrained` takes."""
    sha256: str
    """Of the content of all files that are loaded from it, by their paths."""
    repo: str = ""
    """On the hub; empty for a plain folder."""
    commit: str = ""
    """Of the repository; empty for a plain folder."""


def find_weights(
    model: str, revision: str = "", *, variant: str = "", without: Sequence[str] = (), only: str = ""
) -> Weights:
    """The checkpoint that a name stands for, of a folder or of what `dla sources fetch` has put into the hub's cache.

    Args:
        model: a folder, or a repository as `owner/name`.
        revision: branch, tag or commit of a repository.
        variant: as `fp16`: of `model.fp16.safetensors` and `model.safetensors` the first is loaded and hashed.
        without: folders of components that are not loaded.
        only: a single file of the checkpoint, as of a LoRA.

    Raises:
        SourceError: if it is not on this machine, holds no safetensors (of that variant), or wants its own code run.
    """
    path, repo, commit = _locate(model, revision)
    files = [path / only] if only else sorted(_loaded_files(path, variant, without))
    if only and not files[0].is_file():
        raise SourceError(f"`{model}` has no file `{only}`", hint="look at the names of its files")
    _refuse_own_code(model, files)
    _refuse_pickles(model, path, files)
    _refuse_tokenizers_without_words(model, path, files)
    weights = [file for file in files if file.suffix == WEIGHTS]
    if not weights or (variant and not only and not any(_variant_of(file) == variant for file in weights)):
        raise SourceError(f"`{model}` has no {_of_variant(variant)}safetensors", hint=_how(variant))
    return Weights(path, content_hash(path, files), repo, commit)


def joint_hash(hashes: dict[str, str]) -> str:
    """One hash of several components by their names; of a single one its own."""
    if len(hashes) == 1:
        return next(iter(hashes.values()))
    return hashlib.sha256(canonical_json(hashes).encode()).hexdigest()


def content_hash(folder: Path, files: Sequence[Path]) -> str:
    """sha256 of the sorted list of (path in the folder, sha256 of the file): wherever the folder lies."""
    listed = sorted((file.relative_to(folder).as_posix(), sha256_of(file)) for file in files)
    return hashlib.sha256(canonical_json(listed).encode()).hexdigest()


def _locate(model: str, revision: str) -> tuple[Path, str, str]:
    """Folder, repository and commit."""
    folder = Path(model).expanduser()
    if folder.is_dir():
        if revision:
            raise SourceError(f"`{model}` is a folder, which has no revision", hint="leave `revision` out")
        return folder, "", ""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    at = f"`{model}`" + (f" at `{revision}`" if revision else "")
    try:
        path = Path(snapshot_download(model, revision=revision or None, local_files_only=True))
    except HFValidationError as error:
        raise SourceError(
            f"there is no folder `{model}`, and no repository can have that name", hint="check the path"
        ) from error
    except (LocalEntryNotFoundError, OSError) as error:
        incomplete = getattr(error, "snapshot_path", None)  # it lacks files, maybe none but those that nobody loads
        if incomplete is None:
            raise SourceError(
                f"the weights {at} are not on this machine",
                hint=f"run `dla sources fetch --model {model}` where there is a network, or name a folder that holds"
                " them",
            ) from error
        path = Path(incomplete)
    return path, model, path.name


def _loaded_files(folder: Path, variant: str, without: Sequence[str]) -> Iterator[Path]:
    """The files that loading a checkpoint reads: of a pipeline those in the folders of its components."""
    index = folder / "model_index.json"
    if index.is_file():
        components = [name for name, value in _read_json(index).items() if isinstance(value, list) and any(value)]
        yield index
        folders = [folder / name for name in components if name not in without]
    else:
        folders = [folder]
    for place in folders:
        files = [file for file in place.glob("*") if file.is_file()]
        yield from (file for file in files if file.suffix in TEXTS and not _is_index_of_other(file, variant))
        weights = {file: _variant_of(file) for file in files if file.suffix == WEIGHTS}
        indices = {file: found[1] or found[2] or "" for file in files if (found := INDEX.fullmatch(file.name))}
        # As diffusers does it: a component without that variant comes as it is, and some component must have it.
        wanted = variant if variant in (*weights.values(), *indices.values()) else ""
        chosen = [file for file, of in weights.items() if of == wanted]
        parts = [place / name for name in _parts_in([file for file, of in indices.items() if of == wanted])]
        yield from dict.fromkeys([*chosen, *(file for file in parts if file.is_file())])


def _parts_in(indices: Sequence[Path]) -> Iterator[str]:
    """The files that indices of weights in parts name, whatever they are called.

    Raises:
        SourceError: if one lies elsewhere: transformers would load it, and no hash would know of it.
    """
    for file in indices:
        named = _read_json(file).get("weight_map")
        for name in sorted(set(map(str, named.values()))) if isinstance(named, dict) else ():
            if Path(name).name != name:
                raise SourceError(
                    f"`{file.name}` in `{file.parent.name}` names weights that do not lie beside it: `{name}`",
                    hint="do not use this checkpoint, or write its weights anew by `save_pretrained`",
                )
            yield name


def _variant_of(file: Path) -> str:
    """`fp16` of `model.fp16.safetensors` and of `model.fp16-00001-of-00002.safetensors`."""
    parts = file.name.removesuffix(".json").removesuffix(".index").removesuffix(WEIGHTS).split(".")
    return parts[1].split("-")[0] if len(parts) > 1 else ""


def _is_index_of_other(file: Path, variant: str) -> bool:
    return file.name.endswith(f"{WEIGHTS}.index.json") and _variant_of(file) not in ("", variant)


def _refuse_own_code(model: str, files: Sequence[Path]) -> None:
    for file in files:
        if file.name in CONFIGURATIONS:
            fields = _read_json(file)
            if _names_code(fields) or any(
                isinstance(value, list)
                and value
                and isinstance(value[0], str)
                and (file.parent / f"{value[0]}.py").is_file()
                for value in fields.values()
            ):
                raise SourceError(
                    f"`{model}` wants to run code of its own, which `{file.name}` names",
                    hint="dla runs no code of a checkpoint: make a source of your own, see docs/guides/own-source.md",
                )


def _names_code(value: Any) -> bool:
    """Whether a configuration, or a part of it, wants a module beside it or a kernel of the hub."""
    if not isinstance(value, dict):
        return False
    kernels = (str(value.get(name, "")) for name in ("attn_implementation", "_attn_implementation"))
    return (
        "auto_map" in value
        or any("/" in kernel or kernel.endswith("_hub") for kernel in kernels)
        or any(map(_names_code, value.values()))
    )


def _refuse_tokenizers_without_words(model: str, folder: Path, files: Sequence[Path]) -> None:
    """transformers makes a tokenizer of no words at all then, and every text is the same one to it."""
    for file in files:
        words = (file.parent.glob(pattern) for pattern in VOCABULARIES)
        if file.name == "tokenizer_config.json" and not any(one.is_file() for found in words for one in found):
            place = file.relative_to(folder).parent / "tokenizer.json"
            raise SourceError(
                f"`{model}` has a tokenizer without its words: there is no `{place.as_posix()}`", hint="fetch it again"
            )


def _refuse_pickles(model: str, folder: Path, files: Sequence[Path]) -> None:
    """A component, or the only model, whose weights come as pickles alone."""
    for place in sorted({file.parent for file in files}):
        pickles = sorted(file for file in place.glob("*") if file.suffix in PICKLES)
        if pickles and not any(file.suffix == WEIGHTS for file in place.glob("*")):
            raise SourceError(
                f"`{model}` has no safetensors, only `{pickles[0].relative_to(folder).as_posix()}`, which can run code"
                " when it is read",
                hint="convert the checkpoint to safetensors, or take another one",
            )


def _of_variant(variant: str) -> str:
    return f"`{variant}` " if variant else ""


def _how(variant: str) -> str:
    if variant:
        return "leave `variant` out, or fetch it: `dla sources fetch` with `--variant`"
    return "convert the checkpoint to safetensors, or take another one"


def _read_json(file: Path) -> dict[str, Any]:
    try:
        value = json.loads(file.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise SourceError(
            f"`{file.name}` in `{file.parent.name}` cannot be read: {error}", hint="fetch it again"
        ) from error
    return value if isinstance(value, dict) else {}
