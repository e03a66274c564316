"""The model card of an exported student: what it is, how good, how to load it, and where it comes from."""

import json
from collections.abc import Mapping, Sequence

from dla_cache import __version__
from dla_cache.control_recipe import control_note, is_control
from dla_cache.errors import DlaError
from dla_cache.spec import Recipe
from dla_cache.store import open_store
from trainer.outline import model_size
from trainer.run_folder import RunResult, held_out
from trainer.tasks import StudentTask
from trainer.upbringing import TrainedRun

USE_TRANSFORMERS = """\
from PIL import Image, ImageOps
from transformers import AutoImageProcessor, AutoModelForImageClassification

processor = AutoImageProcessor.from_pretrained(".")
model = AutoModelForImageClassification.from_pretrained(".")
image = ImageOps.exif_transpose(Image.open("photo.jpg"))
logits = model(**processor(image, return_tensors="pt")).logits
{answer}
"""

PREPARE = """\
import json

import numpy
{imports}
from PIL import Image, ImageOps

image = ImageOps.exif_transpose(Image.open("photo.jpg")).convert("RGB")
width, height = (int({size} * side / min(image.size)) for side in image.size)
left, top = (width - {size}) // 2, (height - {size}) // 2
image = image.resize((width, height), Image.Resampling.BICUBIC).crop((left, top, left + {size}, top + {size}))
pixels = (numpy.asarray(image) / 255 - {mean}) / {std}
pixels = pixels.transpose(2, 0, 1)[None].astype("float32")  # [1, 3, {size}, {size}]; more than 1 is fine

{run}
{answer}
"""

ANSWERS = {
    ("transformers", False): "print(model.config.id2label[int(logits.argmax())])",
    ("transformers", True): "print([model.config.id2label[k] for k, logit in enumerate(logits[0]) if logit > 0])",
    ("other", False): 'print(json.load(open("class_names.json"))[int(logits.argmax())])',
    ("other", True): """\
names = json.load(open("class_names.json"))
print([name for name, logit in zip(names, logits[0]) if logit > 0])""",
}
"""By format, and whether an image may have several classes: then those likelier than not."""

RUN_TORCH = """\
model = torch.export.load("model.pt2").module()
logits = model(torch.from_numpy(pixels))"""

RUN_ONNX = """\
session = onnxruntime.InferenceSession("model.onnx")
logits = session.run(["logits"], {"pixels": pixels})[0]"""

UNITS = ("", "k", "M", "G", "T", "P")

HELD_OUT = """\
{metric} on the {n_test:,} images of {test}: **{test_score:.1f} %**, 95 % interval {low:.1f} to {high:.1f} %.
They were read once, after all was chosen."""

CARD = """\
---
{library}pipeline_tag: image-classification
tags:
- dla
---

# {name}: an image-only student

An image classifier of {n_classes} classes{of_several} and {n_parameters:,} parameters: a {architecture}.
One image costs {flops} FLOPs, two for each multiplication with an addition.
It sees the centre square of an image at {size} x {size} pixels and nothing else.
{upbringing}

## How good

{how_good}

On {validation}, where the kept step was chosen, it is {validation_score:.1f} %, which is a little optimistic.
This is one training run, of seed {seed}: the interval is that of drawing test images, not of training again.

## How to use it

In this folder:

```python
{code}```

The shorter side of an image is resized to {size} pixels, bicubic with antialiasing; the middle is cut out.

## Classes

```json
{class_names}
```

## Where it comes from

| | |
|---|---|
{provenance}
{sources}
## Licence

**To be filled in by whoever publishes this model.**
It is bound by the licences of what it was made from: images, and the weights of sources if any are named above.
"""


def model_card(run: TrainedRun, result: RunResult, *, format_name: str, notes: Mapping[str, str]) -> str:
    """The card as Markdown with the front matter of the Hugging Face hub.

    Args:
        notes: what to say of each source, by its name.
    """
    assert isinstance(run.task, StudentTask)
    roles, names = run.config.roles, run.facts.class_names
    recipes = recipes_of(run)
    sources = sorted({recipe.source for recipe in recipes.values()} & notes.keys())
    size = model_size(run.task.student, run.config.image_size)
    return CARD.format(
        library="library_name: transformers\n" if format_name == "transformers" else "",
        name=run.folder.resolve().name,
        n_classes=len(names),
        of_several=", any number of them an image," if run.facts.is_multi_label else "",
        n_parameters=size.parameters,
        architecture=architecture_of(run),
        flops=in_thousands(size.flops),
        size=run.config.image_size,
        upbringing=upbringing(run),
        how_good=how_good(result, roles.test),
        validation=" and ".join(f"`{split}`" for split in roles.validation),
        validation_score=100 * result.validation_score,
        seed=result.seed,
        code=code_of(format_name, run),
        class_names=json.dumps(names, ensure_ascii=False, indent=1),
        provenance="\n".join(f"| {what} | {value} |" for what, value in provenance(run, recipes).items()),
        sources="".join(f"\n- `{source}`: {notes[source]}" for source in sources) + ("\n" if sources else ""),
    )


def how_good(result: RunResult, splits: Sequence[str]) -> str:
    """What the test split said, if one was read."""
    if result.test_score is None:
        return "No test split was read."
    test = held_out(result, "run")
    return HELD_OUT.format(
        metric={"top-1": "Top-1", "mAP": "Mean average precision (mAP)"}[result.metric],
        n_test=test.n,
        test=" and ".join(f"`{split}`" for split in splits),
        test_score=100 * test.value,
        low=100 * test.low,
        high=100 * test.high,
    )


def architecture_of(run: TrainedRun) -> str:
    """What transformers, or timm, calls the model."""
    assert isinstance(run.task, StudentTask)
    config = run.task.student.config
    return (
        f"`{config.architecture}` of timm" if "timm" in run.config.model else f"`{config.model_type}` of transformers"
    )


def in_thousands(number: int) -> str:
    """A large number in short, as `35.1 G`."""
    unit = max(place for place in range(len(UNITS)) if number >= 1000**place or place == 0)
    return f"{number / 1000**unit:.3g} {UNITS[unit]}".rstrip()


def code_of(format_name: str, run: TrainedRun) -> str:
    """Python that loads the export in the current folder and names the class of one image."""
    is_stock = format_name == "transformers"
    answer = ANSWERS["transformers" if is_stock else "other", run.facts.is_multi_label]
    if is_stock:
        return USE_TRANSFORMERS.format(answer=answer)
    imports, code = ("torch", RUN_TORCH) if format_name == "torch-export" else ("onnxruntime", RUN_ONNX)
    return PREPARE.format(
        imports=f"import {imports}",
        size=run.config.image_size,
        mean=list(run.config.pixel_mean),
        std=list(run.config.pixel_std),
        run=code,
        answer=answer,
    )


def upbringing(run: TrainedRun) -> str:
    """What the student learned from, in two sentences."""
    assert run.config.objective is not None
    terms = ", ".join(run.config.objective.model_dump(exclude_none=True))
    learned = f"Its losses: {terms}."
    if run.facts.teacher_kind is None:
        return f"It was trained on labelled images alone. {learned}"
    latents = " and ".join(f"`{name}`" for name in run.facts.latents_sha256)
    seen = f", which looks at latents of {latents}" if latents else ""
    stored = "" if run.config.targets is None else " from what it had said before of the same views;"
    return f"It was distilled from a {run.facts.teacher_kind}{seen};{stored} it needs no latents itself. {learned}"


def provenance(run: TrainedRun, recipes: Mapping[str, Recipe]) -> dict[str, str]:
    """What this student was made by and of, as hashes that can be compared."""
    facts = run.facts
    lines = {
        "made by": f"dla {__version__}",
        "kept weights, sha256": f"`{run.weights_sha256}`",
        "images, splits and labels, sha256": f"`{facts.rows_sha256}`",
    }
    if facts.pretrained is not None:
        lines["weights it began from, sha256"] = f"`{facts.pretrained.sha256}`"
    if facts.teacher_sha256 is not None:
        lines["weights it learned from, sha256"] = f"`{facts.teacher_sha256}`"
    for name, content in facts.latents_sha256.items():
        lines[f"latents of `{name}`, content hash"] = f"`{content}`"
        lines[f"latents of `{name}`, recipe hash"] = f"`{facts.recipes[name]}`"
        if name in recipes:
            recipe = recipes[name]
            weights = f", weights sha256 `{recipe.weights_sha256}`" if recipe.weights_sha256 else ""
            note = f", {control_note(recipe)}" if is_control(recipe) else ""
            lines[f"latents of `{name}`, source"] = f"`{recipe.source}`{weights}{note}"
    return lines


def recipes_of(run: TrainedRun) -> dict[str, Recipe]:
    """The recipes of the latents that shaped the student, as far as its store is still at hand."""
    try:
        store = open_store(run.config.store)
        held = {name: store.recipe(name) for name in run.facts.latents_sha256 if name in store.modalities}
    except DlaError:
        return {}
    return {name: recipe for name, recipe in held.items() if recipe.hash == run.facts.recipes[name]}
