"""Three-dimensional form: Shap-E."""

from dla_cache.modality import Modality
from dla_cache.sources.catalog.entry import PipelineRow, SourceEntry

ENTRIES = {
    "shap-e-img2img": SourceEntry(
        Modality.SHAPE,
        "dla_cache.sources.diffusers_source:DiffusersSource",
        "weights of a radiance field by Shap-E from one image, 64 steps, each four neighbouring tokens as their mean",
        "MIT, see model card",
        "by default four tokens are made one, which no decoder takes: whole ones are 1024 x 1024, 2.7 TB for ImageNet",
        model="openai/shap-e-img2img",
        size="256 x 1024 float16",
        bytes_per_image=2 * 256 * 1024,
        row=PipelineRow(
            pipeline="ShapEImg2ImgPipeline",
            output="images",
            axes=("token", "channel"),
            space=(
                "tokens of Shap-E's latent, within ~1, each a mean of neighbours unless `pooled_tokens` is 0;"
                " unpooled [1024, 1024], four layers of 256, `shap_e_renderer.decode_to_mesh` of the pipeline takes it"
            ),
            view_size=224,
            settings={"num_inference_steps": 64, "guidance_scale": 3.0},
            fix_up_settings={"pooled_tokens": 256},
            call={"output_type": "latent"},
            # What decodes is not even loaded.
            load={"shap_e_renderer": None},
            guard=(),
            image_form="fix-up",
            schedulers=("HeunDiscreteScheduler",),
            fix_up="dla_cache.sources.shap_e:EveryImage",
            tolerance=5e-4,
        ),
    ),
}
