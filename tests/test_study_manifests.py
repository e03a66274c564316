"""The studies of `manifests/studies` can be run as they are: seen without a store, and without training."""

import json
import re
import shlex
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from cli.main import app
from dla_cache.spec import LatentFormat, read_yaml
from trainer.config import RunConfig
from trainer.reference import FrozenClassifier, Teachers
from trainer.run import build_task
from trainer.run_folder import DataFacts
from trainer.study_pairs import is_label_informed
from trainer.study_plan import StudyPlan, no_stores
from trainer.study_spec import StudySpec
from trainer.tasks import ProbeTask, StudentTask, TeacherTask

MANIFESTS = Path(__file__).parents[1] / "manifests"
PATHS = sorted((MANIFESTS / "studies").glob("*.yaml"))
NO_CLAIMS = ("smoke", "relief-digits-explore")
"""Studies that settle nothing: one runs for a minute, one looks for what others should plan."""
MAIN_ARMS = ("image-only", "image-kd", "kd", "kd-probe", "fitnets", "messy")

EMBEDDED = {
    "depth": LatentFormat(kind="continuous", shape=(8, 4, 4), axes=("channel", "height", "width"), dtype="float16")
}
PUBLIC = {
    "shape": LatentFormat(kind="continuous", shape=(256, 1024), axes=("token", "channel"), dtype="float16"),
    "audio": LatentFormat(kind="codes", shape=(4, 250), axes=("codebook", "step"), dtype="int16", vocabulary=2048),
}

each_study = pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)


def dry_run(path: Path, out: Path) -> dict[str, Any]:
    result = CliRunner().invoke(app, ["study", "run", str(path), "--out", str(out), "--dry-run", "--json"])
    assert result.exit_code == 0, result.output
    facts: dict[str, Any] = json.loads(result.stdout)
    return facts


@each_study
def test_a_study_dry_runs_without_its_stores_with_equal_budgets(path: Path, tmp_path: Path) -> None:
    spec, facts = read_yaml(path, StudySpec), dry_run(path, tmp_path / "out")
    rows = {row["arm"]: row for row in facts["arms"]}
    budget = spec.tuning.trials * len(spec.tuning.all_seeds)
    tuned = [name for name, arm in spec.arms.items() if arm.tune]
    assert facts["runs"]
    assert rows.keys() == spec.arms.keys()
    assert tuned
    assert spec.unequal_budget is None
    assert {name: rows[name]["tuning_runs"] for name in tuned} == dict.fromkeys(tuned, budget)
    assert not (tmp_path / "out").exists()


@each_study
def test_the_planned_pairs_of_a_study_have_runs_in_common(path: Path, tmp_path: Path) -> None:
    spec = read_yaml(path, StudySpec)
    runs = StudyPlan(spec, no_stores(spec), tmp_path, base=path.parent).state(lambda _key: 0.0).runs
    found = Counter((run.arm, run.teacher_seed, run.seed) for run in runs if run.stage == "final")
    assert spec.comparisons or path.stem in NO_CLAIMS
    assert set(found.values()) == {1}
    for pair in spec.comparisons:
        seeds = [{seed for arm, _, seed in found if arm == name} for name in pair]
        teachers = [{teacher for arm, teacher, _ in found if arm == name} for name in pair]
        assert seeds[0] == seeds[1]
        assert teachers[0] == teachers[1] or {None} in teachers


each_claim = pytest.mark.parametrize(
    "path", [path for path in PATHS if path.stem not in NO_CLAIMS], ids=lambda path: path.stem
)


@each_claim
def test_what_a_claim_is_about_has_ten_seeds_with_three_teachers_and_a_control_of_it_five(path: Path) -> None:
    spec = read_yaml(path, StudySpec)
    arms, n_seeds = (("kd", "messy"), 5) if path.stem.endswith("-controls") else (MAIN_ARMS, 10)
    assert {len(spec.final_seeds(name)) for name in arms} == {n_seeds}
    assert len(spec.all_teacher_seeds) == 3


@each_claim
def test_arms_whose_latents_know_the_class_are_marked_and_no_others(path: Path) -> None:
    spec = read_yaml(path, StudySpec)
    leaking = {name for name in spec.arms if spec.store_of(name) in ("shuffled-within", "label-embedding")}
    assert leaking
    assert all(is_label_informed(spec, name) for name in leaking)
    students = {name for name in leaking if spec.arms[name].role is None}
    assert {name for name, arm in spec.arms.items() if "label-informed" in (arm.note or "")} == students


# Caltech101 and ImageNet-100 have the arms of Imagenette.
@pytest.mark.parametrize(
    "study",
    [
        "smoke",
        "relief-digits",
        "relief-digits-controls",
        "relief-digits-explore",
        "imagenette",
        "cifar100-replication",
    ],
)
def test_every_arm_of_a_study_has_a_model_and_objectives_that_fit_its_teachers(study: str, tmp_path: Path) -> None:
    path = MANIFESTS / "studies" / f"{study}.yaml"
    spec = read_yaml(path, StudySpec)
    configs = StudyPlan(spec, no_stores(spec), tmp_path, base=path.parent).arms
    tasks: dict[str, ProbeTask | TeacherTask | StudentTask] = {}
    with torch.device("cpu" if spec.data else "meta"):  # of large models shapes are all that is asked for
        for name in spec.in_order():
            config = configs.config(name, {}, None)
            above = spec.learns_from(name)
            models = {one: FrozenClassifier(tasks[one]) for one in (above, *spec.beside(name)) if one is not None}
            reference = Teachers(models) if len(models) > 1 else next(iter(models.values()), None)
            tasks[name] = build_task(config, facts_of(config), reference, n_steps=100)
    terms = {
        name: set(task.objectives.terms)
        for name, task in tasks.items()
        if isinstance(task, StudentTask) and task.objectives is not None
    }
    assert terms.keys() == {name for name, arm in spec.arms.items() if arm.role is None}
    assert terms["messy"] == {"ce", "kd", "messy"}
    assert terms.get("image-only", {"ce"}) == {"ce"}


def facts_of(config: RunConfig) -> DataFacts:
    """Data of seven classes with latents of the shapes that the studies are about."""
    formats = PUBLIC if config.roles.labelled == ("train",) else EMBEDDED
    seen = tuple(formats) if config.modalities is None else config.modalities
    seen = () if config.kind == "student" else seen
    read = seen if config.objective is None else config.objective.modalities
    return DataFacts(
        class_names=tuple("abcdefg"),
        class_counts=(2,) * 7,
        n_labelled=14,
        n_images=20,
        recipes={},
        formats={name: formats[name] for name in read},
        modalities=seen,
        rows_sha256="",
        latents_sha256={},
        teacher_sha256=None,
    )


def test_the_commands_that_a_study_names_have_these_options() -> None:
    runner = CliRunner()
    helps: dict[str, str] = {}
    checked = 0
    for path in PATHS:
        comment = re.sub(r"^# ?", "", "".join(re.findall(r"^#.*\n", path.read_text("utf-8"), re.MULTILINE)), flags=re.M)
        for line in re.findall(r"^  dla ((?:.*\\\n)*.*)$", comment, re.MULTILINE):
            words = shlex.split(line.replace("\\\n", " "))
            named = [word for word in words if word.startswith("--")]
            command = " ".join(words[:2])
            if command not in helps:
                helps[command] = runner.invoke(app, [*words[:2], "--help"], env={"COLUMNS": "200"}).output
            assert [option for option in named if option not in helps[command]] == [], f"{path.name}: {line}"
            checked += 1
    assert checked > 20


def test_every_study_is_listed() -> None:
    text = (MANIFESTS / "README.md").read_text(encoding="utf-8")
    listed = re.findall(r"^\| \[[\w./-]+\]\(studies/([\w./-]+)\)", text, re.MULTILINE)
    there = [path.relative_to(MANIFESTS / "studies").as_posix() for path in (MANIFESTS / "studies").rglob("*.yaml")]
    assert sorted(listed) == sorted(there)
