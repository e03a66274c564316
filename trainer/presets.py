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

EMBEDDED_TRUNK = {"patch_size": 4, "width": 64, "depth": 3, "n_heads": 4, "position_std": 0.5}
EMBEDDED_LOOP = {"steps": 480, "learning_rate": 2e-3, "warmup_steps": 20, "ema_decay": 0.99, "evaluate_steps": 80}
EMBEDDED_RUN = {"image_size": 32, "labelled_per_batch": 32, "loop": EMBEDDED_LOOP}
WITH_TRANSFER = {"roles": {"transfer": ["transfer"]}, "transfer_per_batch": 64}

PRESETS: Mapping[str, Mapping[str, Mapping[str, Any]]] = {
    "paper": {
        # A probe has no counterpart in the paper; the embedded one serves.
        "teacher": PAPER_RUN,
        "student": {**PAPER_RUN, "objective": {"ce": {}, "kd": {}, "messy": {}}},
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
            },
        },
        "student": {
            **EMBEDDED_RUN,
            **WITH_TRANSFER,
            "model": {**EMBEDDED_TRUNK, "weight_std": 0.07},
            "objective": {"ce": {}, "kd": {}},
        },
    },
}
