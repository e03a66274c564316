"""`dla report`: one page that says what runs measured, loads nothing, and names what it lacks."""

import base64
import io
import json
import math
import os
import re
import shutil
import statistics
from itertools import pairwise
from types import SimpleNamespace

import pytest
import typer
import yaml
from PIL import Image
from typer.testing import CliRunner

from cli import page_store
from cli.page import write_page
from cli.page_charts import NARROW, WIDE, dot_chart, line_chart, spread
from cli.page_intervals import over_images, over_seeds
from cli.page_rerun import plan_rerun
from cli.page_values import Curve, CurvePoint, Estimate
from cli.report import report
from dla_cache.errors import CheckpointError, DlaError, RecipeMismatchError, StoreError
from dla_cache.sources import SourceEntry
from dla_cache.spec import Modality
from dla_cache.store import open_store
from tests.cli.read_page import ReadPage
from trainer.run import train_run
from trainer.run_folder import read_result

STUDENT = {"roles": {"transfer": ["transfer"]}, "transfer_per_batch": 4}


@pytest.fixture(scope="session")
def finished(tiny, tmp_path_factory):
    """Run folders: a probe, a teacher, a student of two seeds whose teachers differ in seed, too, and the store."""
    folder = tmp_path_factory.mktemp("reported")
    train_run(tiny.run("probe", folder / "probe"))
    for seed in (0, 1):
        runs = folder / f"seed-{seed}"
        train_run(tiny.run("teacher", runs / "teacher", seed=seed))
        learns = {"teacher": runs / "teacher", "objective": tiny.objectives["kd"], **STUDENT}
        train_run(tiny.run("student", runs / "kd-teacher", seed=seed, **learns))
    return folder


@pytest.fixture
def runs(finished, tmp_path):
    """The run folders once more, to be broken: `runs.probe`, `runs.students` and so on."""
    shutil.copytree(finished, tmp_path / "runs")
    for path in (tmp_path / "runs").rglob("config.yaml"):
        config = yaml.safe_load(path.read_text())
        config["store"] = os.path.relpath(
            finished / path.relative_to(tmp_path / "runs").parent / config["store"], path.parent
        )
        path.write_text(yaml.safe_dump(config))
    folder = tmp_path / "runs"
    return SimpleNamespace(
        folder=folder,
        probe=folder / "probe",
        teacher=folder / "seed-0" / "teacher",
        students=[folder / "seed-0" / "kd-teacher", folder / "seed-1" / "kd-teacher"],
    )


def page_of(path, *arguments, **options):
    page = write_page(path, *arguments, **options)
    return page, ReadPage(path.read_text(encoding="utf-8"))


def run_report(*arguments):
    app = typer.Typer()
    app.command()(report)
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def percent(fraction):
    return f"{100 * fraction:.1f}"


def edit(path, change):
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))


def edit_line(folder, number, change):
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    change(lines[number])
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_every_number_that_a_run_measured_is_on_the_page(runs, tmp_path):
    folders = [runs.probe, runs.teacher, *runs.students]
    _, read = page_of(tmp_path / "page.html", folders)
    for folder in folders:
        result = read_result(folder)
        for number in (result.test_score, result.test_low, result.test_high, result.validation_score):
            assert percent(number) in read.text
        for name, top1 in result.branches.items():
            assert name in read.text
            assert percent(top1) in read.text
    for folder in (runs.probe, runs.teacher):
        for line in map(json.loads, (folder / "metrics.jsonl").read_text().splitlines()):
            assert f"{line['step']}: {percent(line['metrics']['selection'])}" in read.text


def test_the_mean_over_two_seeds_has_students_interval(runs, tmp_path):
    for folder, top1 in zip(runs.students, (0.5, 0.75), strict=True):
        edit(
            folder / "result.json",
            lambda result, top1=top1: result.update(
                test_score=top1, branches={"student": top1}, branch_intervals={"student": [0.1, 0.9]}
            ),
        )
    page, read = page_of(tmp_path / "page.html", runs.students)
    [row] = page.rows
    values = [read_result(folder).test_score for folder in runs.students]
    # 12.706 is the 97.5 % quantile of t with one degree of freedom, from any table.
    mean, half = statistics.mean(values), 12.706 * statistics.stdev(values) / math.sqrt(2)
    assert (row.group.test.value, row.group.test.half) == pytest.approx((mean, half), rel=1e-4)
    assert f"{percent(mean)} ± {percent(half)} mean of 2 seeds" in read.text
    assert "One seed proves nothing" not in read.text


def test_a_curve_over_seeds_is_their_mean_at_every_step(runs, tmp_path):
    edit_line(runs.students[1], 2, lambda line: line["metrics"].update(selection=0.9))
    page, _ = page_of(tmp_path / "page.html", runs.students)
    logged = [[json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()] for run in runs.students]
    for point, *lines in zip(page.curve_values[0].points, *logged, strict=True):
        values = [line["metrics"]["selection"] for line in lines]
        half = 12.706 * statistics.stdev(values) / math.sqrt(2)
        assert point.value == pytest.approx(statistics.mean(values))
        assert (point.low, point.high) == pytest.approx((point.value - half, point.value + half), rel=1e-4)


@pytest.mark.parametrize(("n", "t"), [(2, 12.706), (3, 4.303), (4, 3.182), (5, 2.776), (10, 2.262)])
def test_the_interval_over_seeds_is_the_t_of_the_tables_times_the_standard_error(n, t):
    values = [0.5 + 0.01 * (-1) ** k * k for k in range(n)]
    assert over_seeds(values).half == pytest.approx(t * statistics.stdev(values) / n**0.5, rel=2e-4)


def test_one_run_has_wilsons_interval_over_the_validation_images_of_its_store(runs, tmp_path):
    page, read = page_of(tmp_path / "page.html", [runs.probe])
    for point in page.curve_values[0].points:
        expected = over_images(point.value, 6)
        assert (point.low, point.high) == (expected.low, expected.high)
    assert "One seed proves nothing" in read.text


def test_runs_whose_teachers_differ_in_more_than_a_seed_stand_apart(runs, tmp_path):
    teacher = yaml.safe_load((runs.folder / "seed-1" / "teacher" / "config.yaml").read_text())
    teacher["loop"]["learning_rate"] = 0.02
    (runs.folder / "seed-1" / "teacher" / "config.yaml").write_text(yaml.safe_dump(teacher))
    page, _ = page_of(tmp_path / "page.html", runs.students)
    assert [row.group.label for row in page.rows] == ["seed-0/kd-teacher", "seed-1/kd-teacher"]


def test_a_student_of_several_teachers_names_them_all_and_stands_apart_if_one_differs(runs, tiny, tmp_path):
    for seed, folder in enumerate(student.parent for student in runs.students):
        learns = {"teachers": {"a": str(runs.probe), "b": str(folder / "teacher")}, "objective": tiny.objectives["kd"]}
        train_run(tiny.run("student", folder / "both", seed=seed, **learns, **STUDENT))
    both = [student.parent / "both" for student in runs.students]
    page, read = page_of(tmp_path / "page.html", [runs.probe, runs.teacher, *both])
    assert [len(row.group.runs) for row in page.rows] == [1, 1, 2]
    assert "by ce + kd from probe and teacher" in read.text
    place = runs.folder / "seed-1" / "teacher" / "config.yaml"
    place.write_text(yaml.safe_dump({**yaml.safe_load(place.read_text()), "labelled_per_batch": 2}))
    page, _ = page_of(tmp_path / "page.html", both)
    assert [row.group.label for row in page.rows] == ["seed-0/both", "seed-1/both"]


def test_two_runs_of_one_seed_are_not_averaged(runs, tmp_path):
    shutil.copytree(runs.probe, runs.folder / "again")
    page, _ = page_of(tmp_path / "page.html", [runs.probe, runs.folder / "again"])
    assert [len(row.group.runs) for row in page.rows] == [1, 1]


def test_nothing_is_loaded_and_no_script_runs(runs, tiny, tmp_path):
    Image.new("RGB", (4, 3)).save(tmp_path / "sheet.png")
    _, read = page_of(tmp_path / "page.html", [runs.probe], picture=tmp_path / "sheet.png")
    assert read.all("script") == []
    loads = [
        attributes[name] for _, attributes in read.tags for name in ("src", "href", "srcset") if name in attributes
    ]
    assert len(loads) == 2  # the picture, and an icon, for which a browser would ask otherwise
    assert all(place.startswith("data:") for place in loads)
    content = (tmp_path / "page.html").read_text()
    assert re.findall(r"https?://|url\(|@import", content) == []
    assert any("default-src 'none'" in attributes.get("content", "") for attributes in read.all("meta"))


def test_a_text_from_a_file_stays_a_text(runs, tmp_path):
    hostile = '<script>alert("1")</script>'
    folder = runs.folder / "<img src=x onerror=alert(1)>"
    runs.probe.rename(folder)
    edit(folder / "data.json", lambda facts: facts.update(class_names=[hostile, "b", "c"]))
    edit_line(folder, 0, lambda line: line["losses"].update({"</svg><script>": 1.0}))
    _, read = page_of(tmp_path / "page.html", [folder])
    assert read.all("script") == read.all("img") == []
    assert hostile in read.text
    assert folder.name in read.text


def test_no_place_on_this_machine_is_on_the_page(runs, tiny, tmp_path):
    write_page(tmp_path / "page.html", [runs.probe, *runs.students], store=tiny.store)
    content = (tmp_path / "page.html").read_text()
    assert str(tmp_path) not in content
    assert str(tiny.store.parent) not in content
    assert os.uname().nodename not in content


def test_the_same_runs_give_the_same_bytes(runs, tmp_path):
    for name in ("a.html", "b.html"):
        write_page(tmp_path / name, [runs.probe, *runs.students])
    assert (tmp_path / "a.html").read_bytes() == (tmp_path / "b.html").read_bytes()


def test_a_step_without_a_number_is_named_and_no_line_is_drawn_across_it(runs, tmp_path):
    edit_line(runs.probe, 1, lambda line: line["metrics"].update(selection=math.nan))
    edit_line(runs.students[1], 0, lambda line: line["metrics"].pop("selection"))
    page, read = page_of(tmp_path / "page.html", [runs.probe, *runs.students])
    assert "probe: no validation top-1 at step 4." in read.text
    assert "kd-teacher: no validation top-1 (seed 1) at step 2." in read.text
    assert [len(line.paths) for line in page.curves[0].lines] == [2, 1]


def test_a_loss_without_a_number_is_named(runs, tmp_path):
    edit_line(runs.probe, 2, lambda line: line["losses"].update(dict.fromkeys(line["losses"], math.nan)))
    _, read = page_of(tmp_path / "page.html", [runs.probe])
    assert re.search(r"probe: no loss \w+ at step 6\.", read.text)


def test_a_run_without_metrics_has_no_curve_and_is_named(runs, tmp_path):
    (runs.probe / "metrics.jsonl").unlink()
    page, read = page_of(tmp_path / "page.html", [runs.probe])
    assert page.curves == ()
    assert "probe: no evaluation in metrics.jsonl." in read.text


def test_without_its_store_a_page_says_so_and_draws_no_band(runs, tmp_path):
    config = yaml.safe_load((runs.probe / "config.yaml").read_text())
    (runs.probe / "config.yaml").write_text(yaml.safe_dump(config | {"store": "nowhere.zarr"}))
    page, read = page_of(tmp_path / "page.html", [runs.probe])
    assert "The store of probe is not where the run had it: it is left out." in read.text
    assert page.curves[0].lines[0].bands == ()
    assert page.stores == ()


def test_where_the_latents_come_from_is_on_the_page(runs, tiny, tmp_path):
    _, read = page_of(tmp_path / "page.html", [runs.probe], store=tiny.store)
    store = open_store(tiny.store)
    for what in (store.content_hash(), store.recipe("depth").hash, "corners", "Not known to dla", "red", "green"):
        assert what in read.text
    assert "labelled 6, test 4, transfer 8, validation 6" in read.text
    bytes_per_image = sum(record.size_bytes for record in store.committed("depth").values()) / 24
    assert f"{bytes_per_image:.0f} bytes an image" in read.text


def test_a_source_that_saw_labels_has_it_said_above_the_table(runs, tmp_path, monkeypatch):
    entry = SourceEntry(Modality.DEPTH, "corners:Corners", "corners", note="its generator saw label information")
    monkeypatch.setitem(page_store.SOURCES, "corners", entry)
    _, read = page_of(tmp_path / "page.html", [runs.probe])
    assert read.text.index("Its generator saw label information.") < read.text.index("Accuracy on the test images")


def test_what_the_writer_knows_of_the_runs_stands_on_the_page(runs, tmp_path):
    options = {"title": "A demo", "remarks": ["Too short."], "commands": ["dla demo --quick"]}
    _, read = page_of(tmp_path / "page.html", [runs.probe], **options)
    places = [
        read.text.index(what) for what in ("A demo", "Too short.", "Accuracy on", "dla demo --quick", "dla train")
    ]
    assert places == sorted(places)


def test_the_commands_on_the_page_are_commands(runs, tmp_path, dla, monkeypatch):
    page, read = page_of(tmp_path / "page.html", [runs.probe, runs.students[0]])
    monkeypatch.chdir(runs.folder)
    for command in page.rerun.train:
        assert command in read.text
        name, *arguments = command.split()
        assert name == "dla"
        ended = dla(*arguments, "--dry-run", "--json")
        assert ended.exit_code == 0, ended.stderr
        there = json.loads(ended.stdout)
        assert there["output"].startswith(str(runs.folder / "again"))
    assert page.rerun.report == "dla report probe seed-0/kd-teacher"


def test_a_command_names_no_place_far_from_the_runs(tmp_path):
    runs = [tmp_path / "work" / "deep" / "runs" / "a b", tmp_path / "work" / "deep" / "runs" / "c"]
    near = plan_rerun(runs, {"--store": tmp_path / "work" / "cache.zarr", "--picture": None})
    assert near.report == "dla report 'deep/runs/a b' deep/runs/c --store cache.zarr"
    assert near.holds == ("cache.zarr", "deep")
    far = plan_rerun(runs, {"--images": tmp_path.parent / "photos"})
    assert far.report == "dla report 'a b' c --images IMAGES"
    assert far.train[0] == "dla train 'a b/config.yaml' --out 'again/a b'"
    assert far.stand_ins == ("IMAGES",)


def test_an_unfinished_run_is_an_error_that_says_how_to_finish_it(runs, tmp_path):
    (runs.probe / "result.json").unlink()
    with pytest.raises(CheckpointError, match="not finished") as error:
        write_page(tmp_path / "page.html", [runs.probe])
    assert "--resume" in error.value.hint
    assert not (tmp_path / "page.html").exists()


@pytest.mark.parametrize(
    "change", [{"test_score": math.nan}, {"test_score": 1.5}, {"test_images": 0}, {"train_seconds": 0}]
)
def test_a_result_that_cannot_be_is_an_error(runs, tmp_path, change):
    edit(runs.probe / "result.json", lambda result: result.update(change))
    with pytest.raises(CheckpointError, match=next(iter(change))):
        write_page(tmp_path / "page.html", [runs.probe])


@pytest.mark.parametrize("line", ["{", '{"step": 2, "metrics": 3}'])
def test_a_damaged_line_of_metrics_is_an_error(runs, tmp_path, line):
    (runs.probe / "metrics.jsonl").write_text(line + "\n")
    with pytest.raises(CheckpointError, match=r"metrics\.jsonl") as error:
        write_page(tmp_path / "page.html", [runs.probe])
    assert error.value.hint


def test_a_store_of_other_latents_is_refused(runs, tiny, tmp_path):
    other = tiny.build(tiny.manifest, tmp_path / "other.zarr", seed=5)
    with pytest.raises(RecipeMismatchError, match="other latents"):
        write_page(tmp_path / "page.html", [runs.probe], store=other)


def test_a_picture_that_is_none_is_refused(runs, tiny, tmp_path):
    (tmp_path / "sheet.png").write_text("not a picture")
    with pytest.raises(DlaError, match="is no PNG"):
        write_page(tmp_path / "page.html", [runs.probe], picture=tmp_path / "sheet.png")


def test_a_contact_sheet_is_drawn_from_images_and_store(runs, tiny, tmp_path):
    _, read = page_of(tmp_path / "page.html", [runs.probe], images=tiny.images)
    [drawn] = read.all("img")
    with Image.open(io.BytesIO(base64.b64decode(drawn["src"].removeprefix("data:image/png;base64,")))) as sheet:
        assert (str(sheet.width), str(sheet.height)) == (drawn["width"], drawn["height"])


def test_a_contact_sheet_without_a_store_is_refused(runs, tiny, tmp_path):
    config = yaml.safe_load((runs.probe / "config.yaml").read_text())
    (runs.probe / "config.yaml").write_text(yaml.safe_dump(config | {"store": "nowhere.zarr"}))
    with pytest.raises(StoreError, match="needs the store"):
        write_page(tmp_path / "page.html", [runs.probe], images=tiny.images)


def test_every_table_and_picture_can_be_read_aloud(runs, tmp_path):
    Image.new("RGB", (4, 3)).save(tmp_path / "sheet.png")
    _, read = page_of(
        tmp_path / "page.html", [runs.probe, runs.teacher, *runs.students], picture=tmp_path / "sheet.png"
    )
    assert all(attributes.get("scope") in ("col", "row", "rowgroup") for attributes in read.all("th"))
    assert [attributes["alt"] for attributes in read.all("img")] != [""]
    ids = [attributes["id"] for _, attributes in read.tags if "id" in attributes]
    assert len(set(ids)) == len(ids)
    for drawing in read.all("svg"):
        named = {"aria-labelledby", "role"} <= drawing.keys()
        assert named or drawing["aria-hidden"] == "true"
    for _, attributes in read.tags:
        assert set(attributes.get("aria-labelledby", "").split()) <= set(ids)
    headings = [int(tag[1]) for tag, _ in read.tags if re.fullmatch("h[1-6]", tag)]
    assert headings[0] == 1
    assert headings.count(1) == 1
    assert all(after - before <= 1 for before, after in pairwise(headings))


def luminance(colour):
    channels = [int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5)]
    linear = [value / 12.92 if value <= 0.04045 else ((value + 0.055) / 1.055) ** 2.4 for value in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one, other):
    light, dark = sorted((luminance(one), luminance(other)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


def test_text_and_lines_stand_out_by_day_and_by_night(runs, tmp_path):
    write_page(tmp_path / "page.html", [runs.probe])
    blocks = re.findall(r":root \{(.*?)\}", (tmp_path / "page.html").read_text(), flags=re.DOTALL)
    assert len(blocks) == 2
    for block in blocks:
        colours = dict(re.findall(r"--([a-z0-9-]+): (#[0-9a-f]{6});", block))
        for text, ground in (
            ("ink", "paper"),
            ("soft", "paper"),
            ("ink", "raised"),
            ("ink", "warn-paper"),
            ("warn", "warn-paper"),
        ):
            assert contrast(colours[text], colours[ground]) >= 4.5
        assert all(contrast(colours[f"c{number}"], colours["paper"]) >= 3 for number in range(8))


@pytest.mark.parametrize("layout", [WIDE, NARROW])
@pytest.mark.parametrize("n", [1, 2, 9])
def test_what_a_chart_draws_lies_within_it(layout, n):
    names = [f"a-run-with-quite-a-long-name-{number}" for number in range(n)]
    dots = dot_chart([(name, over_images(0.5 + number / 20, 100)) for number, name in enumerate(names)], layout)
    curve = Curve((CurvePoint(10, 0.5, 0.4, 0.6), None, CurvePoint(30, 0.5, 0.4, 0.6)))
    lines = line_chart([(name, curve) for name in names], layout, height=300, in_percent=True)
    for dot in dots.dots:
        assert dots.axis.start <= dot.x_low <= dot.x <= dot.x_high <= dots.axis.end < layout.width
    label_ys = sorted(line.label_y for line in lines.lines)
    assert all(after - before >= 15.9 for before, after in pairwise(label_ys))
    assert all(0 <= y <= 300 for y in label_ys)
    for line in lines.lines:
        assert all(lines.x.start <= x <= lines.x.end and lines.y.end <= y <= lines.y.start for x, y in line.points)


def test_an_interval_that_goes_beyond_what_can_be_ends_with_the_axis():
    chart = dot_chart([("two seeds", Estimate(0.9, 0.2, 1.6, 2, "seeds"))], WIDE)
    assert (chart.axis.high, chart.dots[0].x_high) == (100, chart.axis.end)


def test_labels_that_lie_apart_stay_where_they_are():
    assert spread([10, 60, 200], 16, 0, 300) == [10, 60, 200]
    assert spread([100, 100], 16, 0, 300) == [92, 108]


def test_the_command_writes_the_page_and_prints_the_table(runs, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    ended = run_report("runs/probe", *(f"runs/seed-{seed}/kd-teacher" for seed in (0, 1)))
    assert ended.exit_code == 0, ended.output
    assert "page report.html" in ended.stdout
    assert "2 seeds" in ended.stdout
    assert f"  {read_result(runs.probe).train_seconds:.1f}\n" in ended.stdout  # not 0: it took less than a second
    assert (tmp_path / "report.html").exists()


@pytest.mark.parametrize(("seconds", "shown"), [(9.94, "9.9"), (10.4, "10"), (1234.5, "1,234")])
def test_seconds_have_a_decimal_where_they_are_few(runs, tmp_path, seconds, shown):
    edit(runs.probe / "result.json", lambda result: result.update(train_seconds=seconds))
    assert run_report(runs.probe, "--out", tmp_path / "page.html").stdout.splitlines()[1].endswith(f"  {shown}")


def test_json_is_the_data_of_the_table_and_nothing_else(runs, tmp_path):
    ended = run_report(runs.probe, *runs.students, "--out", tmp_path / "deep" / "page.html", "--json")
    said = json.loads(ended.stdout)
    assert [row["run"] for row in said["rows"]] == ["probe", "kd-teacher"]
    assert said["rows"][0]["test_score"] == read_result(runs.probe).test_score
    assert said["rows"][1]["interval_over"] == "seeds"
    assert [run["seed"] for run in said["rows"][1]["runs"]] == [0, 1]
    assert said["page"] == str(tmp_path / "deep" / "page.html")
    assert (tmp_path / "deep" / "page.html").exists()


def test_wrong_usage_ends_with_2(runs, tmp_path):
    assert run_report(runs.probe, runs.probe).exit_code == 2
    assert run_report(runs.probe, "--images", tmp_path, "--picture", tmp_path / "a.png").exit_code == 2
    assert run_report().exit_code == 2
