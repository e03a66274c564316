"""`dla study report`: a page and a table that are made of three plain files, and say no more than they hold."""

import csv
import io
import json
import re
import shutil
import subprocess
import sys

import pytest
from typer.testing import CliRunner

from cli.main import app
from cli.page_charts import N_COLOURS, NARROW, WIDE, Style
from cli.study_charts import ArmDots, Difference, forest_chart, run_chart, share_chart, styles_of_terms
from cli.study_page import PAGE_NAME, TABLES_NAME, write_study_page
from dla_cache.errors import StudyError
from tests.cli.read_page import ReadPage
from tests.trainer.made_study import SPEC, write_lines, write_study
from trainer.leak_audit import AUDIT_NAME, LeakAudit, ModalityLabels, NearPair

TRUTH = {"image-only": 0.6, "teacher": 0.9, "kd": 0.8, "messy": 0.8}
RICH = """\
name: rich
question: "<b>Who</b> beats whom?"
store: cache.zarr
stores: {within: {control: shuffled-within-class}}
arms:
  image-only: {run: {kind: student}, label: "plain <i>student</i>"}
  teacher: {run: {kind: teacher}, role: teacher}
  teacher-within: {like: teacher, store: within, role: teacher}
  kd: {learns_from: teacher, run: {kind: student}}
  messy: {learns_from: teacher, run: {kind: student}, tune: {loop.steps: {values: [1, 2]}}}
  messy-within: {like: messy, learns_from: teacher-within, seeds: 3}
  odd: {learns_from: teacher, run: {kind: student}, seeds: 3, exploratory: true}
seeds: 4
teacher_seeds: 2
label_fractions: [0.1, 1.0]
tuning: {trials: 2, seeds: 2}
comparisons: [[messy, kd], [kd, image-only]]
"""
RICH_TRUTH = {**TRUTH, "teacher-within": 0.7, "messy-within": 0.7, "odd": 0.7}
AUDIT = LeakAudit(
    images={"labelled": 200, "transfer": 3600, "validation": 800, "test": 1600},
    n_shared=0,
    shared=(),
    near_bits=2,
    n_near_pairs=1,
    n_near_test=1,
    near=(NearPair(image_id="digit-1", test_image_id="digit-2", bits=2),),
    modalities=(ModalityLabels(store="", modality="audio", source="sounds", saw_labels=True, told="paired by class"),),
    test_in_statistics=False,
    test_in_selection=False,
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A whole study of two label fractions, controls, an arm that was not planned, and an audit."""
    place = write_study(tmp_path_factory.mktemp("rich"), RICH, truth=RICH_TRUTH, n_images=200)
    (place / AUDIT_NAME).write_text(AUDIT.model_dump_json())
    return place


@pytest.fixture(scope="module")
def shown(folder, tmp_path_factory):
    """The page as read, the lines of the table, and what they were made of."""
    out = tmp_path_factory.mktemp("shown")
    page = write_study_page(folder, out)
    lines = list(csv.DictReader(io.StringIO((out / TABLES_NAME).read_text())))
    return ReadPage((out / PAGE_NAME).read_text()), lines, page


def run(*arguments):
    return CliRunner().invoke(app, ["study", "report", *map(str, arguments)])


def test_the_page_has_every_section_and_loads_nothing(shown):
    page, _, _ = shown
    headings = [attributes["id"] for attributes in page.all("h2")]
    assert headings == [
        "verdicts", "arms", "differences", "fractions", "tuning", "gradients", "controls", "leaks", "how", "words"
    ]  # fmt: skip
    assert not {"script", "img", "iframe"} & {tag for tag, _ in page.tags}
    assert [attributes["href"] for attributes in page.all("link")] == ["data:,"]


def test_every_verdict_and_every_arm_stands_on_the_page(shown):
    page, _, written = shown
    for pair in written.results.comparisons:
        assert pair.verdict.replace("\u00a0", " ") in page.text.replace("\u00a0", " ")
    for arm in written.results.arms:
        assert arm.label in page.text
        assert f"{arm.score.mean:.1f}" in page.text


def test_the_inert_term_is_named_with_its_share(shown):
    page, _, _ = shown
    assert "fd_cmkd gives 0.03 % of the gradient in kd, " in page.text
    assert "nearly inert as set" in page.text


def test_controls_stand_beside_the_arm_whose_settings_they_have(shown):
    page, _, written = shown
    control = written.controls[1][1]
    assert (control.arm.name, control.latents) == (
        "messy-within",
        "control: shuffled-within-class, seed 0; teacher-within",
    )
    assert control.against.evidence.difference == pytest.approx(10, abs=4)
    assert "control: shuffled-within-class" in page.text


def test_the_audit_is_shown_where_it_is_there(shown, folder, tmp_path):
    page, _, written = shown
    assert "1 of 1,600, in 1 pair of hashes" in page.text
    assert "It saw labels." in page.text
    assert ("Saw labels.", "audio, paired by class.") in written.notes
    for name in ("spec.yaml", "runs.csv", "images.csv"):
        shutil.copy(folder / name, tmp_path)
    write_study_page(tmp_path, tmp_path)
    assert "audit.json is not there" in ReadPage((tmp_path / PAGE_NAME).read_text()).text


def test_every_number_of_the_page_stands_in_the_table_in_full(shown):
    _, lines, written = shown
    table = {(line["table"], line["name"], line["label_fraction"], line["quantity"]): line["value"] for line in lines}
    for arm in written.results.arms:
        of = ("teachers" if arm.is_teacher else "arms", arm.name, str(arm.fraction))
        assert float(table[*of, "test mean"]) == pytest.approx(arm.score.mean, rel=1e-9)
        assert float(table[*of, "bootstrap low"]) == pytest.approx(arm.bootstrap[0], rel=1e-9)
    for pair in written.planned:
        of = ("planned comparisons", f"{pair.first} - {pair.second}", str(pair.fraction))
        assert float(table[*of, "p adjusted"]) == pytest.approx(pair.evidence.p, rel=1e-9)
        assert table[*of, "verdict"] == pair.verdict
    assert len(table) == len(lines)


def test_the_same_files_give_the_same_bytes_wherever_they_lie(folder, shown, tmp_path):
    moved = shutil.copytree(folder, tmp_path / "elsewhere")
    write_study_page(moved, tmp_path)
    _, _, written = shown
    assert (tmp_path / PAGE_NAME).read_text().count(str(tmp_path)) == 0
    again = write_study_page(moved, tmp_path / "again")
    assert again.as_json() == written.as_json()
    for name in (PAGE_NAME, TABLES_NAME):
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / name).read_bytes()


def test_the_command_writes_page_and_table_and_prints_what_may_be_said(folder, tmp_path):
    result = run(folder, "--out", tmp_path)
    assert result.exit_code == 0, result.output
    assert "kd beats plain <i>student</i> with 10 % of the labels" in result.stdout
    assert (tmp_path / PAGE_NAME).exists()
    said = json.loads(run(folder, "--out", tmp_path, "--json").stdout)
    assert said["missing"] == []
    assert len(said["verdicts"]) == 4
    assert {arm["arm"] for arm in said["arms"]} == set(RICH_TRUTH)


def test_the_folder_that_a_study_wrote_has_its_report_inside(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "out" / "study")
    assert run(tmp_path / "out").exit_code == 0
    assert (tmp_path / "out" / "study" / PAGE_NAME).exists()


def test_a_study_with_runs_missing_is_reported_with_an_error_unless_that_is_asked_for(tmp_path):
    drop = {("teacher", None, 2)}
    folder = write_study(tmp_path, SPEC, truth=TRUTH, n_images=80, drop=drop)
    result = run(folder)
    assert isinstance(result.exception, StudyError)
    assert "1 run that the spec asks for is missing: `teacher, seed 2`" in str(result.exception)
    assert "Not finished." in (folder / PAGE_NAME).read_text()
    assert run(folder, "--partial").exit_code == 0


def test_a_folder_without_a_study_says_what_belongs_there(tmp_path):
    result = run(tmp_path)
    assert "spec.yaml" in str(result.exception)
    assert "hint:" in str(result.exception)


@pytest.mark.parametrize("layout", [WIDE, NARROW])
def test_nothing_of_a_chart_lies_outside_of_it(layout):
    known = Difference("messy − kd", 0.4, -1.0, 1.9, (-1.2, 2.2))  # noqa: RUF001
    unknown = Difference("one seed", 1.0, float("-inf"), float("inf"), (0.5, 1.5))
    forest = forest_chart([known, unknown], 1.0, layout)
    dots = run_chart([ArmDots("kd", Style(0), 80.0, 78.0, 82.0, [[79.0, 81.0], [80.5]])], layout)
    shares = share_chart([("kd", {"ce": 0.3, "kd": 0.7})], {"ce": Style(0), "kd": Style(1)}, layout)
    places = [value for row in forest.rows for value in (row.x, row.x_low, row.x_high, *row.x_drawn)]
    places += [x for row in dots.rows for x, _ in row.runs] + [*forest.margin, forest.zero]
    places += [part.x + part.width for row in shares.rows for part in row.segments]
    assert all(0 <= place <= layout.width + 0.02 for place in places)
    assert forest.margin[0] < forest.zero < forest.margin[1]
    assert forest.rows[1].x_low == forest.rows[1].x == forest.rows[1].x_high
    assert sum(part.width for part in shares.rows[0].segments) == pytest.approx(layout.width - shares.start, abs=0.1)


def test_more_terms_than_colours_share_some_but_never_within_one_arm():
    arms = [{"ce": 0.5, f"term-{number}": 0.3, f"term-{number + 1}": 0.2} for number in range(30)]
    styles = styles_of_terms(arms)
    assert list(styles) == list(dict.fromkeys(term for arm in arms for term in arm))
    assert {style.colour for style in styles.values()} == set(range(N_COLOURS))
    assert all(len({styles[term].colour for term in arm}) == 3 for arm in arms)


def test_a_setting_that_extending_reached_is_shown_in_four_digits(tmp_path):
    spec = SPEC.replace("[0.5, 1, 2]", "[0.1, 0.3333333333333333, 1]")
    folder = write_study(tmp_path, spec, truth=TRUTH)
    write_study_page(folder, folder)
    text = ReadPage((folder / PAGE_NAME).read_text()).text
    assert "0.1, 0.3333, 1" in text
    assert "0.33333" not in text.replace("0.3333333333333333, 1]", "")


def test_the_edges_that_settings_lie_at_are_one_note(tmp_path):
    spec = SPEC.replace("[1, 2, 4]", "[1, 2]").replace("[0.5, 1, 2]", "[0.5, 1]").replace("trials: 3", "trials: 2")
    folder = write_study(tmp_path, spec, truth=TRUTH)
    notes = write_study_page(folder, folder).notes
    told = (
        "The best lies at the edge of what was tried: objective.kd.temperature of kd; objective.messy.weight of messy."
    )
    assert [text for word, text in notes if word == "Edge of the grid."] == [told]


def test_a_control_whose_comparison_is_planned_the_other_way_round_is_not_said_to_lack_runs(tmp_path):
    spec = re.sub(r"comparisons: .*", "comparisons: [[messy-within, messy]]", RICH).replace("seeds: 3", "seeds: 4")
    folder = write_study(tmp_path, spec, truth=RICH_TRUTH)
    assert write_study_page(folder, folder).controls[1][1].is_reversed
    text = ReadPage((folder / PAGE_NAME).read_text()).text
    assert "planned as this minus " in text
    assert "no common runs" not in text


def test_a_page_of_one_seed_or_of_no_comparison_claims_nothing(tmp_path):
    spec = re.sub(r"comparisons: .*", "comparisons: []", SPEC).replace("seeds: 10", "seeds: 1")
    folder = write_study(tmp_path, spec, truth=TRUTH, n_images=80)
    write_study_page(folder, folder)
    text = ReadPage((folder / PAGE_NAME).read_text()).text
    assert "nothing is claimed" in text
    assert "One seed proves nothing." in text
    for name in (PAGE_NAME, TABLES_NAME):
        assert not re.search(r"\bnan\b", (folder / name).read_text(), re.IGNORECASE)
    assert not re.search(r"[-+]?\binf\b", (folder / PAGE_NAME).read_text())


def test_a_page_says_which_arms_are_one_and_the_same_run(tmp_path):
    folder = write_study(tmp_path, SPEC, truth=TRUTH, n_images=80)
    with (folder / "runs.csv").open(newline="") as file:
        lines = list(csv.DictReader(file))
    cells = {
        (line["teacher_seed"], line["seed"]): line for line in lines if (line["arm"], line["stage"]) == ("kd", "final")
    }
    for line in lines:
        if (line["arm"], line["stage"]) == ("messy", "final"):
            same = cells[line["teacher_seed"], line["seed"]]
            line |= {name: same[name] for name in ("run", "test", "test_hits")}
    write_lines(folder / "runs.csv", lines)
    write_study_page(folder, folder)
    text = ReadPage((folder / PAGE_NAME).read_text()).text
    assert "messy and kd share 30 of 30 runs" in text
    assert "kd and image-only share" not in text


def test_a_report_is_made_without_what_trains(folder, tmp_path):
    code = "import sys; from cli.main import app; app(sys.argv[1:], standalone_mode=False); print(*sys.modules)"
    command = [sys.executable, "-c", code, "study", "report", str(folder), "--out", str(tmp_path)]
    ended = subprocess.run(command, capture_output=True, text=True, check=True)
    assert (tmp_path / PAGE_NAME).exists()
    assert {"torch", "transformers", "zarr"}.isdisjoint(ended.stdout.splitlines()[-1].split())
