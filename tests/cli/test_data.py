"""`dla data`: the embedded data set as files."""

import json

from dla_cache.manifest import read_manifest


def test_relief_digits_are_written_and_counted(dla, tmp_path):
    ended = dla("data", "relief-digits", tmp_path / "data", "--json")
    assert ended.exit_code == 0
    told = json.loads(ended.stdout)
    assert told["images"] == {"labelled": 200, "transfer": 3600, "validation": 800, "test": 1600}
    assert told["manifest"] == str(tmp_path / "data" / "manifest.parquet")
    assert len(read_manifest(tmp_path / "data" / "manifest.parquet")) == 6200


def test_a_target_that_cannot_be_written_is_one_message(dla, tmp_path):
    (tmp_path / "file").write_text("")
    ended = dla("data", "relief-digits", tmp_path / "file" / "data")
    assert (ended.exit_code, ended.stdout) == (1, "")
    assert "cannot be written" in ended.stderr
    assert ended.stderr.count("hint: ") == 1
    assert "Traceback" not in ended.stderr


def test_a_manifest_of_other_images_is_one_message_and_stays(dla, tmp_path):
    (tmp_path / "manifest.parquet").write_text("mine")
    ended = dla("data", "relief-digits", tmp_path)
    assert (ended.exit_code, ended.stdout) == (1, "")
    assert f"`{tmp_path / 'manifest.parquet'}` lists other images" in ended.stderr
    assert ended.stderr.count("hint: ") == 1
    assert (tmp_path / "manifest.parquet").read_text() == "mine"


def test_wrong_usage_ends_with_2(dla, tmp_path):
    assert dla("data", "relief-digits").exit_code == 2
    assert dla("data", "relief-digits", tmp_path, "--sides", "3").exit_code == 2
