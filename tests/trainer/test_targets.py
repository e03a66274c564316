"""Stored targets: what a frozen model says of each view, asked once, and learned from without the model."""

import json
import os
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dla_cache.build import build_cache
from dla_cache.errors import CheckpointError, RecipeMismatchError, SpecError, WorkInterrupted
from dla_cache.spec import CacheSpec, LatentSpec, Modality
from dla_cache.store import open_store
from dla_cache.store.exchange import convert_store
from dla_cache.takedown import take_down
from tests.conftest import CornerSource
from trainer.card import model_card
from trainer.checkpoint import load_checkpoint
from trainer.config import resolve_run
from trainer.features import LOGITS, Target
from trainer.run import load_run, train_run
from trainer.run_folder import read_result
from trainer.stored_targets import open_targets
from trainer.target_store import make_targets
from trainer.targets import TargetLayout, facts_in, flattened, nested, resolve_targets
from trainer.upbringing import taught_by_targets

VIEW = {"scale_min": 0.5, "horizontal_flip": True, "count": 3, "seed": 7}
EVERYTHING = {"also": ["pooled/image/0", "pooled/cls/1", "tokens/image/1", "tokens/depth/0"]}


@pytest.fixture(scope="module")
def models(tiny, tmp_path_factory):
    """One of each kind that a student may learn from."""
    folder = tmp_path_factory.mktemp("models")
    train_run(tiny.run("probe", folder / "probe"))
    train_run(tiny.run("teacher", folder / "teacher"))
    train_run(tiny.run("student", folder / "student", seed=3))
    return folder


def targets_config(tiny, model, output, **fields):
    places = {"store": tiny.store, "images": tiny.images, "teacher": model, "output": output}
    value = {
        "kind": "targets",
        "splits": ["labelled", "transfer"],
        "view": VIEW if Path(model).name != "probe" else {},
        "objective": tiny.objectives["messy" if Path(model).name == "teacher" else "kd"],
        "shard_size": 6,
        "batch_size": 3,
        "dtype": "float32",
        **{name: str(place) for name, place in places.items()},
        **fields,
    }
    return resolve_targets(value, base=Path(), where="test")


@pytest.fixture(scope="module")
def stored(tiny, models, tmp_path_factory):
    """Targets of the teacher, in float32."""
    folder = tmp_path_factory.mktemp("targets") / "targets.zarr"
    make_targets(targets_config(tiny, models / "teacher", folder, **EVERYTHING))
    return folder


def student_of(tiny, output, objective="messy", **fields):
    return tiny.run(
        "student",
        output,
        **{
            "objective": tiny.objectives[objective],
            "roles": {"transfer": ["transfer"]},
            "transfer_per_batch": 4,
            "view": VIEW,
            **{name: str(value) if isinstance(value, Path) else value for name, value in fields.items()},
        },
    )


def losses_of(folder):
    return [json.loads(line)["losses"] for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("kind", ["teacher", "probe", "student"])
def test_stored_targets_give_the_losses_that_the_model_gives_on_the_same_views(tiny, models, tmp_path, kind):
    objective = "messy" if kind == "teacher" else "kd"
    make_targets(targets_config(tiny, models / kind, tmp_path / "targets"))
    train_run(student_of(tiny, tmp_path / "online", objective, teacher=models / kind))
    train_run(student_of(tiny, tmp_path / "cached", objective, targets=tmp_path / "targets"))
    online, cached = losses_of(tmp_path / "online"), losses_of(tmp_path / "cached")
    assert len(online) == 3
    for one, other in zip(online, cached, strict=True):
        assert one == pytest.approx(other, rel=1e-4)  # batches of another size round otherwise
    kept = [load_checkpoint(tmp_path / name / "best.safetensors")[0] for name in ("online", "cached")]
    torch.testing.assert_close(*kept, rtol=1e-4, atol=1e-5)


def test_each_view_has_targets_of_its_own(stored):
    targets = open_targets(stored)
    said = [targets.store.read(name, np.arange(6)) for view in range(3) for name in targets.series(view)[:1]]
    assert not any(np.array_equal(said[one], said[other]) for one, other in ((0, 1), (0, 2), (1, 2)))


def test_a_student_of_stored_targets_needs_no_latents(tiny, stored, tmp_path):
    store = shutil.copytree(tiny.store, tmp_path / "cache.zarr")
    for numbers in (store / "latents" / "depth").glob("c.*"):  # what describes them stays
        numbers.unlink()
    train_run(student_of(tiny, tmp_path / "run", store=store, targets=stored))
    train_run(student_of(tiny, tmp_path / "other", targets=stored))
    assert losses_of(tmp_path / "run") == losses_of(tmp_path / "other")


def test_half_precision_targets_say_how_far_they_are_from_the_model(tiny, models, stored, tmp_path):
    half = make_targets(targets_config(tiny, models / "teacher", tmp_path / "half", dtype="float16"))
    assert 0 < half.logits_error.kl_mean < 1e-5
    assert half.logits_error.kl_mean < half.logits_error.kl_max < 1e-4
    whole = make_targets(targets_config(tiny, models / "teacher", stored, **EVERYTHING))
    assert whole.computed == 0
    assert whole.logits_error.kl_max < 1e-12
    records = open_store(tmp_path / "half").committed("target-pooled-v0").values()
    assert all(record.error.max_abs[0] > 0 for record in records)


def test_int8_targets_are_those_of_the_store_they_were_converted_from(tiny, stored, tmp_path):
    source = open_store(stored)
    names = [name for name in source.modalities if source.recipe(name).format.kind == "continuous"]
    convert_store(source, tmp_path / "int8", "zarr", dtypes=dict.fromkeys(names, "int8"))
    small, exact = open_targets(tmp_path / "int8"), open_targets(stored)
    assert small.facts == exact.facts
    rows, name = np.arange(6), exact.series(0)[0]
    step = np.ptp(exact.store.read(name, np.arange(14)), axis=0).max() / 254
    assert 0 < np.abs(small.store.read(name, rows) - exact.store.read(name, rows)).max() <= step
    train_run(student_of(tiny, tmp_path / "run", targets=tmp_path / "int8"))
    assert losses_of(tmp_path / "run")[0]["kd"] > 0


@settings(max_examples=30, deadline=None)
@given(st.integers(2, 9), st.data())
def test_the_largest_logits_come_back_and_the_others_keep_their_sum(n_classes, data):
    n_kept = data.draw(st.integers(1, n_classes - 1))
    logits = torch.randn(4, n_classes, generator=torch.Generator().manual_seed(n_classes * 10 + n_kept)) * 5
    layout = TargetLayout({LOGITS: (n_classes,)}, n_kept, "float32")
    packed = {kind: layout.pack(kind, {LOGITS: logits}) for kind in ("logits", "index")}
    back = layout.unpack(packed)[LOGITS]
    torch.testing.assert_close(back.logsumexp(1), logits.logsumexp(1))
    torch.testing.assert_close(back.topk(n_kept)[0], logits.topk(n_kept)[0])
    assert torch.equal(back.topk(n_kept)[1].sort()[0], logits.topk(n_kept)[1].sort()[0])
    rest = torch.ones_like(back, dtype=torch.bool).scatter(1, packed["index"], False)
    assert all(len(row[keep].unique()) == 1 for row, keep in zip(back, rest, strict=True))


def test_a_store_of_the_largest_logits_teaches_and_tells_its_error(tiny, models, tmp_path):
    report = make_targets(
        targets_config(tiny, models / "student", tmp_path / "targets", top_logits=1, objective={"kd": {}})
    )
    assert report.bytes_per_view == 2 * 4 + 2  # the largest, what stands for the others, and which it is
    assert report.logits_error.kl_mean > 0
    assert report.logits_error.top1_kept == 1
    train_run(student_of(tiny, tmp_path / "run", "kd", targets=tmp_path / "targets"))
    of_all = tiny.run("student", tmp_path / "all", targets=str(tmp_path / "targets"), objective={"standardised_kd": {}})
    with pytest.raises(SpecError, match=r"all logits, and .* holds the 1 largest"):
        train_run(of_all)


@given(
    st.recursive(
        st.integers() | st.booleans() | st.text(max_size=3),
        lambda inner: (
            st.lists(inner, min_size=1, max_size=3)
            | st.dictionaries(st.text("abc.-", min_size=1, max_size=3), inner, min_size=1, max_size=3)
        ),
        max_leaves=6,
    )
)
def test_what_is_flattened_into_a_recipe_comes_back(value):
    assert nested(flattened(value, "x"), "x") == value


def test_blocks_keep_their_order_in_a_store_that_sorts_names(stored):
    store = open_store(stored)
    recipe = store.recipe("target-logits-v0")
    blocks = {f"blocks.{n}": n + 1 for n in range(12)}
    facts = open_targets(stored).facts.model_copy(update={"blocks": blocks})
    parameters = flattened(facts.model_dump(mode="json"), "reference") | flattened(VIEW, "view")
    read, _ = facts_in(store, recipe.model_copy(update={"parameters": dict(sorted(parameters.items()))}))
    assert list(read.blocks.items()) == list(blocks.items())


def test_stored_tokens_and_pooled_targets_are_those_of_one_forward(stored):
    targets = open_targets(stored)
    read = {name: torch.from_numpy(targets.store.read(name, np.arange(4))) for name in targets.series(1)}
    said = targets.unpack(read, 1)
    assert said[Target("tokens", "image", 1)].shape == (4, 4, 16)
    for span, block in (("image", 1), ("depth", 0)):
        tokens, pooled = said[Target("tokens", span, block)], Target("pooled", span, block)
        if pooled in said:
            torch.testing.assert_close(tokens.mean(1), said[pooled])
    assert Target("pooled", "depth", 0) in said


def test_targets_that_were_stopped_go_on_and_are_the_same(tiny, models, stored, tmp_path):
    config = targets_config(tiny, models / "teacher", tmp_path / "targets", **EVERYTHING)
    answers = iter([False, False, True])
    with pytest.raises(WorkInterrupted, match="of 14 images"):
        make_targets(config, should_stop=lambda: next(answers))
    assert 0 < len(open_store(tmp_path / "targets").committed("target-logits-v0")) < 3
    report = make_targets(config)
    assert 0 < report.computed < report.shards == 3
    assert open_store(tmp_path / "targets").content_hash() == open_store(stored).content_hash()


def test_targets_of_a_killed_process_go_on_and_are_the_same(tiny, models, stored, tmp_path):
    config = targets_config(tiny, models / "teacher", tmp_path / "targets", **EVERYTHING)
    process = os.fork()
    if not process:  # dies in the second shard, as nothing that could tidy up expects
        make_targets(config, on_progress=lambda done, _: done > 8 and os.kill(os.getpid(), signal.SIGKILL))
        os._exit(1)
    assert os.WTERMSIG(os.waitpid(process, 0)[1]) == signal.SIGKILL
    assert make_targets(config).computed == 2
    assert open_store(tmp_path / "targets").content_hash() == open_store(stored).content_hash()


def test_ranks_share_the_shards_and_make_the_same_targets(tiny, models, stored, tmp_path):
    config = targets_config(tiny, models / "teacher", tmp_path / "targets", **EVERYTHING)
    assert [make_targets(config, rank=rank, world_size=2).computed for rank in (1, 0)] == [1, 2]
    assert open_store(tmp_path / "targets").content_hash() == open_store(stored).content_hash()


def test_another_teacher_or_other_views_do_not_go_into_the_same_targets(tiny, models, stored):
    before = open_store(stored).content_hash()
    with pytest.raises(RecipeMismatchError, match="weights_sha256"):
        make_targets(targets_config(tiny, models / "student", stored, objective={"kd": {}}))
    with pytest.raises(RecipeMismatchError, match="view/scale_min"):
        make_targets(targets_config(tiny, models / "teacher", stored, view={**VIEW, "scale_min": 0.6}, **EVERYTHING))
    assert open_store(stored).content_hash() == before


def test_a_student_takes_the_views_of_its_targets_and_refuses_others(tiny, stored, tmp_path):
    described = tiny.describe("student", tmp_path / "run", objective=tiny.objectives["kd"])
    del described["view"]
    silent = student_of(tiny, tmp_path / "run", targets=stored).__class__.model_validate(
        {**described, "targets": str(stored), "roles": {"labelled": ["labelled"]}}
    )
    train_run(silent)
    assert "count: 3" in (tmp_path / "run" / "config.yaml").read_text()
    with pytest.raises(SpecError, match=r"`view.scale_min` is `0.7`, the targets .* `0.5`"):
        train_run(student_of(tiny, tmp_path / "no", targets=stored, view={**VIEW, "scale_min": 0.7}))
    with pytest.raises(SpecError, match=r"`view.seed` is `8`"):
        train_run(student_of(tiny, tmp_path / "no", targets=stored, view={**VIEW, "seed": 8}))
    assert not (tmp_path / "no").exists()


def test_the_views_of_a_preset_give_way_to_those_of_stored_targets(stored):
    described = {"kind": "student", "preset": "embedded", "store": "s", "images": "i", "output": "o"}
    described |= {"targets": str(stored), "objective": {"kd": {}}}

    def view_of(run):
        return taught_by_targets(resolve_run(run, base=Path(), where="test"), stored).config.view

    assert view_of(described) == open_targets(stored).view
    with pytest.raises(SpecError, match=r"`view.scale_min` is `0.75`"):
        view_of(described | {"view": {"count": 3}})


def test_a_student_asks_only_for_what_is_stored(tiny, models, tmp_path):
    make_targets(targets_config(tiny, models / "teacher", tmp_path / "targets", objective={"kd": {}}))
    with pytest.raises(SpecError, match=r"does not hold `pooled/depth/0`, `pooled/depth/1`"):
        train_run(student_of(tiny, tmp_path / "run", targets=tmp_path / "targets"))
    train_run(student_of(tiny, tmp_path / "kd", "kd", targets=tmp_path / "targets"))


def test_targets_of_too_few_images_or_other_latents_are_refused(tiny, models, stored, tmp_path):
    make_targets(targets_config(tiny, models / "teacher", tmp_path / "few", splits=["labelled"]))
    with pytest.raises(SpecError, match="has no target of 8 of 14 images"):
        train_run(student_of(tiny, tmp_path / "run", targets=tmp_path / "few"))
    other = tiny.build(tiny.manifest, tmp_path / "other.zarr", seed=1)
    with pytest.raises(RecipeMismatchError, match="was shown another recipe of `depth`"):
        train_run(student_of(tiny, tmp_path / "run", store=other, targets=stored))
    with pytest.raises(RecipeMismatchError, match="another recipe of `depth`"):
        make_targets(targets_config(tiny, models / "teacher", tmp_path / "no", store=str(other)))
    with pytest.raises(SpecError, match="is no store of targets"):
        train_run(student_of(tiny, tmp_path / "run", targets=tiny.store))
    assert not (tmp_path / "run").exists()
    assert not (tmp_path / "no").exists()


def test_a_resumed_student_keeps_to_its_targets(tiny, models, stored, tmp_path):
    answers = iter([False, False, True])
    config = student_of(tiny, tmp_path / "run", "kd", targets=stored)
    with pytest.raises(WorkInterrupted):
        train_run(config, should_stop=lambda: next(answers))
    half = tmp_path / "half"
    make_targets(targets_config(tiny, models / "teacher", half, dtype="float16"))
    with pytest.raises(CheckpointError, match="other targets"):
        train_run(student_of(tiny, tmp_path / "run", "kd", targets=half), resume=True)
    train_run(config, resume=True)


@pytest.mark.parametrize(
    ("fields", "fault"),
    [
        ({"also": ["pooled/sound/0"]}, "the model has no `pooled/sound/0`"),
        ({"also": ["pooled/image/2"]}, "it has 2 blocks"),
        ({"also": ["image"]}, "is no target"),
        ({"view": {"count": 4}}, "nothing in `view` is random"),
        ({"top_logits": 3}, "there are 3 classes"),
        ({"splits": ["lost"]}, "no image of split `lost`"),
        ({"objective": {"ce": {}}}, "there is nothing to store"),
        ({"batch_size": 4}, "no multiple of `batch_size`"),
        ({"depth": 1}, "unknown"),
    ],
)
def test_targets_that_cannot_be_are_refused_before_anything_is_written(tiny, models, tmp_path, fields, fault):
    with pytest.raises(SpecError, match=fault):
        make_targets(targets_config(tiny, models / "teacher", tmp_path / "targets", **fields))
    assert not (tmp_path / "targets").exists()


def test_the_card_of_a_student_says_that_it_learned_from_stored_answers(tiny, stored, tmp_path):
    train_run(student_of(tiny, tmp_path / "run", targets=stored))
    run = load_run(tmp_path / "run")
    card = model_card(run, read_result(tmp_path / "run"), format_name="transformers", notes={})
    assert "distilled from a teacher, which looks at latents of `depth`; from what it had said before" in card
    assert run.facts.teacher_sha256 in card


def test_targets_of_other_pictures_than_a_student_sees_are_refused(tiny, models, tmp_path):
    spec = CacheSpec(
        latents=(LatentSpec(modality=Modality.DEPTH, source="corners"),), shard_size=5, images="raw", image_size=6
    )
    build_cache(tiny.manifest, spec, tmp_path / "small.zarr", open_source=CornerSource)
    small = str(tmp_path / "small.zarr")
    make_targets(targets_config(tiny, models / "teacher", tmp_path / "targets", store=small))
    with pytest.raises(RecipeMismatchError, match="was shown images as `original`, this run sees images as `raw`"):
        train_run(student_of(tiny, tmp_path / "run", store=small, images=None, targets=tmp_path / "targets"))
    train_run(student_of(tiny, tmp_path / "run", store=small, targets=tmp_path / "targets"))


def test_an_image_that_was_removed_from_the_targets_is_named_as_such(tiny, stored, tmp_path):
    targets = shutil.copytree(stored, tmp_path / "targets")
    take_down([targets], ["labelled-0"])
    with pytest.raises(SpecError, match=r"1 images were removed from .*labelled-0.*\n.*takedown"):
        train_run(student_of(tiny, tmp_path / "run", targets=targets))


def test_a_student_learns_from_a_teacher_of_latents_in_fewer_bits(tiny, tmp_path):
    small = tmp_path / "small.zarr"
    convert_store(open_store(tiny.store), small, "zarr", dtypes={"depth": "int8"})
    train_run(tiny.run("teacher", tmp_path / "teacher", store=str(small)))
    make_targets(targets_config(tiny, tmp_path / "teacher", tmp_path / "targets", store=str(small)))
    train_run(student_of(tiny, tmp_path / "run", store=small, targets=tmp_path / "targets"))


def test_targets_of_views_that_were_drawn_otherwise_are_refused(stored, monkeypatch):
    monkeypatch.setattr("trainer.stored_targets.VIEWS_VERSION", 2)
    with pytest.raises(RecipeMismatchError, match="of views as version `1` drew them, this dla draws version `2`"):
        open_targets(stored)
