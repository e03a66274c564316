"""Precision: what the disk holds is near what was handed over, the loss is on record, and anybody can read it."""

import io
import json
import subprocess
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import zarr
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from numpy.typing import NDArray

from dla_cache.build import build_cache
from dla_cache.card import card_text
from dla_cache.errors import NonFiniteLatentError
from dla_cache.manifest import Manifest
from dla_cache.spec import LARGEST_FLOAT32, CacheSpec, LatentFormat, Modality
from dla_cache.store import open_store
from dla_cache.store.content import checked_latents
from dla_cache.store.precision import decode_numbers, encode_numbers, quantise
from dla_cache.store.statistics import StoredError, merge_errors
from dla_cache.takedown import take_down
from dla_cache.verify import verify_store

LATENTS = arrays(np.float32, (5, 2, 3), elements=st.floats(width=32, allow_nan=False, allow_infinity=False))
"""[n, token, channel]: the channel is not the first axis."""


def format_of(dtype: str, latents: NDArray[np.generic] | None = None) -> LatentFormat:
    quantisation = None
    if latents is not None:
        values = latents.astype(np.float64)
        quantisation = quantise(values.min((0, 1)), values.max((0, 1)))
    return LatentFormat(
        kind="continuous", shape=(2, 3), axes=("token", "channel"), dtype=dtype, quantisation=quantisation
    )


@given(LATENTS)
def test_bfloat16_is_within_one_part_in_256_and_what_was_read_is_stored_as_it_was(latents: NDArray) -> None:
    latent = format_of("bfloat16")
    stored = encode_numbers(latents, latent)
    decoded = decode_numbers(stored, latent)
    assert (stored.dtype, decoded.dtype) == (np.uint16, np.float32)
    fits = np.isfinite(decoded)
    assert (np.abs(latents[~fits]) > 3.3895e38).all()
    exact, near = latents[fits].astype(np.float64), decoded[fits].astype(np.float64)
    smallest = 2.0**-134  # half the distance of two subnormal numbers
    assert (np.abs(exact - near) <= np.maximum(np.abs(exact) * 2.0**-8, smallest)).all()
    np.testing.assert_array_equal(encode_numbers(decoded, latent), stored)


def test_bfloat16_rounds_to_the_nearest_and_ties_to_even() -> None:
    bits = np.array([0x3F808000, 0x3F818000, 0x3F808001, 0x3F817FFF, 0xBF818000], np.uint32)
    encoded = encode_numbers(bits.view(np.float32).reshape(1, 5), format_of("bfloat16"))
    assert encoded.tolist() == [[0x3F80, 0x3F82, 0x3F81, 0x3F81, 0xBF82]]


@given(LATENTS)
def test_int8_is_within_half_a_step_nothing_is_cut_off_and_what_was_read_is_stored_as_it_was(latents: NDArray) -> None:
    latents = latents / np.float32(2)  # a range beyond float32 is refused, see below
    latent = format_of("int8", latents)
    stored = encode_numbers(latents, latent)
    assert (stored.dtype, bool((stored >= -127).all())) == (np.int8, True)
    decoded = decode_numbers(stored, latent)
    assert decoded.dtype == np.float32
    half = np.array(latent.quantisation.scale) / 2
    rounding = np.spacing(np.abs(decoded)).astype(np.float64) / 2
    assert (np.abs(latents.astype(np.float64) - decoded) <= half * (1 + 2.0**-40) + rounding).all()
    np.testing.assert_array_equal(encode_numbers(decoded, latent), stored)


def test_two_int8_of_a_narrow_channel_far_from_zero_never_stand_for_one_number() -> None:
    latents = np.full((5, 2, 3), 1000, np.float32)
    latents[0] = np.nextafter(np.float32(1000), np.float32(2000))
    latent = format_of("int8", latents)
    every = np.arange(-127, 128, dtype=np.int8)[:, None, None] * np.ones((1, 2, 3), np.int8)
    np.testing.assert_array_equal(encode_numbers(decode_numbers(every, latent), latent), every)
    np.testing.assert_array_equal(decode_numbers(encode_numbers(latents, latent), latent)[1:], latents[1:])


@given(LATENTS)
def test_int8_is_decoded_to_the_same_float32_whatever_the_arithmetic(latents: NDArray) -> None:
    latent = format_of("int8", latents / np.float32(2))
    stored = np.arange(-127, 128, dtype=np.int8)[:, None, None] * np.ones((1, 2, 3), np.int8)
    scale, offset = np.array(latent.quantisation.scale), np.array(latent.quantisation.offset)
    exact = stored.astype(np.longdouble) * scale + offset
    np.testing.assert_array_equal(decode_numbers(stored, latent), exact.astype(np.float32))


def test_a_range_beyond_float32_is_refused() -> None:
    with pytest.raises(ValueError, match="beyond float32"):
        quantise(np.array([-LARGEST_FLOAT32]), np.array([LARGEST_FLOAT32]))


@pytest.mark.parametrize(("dtype", "value"), [("bfloat16", 3.4e38), ("bfloat16", np.nan), ("int8", 4.0)])
def test_what_the_stored_bits_cannot_hold_is_refused_by_the_image(dtype: str, value: float) -> None:
    latents = np.zeros((2, 2, 3), np.float32)
    latent = format_of(dtype, latents + np.arange(3, dtype=np.float32) if dtype == "int8" else None)
    latents[:] = np.arange(3)
    latents[1, 0, 2] = value
    with pytest.raises(NonFiniteLatentError, match=f"NaN, infinity or a value beyond `{dtype}` for `b`"):
        checked_latents(latents, latent, ["a", "b"])


@pytest.mark.parametrize("dtype", ["bfloat16", "int8"])
def test_reading_gives_the_decoded_numbers_and_stock_readers_get_them_by_the_written_formula(
    tmp_path: Path, made: SimpleNamespace, layout: str, dtype: str
) -> None:
    latents = np.random.default_rng(0).normal(3, 2, (7, 2, 3)).astype(np.float32)
    recipe = made.recipe((2, 3)).model_copy(update={"format": format_of(dtype, latents if dtype == "int8" else None)})
    store = made.store(tmp_path / "s", recipe, latents, 3)
    decoded = store.read("depth", np.arange(7))
    np.testing.assert_array_equal(decoded, decode_numbers(encode_numbers(latents, recipe.format), recipe.format))
    assert verify_store(store).problems == ()
    if layout == "zarr":
        array = zarr.open_array(tmp_path / "s" / "latents" / "depth", mode="r")
        stored, told = array[:], array.attrs["dla"]["recipe"]["format"]
    else:
        stored = np.concatenate([payload_of(tmp_path / "s", number) for number in range(7)])
        told = json.loads((tmp_path / "s" / "dla.json").read_text())["recipes"]["depth"]["format"]
    assert told["dtype"] == dtype
    if dtype == "bfloat16":
        assert stored.dtype == np.uint16
        np.testing.assert_array_equal((stored.astype(np.uint32) << 16).view(np.float32), decoded)
    else:
        assert stored.dtype == np.int8
        scale, offset = (np.array(told["quantisation"][name], np.float32) for name in ("scale", "offset"))
        np.testing.assert_array_equal(stored * scale + offset, decoded)


@pytest.mark.parametrize("dtype", ["bfloat16", "int8"])
def test_the_code_on_the_card_decodes_and_the_card_tells_the_error(
    tmp_path: Path, made: SimpleNamespace, dtype: str
) -> None:
    latents = np.random.default_rng(0).normal(3, 2, (3, 2, 3)).astype(np.float32)
    latent = format_of(dtype, latents if dtype == "int8" else None)
    recipe = made.recipe((2, 3)).model_copy(update={"format": latent})
    store = made.store(tmp_path / "s", recipe, latents, 3)
    card = card_text(store)
    assert f"- stored as: {dtype}, error 0." in card
    code = card.partition("```python\n")[2].partition("```")[0]
    command = [sys.executable, "-c", f"{code}\nprint(latent.ravel().tolist())"]
    ended = subprocess.run(command, cwd=tmp_path / "s", capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
    assert json.loads(ended.stdout.splitlines()[-1]) == store.read("depth", np.array([2])).ravel().tolist()


def payload_of(store: Path, number: int) -> NDArray[np.generic]:
    """The `.npy` member of one image, as NumPy reads it, [1, *shape]."""
    with tarfile.open(store / "depth" / f"depth-{number // 3:06d}.tar") as tar:
        member = tar.extractfile(f"image-{number}.depth.npy")
        assert member is not None
        return np.load(io.BytesIO(member.read()))[None]


def test_the_record_tells_what_was_lost_and_statistics_are_of_what_is_stored(
    tmp_path: Path, made: SimpleNamespace
) -> None:
    latents = np.random.default_rng(0).normal(3, 2, (4, 3, 2, 2)).astype(np.float32)
    recipe = made.recipe((3, 2, 2))
    store = made.store(tmp_path / "s", recipe, latents, 4)
    record = store.committed("depth")[0]
    lost = latents.astype(np.float16).astype(np.float64) - latents.astype(np.float64)
    assert record.error.count == 4
    np.testing.assert_allclose(record.error.rms, np.sqrt((lost**2).mean((0, 2, 3))), rtol=1e-12)
    np.testing.assert_allclose(record.error.max_abs, np.abs(lost).max((0, 2, 3)), rtol=1e-12)
    stored = latents.astype(np.float16).astype(np.float64)
    np.testing.assert_allclose(store.statistics("depth", ["train", "test"]).mean, stored.mean((0, 2, 3)), rtol=1e-12)


@pytest.mark.parametrize("dtype", ["float16", "float32", "int16", "uint8"])
def test_where_nothing_is_lost_the_record_tells_of_no_error(tmp_path: Path, made: SimpleNamespace, dtype: str) -> None:
    recipe = made.recipe((3, 2, 2), dtype)
    store = made.store(tmp_path / "s", recipe, made.latents(recipe, 4), 2)
    assert [record.error for record in store.committed("depth").values()] == [None, None]


def test_a_removal_keeps_what_was_lost_at_writing_on_record(tmp_path: Path, made: SimpleNamespace) -> None:
    latents = np.random.default_rng(0).normal(3, 2, (4, 3, 2, 2)).astype(np.float32)
    store = made.store(tmp_path / "s", made.recipe(), latents, 4)
    before = store.committed("depth")[0].error
    take_down([tmp_path / "s"], ["image-1"])
    assert open_store(tmp_path / "s").committed("depth")[0].error == before


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_a_build_measures_against_what_the_source_put_out(
    tmp_path: Path, manifest: Manifest, spec: CacheSpec, open_source: Callable, dtype: str
) -> None:
    latent = spec.latents[0].model_copy(update={"dtype": dtype})
    build_cache(manifest, spec.model_copy(update={"latents": (latent,)}), tmp_path / "s", open_source=open_source)
    for record in open_store(tmp_path / "s").committed("depth").values():
        assert 0 < max(record.error.max_abs) <= 4 * (2.0**-9 if dtype == "bfloat16" else 2.0**-12)


@given(
    st.lists(
        st.integers(1, 5).flatmap(lambda n: arrays(np.float64, (n, 2), elements=st.floats(-9, 9))),
        min_size=1,
        max_size=4,
    )
)
def test_errors_of_shards_merge_to_that_of_all_images(parts: list[NDArray]) -> None:
    errors = [
        (
            len(part),
            StoredError(count=len(part), rms=tuple(np.sqrt((part**2).mean(0))), max_abs=tuple(np.abs(part).max(0)))
            if part.any()
            else None,
        )
        for part in parts
    ]
    merged = merge_errors(errors)
    whole = np.concatenate(parts)
    if merged is None:
        assert not whole.any()
        return
    assert merged.count == len(whole)
    np.testing.assert_allclose(merged.rms, np.sqrt((whole**2).mean(0)), rtol=1e-9, atol=1e-300)
    np.testing.assert_array_equal(merged.max_abs, np.abs(whole).max(0))


def test_a_format_says_what_int8_stands_for_and_of_nothing_else() -> None:
    fields = {"kind": "continuous", "shape": (2, 3), "axes": ("token", "channel")}
    two = {"scale": (1.0, 1.0), "offset": (0.0, 0.0)}
    three = {"scale": (1.0, 1.0, 1.0), "offset": (0.0, 0.0, 0.0)}
    assert LatentFormat.model_validate({**fields, "dtype": "int8", "quantisation": three}).read_dtype == "float32"
    for wrong in (
        {"dtype": "int8"},
        {"dtype": "float16", "quantisation": three},
        {"dtype": "int8", "quantisation": two},
        {"dtype": "int8", "quantisation": {**three, "scale": (1.0, 0.0, 1.0)}},
        {"dtype": "int8", "quantisation": {**three, "offset": (1.0, float("nan"), 1.0)}},
        {"dtype": "int8", "quantisation": {**three, "scale": (1.0, 1.0)}},
        {"dtype": "int8", "kind": "codes", "vocabulary": 5, "axes": ("step", "codebook")},
    ):
        with pytest.raises(ValueError, match=r"quantisation|int8|channel|scale"):
            LatentFormat.model_validate({**fields, **wrong})


def test_formats_differ_in_precision_differ_in_recipe(made: SimpleNamespace) -> None:
    recipe = made.recipe((2, 3), modality=Modality.SHAPE)
    hashes = {
        recipe.model_copy(update={"format": latent}).hash
        for latent in (
            format_of("float16"),
            format_of("bfloat16"),
            format_of("float16").model_copy(update={"rounded_from": ("float32",)}),
        )
    }
    assert len(hashes) == 3
