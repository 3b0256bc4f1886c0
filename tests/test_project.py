"""The package as a whole: direction of imports, cost of an import, public names, habits that a machine can check."""

from __future__ import annotations

import ast
import importlib
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import sidestream

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "sidestream"
SOURCES = sorted(PACKAGE.rglob("*.py"))

PUBLIC = [
    "Clip",
    "DirectFeedback",
    "Exact",
    "Forward",
    "Frame",
    "InputError",
    "InputSpec",
    "Output",
    "SidestreamError",
    "Sideways",
    "available_backends",
    "chart",
    "chart_png",
    "compile_stages",
    "create_model",
    "cut",
    "forecast",
    "from_pretrained",
    "input_spec_of",
    "list_models",
    "overlay",
    "parallel",
    "pipelined",
    "prepare",
    "push_to_hub",
    "read",
    "run",
    "run_many",
    "save_pretrained",
    "semi_parallel",
    "sequential",
    "stream",
    "to_stream",
    "tune",
    "with_feedback",
    "with_periods",
    "with_random_feedback",
    "write",
]
"""Every public name, sorted. A new one is added here on purpose."""

HEAVY = {"torchvision", "timm", "transformers", "accelerate", "matplotlib", "onnxruntime", "onnx", "onnxscript"} | {
    "openvino",
    "tyro",
}
"""Packages that are imported where they are used, never by ``import sidestream``."""

PACKAGES = [".".join(p.parent.relative_to(ROOT).parts) for p in SOURCES if p.name == "__init__.py"]
IMPORT_ALL = "import " + ", ".join(name for name in PACKAGES if not name.startswith("sidestream.cli"))
"""``import sidestream`` and all of its packages but the command line."""


def python(code: str) -> str:
    """What a fresh interpreter prints."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_imports_run_one_way():
    command = Path(sys.executable).with_name("lint-imports")
    done = subprocess.run([command, "--no-cache"], capture_output=True, text=True, timeout=120, cwd=ROOT)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "1 kept, 0 broken" in done.stdout


def seconds_and_modules() -> tuple[float, float, set[str]]:
    """What importing torch costs in a fresh interpreter, what Sidestream costs then, and what is loaded."""
    clock = "time.process_time()"  # not the wall, which other programs stretch
    seconds_of_torch, seconds, *modules = python(
        f"import sys, time; began = {clock}; import torch; start = {clock}; {IMPORT_ALL}; seconds = {clock} - start;"
        "print(start - began, seconds, *{name.partition('.')[0] for name in sys.modules})"
    ).split()
    return float(seconds_of_torch), float(seconds), set(modules)


def test_import_costs_little_more_than_torch_and_loads_no_heavy_package():
    for _ in range(4):  # the first may be cold, another one disturbed
        seconds_of_torch, seconds, loaded = seconds_and_modules()
        assert {"torch", "sidestream"} <= loaded
        assert loaded & HEAVY == set()
        if seconds <= 0.5 * seconds_of_torch:  # other programs slow down both
            return
    pytest.fail(f"importing Sidestream took {seconds:.2f} s, torch {seconds_of_torch:.2f} s; expected at most half")


def test_public_names_are_pinned():
    assert list(sidestream.__all__) == PUBLIC
    assert sorted(PUBLIC) == PUBLIC
    assert all(hasattr(sidestream, name) for name in PUBLIC)


def test_type_checkers_see_the_public_names():
    """The names are loaded when first used; the imports that only type checkers read must be the same ones."""
    tree = ast.parse((PACKAGE / "__init__.py").read_text())
    blocks = [n for n in tree.body if isinstance(n, ast.If) and ast.unparse(n.test) == "TYPE_CHECKING"]
    seen = [alias.name for block in blocks for n in block.body if isinstance(n, ast.ImportFrom) for alias in n.names]
    assert sorted(seen) == PUBLIC


@pytest.mark.parametrize("name", PACKAGES)
def test_packages_export_only_what_exists_and_once(name):
    package = importlib.import_module(name)
    exported = getattr(package, "__all__", [])
    assert all(hasattr(package, item) for item in exported)
    assert len(set(exported)) == len(exported)


def calls(path: Path) -> list[tuple[str, ast.Call]]:
    """Every call in a file, with the called name as it is written."""
    return [(ast.unparse(n.func), n) for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.Call)]


def imported(path: Path) -> set[str]:
    nodes = list(ast.walk(ast.parse(path.read_text())))
    names = {alias.name for n in nodes if isinstance(n, ast.Import) for alias in n.names}
    return names | {n.module or "" for n in nodes if isinstance(n, ast.ImportFrom)}


def test_only_the_command_line_prints():
    assert [p for p in SOURCES if "cli" not in p.parts for name, _ in calls(p) if name == "print"] == []


def test_nothing_is_unpickled():
    unsafe = {"pickle", "dill", "cloudpickle", "joblib", "marshal", "shelve"}
    for path in SOURCES:
        assert imported(path).isdisjoint(unsafe), path
        for name, call in calls(path):
            if name in ("torch.load", "load_state_dict_from_url"):
                values = {k.arg: ast.unparse(k.value) for k in call.keywords}
                assert values.get("weights_only") == "True", f"{path}:{call.lineno}"


def test_there_is_one_use_of_torch_load():
    """So that the check above is about something."""
    assert [p.name for p in SOURCES for name, _ in calls(p) if name == "torch.load"] == ["weights.py"]


@pytest.mark.parametrize("path", [p for p in SOURCES if p.stat().st_size], ids=lambda p: str(p.relative_to(PACKAGE)))
def test_each_file_says_what_it_is_and_stays_short(path):
    text = path.read_text()
    assert len((ast.get_docstring(ast.parse(text)) or "").partition("\n")[0]) > 20
    assert text.count("\n") <= 300
    assert path.stem not in {"utils", "common", "helpers", "base", "misc", "manager"}


def test_the_license_is_apache_2():
    assert "Apache License\n                           Version 2.0, January 2004" in (ROOT / "LICENSE").read_text()
    assert (PACKAGE / "py.typed").is_file()


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
def test_make_sets_up_once_and_again_when_pyproject_changes(tmp_path):
    """With a stand-in for Python that only writes down how it was called."""
    calls_made = tmp_path / "calls"
    fake = tmp_path / "python3"
    fake.write_text(
        f'#!/bin/sh\necho "$@" >> {calls_made}\n'
        'if [ "$2" = venv ]; then mkdir -p "$3/bin"; cp "$0" "$3/bin/python"; fi\n'
    )
    fake.chmod(0o755)
    for name in ("Makefile", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path)

    def make(*words: str) -> list[str]:
        calls_made.write_text("")
        outside = {"MAKEFLAGS", "MAKEOVERRIDES", "MFLAGS", "VENV", "TORCH"}  # of the make that runs these tests
        own = {k: v for k, v in os.environ.items() if k not in outside}
        subprocess.run(["make", *words, f"PYTHON={fake}"], cwd=tmp_path, check=True, capture_output=True, env=own)
        return calls_made.read_text().splitlines()

    first = make("test", "VENV=env")
    assert any(re.fullmatch(r"-m pip install .*-e \.\[dev\]", line) for line in first)
    assert first[-1] == "-m pytest -n 2 --dist loadfile"
    assert make("test", "VENV=env") == ["-m pytest -n 2 --dist loadfile"]
    newer = (tmp_path / "env/.sidestream-installed").stat().st_mtime + 5
    os.utime(tmp_path / "pyproject.toml", (newer, newer))
    assert "-m venv env" in make("setup", "VENV=env")
    other = make("test", "TORCH=2.11")
    assert "-m venv .venv-torch-2.11" in other
    assert any(line.endswith(" -e .[dev] torch==2.11.*") for line in other)
    assert other[-1] == "-m pytest -n 2 --dist loadfile"


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
def test_make_refuses_an_old_python(tmp_path):
    old = tmp_path / "old"
    old.write_text('#!/bin/sh\n[ "$1" = --version ] && echo "Python 3.9.1" && exit 0\nexit 1\n')
    old.chmod(0o755)
    done = subprocess.run(
        ["make", "setup", f"PYTHON={old}", f"VENV={tmp_path / 'env'}"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode != 0
    assert "needs Python >= 3.11" in done.stderr
    assert "Python 3.9.1" in done.stderr
    assert not (tmp_path / "env").exists()
