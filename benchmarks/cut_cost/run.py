"""What it costs to compare the stages of a cut with the model: seconds of ``cut`` with check "off", "once" and "full".

    python benchmarks/cut_cost/run.py            # --quick for a look; --against FOLDER: another checkout's cut, too

Every cut is a fresh process, the settings interleaved; models of torchvision with random weights, 224 x 224, 4 stages,
measured costs, all intra-op threads. Writes results.jsonl and table.md here.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections import defaultdict
from pathlib import Path
from statistics import median

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
MODELS = ("resnet50", "mobilenet_v3_large", "vit_b_16", "swin_t")
CASE = """
import sys, time, torch, torchvision, sidestream as ss
model, check = sys.argv[1:]
torch.manual_seed(0)
net, frame = getattr(torchvision.models, model)(weights=None).eval(), torch.rand(1, 3, 224, 224)
options = {} if check == "before" else {"check": check}
ss.cut(torch.nn.Linear(2, 2), torch.rand(1, 2), num_stages=1)  # imports
started = time.perf_counter()
ss.cut(net, frame, num_stages=4, **options)
print(time.perf_counter() - started)
"""


def seconds_of(model: str, check: str, folder: Path) -> float:
    """One cut in a fresh process."""
    environment = os.environ | {"PYTHONPATH": str(folder)}
    command = [sys.executable, "-W", "ignore", "-c", CASE, model, check]
    done = subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True, check=True)
    return float(done.stdout.split()[-1])


def main() -> None:
    from rich.progress import track

    from sidestream.report.measure import machine
    from sidestream.report.record import json_lines, write_text

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="one model, two passes; prints only")
    parser.add_argument("--passes", type=int, default=5)
    parser.add_argument("--against", type=Path, help="a checkout from before the comparison")
    args = parser.parse_args()
    models, passes = (MODELS[:1], 2) if args.quick else (MODELS, args.passes)
    checks = [*(["before"] if args.against else []), "off", "once", "full"]
    cases = [(m, c) for _ in range(passes) for m in models for c in checks]
    seconds: dict[tuple[str, str], list[float]] = defaultdict(list)
    for model, check in track(cases, description="cutting"):
        seconds[model, check].append(seconds_of(model, check, args.against if check == "before" else ROOT))
    base = checks[0]
    lines = [f"| model | {' | '.join(checks)} |", f"| --- |{' ---: |' * len(checks)}"]
    for model in models:
        cells = []
        for check in checks:
            ratios = [a / b for a, b in zip(seconds[model, check], seconds[model, base], strict=True)]
            spread = "" if check == base else f" ({median(ratios):.2f}x [{min(ratios):.2f} – {max(ratios):.2f}])"
            cells.append(f"{median(seconds[model, check]):.2f} s{spread}")
        lines.append(f"| {model} | {' | '.join(cells)} |")
    print("\n".join(lines))
    if args.quick:
        return
    with json_lines(HERE / "results.jsonl") as write:
        for (model, check), values in seconds.items():
            write({"model": model, "check": check, "seconds": values, "machine": json.loads(json.dumps(machine()))})
    write_text(HERE / "table.md", "\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
