"""The recipe's targets lie as many frames ahead as the answers come late; its scores are those of known answers."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor, nn

from sidestream.circuit.net_stages import net_circuit
from sidestream.engine import run
from sidestream.models import create_model, info_of

RECIPES = Path(__file__).resolve().parent.parent / "recipes"
OWN = ("inception_keypoints", "inception_features", "inception_plot", "records")
NUM_JOINTS, STEP_PX = 15, 4


@pytest.fixture
def recipe(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    monkeypatch.syspath_prepend(str(RECIPES))
    yield __import__("inception_keypoints")
    for name in OWN:
        sys.modules.pop(name, None)


def numbered(recipe: ModuleType, name: str, num_frames: int) -> object:
    """Maps that say which frame they are of, and points that say so, too."""
    frames = torch.arange(num_frames)
    maps_TCHW = frames.half().view(-1, 1, 1, 1).expand(-1, 2, 4, 5)
    return recipe.ClipMaps(name, maps_TCHW, frames.float().view(-1, 1, 1).expand(-1, NUM_JOINTS, 2))


def walking(recipe: ModuleType, name: str, first_px: int, num_frames: int = 24) -> object:
    """All joints but two go ``STEP_PX`` = one cell to the right in every frame; the maps show where they are.

    The two stay at the corners of a box 156 px wide, so that PCK@0.2 allows 31.2 px, seven frames of the others.
    """
    x_T = first_px + STEP_PX * torch.arange(num_frames) + 2.0
    points_TP2 = torch.stack([x_T[:, None].expand(-1, NUM_JOINTS), torch.full((num_frames, NUM_JOINTS), 60.0)], -1)
    points_TP2[:, 0] = torch.tensor([2.0, 42.0])
    points_TP2[:, 1] = torch.tensor([158.0, 78.0])
    maps = torch.zeros(num_frames, NUM_JOINTS, 32, 40)
    for t in range(num_frames):
        for joint, (x, y) in enumerate(points_TP2[t].tolist()):
            maps[t, joint, int(y * 128 / 120 // 4), int(x // 4)] = 30.0
    return recipe.ClipMaps(name, maps.half(), points_TP2)


class Ahead(nn.Module):
    """Knows the answer: all maps but the first two so many cells to the right."""

    def __init__(self, num_frames: int) -> None:
        super().__init__()
        self.num_frames = num_frames

    def forward(self, maps_BPHW: Tensor) -> Tensor:
        return torch.cat([maps_BPHW[:, :2], maps_BPHW[:, 2:].roll(self.num_frames, -1)], 1)


@pytest.mark.parametrize("lag", [0, 1, 4, 9])
def test_targets_are_lag_frames_ahead(recipe: ModuleType, lag: int, monkeypatch: pytest.MonkeyPatch) -> None:
    clips = [numbered(recipe, "a", 24), numbered(recipe, "short", 21), numbered(recipe, "b", 27)]
    monkeypatch.setattr(recipe, "MIRRORED", 0.0)
    seen = set()
    for epoch in range(80):
        for maps_BCHW, points_BP2 in recipe.batches(clips * 5, lag, torch.Generator().manual_seed(epoch)):
            assert maps_BCHW.shape == (recipe.BATCH, 2, 4, 5)
            assert torch.equal(points_BP2[:, 0, 0], maps_BCHW[:, 0, 0, 0] + lag)
            seen |= set(points_BP2[:, 0, 0].int().tolist())
    assert seen == set(range(21, 27))  # the same for every lag


def test_scores_of_known_answers(recipe: ModuleType) -> None:
    clips = [walking(recipe, "a", 0), walking(recipe, "b", 40)]
    for lag in (0, 1, 4, 9):
        assert recipe.scores(Ahead(lag), clips, lag)["pck_0.2"] == 1.0
        assert recipe.scores(Ahead(0), clips, lag, of_seen=True)["pck_0.2"] == 1.0
    late = {lag: recipe.scores(Ahead(0), clips, lag) for lag in (1, 4, 9)}
    assert late[1]["pck_0.1"] == late[4]["pck_0.2"] == 1.0  # 4 of 15.6 px, 16 of 31.2 px
    assert late[9]["pck_0.2"] == late[4]["pck_0.1"] == pytest.approx(2 / 15)  # the two that stand still
    assert late[9]["pck_0.2_per_joint"]["neck"] == 1.0
    assert late[9]["pck_0.2_per_joint"]["l_ankle"] == 0.0
    assert late[4]["num_frames"] == 2 * len([21, 22, 23])
    for lag in (1, 4, 9):
        for name in ("pck_0.1", "pck_0.2"):
            assert recipe.true_scores(clips, lag)[name] == late[lag][name]


def test_a_head_learns_to_be_ahead(recipe: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {
        "EPOCHS": 4,
        "FRAMES_A_CLIP": 16,
        "BATCH": 8,
        "LR": 0.3,
        "NUM_WARMUP": 2,
        "MIRRORED": 0,
    }.items():
        monkeypatch.setattr(recipe, name, value)
    clips = [walking(recipe, str(n), 3 * n) for n in range(6)]
    torch.manual_seed(0)
    head = nn.Conv2d(NUM_JOINTS, NUM_JOINTS, (1, 15), padding=(0, 7), groups=NUM_JOINTS)
    history = recipe.train_head(head, clips, 6, seed=0)
    assert history[-1]["train_loss"] < history[0]["train_loss"]
    assert recipe.scores(head, clips, 6)["pck_0.1"] == 1.0
    assert recipe.scores(head, clips, 6, of_seen=True)["pck_0.1"] == pytest.approx(2 / 15)  # 24 px


def test_mirrored_maps_and_joints(recipe: ModuleType) -> None:
    maps, points = torch.rand(3, 2, 4, 5), torch.rand(3, NUM_JOINTS, 2) * 100
    given = torch.tensor([True, False, True])
    maps_found, points_found = recipe.mirrored(maps, points, given)
    assert torch.equal(maps_found[1], maps[1])
    assert torch.equal(points_found[1], points[1])
    assert torch.equal(maps_found[0, :, :, 0], maps[0, :, :, 4])
    face, right_knee, left_knee = 2, 9, 10
    for joint, source in ((face, face), (right_knee, left_knee), (left_knee, right_knee)):
        assert points_found[2, joint].tolist() == pytest.approx(
            [160 - float(points[2, source, 0]), float(points[2, source, 1])]
        )
    twice = recipe.mirrored(maps_found, points_found, given)
    assert torch.equal(twice[0], maps)
    assert torch.allclose(twice[1], points, atol=1e-4)


def test_only_joints_inside_are_trained(recipe: ModuleType) -> None:
    points = torch.tensor([[[0.0, 0.0], [159.9, 119.9], [-0.1, 5.0], [160.0, 5.0], [5.0, 120.0]]])
    found = recipe.visible(points)[0]
    assert found[:, 2].tolist() == [1, 1, 0, 0, 0]
    assert found[1, :2].tolist() == pytest.approx([159.9, 119.9 * 128 / 120])


@pytest.mark.slow
def test_a_run_leaves_a_net_that_is_trunk_and_head(
    recipe: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, data_dir: Path
) -> None:
    """On maps drawn at random: the saved net makes of a clip what its own trunk and head make of it."""
    chance = torch.Generator().manual_seed(0)

    def clips(part: str) -> list[object]:
        return [
            recipe.ClipMaps(
                f"{part}{n}",
                torch.rand(24, 1024, 4, 5, generator=chance).half(),
                torch.rand(24, NUM_JOINTS, 2, generator=chance) * 120,
            )
            for n in range(20)
        ]

    for name, value in {"EPOCHS": 1, "FOLDER": tmp_path, "clips": clips}.items():
        monkeypatch.setattr(recipe, name, value)
    monkeypatch.setenv("SIDESTREAM_DATA", str(data_dir))
    (end,) = recipe.inception_keypoints({"lag": 0, "seed": 3}, tmp_path / "run").history
    assert {f"late_{lag}_pck_0.2" for lag in (1, 4, 9)} < end.keys()
    assert 0 <= end["predictive_pck_0.1"] <= end["predictive_pck_0.2"] <= 1
    net = create_model(str(tmp_path / "runs" / "lag-0-seed-3"))
    info = info_of(net)
    assert info is not None
    assert info.input_spec == recipe.spec()
    kinetics = recipe.net_on_kinetics().state_dict()
    torch.manual_seed(3)
    fresh = recipe.net_on_kinetics().state_dict()  # as the run began
    for key, value in net.state_dict().items():
        if key.startswith("head."):
            assert not torch.equal(value, fresh[key]) or key.endswith("0.bias"), key
        else:
            assert torch.equal(value, kinetics[key]), key


@pytest.mark.slow
@pytest.mark.parametrize("wiring", ["sequential", "semi-parallel:2", "semi-parallel:5", "parallel"])
def test_maps_that_are_kept_are_those_of_a_stream(
    recipe: ModuleType, monkeypatch: pytest.MonkeyPatch, data_dir: Path, wiring: str
) -> None:
    """The head on maps made of a clip, against the circuit as the engine runs it on the video's frames."""
    monkeypatch.setenv("SIDESTREAM_DATA", str(data_dir))
    features = sys.modules["inception_features"]
    net = recipe.net_on_kinetics()
    torch.manual_seed(0)
    for module in net.head.modules():
        if isinstance(module, nn.ConvTranspose2d | nn.Conv2d):
            nn.init.normal_(module.weight, std=0.05)
    record = features.dataset("test").records[100]
    clip = features.shortened(next(features.of_record(record, "test")), 14)
    with torch.no_grad():
        maps_TCHW = net.features(features.as_input(clip))[0]
        wanted = net.head(maps_TCHW)
    circuit = net_circuit(net, torch.zeros(1, 3, *recipe.SIZE_PX), wiring)
    spec = recipe.spec().replace(layout="BCHW", num_frames=1, min_frames=None)
    outputs = list(run(circuit, clip.frames, executor="inline", prepare=spec))
    assert [out.tick - out.frame_index for out in outputs] == [
        {"sequential": 0, "semi-parallel:2": 1, "semi-parallel:5": 4, "parallel": 9}[wiring]
    ] * len(clip.frames)
    found = torch.cat([out.value for out in outputs])
    assert torch.allclose(found, wanted, rtol=1e-4, atol=1e-4 * float(wanted.abs().max()))
    assert (maps_TCHW - maps_TCHW.half()).norm() < 1e-3 * maps_TCHW.norm()
