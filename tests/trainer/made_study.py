"""A study that was never run: runs.csv and images.csv with effects that are known, for any spec."""

import csv
import hashlib
import json

import numpy as np
import yaml

from trainer.study_spec import StudySpec

SPEC = """\
name: made
question: Does messy beat tuned KD, and does either beat plain training?
store: cache.zarr
arms:
  image-only: {run: {kind: student}}
  teacher: {run: {kind: teacher}, role: teacher}
  kd: {learns_from: teacher, run: {kind: student}, tune: {objective.kd.temperature: {values: [1, 2, 4]}}}
  messy: {learns_from: teacher, run: {kind: student}, tune: {objective.messy.weight: {values: [0.5, 1, 2]}}}
seeds: 10
teacher_seeds: 3
tuning: {trials: 3, seeds: 2}
comparisons: [[messy, kd], [kd, image-only]]
"""


def write_study(folder, spec_yaml=SPEC, *, truth, n_images=800, seed=0, spread=None, drop=()):
    """The three files of a study whose arms have these true scores.

    Args:
        truth: arm → true score, as a probability of getting an image right.
        spread: standard deviations, in points: `teacher`, `seed` of an arm's own, `both` of teacher x seed.
        drop: (arm, teacher_seed, seed) that are not there.
    """
    spread = {"teacher": 0.5, "seed": 1.0, "both": 0.3} | (spread or {})
    rng = np.random.default_rng(seed)
    spec = StudySpec.model_validate(yaml.safe_load(spec_yaml))
    difficulty = rng.normal(size=n_images)
    lines, trial_lines = [], []
    for arm, true in truth.items():
        is_student_of = spec.arms[arm].role != "teacher" and spec.teacher_of(arm) is not None
        teachers = spec.all_teacher_seeds if is_student_of else (None,)
        of_teacher = {teacher: rng.normal(scale=spread["teacher"]) for teacher in teachers}
        of_seed = {one: rng.normal(scale=spread["seed"]) for one in spec.final_seeds(arm)}
        tune = spec.arms[spec.tuned_as(arm)].tune
        settings = {name: axis.values[1] for name, axis in tune.items()}
        for fraction in spec.fractions_of():
            for teacher in teachers:
                for one in spec.final_seeds(arm):
                    points = of_teacher[teacher] + of_seed[one] + rng.normal(scale=spread["both"])
                    lost = 0.0 if fraction is None else 0.15 * (1 - fraction)
                    ability = true - lost + points / 100
                    hits = difficulty + rng.normal(scale=1.2, size=n_images)
                    right = hits >= np.quantile(hits, 1 - np.clip(ability, 0, 1))
                    if (arm, teacher, one) not in drop:
                        lines.append(line(arm, "final", teacher, one, settings, fraction or 1.0, hits=right))
        if spec.arms[arm].tune:
            for trial in range(spec.tuning.trials):
                tried = {name: axis.values[trial % len(axis.values)] for name, axis in tune.items()}
                score = true - 0.02 * (tried != settings)
                for one in spec.tuning.all_seeds:
                    trial_lines.append(line(arm, "tuning", None, one, tried, 1.0, trial=trial, validation=score))
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "spec.yaml").write_text(spec_yaml)
    write_lines(folder / "runs.csv", trial_lines + lines)
    images = [{"image_id": f"test-{number}", "label": number % 10, "group": ""} for number in range(n_images)]
    write_lines(folder / "images.csv", images)
    return folder


def line(arm, stage, teacher, seed, settings, fraction, *, hits=None, trial=None, validation=None):
    """One run as a line of runs.csv."""
    test = None if hits is None else float(hits.mean())
    place = json.dumps([arm, stage, teacher, seed, trial, fraction])
    return {
        "run": hashlib.sha256(place.encode()).hexdigest()[:16],
        "arm": arm,
        "stage": stage,
        "teacher_seed": teacher,
        "seed": seed,
        "trial": trial,
        "label_fraction": fraction,
        "settings": json.dumps(settings, sort_keys=True),
        "validation": round(test + 0.01 if validation is None else validation, 4),
        "test": test,
        "metric": "top-1",
        "steps": 480,
        "train_seconds": 31.5,
        "images_per_s": 1200,
        "upstream_seconds": 0 if teacher is None else 140,
        "parameters": 171_000,
        "gradient_shares": json.dumps({"ce": 1.0} if teacher is None else {"ce": 0.3, "kd": 0.6997, "fd_cmkd": 0.0003}),
        "inert": json.dumps([] if teacher is None else ["fd_cmkd"]),
        "test_hits": None if hits is None else np.packbits(hits).tobytes().hex(),
    }


def write_lines(path, lines):
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, [*lines[0]])
        writer.writeheader()
        writer.writerows(lines)
