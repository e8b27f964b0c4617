"""The rules by which a run is found to train on nothing useful, and what it says then.

The rules and their reasons:

- *Alignment at chance*: over the last `WINDOW` supervised steps, the alignment loss is at least `AT_CHANCE` of that
  of uniform attention. A run is judged from its supervised step `FIRST` on, counted after `lr_warmup_steps`. Of the 41
  runs with true matches in benchmarks/results/convergence, on five bases and a real room, the slowest is at 0.78 of it
  there; all 13 runs with random matches are at 1.00.
- *Few matches*: over the last `WINDOW` steps that were to be supervised, less than `FEW` of the tokens that could have
  had a match have one. A run is judged from the step `FIRST_COUNTED` on. Below that bound, the loss of a step rests on
  a handful of tokens, and almost all of the work is for tokens that teach nothing about views.
- *Data check*: `cameo.inspection` found that another reading of cameras and depth fits certainly better, or that none
  fits. It is known at the start.

A step counts for the first rule if it has a match, for the second if samples of it were to be supervised: steps of
weight 0 and batches that the pipeline does not align do not count. A run with fewer steps is never judged by them.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from cameo.attention.capture import AttentionLayer
from cameo.training.settings import TrainingConfig

__all__ = ["AT_CHANCE", "FEW", "FIRST", "FIRST_COUNTED", "WINDOW", "Alarm", "RunWatch"]

WINDOW = 50  # steps over which a run is judged: single steps differ by a third
FIRST, AT_CHANCE = 150, 0.97
FIRST_COUNTED, FEW = 20, 0.02


@dataclass(frozen=True)
class Alarm:
    """Something of a run that most likely makes its training useless.

    Attributes:
        word: what the progress bar, the records and the heading of the paragraph call it.
        seen: the figures that were seen.
        causes: what it comes from most likely.
        cure: what to do. `{run}` stands for the settings of the run on a command line.
    """

    word: str
    seen: str
    causes: str
    cure: str

    def paragraph(self, run: str) -> str:
        """Return all of it as text.

        Example:
            >>> Alarm("few matches", "0.1 %.", "little overlap.", "cameo check-data {run}.").paragraph("config=a.yaml")
            'Alarm, few matches: 0.1 %. Likely causes: little overlap. What to do: cameo check-data config=a.yaml.'

        Args:
            run: settings that name those of the run, as `config=outputs/run/config.yaml`.
        """
        return " ".join(f"{name}: {text}" for name, text in self.parts(run).items())

    def parts(self, run: str) -> dict[str, str]:
        """Return the parts of the paragraph by what stands before each."""
        cure = self.cure.format(run=run)
        return {f"Alarm, {self.word}": self.seen, "Likely causes": self.causes, "What to do": cure}


class RunWatch:
    """Judges a run by the records of its steps; on the main process, which has them.

    Example:
        >>> from cameo.attention.layout import TokenLayout
        >>> layer = AttentionLayer(0, "mid_block.attn", heads=2, layout=TokenLayout("b (v h w)"))
        >>> watch = RunWatch([layer], TrainingConfig())
        >>> watch.see([{"alignment_loss": 5.5, "alignment_chance": 5.545, "supervised": 9, "matchable": 768}] * 149)
        >>> [alarm.word for alarm in watch.alarms()]
        ['few matches']
        >>> watch.see([{"alignment_loss": 5.5, "alignment_chance": 5.545, "supervised": 9, "matchable": 768}])
        >>> [alarm.word for alarm in watch.alarms()]
        ['alignment at chance', 'few matches']

    Args:
        layers: those that are supervised, whose paths are told.
        config: the settings of the run.

    Attributes:
        data_is_wrong: what the check of the data says is wrong; None where nothing is, or nothing was checked.
    """

    def __init__(self, layers: Sequence[AttentionLayer], config: TrainingConfig) -> None:
        self.config = config
        self.data_is_wrong: str | None = None
        self._layers = ", ".join(layer.path for layer in layers)
        self._steps = self._counted = 0
        self._losses: deque[tuple[float, float]] = deque(maxlen=WINDOW)
        self._matches: deque[tuple[float, float]] = deque(maxlen=WINDOW)

    def see(self, entries: Iterable[Mapping[str, Any]]) -> None:
        """Take in the records of steps: `alignment_loss`, `alignment_chance`, `supervised` and `matchable` of each.

        Records without them, as those of a run without matches, are passed over.
        """
        for entry in entries:
            if not entry.get("matchable"):
                continue
            self._counted += 1
            self._matches.append((entry["supervised"], entry["matchable"]))
            if entry["alignment_chance"]:
                self._steps += 1
                self._losses.append((entry["alignment_loss"], entry["alignment_chance"]))

    def alarms(self) -> list[Alarm]:
        """Return the alarms that the latest steps give."""
        found = [self._at_chance(), self._few_matches(), self._wrong_data()]
        return [alarm for alarm in found if alarm is not None]

    def words(self) -> str:
        """Return the alarms in a few words for the progress bar and the records; empty without one."""
        return ", ".join(alarm.word for alarm in self.alarms())

    def _at_chance(self) -> Alarm | None:
        if self._steps < FIRST + self.config.lr_warmup_steps:
            return None
        loss, chance = (sum(values) / len(self._losses) for values in zip(*self._losses, strict=True))
        if loss < AT_CHANCE * chance:
            return None
        wrong = " The check of the data found a mistake, see below." if self.data_is_wrong else ""
        return Alarm(
            "alignment at chance",
            f"after {self._steps} supervised steps the alignment loss of {self._layers} is {loss:.3f}, mean of the "
            f"last {len(self._losses)}; attention that looks everywhere alike has {chance:.3f}.",
            "matches that the images do not support, from wrong cameras or depth; a layer that cannot tell positions, "
            "or whose queries and keys are not trained (target_modules); a learning_rate "
            f"({self.config.learning_rate:g}) or loss_weight ({self.config.loss_weight:g}) that is too small for "
            f"{self.config.max_train_steps} steps.{wrong}",
            "cameo check-data {run} looks for wrong cameras and depth, cameo probe {run} for a layer that finds "
            "matches before any training; then raise learning_rate or loss_weight, or train longer.",
        )

    def _few_matches(self) -> Alarm | None:
        if self._counted < FIRST_COUNTED:
            return None
        found, possible = (sum(values) for values in zip(*self._matches, strict=True))
        if found >= FEW * possible:
            return None
        config = self.config
        overlap = f"min_overlap ({config.min_overlap:g})" if config.camera_rig is None else "the camera_rig"
        return Alarm(
            "few matches",
            f"of the tokens that could have had a match in the last {len(self._matches)} steps, "
            f"{found / possible:.2%} had one ({found / len(self._matches):.1f} a step); expected at least {FEW:.0%}.",
            f"views that overlap too little, see {overlap} and num_views ({config.num_views}); depth without "
            "measurements or in another unit than the positions of the cameras (depth_scale); cameras in another "
            "convention; a layer whose queries reach only a part of the other views.",
            "cameo check-data {run} shows what fits and how many tokens match; then choose views that overlap more, or "
            "another layer (cameo probe {run}).",
        )

    def _wrong_data(self) -> Alarm | None:
        if self.data_is_wrong is None:
            return None
        return Alarm(
            "data check: wrong",
            f"cameras, depth and images of the training set do not fit together: {self.data_is_wrong}.",
            "another convention of the cameras or another unit of the depth than was read (docs/conventions.md).",
            "cameo check-data {run} shows it in pictures and looks for more mistakes; correct the data or the settings "
            "that read them, and train anew.",
        )
