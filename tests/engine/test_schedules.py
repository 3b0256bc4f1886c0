"""The schedules side by side: idle slots and kept inputs counted on running machines, gradients against torch's own.

Code under test is the library's rules and the baselines of ``benchmarks/depth_training``; the formulas are here.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sidestream.circuit.build_stages import stages_of
from sidestream.circuit.wiring import parallel, pipelined
from sidestream.engine import run
from sidestream.engine.rules.exact import Exact
from sidestream.engine.rules.sideways import Sideways

BENCHMARK = Path(__file__).resolve().parents[2] / "benchmarks" / "depth_training"
SIZES = [(2, 3), (2, 9), (3, 8), (4, 4), (4, 16), (5, 30)]
mse = F.mse_loss


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Imports a file of the benchmark; what it imported is forgotten afterwards."""
    import sys

    before = set(sys.modules)
    monkeypatch.syspath_prepend(BENCHMARK)
    yield importlib.import_module
    for name in set(sys.modules) - before:
        if str(getattr(sys.modules[name], "__file__", "")).startswith(str(BENCHMARK)):
            del sys.modules[name]


def row(num_stages: int) -> list[nn.Module]:
    """Each ends in a linear layer, which keeps nothing of its output: inputs of stages are not counted twice."""
    torch.manual_seed(0)
    return [nn.Sequential(nn.Tanh(), nn.Linear(5, 5)).double() for _ in range(num_stages)]


def clip(num_frames: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(2)
    return tuple(torch.randn(2, num_frames, 5, generator=generator, dtype=torch.float64))


def autograd(modules: list[nn.Module], frames: Tensor, targets: Tensor) -> list[dict[str, Tensor]]:
    loss = mse(nn.Sequential(*modules)(frames), targets)
    named = [dict(m.named_parameters()) for m in modules]
    return [dict(zip(p, torch.autograd.grad(loss, list(p.values()), retain_graph=True))) for p in named]


def assert_same(found: list[dict[str, Tensor]], true: list[dict[str, Tensor]]) -> None:
    """Parameter by parameter; float64 sums in another order."""
    for n, (a, b) in enumerate(zip(found, true, strict=True), start=1):
        assert set(a) == set(b)
        for name in b:
            torch.testing.assert_close(a[name], b[name], rtol=1e-10, atol=1e-15, msg=f"stage {n}, {name}")


@pytest.mark.parametrize(("K", "M"), SIZES)
def test_1f1b_idles_for_the_way_there_and_back_and_keeps_what_is_on_the_way(bench: Any, K: int, M: int) -> None:
    schedules = bench("schedules")
    circuit = pipelined(stages_of(row(K), torch.zeros(1, 5).double()))
    found = schedules.counted(circuit, lambda o: Exact(mse, observe=o), schedules.fresh_pairs(*clip(M)))
    assert found.num_ticks == M + 2 * (K - 1)
    assert found.idle_shares == pytest.approx([2 * (K - 1) / (M + 2 * (K - 1))] * K)
    assert found.kept == [min(M, 2 * (K - i) + 1) for i in range(1, K + 1)]
    assert [found.ticks_to_gradient(i) for i in range(1, K + 1)] == [2 * K - 1 - i for i in range(1, K + 1)]


@pytest.mark.parametrize(("K", "M"), SIZES)
def test_kept_inputs_are_as_many_when_only_inputs_are_kept(bench: Any, K: int, M: int) -> None:
    schedules = bench("schedules")
    circuit = pipelined(stages_of(row(K), torch.zeros(1, 5).double()))
    found = schedules.counted(circuit, lambda o: Exact(mse, keep="inputs", observe=o), schedules.fresh_pairs(*clip(M)))
    assert found.kept == [min(M, 2 * (K - i) + 1) for i in range(1, K + 1)]


@pytest.mark.parametrize("skips", ["none", "add"])
@pytest.mark.parametrize(("K", "M"), [*SIZES, (4, 40)])
def test_sideways_keeps_one_input_and_idles_only_while_it_fills_and_drains(
    bench: Any, K: int, M: int, skips: str
) -> None:
    schedules = bench("schedules")
    if skips == "add" and K < 3:
        pytest.skip("two stages have no skip")
    stages = stages_of(row(K), torch.zeros(1, 5).double(), skips=skips)
    circuit = parallel(stages) if skips == "add" else pipelined(stages)
    found = schedules.counted(circuit, lambda o: Sideways(mse, observe=o), schedules.fresh_pairs(*clip(M)))
    assert found.kept == [1] * K
    full = range(2 * (K - 1), M)  # while frames come and the pipeline is full, nobody is idle in any tick
    for ticks in (*found.forward_ticks, *found.backward_ticks):
        assert set(full) <= set(ticks)
    if skips == "none":
        used = [M + max(0, M - 2 * (K - i)) for i in range(1, K + 1)]
        assert found.num_ticks == M + K - 1
        assert found.idle_shares == pytest.approx([1 - u / (2 * (M + K - 1)) for u in used])


@pytest.mark.parametrize("num_threads", [1, 2])
@pytest.mark.parametrize("recomputes", [False, True])
@pytest.mark.parametrize(("K", "M"), SIZES)
def test_gpipe_has_its_bubble_keeps_every_input_and_equals_autograd(
    bench: Any, K: int, M: int, recomputes: bool, num_threads: int
) -> None:
    schedules, gpipe = bench("schedules"), bench("gpipe")
    modules = row(K)
    frames, targets = clip(M)
    kept = schedules.KeptInputs(modules)
    pipe = gpipe.GPipe(modules, mse, recomputes=recomputes, num_threads=num_threads)
    done = pipe.step([x.clone() for x in frames.split(1)], targets.split(1))
    pipe.close()
    assert kept.most == [M] * K
    assert done.num_cycles == 2 * (M + K - 1)
    for n in range(K):
        idle = 1 - sum(stage == n for _, stage, _ in done.tasks) / done.num_cycles
        assert idle == pytest.approx((K - 1) / (M + K - 1))
    found = [{name: p.grad for name, p in m.named_parameters()} for m in modules]
    assert_same(found, autograd(modules, frames, targets))
    assert done.loss == pytest.approx(mse(nn.Sequential(*modules)(frames), targets).item(), rel=1e-12)


@pytest.mark.parametrize("fill", ["masked", "zero steps", "published"])
@pytest.mark.parametrize("decays", [False, True])
def test_partimes_tick_with_masks_is_sideways_to_the_bit(bench: Any, fill: str, decays: bool) -> None:
    """And without masks it is not, as soon as a step with a gradient of zero changes something."""
    partime = bench("partime").partime
    K, M = 4, 12
    pairs = list(zip(*(each.split(1) for each in clip(M)), strict=True))

    def adam(parameters: Any) -> torch.optim.Optimizer:
        return torch.optim.AdamW(parameters, lr=1e-2, weight_decay=0.1 if decays else 0.0)

    ours, theirs, start = row(K), row(K), row(K)
    outputs = run(
        pipelined(stages_of(ours, pairs[0][0])), pairs, rule=Sideways(mse, optimizers=adam), executor="inline"
    )
    for _ in range(M - (K - 1)):  # up to the last frame; PARTIME does not drain
        next(outputs)
    partime(theirs, pairs, mse, adam, fill)
    same = [
        torch.equal(a, b)
        for ours_i, theirs_i in zip(ours, theirs, strict=True)
        for a, b in zip(ours_i.parameters(), theirs_i.parameters(), strict=True)
    ]
    assert all(same) if fill == "masked" else not any(same)
    moved = [
        torch.equal(a, b) for m, s in zip(ours, start, strict=True) for a, b in zip(m.parameters(), s.parameters())
    ]
    assert not any(moved)


@pytest.mark.slow
def test_torchs_own_pipelines_and_ours_have_autograds_gradients(bench: Any, tmp_path: Path) -> None:
    """torch.distributed.pipelining, GPipe and 1F1B, two processes over gloo, on VGG-8 in two stages, float64."""
    peers, nets = bench("peers"), bench("nets")
    if (reason := peers.unavailable()) is not None:
        pytest.skip(reason)
    net = {"vgg": "vgg8_quarter", "splits": [3], "dtype": "float64"}
    frames, labels = nets.random_frames(6, 32, "float64")
    modules = nets.make(net)
    loss = F.cross_entropy(nn.Sequential(*modules)(frames), labels)
    named = [dict(m.named_parameters()) for m in modules]
    true = [dict(zip(p, torch.autograd.grad(loss, list(p.values()), retain_graph=True))) for p in named]
    rule = Exact(F.cross_entropy)
    pairs = list(zip(frames.split(1), labels.split(1), strict=True))
    list(run(pipelined(stages_of(modules, frames[:1])), pairs, rule=rule, executor="inline"))
    assert_same([rule.gradients(1), rule.gradients(2)], true)
    with peers.Peers(net) as both:
        for schedule in peers.SCHEDULES:
            both.step(schedule, num_micro=6, num_frames=6, size_px=32, save=str(tmp_path))
            assert_same(peers.gradients_in(tmp_path), true)
