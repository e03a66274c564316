"""MST-Distill: a student is routed, image by image, to one of several teachers whose features were masked for it.

Dimensions: B images, K classes, n teachers, M candidates (a teacher with a mask at one of its places).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal, Self

import numpy as np
import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn import functional

from dla_cache.errors import SpecError
from trainer.counters import split_mix
from trainer.features import Layer, resolve_layer
from trainer.objectives.cross_entropy import cross_entropy
from trainer.objectives.kd import kd_loss, yes_and_no
from trainer.objectives.mask_net import MaskNet
from trainer.objectives.objective import LiveModels, Need, Objective, ObjectiveInputs, Parties, TermConfig
from trainer.precision import at_least_float32

Fraction = Annotated[float, Field(ge=0, lt=1)]


class MstConfig(TermConfig):
    """How the student is routed between teachers; see `Mst`."""

    needs: ClassVar[frozenset[Need]] = frozenset({Need.TEACHERS, Need.LABELS})
    temperature: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 4.0
    routing: Literal["soft", "top-k", "random", "uniform"] = "soft"
    """Whom an image is routed to. `soft`: to all, by a learned gate that the distillation itself teaches. `top-k`: to
    the `k` that the gate likes best, alike; as published, the gate then learns from `balance` alone. `random`: to one,
    drawn anew for each image and step. `uniform`: to all alike. The last two are controls and have no gate."""
    k: Annotated[int, Field(gt=0)] | None = None
    """Of `top-k`: how many; 1 when absent, as published."""
    balance: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 1.0
    """Weight of the load balance within the loss. The published code lets it fall slowly; here it is constant."""
    layers: tuple[Layer, ...] = (0.5, 1.0)
    """Places of a teacher at which a mask may stand, each counted from 0, a fraction of them, or a name: the outputs of
    blocks; of a probe, and after the blocks of a teacher with a late branch, what the last layer of its MLP sees. Each
    makes one candidate of each teacher, which must have it; two that fall together are one. None: teachers alone."""
    stages: tuple[Fraction, Fraction] = (0.25, 0.25)
    """Shares of the run's steps: of the first stage, and of the second, in which masks learn."""
    mutual: bool = False
    """Whether teachers, too, learn in the first stage: from labels, from the student and from one another."""

    @model_validator(mode="after")
    def _parts_fit(self) -> Self:
        if self.k is not None and self.routing != "top-k":
            raise ValueError("`k` belongs to `routing: top-k`")
        if sum(self.stages) >= 1:
            raise ValueError(f"`stages` {list(self.stages)} leave no step to be routed in: their sum must be below 1")
        if self.layers and not self.stages[1]:
            raise ValueError("masks learn in the second of `stages`, which is 0: give it some, or set `layers: []`")
        return self

    @property
    def trains_teachers(self) -> bool:
        return self.mutual

    def build(self, parties: Parties) -> Objective:
        return Mst(self, parties)


@dataclass(frozen=True, slots=True)
class Candidate:
    """One that an image may be routed to."""

    teacher: str
    place: str = ""
    """Of its mask; empty of a teacher without one."""


def candidates_of(config: MstConfig, places: Mapping[str, Mapping[str, int]]) -> tuple[Candidate, ...]:
    """Each teacher with a mask at each of its places that `config` names, each once.

    Raises:
        SpecError: if a teacher has no such place, or there is nobody to choose between.
    """
    found = [
        Candidate(name, tuple(of_teacher)[resolve_layer(layer, tuple(of_teacher), f"model `{name}`")])
        for name, of_teacher in places.items()
        for layer in config.layers
    ]
    candidates = tuple(dict.fromkeys(found or [Candidate(name) for name in places]))
    if len(candidates) < max(2, config.k or 1):
        raise SpecError(
            f"`mst` routes between candidates, and there is {len(candidates)}: {candidates[0]}"
            if len(candidates) == 1
            else f"`mst.k` is {config.k}, and there are {len(candidates)} candidates",
            hint="name more `teachers`, more of `mst.layers`, or a smaller `mst.k`",
        )
    return candidates


class Mst(Objective):
    """MST-Distill in three stages, which are a function of the step.

    1. The student follows all teachers, as they are: mean over teachers of T²·KL(p_t ‖ p_s). With `mutual` each teacher
       learns as well: its cross entropy with the labels, plus T²·KL(p_o ‖ p_t) summed over all others o, the student
       among them.
    2. The same for the student; teachers stand still from now on. Each mask network learns to make its masked teacher
       imitate the student: T²·KL(p_s ‖ p_masked), without gradient to the student.
    3. Masks stand still. With divergences d_m = T²·KL(p_m ‖ p_s) to the masked teachers and gates g(z_s):
       `soft`: Σ_m g_m·d_m; `top-k`: the mean of d over the k largest gates; `random`, `uniform`: without gates; all as
       means over images. Plus `balance` times KL(uniform ‖ mean of g over images) where there is a gate.

    What differs from the published code, besides `soft`: teachers come trained, or, with `mutual`, as they are handed
    over; nobody's target gets a gradient; the student does not stop in stage 2, so that all arms of a study train for
    as many steps; it is the mean over teachers, not the sum, in stages 1 and 2; the gate has a GELU between its two
    layers, which are one otherwise, and reads the student without shaping it; the load balance is not divided by M;
    weights do not decay.

    Source: Li et al., arXiv:2507.07015, as in its published code, `main-MST-Distill.py` and `KD_methods/MST.py`
    (github.com/Gray-OREO/MST-Distill). Mutual learning: Zhang et al., arXiv:1706.00384, equations 2 to 6.
    """

    def __init__(self, config: MstConfig, parties: Parties) -> None:
        """
        Raises:
            SpecError: see `candidates_of`.
        """
        super().__init__()
        self.config = config
        self.teachers = tuple(parties.live)
        self.candidates = candidates_of(config, parties.live)
        first, second = config.stages
        self.ends = round(first * parties.n_steps), round((first + second) * parties.n_steps)
        self.masks = nn.ModuleList(
            MaskNet(parties.live[one.teacher][one.place]) for one in self.candidates if one.place
        )
        n_classes = parties.student.n_classes
        self.gate: nn.Module | None = None
        if config.routing in ("soft", "top-k"):
            self.gate = nn.Sequential(
                nn.Linear(n_classes, 2 * n_classes), nn.GELU(), nn.Linear(2 * n_classes, len(self.candidates))
            )
        self.stream: Tensor
        self.register_buffer("stream", torch.randint(2**62, (1,)))

    def stage(self, step: int) -> int:
        """1, 2 or 3."""
        first, second = self.ends
        return 1 if step < first else 2 if step < second else 3

    def forward(self, inputs: ObjectiveInputs) -> Tensor:
        assert inputs.live is not None
        stage = self.stage(inputs.step)
        if stage == 3:
            return self._routed(inputs, inputs.live)
        is_mutual = stage == 1 and self.config.mutual
        with torch.set_grad_enabled(is_mutual and torch.is_grad_enabled()):
            answers = {name: inputs.live.logits(name, is_trained=is_mutual) for name in self.teachers}
        loss = torch.stack([self._kd(inputs, inputs.student.logits, one) for one in answers.values()]).mean()
        if is_mutual:
            loss = loss + self._of_teachers(inputs, answers)
        if stage == 2 and self.masks:
            masked = self._masked(inputs.live)
            loss = loss + torch.stack([self._kd(inputs, one, inputs.student.logits) for one in masked]).mean()
        return loss

    def _kd(self, inputs: ObjectiveInputs, learner: Tensor, target: Tensor) -> Tensor:
        return kd_loss(learner, target, self.config.temperature, is_multi_label=inputs.is_multi_label)

    def _of_teachers(self, inputs: ObjectiveInputs, answers: Mapping[str, Tensor]) -> Tensor:
        assert inputs.labels is not None
        terms = []
        for name, answer in answers.items():
            labelled = cross_entropy(answer, inputs.labels, inputs.balance, inputs.mixed)
            others = [inputs.student.logits, *(one for other, one in answers.items() if other != name)]
            terms += [self._kd(inputs, answer, other) for other in others] + ([] if labelled is None else [labelled])
        return torch.stack(terms).sum()

    def _masked(self, live: LiveModels) -> list[Tensor]:
        """What the candidates say, [B, K] each."""
        masks: list[MaskNet | None] = list(self.masks) or [None] * len(self.candidates)  # type: ignore[arg-type]
        return [
            live.logits(one.teacher, place=one.place, mask=mask)
            for one, mask in zip(self.candidates, masks, strict=True)
        ]

    def _routed(self, inputs: ObjectiveInputs, live: LiveModels) -> Tensor:
        with torch.no_grad():
            answers = torch.stack(self._masked(live))
        divergences = divergences_from(
            inputs.student.logits, answers, self.config.temperature, is_multi_label=inputs.is_multi_label
        )
        if self.gate is None:
            return (self._ungated(inputs, divergences) * divergences).sum(dim=1).mean()
        gates = at_least_float32(self.gate(inputs.student.logits.detach())).softmax(dim=-1)
        weights = gates if self.config.routing == "soft" else best_of(gates, self.config.k or 1)
        routed = (weights * divergences).sum(dim=1).mean()
        return routed + self.config.balance * load_imbalance(gates)

    def _ungated(self, inputs: ObjectiveInputs, like: Tensor) -> Tensor:
        """Weights [B, M] of routing without a gate."""
        n_candidates = like.shape[1]
        if self.config.routing == "uniform":
            return torch.full_like(like, 1 / n_candidates)
        assert inputs.rows is not None
        chosen = chosen_by_chance(int(self.stream.item()), inputs.rows, inputs.step, n_candidates)
        return functional.one_hot(chosen, n_candidates).to(like)


def divergences_from(
    student_logits: Tensor, answers: Tensor, temperature: float, *, is_multi_label: bool = False
) -> Tensor:
    """T²·KL(softmax(z_m/T) ‖ softmax(z_s/T)) of each image and each candidate m, [B, M], float32 or wider.

    Args:
        student_logits: [B, K], any float dtype.
        answers: [M, B, K], which get no gradient.
        is_multi_label: each class is a question of its own; the mean over them is taken.

    Source: Hinton et al., arXiv:1503.02531, section 2.
    """
    n_candidates, n_images, _ = answers.shape
    targets = answers.detach().flatten(0, 1)
    predictions = student_logits.expand_as(answers).flatten(0, 1)
    if is_multi_label:
        targets, predictions = yes_and_no(targets), yes_and_no(predictions)
    log_p = functional.log_softmax(at_least_float32(predictions) / temperature, dim=-1)
    log_q = functional.log_softmax(at_least_float32(targets) / temperature, dim=-1)
    each = functional.kl_div(log_p, log_q, reduction="none", log_target=True).sum(dim=-1)
    return temperature**2 * each.view(n_candidates, n_images, -1).mean(dim=-1).T


def chosen_by_chance(stream: int, rows: Tensor, step: int, n_candidates: int) -> Tensor:
    """A candidate for each image, int64 [B]: a function of its row, the step and the run's stream, and of nothing else.

    So it is the same however a batch is cut into parts, and when a run is resumed.
    """
    of_images = split_mix(np.uint64(stream), rows.cpu().numpy().astype(np.uint64))
    drawn = split_mix(of_images, np.array([step + 1], dtype=np.uint64)) % np.uint64(n_candidates)
    return torch.from_numpy(drawn.astype(np.int64)).to(rows.device)


def best_of(gates: Tensor, k: int) -> Tensor:
    """1/k for the k largest gates of each image, 0 for the others: [B, M], without gradient.

    Source: published code of arXiv:2507.07015, `k_ways_MTGdistillation_detached`.
    """
    best = gates.topk(k, dim=1).indices
    return torch.zeros_like(gates).scatter(1, best, 1 / k).detach()


def load_imbalance(gates: Tensor) -> Tensor:
    """KL(uniform ‖ mean of the gates over images) = -log M - Σ log(mean gate)/M, [].

    The published code divides it by M once more: torch's `batchmean` of a vector.

    Args:
        gates: [B, M], each image's sum is 1.

    Source: published code of arXiv:2507.07015, `load_balancing_loss`.
    """
    mean = gates.mean(dim=0).clamp_min(torch.finfo(gates.dtype).tiny)
    return -mean.log().mean() - torch.tensor(float(len(mean)), device=mean.device).log()
