"""What nets of one depth keep of their accuracy when they are judged live: in sequence, pipelined, in groups, parallel.

    SIDESTREAM_DATA=... python benchmarks/streaming/run.py                    # all parts; what is there is not repeated
    SIDESTREAM_DATA=... python benchmarks/streaming/run.py --quick --out DIR  # a look at every part, small
    python benchmarks/streaming/run.py --report                               # tables and pictures from the records

Parts: timing (a simulated device on an endless stream), overload (the same, under a camera that is too fast), accuracy
(JHMDB on it, with the weights of recipes/predictive_keypoints.py --runs recipes/predictive_keypoints/runs), trainings
(the same at one rate, for all of its variants), synthetic
(moving shapes at growing speed; trains its own nets, into runs/), control (live's net and clips, without a clock), live
(real time on this machine, in two processes, with and without OMP_WAIT_POLICY=PASSIVE; see live.py). A seed without
weights is left out.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from sidestream.errors import InputError
from sidestream.report.measure import machine
from sidestream.report.record import json_lines, read_json_lines

HERE = Path(__file__).parent
RECIPES = HERE.parents[1] / "recipes"
WEIGHTS, NETS = RECIPES / "predictive_keypoints" / "runs", RECIPES / "inception_keypoints" / "runs"
Record = dict[str, Any]
Known = list[Record]


def timing_part(given: argparse.Namespace, device: Any, known: Known) -> Iterator[Record]:
    from simulated import timing

    yield from timing(device, known)


def overload_part(given: argparse.Namespace, device: Any, known: Known) -> Iterator[Record]:
    from simulated import overload

    yield from overload(device, known)


def accuracy_part(given: argparse.Namespace, device: Any, known: Known) -> Iterator[Record]:
    from simulated import accuracy

    yield from accuracy(device, given.weights, given.seeds, known, given.quick)


def trainings_part(given: argparse.Namespace, device: Any, known: Known) -> Iterator[Record]:
    from trainings import measure

    yield from measure(device, given.weights, given.seeds, known, given.quick)


def synthetic_part(given: argparse.Namespace, device: Any, known: Known) -> Iterator[Record]:
    from synthetic import measure

    runs = given.out / "runs" / ("quick" if given.quick else "synthetic")
    yield from measure(device, runs, given.seeds, known, given.quick)


def control_part(given: argparse.Namespace, device: Any, known: Known) -> Iterator[Record]:
    from control import measure

    try:
        yield from measure(given.quick, known, nets_folder=given.nets)
    except InputError as error:
        print(f"the part control ended: {error}")


def live_part(given: argparse.Namespace, device: Any, known: Known) -> Iterator[Record]:
    from live import measure

    if not given.one_process:
        run_other_process(given)
    try:
        yield from measure(given.quick, known, nets_folder=given.nets, device=given.device)
    except InputError as error:
        print(f"the part live ended: {error}")


def run_other_process(given: argparse.Namespace) -> None:
    """Measures what this process, with its OMP_WAIT_POLICY, does not (``live_nets``); into the same records."""
    from live_nets import other_environment

    options = ["--parts", "live", "--one-process", "--out", str(given.out), "--nets", str(given.nets)]
    options += ["--device", given.device, *(["--quick"] if given.quick else [])]
    done = subprocess.run([sys.executable, __file__, *options], env=other_environment(), check=False)
    if done.returncode:
        print(f"the part live: the process with the other OMP_WAIT_POLICY ended with {done.returncode}")


PARTS: dict[str, Callable[[argparse.Namespace, Any, Known], Iterator[Record]]] = {
    "timing": timing_part,
    "overload": overload_part,
    "accuracy": accuracy_part,
    "trainings": trainings_part,
    "synthetic": synthetic_part,
    "control": control_part,
    "live": live_part,
}
ON_THE_DEVICE = ("timing", "overload", "accuracy", "trainings", "synthetic")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="*", choices=[*PARTS], default=[*PARTS])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--weights", type=Path, default=WEIGHTS, help="folder of runs of recipes/predictive_keypoints")
    parser.add_argument("--nets", type=Path, default=NETS, help="folder of nets of recipes/inception_keypoints")
    parser.add_argument("--device", default="cpu", help="of the part live: cpu, or cuda (with --out)")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--report", action="store_true", help="measure nothing")
    parser.add_argument("--out", type=Path, default=HERE)
    parser.add_argument("--one-process", action="store_true", help=argparse.SUPPRESS)  # start no other, and no report
    given = parser.parse_args(arguments)
    if given.quick and given.out == HERE:
        parser.error("--quick would mix its records with those that are kept here; give another folder (--out)")
    if given.device != "cpu" and given.out == HERE:
        parser.error(f"--device {given.device} would mix its records with the CPU's; give another folder (--out)")
    given.out.mkdir(exist_ok=True, parents=True)
    path = given.out / "results.jsonl"
    where = machine()
    for part in [] if given.report else given.parts:
        device = device_at(path, where) if part in ON_THE_DEVICE else None
        known = [r["case"] for r in records_of(path) if r["part"] == part]
        for record in PARTS[part](given, device, known):
            with json_lines(path, append=True) as write:
                write({"part": part, **record, "machine": where})
            if part in ON_THE_DEVICE:  # the others say what they do
                print(f"{part}: {record['case']}", flush=True)
    if given.one_process:
        return
    newest = {json.dumps([r["part"], r["case"]]): r for r in records_of(path)}
    if not newest:
        print("no records yet")
        return
    from table import write_all

    print(write_all(list(newest.values()), given.out))


def device_at(path: Path, where: Record) -> Any:
    """The simulated device of the records there; measured first where they have none."""
    from simulated import device_of, profile

    found = [r for r in records_of(path) if r["part"] == "profile"]
    if not found:
        found = [{"part": "profile", **profile(), "machine": where}]
        with json_lines(path, append=True) as write:
            write(found[0])
    return device_of(found[0])


def records_of(path: Path) -> list[Record]:
    return read_json_lines(path) if path.exists() else []


if __name__ == "__main__":
    main()
