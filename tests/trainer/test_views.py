"""Views are records: drawn from names, replayed exactly."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from trainer.augment import apply_views, view_images
from trainer.presets import PAPER_VIEW
from trainer.views import ViewConfig, Views, draw_views

PAPER = ViewConfig.model_validate(PAPER_VIEW)
IMAGE_IDS = [f"image_{number}" for number in range(500)]


def images(n_images, height=16, width=16):
    return torch.rand(n_images, 3, height, width, generator=torch.Generator().manual_seed(0))


def one_view(left=0.0, top=0.0, width=1.0, height=1.0, flip=False):
    return Views(*(np.array([value]) for value in (left, top, width, height, flip)))


def records(views):
    return list(zip(*(array.tolist() for array in views.arrays.values()), strict=True))


@given(
    chosen=st.permutations(range(30)), size=st.integers(1, 30), seed=st.integers(0, 2**63 - 1), draw=st.integers(0, 9)
)
def test_an_image_has_the_same_view_whatever_its_batch(chosen, size, seed, draw):
    alone = records(draw_views(seed, IMAGE_IDS[:30], draw, PAPER))
    together = records(draw_views(seed, [IMAGE_IDS[index] for index in chosen[:size]], draw, PAPER))
    assert together == [alone[index] for index in chosen[:size]]


@pytest.mark.parametrize("other", [{"draw": 1}, {"seed": 1}])
def test_another_draw_or_seed_gives_other_views(other):
    key = {"seed": 0, "draw": 0, "image_ids": IMAGE_IDS, "config": PAPER}
    first, second = records(draw_views(**key)), records(draw_views(**{**key, **other}))
    assert not set(first) & set(second)


def test_different_images_have_different_views():
    assert len(set(records(draw_views(0, IMAGE_IDS, 0, PAPER)))) == len(IMAGE_IDS)


@given(
    seed=st.integers(0, 2**64 - 1),
    draw=st.integers(0, 2**32 - 1),
    bounds=st.tuples(st.floats(0.01, 1), st.floats(0.01, 1), st.floats(0.1, 10), st.floats(0.1, 10)),
    aspect=st.floats(0.1, 10),
)
def test_crops_stay_inside_the_image(seed, draw, bounds, aspect):
    (scale_min, scale_max), (ratio_min, ratio_max) = sorted(bounds[:2]), sorted(bounds[2:])
    config = ViewConfig(scale_min=scale_min, scale_max=scale_max, ratio_min=ratio_min, ratio_max=ratio_max)
    views = draw_views(seed, IMAGE_IDS[:20], draw, config, np.full(20, aspect))
    assert (views.left >= 0).all()
    assert (views.top >= 0).all()
    assert (views.width > 0).all()
    assert (views.height > 0).all()
    assert (views.left + views.width <= 1 + 1e-12).all()
    assert (views.top + views.height <= 1 + 1e-12).all()


def test_views_are_spread_as_their_config_says():
    views = draw_views(0, IMAGE_IDS, 0, ViewConfig(scale_min=0.2, horizontal_flip=True))
    area = views.width * views.height
    assert area.min() >= 0.2 - 1e-12
    assert area.mean() == pytest.approx(0.6, abs=0.05)  # 500 draws: 5 standard errors
    assert views.flip.mean() == pytest.approx(0.5, abs=0.11)
    assert abs(np.corrcoef(area, views.flip)[0, 1]) < 0.23


@pytest.mark.parametrize("aspect", [1 / 4, 47 / 80, 1.0, 80 / 47, 4.0])
def test_the_aspect_of_a_crop_keeps_its_bounds_in_pixels_whatever_the_images_own(aspect):
    views = draw_views(0, IMAGE_IDS, 0, PAPER, np.full(len(IMAGE_IDS), aspect))
    in_pixels = views.width / views.height * aspect
    assert in_pixels.min() >= 3 / 4 - 1e-12
    assert in_pixels.max() <= 4 / 3 + 1e-12
    assert in_pixels.min() < 0.8
    assert in_pixels.max() > 1.25


def test_without_a_flip_in_the_config_nothing_is_mirrored():
    assert not draw_views(0, IMAGE_IDS, 0, ViewConfig(scale_min=0.2)).flip.any()


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_the_default_view_is_the_image_itself(dtype):
    pixels = (images(5) * 255).to(dtype)
    shown = apply_views(pixels, draw_views(0, IMAGE_IDS[:5], 0, ViewConfig()), 16)
    assert shown.dtype == torch.float32
    torch.testing.assert_close(shown, pixels.float(), atol=1e-6, rtol=0)


def test_a_flip_is_an_involution_and_mirrors_the_crop():
    pixels, mirror = images(1), one_view(flip=True)
    once = apply_views(pixels, mirror, 16)
    assert torch.equal(once, pixels.flip(-1))
    assert torch.equal(apply_views(once, mirror, 16), pixels)
    box = {"left": 0.1, "top": 0.1, "width": 0.5, "height": 0.6}
    mirrored, plain = (apply_views(pixels, one_view(**box, flip=flip), 8) for flip in (True, False))
    torch.testing.assert_close(mirrored, plain.flip(-1))


def test_enlarging_equals_grid_sample():
    pixels = images(1, 16, 20)
    shown = apply_views(pixels, one_view(left=0.3, top=0.125, width=0.6, height=0.5), 24)
    # In grid_sample's coordinates the image runs from -1 to 1.
    box = torch.tensor([[[0.6, 0, 2 * 0.6 - 1], [0, 0.5, 2 * 0.375 - 1]]])
    grid = torch.nn.functional.affine_grid(box, [1, 3, 24, 24], align_corners=False)
    expected = torch.nn.functional.grid_sample(pixels, grid, align_corners=False, padding_mode="border")
    torch.testing.assert_close(shown, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("size", [7, 16, 23])
def test_shrinking_is_antialiased_as_torch_does_it(size):
    pixels = images(2, 24, 32)
    views = Views(*(np.array([value] * 2) for value in (0.0, 0.0, 1.0, 1.0, False)))
    expected = torch.nn.functional.interpolate(pixels, (size, size), mode="bilinear", antialias=True)
    torch.testing.assert_close(apply_views(pixels, views, size), expected, atol=1e-5, rtol=0)


def test_a_sample_does_not_depend_on_its_neighbours():
    pixels, views = images(4), draw_views(0, IMAGE_IDS[:4], 0, PAPER)
    alone = views.of([2])
    assert torch.equal(apply_views(pixels, views, 9)[2:3], apply_views(pixels[2:3], alone, 9))


def test_images_of_one_size_are_viewed_in_one_go_and_others_beside_them():
    square = (images(3) * 255).byte().numpy()
    wide = (images(2, 10, 24) * 255).byte().numpy()
    views = draw_views(0, IMAGE_IDS[:5], 0, PAPER, np.array([1, 2.4, 1, 2.4, 1]))
    mixed = view_images([square[0], wide[0], square[1], wide[1], square[2]], views, 9)
    assert torch.equal(mixed[::2], apply_views(torch.from_numpy(square), views.of([0, 2, 4]), 9))
    assert torch.equal(mixed[1::2], apply_views(torch.from_numpy(wide), views.of([1, 3]), 9))


def test_bounds_in_the_wrong_order_are_refused():
    with pytest.raises(ValidationError, match="may not exceed"):
        ViewConfig(scale_min=0.5, scale_max=0.2)
