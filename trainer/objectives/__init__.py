"""What a student is trained on: a weighted sum of named objectives."""

from collections.abc import Mapping
from itertools import chain
from typing import Self

from pydantic import model_validator
from torch import Tensor, nn

from dla_cache.spec import StrictModel
from trainer.features import Target
from trainer.objectives.ce import CeConfig
from trainer.objectives.crd import CrdConfig
from trainer.objectives.decoupled import DkdConfig, NkdConfig
from trainer.objectives.dho import DhoConfig
from trainer.objectives.dist import DistConfig
from trainer.objectives.fd_cmkd import FdCmkdConfig
from trainer.objectives.hints import AttentionConfig, FitnetsConfig, VidConfig
from trainer.objectives.kd import GeneralizedDistillationConfig, KdConfig, StandardisedKdConfig
from trainer.objectives.latents import LatentsConfig
from trainer.objectives.messy import MessyConfig
from trainer.objectives.objective import ModelOutline, Need, Objective, ObjectiveInputs, Parties, TermConfig
from trainer.objectives.ofa import OfaConfig
from trainer.objectives.relations import PktConfig, RkdConfig, SpConfig


class ObjectiveConfig(StrictModel):
    """The registry, and which of it are active: an objective that is absent takes no part."""

    ce: CeConfig | None = None
    kd: KdConfig | None = None
    messy: MessyConfig | None = None
    standardised_kd: StandardisedKdConfig | None = None
    generalized_distillation: GeneralizedDistillationConfig | None = None
    dkd: DkdConfig | None = None
    nkd: NkdConfig | None = None
    dist: DistConfig | None = None
    ofa: OfaConfig | None = None
    dho: DhoConfig | None = None
    rkd: RkdConfig | None = None
    sp: SpConfig | None = None
    pkt: PktConfig | None = None
    latents: LatentsConfig | None = None
    fitnets: FitnetsConfig | None = None
    attention: AttentionConfig | None = None
    vid: VidConfig | None = None
    crd: CrdConfig | None = None
    fd_cmkd: FdCmkdConfig | None = None

    @model_validator(mode="after")
    def _teaches_something(self) -> Self:
        if not self.active:
            raise ValueError(f"no objective is active; there are {list(type(self).model_fields)}")
        return self

    @property
    def active(self) -> dict[str, TermConfig]:
        """Name → config of the objectives that take part."""
        configs = {name: getattr(self, name) for name in type(self).model_fields}
        return {name: config for name, config in configs.items() if config is not None}

    @property
    def needs(self) -> frozenset[Need]:
        """All that the active objectives must be given."""
        return frozenset().union(*(config.needs for config in self.active.values()))

    @property
    def modalities(self) -> tuple[str, ...]:
        """Modalities whose latents the objectives read themselves."""
        return tuple(dict.fromkeys(name for config in self.active.values() for name in config.latents))

    @property
    def is_of_labels(self) -> bool:
        """Whether nothing is learned from an image without a label."""
        return all(config.is_of_labels for config in self.active.values())

    def targets(self, reference: ModelOutline) -> tuple[Target, ...]:
        """What a model must be asked about a batch, each once.

        Raises:
            SpecError: if it cannot say it.
        """
        return tuple(dict.fromkeys(target for config in self.active.values() for target in config.targets(reference)))


class WeightedSum(nn.Module):
    """The active objectives as modules, fitted to who takes part."""

    def __init__(self, config: ObjectiveConfig, parties: Parties) -> None:
        """
        Raises:
            SpecError: if an objective asks for what student or reference have not.
        """
        super().__init__()
        self.config = config
        self.wanted = {
            name: one.targets(parties.teacher()) if Need.REFERENCE in one.needs else ()
            for name, one in config.active.items()
        }
        self.targets = tuple(dict.fromkeys(chain.from_iterable(self.wanted.values())))
        self.terms = nn.ModuleDict({name: one.build(parties) for name, one in config.active.items()})

    def set_statistics(self, modality: str, mean: Tensor, std: Tensor) -> None:
        """Hands the statistics of a modality, [C] each, to all that read its latents."""
        for name, config in self.config.active.items():
            if modality in config.latents:
                objective: Objective = self.terms[name]  # type: ignore[assignment]
                objective.set_statistics(modality, mean, std)

    def forward(self, inputs: ObjectiveInputs) -> dict[str, Tensor]:
        """Each active objective's weighted loss [] by its name, or `name.part` of one that has parts; what has nothing
        to say on this batch is left out.

        Raises:
            ValueError: if an active objective lacks an input: it must not drop out without a word.
        """
        losses: dict[str, Tensor] = {}
        for name, config in self.config.active.items():
            lacking = inputs.lacks(config, self.wanted[name])
            if lacking:
                raise ValueError(f"the active objective `{name}` lacks {lacking}")
            loss = self.terms[name](inputs)
            parts = {name: loss} if loss is None or isinstance(loss, Tensor) else under(name, loss)
            losses |= {part: config.weight * value for part, value in parts.items() if value is not None}
        return losses


def under(name: str, parts: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The parts of an objective, as `name.part`."""
    return {f"{name}.{part}": loss for part, loss in parts.items()}


__all__ = [
    "ModelOutline",
    "Need",
    "Objective",
    "ObjectiveConfig",
    "ObjectiveInputs",
    "Parties",
    "TermConfig",
    "WeightedSum",
]
