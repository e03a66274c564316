"""What the catalog says of each source, in words: for `dla sources` and for the table of docs/sources.md.

Of plain data alone: no generator's library, nor torch, is imported for it.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

from dla_cache.sources import SOURCES, SourceEntry
from dla_cache.sources.catalog.entry import CAPTION, CAPTIONER, TEXT_SETTINGS, Scalar

SPATIAL = ("height", "width")
"""Axes that a flip or a crop of the image turns and cuts, too."""

OF_WEIGHTS = ("model", "revision", "variant", "compute_dtype", "view_size")
OF_CAPTIONS = ("captioner", "captioner_revision", "masked_words")
"""What a spec may set on any generator, and on any that is asked with a caption, beside the settings of its own."""

LABELS = {
    "pipeline": "class",
    "output": "output",
    "axes": "axes",
    "space": "space",
    "view_size": "view, pixels",
    "settings": "settings",
    "call": "always called with",
    "load": "always loaded with",
    "schedulers": "schedulers",
    "scheduler": "scheduler set",
    "scheduler_settings": "of that scheduler",
    "components": "components",
    "guard": "never called",
    "tolerance": "tolerance",
    "largest_batch": "largest batch",
    "fix_up": "fix-up",
    "fix_up_settings": "settings, too",
}
"""Fields of a row that mean something to who reads, by what they are called there; others keep their names."""

UNSHOWN = ("image_argument", "image_form", "text_argument", "batch_argument", "side_arguments", "captioner")
"""Fields of a row that only its adapter has a use for."""

BEGIN, END = "<!-- sources: written by `make docs` -->", "<!-- /sources -->"


def entry_facts(name: str) -> dict[str, Any]:
    """Everything the catalog says of a source, as JSON has it."""
    entry = SOURCES[name]
    row = entry.row
    told = {field.name: _plain(getattr(row, field.name)) for field in fields(row)} if is_dataclass(row) else None
    return {
        "modality": entry.modality.value,
        "summary": entry.summary,
        "model": entry.model,
        "adapter": entry.location,
        "licence": entry.licence,
        "note": entry.note,
        "is_gated": entry.is_gated,
        "ignores_seed": entry.ignores_seed,
        "size": entry.size,
        "bytes_per_image": entry.bytes_per_image,
        "row": told,
    }


def entry_lines(name: str) -> Iterator[tuple[str, str]]:
    """What the catalog says of a source, as labels and texts."""
    entry, row = SOURCES[name], SOURCES[name].row
    yield "source", name
    yield "what", entry.summary
    yield "modality", entry.modality.value
    yield "model", f"{entry.model}, unless a spec says another `model`" if entry.model else model_of(entry)
    yield "gated", "yes: the hub asks for an account and an accepted licence" if entry.is_gated else "no"
    yield "licence", entry.licence or "not stated"
    if entry.note:
        yield "note", entry.note
    yield "adapter", entry.location
    yield "latent", entry.size or "as the weights make it"
    yield "bytes/image", bytes_of(entry)
    yield "seeds", "nothing is drawn: every seed gives the same" if entry.ignores_seed else "one for each image"
    if not is_dataclass(row):
        return
    for field in fields(row):
        value = getattr(row, field.name)
        if field.name in UNSHOWN or not (value or field.name == "tolerance"):
            continue
        if field.name == "lora_scale" and "lora" not in getattr(row, "components", {}):
            continue
        if field.name == "settings":
            value = settings_of(row)
        label = LABELS.get(field.name, field.name.replace("_", " "))
        yield label, axes_of(row) if field.name == "axes" else _in_words(value)
    if takes_text(row):
        yield "captioner", captioner_of(row) or "none, unless a spec's `prompt` has `{caption}` in it"
    if not entry.model:
        return
    others = [*OF_WEIGHTS, *(["scheduler"] if getattr(row, "schedulers", ()) else [])]
    yield "settings of all", ", ".join([*others, *(OF_CAPTIONS if takes_text(row) else ())])


def settings_of(row: Any) -> dict[str, Scalar]:
    """What a spec may set on a source beside what it may on any, with the defaults."""
    return {**(TEXT_SETTINGS if takes_text(row) else {}), **getattr(row, "settings", {})}


def takes_text(row: Any) -> bool:
    """Whether a source asks its generator with words."""
    return bool(getattr(row, "text_argument", "") or getattr(row, "captioner", ""))


def captioner_of(row: Any) -> str:
    """The repository of the captioning model that a source needs with its default settings; empty if none."""
    is_captioned = takes_text(row) and CAPTION in str(settings_of(row)["prompt"])
    return (getattr(row, "captioner", "") or CAPTIONER) if is_captioned else ""


LIST_HEADERS = ("name", "modality", "bytes/image", "gated", "model", "licence", "what it is")


def list_rows(names: list[str]) -> list[list[str]]:
    """The columns of `LIST_HEADERS` for each of these sources."""
    return [
        [
            name,
            SOURCES[name].modality.value,
            bytes_of(SOURCES[name]),
            "yes" if SOURCES[name].is_gated else "no",
            model_of(SOURCES[name]),
            SOURCES[name].licence.partition(";")[0] or "not stated",
            SOURCES[name].summary,
        ]
        for name in names
    ]


def markdown_table() -> str:
    """The table of docs/sources.md, a row a source."""
    headers = ("source", "modality", "what it is", "latent", "bytes an image", "axes", "model", "licence", "gated")
    lines = [f"| {' | '.join(headers)} |", f"|{'---|' * len(headers)}"]
    for name, entry in SOURCES.items():
        model = f"[{entry.model}](https://huggingface.co/{entry.model})" if entry.model else model_of(entry)
        cells = (
            f"`{name}`",
            entry.modality.value,
            entry.summary,
            entry.size or "as its weights make it",
            bytes_of(entry),
            ", ".join(f"**{axis}**" if axis in SPATIAL else axis for axis in getattr(entry.row, "axes", ())),
            model,
            entry.licence or "not stated",
            "yes" if entry.is_gated else "no",
        )
        lines.append(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |")
    return "\n".join(lines)


def with_table(page: str) -> str:
    """A page whose table between the two marks is the one of now."""
    before, _, rest = page.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n\n{markdown_table()}\n\n{END}{after}"


def bytes_of(entry: SourceEntry) -> str:
    """Bytes of a latent with the default model and view."""
    return f"{entry.bytes_per_image:,}" if entry.bytes_per_image else "as its weights make it"


def axes_of(row: Any) -> str:
    """The axes of a latent, and which of them are spatial."""
    axes = tuple(getattr(row, "axes", ()))
    spatial = [axis for axis in axes if axis in SPATIAL]
    told = f"; spatial: {', '.join(spatial)}" if spatial else "; none is spatial"
    return f"{', '.join(axes)}{told}" if axes else ""


def model_of(entry: SourceEntry) -> str:
    """The repository of the default weights."""
    return entry.model or "shipped"


def _in_words(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{name} = {json.dumps(part)}" for name, part in value.items())
    return ", ".join(map(str, value)) if isinstance(value, tuple | list) else str(value)


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _plain(part) for name, part in value.items()}
    if isinstance(value, tuple | list):
        return [_plain(part) for part in value]
    return value if isinstance(value, str | int | float | bool | None) else str(value)


def main() -> None:
    """Brings the table of docs/sources.md up to date."""
    page = Path(__file__).parents[2] / "docs" / "sources.md"
    page.write_text(with_table(page.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
