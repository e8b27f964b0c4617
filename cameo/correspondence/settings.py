"""Settings of the image features and of the matcher that supervise in place of geometry."""

from __future__ import annotations

from dataclasses import dataclass

from cameo.settings import Settings, setting

__all__ = ["FeatureSettings", "MatcherSettings"]


@dataclass
class FeatureSettings(Settings):
    """Image features, for supervision=repa and correspondence=features."""

    # Network of the features: a vision transformer of timm, by its name there, or xfeat (XFeat, of which the extra
    # matching brings the weights, so that it needs no download). DINOv2 ViT-S/14 by default: REPA uses DINOv2, and the
    # small one costs least.
    feature_model: str = setting("vit_small_patch14_dinov2.lvd142m")
    # File with the weights of feature_model, for a machine without network. null, the default, takes those of the Hub,
    # or those of the package of xfeat.
    feature_checkpoint: str | None = setting(None, path=True, changeable=True)
    # Whether the features are pretrained, true by default; false draws random weights, which is a control.
    feature_pretrained: bool = setting(True)
    # Side in pixels of the images that feature_model sees, >= 1, to which smaller ones are enlarged. null, the default,
    # takes the model's own, which is 256 for xfeat.
    feature_size: int | None = setting(None, at_least=1)

    def check(self) -> None:
        """Refuse settings that contradict each other."""
        if self.feature_checkpoint is not None and not self.feature_pretrained:
            raise ValueError(
                f"feature_pretrained=false: random weights, and feature_checkpoint={self.feature_checkpoint}; give one"
            )


@dataclass
class MatcherSettings(Settings):
    """Matcher of keypoints, for correspondence=matcher."""

    # What pairs the pixels of two images: xfeat (XFeat, of which the extra matching brings the weights), the default,
    # or a keypoint matcher of transformers (LightGlue, EfficientLoFTR, SuperGlue), by Hub id or folder. Mind the
    # licenses: those of SuperPoint and SuperGlue exclude commercial use.
    matcher: str = setting("xfeat")
    # Length in pixels of the shorter side of the images that the matcher sees, >= 32, to which smaller ones are
    # enlarged. null, the default, takes 256 for xfeat, and what a matcher of transformers was trained with.
    matcher_size: int | None = setting(None, at_least=32)
    # Least confidence of a pair, a share in [0, 1): for xfeat the cosine similarity of two keypoints. null, the
    # default, takes 0.82 for xfeat, as its authors do, and keeps what a matcher of transformers returns.
    matcher_threshold: float | None = setting(None, share="[0, 1)")
    # Pairs that miss the cameras by more (Sampson's distance) are left out, in pixels of the images that the matcher
    # sees, > 0. 4 by default, which the poses of hand-held sequences need; null does not ask the cameras.
    max_epipolar_error: float | None = setting(4.0, above=0)
