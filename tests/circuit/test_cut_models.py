"""Public models, cut into 2, 5 and 8 stages: the stages in a row equal the model, bit for bit, on every output."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils import _pytree as pytree

import sidestream.circuit.cut as cut_file
from contract import assert_equal
from sidestream.circuit.cut import cut
from sidestream.errors import CutError


def torchvision_model(name: str, **options: Any) -> nn.Module:
    import torchvision

    return torchvision.models.get_model(name, weights=None, **options)


def timm_model(name: str, **options: Any) -> nn.Module:
    import timm

    return timm.create_model(name, pretrained=False, **options)


def videomae() -> nn.Module:
    from transformers import VideoMAEConfig, VideoMAEForVideoClassification

    config = VideoMAEConfig(
        image_size=32, num_frames=4, hidden_size=48, num_hidden_layers=4, num_attention_heads=4, intermediate_size=96
    )
    return VideoMAEForVideoClassification(config)


FRAME_64, CLIP_8 = (1, 3, 64, 64), (1, 3, 8, 32, 32)
slow = pytest.mark.slow
MODELS: list[Any] = [
    pytest.param(lambda: torchvision_model("resnet50"), FRAME_64, id="resnet50"),
    pytest.param(lambda: torchvision_model("densenet121"), FRAME_64, id="densenet121"),
    pytest.param(
        lambda: torchvision_model("googlenet", aux_logits=False, init_weights=False), FRAME_64, id="googlenet"
    ),
    pytest.param(lambda: torchvision_model("inception_v3", init_weights=False), (1, 3, 96, 96), id="inception_v3"),
    pytest.param(lambda: torchvision_model("mobilenet_v3_large"), FRAME_64, id="mobilenet_v3_large"),
    pytest.param(lambda: torchvision_model("efficientnet_b0"), FRAME_64, id="efficientnet_b0"),
    pytest.param(lambda: torchvision_model("vit_b_16", image_size=64), FRAME_64, id="vit_b_16"),
    pytest.param(lambda: torchvision_model("swin_t"), FRAME_64, id="swin_t"),
    pytest.param(lambda: torchvision_model("convnext_tiny"), FRAME_64, id="convnext_tiny"),
    pytest.param(lambda: timm_model("vit_tiny_patch16_224", img_size=64), FRAME_64, id="timm-vit_tiny"),
    pytest.param(lambda: timm_model("resnet26d"), FRAME_64, id="timm-resnet26d"),
    pytest.param(lambda: torchvision_model("r3d_18"), CLIP_8, id="r3d_18"),
    pytest.param(lambda: torchvision_model("r2plus1d_18"), CLIP_8, id="r2plus1d_18"),
    pytest.param(lambda: torchvision_model("s3d"), (1, 3, 14, 224, 224), id="s3d", marks=slow),
    pytest.param(lambda: torchvision_model("mvit_v2_s"), (1, 3, 16, 224, 224), id="mvit_v2_s", marks=slow),
    pytest.param(videomae, (1, 4, 3, 32, 32), id="transformers-videomae"),
]


def randomised(model: nn.Module) -> nn.Module:
    """In eval mode, with scales, biases and statistics that hide no wrong wire (none is 0, 1, or the same twice)."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for tensor in [*model.parameters(), *model.buffers()]:
            if not tensor.is_floating_point():
                continue
            if tensor.ndim <= 1 or bool((tensor == tensor.flatten()[0]).all()):  # zero-initialised heads, layer scales
                noise = torch.rand(tensor.shape, generator=generator)
                tensor.copy_(0.5 + noise if tensor.ndim <= 1 else noise - 0.5)
    return model.eval()


@pytest.fixture
def traced_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Trace a model once per test, however often it is cut."""
    original, memory = cut_file.trace_exported, {}

    def remembered(model: nn.Module, args: Any, kwargs: Any) -> Any:
        if id(model) not in memory:
            memory[id(model)] = original(model, args, kwargs)
        return memory[id(model)]

    monkeypatch.setattr(cut_file, "trace_exported", remembered)


@pytest.mark.usefixtures("traced_once")
@pytest.mark.parametrize(("make_model", "shape"), MODELS)
def test_stages_in_a_row_equal_the_model(make_model: Callable[[], nn.Module], shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    model, x = randomised(make_model()), torch.rand(shape)
    before = x.clone()
    with torch.no_grad():
        expected, expected_other = model(x), model(1.0 - x)
    assert not torch.equal(pytree.tree_leaves(expected)[0], pytree.tree_leaves(expected_other)[0])
    for num_stages in (2, 5, 8):
        stages = cut(model, x, num_stages=num_stages, costs="parameters")
        assert len(stages) == num_stages
        assert_equal(stages(x), expected)
        assert_equal(stages(1.0 - x), expected_other)
        assert_equal(stages(x), expected)
    assert torch.equal(x, before)


@pytest.mark.usefixtures("traced_once")
def test_densenet_is_cut_inside_its_blocks() -> None:
    model, x = randomised(torchvision_model("densenet121")), torch.rand(FRAME_64)
    with torch.no_grad():
        expected = model(x)
    stages = cut(model, x, num_stages=40, costs="uniform")
    assert_equal(stages(x), expected)
    widths = [len({(k.source, k.output) for k in stages.links if k.source < n <= k.target}) for n in range(2, 17)]
    assert max(widths) >= 5, "features of a dense block cross the cut one by one"


class TwoInputs(nn.Module):
    """Image and audio, a late skip of an input, nested and repeated answers, an answer that is an input, a constant."""

    def __init__(self) -> None:
        super().__init__()
        self.see = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(inplace=True), nn.Conv2d(8, 8, 3, padding=1))
        self.hear = nn.Linear(16, 8)
        self.join = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 5))
        self.scale = nn.Parameter(torch.rand(5))

    def forward(self, image: torch.Tensor, sound: torch.Tensor) -> dict[str, Any]:
        seen, heard = self.see(image), self.hear(sound)
        low, high = self.join(torch.cat([seen.mean((2, 3)), heard], dim=1)).split([2, 3], dim=1)
        logits = torch.cat([high, low], dim=1) * self.scale + sound[:, :5]
        return {
            "logits": logits,
            "parts": (low, [seen, heard]),
            "again": low,
            "input": sound,
            "scale": self.scale,
            "none": None,
            "number": 7,
        }


@pytest.mark.parametrize("num_stages", range(1, 9))
def test_two_inputs_and_a_dict_of_outputs(num_stages: int) -> None:
    model, image, sound = randomised(TwoInputs()), torch.rand(1, 3, 16, 16), torch.rand(1, 16)
    with torch.no_grad():
        expected = model(image, sound)
    by_position = cut(model, (image, sound), num_stages=num_stages, costs="uniform")
    by_name = cut(model, {"image": image, "sound": sound}, num_stages=num_stages, costs="uniform")
    assert_equal(by_position(image, sound), expected)
    assert_equal(by_name(image=image, sound=sound), expected)
    assert list(by_name(image=image, sound=sound)) == list(expected)


def test_dict_output_of_transformers_keeps_its_class() -> None:
    model, x = randomised(videomae()), torch.rand(1, 4, 3, 32, 32)
    with torch.no_grad():
        expected = model(pixel_values=x, output_hidden_states=True, return_dict=True)
    example = {"pixel_values": x, "output_hidden_states": True, "return_dict": True}
    answer = cut(model, example, num_stages=3, costs="parameters")(**example)
    assert type(answer) is type(expected)
    assert len(answer.hidden_states) == len(expected.hidden_states) == 5
    assert_equal(answer, expected)


def test_fused_attention_of_torch_is_kept() -> None:
    """nn.MultiheadAttention runs a fused kernel in inference, which tracing would replace by another one."""
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(32, 4, 64, batch_first=True), 3)
    model, x = nn.Sequential(randomised(encoder), nn.Linear(32, 4)).eval(), torch.rand(1, 9, 32)
    stages = cut(model, x, num_stages=3, costs="parameters")
    with torch.inference_mode():
        assert_equal(stages(x), model(x))
    assert all("forward" not in vars(m) for m in model.modules())


def test_a_model_made_by_name_needs_no_example_and_brings_its_input_spec() -> None:
    from sidestream.circuit.wiring import pipelined
    from sidestream.models import create_model, input_spec_of

    model = create_model("timm/test_resnet")
    stages = cut(model, num_stages=2, costs="uniform")
    assert stages.input_spec == input_spec_of(model) == pipelined(stages).input_spec
    assert stages.name == "test_resnet"
    with pytest.raises(CutError, match="give an example"):
        cut(nn.ReLU())
