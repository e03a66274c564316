"""How a step is computed changes nothing in what it is: micro-batches, compilers, attention, precision, memory."""

import gc
import json

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from dla_cache.errors import SpecError
from dla_cache.store import open_store
from tests.trainer.processes_toy import CONFIG as WIDE
from tests.trainer.processes_toy import run_wide
from tests.trainer.toy import CONFIG, make_loop, run_loop, state_of
from trainer.checkpoint import load_checkpoint
from trainer.data import PairSource, PixelScale, Role
from trainer.processes import alone
from trainer.run import build_task, set_statistics, train_run
from trainer.upbringing import Upbringing, data_facts


def test_micro_batches_make_the_step_of_the_whole_batch(tmp_path):
    """Without dropout, up to float32 sums in another order."""
    for n_micro in (1, 4):
        run_wide(tmp_path / str(n_micro), alone(WIDE), n_micro=n_micro, dropout=0.0, odd=False)
    whole, cut = (load_checkpoint(tmp_path / name / "last.safetensors")[0] for name in ("1", "4"))
    torch.testing.assert_close(cut, whole, rtol=1e-5, atol=1e-6)
    losses = [
        [json.loads(line)["losses"]["total"] for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        for name in ("1", "4")
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_each_micro_batch_has_its_own_dropout(tmp_path):
    seen = []
    loop = make_loop(tmp_path, CONFIG.model_copy(update={"steps": 2, "accumulation": 2, "evaluate_steps": 2}))
    loop.task.module[2].register_forward_hook(lambda module, inputs, output: seen.append(output == 0))
    run_loop(loop)
    assert len(seen) == 4
    assert not any(torch.equal(seen[one], seen[other]) for one in range(4) for other in range(one))


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiled_losses_make_the_same_run(tmp_path, backend):
    """`aot_eager` fuses nothing, so it rounds alike; how it draws dropout is its own."""
    config = CONFIG.model_copy(update={"steps": 4, "evaluate_steps": 2})
    for name in (None, backend):
        loop = make_loop(tmp_path / str(name), config.model_copy(update={"compile": name}))
        loop.task.module[2].p = 0.0
        run_loop(loop)
    compiled, plain = (load_checkpoint(tmp_path / name / "last.safetensors")[0] for name in (backend, "None"))
    torch.testing.assert_close(compiled, plain, rtol=1e-6, atol=1e-7)
    lines = [(tmp_path / name / "metrics.jsonl").read_text().splitlines() for name in (backend, "None")]
    for one, other in zip(*lines, strict=True):
        assert json.loads(one)["gradient_shares"] == pytest.approx(json.loads(other)["gradient_shares"])


def test_bf16_computes_in_bf16_and_keeps_float32_weights(tmp_path):
    config = CONFIG.model_copy(update={"mixed_precision": "bf16", "steps": 6, "learning_rate": 0.01})
    loop = make_loop(tmp_path / "bf16", config)
    dtypes = set()
    loop.task.module[0].register_forward_hook(lambda module, inputs, output: dtypes.add(output.dtype))
    run_loop(loop)
    assert dtypes == {torch.bfloat16}
    assert {value.dtype for value in state_of(loop).values()} == {torch.float32, torch.int64}
    plain = make_loop(tmp_path / "plain", config.model_copy(update={"mixed_precision": "no"}))
    run_loop(plain)
    losses = [
        json.loads((tmp_path / name / "metrics.jsonl").read_text())["losses"]["fit"] for name in ("bf16", "plain")
    ]
    assert losses[0] != losses[1]
    assert losses[0] == pytest.approx(losses[1], rel=0.05)  # bfloat16 has three digits


def test_float16_on_a_cpu_is_refused_before_anything_is_written(tiny, tmp_path):
    config = tiny.run("probe", tmp_path / "run", loop={"mixed_precision": "fp16"})
    with pytest.raises(SpecError, match="needs a CUDA device"):
        train_run(config)
    assert not (tmp_path / "run").exists()


def test_a_gpu_that_is_not_there_is_named_before_anything_is_written(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(SpecError, match="asks for `cuda`") as refused:
        train_run(tiny.run("probe", tmp_path / "run", device="cuda"))
    assert refused.value.hint
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("kind", "n_calls"), [("teacher", 3), ("student", 2)])
def test_attention_is_fused_in_training(tiny, kind, n_calls):
    """Two blocks, and of a teacher the resampler of its one modality: no other way to attention is allowed here than a
    kernel that never holds the weights. Without dropout, which a CPU's has not; CUDA's has."""
    described = tiny.describe(kind, "nowhere")
    config = tiny.run(kind, "nowhere", model={**described["model"], "dropout": 0.0})
    store = open_store(tiny.store)
    facts = data_facts(config, store, Upbringing(config))
    task = build_task(config, facts, None)
    set_statistics(task, config, facts, store)
    pairs = PairSource(
        store,
        tiny.images,
        image_size=8,
        pixel_scale=PixelScale((0.5,) * 3, (0.5,) * 3),
        modalities=facts.modalities,
        view=config.view,
        seed=0,
        device="cpu",
    )
    batch = next(pairs.evaluation(Role(("validation",), 6), facts.modalities)())
    task.module.train()
    with sdpa_kernel([SDPBackend.FLASH_ATTENTION]), torch.profiler.profile() as profile:
        task.losses(batch).total.backward()
    calls = {event.key: event.count for event in profile.key_averages()}
    assert calls["aten::_scaled_dot_product_flash_attention_for_cpu"] == n_calls


def test_memory_does_not_grow_with_steps(tmp_path):
    """Tensors that live after 40 steps and after 160, checkpoints, evaluations and the log among them."""
    counts = []

    def count(at):
        if at.step in (40, 160):
            gc.collect()
            counts.append(sum(issubclass(type(one), torch.Tensor) for one in gc.get_objects()))

    run_loop(make_loop(tmp_path, CONFIG.model_copy(update={"steps": 200, "evaluate_steps": 9})), on_progress=count)
    assert counts[0] == counts[1]
