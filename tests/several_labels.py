"""The tiny cache with several labels an image, for tests of the trainer and of the commands."""

from dataclasses import replace

from dla_cache.manifest import write_manifest

SEVERAL = {None: None, 0: (0,), 1: (0, 2), 2: ()}
"""Classes of an image that has one: red has its own, green two others, blue none."""


def build_several(tiny, folder, change=lambda label, split: label):
    """The store of the tiny cache's images, each with any number of labels, which `change` may change."""
    rows = [replace(row, label=change(SEVERAL[row.label], row.split)) for row in tiny.manifest.rows()]
    manifest = write_manifest(tiny.manifest.root / f"{folder.name}.parquet", rows, tiny.manifest.class_names)
    return tiny.build(manifest, folder / "several.zarr")
