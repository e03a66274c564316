"""Makes the shipped spoken digits anew: text-to-speech voices say zero to nine, kept as log-mel pictures.

    apt-get install espeak-ng flite
    python bench/record_speech.py spoken_digits.npz

It was run once; the result is part of the package. Another version of a voice gives other clips.
"""

import io
import subprocess
import sys
import wave
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from dla_cache.data.relief_digits import CLASS_NAMES
from dla_cache.data.spoken_digits import SAMPLE_RATE_HZ, log_mel

ESPEAK_VOICES = [
    f"{accent}{speaker}"
    for accent in ("en-us", "en-gb", "en-gb-scotland", "en-gb-x-rp", "en-gb-x-gbcwmd", "en-029")
    for speaker in ("", "+f2", "+m3")
]
ESPEAK_MANNERS = [(140, 50), (160, 35), (160, 65), (180, 50), (200, 50)]
"""Words a minute, and pitch on eSpeak's scale of 0 to 99."""
FLITE_VOICES = ("kal16", "awb", "rms", "slt")
FLITE_STRETCHES = (0.85, 1.0, 1.15)


def recordings() -> Iterator[tuple[str, int, bytes]]:
    """Voice, digit and WAV bytes of every clip."""
    for digit, word in enumerate(CLASS_NAMES):
        for voice in ESPEAK_VOICES:
            for speed, pitch in ESPEAK_MANNERS:
                command = ["espeak-ng", "-v", voice, "-s", str(speed), "-p", str(pitch), "--stdout", word]
                yield f"espeak-{voice}", digit, subprocess.run(command, check=True, capture_output=True).stdout
        for voice in FLITE_VOICES:
            for stretch in FLITE_STRETCHES:
                command = ["flite", "-voice", voice, "--setf", f"duration_stretch={stretch}", "-t", word, "/dev/stdout"]
                yield f"flite-{voice}", digit, subprocess.run(command, check=True, capture_output=True).stdout


def read_wav(content: bytes) -> np.ndarray:
    """Samples float64 [n] in [-1, 1] at `SAMPLE_RATE_HZ`, by linear interpolation."""
    with wave.open(io.BytesIO(content)) as file:
        rate = file.getframerate()
    # A WAV that was streamed has no length in its header: the samples are whatever follows.
    samples = np.frombuffer(content[44 : 44 + (len(content) - 44) // 2 * 2], "<i2").astype(np.float64) / 32768
    seconds = np.arange(int(len(samples) / rate * SAMPLE_RATE_HZ)) / SAMPLE_RATE_HZ
    return np.interp(seconds, np.arange(len(samples)) / rate, samples)


def main(path: Path) -> None:
    """Writes clips uint8 [n, 32, 32], labels uint8 [n] and voices [n]."""
    voices, labels, contents = zip(*recordings(), strict=True)
    clips = np.stack([log_mel(read_wav(content)) for content in contents])
    np.savez_compressed(path, clips=clips, labels=np.array(labels, np.uint8), voices=np.array(voices))
    print(f"{path}: {len(clips)} clips of {len(set(voices))} voices, {path.stat().st_size / 1e3:.0f} kB")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
