"""table.md and the pictures from the records of results.jsonl."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from sidestream.report.record import write_text
from sidestream.report.table import markdown_table

MIB = 2**20
Records = Sequence[dict[str, Any]]


def of(records: Records, part: str, **case: Any) -> list[dict[str, Any]]:
    """Records of a part whose case has these values."""
    return [r for r in records if r["part"] == part and all(r["case"].get(k) == v for k, v in case.items())]


def distinct(records: Records, name: str) -> list[Any]:
    return list(dict.fromkeys(r["case"][name] for r in records))


def write_all(records: Records, folder: Path) -> None:
    from plot import draw_all

    parts: list[Callable[[Records], str]] = [talk, memory, schedule, gradients, peers, partime, speed]
    write_text(folder / "table.md", "\n".join(text for part in parts if (text := part(records))))
    draw_all(records, folder)


TALK = (
    ("BP", "backprop", "any", "chain rule", "backprop, frame by frame"),
    ("BPTT", "bptt", "any", "chain rule", None),
    ("GPipe", "gpipe", "any", "pipelining of operations", "gpipe"),
    ("GPipe, recomputing", "gpipe, recomputing", "any", "pipelining of operations", "gpipe, recomputing"),
    ("1F1B (`Exact`)", "1f1b", "any", "pipelining of operations", "1f1b"),
    ("1F1B, recomputing", "1f1b, recomputing", "any", "pipelining of operations", "1f1b, recomputing"),
    ("Sideways", "sideways", "temporally smooth", "pipelining and smoothness", "sideways"),
    ("Skip-Sideways", "skip-sideways", "temporally smooth", "pipelining and smoothness", None),
)
"""Title, method, inputs, uses, and the rule whose gradients are compared with autograd's."""


def talk(records: Records) -> str:
    """The talk's table: eight stages, clips of 64 frames; "-" where nothing was measured."""
    rows = []
    for title, method, inputs, uses, rule in TALK:
        counted = of(records, "schedule", method=method.split(",")[0], num_stages=8, num_frames=64)
        held = of(records, "memory", method=method, num_stages=8, num_frames=64)
        full = [r["idle_when_full"] for r in counted if r.get("idle_when_full") is not None]
        kept = "-" if not counted else str(max(counted[0]["kept_inputs"]))
        rows.append(
            [
                title,
                inputs,
                uses,
                (f"{100 * counted[0]['idle_share']:.0f} %" if counted else "-")
                + (f" ({100 * full[0]:.0f} %)" if full else ""),
                kept + (f"; {_mib(held[0]):.1f} MiB" if held else ""),
                _correct(records, rule),
            ]
        )
    header = ["", "inputs", "uses", "blocking: idle (once full)", "buffering: inputs of a stage; activations"]
    return "## The talk's table\n\n" + markdown_table([*header, "gradients: relative error"], rows)


def _correct(records: Records, rule: str | None) -> str:
    """Exact rules: the worst stage. Sideways: best and worst stage, by the step between frames."""
    if rule is None:
        return "-"
    found = {
        (r["case"]["dtype"], r["case"]["step"]): r
        for r in of(records, "gradients", rule=rule, num_stages=8, weights="random")
    }
    if rule != "sideways":
        names = (("float32", "fp32"), ("float64", "fp64"))
        return ", ".join(f"{worst(found[d, 1]):.0e} in {name}" for d, name in names if (d, 1) in found) or "-"
    errors = {step: per_stage(r, "same_frames", "relative_error") for (_, step), r in found.items()}
    return ", ".join(
        f"{'still' if s == 'still' else f'step {s}'}: {min(e):.1g} to {max(e):.1g}" for s, e in errors.items()
    )


def memory(records: Records) -> str:
    some = of(records, "memory")
    texts = []
    for fixed, moving, title in (
        ("num_stages", "num_frames", "Activations (MiB) against the frames of a clip, {} stages"),
        ("num_frames", "num_stages", "Activations (MiB) against the number of stages, {} frames"),
    ):
        for value in distinct(some, fixed):
            here = [r for r in some if r["case"][fixed] == value]
            columns = sorted(distinct(here, moving))
            if len(columns) < 3:
                continue
            rows = [
                [m, *(_first(of(here, "memory", method=m, **{moving: c}), _mib) for c in columns)]
                for m in distinct(here, "method")
            ]
            texts.append(f"## {title.format(value)}\n\n" + markdown_table(["method", *map(str, columns)], rows))
    return "\n".join(texts)


def _mib(record: dict[str, Any]) -> float:
    return record["activation_bytes"] / MIB


def _first(found: Records, value: Callable[[dict[str, Any]], float]) -> float | None:
    return value(found[0]) if found else None


def schedule(records: Records) -> str:
    rows = []
    for r in of(records, "schedule"):
        formula = r["idle_share_by_formula"]
        waits = r.get("ticks_to_gradient")
        rows.append(
            [
                f"{r['case']['method']}, K = {r['case']['num_stages']}, M = {r['case']['num_frames']}",
                f"{r['idle_share']:.3f}",
                "-" if formula is None else f"{formula:.3f}",
                "-" if r.get("idle_when_full") is None else f"{r['idle_when_full']:.3f}",
                " ".join(map(str, r["kept_inputs"])),
                "yes" if r["kept_inputs"] == r["kept_by_formula"] else "NO",
                "-" if waits is None else " ".join("-" if w is None else str(w) for w in waits),
            ]
        )
    if not rows:
        return ""
    header = ["counted on the run", "idle", "formula", "once full", "inputs kept, stages 1 to K", "formula"]
    header.append("ticks to the gradient")
    return "## Idle slots and kept inputs\n\n" + markdown_table(header, rows)


def gradients(records: Records) -> str:
    some = of(records, "gradients")
    if not some:
        return ""
    texts = ["## Gradients against autograd's\n"]
    exact = [r for r in some if r["case"]["rule"] != "sideways"]
    rows = [
        [f"{r['case']['rule']}, {r['case']['num_stages']} stages", r["case"]["dtype"], f"{worst(r):.1e}"] for r in exact
    ]
    texts.append(markdown_table(["exact rules, one clip", "type", "largest relative error of a stage"], rows))
    for K in distinct(some, "num_stages"):
        rows = []
        for r in of(some, "gradients", rule="sideways", num_stages=K):
            for kind in ("same_frames", "clip"):
                what = f"{r['case']['weights']} weights, step {r['case']['step']}, {kind.replace('_', ' ')}"
                errors, cosines = per_stage(r, kind, "relative_error"), per_stage(r, kind, "cosine")
                rows.append([what, *(f"{e:.2g} / {c:.2f}" for e, c in zip(errors, cosines, strict=True))])
        header = [f"Sideways, {K} stages: relative error / cosine", *(f"stage {i}" for i in range(1, K + 1))]
        texts.append(markdown_table(header, rows))
    return "\n".join(texts)


def worst(record: dict[str, Any]) -> float:
    return max(s["clip"]["relative_error"] or 0.0 for clip in record["per_clip"] for s in clip)


def per_stage(record: dict[str, Any], kind: str, name: str) -> list[float]:
    """Median over the clips."""
    columns = zip(*record["per_clip"], strict=True)
    found = [[s[kind][name] for s in column if s[kind][name] is not None] for column in columns]
    return [statistics.median(values) if values else math.nan for values in found]


def peers(records: Records) -> str:
    equal, held = of(records, "peers", what="equality"), of(records, "peers", what="memory")
    texts = []
    if equal:
        rows = [
            [r["case"]["who"], r["case"]["dtype"], f"{r['from_autograd']:.1e}", _small(r.get("from_ours"))]
            for r in equal
        ]
        header = ["largest difference of any parameter", "type", "from autograd", "from our 1F1B"]
        texts.append("## torch.distributed.pipelining, two processes: gradients\n\n" + markdown_table(header, rows))
    if held:
        rows = [
            [
                f"{r['case']['schedule']}, {r['case']['num_frames']} frames in {r['case']['num_micro']} micro-batches",
                *((rank["peak_bytes"] - rank["parameter_bytes"]) / MIB for rank in r["ranks"]),
                *(f"{rank['rss_bytes'] / MIB:.0f}" for rank in r["ranks"]),
            ]
            for r in held
        ]
        header = ["eight stages, four per process", "rank 0 (MiB)", "rank 1 (MiB)", "whole rank 0", "whole rank 1"]
        texts.append("## The same: activations per process\n\n" + markdown_table(header, rows))
    return "\n".join(texts)


def _small(value: float | None) -> str:
    return "-" if value is None else f"{value:.1e}"


def partime(records: Records) -> str:
    rows = [
        [
            f"{r['case']['optimizer']}: {r['case']['fill']}",
            _small(r["ours_from_masked"]),
            _small(r["moved_before_first_gradient"][0]),
            _small(max(r["from_masked_when_filled"])),
            _small(max(r["from_masked_at_end"])),
            _small(max(r["masked_moved_at_end"])),
        ]
        for r in of(records, "partime")
    ]
    if not rows:
        return ""
    header = [
        "PARTIME's tick",
        "ours from masked",
        "stage 1 moved before its first gradient",
        "from masked, pipeline filled",
        "from masked, end",
        "training itself moved",
    ]
    return "## Weights after PARTIME's fill-up (relative, the worst stage)\n\n" + markdown_table(header, rows)


def speed(records: Records) -> str:
    texts = []
    for net in distinct(of(records, "speed"), "net"):
        rows = []
        for r in of(records, "speed", net=net):
            ratios, seconds = r["ratios"], statistics.median(r["seconds"])
            rows.append(
                [
                    r["case"]["method"],
                    f"{r['case']['num_frames'] / seconds:.1f}",
                    f"{statistics.median(ratios):.2f} [{min(ratios):.2f}, {max(ratios):.2f}]",
                    _idle(r),
                    _busy(r),
                ]
            )
        case = of(records, "speed", net=net)[0]["case"]
        title = f"## Speed: {net}, {case['num_frames']} frames of {case['size_px']} px, {case['repeats']} repeats\n\n"
        header = ["method", "frames/s", "ratio to backprop, 1 thread", "idle, of two workers", "busy / wall, per stage"]
        texts.append(title + markdown_table(header, rows))
    return "\n".join(texts)


def _idle(record: dict[str, Any]) -> str:
    pairs = zip(record["seconds"], record["busy_seconds"], strict=True)
    shares = [1 - sum(busy) / (2 * seconds) for seconds, busy in pairs if busy]
    return f"{statistics.median(shares):.2f}" if shares else "-"


def _busy(record: dict[str, Any]) -> str:
    pairs = [(s, b) for s, b in zip(record["seconds"], record["busy_seconds"], strict=True) if len(b) > 1]
    if not pairs:
        return "-"
    return " ".join(f"{statistics.median(b[n] / s for s, b in pairs):.2f}" for n in range(len(pairs[0][1])))
