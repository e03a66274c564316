"""Small teachers of two modalities, and a batch for them."""

import pytest
import torch

from dla_cache.spec import LatentFormat
from trainer.teacher import Teacher, TeacherConfig

DEPTH = LatentFormat(kind="continuous", shape=(8, 4, 4), axes=("channel", "height", "width"), dtype="float16")
SHAPE = LatentFormat(kind="continuous", shape=(6, 6), axes=("token", "channel"), dtype="float32")
AUDIO = LatentFormat(kind="codes", shape=(2, 9), axes=("codebook", "step"), dtype="int16", vocabulary=5)
KINDS = {
    "early": {},
    "bottleneck": {"fusion": "bottleneck", "n_bottlenecks": 2},
    "late": {"fusion": "late"},
    "an MLP on latents beside it": {"standardise": True, "late_fusion": True},
}
EVERY_FUSION = pytest.mark.parametrize("fusion", KINDS.values(), ids=KINDS)


def small_config(**settings):
    small = {
        "n_classes": 4,
        "formats": {"shape": SHAPE, "audio": AUDIO},
        "image_size": 8,
        "patch_size": 4,
        "width": 16,
        "depth": 2,
        "n_heads": 2,
        "tokens_per_modality": 3,
        "resampler_heads": 4,
    }
    return TeacherConfig.model_validate({**small, **settings})


def with_statistics(teacher):
    for name, latent_format in teacher.config.formats.items():
        if latent_format.kind == "continuous":
            n_channels = latent_format.shape[latent_format.channel_axis]
            teacher.set_statistics(name, torch.arange(n_channels) / 4, 1 + torch.arange(n_channels) / 8)
    return teacher


def make_teacher(**settings):
    torch.manual_seed(0)
    teacher = Teacher(small_config(**settings))
    heads = teacher.stream_heads.heads.values() if teacher.config.fusion == "late" else [teacher.head]
    for head in heads:
        torch.nn.init.normal_(head.weight)  # a zero head would hide every difference
    return (with_statistics(teacher) if teacher.config.standardise else teacher).eval()


def make_batch(n_images=5):
    generator = torch.Generator().manual_seed(1)
    latents = {
        "shape": torch.randn(n_images, 6, 6, generator=generator),
        "audio": torch.randint(0, 5, (n_images, 2, 9), generator=generator),
    }
    return torch.randn(n_images, 3, 8, 8, generator=generator), latents
