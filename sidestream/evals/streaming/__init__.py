"""Streaming evaluation: judging a model by what it knows now. Run and score are two steps with a log between them."""

from sidestream.evals.streaming.forecast import with_forecast
from sidestream.evals.streaming.live import at_rate, run_live, run_offline, run_simulated, scheduled_answers
from sidestream.evals.streaming.log import Answer, FrameTruth, read_answers, read_truth, write_answers, write_truth
from sidestream.evals.streaming.pairing import Counts, Pair, counts_of, latest_ready, pair, pair_same_frames
from sidestream.evals.streaming.runtimes import RuntimeProfile, record_profile
from sidestream.evals.streaming.schedule import POLICIES, Work, one_device, pipeline, unlimited_devices
from sidestream.evals.streaming.score import main_figure, score
from sidestream.evals.streaming.values import Boxes, Classes, ClassLabel, Masks, Points

__all__ = [
    "POLICIES",
    "Answer",
    "Boxes",
    "ClassLabel",
    "Classes",
    "Counts",
    "FrameTruth",
    "Masks",
    "Pair",
    "Points",
    "RuntimeProfile",
    "Work",
    "at_rate",
    "counts_of",
    "latest_ready",
    "main_figure",
    "one_device",
    "pair",
    "pair_same_frames",
    "pipeline",
    "read_answers",
    "read_truth",
    "record_profile",
    "run_live",
    "run_offline",
    "run_simulated",
    "scheduled_answers",
    "score",
    "unlimited_devices",
    "with_forecast",
    "write_answers",
    "write_truth",
]
