"""Two starting points for a run: the paper's, and one for 32-pixel images on a CPU."""

from collections.abc import Mapping
from typing import Any

PAPER_LOOP = {
    "learning_rate": 3e-5,
    "final_learning_rate": 1e-6,
    "weight_decay": 0.01,
    "clip_norm": 0.0,
    "evaluate_steps": 1000,
}
PAPER_VIEW = {"scale_min": 0.08, "scale_max": 1.0, "ratio_min": 3 / 4, "ratio_max": 4 / 3, "horizontal_flip": True}
PAPER_RUN = {"image_size": 224, "labelled_per_batch": 32, "epochs": 50, "view": PAPER_VIEW, "loop": PAPER_LOOP}

# Chosen on validation, see docs/LOG.md: at this width positions must be as loud as the content, and the
# content needs pixels of unit variance.
EMBEDDED_TRUNK = {"patch_size": 8, "width": 64, "depth": 3, "n_heads": 4, "position_std": 1.0, "dropout": 0.0}
EMBEDDED_LOOP = {"steps": 960, "learning_rate": 2e-3, "warmup_steps": 20, "ema_decay": 0.99, "evaluate_steps": 120}
EMBEDDED_RUN = {
    "image_size": 32,
    "pixel_mean": [0.394, 0.401, 0.388],
    "pixel_std": [0.183, 0.168, 0.170],
    "labelled_per_batch": 16,
    "loop": EMBEDDED_LOOP,
}
EMBEDDED_CROP = {"scale_min": 0.75, "ratio_min": 0.9, "ratio_max": 1.1}
WITH_TRANSFER = {"roles": {"transfer": ["transfer"]}, "transfer_per_batch": 48}

PRESETS: Mapping[str, Mapping[str, Mapping[str, Any]]] = {
    "paper": {
        # A probe has no counterpart in the paper; the embedded one serves.
        "teacher": PAPER_RUN,
        "student": {**PAPER_RUN, "objective": {"ce": {}, "kd": {}, "messy": {}}},
        "targets": {"view": PAPER_VIEW, "objective": {"kd": {}, "messy": {}}},
    },
    "embedded": {
        "probe": {**EMBEDDED_RUN, **WITH_TRANSFER, "self_training": {}},
        "teacher": {
            **EMBEDDED_RUN,
            **WITH_TRANSFER,
            "self_training": {},
            "model": {
                **EMBEDDED_TRUNK,
                "tokens_per_modality": 16,
                "modality_dropout": 0.2,
                "standardise": True,
                "late_fusion": True,
                # The transformer memorises 200 labels and is sure of it; the answer leans on the other branch.
                "late_fusion_weight": 0.8,
            },
        },
        "student": {
            **EMBEDDED_RUN,
            **WITH_TRANSFER,
            "view": EMBEDDED_CROP,
            "model": {**EMBEDDED_TRUNK, "weight_std": 0.07},
            "objective": {"ce": {}, "kd": {}},
        },
        "targets": {"view": EMBEDDED_CROP, "objective": {"kd": {}}},
    },
}
