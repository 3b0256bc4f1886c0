"""The comparison: forms, families, records and their restart, tables and what becomes of the talk's marks."""

from __future__ import annotations

import time
from typing import Any

import pytest
import torch

from sidestream.errors import InputError, ModelError
from sidestream.evals.compare import Setting, compare
from sidestream.evals.compare_forms import forms_of
from sidestream.evals.compare_speed import Runner, seconds_of
from sidestream.evals.compare_table import (
    accuracy_table,
    collect,
    cost_table,
    speed_table,
    spread,
    talk_table,
    training_memory_table,
)
from sidestream.evals.compare_talk import DEFAULT_MODELS, MARKS, TALK_FAMILIES, family_of
from sidestream.models import create_model, list_models
from sidestream.nn.sliding import SlidingWindow
from sidestream.nn.steppable import step_through
from sidestream.report.energy import EnergyMeter

TINY = Setting(num_frames=4, size_px=32, lengths=(4,), num_repeats=2, seconds=0.01, num_threads=1, causality_size_px=32)


def test_every_default_model_exists_and_has_a_family() -> None:
    assert set(DEFAULT_MODELS) <= set(list_models("*"))
    families = [family_of(name) for name in DEFAULT_MODELS]
    assert "other" not in families
    firsts = dict(reversed([(family, name) for family, name in zip(families, DEFAULT_MODELS, strict=True)]))
    assert [firsts[f] for f in TALK_FAMILIES] == ["frame_resnet50", "cnn_lstm", "i3d", "timesformer_divided"]


@torch.no_grad()
def test_an_image_model_works_frame_by_frame() -> None:
    model = create_model("timm/test_resnet", num_classes=5)
    forms = forms_of(model, num_frames=4, answer_every=2)
    clip_BTCHW = torch.rand(1, 3, 3, 32, 32)
    expected = torch.stack([model(clip_BTCHW[:, t]) for t in range(3)], dim=1)
    torch.testing.assert_close(forms.clip(clip_BTCHW), expected.mean(1))
    torch.testing.assert_close(step_through(forms.stream, clip_BTCHW)[0], expected)
    assert (forms.stream_kind, forms.answers is not None) == ("step form", True)


def test_a_clip_model_without_step_form_slides() -> None:
    forms = forms_of(torch.nn.Flatten(), num_frames=4, answer_every=2)
    assert isinstance(forms.stream, SlidingWindow)
    assert (forms.stream_kind, forms.stream.num_frames, forms.stream.period_ticks) == ("sliding window", 4, 2)


class Sleepy(torch.nn.Module):
    def forward(self, clip_BTCHW: torch.Tensor) -> torch.Tensor:
        time.sleep(0.02)
        return clip_BTCHW[:, -1, :, 0, 0]


def test_latency_is_of_the_answering_step_and_throughput_of_all_frames() -> None:
    joules = iter(range(0, 1000, 6))
    meter = EnergyMeter("made up", lambda: float(next(joules)))
    runner = Runner(SlidingWindow(Sleepy(), 2, period_ticks=3), torch.rand(1, 3, 4, 4), meter)
    runner.warm_up(2)
    speed = runner.measure(0.05)
    assert speed.num_frames == 3 * speed.num_answers >= 3
    assert 0.02 <= speed.latency_seconds < 0.2
    assert speed.frames_per_second <= 3 / 0.02
    assert speed.frames_per_second * speed.latency_seconds > 1  # a step that swallows costs next to nothing
    assert speed.joules_per_frame == 6 / speed.num_frames


def test_a_call_on_a_gpu_is_timed_to_its_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """As a GPU does: the call returns at once, and the work is done when the device is waited for."""
    waiting: list[int] = []

    def synchronize(device: object) -> None:
        time.sleep(0.02 * len(waiting))
        waiting.clear()

    monkeypatch.setattr(torch.cuda, "synchronize", synchronize)
    assert seconds_of(lambda: waiting.append(1), num_repeats=2, device="cuda") >= 0.02


def test_records_restart_where_they_were() -> None:
    parts = ("params", "flops", "causality", "latency")
    names = ["timm/test_resnet"]
    records = list(compare(names, TINY, parts=parts))
    keys = [(r["part"], r.get("repeat")) for r in records]
    assert keys == [("params", None), ("flops", None), ("causality", None), ("latency", 1), ("latency", 2)]
    assert all(r["setting"]["num_frames"] == 4 and r["machine"]["torch"] for r in records)
    assert records[0]["num_parameters"] == sum(p.numel() for p in create_model(*names, num_classes=21).parameters())
    assert records[1]["clip_flops"] == 4 * records[1]["stream_flops_per_answer"] > 0
    assert records[2]["is_causal"]
    assert list(compare(names, TINY, parts=parts, done=records)) == []
    again = list(compare(names, TINY, parts=parts, done=records[:2] + records[4:]))
    assert [(r["part"], r.get("repeat")) for r in again] == keys[2:4]


def test_wrong_parts_and_models_are_refused_at_once() -> None:
    with pytest.raises(InputError, match="unknown part 'speed'; there are params"):
        list(compare(["timm/test_resnet"], TINY, parts=("speed",)))
    with pytest.raises(ModelError, match="unknown model"):
        list(compare(["timm/test_resnet", "no_such_net"], TINY, parts=("params",)))


def test_a_model_that_refuses_the_input_is_told_and_the_others_go_on() -> None:
    setting = Setting(num_frames=4, size_px=30, num_repeats=1, seconds=0.01, num_threads=1)  # 30 is no multiple of 14
    records = list(compare(["timm/vit_small_patch14_dinov2", "timm/test_resnet"], setting, parts=("flops",)))
    assert "error" in records[0]
    assert "clip_flops" in records[1]
    found = collect(records)
    assert "flops" in found[0].errors


def made_up(**changes: dict[str, Any]) -> list[dict[str, Any]]:
    """Records of one model per column, such that every mark that has an order is confirmed."""
    figures: dict[str, dict[str, Any]] = {
        "frame_a": {"family": "frame", "mib": 10, "top1": 0.2, "is_causal": True, "ms": 5.0},
        "rnn_a": {"family": "rnn", "mib": 15, "top1": 0.25, "is_causal": True, "ms": 6.0},
        "conv_a": {"family": "conv3d", "mib": 30, "top1": 0.5, "is_causal": False, "ms": 50.0},
        "vit_a": {"family": "transformer", "mib": 90, "top1": 0.6, "is_causal": False, "ms": 500.0},
    }
    records: list[dict[str, Any]] = []
    for model, own in figures.items():
        f = own | changes.get(model, {})
        about = {"model": model, "family": f["family"]}
        stream = {"stream_kind": "step form", "stream_delay_ticks": 2, "stream_period_ticks": 1}
        records.append({"part": "params", "num_parameters": 1_500_000, **about})
        records.append({"part": "causality", "is_causal": f["is_causal"], "num_answers": 4, **about})
        for repeat in (1, 2, 3):
            timed = {"latency_seconds": f["ms"] * repeat / 2e3, "frames_per_second": 10.0, "clip_seconds": 0.1}
            records.append({"part": "latency", "repeat": repeat, "joules_per_frame": None, **timed, **stream, **about})
        for work in ("clip", "stream", "train"):
            peak = {"work": work, "num_frames": 16, "peak_bytes": f["mib"] * 2**20, "parameter_bytes": 2**20}
            records.append({"part": "memory", **peak, **about})
        records.append({"accuracy": True, "method": "scratch", "top1": f["top1"], "model": model})
    return records


def verdicts(**changes: dict[str, Any]) -> dict[str, str]:
    records = made_up(**changes)
    found = collect([r for r in records if "part" in r], [r for r in records if "accuracy" in r])
    _, rows = talk_table(found, 16)
    return {row[0]: row[-1] for row in rows}


def test_marks_are_confirmed_where_the_figures_say_so() -> None:
    told = verdicts()
    assert list(told) == list(MARKS)
    assert told["accuracy"] == told["memory at test"] == "confirmed"
    assert told["causal"] == "confirmed by poisoning"
    assert told["memory at training"] == "confirmed"
    assert told["latency / throughput"] == (
        "the same mark for all, so no order to check; measured, they differ by a factor of 100.0"
    )
    assert told["energy"] == "not measured for all families"


def test_marks_are_contradicted_where_the_figures_say_so() -> None:
    told = verdicts(rnn_a={"mib": 9, "top1": 0.5}, conv_a={"is_causal": True})
    assert told["accuracy"] == "not confirmed: rnn_a is as good as conv_a or better"
    assert told["memory at training"] == "not confirmed: rnn_a is as good as frame_a or better"
    assert told["memory at test"] == "confirmed"
    assert told["causal"] == "not confirmed: conv_a is causal"


def test_the_tables_hold_the_figures() -> None:
    records = made_up()
    found = collect([r for r in records if "part" in r], [r for r in records if "accuracy" in r])
    header, rows = talk_table(found, 16)
    assert header[3] == "3D convolutions: conv_a"
    assert rows[0][1:5] == ["✗ 20.0 %", "✗ 25.0 %", "✓ 50.0 %", "✓ 60.0 %"]
    assert rows[1][3] == "✗ 50 ms + 2 frames, 10.0 frames/s"
    assert rows[4][1] == "✗ not measurable here"
    header, rows = speed_table(found)
    assert len(header) == len(rows[0])
    assert rows[0][3] == "5.0 [2.5 – 7.5]"
    header, rows = cost_table(found, 16)
    assert [row[header.index("M parameters")] for row in rows] == ["1.5"] * 4
    assert [row[-1] for row in rows] == ["20.0", "25.0", "50.0", "60.0"]
    header, rows = training_memory_table(found)
    assert header[1:] == ["parameters, MiB", "16 frames, MiB"]
    assert rows[3] == ["vit_a", "1.0", "90"]
    probe = {"model": "vit_a", "method": "linear probe", "top1": 0.75, "weights": "ImageNet", "input": "8 frames"}
    assert accuracy_table([probe])[1] == [["vit_a", "linear probe", "75.0", "ImageNet; 8 frames"]]
    found = collect([r for r in records if "part" in r], [probe])
    assert found[3].top1() is None  # a probe on trained features is not compared with training from scratch
    assert spread([]) == "-"
