"""The loop on a CUDA device: what cannot be seen on a CPU. None of this has been run yet."""

import math
from typing import Any

import pytest
import torch

from dla_cache.errors import TrainingError
from tests.trainer.toy import CONFIG, ToyTask, assert_same_run, make_loop, steps_told, toy_batches
from trainer.processes import open_processes

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available(), reason="needs a CUDA device: run `pytest -m gpu` where there is one"
    ),
]


def batches(step: int) -> Any:
    return ((number, inputs.cuda()) for number, inputs in toy_batches(step))


def run(folder: Any, terms: Any = None, *, precision: str = "no", die_at: int | None = None) -> None:
    """A run on the GPU, gone on with if it has a checkpoint."""
    task = ToyTask(terms)
    task.module.cuda()
    config = CONFIG.model_copy(update={"mixed_precision": precision})
    with open_processes(config, "cuda") as processes:
        loop = make_loop(folder, config, task=task, processes=processes)
        if (folder / "last.safetensors").exists():
            loop.resume()

        def die(at: Any) -> None:
            if at.step == die_at:
                raise KeyboardInterrupt

        loop.run(batches, lambda: {"selection": float(loop.step)}, on_progress=die)


@pytest.mark.parametrize("precision", ["no", "bf16", "fp16"])
def test_a_fault_is_named_with_its_step_and_never_saved_though_the_gpu_is_not_waited_for(
    tmp_path: Any, precision: str
) -> None:
    def terms(error: Any, step: int) -> Any:
        return {"fit": error.square().mean() * (math.nan if step == 11 else 1)}

    with pytest.raises(TrainingError, match="`fit` is nan at step 11"):
        run(tmp_path, terms, precision=precision)
    assert steps_told(tmp_path) == [6]


@pytest.mark.parametrize("precision", ["no", "fp16"])
def test_a_run_that_died_resumes_to_the_unbroken_one(tmp_path: Any, precision: str) -> None:
    run(tmp_path / "unbroken", precision=precision)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "died", precision=precision, die_at=15)
    run(tmp_path / "died", precision=precision)
    assert_same_run(tmp_path / "died", tmp_path / "unbroken")
