"""`dla cache audit`, and what other commands say and set of captions that name classes."""

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from dla_cache.leaks import ModalityAudit
    from dla_cache.spec import CacheSpec

SynonymsPath = Annotated[
    Path | None,
    typer.Option("--synonyms", metavar="FILE", help="Other names of classes: YAML, a list of words for each class."),
]
MaskNames = Annotated[
    bool,
    typer.Option("--mask-class-names", help="Take class names, and --synonyms, out of captions before they are used."),
]


def audit_command(
    store_path: Annotated[
        str, typer.Argument(metavar="STORE", help="Folder of the store, or its URL, s3://bucket/prefix.")
    ],
    synonyms_path: SynonymsPath = None,
    captioner: Annotated[
        str | None,
        typer.Option("--captioner", help="With --synonyms: folder or repository of the captioner that was used."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of text.")] = False,
) -> None:
    """Say how many of the captions that latents were made from name a class; with --synonyms, count those captions
    again that the store holds."""
    from dla_cache.leaks import audit_store, read_synonyms
    from dla_cache.store import open_store

    if captioner is not None and synonyms_path is None:
        raise typer.BadParameter("it is for --synonyms, which is missing", param_hint="--captioner")
    store = open_store(store_path)
    audits = audit_store(store)
    if synonyms_path is not None:
        from dla_cache.sources.caption_audit import count_again

        synonyms = read_synonyms(synonyms_path, store.class_names)
        audits = count_again(store, audits, synonyms, captioner or "")
    if as_json:
        typer.echo(json.dumps({"modalities": [asdict(audit) for audit in audits]}))
        return
    for audit in audits:
        typer.echo(f"{audit.modality}, by {audit.source}: {audit.in_words}")
    for line in advice(audits, n_classes=len(store.class_names)):
        typer.echo(line)


def advice(audits: Sequence["ModalityAudit"], *, n_classes: int) -> list[str]:
    """What to think of it, and what to do."""
    lines = []
    if any(audit.counts for audit in audits) and not n_classes:
        lines.append("The store has no class names, so none was looked for.")
    if any(audit.counts.get("own_class") for audit in audits):
        lines.append(
            "A latent made from a caption that names the image's class has seen its label, and what it teaches says"
            " less of what the generator knows. `dla cache build --mask-class-names` makes latents that have not."
        )
    return lines


def show_captions(place: str, spec: "CacheSpec") -> None:
    """What the captions of a store that was built give away, if its sources read any; one of a user's own may."""
    from dla_cache.leaks import audit_store, reads_captions
    from dla_cache.sources import SOURCES
    from dla_cache.store import open_store

    if any(entry.source not in SOURCES or reads_captions(entry.source, entry.parameters) for entry in spec.latents):
        for audit in audit_store(open_store(place)):
            if audit.counts:
                typer.echo(f"captions      {audit.modality}: {audit.in_words}")


def mask_names(spec: "CacheSpec", manifest_path: Path, synonyms_path: Path | None) -> "CacheSpec":
    """The spec whose sources take the names of the manifest's classes, and synonyms, out of captions."""
    from dla_cache.leaks import read_synonyms, with_masked_names
    from dla_cache.manifest import read_manifest

    class_names = read_manifest(manifest_path).class_names
    synonyms = {} if synonyms_path is None else read_synonyms(synonyms_path, class_names)
    return with_masked_names(spec, class_names, synonyms)
