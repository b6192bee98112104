"""Pictures as SVG inside the page, so that they take the colours of its theme (docs/style.css), light or dark."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from html import escape

CELL = 34  # of a code
BIT = 22  # of a bit
LEFT = 96  # of the names of rows


@dataclass
class Drawing:
    """Shapes on a plane of `width` x `height` units; `str()` gives the figure, `caption` below it."""

    width: float
    height: float
    label: str
    caption: str = ""
    fits: bool = False  # shrinks with the page; else it scrolls there
    shapes: list[str] = field(default_factory=list)

    def box(self, x: float, y: float, width: float, height: float, kind: str, text: str = "", words: str = "") -> None:
        """A rectangle of class `kind` with `text` in the middle, which is of class `words`."""
        self.shapes.append(
            f'<rect class="{kind}" x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" rx="3"></rect>'
        )
        if text:
            self.text(x + width / 2, y + height / 2, text, words)

    def text(self, x: float, y: float, text: str, kind: str = "", anchor: str = "middle") -> None:
        self.shapes.append(
            f'<text class="{kind}" x="{x:g}" y="{y:g}" text-anchor="{anchor}" dominant-baseline="central">'
            f"{escape(text)}</text>"
        )

    def line(self, *points: tuple[float, float], kind: str = "line") -> None:
        path = " ".join(f"{x:g},{y:g}" for x, y in points)
        self.shapes.append(f'<polyline class="{kind}" points="{path}"></polyline>')

    def arrow(self, x: float, y: float, to_x: float, to_y: float) -> None:
        """A vertical or horizontal arrow."""
        self.line((x, y), (to_x, to_y), kind="line")
        if x == to_x:
            back = -6 if to_y > y else 6
            self.line((to_x - 4, to_y + back), (to_x, to_y), (to_x + 4, to_y + back), kind="line")
        else:
            back = -6 if to_x > x else 6
            self.line((to_x + back, to_y - 4), (to_x, to_y), (to_x + back, to_y + 4), kind="line")

    def byte(self, x: float, y: float, byte: int, owners: Sequence[int] = ()) -> None:
        """The 8 bits of a byte, the highest first, each of the colour of the unit that owns it; the value beneath."""
        for bit in range(8):
            kind = f"unit{owners[bit] % 8}" if owners else "plain"
            self.box(x + (7 - bit) * BIT, y, BIT - 2, BIT + 4, kind, str(byte >> bit & 1), "mono")
        self.text(x + 4 * BIT - 1, y + BIT + 16, f"{byte} = 0x{byte:02x}", "mono faint")

    def __str__(self) -> str:
        body = "".join(self.shapes)
        kind = "drawing fits" if self.fits else "drawing"
        caption = f"<figcaption>{self.caption}</figcaption>" if self.caption else ""
        return (
            f'<figure class="{kind}"><div class="scroll"><svg viewBox="0 0 {self.width:g} {self.height:g}" '
            f'style="width: {self.width:g}px" role="img" aria-label="{escape(self.label)}">{body}</svg>'
            f"</div>{caption}</figure>"
        )


def bars(label: str, caption: str, rows: Sequence[tuple[str, float, str, str]]) -> Drawing:
    """Horizontal bars, a row each: name, value, the value in words, class of the bar."""
    left, room, step = 180, 320, 34
    largest = max(value for _, value, _, _ in rows)
    drawing = Drawing(left + room + 70, step * len(rows) + 8, label, caption, fits=True)
    for index, (name, value, words, kind) in enumerate(rows):
        y, width = 4 + index * step, room * value / largest
        drawing.text(left - 12, y + 12, name, anchor="end")
        drawing.box(left, y, width, 24, kind)
        drawing.text(left + width + 8, y + 12, words, "mono", anchor="start")
    return drawing


def code_class(code: int) -> str:
    return {-1: "minus", 0: "zero", 1: "plus"}[code]


def code_text(code: int) -> str:
    return f"{code:+d}" if code else "0"
