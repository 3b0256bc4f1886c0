"""Tasks beyond classes: targets against shifts made by hand, losses and metrics against closed forms and loops, every
rule against backprop, and whole runs."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from train.layered import layered

from sidestream.data import Batch, ClipDataset, ClipOptions, synthetic_dataset
from sidestream.errors import InputError
from sidestream.models.autoencoder import conv_autoencoder
from sidestream.models.heatmaps import gaussian_maps
from sidestream.models.info import ModelInfo, attach_info
from sidestream.models.keypoint_cnn import keypoint_cnn
from sidestream.train import RULES, StepContext, TrainConfig, fit, with_skips
from sidestream.train.answering import Answering
from sidestream.train.curve import draw_curve
from sidestream.train.tasks import DrawingTask, KeypointTask, make_task
from sidestream.train.tasks.drawing import psnr
from sidestream.types import NOTHING, InputSpec

SPEC = InputSpec((16, 16), mean=(0.5, 0.4, 0.3), std=(0.25, 0.2, 0.5), layout="BTCHW", num_frames=9)
PLAIN = InputSpec((16, 16), mean=(0,) * 3, std=(1,) * 3, layout="BTCHW", num_frames=9)


def random_clip(num_clips: int = 2, num_frames: int = 9, size_px: int = 16) -> Tensor:
    chance = torch.Generator().manual_seed(7)
    return torch.randn(num_clips, num_frames, 3, size_px, size_px, generator=chance, dtype=torch.float64)


def random_points(num_clips: int = 2, num_frames: int = 9, num_points: int = 4) -> Tensor:
    chance = torch.Generator().manual_seed(8)
    points = torch.rand(num_clips, num_frames, num_points, 3, generator=chance, dtype=torch.float64)
    visible = (points[..., 2:] > 0.3).double()
    return torch.cat([points[..., :2] * 16, visible], -1)


class Scales(nn.Module):
    """Layers that multiply by a number that begins as 1: answer s is frame s."""

    def __init__(self, num_layers: int = 3) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Scale() for _ in range(num_layers)])

    def answers(self, clip_BTCHW: Tensor) -> Tensor:
        for layer in self.layers:
            clip_BTCHW = layer(clip_BTCHW)
        return clip_BTCHW

    def depth_modules(self) -> list[nn.Module]:
        return list(self.layers)


class Scale(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.ones(1, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.factor


def step_on(model: nn.Module, clip_BTCHW: Tensor, labels: Tensor, **options: Any) -> tuple[dict[str, Tensor], Any]:
    """Gradients by parameter after one step, and its metrics."""
    config = TrainConfig(**options)
    net = Answering(model, config.answers_task)
    step = RULES[config.rule](StepContext(model, net, config, lambda loss: loss.backward(), clip_BTCHW))
    step.make_optimizers(lambda parameters: torch.optim.SGD(parameters, lr=0.1))
    metrics = step.step(clip_BTCHW, labels, lambda numbers: None)
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    for p in model.parameters():
        p.grad = None
    return found, metrics


def assert_same(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    for name, gradient in theirs.items():
        scale = float(gradient.abs().max())
        torch.testing.assert_close(ours[name], gradient, atol=1e-12 * max(1.0, scale), rtol=1e-9, msg=name)
    assert any(gradient.any() for gradient in theirs.values())


class TestTargets:
    """Frame t of the clips is the number t; a net that answers frame s + c has no error only where that is asked."""

    clip_BTCHW = torch.arange(8.0).view(1, 8, 1, 1, 1).expand(2, 8, 3, 4, 4).contiguous()
    labels_B = torch.tensor([0, 1])

    def copies(self, ahead: int) -> Tensor:
        return self.clip_BTCHW + ahead

    @pytest.mark.parametrize(
        ("task", "target", "fresh", "latency", "lead"),
        [
            (None, "answered", 0, 0, 0),
            (None, "answered", 2, 5, 0),
            (None, "newest", 2, 5, 5),
            (1, "answered", 0, 3, 1),
            (3, "answered", 0, 3, 3),
            (1, "answered", 2, 5, 3),
            (2, "newest", 2, 5, 7),
        ],
    )
    def test_the_frame_that_is_asked_for(
        self, task: int | None, target: str, fresh: int, latency: int, lead: int
    ) -> None:
        drawing = DrawingTask(horizon=task, target=target)
        drawing.fresh, drawing.latency = fresh, latency
        for ahead in range(8):
            loss = float(drawing.clip_loss(self.copies(ahead), self.clip_BTCHW, self.labels_B))
            assert loss == (ahead - lead) ** 2
        fed = drawing.fed_targets(self.clip_BTCHW, self.labels_B)
        # On its wire a target waits for the answered frame (answer s meets what came with frame s), or not at all
        # (answer s is given when frame s + latency comes).
        waits = 0 if target == "answered" else latency
        for s in range(8 - waits):
            if s + lead < 8:
                assert float(fed[s + waits][0][0, 0, 0, 0]) == s + lead
            else:
                assert fed[s + waits] is NOTHING

    @pytest.mark.parametrize("first", [0, 2, 5])
    def test_a_stretch_of_the_answers(self, first: int) -> None:
        drawing = DrawingTask(horizon=2)
        answers = self.copies(1)[:, first : first + 3].clone()
        answers[:, 0] += 3
        errors = [4.0**2 - 2 * 4.0 * 2 + 2**2 if n == 0 else 1.0 for n in range(3)][: 8 - 2 - first]
        loss = drawing.clip_loss(answers, self.clip_BTCHW, self.labels_B, first=first)
        assert float(loss) == pytest.approx(sum(errors) / len(errors))

    @pytest.mark.parametrize("num_layers", [3, 4, 5, 6])
    def test_fresh_is_the_newest_frame_with_any_influence(self, num_layers: int) -> None:
        model = layered(num_layers=num_layers)
        clip_BTCHW = torch.randn(1, 9, 3, 8, 8, dtype=torch.float64)
        net: Any = with_skips(model, clip_BTCHW[:, 0], "add")
        drawing = DrawingTask(horizon=1)
        drawing.align(net.circuit())
        before = net.answers(clip_BTCHW)
        influential = []
        for t in range(9):
            other = clip_BTCHW.clone()
            other[:, t] += 1
            influential.append([not net.answers(other)[:, s].equal(before[:, s]) for s in range(9)])
        for s in range(9 - drawing.fresh):
            assert max(t for t in range(9) if influential[t][s]) == s + drawing.fresh
        assert drawing.fresh == (num_layers - 1) // 2

    @pytest.mark.parametrize("rule", ["exact", "sideways"])
    @pytest.mark.parametrize(
        ("options", "ahead"),
        [
            ({"task": "autoencode"}, 0),
            ({"task": "autoencode", "target": "newest"}, 2),
            ({"task": "future", "horizon": 2}, 2),
            ({"task": "future", "horizon": 1, "target": "newest"}, 3),
        ],
    )
    def test_in_a_circuit_that_copies_its_frame(self, rule: str, options: dict[str, Any], ahead: int) -> None:
        clip_BTCHW = random_clip()
        wanted = (clip_BTCHW[:, ahead:] - clip_BTCHW[:, : 9 - ahead]).square()
        if rule == "sideways" and options.get("target") != "newest":  # no answers after the last frame
            wanted = wanted[:, : 9 - 2]
        loss = step_on(Scales(), clip_BTCHW, self.labels_B, rule=rule, **options)[1]["loss"]
        assert float(loss) == pytest.approx(float(wanted.mean()), rel=1e-6)

    def test_filled_up_clips_do_not_count(self) -> None:
        drawing, keypoints = DrawingTask(horizon=None), KeypointTask()
        clip_BTCHW, points = random_clip(), random_points()
        answers, maps = torch.randn_like(clip_BTCHW), torch.randn(2, 9, 4, 4, 4, dtype=torch.float64)
        alone = drawing.clip_loss(answers[:1], clip_BTCHW[:1], torch.tensor([3]))
        assert drawing.clip_loss(answers, clip_BTCHW, torch.tensor([3, -100])).isclose(alone)
        filled = torch.cat([points[:1], torch.full_like(points[:1], -100)])
        alone = keypoints.clip_loss(maps[:1], clip_BTCHW[:1], points[:1])
        assert keypoints.clip_loss(maps, clip_BTCHW, filled).isclose(alone)


class TestRules:
    """Parameter by parameter, float64."""

    def net(self, task: str, skips: str) -> nn.Module:
        torch.manual_seed(0)
        model = keypoint_cnn(4, width=0.06) if task == "keypoints" else conv_autoencoder((4, 5))
        return with_skips(model.double(), random_clip()[:, 0], skips)

    def labels(self, task: str) -> Tensor:
        return random_points() if task == "keypoints" else torch.tensor([0, 1])

    @pytest.mark.parametrize("skips", ["none", "projection", "concat"])
    @pytest.mark.parametrize(
        "options", [{"task": "autoencode"}, {"task": "future", "horizon": 2}, {"task": "keypoints"}]
    )
    def test_exact_is_backprop(self, options: dict[str, Any], skips: str) -> None:
        model, given = self.net(options["task"], skips), (random_clip(), self.labels(options["task"]))
        expected, theirs = step_on(model, *given, rule="backprop", **options)
        found, ours = step_on(model, *given, rule="exact", **options)
        assert_same(found, expected)
        assert float(ours["loss"]) == pytest.approx(float(theirs["loss"]), rel=1e-6)

    @pytest.mark.parametrize("skips", ["none", "projection"])
    @pytest.mark.parametrize("options", [{"task": "autoencode"}, {"task": "future", "horizon": 2}])
    def test_exact_at_the_newest_target(self, options: dict[str, Any], skips: str) -> None:
        """By autograd: answer s against frame s + latency (+ horizon)."""
        model, clip_BTCHW = self.net(options["task"], skips), random_clip()
        ahead = 3 + options.get("horizon", 0)
        answers = model.answers(clip_BTCHW)  # type: ignore[operator]
        loss = (answers[:, : 9 - ahead] - clip_BTCHW[:, ahead:]).square().mean()
        expected_loss = float(loss.detach())
        names, parameters = zip(*model.named_parameters(), strict=True)
        expected = dict(zip(names, torch.autograd.grad(loss, parameters), strict=True))
        found, ours = step_on(model, clip_BTCHW, self.labels("future"), rule="exact", target="newest", **options)
        assert_same(found, expected)
        assert float(ours["loss"]) == pytest.approx(expected_loss, rel=1e-6)

    @pytest.mark.parametrize("skips", ["none", "projection"])
    @pytest.mark.parametrize("task", ["autoencode", "keypoints"])
    def test_sideways_on_still_clips_is_backprop(self, task: str, skips: str) -> None:
        model = self.net(task, skips)
        num_frames = 17
        still = random_clip()[:, :1].repeat(1, num_frames, 1, 1, 1)
        labels = self.labels(task)
        labels = labels[:, :1].repeat(1, num_frames, 1, 1) if task == "keypoints" else labels
        expected = step_on(model, still, labels, rule="backprop", task=task)[0]
        assert_same(step_on(model, still, labels, rule="sideways", task=task)[0], expected)

    @pytest.mark.parametrize("task", ["autoencode", "keypoints"])
    def test_a_short_batch_of_a_net_that_is_cut(self, task: str) -> None:
        model = self.net(task, "none")
        attach_info(model, ModelInfo("net", "sidestream", "pictures", SPEC, 3))
        clip_BTCHW, labels = random_clip(3), self.labels(task)
        config = TrainConfig(rule="exact", task=task, num_stages=3)
        net = Answering(model, task)
        step = RULES["exact"](StepContext(model, net, config, lambda loss: loss.backward(), clip_BTCHW))
        step.make_optimizers(lambda parameters: torch.optim.SGD(parameters, lr=0.1))
        metrics = step.step(clip_BTCHW[:2], labels, lambda numbers: None)
        ours = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        model.zero_grad(set_to_none=True)
        expected, theirs = step_on(model, clip_BTCHW[:2], labels, rule="backprop", task=task)
        assert_same(ours, expected)
        assert float(metrics["loss"]) == pytest.approx(float(theirs["loss"]), rel=1e-6)


def batch_of(clip_BTCHW: Tensor, points: Tensor | None = None) -> Batch:
    keys = tuple(str(n) for n in range(len(clip_BTCHW)))
    return Batch(clip_BTCHW, torch.zeros(len(keys), dtype=torch.int64), keys, ((0.0,),) * len(keys), 0, points)


class Offset(nn.Module):
    """Answers each frame plus so much."""

    def __init__(self, offset: float) -> None:
        super().__init__()
        self.offset = offset

    def forward(self, clip_BTCHW: Tensor) -> Tensor:
        return clip_BTCHW + self.offset


def test_psnr_in_closed_form() -> None:
    assert psnr(torch.tensor([0.1, 0.01, 0.25, 0.0])).tolist() == pytest.approx([10, 20, 20 * math.log10(2), 100])


def test_scores_of_drawings_are_those_of_pixels() -> None:
    """Normalised answers that are off by 0.2 are off by 0.2 std in pixels; baselines by loops."""
    pixels = torch.rand(2, 5, 3, 6, 6, generator=torch.Generator().manual_seed(0)) * 0.6 + 0.2
    mean, std = (torch.tensor(each).view(3, 1, 1) for each in (SPEC.mean, SPEC.std))
    batch = batch_of((pixels - mean) / std)
    task = DrawingTask(horizon=None, spec=SPEC)
    scores = task.evaluate(Offset(0.2), [batch], device="cpu", gather=None)
    wanted = sum((0.2 * s) ** 2 for s in SPEC.std) / 3
    assert scores.loss == pytest.approx(0.04, rel=1e-4)
    assert scores.values == pytest.approx({"mse": wanted, "psnr": -10 * math.log10(wanted)}, rel=1e-4)
    assert scores.num_records == 2

    task = DrawingTask(horizon=2, spec=SPEC)
    task.mean_frame_CHW = torch.full((3, 6, 6), 0.5)
    values = task.evaluate(Offset(0.0), [batch], device="cpu", gather=None).values
    repeat = [float((pixels[b, t] - pixels[b, t + 2]).square().mean()) for b in range(2) for t in range(3)]
    grey = [float((pixels[b, t] - 0.5).square().mean()) for b in range(2) for t in (2, 3, 4)]
    assert values["repeat_mse"] == pytest.approx(sum(repeat) / 6, rel=1e-4)
    assert values["psnr"] == pytest.approx(values["repeat_psnr"])
    assert values["repeat_psnr"] == pytest.approx(sum(-10 * math.log10(e) for e in repeat) / 6, rel=1e-4)
    assert values["mean_frame_mse"] == pytest.approx(sum(grey) / 6, rel=1e-4)


def test_answers_are_clamped_to_what_a_pixel_can_be() -> None:
    white = torch.ones(1, 2, 3, 4, 4)
    scores = DrawingTask(horizon=None, spec=PLAIN).evaluate(Offset(3.0), [batch_of(white)], device="cpu", gather=None)
    assert scores.values["mse"] == 0
    assert scores.loss == 9


@pytest.mark.parametrize(("height", "width"), [(4, 4), (4, 6), (5, 3)])
def test_the_loss_of_heat_maps_cell_by_cell(height: int, width: int) -> None:
    points_BP3 = random_points(2, 1, 4)[:, 0]
    maps = torch.randn(2, 4, height, width, dtype=torch.float64)
    losses = []
    for b in range(2):
        for p in range(4):
            x, y, visible = points_BP3[b, p].tolist()
            cells = [(r, c) for r in range(height) for c in range(width)]
            weights = [math.exp(-((4 * c + 2 - x) ** 2 + (4 * r + 2 - y) ** 2) / (2 * 4.0**2)) for r, c in cells]
            log_sum = math.log(sum(math.exp(maps[b, p, r, c]) for r, c in cells))
            entropy = -sum(w * (maps[b, p, r, c] - log_sum) for w, (r, c) in zip(weights, cells, strict=True))
            losses += [float(entropy) / sum(weights)] if visible else []
    assert 2 <= len(losses) < 8
    found = KeypointTask().frame_loss(maps, (points_BP3, (4 * height, 4 * width)))
    assert float(found) == pytest.approx(sum(losses) / len(losses))


@pytest.mark.parametrize("answer", [torch.zeros(2, 3, 4), torch.zeros(2), [torch.zeros(2, 3)], None])
def test_answers_that_are_no_logits_are_refused(answer: Any) -> None:
    with pytest.raises(InputError, match="not class logits"):
        make_task(TrainConfig(), SPEC).frame_loss(answer, torch.tensor([0, 1]))


def test_heat_maps_whose_cells_are_not_square_are_refused() -> None:
    maps, points_BP3 = torch.zeros(1, 2, 4, 6), torch.ones(1, 2, 3)
    with pytest.raises(InputError, match="heat maps of 4 x 6 cells do not lie on frames of 24 x 16 px"):
        KeypointTask().frame_loss(maps, (points_BP3, (24, 16)))


class Answers(nn.Module):
    def __init__(self, maps: Tensor) -> None:
        super().__init__()
        self.maps = maps

    def forward(self, clip_BTCHW: Tensor) -> Tensor:
        return self.maps


def test_scores_of_keypoints() -> None:
    """Maps with their peaks at known places: two frames, the person 40 px high; only visible points count."""
    truth = torch.tensor([[[10.0, 10, 1], [30, 50, 1], [20, 30, 1], [60, 60, 0]]] * 2).unsqueeze(0)
    off = torch.tensor([[0.0, 3.0, 6.0, 30.0], [0.0, 0.0, 9.0, 0.0]])  # px to the right; limits are 4 and 8
    placed = truth[..., :2].clone()
    placed[0, ..., 0] += off
    maps = gaussian_maps(placed.double(), (32, 32), 2.0, sigma_cells=1.0).log().float()
    task = KeypointTask()
    task.mean_pose_P2 = truth[0, 0, :, :2] + torch.tensor([0.0, 5.0])
    batch = batch_of(torch.zeros(1, 2, 3, 64, 64), truth)
    values = task.evaluate(Answers(maps), [batch], device="cpu", gather=None).values
    assert values["pck_0.1"] == pytest.approx(4 / 6)
    assert values["pck_0.2"] == pytest.approx(5 / 6)
    assert values["error_px"] == pytest.approx((3 + 6 + 9) / 6, abs=0.05)
    assert values["mean_pose_pck_0.1"] == 0
    assert values["mean_pose_pck_0.2"] == 1
    assert values["mean_pose_error_px"] == pytest.approx(5)


def test_the_panels_of_keypoints_show_the_middle_frame_as_it_was_before_it_was_normalised() -> None:
    """What bilinear resizing brought above 1 or below 0 is black or white in a picture, not wrapped around."""
    spec = InputSpec((64, 64), mean=(0.5, 0.4, 0.3), std=(0.25, 0.2, 0.5), layout="BTCHW", num_frames=3)
    truth = torch.tensor([[[10.0, 10, 1], [30, 50, 0], [20, 30, 1]]] * 3).unsqueeze(0)
    maps = gaussian_maps(truth[..., :2].double() + 1, (32, 32), 2.0, sigma_cells=1.0).log().float()
    pixels = torch.rand(1, 3, 3, 64, 64, generator=torch.Generator().manual_seed(3)) * 1.5 - 0.25
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (spec.mean, spec.std))
    (panel,) = KeypointTask(spec=spec).panels(Answers(maps), batch_of((pixels - mean) / std, truth), "cpu")[
        "visible points"
    ]
    for shown, pixel in zip(panel.pixels_CHW.flatten().tolist(), pixels[0, 1].flatten().tolist(), strict=True):
        assert shown == pytest.approx(min(max(pixel, 0.0), 1.0), abs=1e-5)
    assert [name for name, _ in panel.points] == ["true", "answer"]
    assert panel.points[0][1].tolist() == [[10, 10], [20, 30]]
    assert panel.points[1][1].flatten().tolist() == pytest.approx([11, 11, 21, 31], abs=0.1)


def tiny(task: str, part: str = "train", num_clips: int = 6) -> Any:
    return synthetic_dataset(
        part=part, spec=PLAIN, num_clips=num_clips, options=ClipOptions(), with_points=task == "keypoints"
    )


CONFIG = TrainConfig(
    epochs=2, batch_size=3, optimizer="adamw", lr=0.01, device="cpu", num_workers=0, checkpoint_minutes=0.0
)


@pytest.mark.parametrize("rule", ["backprop", "exact", "sideways"])
@pytest.mark.parametrize("task", ["autoencode", "future", "keypoints"])
def test_a_run_of_every_task_by_every_rule(task: str, rule: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    skips = "projection" if task != "keypoints" else "none"
    model = conv_autoencoder((4, 6)) if task != "keypoints" else layered_maps()
    config = CONFIG.replace(task=task, rule=rule, skips=skips, update="tick" if rule == "sideways" else "clip")
    before = [p.clone() for p in model.parameters()]
    result = fit(model, tiny(task), tiny(task, "test", 4), config=config, out=tmp_path / "run")
    assert any(not a.equal(b) for a, b in zip(before, model.parameters(), strict=True))
    assert result.test_accuracy is None
    assert result.score == ("pck_0.2" if task == "keypoints" else "psnr")
    names = {"keypoints": {"mean_pose_pck_0.2", "pck_0.1", "error_px"}, "future": {"repeat_psnr", "mean_frame_psnr"}}
    assert {"loss", result.score} | names.get(task, {"mean_frame_psnr"}) <= result.test_scores.keys()
    assert all(math.isfinite(value) for value in result.test_scores.values())
    assert "train_accuracy" not in result.history[0]
    scores = [record[f"test_{result.score}"] for record in result.history]
    last, best = (load_file(tmp_path / f"run/{name}.safetensors") for name in ("last", "best"))
    is_last = scores[1] > scores[0]
    assert all(last[key].equal(best[key]) for key in last) == is_last
    pytest.importorskip("matplotlib")
    assert (tmp_path / "run/samples.png").stat().st_size > 2000
    assert (tmp_path / "run/curve.png").is_file()


def layered_maps() -> nn.Module:
    """Five maps of every frame, cells 4 px wide."""
    torch.manual_seed(0)
    net = conv_autoencoder((6, 6))
    last: Any = net.net[-1]
    last[0], last[1] = nn.Identity(), nn.Conv2d(6, 5, 1)
    net.net[-2][0] = nn.Identity()  # type: ignore[index]
    return net


def few(task: str, size_px: int, num_frames: int) -> ClipDataset:
    """Two clips, again and again."""
    half = (0.5,) * 3
    spec = PLAIN.replace(size_px=(size_px, size_px), mean=half, std=half, num_frames=num_frames)
    data = synthetic_dataset(spec=spec, num_clips=2, with_points=task == "keypoints")
    records = data.records * 25
    return ClipDataset(records, data.class_names, spec=spec, open_pictures=data._open, points=data.points, name="few")


def learnt(model: nn.Module, rule: str, data: ClipDataset, out: Path, task: str, epochs: int = 5) -> dict[str, float]:
    options: dict[str, Any] = {"lr": 0.003, "batch_size": 2, "checkpoint_minutes": 9.0, "epochs": epochs}
    config = CONFIG.replace(task=task, rule=rule, evaluate_every=epochs, **options)
    return fit(model, data, data.with_part("test"), config=config, out=out).test_scores


@pytest.mark.parametrize(("rule", "epochs"), [("backprop", 5), pytest.param("sideways", 20, marks=pytest.mark.slow)])
def test_a_few_frames_are_learnt_by_heart(rule: str, epochs: int, tmp_path: Path) -> None:
    """The loss on the training clips falls far below that of their mean frame. Under "sideways" an update has the
    gradients of a few ticks of the eight only, and the first stages those of the fewest."""
    torch.manual_seed(0)
    data = few("autoencode", 16, 8)
    scores = learnt(conv_autoencoder((32, 32)), rule, data, tmp_path / "run", "autoencode", epochs)
    assert scores["mse"] < 0.5 * scores["mean_frame_mse"]
    assert scores["psnr"] > scores["mean_frame_psnr"] + 3


def test_points_are_learnt_by_heart(tmp_path: Path) -> None:
    torch.manual_seed(0)
    scores = learnt(keypoint_cnn(5, width=0.25), "backprop", few("keypoints", 32, 4), tmp_path / "run", "keypoints")
    assert scores["error_px"] < 0.6 * scores["mean_pose_error_px"]


def test_a_run_that_was_stopped_ends_with_the_same_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, one_thread: None
) -> None:
    def run(name: str, resume: bool = False) -> Any:
        torch.manual_seed(0)
        model = conv_autoencoder((4, 6))
        config = CONFIG.replace(task="future", horizon=2, rule="sideways", skips="projection", update="tick")
        return fit(model, tiny("future"), tiny("future", "test"), config=config, out=tmp_path / name, resume=resume)

    whole = run("whole")
    frame_loss, count = DrawingTask.frame_loss, 0

    def stops(*given: Any) -> Tensor:
        nonlocal count
        count += 1
        if count == 22:  # in the third or fourth batch
            raise KeyboardInterrupt
        return frame_loss(*given)

    monkeypatch.setattr(DrawingTask, "frame_loss", stops)
    with pytest.raises(KeyboardInterrupt):
        run("cut")
    monkeypatch.undo()
    again = run("cut", resume=True)
    ours, theirs = (load_file(tmp_path / name / "last.safetensors") for name in ("cut", "whole"))
    assert all(ours[key].equal(theirs[key]) for key in theirs)
    assert again.test_scores == whole.test_scores


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"task": "keypoints"}, "was opened without keypoints.*with_points=True"),
        ({"task": "future", "horizon": 9}, "clips of 9 frames hold no target: it lies 9 frames after"),
        ({"task": "autoencode", "label_smoothing": 0.1}, "label_smoothing=0.1 with the task 'autoencode'"),
        (
            {"task": "autoencode", "target": "newest"},
            "target='newest' with the rule 'backprop'; only 'exact', 'sideways', 'unrolled' know it",
        ),
        ({"task": "clip"}, r"answers \(2, 1, 9, 3, 16, 16\), not one row of class logits"),
    ],
)
def test_refusals(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=message):
        fit(conv_autoencoder((4,)), tiny("future"), config=CONFIG.replace(**options), out=tmp_path / "run")
    assert not (tmp_path / "run/config.json").exists()


def test_models_that_do_not_draw_are_refused(tmp_path: Path) -> None:
    config = CONFIG.replace(task="autoencode")
    with pytest.raises(InputError, match=r"answers \(2, 9, 4\); this task wants maps of every frame"):
        fit(layered().float(), tiny("future"), config=config, out=tmp_path / "run")
    with pytest.raises(InputError, match=r"3 heat maps, but the clips have 5 keypoints; make the model with"):
        fit(conv_autoencoder((4,)), tiny("keypoints"), config=CONFIG.replace(task="keypoints"), out=tmp_path / "run")
    late = attach_info(conv_autoencoder((4,)), ModelInfo("late", "x", "pictures", SPEC.replace(causal=False), 3))
    with pytest.raises(InputError, match="late sees later frames"):
        fit(late, tiny("future"), config=CONFIG.replace(task="future"), out=tmp_path / "run")


def test_the_curve_shows_what_is_to_be_beaten(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    from sidestream.train.curve import _baselines

    record = {"epoch": 0, "train_loss": 1.0, "test_loss": 1.0, "test_psnr": 20.0, "test_mean_frame_psnr": 14.0}
    record |= {"test_repeat_psnr": 25.0, "test_repeat_mse": 0.1}
    assert _baselines([record, {"epoch": 1, "train_loss": 1.0}], "psnr") == {"mean frame": 14.0, "repeat": 25.0}
    assert draw_curve([record], tmp_path / "curve.png", title="x", score="psnr")


def test_class_tasks_are_what_they_were() -> None:
    assert TrainConfig(rule="exact").answers_task == "frame"
    assert TrainConfig(rule="exact", task="keypoints").answers_task == "keypoints"
    assert make_task(TrainConfig()).score == "accuracy"
