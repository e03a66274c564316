"""CRD: an image's features are told from those of thousands of others, which a memory keeps.

Dimensions: B images of a batch, M negatives, R rows of the store, E width of the embeddings.
"""

import math
from typing import Annotated, ClassVar

import torch
from pydantic import Field
from torch import Tensor, distributed
from torch.nn import functional

from dla_cache.errors import SpecError
from trainer.counters import uniform_numbers
from trainer.features import Target
from trainer.objectives.distances import TEMPERATURE, unit
from trainer.objectives.layer_pairs import LayerPair
from trainer.objectives.objective import ModelOutline, Need, Objective, ObjectiveInputs, Parties, TermConfig
from trainer.objectives.projectors import make_projector
from trainer.precision import at_least_float32

WIDTH = 128
"""E."""

MOMENTUM = 0.5
"""Share of what the memory held of an image when it is seen again."""


class CrdConfig(TermConfig):
    """Weight of the term, which features, and how many others they are told from; the defaults are the published."""

    needs: ClassVar[frozenset[Need]] = frozenset({Need.REFERENCE, Need.STUDENT_BLOCKS})
    weight: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 0.8
    pair: LayerPair = LayerPair()
    """Whose features: of the last blocks, pooled."""
    negatives: Annotated[int, Field(gt=0)] = 16_384
    """Drawn with replacement, once for all images of a batch; a step's cost grows with them."""
    temperature: Annotated[float, Field(gt=0, allow_inf_nan=False)] = TEMPERATURE
    """That cosines are divided by."""

    def targets(self, reference: ModelOutline) -> tuple[Target, ...]:
        return (self.pair.target(reference, "pooled", "crd"),)

    def build(self, parties: Parties) -> Objective:
        return Crd(self, parties)


class Crd(Objective):
    """`nce_loss` of the student's embeddings against the memory of the reference's, plus the other way round.

    Both sides are Linear → length 1, 128 wide. After a step's loss the memory of its images moves halfway to what they
    are now. Memory, and the scale that the first batch sets, are buffers: a checkpoint brings them along, and the
    negatives of a step are a function of the run's seed and its number, so a resumed run goes on to the bit.

    As published, an image is never told from itself, nor from one of its own class. Of one without a label only the
    former is known, and of images with several classes no more is asked.

    Two deviations from the published code: negatives are drawn among images that training has shown, since the store's
    rows are those of all splits; and once for a batch instead of for each of its images, which makes one product of
    matrices of what would be B·M·E numbers to gather. Those that are none to an image are left out of its sum, and the
    others count for M.

    Source: Tian et al., arXiv:1910.10699, equation 18 as its code has it: HobbitLong/RepDistiller, `crd/criterion.py`,
    `crd/memory.py`, and `CIFAR100InstanceSample` of `dataset/cifar100.py`.
    """

    of_student: Tensor
    of_reference: Tensor
    log_scales: Tensor
    has_scales: Tensor
    is_shown: Tensor
    classes: Tensor

    def __init__(self, config: CrdConfig, parties: Parties) -> None:
        """
        Raises:
            SpecError: if a model has not the blocks, or several processes train together.
        """
        super().__init__()
        if distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1:
            raise SpecError(
                "`crd` keeps a memory of all images, and each of several processes would keep its own",
                hint="train in one process; `loop.accumulation` makes large batches there",
            )
        self.config = config
        self.pair = config.pair.fitted(parties, "pooled", "crd")
        self.embed_student = make_projector(self.pair.student_width, WIDTH, "linear")
        self.embed_reference = make_projector(self.pair.target_width, WIDTH, "linear")
        # No buffer: it is drawn anew, the same, when a run is resumed, and reading it never waits for a GPU.
        self.seed = int(torch.randint(2**31, ()))
        side = math.sqrt(3 / WIDTH)  # of a uniform distribution with vectors of length 1 on average
        for name in ("of_student", "of_reference"):
            self.register_buffer(name, torch.empty(parties.n_images, WIDTH).uniform_(-side, side))
        self.register_buffer("log_scales", torch.zeros(2))
        self.register_buffer("has_scales", torch.tensor(False))
        self.register_buffer("is_shown", torch.zeros(parties.n_images, dtype=torch.bool))
        self.register_buffer("classes", torch.full((parties.n_images,), -1))

    def forward(self, inputs: ObjectiveInputs) -> Tensor:
        if inputs.rows is None:
            raise ValueError("the active objective `crd` lacks the images' rows")
        rows, target = inputs.rows, inputs.targets[self.pair.target].detach()
        student = unit(at_least_float32(self.embed_student(self.pair.of_student(inputs.student))))
        reference = unit(at_least_float32(self.embed_reference(target)))
        # In any other precision than float32 negatives that are close would look alike.
        with torch.autocast(student.device.type, enabled=False):
            self.is_shown.index_fill_(0, rows, True)
            if inputs.labels is not None and not inputs.is_multi_label:
                self.classes.index_copy_(0, rows, inputs.labels)
            others = self.draw_negatives(inputs.step)
            scores = [
                self.scores_of(embedding, memory, rows, others)
                for embedding, memory in ((student, self.of_reference), (reference, self.of_student))
            ]
            self._keep_scales(scores)
            loss = torch.stack([nce_loss(*pair) for pair in zip(scores, self.log_scales.clone(), strict=True)]).sum()
            self._remember(rows, student, reference)
        return loss

    def draw_negatives(self, step: int) -> Tensor:
        """Rows [M] of images that training has shown, those of this step among them."""
        fractions = draw_fractions(self.seed, step, self.config.negatives)
        n_up_to = self.is_shown.cumsum(0)
        numbers = (fractions.to(n_up_to.device) * n_up_to[-1]).long()
        return torch.searchsorted(n_up_to, numbers, right=True)

    def scores_of(self, embeddings: Tensor, memory: Tensor, rows: Tensor, others: Tensor) -> Tensor:
        """Cosines over the temperature, [B, 1 + M]: with the image's own row of a memory first, then the negatives',
        -inf of those that are itself or of its class."""
        own = (embeddings * memory[rows]).sum(dim=1, keepdim=True)
        classes = self.classes[rows][:, None]
        is_none = (rows[:, None] == others) | ((classes == self.classes[others]) & (classes >= 0))
        of_others = (embeddings @ memory[others].T).masked_fill(is_none, -math.inf)
        return torch.cat([own, of_others], dim=1) / self.config.temperature

    @torch.no_grad()
    def _keep_scales(self, scores: list[Tensor]) -> None:
        """Takes the mean of exp(score) as the scale of each side, once and for all."""
        first = torch.stack([side.logsumexp(dim=(0, 1)) - side.isfinite().sum().log() for side in scores])
        self.log_scales.copy_(torch.where(self.has_scales, self.log_scales, first))
        self.has_scales.fill_(True)

    @torch.no_grad()
    def _remember(self, rows: Tensor, student: Tensor, reference: Tensor) -> None:
        if not self.training:
            return
        for memory, seen in ((self.of_student, student), (self.of_reference, reference)):
            memory.index_copy_(0, rows, unit(MOMENTUM * memory[rows] + (1 - MOMENTUM) * seen))


@torch.compiler.disable  # type: ignore[untyped-decorator]
def draw_fractions(seed: int, step: int, n_numbers: int) -> Tensor:
    """Numbers [n] in [0, 1), float64; torch.compile cannot look into how they are made."""
    return torch.from_numpy(uniform_numbers(seed, [""], step, n_numbers, purpose="crd")[0])


def nce_loss(scores: Tensor, log_scale: Tensor) -> Tensor:
    """-log h(own) - Σ over negatives of log(1 - h), mean over images, where h = r / (r + M) and r = exp(score) / scale.

    The published r has the number of images in its scale and M over that number beside it: it drops out. Computed as
    the sigmoid of score - log scale - log M, which no score overflows. The sum over negatives is M times their mean, so
    that the loss of images with fewer of them is of the same size.

    Args:
        scores: [B, 1 + M], the image's own first; -inf of one that is no negative.
        log_scale: [].

    Returns:
        [].
    """
    n_drawn = scores.shape[1] - 1
    logits = scores - log_scale - math.log(n_drawn)
    own, others = functional.logsigmoid(logits[:, 0]), functional.logsigmoid(-logits[:, 1:])
    n_told_from = scores[:, 1:].isfinite().sum(dim=1).clamp_min(1)
    return -(own + others.sum(dim=1) * n_drawn / n_told_from).mean()
