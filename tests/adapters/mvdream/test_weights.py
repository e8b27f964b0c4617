from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from safetensors.torch import save_file

import cameo
from cameo.adapters.common.noise_schedules import ddim
from cameo.adapters.mvdream.convert import from_ldm, to_ldm, unet_config
from cameo.adapters.mvdream.denoiser import ImageDreamUNet, prepare
from cameo.adapters.mvdream.weights import convert_unet
from cameo.backbone import get_backbone
from cameo.errors import DataError
from tests.helpers.batches import make_batch
from tests.helpers.mvdream_models import (
    PRESETS,
    SIZE,
    batch,
    encoders,
    image_dream_unet,
    pipeline,
    same_weights,
    seeded,
    tiny_kl,
    with_image_tokens,
)


@pytest.mark.parametrize("preset", PRESETS)
def test_save_and_load(preset: str, tmp_path: Path) -> None:
    built = pipeline(preset, prompt="a cat")
    given = batch(built)
    built.save_pretrained(tmp_path)
    again = get_backbone("mvdream").load(str(tmp_path))
    assert again.config.condition == built.config.condition
    assert again.config.prompt == "a cat"
    samples = [one.sample(given, num_inference_steps=2, generator=seeded()) for one in (built, again)]
    assert torch.equal(*samples)
    assert cameo.wrap(again.unet, "mvdream").token_grid(SIZE, SIZE) == (4, 4)


def released_unet(*, linear: bool = True, tokens: bool = False) -> UNet2DConditionModel:
    """Stable Diffusion's U-Net, 2.1 (linear projections) or 1.5, with a camera embedding, but narrow."""
    cross = "CrossAttnDownBlock2D"
    options: dict[str, Any] = {
        "sample_size": 8,
        "in_channels": 4,
        "out_channels": 4,
        "block_out_channels": (32, 32, 64, 64),
        "layers_per_block": 2,
        "down_block_types": (cross, cross, cross, "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        "attention_head_dim": (2, 2, 4, 4) if linear else 8,
        "use_linear_projection": linear,
    }
    if tokens:
        return image_dream_unet(**options)
    torch.manual_seed(0)
    camera = {"class_embed_type": "projection", "projection_class_embeddings_input_dim": 16}
    return UNet2DConditionModel(**options, **camera, cross_attention_dim=8)


@pytest.mark.parametrize("kind", ["2.1", "1.5", "imagedream"])
def test_converting_forth_and_back_is_exact(kind: str) -> None:
    unet = released_unet(linear=kind != "1.5", tokens=kind == "imagedream")
    state = unet.state_dict()
    original = to_ldm(state)
    assert "input_blocks.1.1.transformer_blocks.0.attn1.to_q.weight" in original
    assert "output_blocks.5.2.conv.weight" in original
    assert "output_blocks.2.1.conv.weight" in original  # no attention at the coarsest level
    assert "input_blocks.9.0.op.weight" in original
    for key, value in original.items():
        assert "_ip." not in key or value.shape == original[key.replace("_ip.", ".")].shape
    again = from_ldm(original)
    assert again.keys() == state.keys()
    assert all(torch.equal(again[key], value) for key, value in state.items())
    with_prefix = {f"model.diffusion_model.{key}": value for key, value in original.items()}
    with_prefix["first_stage_model.encoder.conv_in.weight"] = torch.zeros(1)
    assert from_ldm(with_prefix).keys() == state.keys()
    heads = {} if kind == "1.5" else {"num_head_channels": 16}
    config = unet_config(original, **heads)
    assert config.items() >= {"use_linear_projection": kind != "1.5", "layers_per_block": 2}.items()
    rebuilt = convert_unet(original, **heads)
    assert isinstance(rebuilt, ImageDreamUNet) == (kind == "imagedream")
    adapter = get_backbone("mvdream")
    args, kwargs = adapter.example_inputs(unet)
    with torch.no_grad():
        assert torch.equal(rebuilt(*args, **kwargs).sample, unet(*args, **kwargs).sample)


def test_the_heads_of_the_releases() -> None:
    def heads(widths: tuple[int, ...], *, linear: bool) -> Any:
        with torch.device("meta"):
            unet = UNet2DConditionModel(
                block_out_channels=widths,
                cross_attention_dim=8,
                use_linear_projection=linear,
                class_embed_type="projection",
                projection_class_embeddings_input_dim=16,
                norm_num_groups=32,
            )
        return unet_config(to_ldm(unet.state_dict()))["attention_head_dim"]

    widths = (320, 640, 1280, 1280)
    assert heads(widths, linear=True) == (5, 10, 20, 20)
    assert heads(widths, linear=False) == (8, 8, 8, 8)


def test_what_the_converter_refuses() -> None:
    original = to_ldm(released_unet().state_dict())
    with pytest.raises(ValueError, match=r"state: label_emb\.weight is not part of MVDream's or ImageDream's U-Net"):
        from_ldm(original | {"label_emb.weight": torch.zeros(1)})
    with pytest.raises(ValueError, match=r"image_embed\.proj\.weight is not part .*only local_resample is known"):
        from_ldm(original | {"image_embed.proj.weight": torch.zeros(1)})
    without = {key: value for key, value in original.items() if not key.startswith("camera_embed")}
    with pytest.raises(ValueError, match=r"state: expected the names of MVDream's U-Net .*camera_embed\.0\.weight"):
        from_ldm(without)
    del original["middle_block.0.in_layers.2.bias"]
    with pytest.raises(ValueError, match=r"missing \['mid_block\.resnets\.0\.conv1\.bias'\]"):
        convert_unet(original, num_heads=2)


def write_port(folder: Path, unet: UNet2DConditionModel, **settings: Any) -> None:
    """A folder in the layout of the diffusers port, whose U-Net class lives in a file of the repository."""
    tokens = isinstance(unet, ImageDreamUNet)
    ddim().save_pretrained(folder / "scheduler")
    tiny_kl().save_pretrained(folder / "vae")
    for name in ("text_encoder", "tokenizer", *(("image_encoder", "feature_extractor") if tokens else ())):
        encoders()[name].save_pretrained(folder / name)
    (folder / "unet").mkdir()
    (folder / "unet" / "mv_unet.py").write_text("raise RuntimeError('code of the repository was run')\n")
    (folder / "unet" / "config.json").write_text(json.dumps({"_class_name": "MultiViewUNetModel", **settings}))
    original = {key: value.contiguous() for key, value in to_ldm(unet.state_dict()).items()}
    save_file(original, str(folder / "unet" / "diffusion_pytorch_model.safetensors"))
    index = {
        "_class_name": "MVDreamPipeline",
        "_diffusers_version": "0.23.1",
        "unet": ["mv_unet", "MultiViewUNetModel"],
        "vae": ["diffusers", "AutoencoderKL"],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "scheduler": ["diffusers", "DDIMScheduler"],
        "image_encoder": ["transformers", "CLIPVisionModel"] if tokens else [None, None],
        "feature_extractor": ["transformers", "CLIPImageProcessor"] if tokens else [None, None],
    }
    (folder / "model_index.json").write_text(json.dumps(index))


@pytest.mark.parametrize("tokens", [False, True])
def test_load_the_layout_of_the_port(tokens: bool, tmp_path: Path) -> None:
    unet = released_unet(tokens=tokens)
    write_port(tmp_path, unet, num_heads=-1, num_head_channels=16)
    built = get_backbone("mvdream").load(str(tmp_path), prompt="a cat")
    assert built.config.condition == ("image" if tokens else "text")
    assert same_weights(built.unet, unet)
    args, kwargs = get_backbone("mvdream").example_inputs(built.unet)
    prepare(unet, image_view=tokens)
    with torch.no_grad():
        assert torch.equal(built.unet(*args, **kwargs).sample, unet(*args, **kwargs).sample)  # the heads are right
    model = cameo.wrap(built.unet, "mvdream")
    assert [layer.index for layer in model.supervised_layers] == [10]
    assert len(model.attention_layers) == 16
    assert model.token_grid(256, 256) == (16, 16)
    given = {**make_batch(samples=1, views=2, size=64), "num_reference_views": int(tokens)}
    assert built.sample(given, num_inference_steps=1).shape == (1, 2 - tokens, 3, 64, 64)


def write_stable_diffusion(folder: Path) -> Path:
    tiny_kl().save_pretrained(folder / "vae")
    for name in ("text_encoder", "tokenizer"):
        encoders()[name].save_pretrained(folder / name)
    return folder


def write_clip(folder: Path) -> Path:
    for name in ("image_encoder", "feature_extractor"):
        encoders()[name].save_pretrained(folder)
    return folder


@pytest.mark.parametrize("tokens", [False, True])
def test_load_an_original_checkpoint(tokens: bool, tmp_path: Path) -> None:
    unet = released_unet(tokens=tokens)
    state = {f"model.diffusion_model.{key}": value for key, value in to_ldm(unet.state_dict()).items()}
    torch.save(state | {"first_stage_model.quant_conv.bias": torch.zeros(8)}, tmp_path / "4view.pt")
    adapter = get_backbone("mvdream")
    options: dict[str, Any] = {"num_head_channels": 16}
    with pytest.raises(ValueError, match=r"stable_diffusion: 4view\.pt holds no autoencoder .*2-1-base"):
        adapter.load(str(tmp_path / "4view.pt"), **options)
    options["stable_diffusion"] = str(write_stable_diffusion(tmp_path / "sd"))
    clip = str(write_clip(tmp_path / "clip"))
    if tokens:
        with pytest.raises(ValueError, match=r"image_encoder: 4view\.pt is an ImageDream"):
            adapter.load(str(tmp_path / "4view.pt"), **options)
        options["image_encoder"] = clip
    else:
        with pytest.raises(ValueError, match=r"image_encoder: 4view\.pt has no image tokens"):
            adapter.load(str(tmp_path / "4view.pt"), **options, image_encoder=clip)
    for place in ({"name_or_path": str(tmp_path / "4view.pt")}, {"name_or_path": str(tmp_path), "weights": "4view.pt"}):
        built = adapter.load(**place, **options)
        assert same_weights(built.unet, unet)
        assert built.unet.config.attention_head_dim == (2, 2, 4, 4)
    assert built.scheduler.config.prediction_type == "epsilon"


def test_an_unknown_option_names_those_that_there_are(tmp_path: Path) -> None:
    (tmp_path / "4view.pt").touch()
    with pytest.raises(ValueError, match=r"'cache_folder'.* Known: cache_dir, local_files_only, prompt, .*torch_dtype"):
        get_backbone("mvdream").load(str(tmp_path / "4view.pt"), cache_folder="cache")


def test_a_checkpoint_cannot_run_code(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> Any:
            return (Path.touch, (tmp_path / "ran",))

    torch.save({"camera_embed.0.weight": Evil()}, tmp_path / "evil.pt")
    with pytest.raises(DataError, match=r"evil\.pt: no checkpoint of tensors alone"):
        get_backbone("mvdream").load(str(tmp_path / "evil.pt"), stable_diffusion="sd")
    assert not (tmp_path / "ran").exists()


def test_what_load_refuses(tmp_path: Path) -> None:
    adapter = get_backbone("mvdream")
    with pytest.raises(DataError, match=r"none\.pt: no such file"):
        adapter.load(str(tmp_path / "none.pt"), stable_diffusion="sd")
    pipeline().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"stable_diffusion: is for an original checkpoint \(\.pt\)"):
        adapter.load(str(tmp_path), stable_diffusion="sd")
    index = tmp_path / "model_index.json"
    index.write_text(index.read_text().replace("MVDreamPipeline", "FluxPipeline"))
    with pytest.raises(DataError, match=r"holds a FluxPipeline with a UNet2DConditionModel; mvdream loads"):
        adapter.load(str(tmp_path))


def test_a_folder_of_checkpoints_asks_for_the_file(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"model_index.json.*name one of them.*weights='sd-v2.1-base-4view.pt'"):
        get_backbone("mvdream").load(str(tmp_path))


def test_licenses_and_revisions() -> None:
    adapter = get_backbone("mvdream")
    assert adapter.revision("MVDream/MVDream") == "d14ac9d78c48c266005729f2d5633f6c265da467"
    assert adapter.revision("someone/else") is None
    assert adapter.license("preset:tiny") == "apache-2.0"
    assert adapter.license("someone/else") is None
    assert adapter.license(None) is None


def test_image_tokens_matter_and_survive_saving(tmp_path: Path) -> None:
    built = with_image_tokens()
    given = batch(built) | {"caption": ["a cat", "dogs"]}
    assert len(cameo.wrap(built.unet, "mvdream").attention_layers) == 4
    inputs = built.training_inputs(given, generator=seeded())
    with torch.no_grad():
        out = built.unet(*inputs.args, **inputs.kwargs).sample
        tokens = [torch.zeros_like(inputs.kwargs["added_cond_kwargs"]["image_embeds"][0])]
        blind = built.unet(*inputs.args, **{**inputs.kwargs, "added_cond_kwargs": {"image_embeds": tokens}}).sample
    assert not torch.equal(out, blind)
    built.denoising_loss(built.unet(*inputs.args, **inputs.kwargs), inputs).mean().backward()
    image_parameters = [
        (name, parameter) for name, parameter in built.unet.named_parameters() if "_ip" in name or "encoder_hid" in name
    ]
    assert len(image_parameters) == 2 * 4 + 7 + 4 * 12
    assert all(parameter.grad.any() for name, parameter in image_parameters if not name.endswith("latents"))
    built.save_pretrained(tmp_path)
    again = get_backbone("mvdream").load(str(tmp_path))
    assert isinstance(again.unet, ImageDreamUNet)
    samples = [one.sample(given, num_inference_steps=1, generator=seeded(), guidance_scale=2) for one in (built, again)]
    assert torch.equal(*samples)
    adapter = get_backbone("mvdream")
    args, kwargs = adapter.example_inputs(again.unet)
    assert torch.equal(again.unet(*args, **kwargs).sample, built.unet(*args, **kwargs).sample)
