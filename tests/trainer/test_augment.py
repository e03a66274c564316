"""Colours, RandAugment and erasing: drawn once, replayed to the bit, each operation what its name says."""

import hashlib

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from pydantic import ValidationError

from trainer.augment import apply_views, erase, view_images
from trainer.colours import FILL, operate, turn_hue
from trainer.presets import PAPER_VIEW
from trainer.views import RAND_AUGMENT_OPERATIONS, VIEWS_VERSION, ViewConfig, draw_views

COLOUR = {"brightness": 0.4, "contrast": 0.4, "saturation": 0.4, "hue": 0.1, "probability": 0.8}
ALL = ViewConfig.model_validate(
    {
        **PAPER_VIEW,
        "colour": {**COLOUR, "grayscale": 0.2, "solarize": 0.2},
        "rand_augment": {},
        "erasing": {"probability": 0.5},
    }
)
IMAGE_IDS = [f"image_{number}" for number in range(400)]
PLACES = np.indices((3, 12, 16))
IMAGE = (PLACES[0] * 60 + PLACES[1] * 7 + PLACES[2] * 11 % 97).astype(np.uint8)

GOLDEN = {
    "left": [0.1024337175031744, 0.05729414025891767],
    "top": [0.04590349403721456, 0.0],
    "width": [0.6763851344255335, 0.9298038591778249],
    "height": [0.7457680144225106, 1.0],
    "flip": [False, False],
    "colours.brightness": [1.2582283073650078, 1.1950919226657168],
    "colours.contrast": [0.6930418561071717, 0.8344598295160969],
    "colours.saturation": [1.1868117601676176, 1.0579976644026754],
    "colours.hue": [0.0882623025035866, -0.044171984370754716],
    "colours.order": [[2, 1, 0, 3], [0, 2, 1, 3]],
    "colours.grayscale": [True, False],
    "colours.solarize": [False, True],
    "rand_augments.operation": [[1, 9], [-1, 4]],
    "rand_augments.magnitude": [[9.295141132587279, 9.011951922138586], [8.316358956710477, 8.526292541720222]],
    "rand_augments.is_negated": [[True, True], [False, True]],
    "erasings.left": [0.11576704647082958, 0.010408236812314509],
    "erasings.top": [0.5273563226547566, 0.05707942663843868],
    "erasings.width": [0.0, 0.0],
    "erasings.height": [0.0, 0.0],
    "erasings.noise": [6429906034314256, 341099753860915],
}


def shown(image_ids, draw=0, config=ALL, size=16):
    views = draw_views(0, image_ids, draw, config, 4 / 3)
    return erase(view_images([IMAGE] * len(image_ids), views, size) / 255, views.erasings)


def test_what_is_drawn_and_shown_stays_as_it_is_or_has_another_version():
    assert VIEWS_VERSION == 1
    views = draw_views(3, ["a", "b"], 5, ALL, 4 / 3)
    assert list(views.arrays) == list(GOLDEN)
    for name, array in views.arrays.items():
        np.testing.assert_allclose(array, GOLDEN[name], rtol=1e-12, atol=0, err_msg=name)
    views = draw_views(3, IMAGE_IDS[:60], 5, ALL, 4 / 3)
    pixels = view_images([IMAGE] * 60, views, 16).byte().numpy()
    assert hashlib.sha256(pixels.tobytes()).hexdigest()[:16] == "fea01e2bbc467d4c"


@settings(max_examples=20)
@given(chosen=st.permutations(range(12)), n_chosen=st.integers(1, 12), draw=st.integers(0, 3))
def test_a_view_has_the_same_record_and_the_same_bits_whatever_its_batch(chosen, n_chosen, draw):
    together = draw_views(0, IMAGE_IDS[:12], draw, ALL, 4 / 3).of(chosen[:n_chosen])
    names = [IMAGE_IDS[place] for place in chosen[:n_chosen]]
    apart = draw_views(0, names, draw, ALL, 4 / 3)
    assert all(np.array_equal(together.arrays[name], array) for name, array in apart.arrays.items())
    assert torch.equal(shown(IMAGE_IDS[:12], draw)[chosen[:n_chosen]], shown(names, draw))


@pytest.mark.parametrize("part", ["colours", "rand_augments", "erasings"])
def test_another_draw_or_seed_gives_another_record_in_every_part(part):
    first, draw, seed = (
        {name: array for name, array in draw_views(*key, ALL).arrays.items() if name.startswith(part)}
        for key in ((0, IMAGE_IDS, 0), (0, IMAGE_IDS, 1), (1, IMAGE_IDS, 0))
    )
    assert all(not np.array_equal(first[name], other[name]) for other in (draw, seed) for name in first)


def test_what_is_added_to_a_view_leaves_its_crop_and_flip_and_what_is_left_out_leaves_no_record():
    plain = draw_views(0, IMAGE_IDS, 2, ViewConfig.model_validate(PAPER_VIEW), 0.7)
    full = draw_views(0, IMAGE_IDS, 2, ALL, 0.7).arrays
    assert list(plain.arrays) == ["left", "top", "width", "height", "flip"]
    assert all(np.array_equal(array, full[name]) for name, array in plain.arrays.items())


def test_colours_are_spread_as_their_config_says():
    colours = draw_views(0, IMAGE_IDS, 0, ALL).colours
    is_jittered = colours.brightness != 1
    assert is_jittered.mean() == pytest.approx(0.8, abs=0.06)
    assert np.array_equal(is_jittered, colours.hue != 0)
    jittered = colours.brightness[is_jittered]
    assert 0.6 <= jittered.min() < 0.65 < 1.35 < jittered.max() <= 1.4
    assert np.abs(colours.hue).max() <= 0.1
    assert len({tuple(order) for order in colours.order.tolist()}) == 24
    assert colours.grayscale.mean() == pytest.approx(0.2, abs=0.06)
    assert colours.solarize.mean() == pytest.approx(0.2, abs=0.06)
    strong = draw_views(0, IMAGE_IDS, 0, ViewConfig.model_validate({"colour": {"brightness": 3}})).colours
    assert strong.brightness.min() >= 0  # no negative light


def test_rand_augment_draws_every_operation_at_the_strength_it_is_asked_for():
    drawn = draw_views(0, IMAGE_IDS, 0, ALL).rand_augments
    assert (drawn.operation < 0).mean() == pytest.approx(0.5, abs=0.06)
    assert set(drawn.operation.ravel().tolist()) == {-1, *range(len(RAND_AUGMENT_OPERATIONS))}
    assert drawn.magnitude.mean() == pytest.approx(9, abs=0.1)
    assert drawn.magnitude.std() == pytest.approx(0.5, abs=0.06)
    assert drawn.magnitude.max() <= 10
    assert drawn.is_negated.mean() == pytest.approx(0.5, abs=0.06)


def as_image(pixels):
    return Image.fromarray(np.ascontiguousarray(np.moveaxis(pixels, 0, -1)))


def operated(operation, magnitude, **signs):
    return np.moveaxis(np.asarray(operate(as_image(IMAGE), operation, magnitude, **signs)), -1, 0)


DEFINITIONS = {
    "invert": lambda x: 255 - x,
    "posterize": lambda x: x & 0xC0,  # 4 - 2 bits are left
    "solarize": lambda x: np.where(x < 128, x, 255 - x),
    "solarize_add": lambda x: np.where(x < 128, np.minimum(x.astype(int) + 55, 255), x),
    "brightness": lambda x: np.minimum(x * 1.45, 255),
    "autocontrast": lambda x: (x.astype(float) - x.min((1, 2), keepdims=True)) * 255 / np.ptp(x, (1, 2), keepdims=True),
    "contrast": lambda x: np.clip(grey(x).mean().round() * -0.45 + 1.45 * x, 0, 255),
    "colour": lambda x: np.clip(grey(x) * -0.45 + 1.45 * x, 0, 255),
}
"""At magnitude 5."""


def grey(pixels):
    return np.tensordot([0.299, 0.587, 0.114], pixels.astype(float), 1).round()


@pytest.mark.parametrize("operation", DEFINITIONS)
def test_an_operation_on_values_is_what_its_definition_says(operation):
    np.testing.assert_allclose(operated(operation, 5).astype(float), DEFINITIONS[operation](IMAGE), atol=1.5)


def test_equalize_spreads_values_over_all_of_the_range():
    even = operated("equalize", 5)
    assert even.min() <= 5
    assert even.max() >= 250
    assert (np.diff(even[0].ravel()[np.argsort(IMAGE[0].ravel(), kind="stable")].astype(int)) >= 0).all()


def test_sharpness_of_less_than_nothing_blurs_and_of_more_sharpens():
    edges = [np.abs(np.diff(operated("sharpness", 9, is_negated=sign).astype(float))).sum() for sign in (True, False)]
    before = np.abs(np.diff(IMAGE.astype(float))).sum()
    assert edges[0] < before < edges[1]


def test_translations_move_by_45_percent_at_full_strength_and_show_grey_behind():
    moved = operated("translate_x", 10, is_negated=True)  # by 7.2 pixels of 16 to the right
    assert (moved[:, :, :6] == np.array(FILL)[:, None, None]).all()
    moved = operated("translate_y", 10)  # by 5.4 pixels of 12 upwards
    assert (moved[:, -4:] == np.array(FILL)[:, None, None]).all()
    whole = operated("translate_x", 10 * 4 / (0.45 * 16))
    np.testing.assert_allclose(whole[:, :, :11].astype(int), IMAGE[:, :, 4:15].astype(int), atol=1)


def test_shears_move_lines_against_one_another_and_keep_the_first():
    for operation, first, last in (
        ("shear_x", np.s_[:, :2], np.s_[:, -1]),
        ("shear_y", np.s_[:, :, :2], np.s_[:, :, -1]),
    ):
        sheared = operated(operation, 10)
        assert np.abs(sheared[first].astype(int) - IMAGE[first]).mean() < 10
        assert np.abs(sheared[last].astype(int) - IMAGE[last]).mean() > 15


def test_rotations_of_both_signs_are_mirror_images():
    mirrored = operate(as_image(IMAGE[:, :, ::-1]), "rotate", 9, is_negated=True)
    there = np.moveaxis(np.asarray(mirrored), -1, 0)[:, :, ::-1].astype(int)
    assert np.abs(operated("rotate", 9).astype(int) - there).mean() < 1
    assert np.abs(operated("rotate", 9).astype(int) - IMAGE).mean() > 10


@pytest.mark.parametrize("operation", RAND_AUGMENT_OPERATIONS[3:])
def test_an_operation_of_no_strength_changes_nothing_but_posterize_which_begins_at_4_bits(operation):
    expected = IMAGE & 0xF0 if operation == "posterize" else IMAGE
    assert np.array_equal(operated(operation, 0), expected)


def test_a_turn_of_the_hue_makes_red_green_and_blue():
    red = Image.new("RGB", (1, 1), (255, 0, 0))
    np.testing.assert_allclose(np.asarray(turn_hue(red, 1 / 3))[0, 0], (0, 255, 0), atol=6)
    np.testing.assert_allclose(np.asarray(turn_hue(red, -1 / 3))[0, 0], (0, 0, 255), atol=6)


def one_colour_view(**colour):
    views = draw_views(0, ["a"], 0, ViewConfig.model_validate({"colour": colour}))
    pixels = torch.from_numpy(IMAGE[:, :12, :12])[None]
    return apply_views(pixels, views, 12)[0].numpy(), pixels[0].numpy()


def test_grey_views_have_no_colour_and_solarised_ones_their_light_values_inverted():
    shown_grey, pixels = one_colour_view(grayscale=1)
    np.testing.assert_allclose(shown_grey, np.broadcast_to(grey(pixels), (3, 12, 12)), atol=1)
    solarised, pixels = one_colour_view(solarize=1)
    assert np.array_equal(solarised, np.where(pixels < 128, pixels, 255 - pixels))


def erased_share(config):
    views = draw_views(0, IMAGE_IDS, 0, ViewConfig.model_validate({"erasing": config}))
    pixels = torch.full((len(IMAGE_IDS), 3, 20, 20), 7.0)
    return pixels, erase(pixels, views.erasings)


def test_erasing_fills_rectangles_of_the_areas_it_is_asked_for_with_noise_of_their_own():
    pixels, erased = erased_share(
        {"probability": 0.5, "area_min": 0.1, "area_max": 0.3, "ratio_min": 0.5, "ratio_max": 2}
    )
    is_erased = erased != pixels
    area = is_erased[:, 0].float().mean(dim=(1, 2))
    assert float((area > 0).float().mean()) == pytest.approx(0.5, abs=0.1)
    assert 0.08 <= float(area[area > 0].min()) < 0.14
    assert 0.26 < float(area.max()) <= 0.33
    for place in torch.nonzero(area)[:50, 0]:
        rows, columns = is_erased[place, 0].any(1), is_erased[place, 0].any(0)
        assert bool((is_erased[place] == (rows[:, None] & columns)).all())
    noise = erased[is_erased]
    assert float(noise.mean()) == pytest.approx(0, abs=0.02)
    assert float(noise.std()) == pytest.approx(1, abs=0.02)
    assert len(noise.unique()) > 0.99 * len(noise)


def test_erasing_by_a_constant_leaves_the_mean_colour_and_without_erasing_nothing_is_copied():
    pixels, erased = erased_share({"probability": 1, "fill": "constant"})
    assert set(erased.unique().tolist()) == {0.0, 7.0}
    assert erase(pixels, None) is pixels


@pytest.mark.parametrize(
    ("config", "fault"),
    [
        ({"colour": {"hue": 0.6}}, "less than or equal to 0.5"),
        ({"rand_augment": {"magnitude": 11}}, "less than or equal to 10"),
        ({"erasing": {"area_min": 0.5}}, "may not exceed"),
        ({"color": {}}, "unknown fields"),
    ],
)
def test_settings_out_of_bounds_are_refused(config, fault):
    with pytest.raises(ValidationError, match=fault):
        ViewConfig.model_validate(config)
