"""The image-only student: a stock transformers image classifier, so what is trained is what ships."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from transformers import PreTrainedModel, ViTConfig, ViTForImageClassification, ViTImageProcessorPil
from transformers.image_utils import PILImageResampling

from trainer.data import PixelScale
from trainer.features import Features
from trainer.outline import Blocks
from trainer.trunk import TrunkConfig

MULTI_LABEL: Literal["multi_label_classification"] = "multi_label_classification"
"""What transformers calls it if an image may have any number of classes."""


class StudentConfig(TrunkConfig):
    """Shape of a student; the defaults are the published ViT-B/16."""

    weight_std: Annotated[float, Field(gt=0)] = 0.02
    """Initial scale of all weights. .02 is about 1/√(3·width) at width 768; a narrow model needs more."""


def build_student(config: StudentConfig) -> ViTForImageClassification:
    """A freshly initialised student with a zero classifier; its forward takes pixels and nothing else."""
    settings: dict[str, Any] = {
        "image_size": config.image_size,
        "patch_size": config.patch_size,
        "hidden_size": config.width,
        "num_hidden_layers": config.depth,
        "num_attention_heads": config.n_heads,
        "intermediate_size": config.mlp_ratio * config.width,
        "hidden_act": "gelu",
        "hidden_dropout_prob": config.dropout,
        "attention_probs_dropout_prob": config.dropout,
        "layer_norm_eps": 1e-6,
        "initializer_range": config.weight_std,
        "num_labels": config.n_classes,
        "attn_implementation": "sdpa",
    }
    student = ViTForImageClassification(ViTConfig(**settings))
    nn.init.trunc_normal_(student.vit.embeddings.position_embeddings, std=config.position_std)
    for parameter in student.classifier.parameters():
        nn.init.zeros_(parameter)
    return student


def student_features(student: PreTrainedModel, blocks: Blocks, pixels: Tensor) -> Features:
    """Logits and block outputs for normalised pixels [B, 3, H, W]."""
    output = student(pixel_values=pixels, output_hidden_states=True)
    return blocks.features(output.logits, output.hidden_states)


@torch.no_grad()
def student_position_to_content(student: PreTrainedModel, pixels: Tensor) -> float | None:
    """Mean norm of the patch positions over mean norm of the patch tokens they are added to; None of no ViT."""
    if not isinstance(student, ViTForImageClassification):
        return None
    embeddings = student.vit.embeddings
    content = embeddings.patch_embeddings(pixels).norm(dim=-1)
    positions = embeddings.position_embeddings[:, 1:].norm(dim=-1)
    return float(positions.mean() / content.mean())


def export_student(
    student: PreTrainedModel,
    folder: Path,
    *,
    class_names: Sequence[str],
    image_size: int,
    pixel_scale: PixelScale,
    is_multi_label: bool = False,
) -> None:
    """Writes the student as a folder that stock transformers loads: weights, class map, image processor.

    The processor gives the pixels that the student was evaluated on: the shorter side resized to
    `image_size`, bicubic and antialiased, then the centre square, normalised.
    """
    student.config.id2label = dict(enumerate(class_names))
    if is_multi_label:
        student.config.problem_type = MULTI_LABEL
    student.config.label2id = {name: index for index, name in enumerate(class_names)}
    student.save_pretrained(folder)
    processor = ViTImageProcessorPil(
        do_convert_rgb=True,
        size={"shortest_edge": image_size},
        resample=PILImageResampling.BICUBIC,
        do_center_crop=True,
        crop_size={"height": image_size, "width": image_size},
        image_mean=list(pixel_scale.mean),
        image_std=list(pixel_scale.std),
    )
    processor.save_pretrained(folder)
