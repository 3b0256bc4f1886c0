"""The engine: a circuit at work on a stream."""

from sidestream.engine.many import EXECUTORS_OF_MANY, ManyRun
from sidestream.engine.run import EXECUTORS, Run, run, run_many
from sidestream.engine.stats import RunStats

__all__ = ["EXECUTORS", "EXECUTORS_OF_MANY", "ManyRun", "Run", "RunStats", "run", "run_many"]
