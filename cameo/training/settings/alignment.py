"""Settings of the supervision: what the attention is aligned with, how much, and when."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from cameo.choices import HEAD_KINDS, IMPLEMENTATIONS, NORMALIZATIONS, REDUCTIONS
from cameo.config import CameoConfig
from cameo.errors import unknown_name
from cameo.settings import Settings, setting

__all__ = ["AlignmentSettings"]


@dataclass
class AlignmentSettings(Settings):
    """Supervision: CAMEO's alignment loss, or REPA's for comparison."""

    # What is supervised: the attention of a layer, by matches (cameo, the default), or for comparison the output of the
    # same layer, by frozen image features (repa).
    supervision: str = setting("cameo", choices=("cameo", "repa"))
    # Supervised layer: its index among the cross-view layers in execution order, its module path, or a list of these,
    # whose losses are averaged; auto probes the layers first. null, the default, is the adapter's choice, which is the
    # paper's layer 10 where the model has it.
    layer: int | str | list[int | str] | None = setting(None)
    # What joins the attention heads into the logits that are supervised: mlp (the paper's, the default), mean, none
    # (each head alone), or the keywords of `cameo.AlignmentHead`, as {kind: mlp, depth: 2}.
    head: str | dict[str, Any] = setting("mlp")
    # Factor of the alignment loss in the training loss, >= 0; 0 trains without it. 0.02 by default, as in the paper.
    # The small U-Nets of the study gain as much with it as with 0.1, which costs quality at low noise; a small
    # transformer needs 0.1 to learn within a few hundred steps (docs/results.md).
    loss_weight: float = setting(CameoConfig.weight, at_least=0)
    # How loss_weight changes over the steps: constant, or down to 0 at max_train_steps, linear or as a cosine. constant
    # by default, as in the paper; a weight that decays harms the quality at low noise less.
    weight_schedule: str = setting("constant", choices=("constant", "linear", "cosine"))
    # Step from which on there is no alignment loss, >= 1. null, the default, aligns to the last step.
    alignment_until: int | None = setting(None, at_least=1)
    # Samples whose noise level, a share of the last timestep in [0, 1), is lower are not aligned. 0, the default,
    # aligns all.
    alignment_min_noise: float = setting(0.0, share="[0, 1)")
    # Softmax over the keys of each view alone (per_view, the paper's) or of all other views together (all_views). null,
    # the default, is per_view, or all_views where a query sees one token per view.
    normalize: str | None = setting(None, choices=NORMALIZATIONS)
    # Whether the layer, which sees one view at a time, is made to attend across the views (SV3D). false by default: it
    # changes inference too.
    inflate: bool = setting(False)
    # Whether the layer is supervised within each view, for a model that carries the reference in the input channels of
    # every view (SV3D): a token's match in the reference is then also a token of its own view. Nothing changes at
    # inference. false by default: most models show their reference elsewhere.
    own_view: bool = setting(False)
    # How the losses of the matches are joined: mean (the default), sum, or released, what the authors' code computes.
    reduction: str = setting(CameoConfig.reduction, choices=REDUCTIONS)
    # Standard deviation, in tokens, of the target around each match, >= 0. 0, the default, is the match alone, as in
    # the paper.
    softness: float = setting(CameoConfig.softness, at_least=0)
    # Way to compute the loss: chunked or triton (in one sweep, bounded memory), or reference (readable, slow). auto,
    # the default, takes the fastest that the machine has.
    alignment_implementation: str = setting("auto", choices=IMPLEMENTATIONS, changeable=True)
    # Number of rows (a query token with the keys that its softmax is over) whose loss is computed in a step, >= 1,
    # drawn at random from those with a match, from the seed and the step; loss and gradient are those of all rows on
    # average. The time of the loss is proportional to it: 21 views of 64x64 tokens have 1.1 million rows with a match.
    # null, the default, computes all.
    max_queries: int | None = setting(None, at_least=1)
    # Where matches come from: depth and cameras (depth, the default, with the fewest false matches), nearest point maps
    # with a cycle check (point_map, the paper's), image features (features), the tracks of the data, as of a COLMAP
    # model (tracks), or a matcher of images (matcher).
    correspondence: str = setting("depth", choices=("depth", "point_map", "features", "tracks", "matcher"))
    # For all but depth: a match is kept if the way there and back ends less than so many tokens from its start, > 0.
    # 1.5 by default, the paper's.
    cycle_threshold: float = setting(1.5, above=0)
    # Where matches are computed: in the training step on its device (step, the default), or by the data workers beside
    # it (worker), which is faster if there is no GPU. Tracks, which are lists of different lengths, are always matched
    # by the data workers.
    correspondence_in: str = setting("step", choices=("step", "worker"), changeable=True)
    # Folder of matches that cameo precompute has filled. null, the default, computes the matches.
    precomputed_correspondence: str | None = setting(None, path=True, changeable=True)
    # Control experiments, with matches that carry no information about the sample: those of the next sample of the
    # batch (other_scene), or random tokens (random). none by default.
    correspondence_control: str = setting("none", choices=("none", "other_scene", "random"))
    # Relative standard deviation of noise on each pixel's depth before matching, in [0, 1), to measure how exact the
    # depth must be. 0 by default.
    geometry_noise: float = setting(0.0, share="[0, 1)")

    def check(self) -> None:
        """Refuse settings that contradict each other."""
        if self.inflate and self.own_view:
            raise ValueError(
                "own_view=true supervises the layer as it attends, within each view, and inflate=true joins the views; "
                "give one of them"
            )
        kind = self.head if isinstance(self.head, str) else self.head.get("kind", "mlp")
        if kind not in HEAD_KINDS:
            raise unknown_name("head", kind, HEAD_KINDS)
        outside = self.correspondence_in == "worker" or self.precomputed_correspondence is not None
        if self.supervision == "repa":
            of_matches = ("correspondence_control", "geometry_noise", "correspondence_in", "precomputed_correspondence")
            for name in (*of_matches, "max_queries"):
                if getattr(self, name) != getattr(AlignmentSettings, name):
                    raise ValueError(
                        f"{name}={getattr(self, name)}: is about matches, and supervision=repa uses none; "
                        "leave it out, or give supervision=cameo"
                    )
        if self.geometry_noise and self.correspondence != "depth":
            raise ValueError(
                f"geometry_noise={self.geometry_noise}: is noise on the depth, which correspondence="
                f"{self.correspondence} does not match; give correspondence=depth, or geometry_noise=0"
            )
        if self.geometry_noise and outside:
            raise ValueError(
                f"geometry_noise={self.geometry_noise}: is drawn anew in each step, so the matches must be computed "
                "there; give correspondence_in=step and precomputed_correspondence=null"
            )
        if self.correspondence == "matcher" and self.correspondence_in == "worker":
            raise ValueError(
                "correspondence=matcher: the matcher runs in the training step; give correspondence_in=step, or "
                "precomputed_correspondence= for matches that are computed once"
            )
        if self.correspondence == "features" and outside:
            raise ValueError(
                "correspondence=features: the network that computes the features runs in the training step; give "
                "correspondence_in=step and precomputed_correspondence=null"
            )
        if self.correspondence not in ("depth", "point_map") and self.reduction == "released":
            raise ValueError(
                f"correspondence={self.correspondence}: gives no distances in space, which reduction=released needs; "
                "give reduction=mean, or correspondence=depth"
            )
