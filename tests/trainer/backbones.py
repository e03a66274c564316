"""Tiny image models of transformers, saved as somebody else would publish them."""

import torch
from transformers import AutoConfig, AutoModelForImageClassification, ViTImageProcessorPil

_VIT = {"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 8, "patch_size": 4}
FAMILIES = {
    "vit": {**_VIT, "intermediate_size": 16},
    "deit": {**_VIT, "intermediate_size": 16},
    "dinov2": {**_VIT, "mlp_ratio": 2, "drop_path_rate": 0.5},
    "swin": {"embed_dim": 4, "depths": [1, 1], "num_heads": [1, 2], "window_size": 2, "patch_size": 2, "image_size": 8},
    "convnext": {"hidden_sizes": [4, 8], "depths": [1, 1], "num_stages": 2, "patch_size": 2},
    "resnet": {"embedding_size": 4, "hidden_sizes": [4, 8], "depths": [1, 1], "layer_type": "basic"},
}
MEAN, STD = (0.48, 0.45, 0.4), (0.27, 0.26, 0.28)


def save_pretrained(family, folder, **processor):
    """A classifier of 7 classes with random weights, and its image processor."""
    torch.manual_seed(5)
    config = AutoConfig.for_model(family, **FAMILIES[family], num_labels=7)
    config.architectures = ["DeiTForImageClassification"]  # of this family alone the library has two
    AutoModelForImageClassification.from_config(config).save_pretrained(folder)
    said = {"image_mean": list(MEAN), "image_std": list(STD), "size": {"height": 8, "width": 8}, **processor}
    ViTImageProcessorPil(**said).save_pretrained(folder)
    return folder
