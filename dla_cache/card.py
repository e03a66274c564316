"""The cache card: README.md inside a store, for somebody who finds the folder and knows nothing of dla.

A function of what the store holds and of nothing else, neither time nor place, so that copies have equal cards.
"""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from dla_cache.control_recipe import control_note, first_source, is_control
from dla_cache.describe import describe_modality, describe_rounding, describe_store
from dla_cache.durable import read_file, writing_to
from dla_cache.leaks import audit_store
from dla_cache.sources import SOURCES
from dla_cache.spec import Recipe
from dla_cache.store import LatentStore
from dla_cache.store.metadata import sole_writer
from dla_cache.store.parts import CARD, CARD_TITLE

SEAL = b"\n<!-- SHA-256 of all lines before: "
"""What the last line of a card begins with, unseen where Markdown is shown: damage can be told from other words."""

LICENCE_UNKNOWN = "not stated: ask whoever made it"

READING = {
    "zarr": """\
import pathlib, pyarrow, zarr

parts = [pyarrow.ipc.open_file(part).read_all() for part in sorted(pathlib.Path("rows").glob("*.arrow"))]
rows = pyarrow.concat_tables(parts).to_pylist()
latents = zarr.open_array("latents/{modality}", mode="r")
for row in rows[:3]:
    if not row["removed"]:
        latent = {numbers}
        print(row["image_id"], row["split"], row["label"], latent.shape, latent.dtype)
""",
    "webdataset": """\
import io, pathlib, tarfile
import numpy

for shard in sorted(pathlib.Path("{modality}").glob("*.tar"))[:1]:
    with tarfile.open(shard) as tar:
        for member in list(tar)[:3]:
            image_id = member.name.partition(".")[0]
            latent = {numbers}
            print(image_id, latent.shape, latent.dtype)
""",
}
"""By layout: what runs in the store's folder and shows three images."""

STORED = {
    "zarr": 'latents[row["row"]]',
    "webdataset": "numpy.load(io.BytesIO(tar.extractfile(member).read()))",
}
"""By layout: the numbers of an image, as they lie on disk."""

DECODED = {"bfloat16": '({stored}.astype("uint32") << 16).view("float32")', "int8": "{stored} * scale + offset"}
"""By dtype on disk: what the numbers stand for, where that is not themselves."""

QUANTISATION = {
    "zarr": ("latents/{modality}/zarr.json", '["attributes"]["dla"]["recipe"]'),
    "webdataset": ("dla.json", '["recipes"]["{modality}"]'),
}
"""By layout: file and place in it of the recipe that says what an int8 stands for."""


def write_card(store: LatentStore) -> Path:
    """Writes the card of a store into it; its path. One that says the same, and a README of the owner's, stay.

    Raises:
        StoreError: if the store cannot be written, its records are damaged, or images were removed from it since it
            was opened: the card would tell of them.
    """
    path = store.path / CARD
    content = card_text(store).encode()
    with writing_to(store.path):
        # A finished store may lie on a read-only disk and still be "built" again.
        present = read_file(path) if path.is_file() else None
        is_owners = present is not None and not is_card(present)
        if present != content and not is_owners:
            # Ranks end at the same time, and a removal writes a card of its own. Not within `unchanged_rows`: many can
            # be in that at a time.
            with sole_writer(store.path, store.metadata):
                store.files.write(CARD, content)
    return path


def card_text(store: LatentStore) -> str:
    """The card as Markdown."""
    sections = [_title(store), _modalities(store), _images(store), _sources(store), _statistics(store)]
    text = "\n".join([*sections, _making(store), _reading(store), _verifying(store)])
    return text + _seal(text.encode()).decode()


def is_card(content: bytes) -> bool:
    """Whether a README is one that a store has written of itself, be it damaged, and not its owner's."""
    return content.startswith(CARD_TITLE.encode()) or CARD_TITLE.encode().startswith(content) or SEAL in content


def is_sealed(content: bytes) -> bool:
    """Whether a card is the one that was written, by whatever version of dla."""
    text, _, _ = content.rpartition(SEAL)
    return content == text + _seal(text)


def _seal(text: bytes) -> bytes:
    return SEAL + f"{hashlib.sha256(text).hexdigest()} -->\n".encode()


def _title(store: LatentStore) -> str:
    names = ", ".join(store.modalities)
    controls = [name for name in store.modalities if is_control(store.recipe(name))]
    remark = f"\n**Not so {', '.join(controls)}**: it is a control, made to be compared with the real latents.\n"
    return (
        f"{CARD_TITLE}{len(store.rows_of())} images: {names}\n\n"
        "For each image what a generator made of it, stopped before its decoder: raw numbers as the source put them\n"
        "out, not standardised, in the order of the row table. Made to train models that see the image alone.\n"
        f"{remark if controls else ''}"
    )


def _modalities(store: LatentStore) -> str:
    state = describe_store(store)
    rows = []
    for part in state.modalities:
        latent = store.recipe(part.modality).format
        shape = " x ".join(str(side) for side in latent.shape)
        codes = f", codes below {latent.vocabulary}" if latent.vocabulary is not None else ""
        stored = f"{part.images} of {state.images}" if part.shards_missing else str(part.images)
        axes = ", ".join(latent.axes)
        rows.append([part.modality, shape, axes, f"{latent.dtype}{codes}", stored, str(part.size_bytes)])
    lines = ["## What is in it", "", *_table(["modality", "shape", "axes", "dtype", "images", "bytes"], rows), ""]
    lines.append(f"Content hash: {f'`{state.content_hash}`' if state.content_hash else 'none yet, shards are missing'}")
    return "\n".join([*lines, ""])


def _images(store: LatentStore) -> str:
    images = [image for image in store.rows if not image.removed]
    rows = []
    for split in sorted(store.rows.splits):
        members = [image for image in images if image.split == split]
        n_unlabelled = sum(image.label is None for image in members)
        rows.append([_plain(split), str(len(members)), str(n_unlabelled)])
    lines = ["## Images", "", *_table(["split", "images", "of them unlabelled"], rows), ""]
    n_removed = len(store.rows) - len(images)
    if n_removed:
        lines += [f"{n_removed} images were removed after the store was made; their rows are empty.", ""]
    if store.class_names:
        named = ", ".join(f"{label} {_plain(name)}" for label, name in enumerate(store.class_names))
        lines += [f"{len(store.class_names)} classes, by label: {named}.", ""]
    recipe = store.metadata.images
    held = "are not in the store"
    if recipe is not None:
        how = ", too" if recipe.encoding == "original" else f" as smaller pictures: {_plain(str(recipe))}"
        held = f"lie in the store{how}"
    return "\n".join([*lines, f"The images themselves {held}.", ""])


def _sources(store: LatentStore) -> str:
    lines = ["## Sources", ""]
    captions = {audit.modality: audit.in_words for audit in audit_store(store) if audit.counts}
    for modality in store.modalities:
        recipe = store.recipe(modality)
        entry = SOURCES.get(recipe.source)
        note = _plain(control_note(recipe)) or (entry.note if entry else "")
        facts = {
            "source": _plain(recipe.source),
            "what": entry.summary if entry else "",
            "note": f"**{note}**" if note else "",
            "licence": str(getattr(SOURCES.get(first_source(recipe)), "licence", "")) or LICENCE_UNKNOWN,
            "parameters": _plain(json.dumps(recipe.parameters, sort_keys=True)) if recipe.parameters else "none",
            "seed": str(recipe.seed),
            "sees the image as": "" if is_imported(recipe) else f"a square of {recipe.source_view_size} pixels",
            "weights (sha256)": f"`{recipe.weights_sha256}`" if recipe.weights_sha256 else "none",
            "recipe (sha256)": f"`{recipe.hash}`",
            "captions": captions.get(modality, ""),
            "space": _plain(recipe.format.space),
            "stored as": _stored_as(store, modality),
        }
        lines += [f"### {modality}", "", *(f"- {name}: {text}" for name, text in facts.items() if text), ""]
    lines += ["The images' licence: not stated; the latents are derived from them, so ask whoever made the store.", ""]
    return "\n".join(lines)


def _stored_as(store: LatentStore, modality: str) -> str:
    """Precision, and what it cost; nothing of codes."""
    latent = store.recipe(modality).format
    lost = describe_rounding(store, modality)
    if latent.kind == "codes":
        return ""
    return f"{latent.dtype}, {f'{lost.in_words}, against what was handed over' if lost else 'nothing lost'}"


def _statistics(store: LatentStore) -> str:
    rows = []
    for modality in store.modalities:
        for split, moments in describe_modality(store, modality).statistics.items():
            rows.append(
                [
                    modality,
                    _plain(split),
                    str(moments["count"]),
                    *(_range(moments[name]) for name in ("mean", "std")),
                    f"{min(moments['minimum']):.4g}",
                    f"{max(moments['maximum']):.4g}",
                ]
            )
    headers = ["modality", "split", "images", "mean by channel", "std by channel", "minimum", "maximum"]
    remark = "Standardise with those of the training splits, never with those of the test images."
    return "\n".join(["## Statistics", "", *_table(headers, rows), "", remark, ""])


def _making(store: LatentStore) -> str:
    recipes = [store.recipe(modality) for modality in store.modalities]
    built = [recipe for recipe in recipes if not is_imported(recipe) and not is_control(recipe)]
    lines = ["## How it was made", ""]
    if built:
        spec = yaml.safe_dump(_spec(store, built), sort_keys=False, allow_unicode=True).rstrip()
        lines += ["With `dla cache build` from this spec:", "", "```yaml", spec, "```", ""]
    for recipe in recipes:
        if is_control(recipe):
            lines += [f"{recipe.modality.value}: with `dla cache control`, see its parameters.", ""]
            continue
        rounded = [*recipe.format.rounded_from[1:], recipe.format.dtype] if recipe.format.rounded_from else []
        for dtype in rounded:
            lines += [f"Then with `dla cache convert --dtype {recipe.modality.value}={dtype}`.", ""]
    for recipe in recipes:
        if is_imported(recipe):
            lines += [f"{recipe.modality.value}: with `dla cache import`, from files that somebody else made.", ""]
    return "\n".join(lines)


def _spec(store: LatentStore, recipes: Sequence[Recipe]) -> dict[str, Any]:
    entries = []
    for recipe in recipes:
        entry: dict[str, Any] = {"modality": recipe.modality.value, "source": recipe.source}
        if recipe.parameters:
            entry["parameters"] = dict(sorted(recipe.parameters.items()))
        entry["seed"] = recipe.seed
        if recipe.format.kind == "continuous":
            entry["dtype"] = recipe.format.built_dtype
        entries.append(entry)
    return {"latents": entries, "shard_size": store.shard_size, "layout": store.metadata.layout.name}


def _reading(store: LatentStore) -> str:
    layout, modality = store.metadata.layout.name, store.modalities[0]
    latent = store.recipe(modality).format
    numbers = DECODED.get(latent.dtype, "{stored}").format(stored=STORED[layout])
    code = READING[layout].format(modality=modality, numbers=numbers)
    if latent.quantisation is not None:
        file, recipe = (text.format(modality=modality) for text in QUANTISATION[layout])
        beside = [-1 if axis == latent.channel_axis else 1 for axis in range(len(latent.shape))]
        code = (
            f'import json, numpy, pathlib\n\nrecipe = json.loads(pathlib.Path("{file}").read_text()){recipe}\n'
            f'stands = recipe["format"]["quantisation"]\n'
            'scale, offset = (numpy.array(stands[name], "float32").reshape('
            f'{beside}) for name in ("scale", "offset"))\n'
            f"{code}"
        )
    return "\n".join(["## Read it without dla", "", "In this folder:", "", "```python", code.rstrip(), "```", ""])


def _verifying(store: LatentStore) -> str:
    return (
        "## Verify it\n\n"
        "`dla cache verify` with this folder reads every byte, checks it against its checksums and recomputes the\n"
        "content hash: the SHA-256 of image IDs, latents and recipes, whatever the layout.\n"
    )


def is_imported(recipe: Recipe) -> bool:
    """Whether latents came ready-made, so that no source can compute them again."""
    return recipe.source.startswith("import:")


def _range(values: Sequence[float]) -> str:
    return f"{min(values):.4g} to {max(values):.4g}" if len(values) > 1 else f"{values[0]:.4g}"


def _table(headers: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    return [f"| {' | '.join(cells)} |" for cells in [headers, ["---"] * len(headers), *rows]]


def _plain(text: str) -> str:
    """A name as Markdown shows it letter by letter: it may hold a line break, a bar or a tag."""
    printable = "".join(character if character.isprintable() else " " for character in text)
    return "".join(f"\\{character}" if character in "\\`*_[]<>|#" else character for character in printable)
