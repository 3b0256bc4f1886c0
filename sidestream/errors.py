"""The exception tree. Every message says what was given, what was expected and what to do.

SidestreamError
+-- InputError            something the user gave is wrong; the command line ends with exit code 2
|   +-- SourceError       a video source cannot be opened, or holds no frame
|   +-- LayoutError       a tensor has the wrong axes, size, type or range
|   +-- ModelError        unknown model, or an option the model does not know
|   +-- WeightsError      a weights file is missing, unreadable, or does not fit the model
|   +-- CutError          a model cannot be cut as asked
|   +-- CircuitError      wires, delays or periods that cannot work
|   +-- BackendError      a back end cannot run a stage, or is not there
|   +-- MissingExtraError an optional package is not installed
+-- StageError            a stage failed while it worked on a frame
+-- TrainError            a training run went wrong: its loss is NaN or infinite
+-- WriteError            an output file cannot be written
"""

from __future__ import annotations


class SidestreamError(Exception):
    """Root of everything that Sidestream raises on purpose."""


class InputError(SidestreamError):
    """Something the user gave is wrong."""


class SourceError(InputError):
    """A video source cannot be opened, or holds no frame."""


class LayoutError(InputError):
    """A tensor has the wrong axes, size, type or range."""


class ModelError(InputError):
    """Unknown model, or an option that the model does not know."""


class WeightsError(InputError):
    """A weights file is missing, unreadable, or does not fit the model."""


class CutError(InputError):
    """A model cannot be cut as asked."""


class CircuitError(InputError):
    """Wires, delays or periods that cannot work."""


class BackendError(InputError):
    """A back end cannot run a stage, or is not there."""


class MissingExtraError(InputError):
    """An optional package is not installed."""

    def __init__(self, package: str, extra: str, purpose: str) -> None:
        self.package, self.extra = package, extra
        super().__init__(
            f"{purpose} needs the package {package!r}, which is not installed; "
            f"install it with: pip install 'sidestream[{extra}]'"
        )


class StageError(SidestreamError):
    """A stage failed while it worked on a frame."""


class TrainError(SidestreamError):
    """A training run went wrong: its loss is NaN or infinite."""


class WriteError(SidestreamError):
    """An output file cannot be written."""
