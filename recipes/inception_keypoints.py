"""Keypoints, predicted by a net of Kinetics-400: par_inception in sequence, in two and five groups, and in parallel.

    SIDESTREAM_DATA=... python recipes/inception_features.py       # the trunk's maps, half an hour on one core; kept
    SIDESTREAM_DATA=... python recipes/inception_keypoints.py      # the heads; what is done is not repeated
    SIDESTREAM_DATA=... python recipes/inception_keypoints.py --lags 0 4 --seeds 0
    SIDESTREAM_DATA=... python recipes/inception_keypoints.py --report

Paper: Carreira, Patraucean et al., "Massively Parallel Video Networks" (ECCV 2018); keypoints on an Inception, and a
trunk that is not trained, are our choice. There is no number to reach; the question is what it costs, in accuracy on
the newest frame, that the answer comes some ticks late, and how much of that a head trained to predict wins back.

The trunk is frozen: DeepMind's I3D (Kinetics-400), its convolutions causal, no temporal stride. It has no skips, so
that in groups of stages it makes the same maps, ``LAGS`` ticks late: they are made once, and what differs is the head,
the model's own: maps of frame t - lag in, joints of frame t out. Whole nets are kept in inception_keypoints/runs.

Data: JHMDB's joints, official split 1 (433 clips to train, 176 to test), 15 a frame; the first 24 frames of a clip,
128 x 160 pixels. After ``SETTLED`` frames of a stream the trunk's maps are as good as they get; earlier ones, which
look back on blank frames, are not used. Every head is trained for the same frames, those that at the largest lag are
answered from a settled map: ``FRAMES_A_CLIP`` of every clip an epoch, drawn anew, half of them mirrored. ``EPOCHS`` and
``LR`` were set on the training clips alone. Scores of the last epoch: PCK on the same frames of the test clips, at all
lags, joints inside of the picture, in pixels of the video. "predictive": the head trained at that lag, on the newest
frame; "not predictive": the head of lag 0, as late; "answered": the latter on the frame that it has seen; "true, as
late": the joints themselves.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
from inception_features import SIZE_PX, ClipMaps, clips, net_on_kinetics, spec
from inception_plot import draw
from records import HERE, Cell, known, last, main, mean_and_spread
from torch import Tensor, nn

from sidestream.data.joints import JHMDB_JOINTS
from sidestream.models import info_of
from sidestream.models.heads import CELL_PX
from sidestream.models.heatmaps import pck, points_from_maps
from sidestream.models.info import attach_info
from sidestream.models.pretrained import save_pretrained
from sidestream.train.schedule import learning_rate
from sidestream.train.tasks.keypoints import WINDOW, KeypointTask
from sidestream.video.prepare import prepare_points, unprepare_points

FOLDER = HERE / "inception_keypoints"
LAGS = (0, 1, 4, 9)
WIRINGS = {0: "sequential", 1: "semi-parallel:2", 4: "semi-parallel:5", 9: "parallel"}
"""The wiring of par_inception's ten stages that is so many ticks late."""
FRAME_PX = (120, 160)
EPOCHS, FRAMES_A_CLIP, BATCH, LR, WEIGHT_DECAY, NUM_WARMUP = 6, 2, 16, 1e-3, 0.05, 20
MIRRORED = 0.5
"""Share of the maps that are mirrored: nearly what the trunk would have made of the mirrored picture."""
SETTLED = 12
FIRST = SETTLED + max(LAGS)
"""The first frame that is trained for and judged."""
ALPHAS = (0.2, 0.1)


@dataclass(frozen=True)
class Result:
    """As much of a ``TrainResult`` as the records want."""

    seconds: float
    history: tuple[dict[str, Any], ...]


def inception_keypoints(cell: Cell, out: Path) -> Result:
    """One head. ``cell``: lag in ticks, and seed. Scores of the last weights are in its last epoch."""
    lag, seed, start = cell["lag"], cell["seed"], time.perf_counter()
    torch.manual_seed(seed)
    net = net_on_kinetics()
    train, test = clips("train"), clips("test")
    history = train_head(net.head, train, lag, seed)
    history[-1] |= all_scores(net.head, train, test, lag)
    info = info_of(net)
    assert info is not None
    attach_info(net, replace(info, input_spec=spec()))
    figures = {"PCK@0.2": history[-1]["predictive_pck_0.2"]}
    note = (
        f"For the wiring {WIRINGS[lag]}: maps of frame t - {lag}, joints of frame t (recipes/inception_keypoints.py)."
    )
    save_pretrained(net.eval(), net_folder(lag, seed), metrics=figures, note=note)
    return Result(time.perf_counter() - start, tuple(history))


def all_scores(head: nn.Module, train: Sequence[ClipMaps], test: Sequence[ClipMaps], lag: int) -> dict[str, Any]:
    """What the last epoch of a head is worth; of the head of lag 0 also when it is late, beside what needs no net."""
    found = {"predictive_" + k: v for k, v in scores(head, test, lag).items()}
    for late in LAGS[1:] if lag == 0 else ():
        found |= {f"late_{late}_{k}": v for k, v in scores(head, test, late).items()}
        found |= {f"answered_{late}_{k}": v for k, v in scores(head, test, late, of_seen=True).items()}
        found |= {f"true_{late}_{k}": v for k, v in true_scores(test, late).items()}
    if lag == 0:
        found |= {"mean_pose_" + k: v for k, v in mean_pose_scores(train, test).items()}
    return found


def net_folder(lag: int, seed: int) -> Path:
    return FOLDER / "runs" / f"lag-{lag}-seed-{seed}"


def train_head(head: nn.Module, train: Sequence[ClipMaps], lag: int, seed: int) -> list[dict[str, Any]]:
    """AdamW, cosine, in bfloat16 where that is exact enough; a record per epoch."""
    chance = torch.Generator().manual_seed(seed)
    task, size_px = KeypointTask(), SIZE_PX
    decayed = [p for p in head.parameters() if p.ndim > 1]
    others = [p for p in head.parameters() if p.ndim <= 1]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": WEIGHT_DECAY}, {"params": others, "weight_decay": 0.0}], lr=LR
    )
    num_updates = EPOCHS * (sum(is_long_enough(clip) for clip in train) * FRAMES_A_CLIP // BATCH)
    head.train()
    history, update = [], 0
    for epoch in range(EPOCHS):
        losses = []
        for maps_BCHW, points_BP2 in batches(train, lag, chance):
            rate = learning_rate(update, base=LR, num_updates=num_updates, num_warmup=NUM_WARMUP)
            for group in optimizer.param_groups:
                group["lr"] = rate
            with torch.autocast("cpu", torch.bfloat16):
                answer = head(maps_BCHW.float())
            loss = task.frame_loss(answer.float(), (visible(points_BP2), size_px))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(float(loss.detach()))
            update += 1
        history.append({"epoch": epoch, "train_loss": sum(losses) / len(losses)})
        print(f"lag {lag}, epoch {epoch + 1}: loss {history[-1]['train_loss']:.3f}", flush=True)
    head.eval()
    return history


def batches(train: Sequence[ClipMaps], lag: int, chance: torch.Generator) -> Iterator[tuple[Tensor, Tensor]]:
    """An epoch: ``FRAMES_A_CLIP`` frames of every clip, mixed; an incomplete last batch is left out."""
    chosen = []
    for number, clip in enumerate(train):
        if is_long_enough(clip):
            frames = torch.randint(FIRST, len(clip.maps_TCHW), (FRAMES_A_CLIP,), generator=chance)
            chosen += [(number, int(frame)) for frame in frames]
    order = torch.randperm(len(chosen), generator=chance).tolist()
    for first in range(0, len(order) - BATCH + 1, BATCH):
        picked = [chosen[n] for n in order[first : first + BATCH]]
        maps_BCHW = torch.stack([train[number].maps_TCHW[frame - lag] for number, frame in picked])
        points_BP2 = torch.stack([train[number].points_TP2_px[frame] for number, frame in picked])
        is_mirrored = torch.rand(BATCH, generator=chance) < MIRRORED
        yield mirrored(maps_BCHW, points_BP2, is_mirrored)


def is_long_enough(clip: ClipMaps) -> bool:
    """Whether it has a frame that is trained for."""
    return len(clip.maps_TCHW) > FIRST


def mirrored(maps_BCHW: Tensor, points_BP2: Tensor, is_mirrored_B: Tensor) -> tuple[Tensor, Tensor]:
    """Some of the maps the other way round, and their joints, of which left and right change places."""
    other_P = [JHMDB_JOINTS.index(other_side(name)) for name in JHMDB_JOINTS]
    turned = points_BP2[:, other_P] * torch.tensor([-1.0, 1.0]) + torch.tensor([float(FRAME_PX[1]), 0.0])
    return (
        torch.where(is_mirrored_B[:, None, None, None], maps_BCHW.flip(-1), maps_BCHW),
        torch.where(is_mirrored_B[:, None, None], turned, points_BP2),
    )


def other_side(name: str) -> str:
    side, _, part = name.partition("_")
    return f"{'l' if side == 'r' else 'r'}_{part}" if part else name


def visible(points_BP2: Tensor) -> Tensor:
    """In pixels of the net's input (B, P, 3), 1 where a joint is inside the picture: only those are trained."""
    where_BP2 = prepare_points(points_BP2, FRAME_PX, spec())
    size = torch.tensor([SIZE_PX[1], SIZE_PX[0]])
    inside_BP = ((where_BP2 >= 0) & (where_BP2 < size)).all(-1)
    return torch.cat([where_BP2, inside_BP[..., None].to(where_BP2)], -1)


def inside(points_NP2: Tensor) -> Tensor:
    """Which points (in pixels of the video) lie in the picture."""
    return ((points_NP2 >= 0) & (points_NP2 < torch.tensor([FRAME_PX[1], FRAME_PX[0]]))).all(-1)


@torch.no_grad()
def scores(head: nn.Module, test: Sequence[ClipMaps], lag: int, *, of_seen: bool = False) -> dict[str, Any]:
    """PCK of what is answered in the judged ticks, on the newest frame, or ``of_seen`` on the answered one."""
    found, truth = [], []
    for clip in test:
        ticks = judged_ticks(len(clip.maps_TCHW))
        if ticks:
            maps_BPHW = head(clip.maps_TCHW[[t - lag for t in ticks]].float())
            points_BP2, _ = points_from_maps(maps_BPHW, CELL_PX, window=WINDOW)
            found.append(unprepare_points(points_BP2, FRAME_PX, spec()))
            truth.append(clip.points_TP2_px[[t - lag * of_seen for t in ticks]])
    return counted(torch.cat(found), torch.cat(truth))


def judged_ticks(num_frames: int) -> list[int]:
    return list(range(FIRST, num_frames))


def mean_pose_scores(train: Sequence[ClipMaps], test: Sequence[ClipMaps]) -> dict[str, Any]:
    """Of the mean of the joints of the training clips, which needs no net."""
    points_NP2 = torch.cat([clip.points_TP2_px for clip in train])
    inside_NP1 = inside(points_NP2)[..., None]
    mean_P2 = (points_NP2 * inside_NP1).sum(0) / inside_NP1.sum(0)
    truth = torch.cat([clip.points_TP2_px[judged_ticks(len(clip.points_TP2_px))] for clip in test])
    return counted(mean_P2.expand_as(truth), truth)


def true_scores(test: Sequence[ClipMaps], lag: int) -> dict[str, Any]:
    """Of the joints of ``lag`` frames ago: what lateness alone costs."""
    ticks = [(clip.points_TP2_px, t) for clip in test for t in judged_ticks(len(clip.points_TP2_px))]
    return counted(
        torch.stack([points[t - lag] for points, t in ticks]), torch.stack([points[t] for points, t in ticks])
    )


def counted(found_NP2: Tensor, truth_NP2: Tensor) -> dict[str, Any]:
    """Over the joints inside of the picture."""
    inside_NP = inside(truth_NP2)
    all_joints = {f"pck_{alpha}": pck(found_NP2, truth_NP2, alpha=alpha, labelled_NP=inside_NP) for alpha in ALPHAS}
    each = dict(zip(JHMDB_JOINTS, all_joints["pck_0.2"].joint_shares, strict=True))
    return {name: counts.share for name, counts in all_joints.items()} | {
        "pck_0.2_per_joint": {name: None if share is None else round(share, 4) for name, share in each.items()},
        "num_frames": len(truth_NP2),
    }


def report() -> str:
    """README's table, and accuracy.png."""
    records = known(FOLDER / "results.jsonl")
    of_lag = {lag: [r for r in records if r["cell"]["lag"] == lag] for lag in LAGS}
    sequential = of_lag[0]
    named = {
        "predictive": {lag: values(of_lag[lag], "predictive_pck_0.2") for lag in LAGS},
        "not predictive": {lag: values(sequential, _late(lag)) for lag in LAGS},
        "answered": {lag: values(sequential, f"answered_{lag}_pck_0.2" if lag else _late(0)) for lag in LAGS},
    }
    true = {lag: values(sequential[:1], f"true_{lag}_pck_0.2") for lag in LAGS[1:]} | {0: [1.0]}
    mean_pose = values(sequential, "mean_pose_pck_0.2")
    draw(named, mean_pose, WIRINGS, FOLDER / "accuracy.png")
    lines = [
        "| PCK@0.2, % | ticks late | predictive | not predictive | won back | answered frame | true, as late |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for lag, wiring in WIRINGS.items():
        new, old, answered = (mean_and_spread(line[lag], 100) for line in named.values())
        late = f"{100 * true[lag][0]:.1f}" if true[lag] else ""
        lines.append(f"| {wiring} | {lag} | {new} | {old} | {won_back(named, lag)} | {answered} | {late} |")
    lines.append(f"| mean pose | | {100 * mean_pose[0]:.1f} | | | | |" if mean_pose else "")
    return "\n".join(lines)


def values(records: Sequence[dict[str, Any]], name: str) -> list[float]:
    return [last(record, name) for record in records]


def won_back(named: dict[str, dict[int, list[float]]], lag: int) -> str:
    """Predictive less not predictive, in points of percent, within a seed."""
    pairs = zip(named["predictive"][lag], named["not predictive"][lag], strict=False)
    return mean_and_spread([new - old for new, old in pairs], 100) if lag else ""


def _late(lag: int) -> str:
    return f"late_{lag}_pck_0.2" if lag else "predictive_pck_0.2"


if __name__ == "__main__":
    clips = cache(clips)  # once for all heads
    axes: dict[str, Sequence[Any]] = {"seed": (0, 1, 2), "lag": LAGS}
    main(__doc__, inception_keypoints, report, FOLDER, axes)  # type: ignore[arg-type]
