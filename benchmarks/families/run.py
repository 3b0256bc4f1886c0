"""The talk's table, measured, and I3D on a stream against its 64-frame sliding window at the same answer rate.

    python benchmarks/families/run.py            # --quick for a look in a few minutes; --only i3d_stream

The first part is ``sidestream compare`` at its default setting: results.jsonl, tables.md and compare.png here, with
the accuracies of accuracy*.jsonl. The second writes
i3d_stream.jsonl: operations and time per answer of both, an answer every 8 frames. Both go on where they were when
stopped and started again.
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path
from typing import Any

import torch

from sidestream.cli.compare import measure_to, show
from sidestream.evals.compare import PARTS, Setting
from sidestream.evals.compare_forms import forms_of
from sidestream.evals.compare_speed import Runner
from sidestream.evals.compare_talk import DEFAULT_MODELS
from sidestream.evals.flops import stream_flops
from sidestream.models import create_model
from sidestream.models.i3d import TIME_STRIDE
from sidestream.report.measure import machine, num_cores
from sidestream.report.record import json_lines, read_json_lines

HERE = Path(__file__).parent
WINDOW = 64


def i3d_stream(size_px: int, num_repeats: int, num_threads: int, path: Path) -> None:
    """Operations and time per answer, in the step form and over the window, in turn."""
    torch.set_num_threads(num_threads)
    known = {(r["model"], r["repeat"], r["size_px"]) for r in (read_json_lines(path) if path.exists() else [])}
    for name in ("i3d", "i3d_causal"):
        if all((name, n, size_px) in known for n in range(1, num_repeats + 1)):
            continue
        torch.manual_seed(0)
        forms = forms_of(create_model(name), num_frames=WINDOW, answer_every=TIME_STRIDE)
        frame_BCHW = torch.rand(1, 3, size_px, size_px) * 2 - 1
        flops = {"stream": stream_flops(forms.stream, frame_BCHW), "window": stream_flops(forms.window, frame_BCHW)}
        runners = {"stream": Runner(forms.stream, frame_BCHW), "window": Runner(forms.window, frame_BCHW)}
        for runner in runners.values():
            runner.warm_up(TIME_STRIDE)
        with json_lines(path, append=True) as write:
            for repeat in range(1, num_repeats + 1):
                print(f"{name}: stream against window of {WINDOW}, repeat {repeat} of {num_repeats}", flush=True)
                record: dict[str, Any] = {"model": name, "repeat": repeat, "size_px": size_px, "window": WINDOW}
                for kind, runner in runners.items():
                    speed = runner.measure(1.0)
                    record[f"{kind}_seconds_per_answer"] = TIME_STRIDE / speed.frames_per_second
                    record[f"{kind}_flops_per_answer"] = flops[kind]
                if (name, repeat, size_px) not in known:
                    write({**record, "answer_every": TIME_STRIDE, "num_threads": num_threads, "machine": machine()})


def tell(path: Path) -> None:
    """The two ratios, and whether the stream needs at most a quarter."""
    records = read_json_lines(path)
    for name, size_px in dict.fromkeys((r["model"], r["size_px"]) for r in records):
        some = [r for r in records if (r["model"], r["size_px"]) == (name, size_px)]
        for unit, scale, title in (("flops", 1e9, "GFLOPs"), ("seconds", 1e-3, "ms")):
            stream = statistics.median(r[f"stream_{unit}_per_answer"] for r in some) / scale
            window = statistics.median(r[f"window_{unit}_per_answer"] for r in some) / scale
            ratios = [r[f"stream_{unit}_per_answer"] / r[f"window_{unit}_per_answer"] for r in some]
            spread = f"{statistics.median(ratios):.3f} [{min(ratios):.3f} – {max(ratios):.3f}]"
            is_kept = "at most a quarter" if statistics.median(ratios) <= 0.25 else "MORE than a quarter"
            print(
                f"{name}, {size_px} px, {title} per answer (every {TIME_STRIDE} frames): stream {stream:.1f}, "
                f"window of {WINDOW} {window:.1f}, ratio {spread}: {is_kept}"
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=list(DEFAULT_MODELS))
    parser.add_argument("--parts", nargs="+", default=list(PARTS), choices=PARTS)
    parser.add_argument("--only", choices=("compare", "i3d_stream"))
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=1.0)
    parser.add_argument("--size", type=int, default=112)
    parser.add_argument("--threads", type=int, default=num_cores())
    parser.add_argument("--accuracy", type=Path, nargs="*", default=sorted(HERE.glob("accuracy*.jsonl")))
    parser.add_argument("--out", type=Path, default=HERE)
    parser.add_argument("--quick", action="store_true", help="48 px, clips of 8 and 16 frames, one repeat, in quick/")
    o = parser.parse_args()
    setting = Setting(size_px=o.size, num_repeats=o.repeats, seconds=o.seconds, num_threads=o.threads)
    if o.quick:
        o.out = o.out / "quick"
        setting = Setting(
            size_px=48, lengths=(8, 16), num_repeats=1, seconds=0.2, num_threads=o.threads, causality_size_px=48
        )
    o.out.mkdir(parents=True, exist_ok=True)
    if o.only != "compare":
        i3d_stream(setting.size_px, setting.num_repeats, o.threads, o.out / "i3d_stream.jsonl")
        tell(o.out / "i3d_stream.jsonl")
    if o.only != "i3d_stream":
        records = measure_to(o.out, tuple(o.models), setting, o.parts)
        chosen = [r for r in records if r["model"] in o.models]
        show(o.out, chosen, setting.num_frames, tuple(o.accuracy))


if __name__ == "__main__":
    main()
