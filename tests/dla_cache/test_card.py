"""The cache card: what a stranger must know stands in the store, and nothing that tells of a machine."""

import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

import dla_cache.sources
from dla_cache.build import build_cache
from dla_cache.card import LICENCE_UNKNOWN, card_text, write_card
from dla_cache.errors import StoreError
from dla_cache.imports import import_latents
from dla_cache.manifest import Manifest
from dla_cache.sources import SourceEntry
from dla_cache.spec import CacheSpec, Modality, parse_spec
from dla_cache.store import LatentStore, create_store, open_store
from dla_cache.store.rows import RowTable
from dla_cache.takedown import take_down
from dla_cache.verify import verify_store


@pytest.fixture
def store(tmp_path: Path, manifest: Manifest, spec: CacheSpec, open_source: Callable):
    build_cache(manifest, spec.model_copy(update={"images": "original"}), tmp_path / "s", open_source=open_source)
    store = open_store(tmp_path / "s")
    write_card(store)
    return store


def block(text: str, language: str) -> str:
    found = re.search(f"```{language}\n(.*?)```", text, re.DOTALL)
    assert found, text
    return found[1]


def test_the_code_on_the_card_reads_the_store_without_dla(store) -> None:
    code = block((store.path / "README.md").read_text(), "python")
    assert "dla" not in code
    assert 6 <= len(code.splitlines()) <= 10
    result = subprocess.run([sys.executable, "-c", code], cwd=store.path, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    lines = result.stdout.splitlines()
    assert [line.split()[0] for line in lines] == ["image-0", "image-1", "image-2"]
    assert all("(3, 2, 2) float16" in line for line in lines)


def test_the_spec_on_the_card_builds_the_same_store(
    tmp_path: Path, store, manifest: Manifest, open_source: Callable
) -> None:
    import yaml

    told = yaml.safe_load(block(card_text(store), "yaml"))
    again = build_cache(manifest, parse_spec(told, CacheSpec, where="card"), tmp_path / "t", open_source=open_source)
    assert again.content_hash == store.content_hash()
    assert open_store(tmp_path / "t").metadata.layout == store.metadata.layout


def test_the_card_tells_shape_splits_classes_statistics_and_hash(store) -> None:
    text = card_text(store)
    statistics = store.statistics("depth", ["train"])
    for told in (
        "# Undecoded latents of 23 images: depth",
        "| depth | 3 x 2 x 2 | channel, height, width | float16 | 23 |",
        f"Content hash: `{store.content_hash()}`",
        "| train | 8 | 2 |",
        "2 classes, by label: 0 even, 1 odd.",
        f"| depth | train | 8 | {statistics.mean.min():.4g} to {statistics.mean.max():.4g} |",
        f"- recipe (sha256): `{store.recipe('depth').hash}`",
        f"- licence: {LICENCE_UNKNOWN}",
        "The images themselves lie in the store, too.",
    ):
        assert told in text, told


def test_what_a_known_source_has_seen_and_its_licence_stand_on_the_card(
    tmp_path: Path, made: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = made.store(tmp_path / "s", made.recipe(), made.latents(made.recipe(), 4), 2)
    entry = SourceEntry(Modality.DEPTH, "module:Class", "a map of ten lines", note="it has seen the labels")
    monkeypatch.setitem(dla_cache.sources.SOURCES, "made", entry)
    assert "- what: a map of ten lines\n- note: **it has seen the labels**\n" in card_text(store)


def test_a_card_is_a_function_of_what_the_store_holds(
    tmp_path: Path, store, manifest: Manifest, spec: CacheSpec, open_source: Callable
) -> None:
    other = spec.model_copy(update={"images": "original"})
    build_cache(manifest, other, tmp_path / "elsewhere/t", open_source=open_source, batch_size=3)
    assert card_text(open_store(tmp_path / "elsewhere/t")) == card_text(store)


def test_no_file_of_a_store_tells_where_it_was_made(
    tmp_path: Path, store, manifest: Manifest, made: SimpleNamespace
) -> None:
    (tmp_path / "theirs").mkdir()
    for number in range(23):
        np.save(tmp_path / f"theirs/image-{number}.npy", np.ones((3, 2, 2), np.float32))
    import_latents(tmp_path / "theirs", manifest, Modality.SHAPE, tmp_path / "imported")
    write_card(open_store(tmp_path / "imported"))
    for folder in (store.path, tmp_path / "imported"):
        files = [path for path in folder.rglob("*") if path.is_file()]
        assert len(files) > 4
        assert [path for path in files if str(tmp_path).encode() in path.read_bytes()] == []


def test_a_store_with_its_card_verifies_and_goes_on(
    store, manifest: Manifest, spec: CacheSpec, open_source: Callable
) -> None:
    assert verify_store(store, manifest).problems == ()
    assert build_cache(manifest, spec, store.path, open_source=open_source).images_encoded == 0


def test_a_card_that_says_the_same_is_not_written_again(store, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_arguments: object) -> None:
        raise AssertionError("a finished store may lie on a read-only disk")

    monkeypatch.setattr("dla_cache.store.files.write_durably", refuse)
    write_card(store)


def test_no_card_of_before_a_removal_is_written_after_it(tmp_path: Path, made: SimpleNamespace) -> None:
    recipe = made.recipe()
    before = made.store(tmp_path / "s", recipe, made.latents(recipe, 7), 3)
    write_card(before)
    take_down([before.path], ["image-4"])
    card = (before.path / "README.md").read_bytes()
    with pytest.raises(StoreError, match="images were removed"):
        write_card(before)
    assert (before.path / "README.md").read_bytes() == card


def test_nor_is_it_where_the_removal_came_after_the_card_was_made_up(
    tmp_path: Path, made: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = made.recipe()
    before = made.store(tmp_path / "s", recipe, made.latents(recipe, 7), 3)

    def text_then_removal(store: LatentStore) -> str:
        text = card_text(store)
        take_down([store.path], ["image-4"])
        return text

    monkeypatch.setattr("dla_cache.card.card_text", text_then_removal)
    with pytest.raises(StoreError, match="images were removed"):
        write_card(before)
    assert verify_store(open_store(before.path)).problems == ()
    assert "of 6 images" in (before.path / "README.md").read_text()


def test_a_store_that_misses_shards_says_so(tmp_path: Path, made: SimpleNamespace) -> None:
    store = made.create(tmp_path / "s", made.rows(7), ["cat"], 3, {"depth": made.recipe()})
    store.write_shard("depth", store.shards[0], made.latents(made.recipe(), 3), seconds=0, device="cpu")
    text = card_text(store)
    assert "Content hash: none yet, shards are missing" in text
    assert "| 3 of 7 |" in text


def test_an_imported_modality_is_said_to_be_one(tmp_path: Path, made: SimpleNamespace) -> None:
    recipe = made.recipe().model_copy(update={"source": "import:theirs"})
    store = made.store(tmp_path / "s", recipe, made.latents(recipe, 4), 2)
    assert "depth: with `dla cache import`, from files that somebody else made." in card_text(store)
    assert "```yaml" not in card_text(store)


def test_names_cannot_break_the_cards_tables(tmp_path: Path, made: SimpleNamespace) -> None:
    images = [replace(image, split="a|b\n# c") for image in made.rows(2)]
    store = create_store(tmp_path / "s", RowTable(images), ["<b>", "x`y"], 2, {"depth": made.recipe()})
    text = card_text(store)
    assert "| a\\|b \\# c | 2 | 2 |" in text
    assert "0 \\<b\\>, 1 x\\`y" in text


def test_writing_a_card_needs_neither_torch_nor_a_generator(tmp_path: Path, made: SimpleNamespace) -> None:
    made.store(tmp_path / "s", made.recipe(), made.latents(made.recipe(), 4), 2)
    code = (
        "import sys; from pathlib import Path; from dla_cache.card import write_card;"
        "from dla_cache.store import open_store; write_card(open_store(Path(sys.argv[1])));"
        "print({'torch', 'diffusers', 'transformers'} & set(sys.modules))"
    )
    root = Path(dla_cache.sources.__file__).parents[2]
    result = subprocess.run(
        [sys.executable, "-c", code, tmp_path / "s"], cwd=root, capture_output=True, text=True, check=False
    )
    assert result.stdout == "set()\n", result.stderr
