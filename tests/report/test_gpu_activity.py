"""SM activity, from a stand-in for NVIDIA's library that keeps to the layout of its header."""

from __future__ import annotations

import ctypes
import struct
from typing import Any

import pytest

from sidestream.report.gpu_activity import sm_activity

HEADER_BYTES, METRIC_BYTES = 4 + 4 + 8 + 8, 4 + 4 + 8 + 3 * 8
"""nvmlGpmMetricsGet_t before its metrics, and nvmlGpmMetric_t, on a 64-bit machine (nvml.h)."""


class Gpu:
    """Busy SMs are counted for ever; a sample holds the counts of its moment."""

    def __init__(self, *, is_supported: int = 1, failing: str = "", metric_status: int = 0) -> None:
        self.is_supported, self.failing, self.metric_status = is_supported, failing, metric_status
        self.seconds = self.busy_seconds = 0.0
        self.samples: dict[int, tuple[float, float]] = {}
        self.uuid = b""

    def work(self, seconds: float, share: float) -> None:
        self.seconds, self.busy_seconds = self.seconds + seconds, self.busy_seconds + seconds * share

    def nvmlInit_v2(self) -> int:
        return 9 * (self.failing == "init")

    def nvmlDeviceGetHandleByUUID(self, uuid: bytes, handle: Any) -> int:
        self.uuid = uuid
        return 9 * (self.failing == "handle")

    def nvmlGpmQueryDeviceSupport(self, handle: Any, support: Any) -> int:
        words = ctypes.cast(support, ctypes.POINTER(ctypes.c_uint))
        assert words[0] == 1
        words[1] = self.is_supported
        return 0

    def nvmlGpmSampleAlloc(self, sample: Any) -> int:
        ctypes.cast(sample, ctypes.POINTER(ctypes.c_void_p))[0] = 100 + len(self.samples)
        self.samples[100 + len(self.samples)] = (0.0, 0.0)
        return 9 * (self.failing == "alloc")

    def nvmlGpmSampleGet(self, handle: Any, sample: Any) -> int:
        self.samples[sample.value] = (self.seconds, self.busy_seconds)
        return 9 * (self.failing == "get")

    def nvmlGpmMetricsGet(self, asked: Any) -> int:
        address = ctypes.cast(asked, ctypes.c_void_p).value
        assert address is not None
        version, count, first, second = struct.unpack("IIQQ", ctypes.string_at(address, HEADER_BYTES))
        (metric,) = struct.unpack("I", ctypes.string_at(address + HEADER_BYTES, 4))
        assert (version, count, metric) == (1, 1, 2)
        (begin, busy_begin), (end, busy_end) = self.samples[first], self.samples[second]
        percent = 100 * (busy_end - busy_begin) / (end - begin)
        ctypes.memmove(address + HEADER_BYTES + 4, struct.pack("id", self.metric_status, percent), 4)
        ctypes.memmove(address + HEADER_BYTES + 8, struct.pack("d", percent), 8)
        return 0


def test_the_share_since_the_beginning() -> None:
    gpu = Gpu()
    gpu.work(5.0, 0.9)
    meter = sm_activity("GPU-1-2", library=gpu)
    assert meter is not None
    assert gpu.uuid == b"GPU-1-2"
    meter.begin()
    gpu.work(1.0, 0.5)
    gpu.work(3.0, 0.1)
    assert meter.share() == pytest.approx(0.2)
    meter.begin()
    gpu.work(2.0, 1.0)
    assert meter.share() == pytest.approx(1.0)


def test_no_meter_without_the_counters() -> None:
    assert sm_activity("GPU-1", library=Gpu(is_supported=0)) is None
    for failing in ("init", "handle", "alloc"):
        assert sm_activity("GPU-1", library=Gpu(failing=failing)) is None
    assert sm_activity("GPU-1", library=object()) is None  # an old driver's library has no such functions


def test_a_driver_without_an_answer_is_an_error() -> None:
    meter = sm_activity("GPU-1", library=Gpu(failing="get"))
    assert meter is not None
    with pytest.raises(OSError, match="nvmlGpmSampleGet failed with NVML status 9"):
        meter.begin()
    gpu = Gpu(metric_status=7)
    meter = sm_activity("GPU-1", library=gpu)
    assert meter is not None
    meter.begin()
    gpu.work(1.0, 0.5)
    with pytest.raises(OSError, match="SM_UTIL failed with NVML status 7"):
        meter.share()


def test_the_structures_are_those_of_the_header() -> None:
    from sidestream.report.gpu_activity import _Metric, _MetricsGet

    assert ctypes.sizeof(_Metric) == METRIC_BYTES
    assert _MetricsGet.metrics.offset == HEADER_BYTES
