"""`dla study run` and `dla study status` as a shell sees them."""

import csv
import json
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from cli.study_run import forget_another
from cli.study_stores import check_images
from dla_cache.errors import SpecError
from dla_cache.manifest import write_manifest
from dla_cache.spec import read_yaml
from dla_cache.store import open_store
from tests.trainer.toy_study import ARMS, describe
from trainer.study_spec import StudySpec

SMOKE = Path(__file__).parents[2] / "manifests" / "studies" / "smoke.yaml"


@pytest.fixture
def spec(tiny, tmp_path):
    """`spec(**fields)`: the file of a study on the tiny cache, and what it says."""

    def write(**fields):
        path = tmp_path / "study.yaml"
        path.write_text(yaml.safe_dump(describe(tiny, **fields), sort_keys=False))
        return path

    return write


def test_a_dry_run_shows_every_arm_and_needs_no_store(dla, spec, tmp_path):
    path = spec(store="nowhere.zarr", more={"twin": {"run": ARMS["alone"]["run"]}})
    ended = dla("study", "run", path, "--out", tmp_path / "out", "--dry-run")
    assert ended.exit_code == 0, ended.stderr
    rows = {line.split()[0]: line.split() for line in ended.stdout.splitlines() if line.split()[0] in (*ARMS, "twin")}
    assert rows["teacher"][-3:] == ["1", "2", "4"]
    assert rows["kd"] == ["kd", "student", "teacher", "-", "2", "4", "4"]
    assert "11 runs in all" in ended.stdout
    assert "no run is done yet" in ended.stdout
    assert not (tmp_path / "out").exists()


def test_what_the_command_line_sets_is_what_is_planned(dla, spec, tmp_path):
    path = spec()
    ended = dla("study", "run", path, "--out", tmp_path / "out", "--set", "seeds=3", "--dry-run", "--json")
    arms = {row["arm"]: row for row in json.loads(ended.stdout)["arms"]}
    assert (arms["kd"]["final_runs"], arms["alone"]["final_runs"]) == (6, 3)


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"more": {"kd": {**ARMS["kd"], "learns_from": "techer"}}}, "`arms.kd.learns_from` names `techer`"),
        ({"more": {"kd": {**ARMS["kd"], "tune": {"objective.kd.heat": {"values": [1, 2]}}}}}, "objective.kd.heat"),
        ({"store": "nowhere.zarr"}, "nowhere.zarr"),
        ({"device": "cuda:7"}, "cuda:7"),
        ({"stores": {"noise": {"control": "gausian"}}}, "`gausian`, which is no control"),
        (
            {"store": None, "images": None, "data": "relief-digits", "stores": {"more": {"source": "musicgen"}}},
            "`musicgen`, which is no source",
        ),
    ],
)
def test_what_cannot_be_run_is_one_message_with_a_hint_and_nothing_is_trained(dla, spec, tmp_path, fields, told):
    ended = dla("study", "run", spec(**fields), "--out", tmp_path / "out")
    assert (ended.exit_code, ended.stdout) == (1, "")
    assert told in ended.stderr
    assert "hint: " in ended.stderr
    assert not (tmp_path / "out" / "runs").exists()


def test_groups_that_lack_a_test_image_are_refused_before_anything_is_trained(dla, spec, tmp_path):
    (tmp_path / "groups.csv").write_text("image_id,group\nnobody,1\n")
    ended = dla("study", "run", spec(groups="groups.csv"), "--out", tmp_path / "out")
    assert ended.exit_code == 1
    assert "has no group of 4 test images" in ended.stderr
    assert not (tmp_path / "out" / "runs").exists()


def test_a_store_of_other_images_than_the_study_s_is_refused_and_one_in_another_order_is_not(dla, spec, tiny, tmp_path):
    lacking, *others = tiny.manifest.rows()
    few = write_manifest(tmp_path / "few.parquet", others, tiny.manifest.class_names)
    stores = {"few": replace(few, root=tiny.images), "turned": tiny.reverse(tiny.manifest)}
    for name, manifest in stores.items():
        tiny.build(manifest, tmp_path / f"{name}.zarr")
    own = open_store(tiny.store)
    check_images("turned", open_store(tmp_path / "turned.zarr"), own)
    with pytest.raises(SpecError, match=r"`stores\.few` is not of the same images"):
        check_images("few", open_store(tmp_path / "few.zarr"), own)
    ended = dla("study", "run", spec(stores={"few": {"path": str(tmp_path / "few.zarr")}}), "--out", tmp_path / "out")
    assert ended.exit_code == 1
    assert f"1 differ, `{lacking.image_id}`" in ended.stderr


def test_what_was_made_of_another_spec_does_not_stay_beside_the_runs_of_this_one(tmp_path, capsys):
    made = [tmp_path / name for name in ("audit.json", "report.html", "tables.csv")]
    for path in made:
        path.write_text("of another")
    (tmp_path / "spec.yaml").write_text("name: one\n")
    forget_another(tmp_path, "one", "name: one\n")
    assert all(path.exists() for path in made)
    forget_another(tmp_path, "one", "name: one\nseeds: 3\n")
    assert not any(path.exists() for path in made)
    assert capsys.readouterr().err == ""
    forget_another(tmp_path, "other", "name: other\n")
    assert "held the tables of `one`; those of `other` take their place" in capsys.readouterr().err


def test_a_folder_without_a_study_has_no_status(dla, tmp_path):
    ended = dla("study", "status", tmp_path)
    assert ended.exit_code == 1
    assert "holds no study" in ended.stderr


def test_a_study_with_a_control_and_two_shares_of_the_labels_runs_and_tells_how_far_it_is(dla, spec, tiny, tmp_path):
    more = {
        "teacher": {"role": "teacher", "run": {"kind": "probe", "model": {"hidden": 8}}, "store": "noise"},
        "kd": {name: value for name, value in ARMS["kd"].items() if name != "tune"},
    }
    controls = {"noise": {"control": "gaussian", "seed": 3}}
    path = spec(more=more, stores=controls, seeds=1, teacher_seeds=1, label_fractions=[0.5, 1.0])
    out = tmp_path / "out"
    ended = dla("study", "run", path, "--out", out, "--processes", "1", "--json")
    assert ended.exit_code == 0, ended.stderr
    assert json.loads(ended.stdout) == {"study": "toy", "runs": 6, "folder": str(out / "study")}
    assert (out / "study" / "spec.yaml").read_text() == path.read_text()
    with (out / "study" / "runs.csv").open() as file:
        runs = list(csv.DictReader(file))
    assert [(run["arm"], run["label_fraction"]) for run in runs] == [
        (arm, share) for arm in ("alone", "teacher", "kd") for share in ("0.5", "1.0")
    ]
    audit = json.loads((out / "study" / "audit.json").read_text())
    assert audit["images"] == {"labelled": 6, "transfer": 8, "validation": 6, "test": 4}
    assert dla("study", "report", out / "study").exit_code == 0
    said = json.loads(dla("study", "status", out, "--json").stdout)
    assert (said["done"], said["is_whole"], said["failures"]) == (6, True, {})
    assert "6 of 6 runs done" in dla("study", "status", out).stdout
    assert (
        "minutes of training on 2 processes"
        in dla("study", "run", path, "--out", out, "--dry-run", "--processes", "2").stdout
    )


def test_the_smoke_study_has_a_teacher_a_probe_a_control_and_paired_seeds(dla, tmp_path):
    spec = read_yaml(SMOKE, StudySpec)
    assert {arm.role for arm in spec.arms.values()} == {"teacher", None}
    ended = dla("study", "run", SMOKE, "--out", tmp_path / "out", "--dry-run", "--json")
    assert ended.exit_code == 0, ended.stderr
    assert json.loads(ended.stdout)["runs"] <= 30


def test_a_store_that_the_command_names_stands_in_the_spec_that_the_study_leaves(dla, spec, tiny, tmp_path):
    path = spec(more={name: {"run": ARMS["alone"]["run"]} for name in ("teacher", "kd")}, seeds=1)
    said = yaml.safe_load(path.read_text())
    path.write_text(yaml.safe_dump({name: said[name] for name in said if name not in ("store", "images")}))
    out = tmp_path / "out"
    given = ("--store", tiny.store, "--images", tiny.images)
    ended = dla("study", "run", path, *given, "--out", out, "--processes", "1")
    assert ended.exit_code == 0, ended.stderr
    left = read_yaml(out / "study" / "spec.yaml", StudySpec)
    assert (left.store, left.images) == (str(tiny.store), str(tiny.images))
    assert dla("study", "report", out).exit_code == 0
