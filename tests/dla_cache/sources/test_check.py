"""`check_source`: each claim fails on a source that is faulty in just this, and holds for the others."""

import random
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from dla_cache.errors import ImageError, LatentShapeError, SourceError
from dla_cache.images import decode_image
from dla_cache.sources import Encoded
from dla_cache.sources.check import check_source, images_in, random_states, sample_images
from dla_cache.sources.decoders import watch_decoders
from dla_cache.spec import LatentFormat, LatentSpec, Modality, Recipe

SPEC = LatentSpec(modality=Modality.DEPTH, source="made")


class Good:
    """Latents [3, 2, 2] of corners, with noise of the sample's own seed."""

    def __init__(self, spec, device):
        latent = LatentFormat(kind="continuous", shape=(3, 2, 2), axes=("channel", "height", "width"), dtype=spec.dtype)
        self.recipe = Recipe(
            modality=spec.modality,
            source=spec.source,
            weights_sha256="",
            parameters={},
            seed=spec.seed,
            source_view_size=8,
            format=latent,
        )
        self.tokenizer, self.vae = Tokenizer(), Autoencoder()

    def encode(self, pixels, seeds):
        self.tokenizer.batch_decode(seeds)
        noise = np.array([np.random.default_rng(seed).normal(size=(3, 2, 2)) for seed in seeds])
        return (pixels[:, :, ::4, ::4] / 255 + noise).astype(np.float32)

    def close(self):
        pass


class Tokenizer:
    """Turns numbers into text, as a captioner does: no decoder."""

    def batch_decode(self, tokens):
        return [self.decode(one) for one in tokens]

    def decode(self, tokens):
        return str(tokens)


class Autoencoder(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.decoder = torch.nn.Identity()

    def decode(self, latents):
        return self.decoder(latents)


class CallsTheDecoder(Good):
    def encode(self, pixels, seeds):
        latents = super().encode(pixels, seeds)
        self.vae.decode(torch.from_numpy(latents))
        return latents


class CallsTheModuleBehindIt(Good):
    def encode(self, pixels, seeds):
        latents = super().encode(pixels, seeds)
        self.vae.decoder(torch.from_numpy(latents))
        return latents


class DependsOnTheBatch(Good):
    def encode(self, pixels, seeds):
        return super().encode(pixels, seeds) + np.float32(1e-3 * len(pixels))


class DependsOnItsPlace(Good):
    def encode(self, pixels, seeds):
        shift = np.float32(1e-3) * np.arange(len(pixels), dtype=np.float32)
        return super().encode(pixels, seeds) + (shift - shift.mean())[:, None, None, None] * (len(pixels) > 1)


class DependsOnItsNeighbours(Good):
    def encode(self, pixels, seeds):
        return super().encode(pixels, seeds) + np.float32(pixels.mean() / 255)


class IgnoresTheSeed(Good):
    def encode(self, pixels, seeds):
        return super().encode(pixels, [0] * len(seeds))


class IgnoresTheImage(Good):
    def encode(self, pixels, seeds):
        return super().encode(np.zeros_like(pixels), seeds)


class ChangesWithEveryCall(Good):
    calls = 0

    def encode(self, pixels, seeds):
        self.calls += 1
        return super().encode(pixels, seeds) + np.float32(1e-4 * self.calls)


class ChangesWhenOpened(Good):
    opened = 0

    def __init__(self, spec, device):
        super().__init__(spec, device)
        ChangesWhenOpened.opened += 1
        self.shift = np.float32(1e-4 * ChangesWhenOpened.opened)

    def encode(self, pixels, seeds):
        return super().encode(pixels, seeds) + self.shift


class DrawsItsWeights(Good):
    def __init__(self, spec, device):
        super().__init__(spec, device)
        self.weight = torch.nn.Linear(1, 1).weight.item()

    def encode(self, pixels, seeds):
        return super().encode(pixels, seeds) + np.float32(self.weight)


class DrawsFromTheGlobalState(Good):
    def encode(self, pixels, seeds):
        return super().encode(pixels, seeds) + np.random.normal(size=(3, 2, 2)).astype(np.float32)


class SeedsTheGlobalState(Good):
    def encode(self, pixels, seeds):
        noise = [torch.randn(3, 2, 2, generator=torch.manual_seed(seed % 2**32)).numpy() for seed in seeds]
        return (pixels[:, :, ::4, ::4] / 255 + np.array(noise)).astype(np.float32)


class ReadsTheGlobalSeed(Good):
    def encode(self, pixels, seeds):
        return super().encode(pixels, seeds) + np.float32(1e-3 * (torch.initial_seed() % 1000003))


class AnotherShape(Good):
    def encode(self, pixels, seeds):
        return super().encode(pixels, seeds)[:, :2]


class NotFinite(Good):
    def encode(self, pixels, seeds):
        return super().encode(pixels, seeds) * np.float32("nan")


DECODER, ALONE, ORDER = "no decoder is called", "a batch of one gives the same", "another order gives the same"
NEIGHBOURS, AGAIN, OPENED = (
    "other neighbours give the same",
    "a second call gives the same",
    "a newly opened source gives the same",
)
SEED, IMAGE = "another seed gives another latent", "another image gives another latent"
GLOBAL, SEEDS = "global random states are left alone", "global seeds change nothing"
SHAPE, FINITE = "shape and dtype are those of the recipe", "every number can be stored"


def check(kind, **options):
    return check_source(SPEC, "cpu", sample_images(), open_source=kind, **options)


def test_a_good_source_passes_every_claim_and_leaves_the_global_states_as_they_were():
    before = random_states()
    found = check(Good)
    assert found.failed == ()
    assert {claim.name for claim in found.claims} == {
        *(DECODER, ALONE, ORDER, NEIGHBOURS, AGAIN, OPENED, SEED, IMAGE, GLOBAL, SEEDS, SHAPE, FINITE)
    }
    assert random_states() == before


@pytest.mark.parametrize(
    ("kind", "failed"),
    [
        (CallsTheDecoder, {DECODER}),
        (CallsTheModuleBehindIt, {DECODER}),
        (DependsOnTheBatch, {ALONE}),
        (DependsOnItsPlace, {ALONE, ORDER}),
        (DependsOnItsNeighbours, {ALONE, NEIGHBOURS}),
        (IgnoresTheSeed, {SEED}),
        (IgnoresTheImage, {IMAGE}),
        (ChangesWithEveryCall, {ALONE, ORDER, NEIGHBOURS, AGAIN, SEEDS}),
        (ChangesWhenOpened, {OPENED}),
        (DrawsItsWeights, {OPENED}),
        (DrawsFromTheGlobalState, {ALONE, ORDER, NEIGHBOURS, AGAIN, SEEDS, OPENED, GLOBAL}),
        (SeedsTheGlobalState, {GLOBAL}),
        (ReadsTheGlobalSeed, {SEEDS, OPENED}),
        (AnotherShape, {SHAPE}),
        (NotFinite, {FINITE}),
    ],
)
def test_a_source_that_is_faulty_in_one_thing_fails_what_says_so(kind, failed):
    found = check(kind)
    assert set(found.failed) == failed
    for claim in found.claims:
        assert claim.measured


def test_what_a_source_states_as_tolerance_is_allowed_in_a_batch_and_not_between_two_calls():
    class Tolerant(DependsOnTheBatch):
        tolerance = 0.01

    class Unsteady(ChangesWithEveryCall):
        tolerance = 0.01

    assert check(Tolerant).failed == ()
    assert set(check(Unsteady).failed) == {AGAIN, SEEDS}


def test_of_a_source_that_says_it_ignores_seeds_another_seed_must_change_nothing():
    class Encoder(IgnoresTheSeed):
        ignores_seed = True

    class SaysSo(Good):
        ignores_seed = True

    assert check(Encoder).failed == ()
    assert check(SaysSo).failed == ("another seed gives the same: it says that it ignores seeds",)


def test_codes_are_compared_by_the_share_that_differs():
    class Codes(Good):
        def __init__(self, spec, device):
            super().__init__(spec, device)
            latent = LatentFormat(kind="codes", shape=(1, 6), axes=("codebook", "time"), dtype="uint8", vocabulary=50)
            self.recipe = self.recipe.model_copy(update={"format": latent})

        def encode(self, pixels, seeds):
            rows = zip(pixels, seeds, strict=True)
            codes = [np.random.default_rng([seed, int(image.sum())]).integers(0, 50, (1, 6)) for image, seed in rows]
            codes = np.array(codes)
            codes[:, 0, 0] = len(pixels)
            return codes

    claims = {claim.name: claim for claim in check(Codes).claims}
    assert [name for name, claim in claims.items() if not claim.holds] == [ALONE]
    assert "% of an image's codes" in claims[ALONE].measured


def test_of_images_with_one_caption_a_source_that_reads_the_caption_alone_may_make_one_latent():
    class Captioned(Good):
        said = ("a cat", "a dog", "a dog", "a cat")

        def encode(self, pixels, seeds):
            bright = pixels.mean((1, 2, 3))
            captions = [self.said[int(mean) % 4] for mean in bright]
            noise = np.array([np.random.default_rng(seed).normal(size=(3, 2, 2)) for seed in seeds], np.float32)
            return Encoded(
                noise + np.float32([caption == "a cat" for caption in captions])[:, None, None, None], captions
            )

    class SaysTheSame(Captioned):
        said = ("a cat",) * 4

    assert check(Captioned).failed == ()
    assert set(check(SaysTheSame).failed) == {IMAGE}


def test_a_decoder_that_the_source_has_replaced_is_no_decoder():
    class Guarded(Good):
        def __init__(self, spec, device):
            super().__init__(spec, device)
            self.vae.decode = lambda latents: latents

        def encode(self, pixels, seeds):
            return self.vae.decode(super().encode(pixels, seeds))

    claims = {claim.name: claim for claim in check(Guarded).claims}
    assert claims[DECODER].holds
    assert "Autoencoder.decode (replaced)" in claims[DECODER].measured


def test_decoders_are_watched_wherever_they_hide_and_only_for_so_long():
    class Outer:
        __slots__ = ("parts",)

        def __init__(self, inner):
            self.parts = {"deep": [(lambda: inner,)]}

    autoencoder = Autoencoder()
    before = Autoencoder.decode
    with watch_decoders(Outer(autoencoder)) as seen:
        autoencoder.decode(torch.zeros(1))
    assert seen.calls == {"Autoencoder.decode": 1, "Autoencoder.decoder": 1}
    autoencoder.decode(torch.zeros(1))
    assert seen.total == 2
    assert Autoencoder.decode is before


def test_a_method_that_the_row_guards_is_watched_whatever_its_name():
    class Vocoder:
        def speak(self, latents):
            return latents

    class Speaks(Good):
        row = SimpleNamespace(guard=("vocoder.speak",))

        def __init__(self, spec, device):
            super().__init__(spec, device)
            self.vocoder = Vocoder()

        def encode(self, pixels, seeds):
            return self.vocoder.speak(super().encode(pixels, seeds))

    assert check(Speaks).failed == (DECODER,)


def test_a_source_that_says_it_decodes_may_do_so():
    class DecodesAndEncodesAgain(CallsTheDecoder):
        row = SimpleNamespace(decodes=True)

    claims = {claim.name: claim for claim in check(DecodesAndEncodesAgain).claims}
    assert claims["it decodes, as it says"].holds
    assert "Autoencoder.decode" in claims["it decodes, as it says"].measured


def test_latents_of_several_shapes_are_one_error():
    class Ragged(Good):
        def encode(self, pixels, seeds):
            return [np.zeros((3, 2 + place, 2)) for place in range(len(pixels))]

    with pytest.raises(LatentShapeError, match="several shapes"):
        check(Ragged)


def test_a_source_that_drops_the_axis_of_a_batch_of_one_is_one_error():
    class Squeezes(Good):
        def encode(self, pixels, seeds):
            return super().encode(pixels, seeds).squeeze()

    with pytest.raises(LatentShapeError, match=r"shape \[3, 2, 2\] for 1 images"):
        check(Squeezes)


def test_an_image_that_a_source_refuses_is_named():
    class Refuses(Good):
        def encode(self, pixels, seeds):
            return Encoded(super().encode(pixels, seeds), rejected={1: "it was blanked"})

    with pytest.raises(SourceError, match="refuses `sample-1`: it was blanked"):
        check(Refuses)


def test_a_source_that_fails_is_one_error():
    class Fails(Good):
        def encode(self, pixels, seeds):
            raise KeyError("vae")

    with pytest.raises(SourceError, match=r"`made` fails: KeyError\('vae'\)"):
        check(Fails)


def test_a_device_that_is_too_small_is_no_fault_of_the_source():
    class Large(Good):
        def encode(self, pixels, seeds):
            raise torch.OutOfMemoryError

    with pytest.raises(SourceError, match="not enough memory for 4 images of `made`"):
        check(Large)


def test_every_call_is_told():
    calls = []
    check(Good, on_call=lambda done, total: calls.append((done, total)))
    assert calls == [(number, len(calls)) for number in range(1, len(calls) + 1)]


def test_images_of_a_folder_are_the_first_four_by_name_and_two_at_least(tmp_path):
    from PIL import Image

    for name in "edcba":
        Image.new("RGB", (4, 4), (ord(name), 0, 0)).save(tmp_path / f"{name}.png")
    (tmp_path / "notes.txt").write_text("no image")
    assert list(images_in(tmp_path)) == ["a.png", "b.png", "c.png", "d.png"]
    (tmp_path / "one").mkdir()
    (tmp_path / "a.png").rename(tmp_path / "one" / "a.png")
    with pytest.raises(ImageError, match="holds 1 images"):
        images_in(tmp_path / "one")
    assert decode_image((tmp_path / "b.png").read_bytes(), "b")[0, 0, 0] == ord("b")


def test_states_tell_a_draw_from_each_global_generator():
    for name, draw in {"torch": lambda: torch.rand(1), "numpy": np.random.rand, "python": random.random}.items():
        before = random_states()
        draw()
        assert [other for other, state in random_states().items() if state != before[other]] == [name]
