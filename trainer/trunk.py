"""The shape that teacher and student trunks have in common: a pre-norm ViT."""

from typing import Annotated, Self

from pydantic import Field, model_validator

from dla_cache.spec import StrictModel


class TrunkConfig(StrictModel):
    """Shape of a ViT; the defaults are ViT-B/16 at 224 pixels."""

    n_classes: Annotated[int, Field(gt=0)]
    image_size: Annotated[int, Field(gt=0)] = 224
    """Side of the square image in pixels."""
    patch_size: Annotated[int, Field(gt=0)] = 16
    width: Annotated[int, Field(gt=0)] = 768
    depth: Annotated[int, Field(gt=0)] = 12
    n_heads: Annotated[int, Field(gt=0)] = 12
    mlp_ratio: Annotated[int, Field(gt=0)] = 4
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.1
    position_std: Annotated[float, Field(gt=0)] = 0.02
    """Initial scale of all learned positions, a normal cut at 2. At small width .02 drowns beside patch tokens."""

    @model_validator(mode="after")
    def _patches_and_heads_fit(self) -> Self:
        if self.has_patches and self.image_size % self.patch_size:
            raise ValueError(f"patches of {self.patch_size} do not tile an image of {self.image_size} pixels")
        if self.width % self.n_heads:
            raise ValueError(f"`width` {self.width} is no multiple of `n_heads` {self.n_heads}")
        return self

    @property
    def has_patches(self) -> bool:
        """Whether it cuts images into patches itself."""
        return True

    @property
    def n_patches(self) -> int:
        """Patches of one image."""
        return (self.image_size // self.patch_size) ** 2
