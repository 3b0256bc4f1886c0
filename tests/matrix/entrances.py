"""The ways in: a row of the matrix, run; what must be refused, refused; what is answered, compared."""

from __future__ import annotations

import contextlib
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from matrix.axes import Row, has_memory, no_classes
from matrix.subject import Answers, Subject, assert_close
from torch import Tensor
from torch.utils import _pytree as pytree

import sidestream as ss
from contract import assert_equal
from sidestream.cli import main
from sidestream.errors import CircuitError
from sidestream.models.heads import CELL_PX
from sidestream.nn.combine import Chain

Check = Callable[[Row, Subject, Path], None]


def refusal(row: Row, layout: str) -> tuple[type[Exception], str] | None:
    """What a row must be refused with, if at all: the error, and a part of its sentence."""
    if row.entrance == "command" and (task := no_classes(row.model)):
        return ss.InputError, f"answers with {task}, not with classes"
    if row.executor == "frame-parallel" and row.entrance != "clips" and has_memory(row.model, layout):
        return CircuitError, "cannot run frame-parallel: it has stages with state"
    return None


def check_frames(row: Row, subject: Subject, folder: Path) -> None:
    """``run`` on frames, one after the other."""
    _check_run(row, subject.net, subject.frames, lambda: subject.of_frames)


def check_clips(row: Row, subject: Subject, folder: Path) -> None:
    """``run`` on whole clips, one after the other."""
    _check_run(row, subject.model, subject.clips, lambda: subject.of_clips)


def _check_run(row: Row, net: Any, items: list[Tensor], expected: Callable[[], Answers]) -> None:
    costs = "measured" if isinstance(net, Chain) else "uniform"  # a chain is cut inside of its layers only so
    stages = ss.cut(net, items[0], num_stages=row.num_stages, costs=costs)
    assert len(stages) == row.num_stages
    with ss.run(ss.pipelined(stages), items, executor=row.executor, **row.way.options) as outputs:
        found = [(output.frame_index, output.value) for output in outputs]
    assert [n for n, _ in found] == [n for n, _ in expected()], "not every frame answered once, in order"
    for (n, value), (_, wanted) in zip(found, expected(), strict=True):
        if row.way.is_exact:
            assert_equal(value, wanted, f"frame {n}")
        else:
            for a, b in zip(pytree.tree_leaves(value), pytree.tree_leaves(wanted), strict=True):
                assert_close(a, b)


def check_command(row: Row, subject: Subject, folder: Path) -> None:
    """``sidestream run`` on a video, with the model from a folder; the lines of ``--json``."""
    lines = folder / "answers.jsonl"
    flags = ["run", subject.source, "--model", str(subject.saved()), "--json", str(lines), "--top-k", "100000"]
    flags += ["--stages", str(row.num_stages), "--executor", row.executor, *row.way.flags]
    said = io.StringIO()
    with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
        code = main(flags)
    if code != 0:
        assert code == 2, said.getvalue()
        raise ss.InputError(said.getvalue())
    records = [json.loads(line) for line in lines.read_text().splitlines()]
    assert [r["frame"] for r in records] == [n for n, _ in subject.of_video]
    read = _check_points if subject.info.task == "keypoints" else _check_classes
    for record, (_, expected) in zip(records, subject.of_video, strict=True):
        read(record, expected, subject, row.way.is_exact)


def _check_classes(record: dict[str, Any], logits_1N: Tensor, subject: Subject, is_exact: bool) -> None:
    found = [(t["logit"], t["index"]) for t in record["top"]]
    assert [logit for logit, _ in found] == sorted((logit for logit, _ in found), reverse=True)
    logits_N = torch.tensor([logit for logit, _ in sorted(found, key=lambda t: t[1])])
    assert sorted(index for _, index in found) == list(range(logits_1N.shape[1]))
    assert_close(logits_N, logits_1N[0])
    if is_exact:
        assert torch.equal(logits_N, logits_1N[0]), f"differs by up to {(logits_N - logits_1N[0]).abs().max()}"


def _check_points(record: dict[str, Any], maps_1PHW: Tensor, subject: Subject, is_exact: bool) -> None:
    """By hand: the mean place of the cells around the largest, weighted by exp, in pixels of the frame."""
    height, width = subject.info.input_spec.size_px
    for map_HW, (x, y), score in zip(maps_1PHW[0], record["points_px"], record["scores"], strict=True):
        top, left = divmod(int(map_HW.argmax()), map_HW.shape[1])
        weights = {
            (i, j): float((map_HW[i, j] - map_HW.max()).exp())
            for i in range(max(0, top - 2), min(top + 3, map_HW.shape[0]))
            for j in range(max(0, left - 2), min(left + 3, map_HW.shape[1]))
        }
        total = sum(weights.values())
        wanted_x = sum(w * (j + 0.5) for (_, j), w in weights.items()) / total * CELL_PX * (width + 24) / width
        wanted_y = sum(w * (i + 0.5) for (i, _), w in weights.items()) / total * CELL_PX * (height + 8) / height
        assert (abs(x - wanted_x), abs(y - wanted_y), abs(score - 1 / total)) < (1e-2, 1e-2, 1e-4)


CHECKS: dict[str, Check] = {"frames": check_frames, "clips": check_clips, "command": check_command}
