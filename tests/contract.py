"""The true sentences of the design, one checker for each kind of thing. A new member joins by one line in a test."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from functools import cache
from typing import Any

import torch
from torch.utils import _pytree as pytree

from sidestream.circuit.ages import information_latency_ticks, latency_ticks
from sidestream.circuit.stage import Stages
from sidestream.circuit.wire import Circuit
from sidestream.engine.rules.exact import Exact
from sidestream.engine.rules.sideways import Sideways
from sidestream.engine.rules.training import StageGradient
from sidestream.engine.run import run
from sidestream.nn.steppable import Steppable
from sidestream.types import NOTHING, Output


def assert_equal(actual: Any, expected: Any, what: str = "value") -> None:
    """The same structure, and every tensor leaf equal to the bit (NaN equals NaN)."""
    actual_leaves, actual_spec = pytree.tree_flatten(actual)
    expected_leaves, expected_spec = pytree.tree_flatten(expected)
    assert actual_spec == expected_spec, f"{what}: structure {actual_spec} instead of {expected_spec}"
    for n, (a, e) in enumerate(zip(actual_leaves, expected_leaves, strict=True)):
        if isinstance(e, torch.Tensor):
            assert a.shape == e.shape, f"{what}[{n}]: shape {tuple(a.shape)} instead of {tuple(e.shape)}"
            assert a.dtype == e.dtype, f"{what}[{n}]: {a.dtype} instead of {e.dtype}"
            same = torch.equal(torch.nan_to_num(a), torch.nan_to_num(e)) and torch.equal(a.isnan(), e.isnan())
            assert same, f"{what}[{n}]: differs by up to {(a - e).abs().max()}"
        else:
            assert a == e, f"{what}[{n}]: {a!r} instead of {e!r}"


def check_cut(stages: Stages, model: Any, *args: Any, **kwargs: Any) -> None:
    """A cut's sentence: the stages in a row == the model, to the bit; asked twice, since nothing is left behind."""
    with torch.no_grad():
        expected = model(*args, **kwargs)
        for attempt in ("first call", "second call"):
            assert_equal(stages(*args, **kwargs), expected, attempt)


def check_wiring(circuit: Circuit, stages: Stages, frames: Sequence[Any]) -> None:
    """An aligned wiring's sentence: every frame answered once, in order, by the model's own answer, shifted by
    the circuit's latency."""
    state = stages.init_state()
    expected = []
    for frame in frames:
        args = frame if isinstance(frame, tuple) else (frame,)
        with torch.no_grad():
            value, state = stages.step(state, *args)
        expected.append(value)
    outputs = list(run(circuit, frames, executor="inline"))
    assert [o.frame_index for o in outputs] == list(range(len(frames)))
    for output, value in zip(outputs, expected, strict=True):
        assert_equal(output.value, value, f"frame {output.frame_index}")
        assert output.tick == output.frame_index + latency_ticks(circuit)
        assert output.age_ticks == latency_ticks(circuit) == information_latency_ticks(circuit)
        assert output.newest_frame_index == output.oldest_frame_index == output.frame_index


def check_executor(executor: str, circuit: Circuit, frames: Sequence[Any], **options: Any) -> list[Output]:
    """An executor's sentence: equals ``inline``, to the bit, time stamps aside; every frame once, in order."""
    expected = list(run(circuit, frames, executor="inline"))
    actual = list(run(circuit, frames, executor=executor, **options))
    assert [o.frame_index for o in actual] == [o.frame_index for o in expected] == list(range(len(frames)))
    is_shifted = executor in ("sequential", "frame-parallel", "auto")  # these run without the wiring's delays
    for a, e in zip(actual, expected, strict=True):
        assert_equal(a.value, e.value, f"frame {a.frame_index}")
        assert (a.oldest_frame_index, a.newest_frame_index) == (e.oldest_frame_index, e.newest_frame_index)
        assert a.is_warm_up == e.is_warm_up
        assert is_shifted or (a.tick, a.age_ticks) == (e.tick, e.age_ticks)
    return actual


Loss = Callable[[Any, Any], torch.Tensor]


def mean_loss(circuit: Circuit, pairs: Sequence[tuple[Any, Any]], loss: Loss) -> torch.Tensor:
    """The slow twin of a run in training: every tick of every (stateless) stage in one graph, the loss of each answer.

    What stage i writes in tick t is its step on what its wires hold; nothing but that is taken from the engine.
    """
    latency, last = latency_ticks(circuit), len(pairs) - 1

    @cache
    def written(number: int, tick: int) -> tuple[Any, ...]:
        if number == 0:
            given = pairs[min(tick, last)][0]
            return tuple(given) if isinstance(given, tuple) else (given,)
        return circuit.stages[number - 1].step(read(number, tick), None)[0]

    def read(number: int, tick: int) -> tuple[Any, ...]:
        return tuple(written(w.source, tick - w.delay)[w.output] for w in circuit.wires_into(number))

    answers = [pytree.tree_unflatten(read(circuit.sink, t + latency), circuit.out_spec) for t in range(last + 1)]
    return torch.stack([loss(a, target) for a, (_, target) in zip(answers, pairs, strict=True)]).mean()


def check_exact_rule(
    circuit: Circuit, pairs: Sequence[tuple[Any, Any]], loss: Loss, *, executor: str = "inline", **options: Any
) -> None:
    """The exact rule's sentence: equals autograd, parameter by parameter; every frame answered once, with its loss."""
    rule = Exact(loss, **options)
    outputs = list(run(circuit, pairs, rule=rule, executor=executor))
    assert [o.frame_index for o in outputs] == list(range(len(pairs)))
    expected_loss = mean_loss(circuit, pairs, loss)
    torch.testing.assert_close(sum(o.loss for o in outputs) / len(pairs), expected_loss.item(), rtol=1e-12, atol=0)
    for number, stage in enumerate(circuit.stages, start=1):
        found = rule.gradients(number)
        names, parameters = zip(*stage.module.named_parameters(), strict=True)
        true = torch.autograd.grad(expected_loss, parameters, retain_graph=True, allow_unused=True)
        assert set(found) == {name for name, g in zip(names, true, strict=True) if g is not None}
        for name, gradient in zip(names, true, strict=True):
            if gradient is not None:  # float64 sums over ticks in another order
                torch.testing.assert_close(found[name], gradient, rtol=1e-9, atol=1e-13, msg=f"stage {number} {name}")


def check_sideways_rule(
    circuit: Circuit, pair: tuple[Any, Any], loss: Loss, *, executor: str = "inline", loss_delay: int = 0
) -> list[StageGradient]:
    """Sideways' sentence: on a still video, no gradient that is not backprop's, and from tick 2 (K - 1) on one at
    every stage in every tick. (With the loss one tick later, everything is one tick later.)"""
    records: list[StageGradient] = []
    ready_at, num_frames = 2 * (circuit.num_stages - 1) + loss_delay, 2 * circuit.num_stages + 4
    rule = Sideways(loss, loss_delay=loss_delay, observe=records.append)
    outputs = list(run(circuit, [pair] * num_frames, rule=rule, executor=executor))
    assert [o.frame_index for o in outputs] == list(range(num_frames))
    expected_loss = mean_loss(circuit, [pair], loss)
    true = [
        dict(zip(parameters, torch.autograd.grad(expected_loss, list(parameters.values()), retain_graph=True)))
        for parameters in (dict(stage.module.named_parameters()) for stage in circuit.stages)
    ]
    for r in records:
        assert set(r.gradients) == set(true[r.stage - 1])
        for name, gradient in r.gradients.items():  # the same operations; float64 sums of cotangents
            what = f"stage {r.stage}, tick {r.tick}, {name}"
            torch.testing.assert_close(gradient, true[r.stage - 1][name], rtol=1e-11, atol=1e-14, msg=what)
    for number in range(1, circuit.num_stages + 1):
        ticks = sorted(r.tick for r in records if r.stage == number)
        assert ticks == list(range(ticks[0], ticks[-1] + 1)), f"stage {number} has gradients in ticks {ticks}"
        assert ticks[0] <= ready_at < ticks[-1], f"stage {number} has its first gradient in tick {ticks[0]}"
    assert min(r.tick for r in records if r.stage == 1) == ready_at
    return records


def check_streaming_layer(
    layer: Steppable,
    clip_BTCHW: torch.Tensor,
    *,
    is_causal: bool = True,
    receptive_field: float | Collection[int] | None = None,
) -> None:
    """A streaming layer's sentence: clip form == step form, in value and in the gradient of the input and of every
    parameter; causal; receptive field as promised; streams apart; old states valid; stopped and resumed == never.

    ``receptive_field``: frames that an answer sees, back from the newest that it may see: their number (infinity: all
    so far), or their ages where there are gaps. None: not looked at. ``clip_BTCHW``: float64, two streams or more.
    """
    clip_BTCHW = clip_BTCHW.detach()
    assert is_causal == (layer.delay_ticks == 0), f"delay_ticks is {layer.delay_ticks}"
    _check_forms_agree(layer, clip_BTCHW)
    _check_poison(layer, clip_BTCHW, receptive_field)
    _check_streams_apart(layer, clip_BTCHW)
    _check_states(layer, clip_BTCHW)


def _step_all(layer: Steppable, clip_BTCHW: torch.Tensor, state: Any) -> tuple[list[torch.Tensor], list[int], Any]:
    """Answers of the steps, the step of each, the state after the last."""
    answers, ticks = [], []
    for tick, frame_BCHW in enumerate(clip_BTCHW.unbind(1)):
        answer, state = layer.step(frame_BCHW, state)
        if answer is not NOTHING:
            answers.append(answer)
            ticks.append(tick)
    return answers, ticks, state


def _whole_stream(layer: Steppable, clip_BTCHW: torch.Tensor) -> torch.Tensor:
    """The step form from the first frame to the end of the stream, every answer in the tick that was promised."""
    answers, ticks, state = _step_all(layer, clip_BTCHW, layer.init_state(clip_BTCHW[:, 0]))
    num_frames = clip_BTCHW.shape[1]
    assert ticks == list(range(layer.delay_ticks, num_frames, layer.period_ticks))[: len(ticks)], f"answers in {ticks}"
    late = layer.finish(state)
    assert len(ticks) == len(range(layer.delay_ticks, num_frames, layer.period_ticks)), f"answers only in {ticks}"
    return torch.stack([*answers, *late], dim=1)


def _check_forms_agree(layer: Steppable, clip_BTCHW: torch.Tensor) -> None:
    names = ["answers", "clip", *(name for name, _ in layer.named_parameters())]
    results = []
    for form in (layer, lambda c: _whole_stream(layer, c)):
        given = clip_BTCHW.clone().requires_grad_()
        answers = form(given)
        weights = torch.rand(answers.shape, generator=torch.Generator().manual_seed(5), dtype=answers.dtype)
        gradients = torch.autograd.grad((answers * weights).sum(), [given, *layer.parameters()])
        results.append((answers.detach(), *gradients))
    for name, by_clip, by_step in zip(names, *results, strict=True):
        assert by_clip.any(), f"{name}: nothing but zeros, so there is nothing to compare"
        # float64 sums in another order: convolutions over one frame and over many choose their own
        torch.testing.assert_close(by_step, by_clip, rtol=1e-10, atol=1e-12, msg=lambda m, n=name: f"{n}: {m}")
    blank = layer.blank(clip_BTCHW[:, 0])
    assert (blank.shape, blank.dtype) == (results[0][0][:, 0].shape, results[0][0].dtype)


def _check_poison(layer: Steppable, clip_BTCHW: torch.Tensor, field: float | Collection[int] | None) -> None:
    """NaN in one frame reaches exactly the answers that may see it; NaN in all later frames none of the earlier."""
    num_frames, nan = clip_BTCHW.shape[1], float("nan")
    with torch.no_grad():
        sound = layer(clip_BTCHW)
        newest = [n * layer.period_ticks + layer.delay_ticks for n in range(sound.shape[1])]
        for t in range(num_frames):
            poisoned = clip_BTCHW.clone()
            poisoned[:, t:] = nan
            early = [n for n, tick in enumerate(newest) if tick < t]
            assert_equal(layer(poisoned)[:, early], sound[:, early], f"with frames from {t} on poisoned, answers")
        for t in range(num_frames):
            poisoned = clip_BTCHW.clone()
            poisoned[:, t] = nan
            answers = layer(poisoned)
            torch.testing.assert_close(_whole_stream(layer, poisoned), answers, rtol=1e-10, atol=1e-12, equal_nan=True)
            for n, tick in enumerate(newest if field is not None else ()):
                if not _sees(field, tick - t):
                    assert_equal(answers[:, n], sound[:, n], f"with frame {t} poisoned, answer {n}")
                elif tick < num_frames:  # where finish gave the answer, a stride may have cut off the last frames
                    assert answers[:, n].isnan().flatten(1).any(1).all(), f"answer {n} does not feel frame {t}"


def _sees(field: float | Collection[int] | None, age: int) -> bool:
    if isinstance(field, Collection):
        return age in field
    return field is not None and 0 <= age < field


def _check_streams_apart(layer: Steppable, clip_BTCHW: torch.Tensor) -> None:
    """Garbage in the other rows of a batch does not reach a row."""
    with torch.no_grad():
        for form in (layer, lambda c: _whole_stream(layer, c)):
            sound = form(clip_BTCHW)
            for row in range(clip_BTCHW.shape[0]):
                garbage = torch.full_like(clip_BTCHW, float("nan"))
                garbage[row] = clip_BTCHW[row]
                torch.testing.assert_close(form(garbage)[row], sound[row], rtol=1e-10, atol=1e-12)


def _check_states(layer: Steppable, clip_BTCHW: torch.Tensor) -> None:
    """Stopped at any frame and resumed, also from a copy of the state: the same to the bit. States never change."""
    num_frames, start = clip_BTCHW.shape[1], layer.init_state(clip_BTCHW[:, 0])
    with torch.no_grad():
        states, answers = [start], []
        for frame_BCHW in clip_BTCHW.unbind(1):
            answer, state = layer.step(frame_BCHW, states[-1])
            states.append(state)
            answers.append(answer)
        late = layer.finish(states[-1])
        before = [_copied(state) for state in states]
        for t in range(num_frames):
            for state in (states[t], _copied(states[t])):
                again, state = layer.step(clip_BTCHW[:, t], state)
                assert_equal(again, answers[t], f"frame {t}, resumed")
                assert_equal(state, before[t + 1], f"state after frame {t}, resumed")
            _spoil(layer, clip_BTCHW[:, t], states[t], before[t + 1])
        assert_equal(layer.finish(_copied(states[-1])), late, "finish")
        assert_equal(layer.finish(states[-1]), late, "finish, asked again")
        assert_equal(states, before, "old states")


def _spoil(layer: Steppable, frame_BCHW: torch.Tensor, state: Any, expected: Any) -> None:
    """Work in place on a frame after its step, and on its answer: no state feels it."""
    frame_BCHW = frame_BCHW.clone()
    kept = frame_BCHW.clone()
    answer, state = layer.step(frame_BCHW, state)
    assert_equal(frame_BCHW, kept, "the frame after its step")
    frame_BCHW.fill_(7.0)
    if answer is not NOTHING:
        answer.fill_(7.0)
    assert_equal(state, expected, "state after its frame and answer were written over")


def _copied(state: Any) -> Any:
    return pytree.tree_map(lambda x: x.detach().clone() if isinstance(x, torch.Tensor) else x, state)
