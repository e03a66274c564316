"""The shipped arms of students that learn from a probe on the latents: each pair trains as it stands."""

import json
from pathlib import Path

import pytest

from dla_cache.spec import load_yaml
from trainer.config import merge, resolve_run
from trainer.run import load_run, train_run
from trainer.run_folder import read_config

FILE = Path(__file__).parents[2] / "manifests" / "studies" / "arms" / "latent-probes.yaml"
ARMS = load_yaml(FILE)["arms"]
STUDENTS = {name: arm["learns_from"] for name, arm in ARMS.items() if "learns_from" in arm}
LAYERS = {"probe-linear": 1, "probe-mlp": 2, "probe-self-trained": 2}


def run_of(tiny, folder, name, **places):
    """An arm's run on the tiny cache, of the embedded preset but for what the cache decides."""
    base = {"preset": "embedded", "labelled_per_batch": 3, "transfer_per_batch": 4, "loop": {"steps": 4}}
    small = {"image_size": 8, "roles": {"transfer": ["transfer"]}}
    places = {"store": str(tiny.store), "images": str(tiny.images), "output": str(folder / name), **places}
    fields = merge(merge(merge(base, small), ARMS[name]["run"]), places)
    return resolve_run(fields, base=Path(), where=name)


@pytest.mark.parametrize(("student", "probe"), STUDENTS.items())
def test_each_arm_of_a_probe_and_its_student_trains_as_it_stands(tiny, tmp_path, student, probe):
    train_run(run_of(tiny, tmp_path, probe))
    trained = load_run(tmp_path / probe)
    linear = [name for name in trained.task.module.state_dict() if "classifier" in name and name.endswith("weight")]
    assert len(linear) == LAYERS[probe]
    lines = [json.loads(line) for line in (tmp_path / probe / "metrics.jsonl").read_text().splitlines()]
    is_self_trained = "transfer" in read_config(tmp_path / probe).roles.transfer
    assert is_self_trained == (trained.config.self_training is not None) == (probe == "probe-self-trained")
    assert all("ce_probe" in line["losses"] for line in lines)
    result = train_run(run_of(tiny, tmp_path, student, teacher=str(tmp_path / probe)))
    assert set(result.gradient_shares) == {"ce", "kd"}
    assert result.inert == ()
