"""The picture of benchmarks/results/flux_shape.csv: bars per row, ours and peft's, eager and compiled, as one SVG."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from benchmarks.results import Row

OUT = Path(__file__).parent.parent / "docs" / "flux_shape.svg"
GROUPS = ("mix1_1024", "mix4_1024", "mix8_1024", "mix8_512", "rows8_512", "gate3_1024", "folded")
COLOURS = {"eager": "#7a8fb8", "compiled": "#2f4b8f", "peft_eager": "#d9b48f", "peft_compiled": "#b06a2c"}
WIDTH, HEIGHT, LEFT, BOTTOM = 860, 340, 50, 60


def draw(rows: Sequence[Row], out: Path = OUT) -> Path:
    """Write the picture; bars that were not measured are left out."""
    values = {row.id: row.value for row in rows}
    tops = [value for name, value in values.items() if name.rpartition("_")[2] in ("eager", "compiled")]
    top = max([1.5, *tops]) * 1.05
    step = (WIDTH - LEFT) / len(GROUPS)
    parts = [_axis(top)]
    for n, group in enumerate(GROUPS):
        left = LEFT + n * step
        parts.append(_text(left + step / 2, HEIGHT - BOTTOM + 18, group.replace("_", ", ")))
        bars = _bars(group, values)
        for place, (colour, value) in enumerate(bars):
            parts.append(_bar(left + 10 + place * (step - 20) / 4, (step - 20) / 4 - 3, value, top, colour))
    parts += [_legend(n, name) for n, name in enumerate(COLOURS)]
    card = next((row.where for row in rows if row.id.startswith("mix")), "")
    parts.append(
        _text(WIDTH / 2, 16, f"one denoiser call, as a multiple of the same model without adapters ({card})")
    )
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif" font-size="12">'
    out.write_text("\n".join([head, *parts, "</svg>\n"]), encoding="utf-8")
    return out


def _bars(group: str, values: dict[str, float]) -> list[tuple[str, float]]:
    """(colour, value) of one group, ours beside peft's of the same count and size."""
    names = {mode: f"{group}_{mode}" for mode in ("eager", "compiled")}
    names |= {
        f"peft_{mode}": f"{group.replace('mix', 'peft')}_{mode}" for mode in names if group.startswith("mix")
    }
    return [(COLOURS[key], values[name]) for key, name in names.items() if name in values]


def _bar(x: float, width: float, value: float, top: float, colour: str) -> str:
    tall = (HEIGHT - BOTTOM - 30) * value / top
    y = HEIGHT - BOTTOM - tall
    label = _text(x + width / 2, y - 3, f"{value:.2f}", 9)
    return f'<rect x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{tall:.1f}" fill="{colour}"/>{label}'


def _axis(top: float) -> str:
    y = HEIGHT - BOTTOM - (HEIGHT - BOTTOM - 30) / top
    return f'<line x1="{LEFT}" y1="{y:.1f}" x2="{WIDTH}" y2="{y:.1f}" stroke="#888" stroke-dasharray="4 3"/>'


def _legend(n: int, name: str) -> str:
    x, y = LEFT + n * 170, HEIGHT - 18
    words = name.replace("peft_", "peft, ") if name.startswith("peft") else f"compose, {name}"
    return f'<rect x="{x}" y="{y - 9}" width="10" height="10" fill="{COLOURS[name]}"/>{_text(x + 14, y, words, 11, "start")}'


def _text(x: float, y: float, words: str, size: int = 11, anchor: str = "middle") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" font-size="{size}" text-anchor="{anchor}">{words}</text>'
