"""The store: what is written is read, whatever its layout; what does not fit is refused."""

import json
import re
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dla_cache.errors import (
    IncompleteBuildError,
    LatentShapeError,
    MissingLatentError,
    NonFiniteLatentError,
    RecipeMismatchError,
    StoreError,
)
from dla_cache.spec import Modality
from dla_cache.store import open_store
from dla_cache.store.rows import RowTable
from dla_cache.verify import Problem, verify_store

FORMATS = [((3, 2, 2), "float16"), ((4,), "float32"), ((2, 5), "int16"), ((3, 7), "uint8"), ((1, 1, 1), "int32")]


@pytest.mark.parametrize(("shape", "dtype"), FORMATS)
@given(
    n_images=st.integers(1, 12),
    shard_size=st.integers(1, 15),
    picks=st.lists(st.integers(0, 10**6), max_size=20),
)
@settings(max_examples=10, deadline=None)
def test_any_rows_in_any_order_read_as_written(
    tmp_path_factory: pytest.TempPathFactory,
    made: SimpleNamespace,
    shape: tuple[int, ...],
    dtype: str,
    n_images: int,
    shard_size: int,
    picks: list[int],
) -> None:
    recipe = made.recipe(shape, dtype)
    latents = made.latents(recipe, n_images)
    made.store(path := tmp_path_factory.mktemp("store") / "s", recipe, latents, shard_size)
    rows = np.array([pick % n_images for pick in picks], np.int64)
    read = open_store(path).read("depth", rows)
    assert read.dtype == latents.dtype
    np.testing.assert_array_equal(read, latents[rows])


def test_all_zero_latents_are_present_and_zero(tmp_path: Path, made: SimpleNamespace) -> None:
    recipe = made.recipe()
    latents = np.zeros((4, 3, 2, 2), np.float16)
    store = made.store(tmp_path / "s", recipe, latents, 3)
    assert store.missing("depth") == []
    np.testing.assert_array_equal(store.read("depth", np.arange(4)), latents)
    size_bytes = sum(record.size_bytes for record in store.committed("depth").values())
    files = [path for shard in (0, 1) for path in store.shard_files("depth", shard)]
    assert size_bytes == sum(path.stat().st_size for path in files) > latents.nbytes


def test_rows_that_are_not_committed_are_missing_and_never_zero(tmp_path: Path, made: SimpleNamespace) -> None:
    recipe = made.recipe()
    store = made.create(tmp_path / "s", made.rows(7), [], 3, {"depth": recipe})
    store.write_shard("depth", store.shards[0], made.latents(recipe, 3), seconds=0, device="cpu")
    assert store.missing("depth") == [1, 2]
    with pytest.raises(MissingLatentError, match=r"shard 1 of `depth`.*`image-3`"):
        store.read("depth", np.array([0, 3]))
    for ask in (store.content_hash, store.require_complete):
        with pytest.raises(IncompleteBuildError, match="2 of 3 shards of `depth`: `1`, `2`"):
            ask()
    with pytest.raises(MissingLatentError):
        store.statistics("depth", ["train"])


def test_a_shard_file_without_a_record_is_not_there(tmp_path: Path, made: SimpleNamespace) -> None:
    store = made.store(tmp_path / "s", recipe := made.recipe(), made.latents(recipe, 3), 3)
    next((tmp_path / "s" / "commits" / "depth").iterdir()).unlink()
    with pytest.raises(MissingLatentError):
        open_store(store.path).read("depth", np.array([0]))


@pytest.mark.parametrize("rows", [[-1], [7], [0, 8]])
def test_rows_beyond_the_table_are_refused(tmp_path: Path, made: SimpleNamespace, rows: list[int]) -> None:
    store = made.store(tmp_path / "s", recipe := made.recipe(), made.latents(recipe, 7), 3)
    with pytest.raises(MissingLatentError, match=r"\[0, 7\)"):
        store.read("depth", np.array(rows))


def test_a_reader_sees_what_is_committed_after_it_opened(tmp_path: Path, made: SimpleNamespace) -> None:
    recipe = made.recipe()
    latents = made.latents(recipe, 3)
    writer = made.create(tmp_path / "s", made.rows(3), [], 3, {"depth": recipe})
    reader = open_store(tmp_path / "s")
    writer.write_shard("depth", writer.shards[0], latents, seconds=0, device="cpu")
    np.testing.assert_array_equal(reader.read("depth", np.arange(3)), latents)


@pytest.mark.parametrize(
    ("latents", "error", "fault"),
    [
        (np.zeros((3, 3, 2, 3), np.float16), LatentShapeError, r"\[3, 3, 2, 3\].*\[3, 3, 2, 2\]"),
        (np.zeros((2, 3, 2, 2), np.float16), LatentShapeError, r"\[2, 3, 2, 2\]"),
        (np.zeros((3, 3, 2, 2), np.int16), LatentShapeError, "`int16`"),
        (np.zeros((3, 3, 2, 2), np.complex64), LatentShapeError, "`complex64`"),
        (np.zeros((3, 3, 2, 2), bool), LatentShapeError, "`bool`"),
        (np.float32([np.nan, 0, 0])[:, None, None, None] + np.zeros((3, 3, 2, 2)), NonFiniteLatentError, "`image-0`$"),
        (np.float32([0, 0, -np.inf])[:, None, None, None] + np.zeros((3, 3, 2, 2)), NonFiniteLatentError, "`image-2`$"),
        (
            np.float32([0, 7e4, 7e4])[:, None, None, None] + np.zeros((3, 3, 2, 2)),
            NonFiniteLatentError,
            "-1`, `image-2",
        ),
    ],
    ids=["shape", "count", "integer", "complex", "bool", "NaN", "infinity", "beyond float16"],
)
def test_what_is_no_latent_is_refused_with_the_images_named(
    tmp_path: Path, made: SimpleNamespace, latents: np.ndarray, error: type[Exception], fault: str
) -> None:
    store = made.create(tmp_path / "s", made.rows(3), [], 3, {"depth": made.recipe()})
    with pytest.raises(error) as raised:
        store.write_shard("depth", store.shards[0], latents, seconds=0, device="cpu")
    assert re.search(fault, raised.value.message)
    assert "image-" in raised.value.message
    assert store.missing("depth") == [0]


@pytest.mark.parametrize("code", [-1, 100, 2**40])
def test_a_code_outside_the_vocabulary_is_refused(tmp_path: Path, made: SimpleNamespace, code: int) -> None:
    store = made.create(tmp_path / "s", made.rows(3), [], 3, {"depth": made.recipe((2, 5), "int16")})
    codes = np.zeros((3, 2, 5), np.int64)
    codes[1, 0, 0] = code
    with pytest.raises(NonFiniteLatentError, match=r"outside \[0, 100\) for `image-1`"):
        store.write_shard("depth", store.shards[0], codes, seconds=0, device="cpu")


def test_equal_latents_make_equal_bytes(tmp_path: Path, made: SimpleNamespace) -> None:
    recipe = made.recipe()
    for name in ("one", "two"):
        made.store(tmp_path / name, recipe, made.latents(recipe, 7), 3)
    for one in (tmp_path / "one").rglob("*"):
        if one.is_file() and "commits" not in one.parts:
            assert one.read_bytes() == (tmp_path / "two" / one.relative_to(tmp_path / "one")).read_bytes()


def test_the_same_spec_shares_a_store(tmp_path: Path, made: SimpleNamespace) -> None:
    recipe = made.recipe()
    latents = made.latents(recipe, 7)
    made.store(tmp_path / "s", recipe, latents, 3)
    shared = made.create(tmp_path / "s", made.rows(7), [], 3, {"depth": recipe})
    np.testing.assert_array_equal(shared.read("depth", np.arange(7)), latents)


def test_another_modality_joins_a_store(tmp_path: Path, made: SimpleNamespace) -> None:
    made.store(tmp_path / "s", recipe := made.recipe(), made.latents(recipe, 7), 3)
    codes = made.recipe((2, 5), "int16", modality=Modality.AUDIO)
    made.store(tmp_path / "s", codes, made.latents(codes, 7), 3)
    assert open_store(tmp_path / "s").modalities == ("audio", "depth")


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        ({"shard_size": 4}, "`shard_size` `3` → `4`"),
        ({"class_names": ["cat"]}, r"`class_names` `\[\]` → `\['cat'\]`"),
        ({"n_rows": 8}, "row table: `7` images → `8`"),
        ({"seed": 1}, "`depth.seed` `0` → `1`"),
        ({"dtype": "float32"}, "`depth.format.dtype` `float16` → `float32`"),
    ],
)
def test_another_spec_is_refused_naming_old_and_new(
    tmp_path: Path, made: SimpleNamespace, changes: dict[str, object], fault: str
) -> None:
    wanted = {"shard_size": 3, "class_names": [], "n_rows": 7, "seed": 0, "dtype": "float16"}

    def create(wanted: dict[str, object]) -> None:
        recipe = made.recipe(dtype=wanted["dtype"], seed=wanted["seed"])
        made.create(
            tmp_path / "s", made.rows(wanted["n_rows"]), wanted["class_names"], wanted["shard_size"], {"depth": recipe}
        )

    create(wanted)
    with pytest.raises(RecipeMismatchError, match=fault):
        create({**wanted, **changes})
    create(wanted)


def test_of_different_specs_that_create_a_store_at_the_same_time_one_wins(
    tmp_path: Path, made: SimpleNamespace
) -> None:
    def create(shard_size: int) -> int | None:
        try:
            return made.create(tmp_path / "s", made.rows(7), [], shard_size, {"depth": made.recipe()}).shard_size
        except RecipeMismatchError:
            return None

    with ThreadPoolExecutor(8) as pool:
        winners = [shard_size for shard_size in pool.map(create, range(1, 9)) if shard_size is not None]
    store = open_store(tmp_path / "s")
    assert winners == [store.shard_size]
    assert verify_store(store).problems == tuple(
        Problem(f"depth, shard {shard.index}", "not committed: run `dla cache build` with the same spec again")
        for shard in store.shards
    )


def test_the_first_row_that_differs_is_named(tmp_path: Path, made: SimpleNamespace) -> None:
    made.create(tmp_path / "s", made.rows(7), [], 3, {})
    rows = list(made.rows(7))
    rows[4] = type(rows[4])(4, "other", *[getattr(rows[4], name) for name in ("sha256", "split", "label", "uri")])
    with pytest.raises(RecipeMismatchError, match=r"row 4 .*image-4.* → .*other"):
        made.create(tmp_path / "s", type(made.rows(1))(rows), [], 3, {})


def test_a_folder_of_other_things_is_refused(tmp_path: Path, made: SimpleNamespace) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(StoreError, match=r"notes\.txt"):
        made.create(tmp_path, made.rows(7), [], 3, {})


def test_what_is_no_store_is_refused_with_a_hint(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(StoreError, match=r"is no store\nhint: "):
            open_store(path)


@pytest.mark.parametrize("other", [2, "v2"])
def test_another_format_is_refused_with_a_hint(tmp_path: Path, made: SimpleNamespace, other: int | str) -> None:
    store = made.create(tmp_path / "s", made.rows(7), [], 3, {})
    path = tmp_path / "s" / store.metadata.layout.main_file
    path.write_text(json.dumps({"format": other, "attributes": {"dla": {"format": other}}}))
    with pytest.raises(StoreError, match=rf"format `{other}`, this dla reads `v1`\nhint: upgrade"):
        open_store(tmp_path / "s")


def test_a_changed_label_is_noticed_without_a_manifest(tmp_path: Path, made: SimpleNamespace) -> None:
    made.create(tmp_path / "s", made.rows(7), [], 3, {"depth": made.recipe()})
    rows = RowTable([replace(image, label=1 if image.row == 4 else 0) for image in made.rows(7)])
    made.create(tmp_path / "other", rows, [], 3, {})
    (part,), (forged,) = ((tmp_path / name).glob("rows/*.arrow") for name in ("s", "other"))
    part.write_bytes(forged.read_bytes().ljust(part.stat().st_size, b"\0"))
    with pytest.raises(StoreError, match=r"row table's part .*checksum.* not the one that was written\nhint: "):
        _ = open_store(tmp_path / "s").rows[4]


@pytest.mark.parametrize(
    ("old", "new"),
    [('"cat"', '"dog"'), ('"shard_size": 3', '"shard_size": 4'), ('"seed": 0', '"seed": 1')],
)
def test_changed_metadata_is_noticed(tmp_path: Path, made: SimpleNamespace, old: str, new: str) -> None:
    made.create(tmp_path / "s", made.rows(7), ["cat"], 3, {"depth": made.recipe()})
    (path,) = [path for path in (tmp_path / "s").rglob("*.json") if old in path.read_text()]
    assert path.read_text().count(old) == 1
    path.write_text(path.read_text().replace(old, new))
    with pytest.raises(StoreError, match=r"is not the one that was written\nhint: "):
        open_store(tmp_path / "s")


def test_a_row_table_that_another_version_of_arrow_wrote_is_kept(tmp_path: Path, made: SimpleNamespace) -> None:
    made.create(tmp_path / "s", made.rows(7), [], 3, {})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("dla_cache.store.creation.write_rows", lambda *_: "another hash of the same rows")
        made.create(tmp_path / "s", made.rows(7), [], 3, {"depth": made.recipe()})
    assert open_store(tmp_path / "s").modalities == ("depth",)


def test_a_store_that_lost_its_metadata_is_not_taken_for_a_new_one(tmp_path: Path, made: SimpleNamespace) -> None:
    recipe = made.recipe()
    store = made.store(tmp_path / "s", recipe, made.latents(recipe, 7), 3)
    main_file = store.metadata.layout.main_file
    (store.path / main_file).unlink()
    with pytest.raises(StoreError, match=rf"commit records but has lost its `{main_file}`\nhint: "):
        made.create(store.path, made.rows(7), [], 3, {"depth": made.recipe(seed=1)})


def test_damaged_metadata_is_one_error(tmp_path: Path, made: SimpleNamespace) -> None:
    store = made.create(tmp_path / "s", made.rows(7), [], 3, {"depth": made.recipe()})
    read = [*store.path.glob("rows/*"), *store.path.glob("*.json"), *store.path.glob("latents/depth/*.json")]
    for path in read:
        whole = path.read_bytes()
        path.write_bytes(whole[:-30])
        with pytest.raises(StoreError, match=r"damaged|not the one that was written"):
            open_store(tmp_path / "s")
        path.write_bytes(whole)
    open_store(tmp_path / "s")


def test_a_folder_with_the_metadata_of_two_layouts_is_refused(tmp_path: Path, made: SimpleNamespace) -> None:
    store = made.create(tmp_path / "s", made.rows(7), [], 3, {"depth": made.recipe()})
    for name in ("zarr.json", "dla.json"):
        (store.path / name).touch()
    with pytest.raises(StoreError, match=r"has both `zarr\.json` and `dla\.json`\nhint: "):
        open_store(store.path)


def test_a_modality_that_would_lead_out_of_the_store_is_refused(tmp_path: Path, made: SimpleNamespace) -> None:
    recipe = made.recipe()
    store = made.create(tmp_path / "s", made.rows(7), [], 3, {"depth": recipe})
    layout = store.metadata.layout
    facts = store.metadata.settings | {"rows_sha256": store.metadata.rows_sha256}
    (store.path / layout.main_file).write_text(
        json.dumps(layout.metadata_files(facts, {"../../depth": recipe}, 7)[layout.main_file])
    )
    with pytest.raises(StoreError, match=r"modalities that this dla does not know: `\.\./\.\./depth`"):
        open_store(store.path)


def test_who_names_no_layout_joins_the_one_there_is(tmp_path: Path, made: SimpleNamespace, layout: str) -> None:
    made.create(tmp_path / "s", made.rows(7), [], 3, {"depth": made.recipe()})
    joined = made.create(tmp_path / "s", made.rows(7), [], 3, {}, layout=None)
    assert (joined.layout_name, joined.modalities) == (layout, ("depth",))
    assert made.create(tmp_path / "t", made.rows(7), [], 3, {}, layout=None).layout_name == "zarr"


def test_another_layout_is_refused_naming_old_and_new(tmp_path: Path, made: SimpleNamespace, layout: str) -> None:
    made.create(tmp_path / "s", made.rows(7), [], 3, {"depth": made.recipe()})
    other = {"zarr": "webdataset", "webdataset": "zarr"}[layout]
    with pytest.raises(RecipeMismatchError, match=f"`layout` `{layout}` → `{other}`"):
        made.create(tmp_path / "s", made.rows(7), [], 3, {"depth": made.recipe()}, layout=other)


def test_no_path_of_this_machine_is_in_a_store(tmp_path: Path, made: SimpleNamespace) -> None:
    made.store(tmp_path / "s", recipe := made.recipe(), made.latents(recipe, 7), 3)
    assert not [
        path for path in (tmp_path / "s").rglob("*") if path.is_file() and str(tmp_path).encode() in path.read_bytes()
    ]


def test_an_empty_split_is_named(tmp_path: Path, made: SimpleNamespace) -> None:
    store = made.create(tmp_path / "s", made.rows(7), [], 3, {})
    assert store.rows_of(["test"]).tolist() == [1, 3, 5]
    with pytest.raises(StoreError, match=r"`holdout`\nhint: its splits are `test`, `train`"):
        store.rows_of(["test", "holdout"])
