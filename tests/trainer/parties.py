"""A student, a reference and a batch of random numbers between them, for the tests of objectives."""

from dataclasses import replace

import torch

from dla_cache.spec import LatentFormat
from trainer.features import LOGITS, Features
from trainer.objectives import ModelOutline, ObjectiveConfig, ObjectiveInputs, Parties, WeightedSum

N_IMAGES, N_CLASSES, N_TOKENS = 6, 7, 4
LABELS = torch.tensor([0, -1, 6, 2, -1, 2])

STUDENT = ModelOutline({f"blocks.{number}": 8 for number in range(3)}, ("cls", "image"), N_CLASSES)
TEACHER = ModelOutline({f"blocks.{number}": 6 for number in range(4)}, ("cls", "image", "shape", "audio"), N_CLASSES)
FORMATS = {
    "depth": LatentFormat(kind="continuous", shape=(3, 2, 2), axes=("channel", "height", "width"), dtype="float32"),
    "audio": LatentFormat(kind="codes", shape=(2, 5), axes=("codebook", "step"), dtype="uint8", vocabulary=9),
}
PLACES = {"blocks.0": 6, "blocks.1": 6, "late": 6}
LIVE = {"one": PLACES, "two": PLACES}
PARTIES = Parties(STUDENT, TEACHER, FORMATS, n_images=20, live=LIVE, n_steps=20)


class ToyTeachers:
    """Teachers at hand: a linear head on what a place holds of each image, [B, tokens, D]."""

    def __init__(self, features):
        generator = torch.Generator().manual_seed(2)
        self.features = features
        self.heads = {name: torch.randn(6, N_CLASSES, generator=generator).requires_grad_() for name in LIVE}

    def logits(self, name, *, place="", mask=None, is_trained=False):
        tokens = self.features[name] + len(place)
        head = self.heads[name] if is_trained else self.heads[name].detach()
        weighed = tokens if mask is None else tokens * mask(tokens)[:, None].to(tokens.dtype)
        return weighed.mean(dim=1) @ head.to(tokens.dtype)

    def of(self, order):
        """The same about these images."""
        return ToyTeachers({name: value[order] for name, value in self.features.items()})


def build(fields, parties=PARTIES):
    """The objectives that `fields` describe, freshly initialised from seed 0."""
    torch.manual_seed(0)
    objectives = WeightedSum(ObjectiveConfig.model_validate(fields), parties)
    for name in objectives.config.modalities:
        if FORMATS[name].kind == "continuous":
            channels = FORMATS[name].shape[0]
            objectives.set_statistics(name, torch.zeros(channels), torch.ones(channels))
    return objectives


def random_inputs(objectives, dtype=torch.float32, *, scale=1.0, labels=LABELS, seed=0, step=5):
    """All that these objectives may ask for; what is the student's wants a gradient, and so do targets."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape, scale=scale):
        return (scale * torch.randn(*shape, generator=generator)).to(dtype).requires_grad_()

    def target(wanted):
        if wanted == LOGITS:
            return draw(N_IMAGES, N_CLASSES, scale=3 * scale)
        width = TEACHER.width(wanted.block)
        return draw(N_IMAGES, width) if wanted.what == "pooled" else draw(N_IMAGES, N_TOKENS, width)

    def latent(name):
        shape = (N_IMAGES, *FORMATS[name].shape)
        if FORMATS[name].kind == "codes":
            return torch.randint(FORMATS[name].vocabulary, shape, generator=generator)
        return draw(*shape).detach()

    blocks = tuple(draw(N_IMAGES, 1 + N_TOKENS, width) for width in STUDENT.blocks.values())
    student = Features(
        draw(N_IMAGES, N_CLASSES, scale=3 * scale), blocks, {"cls": slice(0, 1), "image": slice(1, None)}
    )
    return ObjectiveInputs(
        student,
        labels,
        targets={wanted: target(wanted) for wanted in objectives.targets},
        latents={name: latent(name) for name in objectives.config.modalities},
        rows=torch.arange(N_IMAGES) + 3,
        step=step,
        live=ToyTeachers({name: draw(N_IMAGES, N_TOKENS, 6).detach() for name in LIVE}),
    )


def students_tensors(inputs):
    """What of the inputs is the student's."""
    return [inputs.student.logits, *inputs.student.blocks]


def without_gradient(inputs):
    """The same numbers, which nobody asks a gradient of."""
    student = Features(
        inputs.student.logits.detach(), tuple(block.detach() for block in inputs.student.blocks), inputs.student.spans
    )
    return replace(inputs, student=student, targets={key: value.detach() for key, value in inputs.targets.items()})
