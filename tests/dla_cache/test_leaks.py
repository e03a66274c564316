"""Names of classes in captions: found as people write them, counted, taken out."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dla_cache.errors import SourceError, SpecError
from dla_cache.leaks import (
    audit_captions,
    audit_store,
    mask_captions,
    masked_words_of,
    read_synonyms,
    reads_captions,
    with_masked_names,
)
from dla_cache.spec import CacheSpec, LatentFormat, LatentSpec, Modality, Recipe
from dla_cache.store import create_store
from dla_cache.store.rows import RowTable, StoredImage

CLASSES = ("cat", "hot_dog", "polar bear", "tench, Tinca tinca", "cherries", "glass", "caf\u00e9")


@pytest.mark.parametrize(
    ("caption", "named"),
    [
        ("a cat on a mat", [0]),
        ("Two CATS", [0]),
        ("the cat's tail", [0]),
        ("a cat-like toy", [0]),
        ("concatenated catalogues", []),
        ("a hot dog", [1]),
        ("hot-dogs", [1]),
        ("a dog, hot", []),
        ("a bear", []),
        ("polar bears", [2]),
        ("a tench", [3]),
        ("tinca  tinca in a net", [3]),
        ("a cherry", [4]),
        ("cherries", [4]),
        ("glasses of water", [5]),
        ("two cafe\u0301s", [6]),
        ("", []),
    ],
)
def test_a_name_is_found_as_whole_words_of_any_case_in_singular_and_plural(caption, named):
    for index in range(len(CLASSES)):
        counts = audit_captions([caption], CLASSES, [index])
        assert counts["own_class"] == (index in named)
        assert counts["named"] == bool(named)


def test_a_synonym_counts_as_the_name_does():
    captions = ["a kitten", "a cat", "a car"]
    assert audit_captions(captions, ("cat", "dog"), [0, 0, 0])["named"] == 1
    counts = audit_captions(captions, ("cat", "dog"), [0, 1, 1], {"cat": ["kitten", "tabby"]})
    assert (counts["named"], counts["own_class"], counts["synonym_only"]) == (2, 1, 1)


def test_a_shorter_name_within_a_longer_one_is_named_too():
    counts = audit_captions(["a polar bear", "a polar bear"], ("bear", "polar bear"), [0, 1])
    assert counts["own_class"] == 2


def test_images_without_a_label_name_no_class_of_their_own_and_one_of_several_is_enough():
    counts = audit_captions(["a cat", "a dog", "a cat", ""], ("cat", "dog"), [None, (0, 1), (1,), ()])
    assert counts == {"captions": 4, "empty": 1, "named": 3, "labelled": 3, "own_class": 1}


def test_captions_of_some_images_alone_are_an_error():
    with pytest.raises(SourceError, match="1 captions of 2 images"):
        audit_captions(["a cat"], ("cat",), [0, 0])


def test_without_captions_nothing_is_counted():
    assert audit_captions([], ("cat",), []) == {}
    assert audit_captions([], ("cat",), [0, 0]) == {}


WORDS = st.lists(st.sampled_from(["cat", "cats", "hot", "dog", "Dogs", "polar", "bear", "glass", "a", "on", ","]))


@given(caption=WORDS.map(" ".join), names=st.lists(WORDS.map("_".join).filter(bool), max_size=4))
def test_masked_captions_name_no_class_and_keep_the_other_words(caption, names):
    (masked,) = mask_captions([caption], masked_words_of(names))
    assert audit_captions([masked], names, [None])["named"] == 0
    rest = iter(caption.split())
    assert all(word in rest for word in masked.replace(",", " ,").split())


def test_what_is_left_of_a_masked_caption_reads_on():
    captions = ["Two CATS, sitting", "a hot cat dog.", "the cat's tail"]
    assert mask_captions(captions, masked_words_of(["cat", "hot dog"])) == ["Two, sitting", "a.", "the tail"]


def test_the_words_to_mask_are_the_same_for_any_order_of_classes():
    assert masked_words_of(["Dog", "hot_dog, frank", "cat"], {"cat": ["Kitten"]}) == "cat|dog|frank|hot dog|kitten"
    assert masked_words_of(["cat", "dog"]) == masked_words_of(["dog", "cat", "CAT"])


def spec_with(*entries):
    return CacheSpec(latents=tuple(LatentSpec(**entry) for entry in entries))


def test_class_names_are_masked_in_those_sources_that_read_captions():
    spec = spec_with(
        {"modality": "audio", "source": "musicgen", "parameters": {"masked_words": "zebra", "frames": 100}},
        {"modality": "audio-rain", "source": "musicgen", "parameters": {"prompt": "rain"}},
        {"modality": "caption", "source": "blip-caption"},
        {"modality": "depth", "source": "marigold-depth-lcm"},
    )
    masked = with_masked_names(spec, ("cat", "dog"), {"cat": ["kitten"]})
    assert [entry.parameters for entry in masked.latents] == [
        {"masked_words": "cat|dog|kitten|zebra", "frames": 100},
        {"prompt": "rain"},
        {"masked_words": "cat|dog|kitten"},
        {},
    ]
    assert with_masked_names(masked, ("cat", "dog"), {"cat": ["kitten"]}) == masked


def test_masking_where_there_is_nothing_to_mask_is_refused():
    with pytest.raises(SpecError, match="the manifest has none"):
        with_masked_names(spec_with({"modality": "audio", "source": "musicgen"}), ())
    with pytest.raises(SpecError, match="no source of the spec reads captions"):
        with_masked_names(spec_with({"modality": "depth", "source": "embedded-depth"}), ("cat",))


def test_a_source_reads_captions_if_its_prompt_has_one_in_it():
    assert reads_captions("musicgen", {})
    assert reads_captions("musicgen", {"prompt": "the sound of {caption}"})
    assert not reads_captions("musicgen", {"prompt": "rain"})
    assert not reads_captions("somebody:Else", {})


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("zebra: [horse]", "no class of the manifest"),
        ("cat: [true]", "are no words"),
        ("cat: []", "are no words"),
        ("cat: ['--']", "are no words"),
        ("cat: {big: lion}", "are no words"),
    ],
)
def test_a_file_of_synonyms_that_says_something_else_is_refused(text, fault, tmp_path):
    path = tmp_path / "synonyms.yaml"
    path.write_text(text)
    with pytest.raises(SpecError, match=fault):
        read_synonyms(path, ("cat", "7"))


def test_synonyms_are_read_by_class(tmp_path):
    path = tmp_path / "synonyms.yaml"
    path.write_text("cat: [kitten, tabby cat]\n7: seven\n")
    assert read_synonyms(path, ("cat", "7")) == {"cat": ("kitten", "tabby cat"), "7": ("seven",)}


def test_the_counts_of_all_shards_are_told_together(tmp_path):
    latent = LatentFormat(kind="codes", shape=(1, 2), axes=("codebook", "time"), dtype="uint8", vocabulary=9)
    recipe = Recipe(
        modality=Modality.AUDIO,
        source="musicgen",
        weights_sha256="0" * 64,
        parameters={"masked_words": "dog|zebra"},
        seed=0,
        source_view_size=4,
        format=latent,
    )
    rows = RowTable([StoredImage(row, f"image-{row}", str(row) * 64, "train", 0, f"{row}.png") for row in range(5)])
    store = create_store(tmp_path / "store", rows, ["cat"], 2, {"audio": recipe})
    for shard in store.shards[:2]:
        counts = audit_captions(["a cat", ""], ["cat"], [0, 0])
        store.write_shard("audio", shard, np.zeros((2, 1, 2), np.uint8), seconds=0, device="cpu", audit=counts)
    store.write_shard("audio", store.shards[2], np.zeros((1, 1, 2), np.uint8), seconds=0, device="cpu")
    (audit,) = audit_store(store)
    assert audit.counts == {"captions": 4, "empty": 2, "named": 2, "labelled": 4, "own_class": 2}
    assert audit.in_words == (
        "2 of 4 captions name a class; 2 of 4 with a label their own; 2 without a word; 1 of 5 images not counted;"
        " words that were masked: 2"
    )
