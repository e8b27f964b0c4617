"""Zero123++: six views at fixed poses from one image, denoised as one canvas.

The input view is view 0. Views 1 to 6 lie row by row in a canvas of three rows and two columns, which is encoded,
noised and denoised as one image. Each self-attention also reads the tokens of the reference, which is view 0 at a
size of its own. Source: Zero123++, arXiv 2310.15110, its published pipeline, and InstantMesh's training code.

Axes: B samples, V = 7 views, C channels, H W image pixels, h w latent cells of one view, T context tokens.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler, UNet2DConditionModel
from torch import Tensor

from cameo.adapters.common.diffusers_attention import set_kernel
from cameo.adapters.common.images import image_processor, process, processor_side
from cameo.adapters.common.latent_pipeline import LatentPipeline, reference_views
from cameo.adapters.common.noise_schedules import check_prediction_type
from cameo.adapters.common.sampler import sample_latents
from cameo.adapters.common.unet_layers import self_attentions
from cameo.adapters.zero123plus.cameras import NUM_VIEWS, by_canvas, from_canvas, pose_problem, to_canvas
from cameo.adapters.zero123plus.denoiser import ReferenceUNet, set_tile_position
from cameo.adapters.zero123plus.layers import check_references
from cameo.errors import ShapeError
from cameo.memory import sent_to
from cameo.pipeline import TrainingInputs

__all__ = ["Zero123PlusPipeline"]

IMAGE_MEAN, IMAGE_STD = 0.5, 0.8  # of the releases, against the usual 0.5 and 0.5 of [-1, 1]
LATENT_SHIFT, LATENT_SCALE = 0.22, 0.75
# The releases do not multiply the reference's latents by 0.18215, so it outweighs the noise for longer: 5 times in the
# paper, 5.49 times in the published pipeline.
REFERENCE_SCALE = 5.0


class Zero123PlusPipeline(LatentPipeline):
    """Six views at fixed poses from one image, with the components and the folder layout of the releases.

    Example:
        >>> from cameo.backbone import get_backbone
        >>> pipeline = get_backbone("zero123plus").build("tiny")
        >>> batch = {"images": torch.rand(1, 1, 3, 32, 32), "num_reference_views": 1}
        >>> pipeline.sample(batch, num_inference_steps=2).shape
        torch.Size([1, 6, 3, 32, 32])

    The network takes no cameras as input: it generates the poses it was trained on, those of `cameo.scenes.rigs`.

    Args:
        unet: turned into a `ReferenceUNet` here, in place; saved as the plain U-Net it was.
        scheduler: sampler and noise levels; the releases': Euler ancestral, v-prediction, linear betas. Another sampler
            may replace it later, other noise levels may not, since the U-Net noises the reference by the same.
        vae: `AutoencoderKL`; None works on pixels in [-1, 1], folded into channels by `patch_size`.
        vision_encoder: `CLIPVisionModelWithProjection`, whose global image embedding joins the context.
        text_encoder, tokenizer: for the context, the empty prompt; without them it is zero.
        feature_extractor_clip, feature_extractor_vae: `CLIPImageProcessor` of the two encoders; where they are
            missing those of the releases are made (for the VAE mean 0.5, standard deviation 0.8).
        ramping_coefficients: factor of the image embedding per context token; the releases bring 77 numbers. None
            with a vision encoder is a straight line from 0 to 1.
        reference_size: side in pixels at which the reference is encoded; an extractor's own size has precedence.
        patch_size: side of the pixel blocks that become one latent cell, without a VAE.
        safety_checker: not used; the releases list none under this name.
        position: "sincos" adds a map of positions behind the U-Net's first convolution, see
            `cameo.adapters.zero123plus.denoiser.TilePositionMap`; "none", as published, takes it off.
    """

    backbone = "zero123plus"
    model_cpu_offload_seq = "vision_encoder->text_encoder->unet->vae"
    _optional_components = [  # noqa: RUF012 - diffusers concatenates lists
        "vae",
        "vision_encoder",
        "text_encoder",
        "tokenizer",
        "feature_extractor_clip",
        "feature_extractor_vae",
        "safety_checker",
    ]

    def __init__(
        self,
        unet: UNet2DConditionModel,
        scheduler: Any,
        vae: Any = None,
        vision_encoder: Any = None,
        text_encoder: Any = None,
        tokenizer: Any = None,
        feature_extractor_clip: Any = None,
        feature_extractor_vae: Any = None,
        ramping_coefficients: list[float] | None = None,
        reference_size: int = 512,
        patch_size: int = 4,
        safety_checker: Any = None,
        position: str = "none",
    ) -> None:
        super().__init__()
        check_prediction_type(scheduler)
        if (text_encoder is None) != (tokenizer is None):
            raise ValueError("text_encoder and tokenizer: expected both or none of them")
        if vae is not None and feature_extractor_vae is None:
            feature_extractor_vae = image_processor(reference_size, mean=IMAGE_MEAN, std=IMAGE_STD)
        if vision_encoder is not None and feature_extractor_clip is None:
            feature_extractor_clip = image_processor(vision_encoder.config.image_size)
        if feature_extractor_vae is not None:
            reference_size = processor_side(feature_extractor_vae)
        self.register_modules(
            unet=unet,
            scheduler=scheduler,
            vae=vae,
            vision_encoder=vision_encoder,
            text_encoder=text_encoder,
            tokenizer=tokenizer,
            feature_extractor_clip=feature_extractor_clip,
            feature_extractor_vae=feature_extractor_vae,
            safety_checker=None,
        )
        self.register_to_config(
            ramping_coefficients=None if ramping_coefficients is None else list(ramping_coefficients),
            reference_size=reference_size,
            patch_size=patch_size,
            position=position,
        )
        _check_channels(self)
        multiple = self.latent_stride * 2 ** (len(unet.config.block_out_channels) - 1)
        if reference_size % multiple:
            raise ValueError(f"reference_size: expected a multiple of {multiple} pixels, got {reference_size}")
        set_tile_position(unet, position)
        ReferenceUNet.from_unet(unet, noise_scheduler=self.train_scheduler, **self._settings())

    def _settings(self) -> dict[str, Any]:
        return {"latent_stride": self.latent_stride, "reference_size": (self.config.reference_size,) * 2}

    @property
    def train_scheduler(self) -> DDPMScheduler:
        """Noise levels of training: those of the sampler, by integer time step."""
        return DDPMScheduler.from_config(self.scheduler.config)

    def save_pretrained(self, save_directory: Any, *args: Any, **options: Any) -> Any:
        """Write all components; the U-Net as diffusers' own class, so that the published pipeline loads it too.

        It loads it without a map of positions, though: with `position="sincos"` its output is another.
        """
        self.register_to_config(unet=("diffusers", "UNet2DConditionModel"))
        return super().save_pretrained(save_directory, *args, **options)

    def enable_xformers_memory_efficient_attention(self, attention_op: Any = None) -> None:
        """Use xformers' kernel on CUDA in the denoiser; elsewhere, where it has none, PyTorch's goes on."""
        set_kernel(self.unet, xformers=True, attention_op=attention_op)

    def disable_xformers_memory_efficient_attention(self) -> None:
        """Go back to PyTorch's kernel."""
        set_kernel(self.unet, xformers=False)

    def scale_image(self, images: Tensor) -> Tensor:
        """From [-1, 1] to the VAE's [-0.625, 0.625]; pixels without a VAE stay."""
        return images if self.vae is None else images * (0.5 / IMAGE_STD)

    def unscale_image(self, images: Tensor) -> Tensor:
        """Undo `scale_image`."""
        return images if self.vae is None else images / (0.5 / IMAGE_STD)

    def scale_latents(self, latents: Tensor) -> Tensor:
        """From the VAE's latents to the denoiser's, `0.75 (l - 0.22)` after the scaling factor; pixels stay."""
        return latents if self.vae is None else (super().scale_latents(latents) - LATENT_SHIFT) * LATENT_SCALE

    def unscale_latents(self, latents: Tensor) -> Tensor:
        """Undo `scale_latents`."""
        return latents if self.vae is None else super().unscale_latents(latents / LATENT_SCALE + LATENT_SHIFT)

    def encoded_together(self, num_views: int) -> list[list[int]]:
        """The reference, and the six views of the canvas."""
        return [[0], list(range(1, num_views))]

    def encode_unscaled(self, images: Tensor) -> Tensor:
        """As the base class; of seven views the last six, and six views, are encoded as one canvas."""
        return by_canvas(super().encode_unscaled, images)

    def decode(self, latents: Tensor) -> Tensor:
        """As the base class; of seven views the last six, and six views, are decoded as one canvas."""
        return by_canvas(super().decode, latents)

    def reference_latents(self, images: Tensor, dropped: Tensor | None = None) -> Tensor:
        """Encode images `[B, 3, H, W]` in [0, 1] at `reference_size`, `[B, C, h', w']`, unscaled as in the releases.

        `dropped` (bool `[B]`) gives these samples the image of guidance: zeros in the VAE's range, a mid gray.
        """
        size = self.config.reference_size
        if self.feature_extractor_vae is not None:
            pixels = process(self.feature_extractor_vae, images).to(images)
        else:
            pixels = images * 2 - 1
            if pixels.shape[-2:] != (size, size):
                pixels = F.interpolate(pixels, (size, size), mode="bicubic", antialias=True).clamp(-1, 1)
        if dropped is not None:
            pixels = torch.where(dropped[:, None, None, None], 0, pixels)
        latents = self.encode_unscaled(pixels[:, None])[:, 0]
        return latents if self.vae is not None else latents * REFERENCE_SCALE

    def context(self, images: Tensor, dropped: Tensor | None = None) -> Tensor:
        """Context `[B, T, D]`: the empty prompt, plus the ramp times the global image embedding if not `dropped`."""
        samples, width = images.shape[0], self.unet.config.cross_attention_dim
        ramp = self.config.ramping_coefficients
        if self.text_encoder is not None:
            tokens = self.tokenizer("", padding="max_length", truncation=True, return_tensors="pt").input_ids
            text = self.text_encoder(tokens.to(images.device))[0].to(images)
        else:
            text = images.new_zeros(1, 1 if ramp is None else len(ramp), width)
        text = text.expand(samples, -1, -1)
        if self.vision_encoder is None:
            return text
        pixels = process(self.feature_extractor_clip, images).to(next(self.vision_encoder.parameters()).dtype)
        embedding = self.vision_encoder(pixels).image_embeds.to(images)
        factors = torch.linspace(0, 1, text.shape[1]).to(images) if ramp is None else images.new_tensor(ramp)
        if len(factors) != text.shape[1]:
            raise ValueError(f"ramping_coefficients: expected one per token, {text.shape[1]}, got {len(factors)}")
        joined = text + embedding[:, None] * factors[:, None]
        return joined if dropped is None else torch.where(dropped[:, None, None], text, joined)

    def training_inputs(
        self,
        batch: Mapping[str, Any],
        *,
        generator: torch.Generator | None = None,
        timesteps: Tensor | None = None,
        noise: Tensor | None = None,
        condition_dropout: float = 0.0,
    ) -> TrainingInputs:
        """Noise the canvas of a batch and build the U-Net's input and target.

        Args:
            batch: `images [B, 7, 3, H, W]`, square, and `num_reference_views` = 1, see `cameo.data`.
            generator: source of time steps, noise and dropout; the same seed gives the same inputs.
            timesteps: integers `[B]`; default uniform over all noise levels.
            noise: `[B, 7, C, h, w]`; default standard normal. The entry of view 0 seeds the noise on the reference,
                which has a grid of its own.
            condition_dropout: probability of replacing a sample's reference by zeros and its context by the empty
                prompt, for classifier-free guidance. Guidance uses the same zeros, a mid gray after normalization;
                InstantMesh takes black images, and drops whole batches.

        Raises:
            ValueError: for another number of views or reference views; names the settings.
        """
        images: Tensor = batch["images"]
        self._check_batch(batch, images)
        self._check_poses(batch)
        self._check_unet()
        with torch.no_grad():
            clean = self.batch_latents(batch)
            timesteps, noise = self.draw(clean, generator, timesteps, noise)
            dropped = self.blank(images.shape[0], condition_dropout, generator, images.device)
            reference = self.reference_latents(images[:, 0], dropped)
            context = self.context(images[:, 0], dropped)
        schedule = self.train_scheduler
        target_views = torch.arange(NUM_VIEWS) >= 1
        noised = sent_to(images.device, target_views)[:, None, None, None]
        noisy = torch.where(noised, schedule.add_noise(clean, noise, timesteps), clean)
        target = self.denoising_target(clean, noise, timesteps)
        arguments = {"cond_lat": reference, "cond_noise": _noise_from(noise[:, 0], reference)}
        args = (to_canvas(noisy[:, 1:]), timesteps, context)
        kwargs = {"cross_attention_kwargs": arguments}
        return TrainingInputs(args, kwargs, noisy, target, target_views, timesteps)

    def prediction(self, output: Any, inputs: TrainingInputs) -> Tensor:
        """Views of the U-Net's canvas, `[B, 7, C, h, w]`; zeros for the reference."""
        views = from_canvas(output.sample)
        return torch.cat([torch.zeros_like(views[:, :1]), views], dim=1)

    def sample(self, batch: Mapping[str, Any], **options: Any) -> Tensor:
        """Generate the six views in order, `[B, 6, 3, H, W]` in [0, 1]; arguments as `sample_canvas`."""
        return from_canvas(self.sample_canvas(batch, **options))

    @torch.no_grad()
    def sample_canvas(
        self,
        batch: Mapping[str, Any],
        *,
        num_inference_steps: int = 28,
        guidance_scale: float = 1.0,
        generator: torch.Generator | None = None,
        progress: bool = False,
    ) -> Tensor:
        """Generate the canvas, `[B, 3, 3H, 2W]` in [0, 1]; 960 x 640 pixels for views of the released size.

        Args:
            batch: `num_reference_views` = 1 and `images [B, >= 1, 3, H, W]`, of which only the first is used;
                its size is that of the views.
            num_inference_steps: number of denoising steps of the pipeline's scheduler.
            guidance_scale: classifier-free guidance on the reference and its embedding; 1 switches it off, the
                published default is 4.
            generator: source of all noise, also that on the reference; the same seed gives the same canvas.
            progress: show a progress bar.
        """
        image: Tensor = batch["images"][:, 0]
        self._check_batch(batch, batch["images"], sampling=True)
        self._check_unet()
        guided = guidance_scale != 1
        if guided:  # the unconditional half first, as in the published pipeline
            image = torch.cat([image, image])
        samples = batch["images"].shape[0]
        dropped = (torch.arange(len(image), device=image.device) < samples) if guided else None
        reference, context = self.reference_latents(image, dropped), self.context(image, dropped)
        height, width = (side // self.latent_stride for side in image.shape[-2:])
        dtype = self.unet_dtype
        reference, context = reference.to(dtype), context.to(dtype)

        def predict(latents: Tensor, timestep: Tensor) -> list[Tensor]:
            noisy = (torch.cat([latents, latents]) if guided else latents).to(dtype)
            given = {"cond_lat": reference, "cond_noise": self.normal(reference.shape, generator, reference)}
            args = noisy, timestep.expand(len(noisy)), context
            predicted = self.unet(*args, cross_attention_kwargs=given, return_dict=False)[0]
            return list(predicted.chunk(2)[::-1]) if guided else [predicted]

        latents = sample_latents(
            self.scheduler,
            self.normal((samples, self.latent_channels, 3 * height, 2 * width), generator, image),
            predict,
            num_inference_steps=num_inference_steps,
            guidance_scale=guidance_scale,
            generator=generator,
            progress_bar=self.progress_bar if progress else None,
        )
        return super().decode(latents[:, None])[:, 0]

    def _check_batch(self, batch: Mapping[str, Any], images: Tensor, *, sampling: bool = False) -> None:
        if images.ndim != 5 or images.shape[2] != 3:
            raise ShapeError("images", expected="[B, V, 3, H, W]", got=images.shape)
        views = images.shape[1]
        if sampling:  # the images of the other views need not be there
            views = batch["extrinsics"].shape[1] if "extrinsics" in batch else NUM_VIEWS
        references = batch["num_reference_views"]
        if views != NUM_VIEWS or references != 1:
            raise ValueError(
                f"zero123plus generates 6 views from 1: expected {NUM_VIEWS} views and 1 reference view, got {views} "
                f"and {references}. Set num_views={NUM_VIEWS} and num_reference_views=1"
            )
        reference_views(batch, views)
        multiple = self.latent_stride * 2 ** (len(self.unet.config.block_out_channels) - 1)
        height, width = images.shape[-2:]
        if height != width or height % multiple:
            raise ShapeError("images", expected=f"squares with sides divisible by {multiple}", got=images.shape)

    def _check_unet(self) -> None:
        if type(self.unet) is UNet2DConditionModel:
            settings = ", ".join(f"{name}={value}" for name, value in self._settings().items())
            raise RuntimeError(
                "unet: is a plain UNet2DConditionModel, set after the pipeline was built; it sees no reference. Call "
                f"cameo.adapters.zero123plus.denoiser.ReferenceUNet.from_unet(pipeline.unet, {settings}), then "
                f"cameo.adapters.zero123plus.denoiser.set_tile_position(pipeline.unet, {self.config.position!r})"
            )
        check_references(self.unet)

    def _check_poses(self, batch: Mapping[str, Any]) -> None:
        """Warn once about cameras that no release was trained on, or from scratch about poses that differ."""
        if "extrinsics" not in batch or self.__dict__.get("_poses_checked"):
            return
        self._poses_checked = True
        # Only what is trained from scratch works on pixels: each release has a VAE.
        if problem := pose_problem(batch["extrinsics"], up=batch.get("up"), released=self.vae is not None):
            warnings.warn(problem, stacklevel=3)


def _noise_from(entries: Tensor, like: Tensor) -> Tensor:
    """Standard normal noise like `like` `[B, ...]`, a function of the first two numbers of `entries` `[B, ...]`."""
    seeds = entries.flatten(1)[:, :2].float().cpu().contiguous().view(torch.int64)[:, 0].tolist()
    drawn = [torch.randn(like.shape[1:], generator=torch.Generator().manual_seed(seed)) for seed in seeds]
    return torch.stack(drawn).to(like)


def _check_channels(pipeline: Zero123PlusPipeline) -> None:
    config, expected = pipeline.unet.config, pipeline.latent_channels
    if (config.in_channels, config.out_channels) != (expected, expected):
        raise ValueError(
            f"unet: expected {expected} input and output channels, got {config.in_channels} and {config.out_channels}"
        )
    if not self_attentions(pipeline.unet):
        raise ValueError(f"unet: this {type(pipeline.unet).__name__} has no self-attention that could read a reference")
    widths = {
        "vision_encoder": getattr(getattr(pipeline.vision_encoder, "config", None), "projection_dim", None),
        "text_encoder": getattr(getattr(pipeline.text_encoder, "config", None), "hidden_size", None),
    }
    for name, width in widths.items():
        if width not in (None, config.cross_attention_dim):
            raise ValueError(
                f"{name}: expected embeddings of width {config.cross_attention_dim}, as the U-Net's "
                f"cross_attention_dim, got {width}"
            )
