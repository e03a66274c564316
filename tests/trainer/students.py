"""A tiny student of each family, for images of 32 pixels; an entry is `model` of a run."""

import torch
from transformers import ViTImageProcessorPil

from trainer.classifiers import ClassifierConfig, build_classifier

SIDE = 32
VIT = {
    "patch_size": 8,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
}
SETTINGS = {
    "vit": VIT,
    "deit": VIT,
    "swin": {"patch_size": 4, "embed_dim": 8, "depths": [1, 1], "num_heads": [1, 2], "window_size": 4},
    "convnext": {"patch_size": 4, "hidden_sizes": [8, 16], "depths": [1, 1], "num_stages": 2},
    "resnet": {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "layer_type": "basic"},
    "mobilenet_v2": {"depth_multiplier": 0.1, "output_stride": 8},
    "mobilevit": {
        "hidden_sizes": [8, 8, 8],
        "neck_hidden_sizes": [4, 4, 8, 8, 8, 8, 16],
        "num_attention_heads": 1,
        "mlp_ratio": 1.0,
        "output_stride": 16,
    },
}
WIDTHS = {
    "vit": {"vit.layers.0": 16, "vit.layers.1": 16},
    "deit": {"deit.layers.0": 16, "deit.layers.1": 16},
    "swin": {"swin.encoder.layers.0": 16, "swin.encoder.layers.1": 16},
    "convnext": {"convnext.encoder.stages.0": 8, "convnext.encoder.stages.1": 16},
    "resnet": {"resnet.encoder.stages.0": 8, "resnet.encoder.stages.1": 16},
    "mobilenet_v2": {f"mobilenet_v2.layer.{n}": 8 if n < 9 else 16 if n < 15 else 32 for n in range(16)},
    "mobilevit": {f"mobilevit.encoder.layer.{n}": 4 if n == 0 else 8 for n in range(5)},
}
FAMILIES = tuple(SETTINGS)
WITH_CLS = {"vit": 1, "deit": 2}
"""And how many tokens stand before those of the image."""
WITH_BATCH_NORM = ("resnet", "mobilenet_v2", "mobilevit")


def model_of(family):
    return {"architecture": family, "settings": SETTINGS[family]}


def make_student(family, *, n_classes=3, seed=0):
    torch.manual_seed(seed)
    config = ClassifierConfig(n_classes=n_classes, image_size=SIDE, **model_of(family))
    student = build_classifier(config, None)
    for module in student.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.momentum = 1.0  # its statistics are those of the images it saw last
    student.train()(some_pixels(8))
    return student.eval()


def save_pretrained(family, folder, *, n_classes=5, mean=(0.5, 0.5, 0.5), seed=7, **changes):
    """A checkpoint as its makers publish it: weights, config, image processor."""
    model = make_student(family, n_classes=n_classes, seed=seed)
    model.save_pretrained(folder, **changes)
    processor = ViTImageProcessorPil(image_mean=list(mean), image_std=[0.5] * 3, size={"height": SIDE, "width": SIDE})
    processor.save_pretrained(folder)
    return model


def some_pixels(n_images=3, side=SIDE):
    return torch.randn(n_images, 3, side, side, generator=torch.Generator().manual_seed(1))
