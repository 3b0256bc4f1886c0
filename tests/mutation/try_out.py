"""Mutations tried out: each alone in a copy of the project, on the tests of its file; which of them no test sees.

    python tests/mutation/try_out.py --seed 1 --count 60            # 60 other places; --in nn data: these folders only
    python tests/mutation/try_out.py --named 'nn/shift.py, OnlineShift'

A change is seen when a test fails that passes without it, or never ends.
"""

from __future__ import annotations

import argparse
import ast
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from mutation.mutate import Mutation, choose

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = ("engine", "circuit", "nn", "train", "data")
COPIED = ("sidestream", "tests", "benchmarks", "recipes", "examples", "docs", "pyproject.toml", "README.md", "Makefile")
LIMIT_SECONDS = 600
"""For all tests of one file; those that are over first are those named after it, then those that import it."""
OF_A_TEST_SECONDS = 60
FIRST_OF = {
    "circuit/test_cut.py": "chain_costs names slice split",
    "circuit/test_exactness.py": (
        "alias assignments difference freshness hidden inference_tensors measure memory opaque parts poison regions "
        "same step trace undo verify watch"
    ),
    "data/test_dataset.py": "pictures shapes",
    "engine/test_backends.py": "backends/eager backends/inductor backends/onnx_export backends/ort backends/ov",
    "engine/test_executors.py": (
        "executors/frame_parallel executors/inline executors/lane executors/pool executors/threads feed modes run stats"
    ),
    "engine/test_rules_updates.py": "rules/place rules/trainer",
    "engine/test_unroll.py": "unroll_stages unrolled",
    "nn/test_combine.py": "steppable",
    "nn/test_conv3d.py": "window",
    "nn/test_feedback_alignment.py": "feedback_ops feedback_weights",
    "train/test_diagnose.py": "diagnostics jacobians samples undisturbed",
    "train/test_fit.py": "folder loop moving_weights optimisers progress",
    "train/test_kill.py": "checkpoint",
    "train/test_predictive.py": "answering",
    "train/test_rules.py": "depth_parallel",
    "train/test_rules_gradients.py": "frame_gradient",
    "train/test_tasks.py": "tasks/classes tasks/task",
}
"""Test files, and the files of the package that they are about and not named after."""


def files_of(folders: Sequence[str]) -> list[str]:
    package = ROOT / "sidestream"
    return [str(p.relative_to(package)) for folder in folders for p in sorted((package / folder).rglob("*.py"))]


def chosen(seed: int, count: int, folders: Sequence[str] = FOLDERS, files: Sequence[str] = ()) -> list[Mutation]:
    """As many of each folder (of the first ones one more)."""
    found = []
    for n, folder in enumerate(folders):
        paths = [path for path in files_of([folder]) if not files or path in files]
        found += choose(ROOT / "sidestream", paths, seed, count // len(folders) + (n < count % len(folders)))
    return found


def files_testing(path: str) -> list[str]:
    """Test files for a file of the package: ``FIRST_OF``, named after it, those that import it or say its names most
    often, and the rest of its folder."""
    module = Path(path)
    dotted = ".".join(("sidestream", *module.with_suffix("").parts))
    tree = ast.parse((ROOT / "sidestream" / path).read_text(encoding="utf-8"))
    defined = [n.name for n in tree.body if isinstance(n, ast.ClassDef | ast.FunctionDef) and n.name[0] != "_"]
    words = re.compile(rf"\b({'|'.join([re.escape(dotted), *defined])})\b")
    texts = {p: p.read_text(encoding="utf-8") for p in sorted((ROOT / "tests").rglob("test_*.py"))}
    own = [p for p in texts if ROOT / "tests" / module.parts[0] in p.parents]
    told = {p: len(words.findall(text)) for p, text in texts.items() if p in own or dotted in text}
    about = str(module.with_suffix("").relative_to(module.parts[0]))
    first = [p for p in own if about in FIRST_OF.get(str(p.relative_to(ROOT / "tests")), "").split()]
    named = [p for p in own if p.name == f"test_{module.stem}.py"]
    ordered = [*first, *named, *sorted(told, key=lambda p: -told[p])]
    return [str(p.relative_to(ROOT)) for p in dict.fromkeys(ordered) if "mutation" not in p.parts]


class Copy:
    """The project in a folder of its own, to be changed. Tests that fail there without a change are left out."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        ignored = shutil.ignore_patterns("__pycache__", "*.png", "runs")
        for name in COPIED:
            if (ROOT / name).is_dir():
                shutil.copytree(ROOT / name, folder / name, ignore=ignored)
            else:
                shutil.copy(ROOT / name, folder / name)
        where = self._python("-c", "import sidestream; print(sidestream.__file__)")[1]
        assert Path(where.strip()) == folder / "sidestream" / "__init__.py", where
        self._passes: dict[str, bool] = {}

    def seen_by(self, mutation: Mutation) -> str | None:
        """The test that sees the change; None where none does."""
        file = self.folder / "sidestream" / mutation.path
        original = file.read_text(encoding="utf-8")
        tests = files_testing(mutation.path)
        file.write_text(mutation.apply(), encoding="utf-8")
        try:
            code, output = self._test(*tests)
            running = re.findall(r"^(\S+\.py::.+?)(?: PASSED| SKIPPED| XFAIL)?(?: +\[.*)?$", output, re.MULTILINE)[-1:]
            if code is None and running and self._test(*running)[0] is not None:
                running = []  # it was not that test that took so long
        finally:
            file.write_text(original, encoding="utf-8")
        if code is None and running and self._test(*running)[0] == 0:
            return f"{running[0]} (never ends)"
        if code in (0, None):
            return None
        failed = re.findall(r"^(?:FAILED|ERROR) (\S+\.py(?:::.+?)?)(?: - .*)?$", output, re.MULTILINE)[:1] or tests[:1]
        if failed[0] not in self._passes:
            self._passes[failed[0]] = self._test(failed[0])[0] == 0
        if self._passes[failed[0]]:
            return failed[0]
        assert "::" in failed[0], f"{failed[0]} fails without a change too:\n{output}"
        return self.seen_by(mutation)  # that test says nothing here; the others

    def _test(self, *names: str) -> tuple[int | None, str]:
        options = ("-x", "-v", "-n", "0", "-p", "no:cacheprovider", "--tb=no", "-rfE", f"--timeout={OF_A_TEST_SECONDS}")
        limit = 2 * OF_A_TEST_SECONDS if all("::" in name for name in names) else LIMIT_SECONDS
        useless = [f"--deselect={name}" for name, passes in self._passes.items() if not passes]
        return self._python("-m", "pytest", *options, *names, *useless, limit=limit)

    def _python(self, *words: str, limit: float = LIMIT_SECONDS) -> tuple[int | None, str]:
        """(exit code, or None where time was up; what was printed)."""
        data = os.environ.get("SIDESTREAM_DATA", str(ROOT.parent / "shared" / "data"))
        own = {"PYTHONPATH": str(self.folder), "PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1"}
        process = subprocess.Popen(
            [sys.executable, *words],
            cwd=self.folder,
            env={**os.environ, **own, "SIDESTREAM_DATA": data},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        try:
            output, _ = process.communicate(timeout=limit)
            return process.returncode, output
        except subprocess.TimeoutExpired as error:
            printed = error.stdout or b""
            return None, printed.decode() if isinstance(printed, bytes) else printed
        finally:
            if process.returncode is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.communicate()


def survivors(mutations: Sequence[Mutation], folder: Path) -> list[str]:
    """Names of the changes that no test sees, tried out in ``folder``; says what is done meanwhile."""
    copy, found = Copy(folder), []
    for n, mutation in enumerate(mutations, start=1):
        started = time.monotonic()
        test = copy.seen_by(mutation)
        if test is None:
            found.append(mutation.name)
        seconds = time.monotonic() - started
        sys.stdout.write(f"{n:3} {seconds:4.0f} s  {mutation.name}\n           {test or 'SURVIVES'}\n")
        sys.stdout.flush()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--count", type=int, default=60)
    parser.add_argument("--in", dest="folders", nargs="+", default=FOLDERS, choices=FOLDERS)
    parser.add_argument("--files", nargs="+", default=(), help='these only, as "nn/shift.py"')
    parser.add_argument("--named", help="every change whose name holds this text, whatever the seed")
    given = parser.parse_args()
    count = given.count if given.named is None else sys.maxsize
    places = chosen(given.seed, count, given.folders, given.files)
    places = [m for m in places if given.named is None or given.named in m.name]
    with tempfile.TemporaryDirectory() as folder:
        found = survivors(places, Path(folder))
    sys.stdout.write(f"seed {given.seed}: {len(found)} of {len(places)} survive\n")
    sys.stdout.writelines(f"  {name}\n" for name in found)


if __name__ == "__main__":
    main()
