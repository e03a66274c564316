"""`dla cache control`: what it prints, and what it refuses."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from dla_cache.spec import Modality
from dla_cache.store import create_store
from dla_cache.store.rows import RowTable
from tests.dla_cache.conftest import make_latents, make_recipe, make_rows


@pytest.fixture(autouse=True)
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`s` has depth and sound of twelve images of three classes."""
    monkeypatch.chdir(tmp_path)
    rows = [replace(image, label=image.row % 3) for image in make_rows(12)]
    recipes = {
        "depth": make_recipe(),
        "audio": make_recipe((2, 3), "uint8", Modality.AUDIO),
    }
    made = create_store(Path("s"), RowTable(rows), ["a", "b", "c"], 8, recipes)
    for name, recipe in recipes.items():
        for shard in made.shards:
            latents = make_latents(recipe, 12)[shard.start : shard.stop]
            made.write_shard(name, shard, latents, seconds=0, device="cpu")


def test_a_control_is_written_as_its_dry_run_says_and_inspect_names_it(dla: Callable) -> None:
    arguments = ("cache", "control", "s", "c", "--kind", "shuffled-within-class", "--seed", "3", "--modality", "depth")
    planned = dla(*arguments, "--dry-run")
    assert planned.exit_code == 0, planned.stderr
    control = (
        "control       depth: `shuffled-within-class` of `made`, seed 3: the latent of another image of the same class"
    )
    counts = "keep theirs   0 images, one of their class 12"
    told = f"store         c, zarr, 12 images\n{control}\ncopied        audio\n{counts}\n"
    assert planned.stdout == f"{told}would write   4 shards of audio, depth, about 360 bytes\n"
    assert not Path("c").exists()
    facts = json.loads(dla(*arguments, "--dry-run", "--json").stdout)
    assert (facts["dry_run"], facts["shards_missing"], facts["n_same_class"]) == (True, 4, 12)
    done = dla(*arguments)
    assert done.stdout.startswith(f"{told}written       4 shards of audio, depth\ncontent hash  ")
    again = json.loads(dla(*arguments, "--json").stdout)
    assert again["content_hash"] == done.stdout.split()[-1]
    assert (again["shards_written"], again["recipes"]["depth"]["parameters"]["real_source"]) == (0, "made")
    shown = dla("cache", "inspect", "c").stdout
    assert '  source            "control"' in shown
    assert '"kind": "shuffled-within-class"' in shown


def test_another_control_is_refused_in_its_place(dla: Callable) -> None:
    assert dla("cache", "control", "s", "c", "--kind", "gaussian").exit_code == 0
    ended = dla("cache", "control", "s", "c", "--kind", "shuffled")
    assert ended.exit_code == 1
    assert "`depth.parameters.kind` `gaussian` → `shuffled`" in ended.stderr


@pytest.mark.parametrize(
    ("arguments", "exit_code", "fault"),
    [
        (("--kind", "mixed"), 2, "none of shuffled,"),
        (("--kind", "gaussian", "--noise", "0.5"), 1, "has no use for `noise`"),
        (("--kind", "fabricated"), 1, "--features STORE"),
        (("--kind", "label-embedding", "--labels", "none.csv"), 1, "cannot be read"),
    ],
)
def test_what_cannot_be_is_one_error_with_a_hint(
    dla: Callable, arguments: tuple[str, ...], exit_code: int, fault: str
) -> None:
    ended = dla("cache", "control", "s", "c", *arguments)
    assert ended.exit_code == exit_code
    assert fault in " ".join(ended.stderr.replace("│", " ").split())
    assert not Path("c").exists()


def test_features_of_another_store_are_mapped(dla: Callable) -> None:
    made_up = dla("cache", "control", "s", "f", "--kind", "gaussian", "--modality", "depth")
    assert made_up.exit_code == 0, made_up.stderr
    arguments = ("cache", "control", "s", "c", "--kind", "fabricated", "--features", "f", "--modality", "depth")
    done = dla(*arguments, "--json")
    assert done.exit_code == 0, done.stderr
    assert json.loads(done.stdout)["recipes"]["depth"]["parameters"]["features"] == "depth"
