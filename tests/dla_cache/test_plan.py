"""A plan says what a build then does, lists only what is left, and is refused where it does not hold any more."""

import shutil
from dataclasses import replace

import numpy as np
import pytest

from dla_cache.build import build_cache
from dla_cache.errors import DlaError, ImageError, ManifestError, RecipeMismatchError, SpecError, StoreError
from dla_cache.manifest import read_manifest, write_manifest
from dla_cache.plan import PlannedSources, planned_manifest, read_plan, write_plan
from dla_cache.planning import Terms, make_plan
from dla_cache.sources import SOURCES, Encoded
from dla_cache.spec import CacheSpec, LatentSpec, Modality
from dla_cache.store import open_store
from dla_cache.survey import DAMAGED, NEW_IMAGES, NEW_MODALITY, NEW_STORE, NO_LATENT, NOT_COMMITTED


@pytest.fixture
def place(tmp_path):
    return str(tmp_path / "cache")


@pytest.fixture
def listed(manifest):
    return manifest.root / "manifest.parquet"


@pytest.fixture
def plan_of(listed, place, open_source):
    def plan(spec, manifest_path=listed, **options):
        options = {"open_source": open_source, "batch_size": 4, **options}
        return make_plan(manifest_path, spec, place, **options)

    return plan


def build(manifest, spec, place, open_source, **options):
    return build_cache(manifest, spec, place, open_source=open_source, batch_size=4, **options)


def half_build(manifest, spec, place, open_source):
    """A store of which the last three shards are not committed any more."""
    build(manifest, spec, place, open_source)
    store = open_store(place)
    store.withdraw("depth", {shard: record for shard, record in store.committed("depth").items() if shard >= 2})


@pytest.mark.parametrize("images", ["none", "raw"])
def test_a_build_computes_and_writes_what_the_plan_says(manifest, spec, place, plan_of, open_source, tmp_path, images):
    spec = spec.model_copy(update={"images": images})
    plan = plan_of(spec)
    assert not (tmp_path / "cache").exists()
    assert plan.latents["depth"].reasons == {NEW_STORE: 23}
    report = build(manifest, spec, place, open_source)
    assert (plan.n_images, plan.latents["depth"].images) == (report.n_images, report.images_encoded)
    store = open_store(place)
    for name, part in plan.series.items():
        assert part.size_bytes == sum(record.size_bytes for record in store.committed(name).values())


def test_of_a_whole_store_nothing_is_to_be_done(manifest, spec, place, plan_of, open_source):
    build(manifest, spec, place, open_source)
    plan = plan_of(spec)
    assert (plan.latents["depth"].images, plan.latents["depth"].batch_seconds, plan.size_bytes) == (0, (), 0)
    assert plan.device_hours == (0, 0, 0)
    assert plan.break_even_students is None


def test_of_a_half_built_store_only_the_rest_is_planned(manifest, spec, place, plan_of, open_source):
    half_build(manifest, spec, place, open_source)
    store = open_store(place)
    missing = sum(len(store.shards[shard]) for shard in store.missing("depth"))
    assert missing == 13
    plan = plan_of(spec)
    assert plan.latents["depth"].reasons == {NOT_COMMITTED: missing}
    before = sum(record.size_bytes for record in store.committed("depth").values())
    assert build(manifest, spec, place, open_source).images_encoded == missing
    after = sum(record.size_bytes for record in open_store(place).committed("depth").values())
    assert plan.size_bytes == after - before


def test_a_modality_that_is_added_is_planned_alone(manifest, spec, place, plan_of, open_source):
    build(manifest, spec, place, open_source)
    both = spec.model_copy(update={"latents": (*spec.latents, LatentSpec(modality=Modality.NORMALS, source="pixels"))})
    plan = plan_of(both)
    assert {name: part.reasons for name, part in plan.latents.items()} == {"depth": {}, "normals": {NEW_MODALITY: 23}}


def test_images_that_are_appended_are_planned_alone(manifest, spec, place, plan_of, open_source):
    first = write_manifest(manifest.root / "first.parquet", [*manifest.rows()][:12], manifest.class_names)
    build(first, spec, place, open_source)
    with pytest.raises(RecipeMismatchError, match="`12` images → `23`"):
        plan_of(spec)
    plan = plan_of(spec, append=True)
    assert plan.latents["depth"].reasons == {NEW_IMAGES: 11}
    assert build(manifest, spec, place, open_source, append=True).images_encoded == 11


def test_damaged_shards_are_planned_to_be_made_again(manifest, spec, place, plan_of, open_source):
    build(manifest, spec, place, open_source)
    open_store(place).shard_path("depth", 1).unlink()
    plan = plan_of(spec)
    assert plan.latents["depth"].reasons == {DAMAGED: 5}
    assert plan.repair
    assert build(manifest, spec, place, open_source, repair=plan.repair).images_encoded == 5


def test_images_that_a_build_could_not_make_are_counted_by_themselves(manifest, spec, place, plan_of, open_source):
    (manifest.root / "images" / "image-7.png").write_bytes(b"no image")
    with pytest.raises(DlaError, match="image-7"):
        build(manifest, spec, place, open_source)
    assert plan_of(spec).latents["depth"].reasons == {NO_LATENT: 1, NOT_COMMITTED: 4}


def test_what_a_build_would_refuse_is_refused_by_its_plan(manifest, spec, place, plan_of, open_source, tmp_path):
    build(manifest, spec, place, open_source)
    other = spec.model_copy(update={"latents": (spec.latents[0].model_copy(update={"seed": 1}),)})
    with pytest.raises(RecipeMismatchError, match=r"`depth.seed` `0` → `1`"):
        plan_of(other)
    shutil.rmtree(place)
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "thesis.txt").touch()
    with pytest.raises(StoreError, match="holds other things"):
        plan_of(spec)


def test_the_measured_seconds_are_those_of_the_source(spec, plan_of, open_source):
    seen = []
    plan = plan_of(
        spec,
        open_source=lambda entry, device: open_source(entry, device, seconds=0.02),
        n_batches=2,
        terms=Terms(devices=2, price_per_hour=3.0, epochs=10, students=4),
        on_batch=lambda *told: seen.append(told),
    )
    part = plan.latents["depth"]
    assert len(part.batch_seconds) == 2
    assert all(0.02 <= seconds < 0.2 for seconds in part.batch_seconds)
    least, expected, most = plan.device_hours
    assert 23 * 0.02 / 4 / 3600 <= least <= expected <= most
    assert plan.wall_hours[1] == expected / 2
    assert plan.cost[1] == pytest.approx(3 * expected)
    assert plan.online_hours == pytest.approx(4 * 10 * expected)
    assert seen == [(1, 3, "depth"), (2, 3, "depth"), (3, 3, "depth")]


@pytest.mark.parametrize(("epochs", "students"), [(1, 2), (2, 1), (100, 1)])
def test_the_cache_is_cheaper_as_soon_as_an_image_is_asked_for_twice(spec, plan_of, epochs, students):
    assert plan_of(spec, terms=Terms(epochs=epochs)).break_even_students == students


def test_broken_images_do_not_keep_a_plan_from_being_made_unless_all_are(manifest, spec, plan_of):
    for number in range(12):
        (manifest.root / "images" / f"image-{number}.png").write_bytes(b"no image")
    assert len(plan_of(spec).latents["depth"].batch_seconds) == 3
    for path in (manifest.root / "images").iterdir():
        path.unlink()
    with pytest.raises(ImageError, match="cannot be read"):
        plan_of(spec)


def test_a_plan_knows_licences_and_the_free_disk(spec, plan_of):
    plan = plan_of(spec)
    assert plan.latents["depth"].licence == "not known to dla"
    assert plan.free_bytes > 0
    assert not plan.is_short_of_disk
    assert plan.model_copy(update={"free_bytes": 10}).is_short_of_disk


def test_a_plan_that_is_written_reads_back_the_same(spec, plan_of, tmp_path):
    plan = plan_of(spec)
    write_plan(plan, tmp_path / "plans" / "p.yaml", ["to do   all", "of it"])
    assert read_plan(tmp_path / "plans" / "p.yaml") == plan
    assert (tmp_path / "plans" / "p.yaml").read_text().startswith("# to do   all\n# of it\nversion: 1\n")


@pytest.mark.parametrize("change", ["price_per_hour: -1", "price_per_hour: .nan", "version: 2", "batch_sise: 3"])
def test_a_plan_with_another_value_than_can_be_is_refused(spec, plan_of, tmp_path, change):
    write_plan(plan_of(spec), tmp_path / "p.yaml")
    name = change.partition(":")[0]
    lines = [line for line in (tmp_path / "p.yaml").read_text().splitlines() if not line.startswith(f"{name}:")]
    (tmp_path / "p.yaml").write_text("\n".join([*lines, change]))
    with pytest.raises(SpecError, match=name):
        read_plan(tmp_path / "p.yaml")


def test_a_plan_is_refused_once_its_manifest_is_another_one(manifest, listed, spec, plan_of):
    plan = plan_of(spec)
    assert planned_manifest(plan).image_ids == manifest.image_ids
    rows = [replace(row, split="train") for row in manifest.rows()]
    write_manifest(listed, rows, manifest.class_names)
    with pytest.raises(ManifestError, match="is not the manifest of the plan"):
        planned_manifest(plan)


def test_a_plan_holds_while_the_store_goes_on_and_not_when_it_lacks_more(manifest, spec, place, plan_of, open_source):
    half_build(manifest, spec, place, open_source)
    plan = plan_of(spec)
    build(manifest, spec, place, open_source)
    planned_manifest(plan)
    shutil.rmtree(place)
    with pytest.raises(StoreError, match=r"the plan is of \d+ images of `depth`, and .* now lacks 23"):
        planned_manifest(plan)


def test_a_plan_without_repair_is_refused_once_a_shard_is_damaged(manifest, spec, place, plan_of, open_source):
    first = write_manifest(manifest.root / "first.parquet", [*manifest.rows()][:12], manifest.class_names)
    build(first, spec, place, open_source)
    plan = plan_of(spec, append=True)
    build(manifest, spec, place, open_source, append=True)
    open_store(place).shard_path("depth", 1).unlink()
    with pytest.raises(StoreError, match="was damaged after the plan was made"):
        planned_manifest(plan)


def test_a_plan_opens_no_other_source_than_its_own(listed, place):
    entry = LatentSpec(modality=Modality.DEPTH, source="embedded-depth-ridge")
    from dla_cache.sources import open_source

    plan = make_plan(listed, CacheSpec(latents=(entry,)), place, open_source=open_source, batch_size=4, n_batches=1)
    assert plan.latents["depth"].licence == SOURCES["embedded-depth-ridge"].licence
    assert PlannedSources(plan)(entry, "cpu").recipe == plan.latents["depth"].recipe
    with pytest.raises(
        RecipeMismatchError, match=r"another source than the one that was planned with: `seed` `0` → `5`"
    ):
        PlannedSources(plan)(entry.model_copy(update={"seed": 5}), "cpu")


def test_the_manifest_is_read_where_the_plan_says(listed, spec, plan_of):
    assert plan_of(spec).manifest == str(listed)
    with pytest.raises(ManifestError, match="cannot be read"):
        planned_manifest(plan_of(spec).model_copy(update={"manifest": str(listed) + ".gone"}))
    assert read_manifest(listed).image_ids == planned_manifest(plan_of(spec)).image_ids


def test_a_plan_of_other_modalities_than_its_spec_is_refused(spec, plan_of):
    plan = plan_of(spec)
    more = spec.model_copy(update={"images": "raw"})
    for edited in ({"latents": {}}, {"spec": more}, {"latents": {"normals": plan.latents["depth"]}}):
        with pytest.raises(SpecError, match="the plan is of"):
            planned_manifest(plan.model_copy(update=edited))


@pytest.mark.parametrize(
    ("spoil", "fault"),
    [
        (lambda latents: latents * np.nan, "NaN"),
        (lambda latents: Encoded(latents, rejected=dict.fromkeys(range(len(latents)), "blanked")), "blanked"),
        (lambda latents: latents[:, 0], "its recipe declares"),
    ],
)
def test_a_source_without_a_single_latent_is_not_planned_with(spec, plan_of, open_source, spoil, fault):
    class Spoilt(open_source):
        def encode(self, pixels, seeds):
            return spoil(super().encode(pixels, seeds))

    with pytest.raises(DlaError, match=fault):
        plan_of(spec, open_source=Spoilt)
