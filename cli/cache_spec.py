"""The cache spec that a command line stands for: a file, or one source, and settings."""

import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from cli.settings import apply_overrides

if TYPE_CHECKING:
    from dla_cache.spec import CacheSpec


SpecPath = Annotated[Path | None, typer.Argument(metavar="[SPEC]", help="Cache spec, a YAML file.")]
SourceName = Annotated[
    str | None, typer.Option("--source", help="In place of SPEC: one source, or a class of yours, module:Class.")
]
ModalityName = Annotated[
    str | None, typer.Option("--modality", help="With --source: what it makes, if dla does not know it.")
]
ImageFolder = Annotated[
    Path | None, typer.Option("--images", help="Folder the images' paths start from; the manifest's if absent.")
]
HeldAs = Annotated[
    Literal["none", "original", "jpeg", "raw"] | None,
    typer.Option("--image-encoding", help="Hold the images in the store, too: the field `images` of the spec."),
]
Overrides = Annotated[
    list[str] | None, typer.Option("--set", metavar="PATH=VALUE", help="Set one field of the spec; repeatable.")
]


def read_cache_spec(
    spec_path: Path | None,
    source: str | None,
    modality: str | None,
    image_encoding: str | None,
    overrides: Sequence[str],
) -> "CacheSpec":
    """The resolved spec of `build` and `plan`."""
    from dla_cache.spec import CacheSpec, parse_spec

    fields = _spec_fields(spec_path, source, modality)
    if image_encoding is not None:
        fields["images"] = image_encoding
    spec = parse_spec(apply_overrides(fields, overrides), CacheSpec, where=str(spec_path or "--source"))
    find_own_modules(entry.source for entry in spec.latents)
    return spec


def find_own_modules(sources: Iterable[str]) -> None:
    """Lets modules of a user's own sources be found in the current folder, where an installed `dla` does not look."""
    if any(":" in source for source in sources):
        sys.path.insert(0, str(Path.cwd()))


def modality_of(source: str, modality: str | None) -> str:
    """What a source makes: as is said, or as dla knows it."""
    from dla_cache.sources import SOURCES

    if modality is None and source in SOURCES:
        modality = SOURCES[source].modality.value
    if modality is None:
        raise typer.BadParameter(
            f"dla does not know what `{source}` makes; its own sources are {', '.join(SOURCES)}",
            param_hint="--modality",
        )
    return modality


def _spec_fields(spec_path: Path | None, source: str | None, modality: str | None) -> dict[str, Any]:
    """The fields of the spec file, or of the spec that `--source` stands for."""
    from dla_cache.spec import load_yaml

    if (spec_path is None) == (source is None):
        raise typer.BadParameter("name either a spec file or one --source", param_hint="SPEC")
    if spec_path is not None:
        if modality is not None:
            raise typer.BadParameter("it goes with --source; a spec file says it itself", param_hint="--modality")
        return load_yaml(spec_path)
    assert source is not None
    return {"latents": [{"source": source, "modality": modality_of(source, modality)}]}
