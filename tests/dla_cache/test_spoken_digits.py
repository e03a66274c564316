"""Claims about the shipped spoken digits and the picture that a sound becomes."""

import numpy as np

from dla_cache.data.spoken_digits import (
    FRAME_STEP,
    N_FRAMES,
    N_MELS,
    SAMPLE_RATE_HZ,
    load_spoken_digits,
    log_mel,
    mel_filters,
)


def tone(hertz: float, seconds: float, silence_s: float = 0.0) -> np.ndarray:
    time = np.arange(int(seconds * SAMPLE_RATE_HZ)) / SAMPLE_RATE_HZ
    return np.concatenate([np.zeros(int(silence_s * SAMPLE_RATE_HZ)), 0.5 * np.sin(2 * np.pi * hertz * time)])


def test_every_voice_says_every_digit_equally_often() -> None:
    spoken = load_spoken_digits()
    assert spoken.clips.shape == (1020, N_MELS, N_FRAMES)
    assert len(np.unique(spoken.voices)) == 22
    counts = [np.bincount(spoken.labels[spoken.voices == voice], minlength=10) for voice in np.unique(spoken.voices)]
    assert all(len(set(of_voice.tolist())) == 1 for of_voice in counts)


def test_every_clip_has_a_loudest_point_and_some_silence() -> None:
    clips = load_spoken_digits().clips.reshape(1020, -1)
    assert (clips.max(axis=1) == 255).all()
    assert (clips.min(axis=1) == 0).all()


def test_a_voice_that_was_never_heard_is_told_apart_by_the_nearest_clip_of_the_others() -> None:
    spoken = load_spoken_digits()
    flat = spoken.clips.reshape(len(spoken.clips), -1).astype(np.float32)
    is_held = spoken.voices == "espeak-en-gb-x-rp+f2"
    distances = ((flat[is_held][:, None] - flat[~is_held][None]) ** 2).sum(axis=2)
    answers = spoken.labels[~is_held][distances.argmin(axis=1)]
    assert (answers == spoken.labels[is_held]).mean() > 0.9


def test_a_higher_tone_lies_in_a_higher_row() -> None:
    rows = [int(log_mel(tone(hertz, 0.5)).astype(int).sum(axis=1).argmax()) for hertz in (200, 800, 3000)]
    assert rows == sorted(set(rows))


def test_silence_before_a_word_is_cut_and_a_short_word_is_followed_by_silence() -> None:
    with_pause, without = log_mel(tone(440, 0.4, silence_s=0.3)), log_mel(tone(440, 0.4))
    assert np.abs(with_pause.astype(int) - without.astype(int)).max() <= 2
    n_heard = int(0.4 * SAMPLE_RATE_HZ / FRAME_STEP)
    assert (without[:, n_heard + 1 :] == 0).all()
    assert (without[:, : n_heard - 2].max(axis=0) > 200).all()


def test_silence_alone_becomes_a_picture_without_a_fault() -> None:
    assert log_mel(np.zeros(100)).shape == (N_MELS, N_FRAMES)


def test_every_mel_filter_hears_something() -> None:
    assert (mel_filters().sum(axis=1) > 0).all()
