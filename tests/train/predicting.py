"""A tiny par-DenseNet, and slow twins of circuits in training: every tick of every stage, wire by wire."""

from __future__ import annotations

from collections import defaultdict

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sidestream.circuit.ages import lags_of, latency_ticks
from sidestream.circuit.wire import Circuit
from sidestream.models.parallel_densenet import ParDenseNet

NUM_CLASSES = 4


def densenet(seed: int = 0, *, points: int = 0) -> ParDenseNet:
    """Batch norms in eval mode, and every frame well told apart."""
    torch.manual_seed(seed)
    net = ParDenseNet(NUM_CLASSES, stages=(3, 1), growth=2, stem=4, bottleneck=2, num_layers=1)
    net.num_inner = 4
    if points:
        net.with_dense_head(points)
        for p in net.head.parameters():
            if p.ndim > 1:
                nn.init.normal_(p, std=0.2)
    return net.double().eval()  # type: ignore[return-value]


def slow_values(circuit: Circuit, clip: Tensor, num_ticks: int) -> list[dict[int, Tensor]]:
    """Per stage (0: the frames), tick -> what its module makes of what its wires hold. No feedback, one output each."""
    made: list[dict[int, Tensor]] = [{t: clip[:, min(t, clip.shape[1] - 1)] for t in range(num_ticks)}]
    for number in range(1, circuit.num_stages + 1):
        wires, own = circuit.wires_into(number), {}
        for t in range(num_ticks):
            if all(t - w.delay in made[w.source] for w in wires):
                own[t] = circuit.stages[number - 1].module(*(made[w.source][t - w.delay] for w in wires))
        made.append(own)
    return made


def slow_loss(
    circuit: Circuit, clip: Tensor, labels: Tensor, *, teacher: Circuit | None = None, weight: float = 0.0, newest: bool
) -> Tensor:
    """Cross entropy of every answer, and the distance to the teacher's activations, term by term."""
    num_frames, latency = clip.shape[1], latency_ticks(circuit)
    made = slow_values(circuit, clip, num_frames if newest else num_frames + latency)
    answers = [value for t, value in made[-1].items() if t >= latency]
    loss = torch.stack([F.cross_entropy(a, labels) for a in answers]).mean()
    if teacher is not None:
        truth = slow_values(teacher, clip, num_frames)
        for number in range(1, circuit.num_stages):
            lag = lags_of(circuit)[number]
            pairs = [(v, truth[number][t - lag]) for t, v in made[number].items() if t - lag < num_frames]
            loss = loss + weight * torch.stack([(a - b).square().mean() for a, b in pairs]).mean()
    return loss


def slow_sideways(circuit: Circuit, clip: Tensor, labels: Tensor, *, newest: bool) -> dict[str, Tensor]:
    """Sideways on frozen weights: per parameter (of which stage, and name) the mean of its gradients over the ticks.

    What a stage holds in a tick is given; its cotangents are those that its readers sent in the tick before, summed,
    and it goes back when all of them have sent since it went back last. The last stage has the loss instead. Where
    frames of several ages are mixed, the last one is repeated until all are answered; then each stage goes on with
    what is under way.
    """
    num_frames, latency, last = clip.shape[1], latency_ticks(circuit), circuit.num_stages
    is_mixed = any(len(set(_paths(circuit, number))) > 1 for number in range(1, last + 1))
    counts = [num_frames + latency * is_mixed]  # ticks of the source and of each stage
    for number in range(1, last + 1):
        counts.append(min(counts[w.source] + w.delay for w in circuit.wires_into(number)))
    with torch.no_grad():
        made = slow_values(circuit, clip, max(counts))
    found: dict[str, list[Tensor]] = defaultdict(list)
    waiting: dict[tuple[int, int], Tensor] = {}  # (reader, its input) -> what it has sent
    for tick in range(max(counts)):
        sent = {}
        for number in range(1, last + 1):
            if tick not in made[number] or tick >= counts[number]:
                continue
            wires, module = circuit.wires_into(number), circuit.stages[number - 1].module
            given = [made[w.source][tick - w.delay].detach().clone().requires_grad_() for w in wires]
            out = module(*given)
            if number == last:
                frame = tick if newest else tick - latency
                if frame >= num_frames:
                    continue
                cotangent = torch.autograd.grad(F.cross_entropy(out, labels), out, retain_graph=True)[0]
            else:
                readers = [(w.target, w.input) for w in circuit.wires_from(number)]
                if any(reader not in waiting for reader in readers):
                    continue
                cotangent = torch.stack([waiting.pop(reader) for reader in readers]).sum(0)
            names, parameters = zip(*module.named_parameters(), strict=True)
            gradients = torch.autograd.grad(out, [*given, *parameters], cotangent)
            sent |= {(number, w.input): g for w, g in zip(wires, gradients, strict=False) if w.source}
            for name, gradient in zip(names, gradients[len(given) :], strict=True):
                found[f"{number}.{name}"].append(gradient)
        waiting |= sent
    return {name: torch.stack(gradients).mean(0) for name, gradients in found.items()}


def _paths(circuit: Circuit, number: int) -> list[int]:
    """Ages of the frames behind a stage: one for every way there from the source."""
    if number == 0:
        return [0]
    return [age + w.delay for w in circuit.wires_into(number) for age in _paths(circuit, w.source)]
