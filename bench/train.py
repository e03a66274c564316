"""What training from stored targets saves, and what the loop around a step costs.

    python bench/train.py [--only step,rows,wait,views,start,memory] [--rounds 5] [--out FOLDER] [--json FILE]

- step: one step of a student (forward, backward, AdamW) whose targets were stored, beside the same step with the
  teacher in it, as the paper's release does. A student equal to the teacher's trunk, and one of a quarter of the
  teacher's FLOPs. MESSy with KD on three layers and two modalities.
- rows: reading the targets of shuffled batches from the store, beside one file an image: `.pt` as torch writes it,
  safetensors, and npy.
- wait: the share of time that a step of 5 ms waits for its batch: images as raw pixels in the store, random crops and
  flips, targets.
- views: students of relief-digits with K = 8 stored views, and with the teacher asked about a fresh view each time.
- start: from the command to the first step, with what Python imports in the page cache.
- memory: of a process that trains, over its epochs.

Ways that are compared take turns in one process, and medians are of rounds. A busy machine shows in all figures: the
first line tells the load.
"""

import argparse
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).parent))

from train_runs import measure_memory, measure_start, measure_views, measure_wait

from cli.render import print_table
from dla_cache.spec import LatentFormat
from dla_cache.store import create_store, open_store
from dla_cache.store.rows import RowTable, StoredImage
from trainer.batch import Batch
from trainer.features import LOGITS, Target
from trainer.objectives import ObjectiveConfig
from trainer.reference import FrozenClassifier
from trainer.student import StudentConfig, build_student
from trainer.targets import ReferenceFacts, TargetLayout, recipe_of
from trainer.tasks import StudentTask, TeacherTask
from trainer.teacher import Teacher, TeacherConfig
from trainer.views import ViewConfig

FORMATS = {
    "shape": LatentFormat(kind="continuous", shape=(256, 64), axes=("token", "channel"), dtype="float16"),
    "audio": LatentFormat(kind="codes", shape=(4, 250), axes=("codebook", "step"), dtype="int16", vocabulary=2048),
}
"""The paper's modalities."""

N_CLASSES = 1000
LAYERS = [[0.8, 0.8], [0.9, 0.9], [1.0, 1.0]]
OBJECTIVE = ObjectiveConfig.model_validate({"ce": {}, "kd": {}, "messy": {"layers": LAYERS}})


def measure_step(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """A step with the teacher in it, and the same step with what the teacher said."""
    n_images = 4
    teacher = Teacher(TeacherConfig(n_classes=N_CLASSES, formats=FORMATS, modalities=tuple(FORMATS)))
    online = FrozenClassifier(TeacherTask(teacher, None))
    generator = torch.Generator().manual_seed(0)
    batch = Batch(
        image_ids=tuple(str(number) for number in range(n_images)),
        pixels=torch.randn(n_images, 3, 224, 224, generator=generator),
        latents={
            "shape": torch.randn(n_images, 256, 64, generator=generator),
            "audio": torch.randint(2048, (n_images, 4, 250), generator=generator),
        },
        labels=torch.arange(n_images),
    )
    teacher_flops = flops_of(lambda: teacher(batch.pixels[:1], {name: v[:1] for name, v in batch.latents.items()}))
    wanted = OBJECTIVE.targets(online.outline)
    stored = replace(batch, latents={}, targets=online.targets(batch, wanted))
    sizes = {
        "equal ViT": {},
        "a quarter of the FLOPs": {"width": 576, "n_heads": 9, "depth": 11},
        "ViT-S": {"width": 384, "n_heads": 6},
    }
    facts: dict[str, Any] = {"teacher": {"parameters": size_of(teacher), "gflops": teacher_flops}}
    for name, model in sizes.items():
        student = build_student(StudentConfig.model_validate({"n_classes": N_CLASSES, **model}))
        flops = flops_of(lambda student=student: student(batch.pixels[:1]))
        ways = {
            "online": (StudentTask(student, OBJECTIVE, online), batch),
            "stored": (StudentTask(student, OBJECTIVE, Answers(online.task)), stored),
        }
        times = take_turns({way: step_of(task, seen) for way, (task, seen) in ways.items()}, options.rounds)
        ratios = [one / other for one, other in zip(times["online"], times["stored"], strict=True)]
        facts[name] = {
            "parameters": size_of(student),
            "gflops": flops,
            "of_teacher": flops / teacher_flops,
            **{f"{way}_ms": 1e3 * statistics.median(values) for way, values in times.items()},
            "ratio": statistics.median(ratios),
            "ratio_range": [min(ratios), max(ratios)],
        }
    rows = [
        (
            name,
            f"{one['parameters'] / 1e6:.1f} M",
            f"{one['gflops']:.1f}",
            *(
                (f"{one['online_ms']:.0f} ms", f"{one['stored_ms']:.0f} ms", ratio_of(one))
                if "ratio" in one
                else ("", "", "")
            ),
        )
        for name, one in facts.items()
    ]
    print_table(("student", "parameters", "GFLOPs an image", "teacher in the step", "stored targets", "ratio"), rows)
    return facts


class Answers(FrozenClassifier):
    """What stored targets are to a student: what came with the batch."""

    def targets(self, batch: Batch, wanted: Any) -> dict[Target, torch.Tensor]:
        return {target: batch.targets[target] for target in wanted}


def step_of(task: StudentTask, batch: Batch) -> Callable[[], None]:
    """A whole training step."""
    optimizer = torch.optim.AdamW(task.module.parameters(), lr=1e-5)

    def step() -> None:
        task.module.train()
        optimizer.zero_grad(set_to_none=True)
        task.losses(batch).total.backward()
        optimizer.step()

    return step


def size_of(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def flops_of(forward: Callable[[], Any]) -> float:
    """GFLOPs of a forward pass; a multiplication and an addition count as two."""
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        forward()
    return counter.get_total_flops() / 1e9


def take_turns(ways: Mapping[str, Callable[[], Any]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each way, a round each, after one that does not count."""
    times: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(rounds + 1):
        for name, way in ways.items():
            began = time.perf_counter()
            way()
            if number:
                times[name].append(time.perf_counter() - began)
    return times


def ratio_of(facts: Mapping[str, Any], name: str = "ratio") -> str:
    low, high = facts[f"{name}_range"]
    return f"{facts[name]:.2f} ({low:.2f} to {high:.2f})"


def measure_rows(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """The targets of shuffled batches of 64, in microseconds an image."""
    n_images, per_batch = options.images, 64
    layout = TargetLayout(
        {LOGITS: (N_CLASSES,)} | {Target("pooled", m, block): (768,) for block in (9, 10, 11) for m in FORMATS},
        None,
        "float16",
    )
    facts = reference(weights="0" * 64)
    view = ViewConfig(count=1, seed=0)
    rows = RowTable(
        [StoredImage(number, f"i{number}", "00" * 32, "train", None, f"{number}.png") for number in range(n_images)]
    )
    recipes = {one.name: recipe_of(one, layout, facts, view, 0) for one in layout.series(0)}
    store = create_store(folder / "targets", rows, ["one", "two"], 1024, recipes)
    rng = np.random.default_rng(0)
    numbers = {one.name: rng.normal(size=(n_images, *one.format.shape)).astype(np.float16) for one in layout.series(0)}
    for shard in store.shards:
        for name, values in numbers.items():
            store.write_shard(name, shard, values[shard.start : shard.stop], seconds=0, device="cpu")
    store = open_store(folder / "targets")
    for number in range(n_images):
        one = {name: torch.from_numpy(values[number]) for name, values in numbers.items()}
        torch.save(one, folder / f"{number}.pt")
        save_file(one, folder / f"{number}.safetensors")
        np.save(folder / f"{number}.npy", np.concatenate([values[number].reshape(-1) for values in numbers.values()]))
    order = rng.permutation(n_images).reshape(-1, per_batch)

    def stacked(read: Callable[[int], Mapping[str, torch.Tensor]]) -> Callable[[], None]:
        def all_batches() -> None:
            for batch in order:
                images = [read(int(number)) for number in batch]
                for name in numbers:
                    torch.stack([image[name] for image in images])

        return all_batches

    def ours() -> None:
        for batch in order:
            for name in numbers:
                torch.from_numpy(store.read(name, batch))

    def npy() -> None:
        for batch in order:
            np.stack([np.load(folder / f"{number}.npy") for number in batch])

    ways = {
        "dla": ours,
        ".pt": stacked(lambda number: torch.load(folder / f"{number}.pt", weights_only=True)),
        "safetensors": stacked(lambda number: load_file(folder / f"{number}.safetensors")),
        "npy": npy,
    }
    times = take_turns(ways, options.rounds)
    result = {
        name: {
            "us": 1e6 * statistics.median(values) / n_images,
            "ratio": statistics.median(ratios := [v / o for v, o in zip(values, times["dla"], strict=True)]),
            "ratio_range": [min(ratios), max(ratios)],
        }
        for name, values in times.items()
    }
    print_table(
        ("a file or store of", "us an image", "as many times ours"),
        [(name, f"{one['us']:.1f}", ratio_of(one)) for name, one in result.items()],
    )
    return result


def reference(weights: str) -> ReferenceFacts:
    return ReferenceFacts(
        kind="teacher",
        class_names=("one", "two"),
        is_multi_label=False,
        weights_sha256=weights,
        image_size=64,
        pixel_mean=(0.5, 0.5, 0.5),
        pixel_std=(0.5, 0.5, 0.5),
    )


MEASURES = {
    "step": measure_step,
    "rows": measure_rows,
    "wait": measure_wait,
    "views": measure_views,
    "start": measure_start,
    "memory": measure_memory,
}


def main() -> None:
    """Measures what was asked for and prints a table each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default=",".join(MEASURES), help="measures with commas between them")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--images", type=int, default=4096, help="rows and images of the small stores")
    parser.add_argument("--out", type=Path, default=Path("bench-out/train"), help="relief-digits and its runs")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    versions = f"Python {platform.python_version()}, torch {torch.__version__}"
    print(f"{versions}, {torch.get_num_threads()} thread(s), load {os.getloadavg()[0]:.1f}")
    facts = {}
    for name in options.only.split(","):
        print(f"\n{name}")
        with tempfile.TemporaryDirectory() as folder:
            facts[name] = MEASURES[name](options, Path(folder))
    if options.json:
        options.json.write_text(json.dumps(facts, indent=1))


if __name__ == "__main__":
    main()
