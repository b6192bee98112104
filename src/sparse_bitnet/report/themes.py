"""The colours of the page, light and dark, and of the pictures; what tells runs apart without colour too."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields


@dataclass(frozen=True)
class Theme:
    """`runs`: colours of Okabe and Ito, which colour-blind readers tell apart, darkened or lightened for contrast."""

    page: str
    card: str
    ink: str
    muted: str
    line: str
    runs: tuple[str, ...]

    def variables(self) -> str:
        """As CSS custom properties: `--ink: ...; --run-0: ...;`."""
        named = {name: value for name, value in asdict(self).items() if name != "runs"}
        named |= {f"run-{index}": colour for index, colour in enumerate(self.runs)}
        return " ".join(f"--{name}: {value};" for name, value in named.items())


LIGHT = Theme(
    page="#f6f7f9",
    card="#ffffff",
    ink="#1b2027",
    muted="#5b6673",
    line="#dfe3e8",
    runs=("#0066a8", "#c44e00", "#007d5b", "#a8478a", "#8a6200", "#4a5560"),
)
DARK = Theme(
    page="#0f1216",
    card="#171b21",
    ink="#e6e9ed",
    muted="#9aa5b1",
    line="#2b323b",
    runs=("#5db5f0", "#ff9455", "#3fcf9f", "#e39ac8", "#e5b93c", "#b4bec9"),
)
# Stands in for either while an SVG is drawn: matplotlib knows no CSS variables, so each has a colour of its own.
VARIABLE = Theme(
    page="#fe0001",
    card="#fe0002",
    ink="#fe0003",
    muted="#fe0004",
    line="#fe0005",
    runs=tuple(f"#fe01{index:02x}" for index in range(len(LIGHT.runs))),
)
DASHES = (
    (),
    (6, 2),
    (2, 1.5),
    (7, 2, 1.5, 2),
)  # in line widths; another for each run


def run_colour(theme: Theme, index: int) -> str:
    return theme.runs[index % len(theme.runs)]


def run_dashes(index: int) -> tuple[float, ...]:
    return DASHES[(index + index // len(LIGHT.runs)) % len(DASHES)]


def with_variables(svg: str) -> str:
    """`svg`, drawn with VARIABLE, with CSS variables for its colours."""
    for field in fields(Theme):
        colours = getattr(VARIABLE, field.name)
        if field.name == "runs":
            for index, colour in enumerate(colours):
                svg = svg.replace(colour, f"var(--run-{index})")
        else:
            svg = svg.replace(colours, f"var(--{field.name})")
    return svg
