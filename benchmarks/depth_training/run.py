"""The comparison table of the talk, BP against GPipe against (Skip-)Sideways, each cell measured, beside peers.

    python benchmarks/depth_training/run.py                       # all parts but speed; any machine, busy or not
    python benchmarks/depth_training/run.py --parts speed         # times things: a quiet machine, please
    python benchmarks/depth_training/run.py --quick --out DIR     # a look at every part, small

Parts: memory, schedule, gradients, peers, partime, speed. Records are added to results.jsonl as they come; the newest
of each case counts; "memory" goes on where it was when stopped. "gradients" needs JHMDB under SIDESTREAM_DATA. Writes
table.md and the pictures too.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from sidestream.report.measure import machine
from sidestream.report.record import json_lines, read_json_lines

HERE = Path(__file__).parent


def memory_part(quick: bool, known: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    from memory import cases, measure_all

    wanted = [case for case in cases(quick=quick) if case not in known]
    for case, found in zip(wanted, measure_all(wanted), strict=True):
        print(f"{case}: {found['activation_bytes'] / 2**20:.1f} MiB", flush=True)
        yield {"case": case, **found}


def schedule_part(quick: bool, known: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    from observed import measure

    yield from measure(sizes=((3, 8),) if quick else ((4, 8), (2, 16), (4, 16), (8, 16), (8, 64), (16, 64)))


def gradients_part(quick: bool, known: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    from gradients import measure

    yield from measure(**({"size_px": 32, "num_clips": 1, "num_steps": 4} if quick else {}))


def peers_part(quick: bool, known: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    from peers_equal import measure

    yield from measure(quick=quick)


def partime_part(quick: bool, known: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    from fill_up import measure

    yield from measure(num_ticks=20 if quick else 40)


def speed_part(quick: bool, known: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    from speed import measure

    yield from measure(quick=quick)


PARTS: dict[str, Callable[[bool, list[dict[str, Any]]], Iterator[dict[str, Any]]]] = {
    "memory": memory_part,
    "schedule": schedule_part,
    "gradients": gradients_part,
    "peers": peers_part,
    "partime": partime_part,
    "speed": speed_part,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="*", choices=[*PARTS], default=[p for p in PARTS if p != "speed"])
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--again", action="store_true", help="measure memory that is known, too")
    parser.add_argument("--out", type=Path, default=HERE)
    given = parser.parse_args()
    given.out.mkdir(exist_ok=True, parents=True)
    path = given.out / "results.jsonl"
    where = machine()
    for part in given.parts:
        records = read_json_lines(path) if path.exists() else []
        known = [] if given.again else [r["case"] for r in records if r["part"] == part]
        with json_lines(path, append=True) as write:
            for record in PARTS[part](given.quick, known):
                write({"part": part, **record, "machine": where})
    newest = {json.dumps([r["part"], r["case"]]): r for r in read_json_lines(path)}
    from table import write_all

    write_all(list(newest.values()), given.out)


if __name__ == "__main__":
    main()
