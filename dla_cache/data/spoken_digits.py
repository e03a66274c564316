"""Spoken digits: the words zero to nine in 22 text-to-speech voices, as log-mel pictures.

They give relief-digits its second modality. A clip belongs to an image by class alone, so whatever
is fitted on such pairs has seen label information.
"""

from dataclasses import dataclass
from functools import cache
from importlib import resources

import numpy as np
from numpy.typing import NDArray

SAMPLE_RATE_HZ = 16_000
FRAME_STEP = 400
"""Samples from one frame to the next: 25 ms, so 32 frames span 0.8 s."""
WINDOW = 640
N_MELS = 32
N_FRAMES = 32
LOWEST_HZ, HIGHEST_HZ = 80.0, 7600.0
RANGE_DB = 60.0
"""Below the loudest point of a clip; what is quieter is silence."""


@dataclass(frozen=True, slots=True)
class SpokenDigits:
    """Clips uint8 [N, 32 mels, 32 frames] (low tones first, 255 the loudest), labels uint8 [N], voices str [N]."""

    clips: NDArray[np.uint8]
    labels: NDArray[np.uint8]
    voices: NDArray[np.str_]


@cache
def load_spoken_digits() -> SpokenDigits:
    """The shipped clips, made by `bench/record_speech.py` with eSpeak NG and flite."""
    with resources.files(__package__).joinpath("spoken_digits.npz").open("rb") as file, np.load(file) as arrays:
        return SpokenDigits(arrays["clips"], arrays["labels"], arrays["voices"])


def log_mel(samples: NDArray[np.float64]) -> NDArray[np.uint8]:
    """The log-mel picture uint8 [32 mels, 32 frames] of one word, from where it becomes audible.

    Args:
        samples: [n] at 16 kHz; what lies beyond 0.8 s is cut, a short word is followed by silence.

    Source: mel scale of O'Shaughnessy, "Speech Communication", 1987: 2595 log10(1 + f / 700).
    """
    audible = np.flatnonzero(np.abs(samples) > 0.02 * np.abs(samples).max())
    needed = WINDOW + (N_FRAMES - 1) * FRAME_STEP
    word = samples[audible[0] if len(audible) else 0 :][:needed]
    word = np.pad(word, (0, needed - len(word)))
    frames = np.lib.stride_tricks.sliding_window_view(word, WINDOW)[::FRAME_STEP] * np.hanning(WINDOW)
    power = np.abs(np.fft.rfft(frames, axis=1)) ** 2
    mels = mel_filters() @ power.T
    decibels = 10 * np.log10(mels / max(float(mels.max()), 1e-12) + 1e-12)
    picture: NDArray[np.uint8] = np.rint(np.clip(1 + decibels / RANGE_DB, 0, 1) * 255).astype(np.uint8)
    return picture


@cache
def mel_filters() -> NDArray[np.float64]:
    """Triangular filters [32, 321] over the spectrum of one window, evenly spaced in mels."""
    low, high = (2595 * np.log10(1 + hertz / 700) for hertz in (LOWEST_HZ, HIGHEST_HZ))
    corners = 700 * (10 ** (np.linspace(low, high, N_MELS + 2) / 2595) - 1)
    bins = np.fft.rfftfreq(WINDOW, 1 / SAMPLE_RATE_HZ)
    left, centre, right = corners[:-2, None], corners[1:-1, None], corners[2:, None]
    filters: NDArray[np.float64] = np.maximum(
        0, np.minimum((bins - left) / (centre - left), (right - bins) / (right - centre))
    )
    return filters
