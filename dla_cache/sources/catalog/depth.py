"""Marigold: depth, normals and intrinsics of an image, as latents of the VAE of Stable Diffusion 2."""

from dla_cache.modality import Modality
from dla_cache.sources.catalog.entry import PipelineRow, SourceEntry

LICENCE_LCM = "Apache-2.0, on weights of Stable Diffusion 2 (CreativeML Open RAIL++-M)"
LICENCE = "CreativeML Open RAIL++-M"
SPACE = (
    "{what}, of the VAE of Stable Diffusion 2, scaled by its `scaling_factor`; divide by it, then `vae.decode`"
    " of the pipeline gives three channels"
)
VIEW = 768


def marigold(
    modality: Modality, pipeline: str, model: str, *, what: str, steps: int, n_latents: int = 1, licence: str = LICENCE
) -> SourceEntry:
    """One checkpoint of Marigold.

    Args:
        n_latents: latents of four channels that lie behind one another: intrinsics have several.
    """
    side = VIEW // 8
    return SourceEntry(
        modality,
        "dla_cache.sources.diffusers_source:DiffusersSource",
        f"{what} by Marigold, {steps} steps, stopped before the VAE's decoder",
        licence,
        model=model,
        size=f"{4 * n_latents} x {side} x {side} float16",
        bytes_per_image=2 * 4 * n_latents * side * side,
        row=PipelineRow(
            pipeline=pipeline,
            output="latent",
            axes=("channel", "height", "width"),
            space=SPACE.format(what=what),
            view_size=VIEW,
            settings={"num_inference_steps": steps},
            # The view is as large as it is to be: 0 leaves it so.
            call={"output_latent": True, "processing_resolution": 0, "match_input_resolution": False},
            image_form="pil",
            batch_argument="batch_size",
            schedulers=("DDIMScheduler", "LCMScheduler"),
            fix_up="dla_cache.sources.marigold:WithoutDecoding",
            tolerance=1e-5,
        ),
    )


DEPTH, NORMALS, INTRINSICS = "MarigoldDepthPipeline", "MarigoldNormalsPipeline", "MarigoldIntrinsicsPipeline"

ENTRIES = {
    "marigold-depth-lcm": marigold(
        Modality.DEPTH, DEPTH, "prs-eth/marigold-depth-lcm-v1-0", what="depth", steps=4, licence=LICENCE_LCM
    ),
    "marigold-depth": marigold(Modality.DEPTH, DEPTH, "prs-eth/marigold-depth-v1-1", what="depth", steps=4),
    "marigold-normals-lcm": marigold(
        Modality.NORMALS, NORMALS, "prs-eth/marigold-normals-lcm-v0-1", what="normals", steps=4, licence=LICENCE_LCM
    ),
    "marigold-normals": marigold(Modality.NORMALS, NORMALS, "prs-eth/marigold-normals-v1-1", what="normals", steps=4),
    "marigold-intrinsics-appearance": marigold(
        Modality.INTRINSICS,
        INTRINSICS,
        "prs-eth/marigold-iid-appearance-v1-1",
        what="albedo and material",
        steps=4,
        n_latents=2,
    ),
    "marigold-intrinsics-lighting": marigold(
        Modality.INTRINSICS,
        INTRINSICS,
        "prs-eth/marigold-iid-lighting-v1-1",
        what="albedo, shading and residual",
        steps=4,
        n_latents=3,
    ),
}
