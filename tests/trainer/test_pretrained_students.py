"""Students that begin from somebody's weights, that learn from another family, or that are timm's."""

import json
import shutil
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
from transformers import AutoModelForImageClassification
from transformers.models.timm_wrapper import modeling_timm_wrapper
from transformers.utils.import_utils import BACKENDS_MAPPING

import trainer.classifiers
from dla_cache.errors import CheckpointError, MissingDependencyError, SpecError, WorkInterrupted
from tests.trainer.students import SIDE, make_student, model_of, save_pretrained, some_pixels
from trainer.classifiers import ClassifierConfig, build_classifier, load_classifier, pretrained_facts
from trainer.config import resolve_run
from trainer.export import export_run
from trainer.outline import find_blocks
from trainer.run import load_run, train_run
from trainer.run_folder import read_config, read_facts

LOOP = {"steps": 2, "evaluate_steps": 1, "learning_rate": 0.01}


def begin(folder, *, n_classes=3, image_size=SIDE, **fields):
    """The student that begins from the checkpoint in `folder`."""
    config = ClassifierConfig(n_classes=n_classes, image_size=image_size, pretrained=str(folder), **fields)
    torch.manual_seed(0)
    student = build_classifier(config, pretrained_facts({"pretrained": str(folder)}))
    load_classifier(student, config)
    return student.eval()


@pytest.mark.parametrize("family", ["deit", "swin", "resnet"])
def test_all_weights_are_taken_over_but_a_classifier_of_other_classes(family, tmp_path):
    theirs = save_pretrained(family, tmp_path, n_classes=5).state_dict()
    ours = begin(tmp_path).state_dict()
    other = [name for name, value in ours.items() if not torch.equal(value, theirs[name])]
    assert other == [name for name in ours if name.startswith("classifier.")]


def test_a_classifier_of_as_many_classes_is_kept(tmp_path):
    theirs = save_pretrained("convnext", tmp_path, n_classes=3)
    with torch.inference_mode():
        assert torch.equal(begin(tmp_path)(some_pixels()).logits, theirs(some_pixels()).logits)


def test_learned_positions_are_interpolated_to_another_size_of_images(tmp_path):
    theirs = save_pretrained("vit", tmp_path, n_classes=3)
    student = begin(tmp_path, image_size=48)
    assert student.vit.embeddings.position_embeddings.shape == (1, 37, 16)
    with torch.inference_mode():
        expected = theirs(some_pixels(side=48), interpolate_pos_encoding=True).logits
        torch.testing.assert_close(student(some_pixels(side=48)).logits, expected)


def test_a_model_without_learned_positions_takes_any_size(tmp_path):
    theirs = save_pretrained("resnet", tmp_path, n_classes=3)
    with torch.inference_mode():
        assert torch.equal(
            begin(tmp_path, image_size=40)(some_pixels(side=40)).logits, theirs(some_pixels(side=40)).logits
        )


def test_settings_change_what_has_no_weights(tmp_path):
    save_pretrained("deit", tmp_path)
    assert begin(tmp_path, settings={"hidden_dropout_prob": 0.3}).config.hidden_dropout_prob == 0.3


def pickled(folder):
    torch.save(make_student("vit").state_dict(), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def cut_short(folder):
    content = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(content[: len(content) // 2])


def with_own_code(folder):
    config = json.loads((folder / "config.json").read_text())
    config["auto_map"] = {"AutoModelForImageClassification": "modeling.Net"}
    (folder / "config.json").write_text(json.dumps(config))


def of_text(folder):
    (folder / "config.json").write_text('{"model_type": "bert"}')


@pytest.mark.parametrize("harm", [pickled, cut_short, with_own_code, of_text, shutil.rmtree])
def test_a_checkpoint_that_may_not_or_cannot_be_loaded_is_refused(harm, tmp_path):
    save_pretrained("vit", tmp_path / "theirs")
    harm(tmp_path / "theirs")
    with pytest.raises(SpecError) as refused:
        begin(tmp_path / "theirs")
    assert refused.value.hint


@pytest.mark.parametrize("settings", [{"num_hidden_layers": 3}, {"intermediate_size": 64}, {"hiden_size": 8}])
def test_settings_that_do_not_fit_the_weights_are_refused(settings, tmp_path):
    save_pretrained("vit", tmp_path)
    with pytest.raises(SpecError):
        begin(tmp_path, settings=settings)


def describe(tiny, output, **fields):
    return tiny.run("student", output, **{"image_size": SIDE, "loop": LOOP, **fields})


def test_a_run_goes_from_weights_to_an_export_and_no_longer_needs_them_then(tiny, tmp_path):
    save_pretrained("deit", tmp_path / "theirs", n_classes=5)
    train_run(describe(tiny, tmp_path / "run", model={"pretrained": str(tmp_path / "theirs")}))
    assert read_config(tmp_path / "run").model["pretrained"] == str(tmp_path / "theirs")
    sha256 = read_facts(tmp_path / "run").pretrained.sha256
    shutil.rmtree(tmp_path / "theirs")
    load_run(tmp_path / "run")
    export_run(tmp_path / "run", tmp_path / "export")
    assert sha256 in (tmp_path / "export" / "README.md").read_text()
    assert len(AutoModelForImageClassification.from_pretrained(tmp_path / "export").config.id2label) == 3


def test_a_stopped_run_goes_on_from_its_own_weights_and_refuses_others_to_begin_from(tiny, tmp_path):
    save_pretrained("resnet", tmp_path / "theirs", n_classes=5)
    whole, cut = (
        describe(tiny, tmp_path / name, model={"pretrained": str(tmp_path / "theirs")}) for name in ("a", "b")
    )
    train_run(whole)
    steps = iter([False, True])
    with pytest.raises(WorkInterrupted):
        train_run(cut, should_stop=lambda: next(steps))
    train_run(cut, resume=True)
    one, other = (load_run(tmp_path / name).task.module.state_dict() for name in ("a", "b"))
    assert all(torch.equal(one[name], other[name]) for name in one)  # batch statistics as well
    (tmp_path / "b" / "result.json").unlink()
    save_pretrained("resnet", tmp_path / "theirs", n_classes=5, seed=8)
    with pytest.raises(CheckpointError, match="other pretrained weights"):
        train_run(cut, resume=True)


def test_pixels_of_another_scale_than_the_weights_know_are_refused_with_what_to_set(tiny, tmp_path):
    save_pretrained("resnet", tmp_path / "theirs", mean=(0.485, 0.456, 0.406))
    with pytest.raises(SpecError, match=r"0\.485") as refused:
        train_run(describe(tiny, tmp_path / "run", model={"pretrained": str(tmp_path / "theirs")}))
    assert "pixel_mean=[0.485, 0.456, 0.406]" in refused.value.hint
    assert not (tmp_path / "run").exists()


def test_a_folder_counts_from_the_run_file_and_a_name_of_the_hub_stays(tmp_path):
    places = {"kind": "student", "store": "s", "output": "o", "objective": {"ce": {}}}
    (tmp_path / "theirs").mkdir()
    for given, expected in (("theirs", str(tmp_path / "theirs")), ("owner/name", "owner/name")):
        run = resolve_run({**places, "model": {"pretrained": given}}, base=tmp_path, where="run.yaml")
        assert run.model["pretrained"] == expected


def test_another_architecture_takes_nothing_of_the_preset_s_vit():
    fields = {"preset": "embedded", "kind": "student", "store": "s", "output": "o", "teacher": "t"}
    model = model_of("swin")
    assert resolve_run({**fields, "model": model}, base=Path(), where="run").model == model


@pytest.mark.parametrize(
    ("model", "words"),
    [
        ({"architecture": "swin", "patch_size": 4}, "patch_size"),
        ({"architecture": "swin", "timm": "resnet18"}, "architecture and timm"),
        ({"architecture": "swin", "revision": "main"}, "revision"),
        ({"architecture": "swin", "settings": {"image_size": 8}}, "image_size"),
    ],
)
def test_what_does_not_go_together_is_refused_and_nothing_is_written(tiny, tmp_path, model, words):
    with pytest.raises(SpecError, match=words):
        train_run(describe(tiny, tmp_path / "run", model=model))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("theirs", "spans"), [("resnet", ["image"]), ("deit", ["cls", "image"])])
def test_a_student_learns_from_a_frozen_one_of_another_family(tiny, tmp_path, theirs, spans):
    train_run(describe(tiny, tmp_path / "teacher", model=model_of(theirs)))
    before = load_run(tmp_path / "teacher").task.module.state_dict()
    objective = {"ce": {}, "kd": {}, "messy": {"spans": spans, "hidden": 8, "read": "spatial"}}
    run = describe(
        tiny, tmp_path / "run", model=model_of("convnext"), teacher=tmp_path / "teacher", objective=objective
    )
    train_run(run)
    record = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[-1])
    assert record["gradient_shares"].keys() == {"ce", "kd", "messy"}
    after = load_run(tmp_path / "teacher").task.module.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_a_teacher_teaches_image_tokens_to_a_student_of_another_grid(tiny, tmp_path):
    fields = {"image_size": SIDE, "loop": LOOP}
    train_run(tiny.run("teacher", tmp_path / "teacher", **fields))
    objective = {"ce": {}, "messy": {"what": "tokens", "hidden": 8}}
    train_run(
        describe(tiny, tmp_path / "run", model=model_of("swin"), teacher=tmp_path / "teacher", objective=objective)
    )


def test_one_image_a_batch_and_batch_norm_are_refused_before_anything_is_written(tiny, tmp_path):
    with pytest.raises(SpecError, match="batch norm"):
        train_run(describe(tiny, tmp_path / "run", model=model_of("resnet"), labelled_per_batch=1))
    assert not (tmp_path / "run").exists()


# timm


def test_timm_that_is_not_installed_is_named(monkeypatch):
    monkeypatch.setattr(trainer.classifiers, "find_spec", lambda name: None)
    with pytest.raises(MissingDependencyError, match="resnet18") as refused:
        build_classifier(ClassifierConfig(n_classes=3, image_size=SIDE, timm="resnet18"), None)
    assert "dla[timm]" in refused.value.hint


class FakeNet(torch.nn.Module):
    def __init__(self, num_classes, width=4):
        super().__init__()
        self.layer1, self.layer2 = torch.nn.Conv2d(3, width, 3, 2), torch.nn.Conv2d(width, width, 3, 2)
        self.fc = torch.nn.Linear(width, num_classes)

    def forward_intermediates(self, pixels):
        first = self.layer1(pixels)
        second = self.layer2(first)
        return second, [first, second]

    def forward_head(self, features):
        return self.fc(features.mean(dim=(2, 3)))

    def forward(self, pixels):
        return self.forward_head(self.forward_intermediates(pixels)[0])


@pytest.fixture
def fake_timm(monkeypatch):
    timm = ModuleType("timm")
    timm.create_model = lambda name, *, pretrained, **options: FakeNet(**options)
    monkeypatch.setitem(sys.modules, "timm", timm)
    monkeypatch.setattr(modeling_timm_wrapper, "timm", timm, raising=False)
    monkeypatch.setitem(BACKENDS_MAPPING, "timm", (lambda: True, ""))
    monkeypatch.setattr(trainer.classifiers, "find_spec", lambda name: SimpleNamespace())


def test_a_model_of_timm_is_trained_and_exported_as_stock_transformers_has_it(fake_timm, tiny, tmp_path):
    train_run(describe(tiny, tmp_path / "run", model={"timm": "fake", "settings": {"width": 6}}))
    student = load_run(tmp_path / "run").task.student
    assert dict(find_blocks(student).widths) == {"timm_model.layer1": 6, "timm_model.layer2": 6}
    report = export_run(tmp_path / "run", tmp_path / "export")
    assert report.max_difference == pytest.approx(0, abs=1e-6)
    assert "`fake` of timm" in (tmp_path / "export" / "README.md").read_text()
