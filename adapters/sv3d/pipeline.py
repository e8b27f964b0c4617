"""SV3D as a pipeline: an orbit of views from one image, on `SV3DUNet` with the noise levels of EDM.

Axes: B samples, V views in the order of the batch (reference first), T = V frames in the order of the U-Net
(reference last), C channels, h w latent cells, D channels of the image embedding.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKLTemporalDecoder, EulerDiscreteScheduler, UNetSpatioTemporalConditionModel
from einops import rearrange, repeat
from torch import Tensor

from cameo.adapters.common.diffusers_attention import set_kernel
from cameo.adapters.common.latent_pipeline import LatentPipeline, reference_views
from cameo.adapters.common.positions import set_position
from cameo.adapters.common.sampler import sample_latents
from cameo.adapters.sv3d.cameras import orbit_angles
from cameo.adapters.sv3d.denoiser import SV3DUNet
from cameo.errors import unknown_name
from cameo.pipeline import TrainingInputs

__all__ = ["SV3DPipeline", "triangle_scale"]

CONDITION_NOISE = 1e-5  # as published: negligible, but an input that the U-Net was trained with
CLIP_MEAN, CLIP_DEVIATION = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


class SV3DPipeline(LatentPipeline):
    """Novel views on an orbit, from one reference view and cameras.

    Example:
        >>> from cameo.backbone import get_backbone
        >>> pipeline = get_backbone("sv3d").build("tiny")
        >>> batch = {
        ...     "images": torch.rand(1, 3, 3, 32, 32),
        ...     "extrinsics": torch.eye(4).expand(1, 3, 4, 4),
        ...     "num_reference_views": 1,
        ... }
        >>> pipeline.sample(batch, num_inference_steps=2).shape
        torch.Size([1, 2, 3, 32, 32])

    Noise levels are those of EDM (arXiv 2206.00364): frames are `x = x0 + s n`, the U-Net F takes `c_in x` and
    `c_noise = ln(s) / 4`, and the clean frames are `D = c_skip x + c_out F` with `c_skip = 1 / (s^2 + 1)`,
    `c_out = -s / sqrt(s^2 + 1)`, `c_in = 1 / sqrt(s^2 + 1)`. The published weight of the squared error of D is
    `(s^2 + 1) / s^2 = 1 / c_out^2`, so it is the plain squared error of F with the target
    `(x0 - c_skip x) / c_out = (n - s x0) / sqrt(s^2 + 1)`, a velocity.

    Time step t of T stands for the quantile `(t + 1/2) / T` of the log-normal distribution that noise levels are
    drawn from, so uniform time steps give that distribution. Its parameters for SV3D are not published; the defaults
    are those that public code for fine-tuning Stable Video Diffusion takes from its paper.

    Camera angles are those of `cameo.adapters.sv3d.cameras.orbit_angles`, with the `up` of the batch, or an estimate
    where it has none.

    Args:
        unet: `SV3DUNet`; a `UNetSpatioTemporalConditionModel` with SV3D's embedding becomes one and shares its weights.
        scheduler: for sampling, see `cameo.adapters.common.noise_schedules.edm_euler`.
        vae: `AutoencoderKL` or `AutoencoderKLTemporalDecoder`; None works on pixels, folded into channels.
        image_encoder: `CLIPVisionModelWithProjection`; None gives the cross-attention zeros.
        patch_size: side of the pixel blocks that become one latent cell, without a VAE.
        noise_mean, noise_deviation: of the logarithm of the noise level in training.
        position: "sincos" adds a map of positions behind the U-Net's first convolution, see
            `cameo.adapters.common.positions`; "none", as published, takes it off.
        prediction_type: what F predicts: "v_prediction", the velocity above, as published, or "sample", the clean
            frames D with the plain squared error, which the narrowest U-Nets learn best (arXiv 2511.13720).
    """

    backbone = "sv3d"
    model_cpu_offload_seq = "image_encoder->unet->vae"
    _optional_components = ["vae", "image_encoder"]  # noqa: RUF012 - diffusers concatenates lists

    def __init__(
        self,
        unet: UNetSpatioTemporalConditionModel,
        scheduler: EulerDiscreteScheduler,
        vae: Any = None,
        image_encoder: Any = None,
        patch_size: int = 4,
        noise_mean: float = 0.7,
        noise_deviation: float = 1.6,
        position: str = "none",
        prediction_type: str = "v_prediction",
    ) -> None:
        super().__init__()
        if prediction_type not in ("v_prediction", "sample"):
            raise unknown_name("prediction_type", prediction_type, ("v_prediction", "sample"))
        settings = scheduler.config
        if (settings.prediction_type, settings.get("timestep_type")) != ("v_prediction", "continuous"):
            raise ValueError(
                "scheduler: expected an EulerDiscreteScheduler with prediction_type='v_prediction' and "
                f"timestep_type='continuous', got {settings.prediction_type!r} and {settings.get('timestep_type')!r}; "
                "use cameo.adapters.common.noise_schedules.edm_euler()"
            )
        if type(unet) is UNetSpatioTemporalConditionModel:
            unet = SV3DUNet.from_plain(unet)
        channels = vae.config.latent_channels if vae is not None else 3 * patch_size**2
        if (unet.config.in_channels, unet.config.out_channels) != (2 * channels, channels):
            raise ValueError(
                f"unet: expected {2 * channels} input and {channels} output channels (noisy and condition latents), "
                f"got {unet.config.in_channels} and {unet.config.out_channels}"
            )
        if image_encoder is not None and image_encoder.config.projection_dim != unet.config.cross_attention_dim:
            raise ValueError(
                f"image_encoder: expected embeddings of {unet.config.cross_attention_dim} channels, as the U-Net's "
                f"cross-attention takes, got {image_encoder.config.projection_dim}"
            )
        self.register_modules(unet=unet, scheduler=scheduler, vae=vae, image_encoder=image_encoder)
        set_position(unet, position)
        self.register_to_config(
            patch_size=patch_size,
            noise_mean=noise_mean,
            noise_deviation=noise_deviation,
            position=position,
            prediction_type=prediction_type,
        )
        if unet.config.get("latent_stride") != self.latent_stride:
            unet.register_to_config(latent_stride=self.latent_stride)

    def enable_xformers_memory_efficient_attention(self, attention_op: Any = None) -> None:
        """Use xformers' kernel on CUDA in the spatial attentions, unlike diffusers' switch, which includes the VAE.

        The temporal attentions keep PyTorch's: their sequences are as short as the number of frames, and their batch,
        one entry per sample, cell and head, is soon larger than the 65535 that xformers' kernels take.
        """
        set_kernel(self.unet, xformers=True, attention_op=attention_op, inside=".transformer_blocks.")

    def disable_xformers_memory_efficient_attention(self) -> None:
        """Go back to PyTorch's kernel."""
        set_kernel(self.unet, xformers=False, inside=".transformer_blocks.")

    def noise_levels(self, timesteps: Tensor) -> Tensor:
        """Noise level s of integer time steps, in float32.

        Example:
            >>> from cameo.backbone import get_backbone
            >>> pipeline = get_backbone("sv3d").build("tiny", noise_mean=0.0, noise_deviation=1.0)
            >>> [round(level, 2) for level in pipeline.noise_levels(torch.tensor([0, 158, 499, 999])).tolist()]
            [0.04, 0.37, 1.0, 26.86]
        """
        quantile = (timesteps.cpu().double() + 0.5) / self.num_train_timesteps
        normal = torch.special.ndtri(quantile)
        return (self.config.noise_mean + self.config.noise_deviation * normal).exp().float().to(timesteps.device)

    def camera_numbers(self, batch: Mapping[str, Any]) -> Tensor:
        """Numbers that the U-Net takes for each frame: `[B, T, 3]`, for SV3D_u `[B, T, 1]` without the angles.

        The noise on the condition image, the polar angle and the azimuth relative to the reference view, in radians.
        """
        extrinsics: Tensor = batch["extrinsics"]
        noise = torch.full_like(extrinsics[..., 0, 0], CONDITION_NOISE)
        if len(self.unet.frame_features) == 1:
            return noise[..., None]
        polar, azimuth = orbit_angles(extrinsics, batch.get("up"))
        return _frames(torch.stack([noise, polar, azimuth], dim=-1))

    def image_embedding(self, images: Tensor) -> Tensor:
        """Embed images `[B, 3, H, W]` in [0, 1] for the cross-attention, `[B, 1, D]`."""
        if self.image_encoder is None:
            return images.new_zeros(images.shape[0], 1, self.unet.config.cross_attention_dim)
        side = self.image_encoder.config.image_size
        small = F.interpolate(images, (side, side), mode="bicubic", antialias=True, align_corners=False)
        mean, deviation = (images.new_tensor(values)[:, None, None] for values in (CLIP_MEAN, CLIP_DEVIATION))
        pixels = (small - mean) / deviation
        embedding = self.image_encoder(pixels.to(self.image_encoder.dtype)).image_embeds
        return embedding[:, None].to(images)

    def decode(self, latents: Tensor) -> Tensor:
        """Latents `[B, V, C, h, w]` to images `[B, V, 3, H, W]`, clamped to [0, 1]."""
        if not isinstance(self.vae, AutoencoderKLTemporalDecoder):
            return super().decode(latents)
        flat, vae = rearrange(self.unscale_latents(latents), "b v c h w -> (b v) c h w"), self._safe_vae()
        images = vae.decode(flat.to(vae.dtype), num_frames=latents.shape[1]).sample.to(latents.dtype)
        images = rearrange(images, "(b v) c h w -> b v c h w", b=latents.shape[0])
        return (self.unscale_image(images) / 2 + 0.5).clamp(0, 1)

    def training_inputs(
        self,
        batch: Mapping[str, Any],
        *,
        generator: torch.Generator | None = None,
        timesteps: Tensor | None = None,
        noise: Tensor | None = None,
        condition_dropout: float = 0.0,
    ) -> TrainingInputs:
        """Noise all views of a batch and build the U-Net's input and target.

        The reference view is noised too, as every frame, and carries the loss; it is shown clean beside the frames.

        Args:
            batch: `images, extrinsics, num_reference_views` (1), optional `up`; see `cameo.data`.
            generator: source of time steps, noise and dropout; the same seed gives the same inputs.
            timesteps: integers `[B]`; default uniform, see `noise_levels`.
            noise: `[B, V, C, h, w]`; default standard normal.
            condition_dropout: probability of blanking a sample's condition latents and image embedding, for
                classifier-free guidance.

        Raises:
            ValueError: for more than one reference view.
        """
        images: Tensor = batch["images"]
        samples = images.shape[0]
        _check_one_reference(batch, images.shape[1])
        with torch.no_grad():
            clean = self.batch_latents(batch)
        timesteps, noise = self.draw(clean, generator, timesteps, noise)
        blank = self.blank(samples, condition_dropout, generator, images.device)
        with torch.no_grad():
            shown, context = self._condition(images[:, 0], generator)
        shown, context = (one.masked_fill(blank.view(-1, *[1] * (one.ndim - 1)), 0) for one in (shown, context))
        level = self.noise_levels(timesteps).to(clean)
        wide = level[:, None, None, None, None]
        noisy = clean + wide * noise
        target = clean.clone() if self._predicts_frames else (noise - wide * clean) / (wide.square() + 1).sqrt()
        frames = _frames(noisy / (wide.square() + 1).sqrt())
        args = self._unet_arguments(frames, level.log() / 4, shown, context, self.camera_numbers(batch))
        noisy[:, 0] = clean[:, 0]
        all_views = torch.ones(images.shape[1], dtype=torch.bool)
        return TrainingInputs(args, {}, noisy, target, all_views, timesteps)

    def prediction(self, output: Any, inputs: TrainingInputs) -> Tensor:
        """Views of the U-Net's output, `[B, V, C, h, w]`."""
        return _views(output.sample)

    def clean_latents(self, prediction: Tensor, inputs: TrainingInputs) -> Tensor:
        """Clean latents `[B, V, C, h, w]` that a prediction stands for; the reference view's as they came in."""
        level = self.noise_levels(inputs.timesteps).to(prediction)[:, None, None, None, None]
        noisy = inputs.noisy.to(prediction)
        clean = prediction
        if not self._predicts_frames:
            clean = noisy / (level.square() + 1) - level / (level.square() + 1).sqrt() * prediction
        return torch.cat([noisy[:, :1], clean[:, 1:]], dim=1)

    @torch.no_grad()
    def sample(
        self,
        batch: Mapping[str, Any],
        *,
        num_inference_steps: int = 50,
        guidance_scale: float = 1.0,
        generator: torch.Generator | None = None,
        progress: bool = False,
    ) -> Tensor:
        """Generate the target views by Euler steps.

        Args:
            batch: `extrinsics [B, V, 4, 4]`, `num_reference_views` (1), optional `up`, and `images [B, >= 1, 3, H, W]`,
                of which only the first is used.
            num_inference_steps: number of denoising steps.
            guidance_scale: classifier-free guidance on the image, largest in the middle of the sequence (see
                `triangle_scale`); the release uses 2.5, 1 switches it off.
            generator: the same seed gives the same views.
            progress: whether to show a progress bar.

        Returns:
            Images in [0, 1], `[B, V - 1, 3, H, W]`.
        """
        samples, views = batch["extrinsics"].shape[:2]
        _check_one_reference(batch, views)
        images: Tensor = batch["images"][:, :1]
        self.check_images(images)
        noise = self.normal((samples, views, *self.latent_shape(images.shape)[2:]), generator, images)
        shown, context = self._condition(images[:, 0], generator)
        conditions = [(shown, context)]
        if guidance_scale != 1:
            conditions.append((torch.zeros_like(shown), torch.zeros_like(context)))
        numbers, clean = self.camera_numbers(batch), self._predicts_frames

        def predict(latents: Tensor, timestep: Tensor) -> list[Tensor]:
            frames, level = latents.to(self.unet_dtype), timestep.expand(samples)
            arguments = [self._unet_arguments(frames, level, *condition, numbers) for condition in conditions]
            outputs = [self.unet(*args).sample for args in arguments]
            return [velocity(output, frames, (4 * timestep).exp()) for output in outputs] if clean else outputs

        latents = sample_latents(
            self.scheduler,
            noise,
            predict,
            num_inference_steps=num_inference_steps,
            guidance_scale=triangle_scale(views, guidance_scale).to(noise)[:, None, None, None],
            generator=generator,
            progress_bar=self.progress_bar if progress else None,
        )
        return self.decode(latents[:, :-1])

    @property
    def _predicts_frames(self) -> bool:
        return bool(self.config.prediction_type == "sample")

    def _condition(self, reference: Tensor, generator: torch.Generator | None) -> tuple[Tensor, Tensor]:
        """Latents `[B, C, h, w]`, not scaled, and embedding `[B, 1, D]` of the reference images `[B, 3, H, W]`."""
        noise = self.normal(reference.shape, generator, reference)
        image = self.scale_image(reference * 2 - 1) + CONDITION_NOISE * noise
        return self.encode_unscaled(image[:, None])[:, 0].clone(), self.image_embedding(reference).clone()

    @staticmethod
    def _unet_arguments(
        frames: Tensor, level: Tensor, shown: Tensor, context: Tensor, numbers: Tensor
    ) -> tuple[Tensor, ...]:
        """Arguments of the U-Net for frames `[B, T, C, h, w]` that are scaled to its input."""
        shown = repeat(shown, "b c h w -> b t c h w", t=frames.shape[1]).to(frames)
        return torch.cat([frames, shown], dim=2), level, context.to(frames), numbers  # numbers embedded in float32


def velocity(clean: Tensor, scaled: Tensor, level: Tensor) -> Tensor:
    """Velocity of frames whose clean form is known, which diffusers' scheduler steps by at EDM's noise levels.

    Example:
        >>> clean, noise, level = torch.ones(1), torch.zeros(1), torch.tensor(2.0)
        >>> velocity(clean, (clean + level * noise) / 5**0.5, level) * 5**0.5  # (noise - level * clean) / c_in
        tensor([-2.])

    Args:
        clean: the clean frames.
        scaled: the noisy frames as the U-Net takes them, `c_in x`.
        level: their noise level.
    """
    return (scaled - clean * (level.square() + 1).sqrt()) / level


def triangle_scale(frames: int, largest: float) -> Tensor:
    """Return the guidance scale of each frame: 1 at both ends, `largest` in the middle, linear in between, `[T]`.

    Example:
        >>> triangle_scale(5, 3.0).tolist()
        [1.0, 2.0, 3.0, 2.0, 1.0]

    Source: TrianglePredictionGuider in Stability-AI/generative-models.
    """
    place = torch.linspace(-1, 1, frames)
    return 1 + (largest - 1) * (1 - place.abs())


def _frames(views: Tensor) -> Tensor:
    """From the view order of the batch to the frames of the U-Net: the reference goes last."""
    return views.roll(-1, dims=1)


def _views(frames: Tensor) -> Tensor:
    """Undo `_frames`."""
    return frames.roll(1, dims=1)


def _check_one_reference(batch: Mapping[str, Any], views: int) -> None:
    if (references := reference_views(batch, views)) != 1:
        raise ValueError(
            f"num_reference_views: SV3D is conditioned on one image, got {references}; set num_reference_views=1"
        )
