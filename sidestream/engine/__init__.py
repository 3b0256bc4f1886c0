"""The engine: a circuit at work on a stream."""

from sidestream.engine.run import EXECUTORS, Run, RunStats, run

__all__ = ["EXECUTORS", "Run", "RunStats", "run"]
