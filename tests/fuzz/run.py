"""Cut random models, as many as asked for, and tell what was wrong: each fault as a small model.

python tests/fuzz/run.py --programs 2000 --first-seed 0 --seconds 600
python tests/fuzz/run.py --seed 17                       # one program, with its source
python tests/fuzz/run.py --without layouts no_grad       # features that are turned off
"""

from __future__ import annotations

import argparse
import re
import signal
import sys
import time
import warnings
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from fuzz.check import STAGE_COUNTS, Verdict, some_counts, verdict
from fuzz.program import Program, report
from fuzz.random_models import random_program
from fuzz.shrink import shrunk
from fuzz.statements import DEFAULT, FEATURES, SWITCHES

SECONDS_PER_PROGRAM = 120


def main() -> int:
    """Exit code 0 when no program was wrong, else 1."""
    options = _options()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    features = [name for name in [*DEFAULT, *options.add] if name not in options.without]
    first = options.first_seed if options.seed is None else options.seed
    seeds = range(first, first + (options.programs if options.seed is None else 1))
    book = _Book(options.shrink)
    start = time.monotonic()
    for n, seed in enumerate(seeds, start=1):
        program = random_program(seed, features)
        if options.seed is not None:
            _say(report(program))
        counts = options.stages or some_counts(seed, 2)
        book.add(program, limited(program, counts))
        if n % 10 == 0:
            so_far = ", ".join(f"{count} {kind}" for kind, count in sorted(book.kinds.items()))
            _say(f"{time.monotonic() - start:6.0f} s, {n} programs, next seed {seed + 1}: {so_far}")
        if time.monotonic() - start > options.seconds:
            break
    book.tell()
    return int(book.kinds["wrong"] > 0)


def limited(program: Program, stage_counts: Sequence[int]) -> Verdict:
    """The verdict; a program that does not end is wrong."""
    try:
        with _alarm(SECONDS_PER_PROGRAM):
            return verdict(program, stage_counts)
    except TimeoutError:
        return Verdict("wrong", f"did not end in {SECONDS_PER_PROGRAM} s", "time")


class _Book:
    """Verdicts, counted; the first programs of each kind of fault are shrunk and told at once."""

    def __init__(self, num_shrunk: int) -> None:
        self.num_shrunk = num_shrunk
        self.kinds: Counter[str] = Counter()
        self.reasons: dict[str, Counter[str]] = defaultdict(Counter)
        self.seeds: dict[str, list[int]] = defaultdict(list)

    def add(self, program: Program, found: Verdict) -> None:
        self.kinds[found.kind] += 1
        if found.kind == "right":
            return
        reason = f"{found.check}: {_general(found.reason)}"
        self.reasons[found.kind][reason] += 1
        self.seeds[reason].append(program.seed)
        if found.kind != "invalid" and self.reasons[found.kind][reason] <= self.num_shrunk:
            self._tell_shrunk(program, found)

    def _tell_shrunk(self, program: Program, found: Verdict) -> None:
        counts = (found.num_stages,) if found.num_stages else STAGE_COUNTS
        start = _general(found.reason)[:40]

        def still_fails(smaller: Program) -> bool:
            again = limited(smaller, counts)
            is_same = (again.kind, again.check) == (found.kind, found.check)
            return is_same and (found.kind == "wrong" or _general(again.reason).startswith(start))

        small = shrunk(program, still_fails)
        last = limited(small, counts)
        _say(f"\n{last.kind.upper()} in {last.num_stages} stages, {last.check}: {last.reason}\n{report(small)}")

    def tell(self) -> None:
        """The summary."""
        total = sum(self.kinds.values())
        _say("\n" + ", ".join(f"{count} of {total} {kind}" for kind, count in self.kinds.most_common()))
        for kind in ("invalid", "refused", "wrong"):
            for reason, count in self.reasons[kind].most_common():
                seeds = ", ".join(map(str, self.seeds[reason][:6]))
                _say(f"  {kind:8} {count:4}  {reason}  (seeds {seeds})")


def _general(reason: str) -> str:
    """The start of a message, without numbers: what is counted as one reason."""
    text = reason.partition("; ")[0][:140]
    return re.sub(r"\d[\d.]*(e[-+]\d+)?", "#", text)


@contextmanager
def _alarm(seconds: int) -> Iterator[None]:
    def ring(*_: object) -> None:
        raise TimeoutError

    before = signal.signal(signal.SIGALRM, ring)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--programs", type=int, default=500)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--seed", type=int, help="this program alone, with its source")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="stop after this time")
    parser.add_argument("--stages", type=int, nargs="+", help="numbers of stages; else two, by seed")
    parser.add_argument("--shrink", type=int, default=1, help="programs to shrink for each kind of fault")
    known = [*FEATURES, *SWITCHES]
    parser.add_argument("--without", nargs="+", default=[], choices=known, metavar="FEATURE", help=", ".join(known))
    parser.add_argument("--add", nargs="+", default=[], choices=known, metavar="FEATURE")
    return parser.parse_args()


def _say(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
