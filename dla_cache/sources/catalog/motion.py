"""How an image may move: latents of videos that begin with it, with a text and without."""

from dla_cache.modality import Modality
from dla_cache.sources.catalog.entry import CAPTIONER, PipelineRow, SourceEntry
from dla_cache.spec import Axis

SOURCE = "dla_cache.sources.diffusers_source:DiffusersSource"
AXES: tuple[Axis, ...] = ("frame", "channel", "height", "width")
REDUCED = "; fewer of them by `kept_frames`, means of squares by `pooled_by`; whole ones (0 and 1)"


def stable_video(model: str, n_frames: int, *, kept_frames: int) -> SourceEntry:
    """One checkpoint of Stable Video Diffusion, which makes so many frames."""
    return SourceEntry(
        Modality.MOTION,
        SOURCE,
        f"{kept_frames} of {n_frames} frames by Stable Video Diffusion, 25 steps, each four places as their mean",
        "Stability AI Community License; see model card",
        f"by default {kept_frames} of {n_frames} frames are kept and places pooled, which no decoder takes: whole ones"
        f" are {n_frames} x 4 x 72 x 72",
        model=model,
        size=f"{kept_frames} x 4 x 36 x 36 float16",
        bytes_per_image=2 * kept_frames * 4 * 36 * 36,
        row=PipelineRow(
            pipeline="StableVideoDiffusionPipeline",
            output="frames",
            axes=AXES,
            space=(
                "frames of a video, of a VAE whose decoder looks at several of them, scaled by its `scaling_factor`"
                f"{REDUCED} `decode_latents` of the pipeline divides and decodes"
            ),
            view_size=576,
            settings={
                "num_frames": n_frames,
                "num_inference_steps": 25,
                "min_guidance_scale": 1.0,
                "max_guidance_scale": 3.0,
                "fps": 7,
                "motion_bucket_id": 127,
                "noise_aug_strength": 0.02,
            },
            fix_up_settings={"kept_frames": kept_frames, "pooled_by": 2},
            call={"output_type": "latent"},
            side_arguments=("height", "width"),
            schedulers=("EulerDiscreteScheduler",),
            guard=("vae.decode", "decode_latents"),
            fix_up="dla_cache.sources.video:FewerFrames",
            # Every frame goes through the UNet twice and at once, so that a few images fill a device.
            largest_batch=4,
            tolerance=5e-4,
        ),
    )


ENTRIES = {
    "svd": stable_video("stabilityai/stable-video-diffusion-img2vid", 14, kept_frames=7),
    "svd-xt": stable_video("stabilityai/stable-video-diffusion-img2vid-xt", 25, kept_frames=5),
    "ltx-video": SourceEntry(
        Modality.VIDEO,
        SOURCE,
        "one second of video by LTX-Video from the image and its caption, 50 steps",
        "LTX-Video Open Weights License; see model card",
        "the first of the four frames is the image itself",
        model="Lightricks/LTX-Video",
        size="1024 x 128 float16",
        bytes_per_image=2 * 1024 * 128,
        row=PipelineRow(
            pipeline="LTXImageToVideoPipeline",
            output="frames",
            axes=("token", "channel"),
            space=(
                "frames of a video, normalised by mean and deviation of the VAE of LTX-Video and packed: tokens are the"
                " places of one frame after another; `_unpack_latents`, `_denormalize_latents`, `vae.decode` of the"
                " pipeline give frames"
            ),
            view_size=512,
            settings={
                "num_frames": 25,
                "frame_rate": 25,
                "num_inference_steps": 50,
                "guidance_scale": 3.0,
                "negative_prompt": "worst quality, inconsistent motion, blurry, jittery, distorted",
            },
            fix_up_settings={"kept_frames": 0},
            call={"output_type": "latent"},
            side_arguments=("height", "width"),
            text_argument="prompt",
            captioner=CAPTIONER,
            schedulers=("FlowMatchEulerDiscreteScheduler",),
            fix_up="dla_cache.sources.video:FewerPackedFrames",
            largest_batch=4,
            tolerance=1e-5,
        ),
    ),
    "cogvideox-i2v": SourceEntry(
        Modality.VIDEO,
        SOURCE,
        "6 seconds of video by CogVideoX-5b from the image and its caption, 50 steps, 4 of 13 frames, each four"
        " places as their mean",
        "CogVideoX License; see model card",
        "by default 4 of 13 frames are kept and places pooled, which no decoder takes: whole ones are 13 x 16 x 60 x"
        " 60. The view stands in a frame of 720 x 480, its mirror image on both sides",
        model="THUDM/CogVideoX-5b-I2V",
        size="4 x 16 x 30 x 30 float16",
        bytes_per_image=2 * 4 * 16 * 30 * 30,
        row=PipelineRow(
            pipeline="CogVideoXImageToVideoPipeline",
            output="frames",
            axes=AXES,
            space=(
                "frames of a video, of the VAE of CogVideoX, scaled by its `scaling_factor`, the square of the view cut"
                f" out of them{REDUCED} `decode_latents` of the pipeline divides and decodes"
            ),
            view_size=480,
            settings={"num_frames": 49, "num_inference_steps": 50, "guidance_scale": 6.0, "use_dynamic_cfg": False},
            fix_up_settings={"kept_frames": 4, "pooled_by": 2},
            call={"output_type": "latent"},
            image_form="fix-up",
            text_argument="prompt",
            captioner=CAPTIONER,
            schedulers=("CogVideoXDDIMScheduler", "CogVideoXDPMScheduler"),
            guard=("vae.decode", "decode_latents"),
            fix_up="dla_cache.sources.video:InWideFrame",
            largest_batch=1,
            tolerance=1e-4,
        ),
    ),
}
