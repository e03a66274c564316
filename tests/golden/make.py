"""Makes the golden stores: `python -m tests.golden.make FOLDER`. Those in `v1/` were made once and stay as they are.

Together they hold all that docs/format.md can say; what is in them is said by `tests.golden.formula`.
"""

import hashlib
import json
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dla_cache.adopt import adopt_source
from dla_cache.build import build_cache
from dla_cache.errors import WorkInterrupted
from dla_cache.manifest import Manifest, ManifestRow, write_manifest
from dla_cache.spec import CacheSpec, LatentFormat, LatentSpec, Recipe, canonical_json
from dla_cache.store import create_store, open_store
from dla_cache.store.exchange import convert_store
from dla_cache.store.rows import RowTable
from dla_cache.takedown import take_down
from tests.golden.formula import (
    CLASS_NAMES,
    CODES,
    CONTINUOUS,
    SIDE,
    image_id_of,
    label_of,
    labels_of,
    numbers_of,
    picture_of,
    split_of,
)

REMOVED = (4, 6)
"""Numbers of the images that were removed from `zarr` and `webdataset`; the only one of its shard."""


class FormulaSource:
    """Sees the number of an image in its grey, and puts out what the formula says."""

    def __init__(self, spec: LatentSpec, device: str) -> None:
        if spec.modality in CONTINUOUS:
            shape, axes = CONTINUOUS[spec.modality]
            told: dict[str, Any] = {"kind": "continuous", "dtype": spec.dtype}
        else:
            shape, axes, vocabulary = CODES[spec.modality]
            smallest = next(dtype for dtype in ("uint8", "int16", "int32") if vocabulary <= np.iinfo(dtype).max + 1)
            told = {"kind": "codes", "dtype": smallest, "vocabulary": vocabulary}
        self.recipe = Recipe(
            modality=spec.modality,
            source=spec.source,
            weights_sha256="",
            parameters={"step": 1e-05, "scale": 1.0, "words": "für Eulen", **spec.parameters},
            seed=2**53 + 1,
            source_view_size=SIDE,
            format=LatentFormat(shape=shape, axes=axes, space="a formula", **told),
        )

    def encode(self, pixels: Any, seeds: Sequence[int]) -> Any:
        return np.stack([numbers_of(self.recipe.modality, int(picture[0, 0, 0])) for picture in pixels])

    def close(self) -> None:
        pass


def latent(modality: str, dtype: str = "float16", **parameters: Any) -> LatentSpec:
    return LatentSpec.model_validate(
        {"modality": modality, "source": "formula", "dtype": dtype, "parameters": parameters}
    )


def listed(folder: Path, numbers: Iterable[int], label: Callable[[int], Any] = label_of) -> Manifest:
    """The images as files, and their manifest."""
    (folder / "images").mkdir(parents=True, exist_ok=True)
    rows = []
    for number in numbers:
        content = picture_of(number)
        (folder / "images" / f"{number}").write_bytes(content)
        sha256 = hashlib.sha256(content).hexdigest()
        rows.append(
            ManifestRow(image_id_of(number), f"images/{number}", label(number), split_of(number), sha256, SIDE, SIDE)
        )
    return write_manifest(folder / f"{len(rows)}.parquet", rows, CLASS_NAMES)


def build(manifest: Manifest, store: Path, spec: CacheSpec, **options: Any) -> None:
    build_cache(manifest, spec, store, open_source=FormulaSource, **{"batch_size": 2, **options})


def make_usual(scratch: Path, out: Path) -> None:
    """One label; float16; images as they are; some appended, some removed; something adopted."""
    for layout in ("zarr", "webdataset"):
        spec = CacheSpec(
            latents=(latent("depth"),),
            shard_size=4,
            images="original",
            layout=layout,  # type: ignore[arg-type]
        )
        build(listed(scratch, range(5)), out / layout, spec)
        build(listed(scratch, range(8)), out / layout, spec, append=True)
        again = FormulaSource(latent("depth", version=2), "cpu")
        adopt_source(open_store(out / layout), again, scratch, n_images=3, why="it makes the same", who="the maker")
        take_down([out / layout], [image_id_of(number) for number in REMOVED])


def make_several(scratch: Path, out: Path) -> None:
    """Several labels; bfloat16, int8, int16, int32; pictures made of the images."""
    for layout, images, codes in (("zarr", "jpeg", "motion"), ("webdataset", "raw", "normals")):
        spec = CacheSpec(
            latents=(latent("depth", "bfloat16"), latent("shape", "float32"), latent(codes)),
            shard_size=4,
            images=images,  # type: ignore[arg-type]
            layout=layout,  # type: ignore[arg-type]
        )
        built = scratch / f"built-{layout}"
        build(listed(scratch / "several", (0, 1, 2, 6), labels_of), built, spec)
        convert_store(open_store(built), out / f"{layout}-several", layout, dtypes={"shape": "int8"})


HALF = CacheSpec(latents=(latent("shape", "float32"), latent("audio")), shard_size=3)


def make_half(scratch: Path, out: Path) -> None:
    """float32, uint8; killed twice: records consolidated and loose, shards missing, a file without a record."""
    for layout in ("zarr", "webdataset"):
        store = out / f"{layout}-half"
        spec = HALF.model_copy(update={"layout": layout})
        manifest = listed(scratch / "half", (0, 1, 2, 4, 5, 6, 7))
        for batches in (4, 3):
            asked = iter(range(1, 100))
            try:
                build(manifest, store, spec, should_stop=lambda asked=asked, batches=batches: next(asked) == batches)
            except WorkInterrupted:
                if batches == 4:
                    open_store(store).consolidate("shape")
        whole = scratch / f"whole-{layout}"
        build(manifest, whole, spec)
        for path in open_store(whole).shard_files("audio", 2):
            shutil.copyfile(path, store / path.relative_to(whole))
        (store / "commits" / "audio" / ".1.json.tmp").write_bytes(b'{"modality":"au')


def make_blocks(scratch: Path, out: Path) -> None:
    """More rows than a block has, in two parts."""

    def rows(numbers: Iterable[int]) -> RowTable:
        listing = [
            ManifestRow(image_id_of(n), f"{n}", label_of(n), "train" if n < 1024 else split_of(n), f"{n:064x}", 1, 1)
            for n in numbers
        ]
        return RowTable.from_manifest(write_manifest(scratch / "blocks.parquet", listing, CLASS_NAMES))

    recipe = FormulaSource(latent("audio"), "cpu").recipe
    for n_images in (1027, 1029):
        store = create_store(
            out / "zarr-blocks", rows(range(n_images)), CLASS_NAMES, 260, {"audio": recipe}, append=n_images > 1027
        )
        for index in store.missing("audio"):
            shard = store.shards[index]
            numbers = [int(image_id.split("-")[1]) for image_id in store.rows.kept_ids_of(shard)]
            latents = np.stack([numbers_of("audio", number) for number in numbers])
            store.write_shard("audio", shard, latents, seconds=0.0, device="cpu")
        store.consolidate("audio")


def make_more(scratch: Path, out: Path) -> None:
    """What `requires` names: kinds of modalities, labels and axes that the first readers of v1 do not know."""
    rows = RowTable.from_manifest(listed(scratch / "more", range(5)))
    recipe = FormulaSource(latent("features-twice"), "cpu").recipe
    for layout in ("zarr", "webdataset"):
        store = create_store(out / f"{layout}-more", rows, CLASS_NAMES, 3, {recipe.modality: recipe}, layout=layout)
        for shard in store.shards:
            latents = np.stack([numbers_of(recipe.modality, number) for number in range(shard.start, shard.stop)])
            told: dict[str, Any] = {"made_with": {"torch": "2", "batch_size": 3}, "audit": {"captions": len(latents)}}
            store.write_shard(recipe.modality, shard, latents, seconds=0.0, device="cpu", **told)


def make_newer(out: Path) -> None:
    """Main files that a reader of v1 must refuse, whatever else there is."""
    for name, changes in (("v2", {"format": "v2"}), ("requires", {"requires": ["zstd"]})):
        said = {**json.loads((out / "webdataset" / "dla.json").read_bytes()), **changes}
        said["sha256"] = hashlib.sha256(
            canonical_json({field: value for field, value in said.items() if field != "sha256"}).encode()
        ).hexdigest()
        group = {"zarr_format": 3, "node_type": "group", "attributes": {"dla": said}}
        for layout, main, content in (("zarr", "zarr.json", group), ("webdataset", "dla.json", said)):
            (out / f"{layout}-{name}").mkdir()
            (out / f"{layout}-{name}" / main).write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")


def make(out: Path) -> None:
    """All of them, in a folder that is empty or absent."""
    with tempfile.TemporaryDirectory() as name:
        scratch = Path(name)
        make_usual(scratch, out)
        make_several(scratch, out)
        make_half(scratch, out)
        make_blocks(scratch, out)
        make_more(scratch, out)
        make_newer(out)


if __name__ == "__main__":
    make(Path(sys.argv[1]))
