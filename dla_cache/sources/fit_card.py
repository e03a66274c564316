"""The model card of fitted sources: what they are, from what, how good, and what they have seen."""

from collections.abc import Mapping
from typing import Any

SCORES = {
    "depth_correlation": "correlation of decoded and true depth",
    "latent_r2": "R² of the latent",
    "right_digit": "nearest clip says the digit",
    "picture_r2": "R² of the picture",
}

WHAT = {
    "embedded-depth": """Depth from one 32 x 32 image, as a latent float [8, 4, 4] that is never decoded when a cache \
is built.""",
    "embedded-audio": """The spoken name of the digit in a 32 x 32 image, as the latent float [8, 4, 4] of its log-mel \
picture,
which is never decoded when a cache is built.""",
}
PICTURES = {"embedded-depth": "depth", "embedded-audio": "log-mel pictures"}

PAIRS = {
    "embedded-depth": """from {n_pairs:,} pairs of a rendered digit and its true
depth: the `generator` split of relief-digits, whose digits stand in no other split. **No label was seen.**""",
    "embedded-audio": """from {n_pairs:,} rendered digits, the `generator`
split of relief-digits, whose digits stand in no other split, each met with clips of text-to-speech voices that say it.
**Which clip belongs to which image goes by the label: this source has seen the labels of all those digits.** What a
student gains from its latents may be those labels and nothing of sound.""",
}

HELD_OUT = {
    "embedded-depth": "",
    "embedded-audio": "\nThe autoencoder's own score is on two voices that it was not fitted on.",
}

LICENCE = {
    "embedded-depth": "",
    "embedded-audio": " Voices: eSpeak NG and flite.",
}


def model_card(spec: Mapping[str, Any], n_pairs: int, scores: Mapping[str, Mapping[str, float]]) -> str:
    """What the shipped weights are, from what, how good, and under which licence, as Markdown.

    Args:
        spec: the settings, as a fit spec has them.
        scores: by what was scored, then by score.
    """
    source = spec["source"]
    shown = [key for key in SCORES if any(key in score for score in scores.values())]
    rows = "\n".join(
        f"| {name} | " + " | ".join(f"{score[key]:.4f}" if key in score else "" for key in shown) + " |"
        for name, score in scores.items()
    )
    settings = "\n".join(f"- `{name}`: {value}" for name, value in spec.items())
    return f"""# {source} and {source}-ridge

{WHAT[source]}

- **{source}**: `AutoencoderKL` on pixel-unshuffled {PICTURES[source]}, and a rectified flow (`UNet2DModel`)
  conditioned on the image, sampled by Euler's method from per-sample noise.
- **{source}-ridge**: random image patches as filters, pooled, then ridge regression to the same
  latents. The cheap map to beat.

Made with `dla sources fit manifests/{source}-fit.yaml` {PAIRS[source].format(n_pairs=n_pairs)}

## Held-out scores

{spec["held_out_digits"]} digits of the generator's split that were not fitted on; weights rounded to float16 first.
Their score chose which step of each stage was kept, so what the table says is a little optimistic.{HELD_OUT[source]}

| | {" | ".join(SCORES[key] for key in shown)} |
|---|{"---|" * len(shown)}
{rows}

## Settings

{settings}

## Limits and licence

Good for digits rendered as relief-digits renders them, and for nothing else. Apache-2.0; fitted on renderings
of MNIST digits (CC BY-SA 3.0) over photo textures (CC BY 2.0), see LICENSES/.{LICENCE[source]}
"""
