"""The schedule of a circuit before it runs: which stage works on which frame in which tick, as text and as a picture.

tick      0    1    2    3    4
stage 1   0    1    2    3    4
stage 2   .    0    1    2    3
stage 3   .    .    0    1    2
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from sidestream.circuit.wire import Circuit
from sidestream.errors import MissingExtraError, WriteError
from sidestream.report.record import write_beside

Frames = frozenset[int]


def schedule(circuit: Circuit, num_ticks: int, *, num_frames: int | None = None) -> list[list[Frames]]:
    """``table[t][j]``: the frames in what node j (source, stages 1..K, sink) holds after tick t; empty: nothing yet.

    The source falls silent after ``num_frames``. Feedback wires are left out, as in ``ages``.
    """
    table: list[list[Frames]] = []
    for tick in range(num_ticks):
        is_over = num_frames is not None and tick >= num_frames
        table.append([frozenset() if is_over else frozenset({tick})])
        for number in range(1, circuit.num_stages + 2):
            table[tick].append(_held(circuit, table, tick, number))
    return table


def _held(circuit: Circuit, table: list[list[Frames]], tick: int, number: int) -> Frames:
    if number <= circuit.num_stages and tick % circuit.periods[number - 1] != circuit.phases[number - 1]:
        return table[tick - 1][number] if tick else frozenset()
    wires = [w for w in circuit.wires_into(number) if not w.is_feedback and not _is_constant(circuit, w.source)]
    read = [table[tick - w.delay][w.source] if tick >= w.delay else frozenset() for w in wires]
    return frozenset().union(*read) if read and all(read) else frozenset()


def _is_constant(circuit: Circuit, number: int) -> bool:
    """A stage that reads no frame, directly or through others."""
    return number > 0 and all(_is_constant(circuit, w.source) for w in circuit.wires_into(number) if not w.is_feedback)


def chart(circuit: Circuit, *, num_ticks: int = 10, num_frames: int | None = None) -> str:
    """The schedule as text: a row per stage, a column per tick; ``(3)`` is held from an earlier tick."""
    rows = [["tick", *map(str, range(num_ticks))]]
    table = schedule(circuit, num_ticks, num_frames=num_frames)
    for number, stage in enumerate(circuit.stages, start=1):
        cells = (_cell(circuit, number, tick, table[tick][number]) for tick in range(num_ticks))
        rows.append([f"{number} {stage.name}", *cells])
    rows.append(["answer", *(_frames(table[tick][-1]) for tick in range(num_ticks))])
    width = max(len(cell) for row in rows for cell in row[1:]) + 2
    label = max(len(row[0]) for row in rows)
    return "\n".join(row[0].ljust(label) + "".join(c.rjust(width) for c in row[1:]) for row in rows)


def _cell(circuit: Circuit, number: int, tick: int, frames: Frames) -> str:
    text = _frames(frames)
    is_idle = tick % circuit.periods[number - 1] != circuit.phases[number - 1]
    return f"({text})" if is_idle and frames else text


def _frames(frames: Frames) -> str:
    if not frames:
        return "."
    low, high = min(frames), max(frames)
    return str(low) if low == high else f"{low}-{high}"


def chart_png(circuit: Circuit, path: str | Path, *, num_ticks: int = 12, num_frames: int | None = None) -> Path:
    """The schedule as a picture: one colour per frame. Needs the extra ``plot``."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingExtraError("matplotlib", "plot", "drawing a chart") from error
    table = schedule(circuit, num_ticks, num_frames=num_frames)
    names = [f"{n}  {_short(s.name)}" for n, s in enumerate(circuit.stages, start=1)] + ["answer"]
    figure = Figure(figsize=(2.6 + 0.55 * num_ticks, 1.2 + 0.42 * len(names)), dpi=120)
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for row in range(len(names)):
        for tick in range(num_ticks):
            _draw_cell(axes, circuit, row, tick, table[tick][row + 1])
    axes.set(xlim=(-0.5, num_ticks - 0.5), ylim=(len(names) - 0.5, -0.5), xlabel="tick")
    axes.set_xticks(range(num_ticks))
    axes.set_yticks(range(len(names)), names, fontsize=8)
    axes.set_title(f"{circuit.name}, {circuit.wiring}: the frame that each stage works on", fontsize=10)
    axes.tick_params(length=0)
    axes.set_frame_on(False)
    figure.tight_layout()
    return _save(figure, Path(path))


def _draw_cell(axes: object, circuit: Circuit, row: int, tick: int, frames: Frames) -> None:
    from matplotlib import colormaps
    from matplotlib.patches import Rectangle

    palette: Sequence[tuple[float, float, float]] = colormaps["tab20"].colors  # type: ignore[attr-defined]
    is_idle = row < circuit.num_stages and tick % circuit.periods[row] != circuit.phases[row]
    ordered = sorted(frames)
    for part, frame in enumerate(ordered):  # one strip per frame where ages mix
        left, width = tick - 0.47 + 0.94 * part / len(ordered), 0.94 / len(ordered)
        colour = palette[(2 * frame) % 20 if frame % 20 < 10 else (2 * frame + 1) % 20]
        axes.add_patch(  # type: ignore[attr-defined]
            Rectangle((left, row - 0.44), width, 0.88, facecolor=colour, alpha=0.3 if is_idle else 0.95, linewidth=0)
        )
    if not frames:
        axes.add_patch(  # type: ignore[attr-defined]
            Rectangle((tick - 0.47, row - 0.44), 0.94, 0.88, facecolor="#eeeeee", linewidth=0)
        )
    elif len(ordered) <= 3:
        axes.text(tick, row, _frames(frames), ha="center", va="center", fontsize=8)  # type: ignore[attr-defined]


def _short(name: str, limit: int = 34) -> str:
    return name if len(name) <= limit else name[: limit // 2 - 1] + "…" + name[-limit // 2 :]


def _save(figure: object, path: Path) -> Path:
    """Write beside, then rename: never half a picture."""
    try:
        with write_beside(path) as part:
            figure.savefig(part, format="png")  # type: ignore[attr-defined]
    except OSError as error:
        raise WriteError(f"cannot write {path}: {error.strerror}; give a file in a folder that exists") from error
    return path
