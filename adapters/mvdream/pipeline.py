"""MVDream and ImageDream on diffusers' `UNet2DConditionModel`: all views of an object from a text or an image.

Axes: B samples, V views (reference views first), C channels, H W image pixels, h w latent cells, M context tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from diffusers import DDIMScheduler, UNet2DConditionModel
from einops import rearrange, repeat
from torch import Tensor

from cameo.adapters.common.diffusers_attention import set_kernel
from cameo.adapters.common.images import process
from cameo.adapters.common.joint_views import check_joined
from cameo.adapters.common.latent_pipeline import LatentPipeline
from cameo.adapters.common.noise_schedules import check_prediction_type
from cameo.adapters.common.positions import set_position
from cameo.adapters.common.sampler import sample_latents
from cameo.adapters.mvdream.cameras import camera_vectors
from cameo.adapters.mvdream.denoiser import ImageDreamUNet, prepare
from cameo.errors import unknown_name
from cameo.geometry.cameras import check_cameras
from cameo.memory import sent_to
from cameo.pipeline import TrainingInputs

__all__ = ["CONDITIONS", "MVDreamPipeline"]

CONDITIONS = ("text", "image")
PREPARE = (
    "cameo.adapters.mvdream.denoiser.prepare(pipeline.unet, image_view={image_view}, "
    "latent_stride=pipeline.latent_stride) to join its views"
)


class MVDreamPipeline(LatentPipeline):
    """Views of an object by cameras, from a text (MVDream) or from one of the views (ImageDream).

    Example:
        >>> from cameo.backbone import get_backbone
        >>> pipeline = get_backbone("mvdream").build("tiny")
        >>> batch = {
        ...     "images": torch.rand(1, 3, 3, 32, 32),
        ...     "intrinsics": torch.tensor([[32.0, 0, 16], [0, 32, 16], [0, 0, 1]]).expand(1, 3, 3, 3),
        ...     "extrinsics": torch.eye(4).expand(1, 3, 4, 4),
        ...     "num_reference_views": 0,
        ... }
        >>> pipeline.sample(batch, num_inference_steps=2).shape
        torch.Size([1, 3, 3, 32, 32])

    `condition="text"`: all V views are generated, `num_reference_views=0`. The text of a sample is
    `batch["caption"]`, else the config value `prompt`. Without a text encoder there is no text, and the U-Net's
    cross-attention gets one token of zeros.

    `condition="image"`: `num_reference_views=1`. The reference view is a further view of the attention, the last one,
    as clean latents, with 16 zeros for its camera and the time step of the others; its output is not used, and
    neither the denoising loss nor the alignment loss counts it. The world is turned so that its camera stands at
    azimuth 0. With an image encoder, an `ImageDreamUNet` also attends to the reference's image tokens, as the release
    does.

    Args:
        unet: takes the latent channels and 16 numbers of camera as class labels; its self-attentions are joined here.
        scheduler: noise schedule; prediction type "epsilon" as published, "v_prediction" or "sample".
        vae: `AutoencoderKL` or `AutoencoderTiny`; None works on pixels, folded into channels by `patch_size`.
        text_encoder, tokenizer: CLIP's, both or neither.
        image_encoder, feature_extractor: `CLIPVisionModel` and its preprocessing, for an `ImageDreamUNet`.
        patch_size: side of the pixel blocks that become one latent cell, without a VAE.
        condition: "text" or "image".
        prompt: text of the samples without a caption. The release appends ", 3d asset" to what a user types.
        single_image_share: share of the training batches in which each view is a sample of its own, without camera,
            and nothing is aligned (`TrainingInputs.aligned` is False). The paper trains 30 % of its batches
            like this, on other images, so that the model keeps what it knew.
        position: "sincos" adds a map of positions behind the U-Net's first convolution, see
            `cameo.adapters.common.positions`; "none", as published, takes it off.

    Raises:
        ValueError: if the components do not go together; says which.

    Source: MVDream, arXiv 2308.16512, sections 3.1 to 3.3; ImageDream, arXiv 2312.02201, sections 3.2 and 3.3.
    """

    backbone = "mvdream"
    model_cpu_offload_seq = "text_encoder->image_encoder->unet->vae"
    _optional_components = ["vae", "text_encoder", "tokenizer", "image_encoder", "feature_extractor"]  # noqa: RUF012

    def __init__(
        self,
        unet: UNet2DConditionModel,
        scheduler: DDIMScheduler,
        vae: Any = None,
        text_encoder: Any = None,
        tokenizer: Any = None,
        image_encoder: Any = None,
        feature_extractor: Any = None,
        patch_size: int = 4,
        condition: str = "text",
        prompt: str = "",
        single_image_share: float = 0.0,
        position: str = "none",
    ) -> None:
        super().__init__()
        if condition not in CONDITIONS:
            raise unknown_name("condition", condition, CONDITIONS)
        check_prediction_type(scheduler)
        channels = vae.config.latent_channels if vae is not None else 3 * patch_size**2
        if unet.config.in_channels != channels or unet.config.out_channels != channels:
            raise ValueError(
                f"unet: expected {channels} input and output channels (the latent's), got {unet.config.in_channels} "
                f"and {unet.config.out_channels}"
            )
        if not 0 <= single_image_share < 1 or (single_image_share and condition == "image"):
            limit = "0 with condition='image'" if condition == "image" else "at least 0 and less than 1"
            raise ValueError(f"single_image_share: expected {limit}, got {single_image_share}")
        reads_tokens = isinstance(unet, ImageDreamUNet)
        _check_pairs(
            condition,
            reads_tokens,
            text_encoder=text_encoder,
            tokenizer=tokenizer,
            image_encoder=image_encoder,
            feature_extractor=feature_extractor,
        )
        _check_width("text_encoder", text_encoder, unet.config.cross_attention_dim, "cross_attention_dim")
        if reads_tokens:
            _check_width("image_encoder", image_encoder, unet.config.encoder_hid_dim, "encoder_hid_dim")
        self.register_modules(
            unet=unet,
            scheduler=scheduler,
            vae=vae,
            text_encoder=text_encoder,
            tokenizer=tokenizer,
            image_encoder=image_encoder,
            feature_extractor=feature_extractor,
        )
        set_position(unet, position)
        self.register_to_config(
            patch_size=patch_size,
            condition=condition,
            prompt=prompt,
            single_image_share=single_image_share,
            position=position,
        )
        prepare(unet, image_view=condition == "image", latent_stride=self.latent_stride)

    @property
    def num_reference_views(self) -> int:
        """Reference views of every batch: 0 with a text, 1 with an image."""
        return int(self.config.condition == "image")

    def enable_xformers_memory_efficient_attention(self, attention_op: Any = None) -> None:
        """Use xformers' kernel on CUDA in the denoiser, see `ImageTokenAttention`; elsewhere PyTorch's goes on."""
        set_kernel(self.unet, xformers=True, attention_op=attention_op)

    def disable_xformers_memory_efficient_attention(self) -> None:
        """Go back to PyTorch's kernel."""
        set_kernel(self.unet, xformers=False)

    def training_inputs(
        self,
        batch: Mapping[str, Any],
        *,
        generator: torch.Generator | None = None,
        timesteps: Tensor | None = None,
        noise: Tensor | None = None,
        condition_dropout: float = 0.0,
        joint: bool | None = None,
    ) -> TrainingInputs:
        """Noise the views of a batch and build the U-Net's input and target.

        Args:
            batch: `images, intrinsics, extrinsics, num_reference_views`, optionally `caption` and `up`; see
                `cameo.data`.
            generator: source of time steps, noise and dropout; the same seed gives the same inputs.
            timesteps: integers `[B]`; default uniform over all noise levels.
            noise: `[B, V, C, h, w]`; default standard normal.
            condition_dropout: probability of emptying a sample's text and putting zeros for its image's latents and
                tokens, for classifier-free guidance; the cameras stay.
            joint: whether the views attend to each other. Default: drawn by `single_image_share` while the U-Net is in
                training mode and no `noise` is given, else True.
        """
        images: Tensor = batch["images"]
        samples, views = images.shape[:2]
        references = self._check_references(batch, views)
        with torch.no_grad():
            clean = self.batch_latents(batch)
            cameras = self._cameras(batch, references)
        if joint is None:
            joint = self.draw_joint(noise, generator, images.device)
        timesteps, noise = self.draw(clean, generator, timesteps, noise)
        blank = self.blank(samples, condition_dropout, generator, images.device)
        target_views = torch.arange(views) >= references
        noised = sent_to(images.device, target_views)[:, None, None, None]
        given = clean.masked_fill(blank[:, None, None, None, None], 0)  # zero latents, as in the release
        noisy = torch.where(noised, self.scheduler.add_noise(clean, noise, timesteps), given)
        texts = ["" if empty else text for text, empty in zip(self._texts(batch, samples), blank.tolist(), strict=True)]
        context = self._context(texts, images.device)
        tokens = self._image_tokens(images[:, :references], blank)
        args, kwargs = self._unet_arguments(noisy, cameras, timesteps, context, tokens, joint=joint)
        target = self.denoising_target(clean, noise, timesteps)
        return TrainingInputs(args, kwargs, noisy, target, target_views, timesteps, aligned=joint)

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
        """Generate the views by DDIM.

        Args:
            batch: `intrinsics, extrinsics [B, V, ...]`, `num_reference_views` R, optionally `caption` and `up`, and
                `images [B, >= max(R, 1), 3, H, W]`, of which only the first R and the size are used.
            num_inference_steps: number of denoising steps.
            guidance_scale: classifier-free guidance, away from an empty text and an image of zero latents and tokens;
                1 switches it off. The release uses 7.5 with a text and 5 with an image.
            generator: the same seed gives the same views.
            progress: whether to show a progress bar.

        Returns:
            Images in [0, 1], `[B, V - R, 3, H, W]`.
        """
        images: Tensor = batch["images"]
        samples, views = batch["extrinsics"].shape[:2]
        references = self._check_references(batch, views)
        self.check_images(images[:, : max(references, 1)])
        shape = self.latent_shape(images.shape)[2:]
        reference = self.encode(images[:, :references]) if references else images.new_zeros(samples, 0, *shape)
        cameras = self._cameras(batch, references)
        tokens = self._image_tokens(images[:, :references])
        conditions = [(reference, self._context(self._texts(batch, samples), images.device), tokens)]
        if guidance_scale != 1:
            no_text, no_tokens = self._context([""] * samples, images.device), tokens
            if tokens is not None:
                no_tokens = torch.zeros_like(tokens)
            conditions.append((torch.zeros_like(reference), no_text, no_tokens))

        def predict(latents: Tensor, timestep: Tensor) -> list[Tensor]:
            outputs = []
            for given, context, tokens in conditions:
                noisy = torch.cat([given, latents], dim=1).to(self.unet_dtype)
                args, kwargs = self._unet_arguments(noisy, cameras, timestep.expand(samples), context, tokens)
                outputs.append(self._views(self.unet(*args, **kwargs), samples)[:, references:])
            return outputs

        latents = sample_latents(
            self.scheduler,
            self.normal((samples, views - references, *shape), generator, images),
            predict,
            num_inference_steps=num_inference_steps,
            guidance_scale=guidance_scale,
            generator=generator,
            progress_bar=self.progress_bar if progress else None,
        )
        return self.decode(latents)

    def prediction(self, output: Any, inputs: TrainingInputs) -> Tensor:
        """Views of the U-Net's output in the order of the batch, `[B, V, C, h, w]`."""
        return self._views(output, inputs.noisy.shape[0])

    def _views(self, output: Any, samples: int) -> Tensor:
        views = rearrange(output.sample, "(b v) c h w -> b v c h w", b=samples)
        return views.roll(self.num_reference_views, dims=1)

    def _unet_arguments(
        self,
        noisy: Tensor,
        cameras: Tensor,
        timesteps: Tensor,
        context: Tensor,
        tokens: Tensor | None,
        *,
        joint: bool = True,
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Arguments of the U-Net for views `[B, V, C, h, w]` and cameras `[B, V, 16]` in the order of the batch."""
        check_joined(self.unet, cure=PREPARE.format(image_view=self.config.condition == "image"))
        views = noisy.shape[1]
        if not joint:
            cameras = torch.full_like(cameras, float("nan"))
        order = -self.num_reference_views  # the image prompt is the last view of the attention
        sample = rearrange(noisy.roll(order, dims=1), "b v c h w -> (b v) c h w")
        labels = rearrange(cameras.roll(order, dims=1), "b v c -> (b v) c").to(sample)
        kwargs: dict[str, Any] = {
            "class_labels": labels,
            "cross_attention_kwargs": {"num_views": views if joint else 1},
        }
        if tokens is not None:
            embeds = repeat(tokens.to(sample), "b m c -> (b v) 1 m c", v=views)
            kwargs["added_cond_kwargs"] = {"image_embeds": [embeds]}
        context = repeat(context.to(sample), "b m c -> (b v) m c", v=views)
        return (sample, repeat(timesteps, "b -> (b v)", v=views), context), kwargs

    def _cameras(self, batch: Mapping[str, Any], references: int) -> Tensor:
        """Camera vectors `[B, V, 16]`; zeros for an image prompt."""
        check_cameras(batch["intrinsics"], batch["extrinsics"])
        cameras = camera_vectors(batch["extrinsics"], batch.get("up"), front=0 if references else None)
        cameras[:, :references] = 0
        return cameras

    def _check_references(self, batch: Mapping[str, Any], views: int) -> int:
        references, expected = int(batch["num_reference_views"]), self.num_reference_views
        if references != expected:
            other, cure = (
                ("all views are generated from the text", "condition='image' (preset 'imagedream-tiny')")
                if expected == 0
                else ("the image prompt is the one reference view", "condition='text' (preset 'tiny') with 0")
            )
            raise ValueError(
                f"num_reference_views: expected {expected} with condition={self.config.condition!r}, since {other}, "
                f"got {references}. Set num_reference_views={expected}, or use {cure}"
            )
        if views <= references:
            raise ValueError(f"images: expected at least one view besides the image prompt, got {views} view")
        return references

    def _texts(self, batch: Mapping[str, Any], samples: int) -> list[str]:
        texts = batch.get("caption")
        if texts is None:
            return [self.config.prompt] * samples
        if isinstance(texts, str) or not isinstance(texts, Sequence) or len(texts) != samples:
            raise ValueError(f"caption: expected a list of {samples} texts, one per sample, got {texts!r}")
        return list(texts)

    @torch.no_grad()
    def _context(self, texts: list[str], device: torch.device) -> Tensor:
        """Text tokens `[B, M, channels]` of the cross-attention; one of zeros reduces it to a bias."""
        if self.text_encoder is None:
            return torch.zeros(len(texts), 1, self.unet.config.cross_attention_dim, device=device)
        length = self.tokenizer.model_max_length
        ids = self.tokenizer(texts, padding="max_length", max_length=length, truncation=True, return_tensors="pt")
        return self.text_encoder(ids.input_ids.to(self.text_encoder.device))[0]

    @torch.no_grad()
    def _image_tokens(self, references: Tensor, dropped: Tensor | None = None) -> Tensor | None:
        """Tokens `[B, M, channels]` of the image encoder's last layer but one; zeros for dropped images."""
        if self.image_encoder is None:
            return None
        pixels = process(self.feature_extractor, references[:, 0])
        weight = next(self.image_encoder.parameters())
        tokens = self.image_encoder(pixels.to(weight), output_hidden_states=True).hidden_states[-2]
        return tokens if dropped is None else tokens.masked_fill(dropped[:, None, None], 0)


def _check_pairs(condition: str, reads_tokens: bool, **components: Any) -> None:
    for first, second in (("text_encoder", "tokenizer"), ("image_encoder", "feature_extractor")):
        if (components[first] is None) != (components[second] is None):
            missing = first if components[first] is None else second
            raise ValueError(f"{missing}: expected one, since there is a {({first, second} - {missing}).pop()}")
    has_encoder = components["image_encoder"] is not None
    if has_encoder != reads_tokens:
        raise ValueError(
            "image_encoder: an ImageDreamUNet needs one for its image tokens"
            if reads_tokens
            else "image_encoder: this U-Net has no image tokens; use an ImageDreamUNet, or leave the encoder out"
        )
    if reads_tokens and condition != "image":
        raise ValueError(f"condition: an ImageDreamUNet is conditioned by an image, got {condition!r}")


def _check_width(name: str, encoder: Any, expected: int, of: str) -> None:
    width = None if encoder is None else encoder.config.hidden_size
    if width not in (None, expected):
        raise ValueError(f"{name}: expected {expected} channels, the U-Net's {of}, got {width}")
