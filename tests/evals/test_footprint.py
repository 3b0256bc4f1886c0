"""Peak memory, measured in fresh processes: nets of known activations, and the guard that predicts."""

from __future__ import annotations

import pytest
from evals.tiny_nets import KEPT_MIB

from sidestream.errors import StageError
from sidestream.evals.compare_memory import available_bytes, predicted_bytes
from sidestream.evals.footprint import Case, measure_footprint
from sidestream.models import create_model

MIB = 2**20


def case(function: str, work: str, num_frames: int = 1) -> Case:
    return Case(f"evals.tiny_nets:{function}", work, num_frames, size_px=8)  # type: ignore[arg-type]


def test_a_training_step_holds_the_activations_and_a_call_does_not() -> None:
    """When the way back begins: the inputs of ten products, the last answer, its gradient, what a product makes of it,
    and that times its input. A call without gradients holds two at once."""
    found = measure_footprint(case("keeps_steps", "train"))
    assert found.peak_bytes == pytest.approx((KEPT_MIB + 4 * 16) * MIB, rel=0.1)
    assert found.parameter_bytes == 40
    found = measure_footprint(case("keeps_steps", "clip"))
    assert found.peak_bytes == pytest.approx(2 * 16 * MIB, rel=0.1)


def test_a_model_by_name() -> None:
    found = measure_footprint(Case("timm/test_resnet", "train", 2, size_px=32))
    parameters = sum(
        p.numel() * p.element_size() for p in create_model("timm/test_resnet", num_classes=21).parameters()
    )
    assert found.peak_bytes > parameters  # the gradients, at the least
    assert parameters <= found.parameter_bytes < 1.1 * parameters  # and the buffers


def test_why_a_process_failed_is_told() -> None:
    with pytest.raises(StageError, match=r"too_big, train, 1 frames: MemoryError: no such machine"):
        measure_footprint(case("too_big", "train"))
    with pytest.raises(StageError, match="not done after 0 s"):
        measure_footprint(case("keeps_steps", "train"), timeout_seconds=0.01)


def test_the_guard_predicts_from_shorter_clips() -> None:
    assert predicted_bytes([], 8) is None
    assert predicted_bytes([(8, 100)], 16) == 200
    assert predicted_bytes([(8, 100), (16, 200)], 64) == pytest.approx(800)
    assert predicted_bytes([(8, 100), (16, 400)], 64) == pytest.approx(6400)  # quadratic, as it was seen
    assert predicted_bytes([(8, 100), (16, 110)], 32) == 220  # never less than in proportion


def test_free_memory_is_known_here() -> None:
    free = available_bytes()
    assert free is None or 64 * MIB < free < 2**50


@pytest.mark.parametrize("free", [10**9, 10**6])
def test_a_case_that_would_not_fit_is_left_out(free: int, monkeypatch: pytest.MonkeyPatch) -> None:
    from sidestream.evals import compare_memory
    from sidestream.evals.compare import Setting
    from sidestream.evals.footprint import Footprint

    monkeypatch.setattr(compare_memory, "available_bytes", lambda device: free)
    monkeypatch.setattr(compare_memory, "measure_footprint", lambda case: Footprint(case.num_frames * 10**5, 7, True))
    records = list(compare_memory.memory_records("net", Setting(lengths=(16, 4, 8, 8)), {}, lambda text: None))
    assert [(r["work"], r["num_frames"]) for r in records] == [
        ("clip", 16),
        ("stream", 16),
        ("train", 4),
        ("train", 8),
        ("train", 16),
    ]
    assert ["skipped" in r for r in records] == [False, False, False, False, free == 10**6]
    if free == 10**6:
        assert records[-1]["skipped"].startswith("would need about 0.0 GiB")
