"""Image metrics agree with torchmetrics, scikit-image or loops, and say so where weights or images are missing."""

from __future__ import annotations

import socket
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import numpy as np
import pytest
import scipy.linalg
import torch
import torchvision
from skimage.metrics import peak_signal_noise_ratio, structural_similarity
from torch import Tensor
from torchmetrics.functional.image import peak_signal_noise_ratio as torchmetrics_psnr
from torchmetrics.functional.image.lpips import learned_perceptual_image_patch_similarity

from cameo.errors import DataError, ShapeError
from cameo.evaluation import metrics
from cameo.evaluation.metrics import MAX_PSNR, Fid, Lpips, WeightsUnavailable, psnr, psnr_of_error, ssim

SQUEEZENET = "squeezenet1_1-b8a52dc0.pth"
INCEPTION = "weights-inception-2015-12-05-6726825d.pth"


def image_pairs(count: int = 3, height: int = 24, width: int = 17, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Random images and noisier and noisier copies of them."""
    generator = torch.Generator().manual_seed(seed)
    targets = torch.rand(count, 3, height, width, generator=generator)
    noise = torch.randn(targets.shape, generator=generator)
    strength = torch.linspace(0.02, 0.5, count)[:, None, None, None]
    return (targets + strength * noise).clamp(0, 1), targets


def test_psnr_agrees_with_torchmetrics_and_scikit_image() -> None:
    images, targets = image_pairs()
    found = psnr(images, targets)
    peer = torchmetrics_psnr(images, targets, data_range=1.0, dim=(1, 2, 3), reduction="none")
    torch.testing.assert_close(found, peer)
    for index, (image, target) in enumerate(zip(images.double().numpy(), targets.double().numpy(), strict=True)):
        assert found[index].item() == pytest.approx(peak_signal_noise_ratio(target, image, data_range=1), abs=1e-4)


def test_psnr_within_a_mask_is_that_of_the_pixels_alone() -> None:
    images, targets = image_pairs(4)
    mask = torch.rand(4, 1, 24, 17, generator=torch.Generator().manual_seed(1)) < 0.3
    mask[2] = True
    images[0][:, ~mask[0, 0]] = float("nan")  # outside of the mask nothing counts
    found = psnr(images, targets, mask)
    for index in range(4):
        pixels = mask[index, 0]
        error = np.square((images[index][:, pixels] - targets[index][:, pixels]).double().numpy()).mean()
        assert found[index].item() == pytest.approx(-10 * np.log10(error), abs=1e-4)


def test_psnr_of_degenerate_input() -> None:
    images, targets = image_pairs(3)
    images[0] = targets[0]
    images[2, 0, 0, 0] = float("nan")
    mask = torch.ones(3, 1, 24, 17, dtype=torch.bool)
    mask[1] = False
    assert psnr(images, targets)[0].item() == MAX_PSNR
    found = psnr(images, targets, mask)
    assert found[0].item() == MAX_PSNR
    assert found[1:].isnan().all()
    assert psnr(images[:0], targets[:0]).shape == (0,)


def test_psnr_computes_in_float32_or_better() -> None:
    images, targets = image_pairs()
    half = images.bfloat16()
    torch.testing.assert_close(psnr(half, targets), psnr(half.float(), targets), rtol=0, atol=0)
    assert psnr(images.double(), targets.double()).dtype == torch.float64


def test_psnr_of_error_keeps_nan_and_caps() -> None:
    found = psnr_of_error(torch.tensor([1.0, 1e-3, 1e-30, float("nan")], dtype=torch.float64))
    torch.testing.assert_close(found[:3], torch.tensor([0.0, 30.0, MAX_PSNR], dtype=torch.float64))
    assert found[3].isnan()


@pytest.mark.parametrize(("height", "width"), [(24, 17), (11, 11), (32, 40)])
def test_ssim_agrees_with_scikit_image(height: int, width: int) -> None:
    images, targets = image_pairs(3, height, width)
    images[2], targets[2] = 0.25, 0.75  # without any structure
    found = ssim(images, targets)
    for index, (image, target) in enumerate(zip(images.double().numpy(), targets.double().numpy(), strict=True)):
        expected = structural_similarity(
            target,
            image,
            channel_axis=0,
            data_range=1,
            gaussian_weights=True,
            sigma=1.5,
            use_sample_covariance=False,
        )
        assert found[index].item() == pytest.approx(expected, abs=1e-12)


def test_ssim_of_equal_images_is_one_and_batches_do_not_mix() -> None:
    images, targets = image_pairs()
    torch.testing.assert_close(ssim(targets, targets), torch.ones(3, dtype=torch.float64))
    alone = torch.cat([ssim(images[i : i + 1], targets[i : i + 1]) for i in range(3)])
    torch.testing.assert_close(ssim(images, targets), alone)


def test_bad_images_are_refused() -> None:
    images, targets = image_pairs()
    with pytest.raises(ShapeError, match=r"images: expected \[N, 3, H, W\], got \[3, 24, 17\]"):
        psnr(images[0], targets)
    with pytest.raises(ShapeError, match=r"targets: expected \[3, 3, 24, 17\] as the images, got \[2, 3, 24, 17\]"):
        ssim(images, targets[:2])
    with pytest.raises(ShapeError, match=r"targets.*got list"):
        psnr(images, [1])  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"images: expected floating point.*uint8.*divide by 255"):
        ssim(images.byte(), targets)
    with pytest.raises(ValueError, match=r"images: expected values in \[0, 1\], got 0 to 1.5"):
        ssim(torch.tensor([0.0, 1.5]).repeat(1, 3, 12, 6), torch.zeros(1, 3, 12, 12))
    with pytest.raises(ValueError, match=r"targets: expected values in \[0, 1\], got nan"):
        ssim(images, targets * float("nan"))
    with pytest.raises(ShapeError, match="at least 11 x 11 pixels for SSIM"):
        ssim(images[..., :10], targets[..., :10])
    with pytest.raises(ShapeError, match=r"mask: expected \[3, 1, 24, 17\]"):
        psnr(images, targets, torch.ones(3, 24, 17, dtype=torch.bool))
    with pytest.raises(ValueError, match="mask: expected bool"):
        psnr(images, targets, torch.ones(3, 1, 24, 17))


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Folder of torch's checkpoints, empty, on a machine without network."""

    def refuse(url: str, **_: object) -> None:
        raise urllib.error.URLError("no network")

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(urllib.request, "urlopen", refuse)
    folder = tmp_path / "hub" / "checkpoints"
    folder.mkdir(parents=True)
    return folder


@pytest.fixture
def squeeze(hub: Path) -> Lpips:
    """LPIPS with a trunk of random weights that lie where torchvision keeps its own."""
    torch.manual_seed(0)
    torch.save(torchvision.models.squeezenet1_1(weights=None).state_dict(), hub / SQUEEZENET)
    return Lpips("squeeze")


def test_lpips_agrees_with_torchmetrics_image_by_image(squeeze: Lpips) -> None:
    images, targets = image_pairs(3, 32, 40)
    images[0] = targets[0]
    found = squeeze(images, targets)
    assert squeeze.name == "lpips_squeeze"
    assert found.shape == (3,)
    assert found[0].item() == 0
    assert found[2] > found[1] > 0
    for index in range(3):
        pair = images[index : index + 1], targets[index : index + 1]
        peer = learned_perceptual_image_patch_similarity(*pair, net_type="squeeze", normalize=True)
        torch.testing.assert_close(found[index], peer)
    assert squeeze(images[:1], targets[:1]).shape == (1,)


def test_lpips_refuses_what_it_cannot_measure(squeeze: Lpips) -> None:
    with pytest.raises(ShapeError, match="at least 17 x 17 pixels for lpips_squeeze"):
        squeeze(torch.rand(1, 3, 16, 32), torch.rand(1, 3, 16, 32))
    with pytest.raises(ValueError, match=r"images: expected values in \[0, 1\]"):
        squeeze(torch.full((1, 3, 32, 32), -1.0), torch.rand(1, 3, 32, 32))
    with pytest.raises(ValueError, match="unknown LPIPS trunk 'alexnet': did you mean 'alex'"):
        Lpips("alexnet")


@pytest.mark.parametrize(("trunk", "layers"), [("alex", 12), ("vgg", 30), ("squeeze", 13)])
def test_smallest_side_of_a_trunk(trunk: str, layers: int) -> None:
    name, _, side = metrics.TRUNKS[trunk]
    with torch.device("meta"):
        network = getattr(torchvision.models, name)(weights=None).features[:layers]
        network(torch.empty(1, 3, side, side))
        with pytest.raises(RuntimeError):
            network(torch.empty(1, 3, side - 1, side - 1))


@pytest.mark.parametrize(
    ("trunk", "file"), [("alex", "alexnet-owt-7be5be79.pth"), ("vgg", "vgg16-397923af.pth"), ("squeeze", SQUEEZENET)]
)
def test_lpips_says_which_weights_are_not_reachable(hub: Path, trunk: str, file: str) -> None:
    with pytest.raises(WeightsUnavailable) as caught:
        Lpips(trunk)
    message = str(caught.value)
    assert f"weights of the {trunk} trunk are not reachable" in message
    assert "no network" in message
    assert f"put https://download.pytorch.org/models/{file} into {hub} as {file}" in message
    assert "skipped" in message


def test_a_download_that_breaks_off_is_no_crash(hub: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Answer:
        def close(self) -> None:
            pass

    def broken(*_: object, **__: object) -> None:
        raise ConnectionResetError("broke off")

    monkeypatch.setattr(urllib.request, "urlopen", lambda *_, **__: Answer())
    monkeypatch.setattr(torch.hub, "download_url_to_file", broken)
    with pytest.raises(WeightsUnavailable, match=r"squeeze trunk are not reachable \(broke off\), skipped"):
        Lpips("squeeze")


def test_a_silent_server_is_not_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.setattr(metrics, "TIMEOUT", 0.2)
    started = time.monotonic()
    with socket.create_server(("127.0.0.1", 0)) as server:
        url = f"http://127.0.0.1:{server.getsockname()[1]}/trunk-0123abcd.pth"
        with (
            pytest.raises(WeightsUnavailable, match=r"timed out.*trunk-0123abcd.pth"),
            metrics._weights("a trunk", url),
        ):
            pytest.fail("the block must not be entered")
    assert time.monotonic() - started < 10


def test_unreadable_weights_are_named(hub: Path) -> None:
    (hub / SQUEEZENET).write_bytes(b"half a file")
    with pytest.raises(DataError, match=rf"{SQUEEZENET}: cannot be read as the weights of the squeeze trunk"):
        Lpips("squeeze")
    torch.save({"other": torch.zeros(1)}, hub / SQUEEZENET)
    with pytest.raises(DataError, match="Missing key"):
        Lpips("squeeze")


@pytest.fixture
def inception(hub: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Random weights of Inception v3 where torch-fidelity keeps its own."""
    module = pytest.importorskip("torch_fidelity.feature_extractor_inceptionv3")
    extractor = module.FeatureExtractorInceptionV3
    torch.manual_seed(0)
    with monkeypatch.context() as patch:
        patch.setattr(extractor, "load_state_dict", lambda self, state: None)
        patch.setattr(module, "load_state_dict_from_url", lambda *_, **__: None)
        torch.save(extractor("inception-v3-compat", ["64"]).state_dict(), hub / INCEPTION)
    return hub


def test_fid_agrees_with_a_matrix_square_root(inception: Path) -> None:
    metric = Fid(64, min_images=4)
    assert metric.name == "fid_inception_64"
    images, targets = image_pairs(6, 32, 32)
    metric.update(images[:2], targets[:2])
    with pytest.warns(UserWarning, match="fid_inception_64: 2 images are too few, expected at least 4"):
        assert metric.compute() is None
    metric.update(images[2:], targets[2:])
    assert metric.count == 6
    network = metric._metric.inception
    sets = [network((batch * 255).byte()).double().numpy() for batch in (images, targets)]
    means, covariances = [one.mean(0) for one in sets], [np.cov(one, rowvar=False) for one in sets]
    root = scipy.linalg.sqrtm(covariances[0] @ covariances[1]).real
    expected = np.square(means[0] - means[1]).sum() + np.trace(covariances[0] + covariances[1] - 2 * root)
    assert metric.compute() == pytest.approx(expected, rel=1e-3)


def test_fid_needs_more_images_than_features(hub: Path) -> None:
    pytest.importorskip("torch_fidelity")
    with pytest.raises(WeightsUnavailable, match=rf"Inception v3 are not reachable.*{INCEPTION}"):
        Fid()
    with pytest.raises(ValueError, match="features: expected 64, 192, 768 or 2048, got 100"):
        Fid(100)
    with pytest.raises(ValueError, match="min_images: expected at least 2, got 1"):
        Fid(64, min_images=1)


def test_fid_without_its_package_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch_fidelity.feature_extractor_inceptionv3", None)
    with pytest.raises(ImportError, match=r'pip install "cameo-diffusion\[evaluation\]"'):
        Fid()
