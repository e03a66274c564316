"""A classifier on one of the student's blocks, trained beside it and thrown away.

Dimensions: B images, D width of a block, K classes.
"""

from torch import Tensor, nn

from trainer.features import CLS, IMAGE, Features
from trainer.objectives.objective import ModelOutline
from trainer.objectives.projectors import Projector, make_projector
from trainer.precision import at_least_float32


class StageHead(nn.Module):
    """A block's CLS, or the mean of its image tokens, layer-normed, through a projector to logits [B, K]."""

    def __init__(self, student: ModelOutline, block: int, kind: Projector) -> None:
        super().__init__()
        self.block = block
        self.span = CLS if CLS in student.spans else IMAGE
        width = student.width(block)
        self.norm = nn.LayerNorm(width)
        self.projector = make_projector(width, student.n_classes, kind, hidden=width)

    def forward(self, student: Features) -> Tensor:
        assert student.spans is not None
        tokens = student.blocks[self.block][:, student.spans[self.span]]
        logits: Tensor = self.projector(self.norm(at_least_float32(tokens).mean(dim=1)))
        return logits
