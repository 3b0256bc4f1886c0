"""What ``sidestream evaluate`` prints: the main table, and for keypoints a row per joint."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

PCK_SIZE = "max(height, width) of the box around the frame's labelled joints"
"""What a distance is divided by."""
LEGEND = """\
in time: frames judged by their own answer; miss: by none, since it was before the first
behind: by how many frames the answer is older than the frame, on average over the others"""


def dataset_joints(given: dict[str, Any]) -> tuple[str, ...]:
    """The names of the joints of the data set that the flags name."""
    from sidestream.data import open_dataset

    points = open_dataset(given["data"], part="test", split=given["split"], root=given["root"], with_points=True).points
    assert points is not None  # it was opened with them
    return points.names


def joint_fields(scores: dict[str, dict[str, Any]], names: Any) -> dict[str, Any]:
    """For keypoints: the joints in the order of the scores, and what PCK is normalised by; else nothing.

    ``names`` that are no list of one text per joint (a log may say anything) are replaced by numbers from 0 on.
    """
    per_joint = next(iter(scores.values())).get("pck@0.2_per_joint")
    if per_joint is None:
        return {}
    is_named = isinstance(names, list | tuple) and all(isinstance(name, str) for name in names)
    joints = list(names) if is_named and len(names) == len(per_joint) else [str(n) for n in range(len(per_joint))]
    return {"joints": joints, "pck_normalised_by": PCK_SIZE}


def joint_table(joints: Sequence[str], scores: dict[str, dict[str, Any]]) -> str:
    """A Markdown table: a row per joint and one of all; PCK@0.1 and PCK@0.2, offline and live.

    >>> print(joint_table(["neck", "face"], {"offline": {
    ...     "pck@0.2": 0.75, "pck@0.1": 0.25, "pck@0.2_per_joint": [1.0, 0.5], "pck@0.1_per_joint": [0.5, 0.0]}}))
    | PCK        | offline @0.1 |   @0.2 |
    | ---------- | -----------: | -----: |
    | neck       |       0.5000 | 1.0000 |
    | face       |       0.0000 | 0.5000 |
    | all joints |       0.2500 | 0.7500 |
    <BLANKLINE>
    """
    from sidestream.report.table import markdown_table

    def cell(share: float | None) -> str:
        return "-" if share is None else f"{share:.4f}"

    header, columns = ["PCK"], []
    for title, found in scores.items():
        header += [f"{_short(title)} @0.1", "@0.2"]
        columns += [[*found[f"pck@{a}_per_joint"], found[f"pck@{a}"]] for a in ("0.1", "0.2")]
    names = [*joints, "all joints"]
    return markdown_table(header, [(name, *map(cell, row)) for name, row in zip(names, zip(*columns), strict=True)])


def show(result: dict[str, Any]) -> None:
    """Print the result of ``sidestream evaluate``."""
    from sidestream.report.table import markdown_table

    if "scores" not in result:
        print(f"{result['metric']} {result['accuracy']:.4f} ({result['num_correct']} of {result['num_records']} clips)")
        return
    name, columns = result["metric"], ("num_frames", "in_time", "miss")
    rows = [
        (title, f"{found[name]:.4f}", *(found[each] for each in columns), f"{found['mean_mismatch']:.2f}")
        for title, found in result["scores"].items()
    ]
    print(markdown_table(("", name, "frames", "in time", "miss", "behind"), rows), end="")
    if "share_kept" in result:
        print(LEGEND)
    if "joints" in result:
        print("\n" + joint_table(result["joints"], result["scores"]), end="")
        print(f"PCK@a: at most a x {PCK_SIZE} away")
    if (latency := result.get("latency_seconds")) is not None:
        how = "simulated" if result["is_simulated"] else "on this machine"
        print(f"{result['num_answers']} answers, median latency {1e3 * latency['p50']:.1f} ms, {how}")
    first = next(iter(result["scores"]))
    if result.get("share_kept") is not None:
        print(f"judged live, {100 * result['share_kept']:.1f} % of the offline figure is kept")
    elif "share_kept" in result and first.startswith("offline"):
        print(f"offline {100 * result['scores'][first][name]:.1f} %: too little to take a share of")
    if "video" in result:
        print(f"look at: {result['video']}")


def _short(title: str) -> str:
    """Of "offline (answered frames)" the first word, of "streaming, forecast" the last."""
    return title.split(", ")[-1].split(" (")[0]
