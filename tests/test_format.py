"""Format v1: dla and a stranger's reader read every golden store, say the same, and refuse the same."""

import ast
import io
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from typer.testing import CliRunner

from cli.cache import app
from dla_cache.errors import IncompleteBuildError, StoreError
from dla_cache.pairs import PairStream
from dla_cache.store import open_store
from dla_cache.verify import verify_store
from tests import stranger
from tests.golden.formula import label_of, labels_of, number_of, numbers_of, picture_of
from tests.golden.make import HALF, REMOVED, build, image_id_of, listed, make
from tests.stranger_checks import read_store

GOLDEN = Path(__file__).parent / "golden" / "v1"
CONTENT = {
    "zarr": "924cc09e070d5e778f7df545d2dc09d84f70aa2205164e25c773117e862f137d",
    "webdataset": "924cc09e070d5e778f7df545d2dc09d84f70aa2205164e25c773117e862f137d",
    "zarr-several": "bd36a1c09cca21e6c403de40dc25c689b9262fa31e1676be5046f9b50d3c353c",
    "webdataset-several": "9176c2e47763bd964510c8eaa1f8aa518f947012b3ccaf24cebff43cd91520e9",
    "zarr-blocks": "760e0dde4644e617b7e06f5735ff2f9d76dae516b8179aff6564eda1bb7a97c2",
    "zarr-more": "bc1c0f28a2658015b80ad874bef75acd6bf1e000d820091d6dd86427d3287193",
    "webdataset-more": "bc1c0f28a2658015b80ad874bef75acd6bf1e000d820091d6dd86427d3287193",
    "zarr-half": None,
    "webdataset-half": None,
}
"""Content hashes; of half-built stores none."""

HALF_CONTENT = "96482f1e40e7c1d6706747e8f901f7b82dc3d753022b85fb911d08fc31eef25a"
"""Of the half-built stores, once they are whole."""

NEWER = {"zarr-v2": "v2", "webdataset-v2": "v2", "zarr-requires": "zstd", "webdataset-requires": "zstd"}
HALVES = ("zarr-half", "webdataset-half")
MORE = ("zarr-more", "webdataset-more")
ATTEMPT = ("seconds", "statistics", "error", "made_with")
"""What a record tells of the attempt, or of sums whose order is NumPy's."""
WITH_IMAGES = {"zarr": "original", "webdataset": "original", "zarr-several": "jpeg", "webdataset-several": "raw"}


@pytest.fixture(autouse=True)
def no_power_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    """None is played here, and many files are written."""
    monkeypatch.setattr(os, "fsync", lambda _descriptor: None)


@pytest.fixture
def copied(tmp_path: Path) -> Callable[[str], Path]:
    """A copy of a golden store, to be changed."""
    return lambda name: Path(shutil.copytree(GOLDEN / name, tmp_path / "cache"))


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_there_are_these_golden_stores_and_the_strangers_know_nothing_of_dla() -> None:
    assert {path.name for path in GOLDEN.iterdir()} == CONTENT.keys() | NEWER.keys()
    for name in ("stranger", "stranger_checks"):
        tree = ast.parse((Path(__file__).parent / f"{name}.py").read_text())
        modules = {node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
        modules |= {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
        assert not [module for module in modules if module.split(".")[0] in ("dla_cache", "trainer", "cli", "zarr")]


# Reading.


@pytest.mark.parametrize("name", CONTENT)
def test_dla_and_a_stranger_read_the_same_and_it_is_what_the_formula_says(name: str) -> None:
    store, found = open_store(GOLDEN / name), read_store(GOLDEN / name)
    rows = store.rows
    assert [(row["row"], row["image_id"], row["split"], row["removed"]) for row in found.rows] == [
        (image.row, image.image_id, image.split, image.removed) for image in rows
    ]
    kept = [row for row in found.rows if not row["removed"]]
    labels = [tuple(row["label"]) if isinstance(row["label"], list) else row["label"] for row in kept]
    assert labels == rows.labels_of([row["row"] for row in kept])
    assert labels == [(labels_of if rows.is_multi_label else label_of)(number_of(row["image_id"])) for row in kept]
    for modality, latents in found.latents.items():
        expected = [row["row"] for row in kept if row["image_id"] in latents]
        read = store.read(modality, np.array(expected))
        assert np.array_equal(read, np.stack(list(latents.values())))
        assert read.dtype == next(iter(latents.values())).dtype == store.recipe(modality).format.read_dtype
        formula = np.stack([numbers_of(modality, number_of(image_id)) for image_id in latents])
        assert_stored_as(read, formula, found_format=store.recipe(modality).format.model_dump())
    assert store.has_images == (name in WITH_IMAGES)
    if store.has_images:
        assert store.read_images(np.array([row["row"] for row in kept])) == list(found.images.values())
        for image_id, content in found.images.items():
            assert_picture(content, number_of(image_id), WITH_IMAGES[name])
    assert found.content_hash == CONTENT[name]
    if CONTENT[name] is not None:
        assert store.content_hash() == CONTENT[name]


def assert_stored_as(read: Any, formula: Any, found_format: dict[str, Any]) -> None:
    """That these are the numbers of the formula, rounded as their dtype has it."""
    if found_format["dtype"] == "bfloat16":
        assert (np.abs(read - formula) <= np.abs(formula) / 2**8).all()
        assert not (read.view("<u4") & 0xFFFF).any()
    elif found_format["dtype"] == "int8":
        scale = np.array(found_format["quantisation"]["scale"])  # the channel is the last axis
        assert (np.abs(read - formula) <= scale * 0.501).all()
    else:
        assert np.array_equal(read, formula.astype(found_format["dtype"]))


def assert_picture(content: bytes, number: int, encoding: str) -> None:
    if encoding == "original":
        assert content == picture_of(number)
    else:
        made = np.asarray(Image.open(io.BytesIO(content)).convert("RGB"), int)
        assert np.abs(made - np.asarray(Image.open(io.BytesIO(picture_of(number))), int)).max() <= 2 * (
            encoding == "jpeg"
        )


def test_the_golden_stores_hold_what_the_format_can_say() -> None:
    stores = [open_store(GOLDEN / name) for name in CONTENT]
    formats = [store.recipe(modality).format for store in stores for modality in store.modalities]
    assert {latent.dtype for latent in formats} == {*stranger.ON_DISK}
    assert any(latent.rounded_from for latent in formats)
    encodings = {store.metadata.images and store.metadata.images.encoding for store in stores}
    assert encodings == {None, "original", "jpeg", "raw"}
    assert {image.label for store in stores if store.rows.is_multi_label for image in store.rows} >= {None, (), (1, 2)}
    for name in ("zarr", "webdataset"):
        rows = open_store(GOLDEN / name).rows
        assert [image.row for image in rows if image.removed] == [4, 9]
        assert rows.removed_ids == {image_id_of(number) for number in REMOVED}
        assert rows.spans == [(0, 5), (8, 11)]
        assert (GOLDEN / name / "adopted.json").is_file()
    assert len(open_store(GOLDEN / "zarr-blocks").rows.parts[0].block_splits) == 2
    for name in HALVES:
        suffixes = {path.suffix for path in (GOLDEN / name / "commits").rglob("*.*")}
        assert suffixes == {".json", ".parquet", ".tmp"}


@pytest.mark.parametrize("name", CONTENT)
def test_commands_that_change_nothing_work_on_them(name: str) -> None:
    before = files_of(GOLDEN / name)
    store = str(GOLDEN / name)
    image_id = image_id_of(1)
    for arguments in (
        ["status", store],
        ["inspect", store],
        ["inspect", store, "--image-id", image_id],
        ["explain", store, image_id],
        ["du", store],
        ["ls", store],
        ["diff", store, store],
        ["verify", store, "--jobs", "1"],
    ):
        result = CliRunner().invoke(app, arguments)
        is_refused = name in HALVES and arguments[0] in ("verify", "explain", "inspect", "diff")
        assert is_refused or result.exit_code == 0, (arguments, result.output)
    assert files_of(GOLDEN / name) == before


@pytest.mark.parametrize("name", CONTENT)
def test_an_epoch_of_each_brings_every_image_once(name: str) -> None:
    def stream() -> PairStream:
        return PairStream(open_store(GOLDEN / name), None, None, 64, seed=0, decode=None, images=name in WITH_IMAGES)

    if name in HALVES:
        with pytest.raises(IncompleteBuildError, match="lacks 2 of 3 shards of `audio`"):
            stream()
        return
    found = read_store(GOLDEN / name)
    batches = list(stream().epoch_once())
    assert sorted(image_id for batch in batches for image_id in batch.image_ids) == sorted(
        row["image_id"] for row in found.rows if not row["removed"]
    )
    for batch in batches:
        for modality, latents in batch.latents.items():
            expected = np.stack([found.latents[modality][image_id] for image_id in batch.image_ids])
            assert np.array_equal(latents.numpy(), expected)
        assert list(batch.images) == [found.images[image_id] for image_id in batch.image_ids if found.images]


# Writing.


@pytest.mark.parametrize("name", HALVES)
def test_a_half_built_store_is_built_on_and_is_the_one_that_was_never_interrupted(
    name: str, copied: Callable[[str], Path], tmp_path: Path
) -> None:
    store = copied(name)
    problems = [problem.where for problem in verify_store(open_store(store)).problems]
    assert problems[:2] == ["audio, shard 1", "audio, shard 2"]
    manifest = listed(tmp_path / "images", (0, 1, 2, 4, 5, 6, 7))
    build(manifest, store, HALF.model_copy(update={"layout": name.removesuffix("-half")}))
    assert not verify_store(open_store(store)).problems
    assert open_store(store).content_hash() == read_store(store).content_hash == HALF_CONTENT


@pytest.fixture(scope="module")
def today(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The golden stores as dla writes them today."""
    folder = tmp_path_factory.mktemp("today")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda _descriptor: None)
        make(folder)
    return folder


def told_by(folder: Path) -> Any:
    """What the files say whose bytes the format does not fix, without what may differ: times, hashes of such files.

    JSON may be spaced otherwise, Parquet's bytes are those of one version of Arrow, statistics are sums whose order
    is NumPy's.
    """
    store = stranger.open_store(folder)
    main = {name: value for name, value in store.main.items() if name not in ("sha256", "rows_sha256", "images")}
    images = {name: value for name, value in store.main.get("images", {}).items() if name != "made_by"}
    records = [
        {name: value for name, value in record.items() if name not in ATTEMPT}
        for series in store.recipes
        for _, record in sorted(store.records(series).items())
    ]
    of_rows = ("start", "n_rows", "n_removed", "splits", "block_splits")
    parts = [{name: part[name] for name in of_rows} for part in store.parts]
    return main, images, records, parts, store.recipes, [store.block(part, 0) for part in store.parts]


@pytest.mark.parametrize("name", CONTENT)
def test_what_dla_writes_today_is_byte_for_byte_what_it_wrote_then(name: str, today: Path) -> None:
    golden, now = GOLDEN / name, today / name
    assert told_by(now) == told_by(golden)
    fixed = re.compile(r".*\.(tar|index|blob)|latents/.*/c\..*" + (r"|rows/.*\.arrow" if same_arrow(golden) else ""))
    if open_store(now).metadata.images != open_store(golden).metadata.images:
        assert WITH_IMAGES[name] == "jpeg"  # other libraries make other pictures
        fixed = re.compile(f"(?!images/)({fixed.pattern})")
    then, made = (
        {path: content for path, content in files_of(folder).items() if fixed.fullmatch(path)}
        for folder in (golden, now)
    )
    assert made.keys() == then.keys()
    assert [path for path in then if made[path] != then[path]] == []


def same_arrow(golden: Path) -> bool:
    """Whether the Arrow that wrote a golden store is the one installed: it decides the bytes of record batches."""
    (index,) = (golden / "rows").glob("index-*.parquet")
    return str(pq.ParquetFile(index).metadata.created_by).endswith(f" {pa.cpp_version}")


# Refusing.


@pytest.mark.parametrize("name", MORE)
def test_a_store_says_what_it_requires_beyond_the_first_readers_of_the_format(name: str) -> None:
    store = open_store(GOLDEN / name)
    assert store.metadata.requires == stranger.open_store(GOLDEN / name).main["requires"] == ["axes", "modalities"]
    assert [store.recipe(modality).format.n_draws for modality in store.modalities] == [2]
    assert store.recipe("features-twice").modality.kind == "features"
    assert [record.audit for _, record in sorted(store.committed("features-twice").items())] == [
        {"captions": 3},
        {"captions": 2},
    ]
    assert store.committed("features-twice")[0].made_with == {"torch": "2", "batch_size": 3}
    for other in CONTENT.keys() - {*MORE}:
        assert open_store(GOLDEN / other).metadata.requires == []


@pytest.mark.parametrize(("name", "what"), NEWER.items())
def test_a_newer_store_is_refused_with_the_hint_to_upgrade(name: str, what: str) -> None:
    with pytest.raises(StoreError, match=f"`{what}`") as refused:
        open_store(GOLDEN / name)
    assert refused.value.hint is not None
    assert "upgrade dla" in refused.value.hint
    with pytest.raises(stranger.Refused, match="newer"):
        stranger.open_store(GOLDEN / name)


SAID = re.compile(rb'"(?:sha256|rows_sha256|recipe_hash|seed|shard_size|space|depth)": "?([^",\s]+)')
"""What is said, and vouched for, in JSON: its spaces may be others."""


def is_refused(store: Path) -> bool:
    try:
        read_store(store)
    except stranger.Refused:
        return True
    return False


@pytest.mark.parametrize("name", ["zarr", "webdataset", "zarr-half"])
def test_a_stranger_refuses_a_flipped_byte_in_each_kind_of_file(name: str, copied: Callable[[str], Path]) -> None:
    store = copied(name)
    unread = re.compile(r"README\.md|adopted\.json|latents/zarr\.json|commits/.*\.tmp")
    random = np.random.default_rng(0)
    kinds = {re.sub(r"[0-9a-f]{16}|[0-9]+", "#", path): path for path in sorted(files_of(store), reverse=True)}
    for path in kinds.values():
        if unread.fullmatch(path):
            continue
        content = (store / path).read_bytes()
        is_spaced = path.endswith(("zarr.json", "dla.json"))
        spans = [said.span(1) for said in SAID.finditer(content)] if is_spaced else [(0, len(content))] * 3
        for span in spans:
            place, flipped = random.integers(*span), bytearray(content)
            flipped[place] ^= 1 if is_spaced else 1 << int(random.integers(8))
            (store / path).write_bytes(flipped)
            assert is_refused(store), f"{path}, byte {place}"
        (store / path).write_bytes(content)
    assert not is_refused(store)


@pytest.mark.parametrize("name", ["zarr", "webdataset"])
def test_a_stranger_refuses_a_removed_row_a_gap_and_a_row_without_a_record(name: str) -> None:
    store = stranger.open_store(GOLDEN / name)
    for read in (store.image, lambda row: store.latent("depth", row)):
        with pytest.raises(stranger.Refused, match="row 9 was removed"):
            read(9)
        with pytest.raises(stranger.Refused, match="no row 6"):
            read(6)
    half = stranger.open_store(GOLDEN / f"{name}-half")
    assert half.latent("audio", 2).shape == half.latent("shape", 6).T.shape
    with pytest.raises(stranger.Refused, match="audio of shard 2 is not committed"):
        half.latent("audio", 6)  # though its file is there


@pytest.mark.parametrize(("name", "row"), [("zarr", 2), ("webdataset", 10), ("zarr-blocks", 1025)])
def test_a_stranger_reads_one_row_without_the_others_and_refuses_it_damaged(
    name: str, row: int, copied: Callable[[str], Path]
) -> None:
    whole, store = stranger.open_store(GOLDEN / name), copied(name)
    modality = next(iter(whole.recipes))
    shard, place = divmod(row, whole.shard_size)
    offset, size, _ = whole.place(modality, shard, place)
    part = next(part for part in whole.parts if part["start"] <= row < part["start"] + part["n_rows"])
    block = part["block_offsets"][(row - part["start"]) // whole.block_rows :][:2]
    payloads, *index = (path.relative_to(GOLDEN / name).as_posix() for path in whole.files(modality, shard))
    ends = [whole.place(modality, shard, edge)[:2] for edge in (0, whole.rows_of_shard(shard) - 1)]
    edges = [slice(sum(end), sum(end) + 4) for end in ends] if whole.is_zarr else []
    needed = {part["file"]: slice(*block), payloads: slice(offset, offset + size + 4 * whole.is_zarr)}
    for path, content in files_of(store).items():
        if path.endswith((".arrow", ".tar", ".blob")) or "/c." in path:
            kept = bytearray(len(content))
            kept[needed.get(path, slice(0))] = content[needed.get(path, slice(0))]
            for edge in edges if path == payloads else ():
                kept[edge] = content[edge]
            (store / path).write_bytes(kept)
    assert np.array_equal(stranger.open_store(store).latent(modality, row), whole.latent(modality, row))
    for path in (*needed, *index):
        content = (store / path).read_bytes()
        read = range(len(content))[needed.get(path, slice(None))]
        for place in (read[0], read[len(read) // 2], read[-1]):
            flipped = bytearray(content)
            flipped[place] ^= 16
            (store / path).write_bytes(flipped)
            with pytest.raises(stranger.Refused):
                stranger.open_store(store).latent(modality, row)
        (store / path).write_bytes(content)


# The page.

PAGE = (Path(__file__).parents[1] / "docs" / "format.md").read_text()


def snippets() -> list[tuple[str, str]]:
    """Layout and code of each."""
    found, layout = [], ""
    for heading, code in re.findall(r"^## Layout `(\w+)`|^```python\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL):
        layout = heading or layout
        found += [(layout, code)] if code else []
    return found


@pytest.mark.parametrize(("layout", "code"), snippets(), ids=["zarr", "webdataset", "one-row"])
def test_the_code_on_the_page_reads_a_golden_store(layout: str, code: str, copied: Callable[[str], Path]) -> None:
    folder = copied(layout).parent
    code += "" if "print" in code else "print(latent.tolist())"
    ran = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    if "tolist" in code.splitlines()[-1]:
        assert json.loads(ran.stdout) == numbers_of("depth", 2).astype(np.float16).tolist()
    else:
        assert ran.stdout.startswith("image-0000 (2, 2, 2)")
        assert ran.stdout.count("\n") == (1 if layout == "zarr" else 6)
