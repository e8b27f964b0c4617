"""The checks that every backbone has to pass, on the classes as their authors published them."""

from __future__ import annotations

from pathlib import Path

from tests.helpers import backbone_checks as checks


def test_the_output_is_untouched(subject: checks.Subject) -> None:
    checks.check_output_is_untouched(subject)


def test_the_gradient_reaches_what_it_should(subject: checks.Subject) -> None:
    checks.check_gradient(subject)


def test_a_deepcopy_stands_on_its_own(subject: checks.Subject) -> None:
    checks.check_copies(subject)


def test_one_batch_is_overfitted_with_lora_alone(subject: checks.Subject) -> None:
    checks.check_lora_overfits(subject)


def test_lora_is_saved_and_loaded_bit_for_bit(subject: checks.Subject, tmp_path: Path) -> None:
    checks.check_lora_round_trip(subject, tmp_path / "lora")
