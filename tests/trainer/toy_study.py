"""A study of a few steps a run on the tiny cache."""

from pathlib import Path

from dla_cache.spec import parse_spec
from dla_cache.store import open_store
from trainer.study_plan import StudyPlan, no_stores, store_facts
from trainer.study_records import build_seconds, write_study
from trainer.study_spec import StudySpec

KD = {"ce": {}, "kd": {}}
WITH_TRANSFER = {"roles": {"transfer": ["transfer"]}, "transfer_per_batch": 4}
ARMS = {
    "alone": {"run": {"kind": "student", "objective": {"ce": {}}}},
    "teacher": {"run": {"kind": "teacher"}, "role": "teacher"},
    "kd": {
        "run": {"kind": "student", "objective": KD, **WITH_TRANSFER},
        "learns_from": "teacher",
        "tune": {"objective.kd.temperature": {"values": [1.0, 2.0]}},
    },
}


def describe(tiny, **fields):
    """The spec as plain values: students alone and distilled, one trial more or less."""
    shared = {
        "image_size": 8,
        "labelled_per_batch": 3,
        "loop": {"steps": 4, "evaluate_steps": 2, "learning_rate": 0.01, "trackers": []},
        "view": {"scale_min": 0.5},
    }
    models = {"teacher": tiny.describe("teacher", "")["model"], "student": tiny.describe("student", "")["model"]}
    arms = {name: dict(arm) for name, arm in (ARMS | fields.pop("more", {})).items()}
    for arm in arms.values():
        kind = arm.get("run", {}).get("kind")
        if kind in models:
            arm["run"] = {"model": models[kind], **arm["run"]}
    return {
        "name": "toy",
        "question": "Does it?",
        "store": str(tiny.store),
        "images": str(tiny.images),
        "base": shared,
        "arms": arms,
        "seeds": 2,
        "teacher_seeds": 2,
        "tuning": {"trials": 2, "seeds": 1, "extensions": 0},
        "comparisons": [["kd", "alone"]],
        **fields,
    }


def make_spec(tiny, **fields):
    return parse_spec(describe(tiny, **fields), StudySpec, where="study.yaml")


def make_plan(tiny, out, *, store=None, **fields):
    """The plan of a study on the tiny cache; without a store, of one that need not be there."""
    spec = make_spec(tiny, **fields)
    if out is None:
        return StudyPlan(spec, no_stores(spec), Path("out"))
    facts = store_facts(open_store(store or tiny.store), str(store or tiny.store), str(tiny.images))
    return StudyPlan(spec, dict.fromkeys([None, *spec.stores], facts), out)


def write(tiny, folder):
    built = build_seconds(open_store(tiny.store))
    return write_study(folder, "name: toy\n", dict.fromkeys([None, *folder.plan.spec.stores], built), None)
