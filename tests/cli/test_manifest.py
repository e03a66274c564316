"""`dla manifest make`: what it prints, what it leaves, and how it ends."""

import json
import os
import shlex
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

import dla_cache.ingest
from cli.manifest import app, printable
from dla_cache.errors import ManifestError, WorkInterrupted
from dla_cache.manifest import read_manifest
from tests.hostile import encoded, picture, write_hostile_files

Run = Callable[..., Result]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Runs `make` in a folder with `photos`: two cats, two dogs, one of them a copy of a cat, and a text."""
    monkeypatch.chdir(tmp_path)
    for seed, name in enumerate(["cat/1", "cat/2", "dog/1", "dog/2"]):
        path = Path("photos", f"{name}.png")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encoded("PNG", picture((8, 8), seed % 3)))
    Path("photos/notes.txt").write_text("hello")
    return lambda *arguments: CliRunner().invoke(app, ["make", *arguments])


MAKE = ("photos", "--out", "photos.parquet")


def test_make_writes_a_manifest_and_says_what_became_of_every_file(run: Run) -> None:
    result = run(*MAKE)
    assert result.exit_code == 0, result.output
    layout, remark, *_ = result.stderr.splitlines()
    assert layout == "layout      folders (found out; `--layout` forces another)"
    assert remark == "            the first folder is the class"
    assert "check: 4/4 images" in result.stderr
    lines = dict(line.split(maxsplit=1) for line in result.stdout.splitlines())
    assert lines["found"] == "5 = 4 listed + 0 quarantined + 1 skipped (1 .txt)"
    assert lines["classes"] == "2: cat 2, dog 2"
    assert lines["splits"] == "train 4"
    assert lines["duplicates"] == "1 image with another's bytes: cat/1.png = dog/2.png"
    assert lines["CONFLICT"] == "1 content with several labels: cat/1.png = dog/2.png"
    assert lines["manifest"] == "photos.parquet"
    assert "LEAK" not in lines
    assert len(read_manifest(Path("photos.parquet"))) == 4


def test_the_next_command_has_what_the_manifest_does_not_know(run: Run) -> None:
    Path("photos").rename("my photos")
    text = run("my photos", "--out", "lists/photos.parquet").stdout
    words = shlex.split(text.partition("next ")[2])
    assert words[:3] == ["dla", "cache", "build"]
    assert words[words.index("--images") + 1] == "my photos"
    assert words[words.index("--manifest") + 1] == "lists/photos.parquet"


def test_json_accounts_for_everything(run: Run) -> None:
    facts = json.loads(run(*MAKE, "--json", "--drop-duplicates", "--limit", "3").stdout)
    assert (facts["n_found"], facts["n_images"], facts["quarantined"]) == (5, 3, [])
    assert facts["skipped"] == {".txt": 1, "beyond the limit": 1}
    assert facts["images_per_class"] == {"cat": 2, "dog": 1}
    assert (facts["manifest"], facts["root"], facts["layout"]) == ("photos.parquet", "photos", "folders")


def test_a_leak_and_an_empty_class_are_said(run: Run) -> None:
    Path("photos").rename("train")
    Path("data").mkdir()
    Path("train").rename("data/train")
    Path("data/test/cat").mkdir(parents=True)
    Path("data/test/cat/1.png").write_bytes(Path("data/train/cat/1.png").read_bytes())
    Path("classes.txt").write_text("cow\ncat\ndog\n")
    text = run("data", "--out", "data.parquet", "--classes", "classes.txt").stdout
    assert "LEAK        1 content in several splits: test/cat/1.png = train/cat/1.png = train/dog/2.png" in text
    assert "empty       1 class without an image: `cow`" in text


def test_splits_can_be_drawn(run: Run) -> None:
    facts = json.loads(run(*MAKE, "--split", "train=0.5,test=0.5", "--json").stdout)
    assert sum(facts["images_per_split"].values()) == 4
    assert facts["leaks"] == []
    assert json.loads(run(*MAKE, "--split", "holdout", "--json").stdout)["images_per_split"] == {"holdout": 4}


def test_bad_images_end_it_with_their_names_unless_they_are_allowed(run: Run) -> None:
    for number in range(4):
        Path(f"photos/dog/bad-{number}.jpg").write_bytes(b"")
    result = run(*MAKE)
    assert isinstance(result.exception, ManifestError)
    assert "4 of 8 images are quarantined" in str(result.exception)
    assert "dog/bad-2.jpg is empty: 0 bytes; and 1 more" in str(result.exception)
    assert "--allow-bad 4" in str(result.exception)
    assert "found       9 = 4 listed + 4 quarantined + 1 skipped" in result.stdout
    assert not Path("photos.parquet").exists()
    assert len(Path("photos.quarantine.jsonl").read_text().splitlines()) == 4
    Path("one.csv").write_text("path\nphotos/dog/bad-0.jpg\n")
    assert "1 of 1 image is quarantined" in str(run("one.csv", "--out", "one.parquet").exception)
    assert run(*MAKE, "--allow-bad", "4").exit_code == run(*MAKE, "--allow-bad", "50%").exit_code == 0
    assert run(*MAKE, "--allow-bad", "3").exit_code == run(*MAKE, "--allow-bad", "49.9%").exit_code == 1


def test_a_table_with_its_columns_named(run: Run) -> None:
    Path("list.csv").write_text("who,what\ncat/1.png,tom\ndog/1.png,rex\n")
    columns = ("--path-column", "who", "--label-column", "what", "--images", "photos")
    facts = json.loads(run("list.csv", "--out", "list.parquet", *columns, "--json").stdout)
    assert (facts["layout"], facts["images_per_class"], facts["root"]) == ("table", {"rex": 1, "tom": 1}, "photos")


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("--out", "photos.csv"),
        ("--layout", "pile"),
        ("--split", "train=0.5"),
        ("--allow-bad", "few"),
        ("--limit", "0"),
    ],
)
def test_wrong_usage_ends_with_2(run: Run, option: str, value: str) -> None:
    result = run(*MAKE, option, value)
    assert result.exit_code == 2
    assert option in result.stderr


def test_images_go_with_a_table_alone(run: Run) -> None:
    assert "is no table" in str(run(*MAKE, "--images", "photos").exception)


@pytest.mark.parametrize("as_json", [(), ("--json",)])
def test_hostile_files_reach_neither_a_traceback_nor_the_terminal(
    run: Run, monkeypatch: pytest.MonkeyPatch, as_json: tuple[str, ...]
) -> None:
    monkeypatch.setattr("cli.manifest.SHOWN", 100)
    folder = os.fsdecode(b"caf\xe9\x1b[31m")
    expected = write_hostile_files(Path(folder))
    Path(folder, "dup\x07licate.jpg").write_bytes(Path(folder, "\x1b[31mred.jpg").read_bytes())
    for allowed, error in (("0", ManifestError), ("100%", None)):
        result = run(folder, "--out", f"{folder}.parquet", "--allow-bad", allowed, *as_json)
        if error is not None:
            assert isinstance(result.exception, error)
        else:
            assert result.exit_code == 0, result.output
        shown = result.output + str(result.exception)
        assert [character for character in shown if not character.isprintable() and character != "\n"] == []
    counts = json.loads(result.stdout) if as_json else {"n_found": len(expected) + 1}
    assert counts["n_found"] == len(expected) + 1


def test_printable_text_stays_and_all_else_is_spelled_out() -> None:
    assert printable("Kröte 猫 [b]") == "Kröte 猫 [b]"
    assert printable("a\nb\x1b\udce9\u202e") == r"a\nb\x1b\udce9\u202e"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_it_and_nothing_is_written(
    run: Run, monkeypatch: pytest.MonkeyPatch, number: signal.Signals
) -> None:
    check = dla_cache.ingest.check_images

    def signalled(*arguments):
        for outcome in check(*arguments):
            signal.raise_signal(number)
            yield outcome

    monkeypatch.setattr(dla_cache.ingest, "check_images", signalled)
    before = sorted(Path().iterdir())
    result = run(*MAKE)
    assert isinstance(result.exception, WorkInterrupted)
    assert sorted(Path().iterdir()) == before
