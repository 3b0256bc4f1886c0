"""TimeSformer: against transformers with the same weights, a slow twin with explicit masks, and itself on streams."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor

from contract import check_streaming_layer
from sidestream.errors import LayoutError, ModelError
from sidestream.models import create_model, input_spec_of, list_models, model_info, save_weights
from sidestream.models.timesformer import SCHEMES, TimeSformer, map_keys
from sidestream.models.timesformer_blocks import local_areas
from sidestream.models.timesformer_causal import CausalTimeSformer
from sidestream.models.timesformer_embedding import Size
from sidestream.models.weights import load_state, load_weights
from sidestream.nn.steppable import step_through

Place = tuple[int, int, int]
TINY = Size(dim=8, depth=2, num_heads=2, patch_px=4, size_px=(16, 16), num_frames=4)
THEIRS = {"space": "space_only", "joint": "joint_space_time", "divided": "divided_space_time"}


def randomised(net: Any, seed: int = 0) -> Any:
    """Weights that show every mistake: no zeros, no ones."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for value in net.parameters():
            value.copy_(torch.randn(value.shape, generator=generator, dtype=value.dtype) * 0.4)
    return net.eval()


def random_clip(num_frames: int, height: int = 16, width: int = 16, dtype: torch.dtype = torch.float64) -> Tensor:
    shape = (2, num_frames, 3, height, width)
    return torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=dtype)


def theirs(scheme: str, size: Size) -> Any:
    transformers = pytest.importorskip("transformers")
    config = transformers.TimesformerConfig(
        image_size=size.size_px[0],
        patch_size=size.patch_px,
        num_frames=size.num_frames,
        hidden_size=size.dim,
        num_hidden_layers=size.depth,
        num_attention_heads=size.num_heads,
        intermediate_size=4 * size.dim,
        attention_type=THEIRS[scheme],
        num_labels=5,
    )
    return transformers.TimesformerForVideoClassification(config)


@pytest.mark.parametrize("scheme", THEIRS)
@pytest.mark.parametrize("num_frames", [4, 3])
def test_equals_transformers_in_value_and_gradient(scheme: str, num_frames: int) -> None:
    """Their layers take the number of frames from the config, never from the clip, so it is set to the clip's."""
    size = Size(dim=24, depth=3, num_heads=4, patch_px=8, size_px=(32, 32), num_frames=num_frames)
    net = randomised(theirs(scheme, size))
    model = TimeSformer(5, scheme=scheme, size=size)
    load_state(model, map_keys(net.state_dict()), origin="transformers")
    clips = [random_clip(num_frames, 32, 32, torch.float32).requires_grad_() for _ in range(2)]
    if scheme == "space":  # they answer each frame; the authors' code, and ours, average the tokens before the norm
        hidden_ND = net.timesformer.encoder(net.timesformer.embeddings(clips[0]))[0][:, 0]
        expected = net.classifier(net.timesformer.layernorm(hidden_ND.unflatten(0, (2, num_frames)).mean(1)))
    else:
        expected = net(clips[0]).logits
    actual = model(clips[1])
    assert expected.std() > 0.1
    torch.testing.assert_close(actual, expected, atol=1e-4, rtol=0)
    weights_BN = torch.randn(2, 5, generator=torch.Generator().manual_seed(2))
    for logits in (expected, actual):
        (logits * weights_BN).sum().backward()
    gradients = map_keys({key: p.grad for key, p in net.named_parameters()})
    assert gradients.keys() == dict(model.named_parameters()).keys()
    for key, p in model.named_parameters():
        scale = gradients[key].abs().max()  # gradients differ in size by many orders; sums run in another order
        assert scale > 0, key
        assert (p.grad - gradients[key]).abs().max() <= 1e-4 * max(scale, 1.0), key
    torch.testing.assert_close(clips[1].grad, clips[0].grad, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("scheme", THEIRS)
def test_the_tokens_of_every_patch_equal_transformers(scheme: str) -> None:
    net = randomised(theirs(scheme, TINY))
    model = TimeSformer(5, scheme=scheme, size=TINY)
    load_state(model, map_keys(net.state_dict()), origin="transformers")
    clip_BTCHW = random_clip(4, dtype=torch.float32)
    with torch.no_grad():
        expected = net.timesformer(clip_BTCHW).last_hidden_state
        class_BKD, patches_BTHWD = model.tokens(clip_BTCHW)
        if scheme == "space":
            tokens = torch.cat([class_BKD.flatten(0, 1).unsqueeze(1), patches_BTHWD.flatten(2, 3).flatten(0, 1)], 1)
        else:  # their order is place by place, the frames of a place after each other
            tokens = torch.cat([class_BKD, patches_BTHWD.flatten(2, 3).transpose(1, 2).flatten(1, 2)], 1)
        torch.testing.assert_close(model.norm(tokens), expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("scheme", THEIRS)
def test_the_keys_of_the_base_model_fit(scheme: str) -> None:
    with torch.device("meta"):
        net = theirs(scheme, Size())
        model = create_model(f"timesformer_{scheme}", num_classes=5)
    found = {k: v.shape for k, v in map_keys(net.state_dict()).items()}
    assert found == {k: v.shape for k, v in model.state_dict().items()}
    assert map_keys(model.state_dict()).keys() == found.keys()


def nearest(place: int, num_places: int) -> set[int]:
    """The half of an axis (rounded up) that is nearest to a place; of two as near, the lower one first."""
    by_distance = sorted(range(num_places), key=lambda p: (abs(p - place), p))
    return set(by_distance[: (num_places + 1) // 2])


def sees(kind: str, grid: Place, a: Place, b: Place) -> bool:
    """Whether the patch at ``a`` (frame, row, column) attends to the patch at ``b``."""
    if kind == "local":
        return b[1] in nearest(a[1], grid[1]) and b[2] in nearest(a[2], grid[2])
    if kind == "global":
        return all((p - q) % 2 == 0 for p, q in zip(a, b, strict=True))
    if kind.startswith("causal"):
        return a[1:] == b[1:] and 0 <= a[0] - b[0] < int(kind.removeprefix("causal"))
    free = {"time": (0,), "space": (1, 2), "joint": (0, 1, 2), "width": (2,), "height": (1,)}[kind]
    return all(a[n] == b[n] for n in range(3) if n not in free)


def attend(step: Any, queries_LD: Tensor, tokens_ND: Tensor, sees_LN: Tensor) -> Tensor:
    """What a step adds to the queries: head by head, masked by minus infinity."""
    width = tokens_ND.shape[1]
    weight, bias = step.attention.qkv.weight, step.attention.qkv.bias
    q = step.norm(queries_LD) @ weight[:width].T + bias[:width]
    k, v = (step.norm(tokens_ND) @ weight[n * width : (n + 1) * width].T + bias[n * width : (n + 1) * width]
            for n in (1, 2))  # fmt: skip
    heads, num_heads = [], step.attention.num_heads
    for part in torch.arange(width).chunk(num_heads):
        scores = q[:, part] @ k[:, part].T / (width / num_heads) ** 0.5
        heads.append(scores.masked_fill(~sees_LN, float("-inf")).softmax(-1) @ v[:, part])
    return step.mix(step.attention.proj(torch.cat(heads, 1)))


def slow_block(block: Any, kinds: tuple[str, ...], grid: Place, class_KD: Tensor, patches_ND: Tensor) -> Any:
    places = list(product(*map(range, grid)))
    for step, kind in zip(block.steps, kinds, strict=True):
        sees_NN = torch.tensor([[sees(kind, grid, a, b) for b in places] for a in places])
        if step is not block.steps[-1]:
            patches_ND = patches_ND + attend(step, patches_ND, patches_ND, sees_NN)
            continue
        added_to_class, added = [], torch.zeros_like(patches_ND)
        for seen_N in sees_NN.unique(dim=0):  # the groups: patches that see the same ones
            frame = places[int(seen_N.nonzero()[0])][0]
            own_1D = class_KD[frame : frame + 1] if len(class_KD) > 1 else class_KD
            tokens_ND = torch.cat([own_1D, patches_ND])
            sees_N = torch.cat([torch.tensor([True]), seen_N])
            rows = torch.cat([torch.tensor([True]), (sees_NN == seen_N).all(1)])
            answers = attend(step, tokens_ND[rows], tokens_ND, sees_N.expand(int(rows.sum()), -1))
            added_to_class.append((frame, answers[0]))
            added[rows[1:]] = answers[1:]
        if len(class_KD) > 1:
            class_KD = class_KD + torch.stack([a for _, a in sorted(added_to_class, key=lambda pair: pair[0])])
        else:
            class_KD = class_KD + torch.stack([a for _, a in added_to_class]).mean(0)
        patches_ND = patches_ND + added
    ends = [x + block.mlp(block.norm(x)) for x in (class_KD, patches_ND)]
    return ends[0], ends[1]


def slow_tokens(net: TimeSformer, kinds: tuple[str, ...], clip_TCHW: Tensor, has_class_per_frame: bool) -> Any:
    e, patch = net.embedding, net.size.patch_px
    pixels = clip_TCHW.unfold(2, patch, patch).unfold(3, patch, patch)  # T, C, H, W, patch, patch
    grid = (pixels.shape[0], pixels.shape[2], pixels.shape[3])
    patches_ND = pixels.permute(0, 2, 3, 1, 4, 5).flatten(3).flatten(0, 2) @ e.patches.weight.flatten(1).T
    patches_ND = patches_ND + e.patches.bias + e.places_1ND[0, 1:].repeat(grid[0], 1)
    if net.scheme != "space":
        patches_ND = patches_ND + e.times_1TD[0].repeat(9, 1)[: grid[0]].repeat_interleave(grid[1] * grid[2], 0)
    class_KD = (e.class_11D + e.places_1ND[:, :1])[0].repeat(grid[0] if has_class_per_frame else 1, 1)
    for block in net.blocks:
        class_KD, patches_ND = slow_block(block, kinds, grid, class_KD, patches_ND)
    return class_KD, patches_ND


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("grid", [(4, 4, 4), (3, 3, 5), (2, 1, 2)])
def test_equals_a_slow_twin_with_masks(scheme: str, grid: Place) -> None:
    size = Size(dim=8, depth=2, num_heads=2, patch_px=2, size_px=(2 * grid[1], 2 * grid[2]), num_frames=grid[0])
    net = randomised(TimeSformer(5, scheme=scheme, size=size).double())
    clip_BTCHW = random_clip(grid[0], *size.size_px)
    class_BKD, patches_BTHWD = net.tokens(clip_BTCHW)
    expected = [slow_tokens(net, SCHEMES[scheme], clip_TCHW, scheme == "space") for clip_TCHW in clip_BTCHW]
    torch.testing.assert_close(class_BKD, torch.stack([c for c, _ in expected]))
    torch.testing.assert_close(patches_BTHWD.flatten(1, 3), torch.stack([p for _, p in expected]))
    torch.testing.assert_close(net(clip_BTCHW), torch.stack([net.head(net.norm(c.mean(0))) for c, _ in expected]))


def test_gradients_of_the_sparse_schemes_equal_those_of_the_slow_twin() -> None:
    for scheme in ("local_global", "axial"):
        net = randomised(TimeSformer(5, scheme=scheme, size=TINY).double())
        clip_BTCHW = random_clip(4)
        slow = torch.stack([slow_tokens(net, SCHEMES[scheme], clip, False)[0].mean(0) for clip in clip_BTCHW])
        answers = [net(clip_BTCHW), net.head(net.norm(slow))]
        found = [torch.autograd.grad(a[:, 1].sum(), list(net.parameters())) for a in answers]
        for (name, _), ours, twin in zip(net.named_parameters(), *found, strict=True):
            assert twin.any(), name
            torch.testing.assert_close(ours, twin, msg=lambda m, n=name: f"{n}: {m}")


def test_local_windows_are_full_and_cost_a_quarter() -> None:
    areas = local_areas(8, 14, 14)
    assert sorted(int(n) for looking, _ in areas for n in looking) == list(range(8 * 14 * 14))
    assert {len(seen) for _, seen in areas} == {8 * 7 * 7}


@pytest.mark.parametrize("num_frames", [1, 3])
def test_causal_stream_equals_clip(num_frames: int) -> None:
    size = Size(dim=4, depth=2, num_heads=2, patch_px=4, size_px=(8, 8), num_frames=num_frames)
    model = randomised(CausalTimeSformer(5, size=size).double())
    field = 2 * (num_frames - 1) + 1
    check_streaming_layer(model.streaming(), random_clip(6, 8, 8), receptive_field=field)


@torch.no_grad()
def test_causal_equals_the_slow_twin() -> None:
    size = Size(dim=8, depth=2, num_heads=2, patch_px=4, size_px=(8, 12), num_frames=3)
    model = randomised(CausalTimeSformer(5, size=size).double())
    clip_BTCHW = random_clip(7, 8, 12)
    expected = [slow_tokens(model.net, ("causal3", "space"), clip, True)[0] for clip in clip_BTCHW]
    answers_BTN = model.net.head(model.net.norm(torch.stack(expected)))
    torch.testing.assert_close(model.answers(clip_BTCHW), answers_BTN)
    torch.testing.assert_close(model(clip_BTCHW), answers_BTN[:, -1])
    torch.testing.assert_close(step_through(model.streaming(), clip_BTCHW)[0], answers_BTN)


def test_causal_takes_the_weights_of_divided(tmp_path) -> None:
    divided = randomised(TimeSformer(5, size=TINY))
    file = save_weights(divided, tmp_path / "divided.safetensors")
    causal = load_weights(CausalTimeSformer(5, size=TINY), file).eval()
    stream = causal.streaming()
    assert {id(p) for p in stream.parameters()} == {id(p) for p in causal.parameters()}
    clip_BTCHW = random_clip(1, dtype=torch.float32)  # on one frame the two are the same net
    torch.testing.assert_close(stream(clip_BTCHW)[:, 0], divided(clip_BTCHW))


def make(name: str) -> Any:
    scheme = name.removeprefix("timesformer_")
    return CausalTimeSformer(5, size=TINY) if "causal" in name else TimeSformer(5, scheme=scheme, size=TINY)


NAMES = [*(f"timesformer_{scheme}" for scheme in SCHEMES), "timesformer_divided_causal"]
PAPER_MILLIONS = dict(zip(NAMES, [85.9, 85.9, 121.4, 121.4, 156.8, 121.4], strict=True))
"""Parameters in the paper's table 1; causal attention has those of divided attention."""
each_name: Callable[..., Any] = pytest.mark.parametrize("name", NAMES)


def test_all_are_listed() -> None:
    assert list_models("timesformer_*") == NAMES


@each_name
def test_what_is_promised_of_a_name_holds(name: str) -> None:
    spec = model_info(name).input_spec
    assert (spec.layout, spec.num_frames, spec.min_frames) == ("BTCHW", 8, 1)
    assert spec.causal == ("causal" in name)
    with torch.device("meta"):
        model = create_model(name)
    assert input_spec_of(model) == spec
    num_parameters = sum(p.numel() for p in model.parameters()) / 1e6
    assert num_parameters == pytest.approx(PAPER_MILLIONS[name], abs=0.5)  # the head included or not


@each_name
@torch.no_grad()
def test_weights_come_back_strictly_and_other_sizes_are_taken(name: str, tmp_path) -> None:
    model = randomised(make(name))
    again = load_weights(make(name), save_weights(model, tmp_path / "w.safetensors"))
    for num_frames, height, width in ((4, 16, 16), (3, 24, 16), (9, 8, 20)):
        clip_BTCHW = random_clip(num_frames, height, width, torch.float32)
        assert torch.equal(again.eval()(clip_BTCHW), model(clip_BTCHW))
        assert model(clip_BTCHW).isfinite().all()


@each_name
def test_wrong_clips_are_refused(name: str) -> None:
    model, clip_BTCHW = make(name), random_clip(4, dtype=torch.float32)
    with pytest.raises(LayoutError, match=r"\(2, 3, 4, 16, 16\); expected \(B, T, 3, H, W\).*use transpose\(1, 2\)"):
        model(clip_BTCHW.transpose(1, 2))
    with pytest.raises(LayoutError, match="0 frames; it needs 1 or more"):
        model(clip_BTCHW[:, :0])
    with pytest.raises(LayoutError, match="15 x 16 pixels; it needs multiples of its patches of 4"):
        model(clip_BTCHW[..., :15, :])


def test_an_unknown_scheme_is_refused() -> None:
    with pytest.raises(ModelError, match="scheme = 'diagonal' is unknown; TimeSformer has space, joint, divided"):
        TimeSformer(scheme="diagonal")
