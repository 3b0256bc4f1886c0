"""How busy a GPU's multiprocessors were between two moments: NVIDIA's GPM counters, from Hopper on.

"SM activity" is the share of the streaming multiprocessors (SMs) that had work, averaged over the time: a kernel that
fills one SM of a hundred counts 1 %, where the driver's "utilization" would say 100 %.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from typing import Any

SM_UTIL, VERSION, MAX_METRICS = 2, 1, 512
"""NVML_GPM_METRIC_SM_UTIL, NVML_GPM_METRICS_GET_VERSION, and more room than any NVML_GPM_METRIC_MAX so far."""


class _Metric(ctypes.Structure):
    """nvmlGpmMetric_t."""

    _fields_ = (
        ("metricId", ctypes.c_uint),
        ("nvmlReturn", ctypes.c_int),
        ("value", ctypes.c_double),
        ("metricInfo", ctypes.c_char_p * 3),
    )


class _MetricsGet(ctypes.Structure):
    """nvmlGpmMetricsGet_t."""

    _fields_ = (
        ("version", ctypes.c_uint),
        ("numMetrics", ctypes.c_uint),
        ("sample1", ctypes.c_void_p),
        ("sample2", ctypes.c_void_p),
        ("metrics", _Metric * MAX_METRICS),
    )


class _Support(ctypes.Structure):
    """nvmlGpmSupport_t."""

    _fields_ = (("version", ctypes.c_uint), ("isSupportedDevice", ctypes.c_uint))


@dataclass
class SmActivity:
    """A meter that is begun, and asked for the share since then. Samples less than about 0.1 s apart say nothing."""

    nvml: Any
    handle: ctypes.c_void_p
    begun: ctypes.c_void_p
    ended: ctypes.c_void_p

    def begin(self) -> None:
        self._check("nvmlGpmSampleGet", self.nvml.nvmlGpmSampleGet(self.handle, self.begun))

    def share(self) -> float:
        """Share of SMs that were busy since ``begin``, 0 to 1. Raises ``OSError`` where the driver has no answer."""
        self._check("nvmlGpmSampleGet", self.nvml.nvmlGpmSampleGet(self.handle, self.ended))
        asked = _MetricsGet(version=VERSION, numMetrics=1, sample1=self.begun, sample2=self.ended)
        asked.metrics[0].metricId = SM_UTIL
        self._check("nvmlGpmMetricsGet", self.nvml.nvmlGpmMetricsGet(ctypes.byref(asked)))
        self._check("the metric SM_UTIL", asked.metrics[0].nvmlReturn)
        return float(asked.metrics[0].value) / 100.0

    @staticmethod
    def _check(what: str, status: int) -> None:
        if status:
            raise OSError(f"{what} failed with NVML status {status}")


def sm_activity(uuid: str, *, library: Any = None) -> SmActivity | None:
    """A meter for the GPU of that UUID; None without driver or GPU, or for one without these counters (before Hopper).

    ``uuid``: "GPU-..." (f"GPU-{torch.cuda.get_device_properties(device).uuid}": the numbers of torch's devices are not
    the driver's where CUDA_VISIBLE_DEVICES is set). ``library``: the loaded ``libnvidia-ml``; None loads it. One meter
    is made for a process, as it keeps two samples in the driver.
    """
    try:
        nvml = ctypes.CDLL("libnvidia-ml.so.1") if library is None else library
        handle, support = ctypes.c_void_p(), _Support(version=VERSION)
        begun, ended = ctypes.c_void_p(), ctypes.c_void_p()
        is_there = not (
            nvml.nvmlInit_v2()
            or nvml.nvmlDeviceGetHandleByUUID(uuid.encode(), ctypes.byref(handle))
            or nvml.nvmlGpmQueryDeviceSupport(handle, ctypes.byref(support))
            or not support.isSupportedDevice
            or nvml.nvmlGpmSampleAlloc(ctypes.byref(begun))
            or nvml.nvmlGpmSampleAlloc(ctypes.byref(ended))
        )
    except (OSError, AttributeError):  # no driver, or one from before these counters
        return None
    return SmActivity(nvml, handle, begun, ended) if is_there else None
