"""Draw the figures of docs/recurrent.md from the shipped network's sizes (`make docs`).

With ``--check`` nothing is written; the exit status is 1 if a drawing is not current. A drawing is
an SVG whose colours follow the reader's scheme, light or dark. Panel and text change together, so
it can be read in a page of either.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape
from itertools import pairwise
from pathlib import Path

from safetensors import safe_open

from model.checkpoint import Checkpoint
from model.forecast.inputs import DAY_INPUTS, STEADY_BOOKKEEPING
from model.forecast.shape import DAYS_MAX, LEVELS
from model.generator.profiles import PROFILE
from model.training.account_head import COMPROMISED_DAYS
from pipeline.files.generated_stream import SHIPPED_GENERATOR
from pipeline.settings import SHIPPED_CHECKPOINT
from pipeline.storage.account_state import StateCodec

FOLDER = Path(__file__).parent / "drawings"
WIDTH = 840
GATES = 3
"""Gates of a GRU, which nn.GRU stacks in one tensor."""

GENERATOR_TENSOR = "network.gru.weight_ih_l0"

_LIGHT = {
    "panel": "#ffffff #d0d7de", "input": "#ddf4ff #0969da", "state": "#dafbe1 #1a7f37",
    "output": "#fff1e5 #bc4c00", "head": "#fbefff #8250df", "plain": "#f6f8fa #818b98",
}  # fmt: skip
_DARK = {
    "panel": "#0d1117 #3d444d", "input": "#0c2d4d #4493f8", "state": "#0f2f1a #3fb950",
    "output": "#3d2410 #db6d28", "head": "#2b1a44 #ab7df8", "plain": "#161b22 #656c76",
}  # fmt: skip
"""Fill and stroke of each kind of box."""

Point = tuple[float, float]


@dataclass(frozen=True)
class Sizes:
    """Sizes of the shipped network and its training.

    Attributes:
        inputs, input_size, hidden_size, head_size, rising_size: see
            :class:`model.architecture.Architecture`.
        state_bytes: bytes of an account's state in Redis.
        chunk_steps: transactions between two cuts of the gradient.
        context_size, decoder_size: units of the forecast head's context and of its decoder.
        generator_inputs, generator_size: inputs and units of the shipped generator's GRU.
    """

    inputs: int
    input_size: int
    hidden_size: int
    head_size: int
    rising_size: int
    state_bytes: int
    chunk_steps: int
    context_size: int
    decoder_size: int
    generator_inputs: int
    generator_size: int

    @classmethod
    def shipped(cls) -> Sizes:
        """Read the sizes from the shipped checkpoint."""
        checkpoint = Checkpoint.load(SHIPPED_CHECKPOINT)
        a, head = checkpoint.header.architecture, checkpoint.header.forecast
        assert head is not None, "the shipped checkpoint has no forecast head"
        with safe_open(SHIPPED_GENERATOR, "np") as generator:
            gates, generator_inputs = generator.get_slice(GENERATOR_TENSOR).get_shape()
        return cls(
            inputs=a.inputs,
            input_size=a.input_size,
            hidden_size=a.hidden_size,
            head_size=a.head_size,
            rising_size=a.rising_size,
            state_bytes=StateCodec.of(checkpoint).size_bytes,
            chunk_steps=int(checkpoint.header.training["chunk_steps"]),
            context_size=head.context_size,
            decoder_size=head.hidden_size,
            generator_inputs=generator_inputs,
            generator_size=gates // GATES,
        )

    @property
    def hidden_bytes(self) -> int:
        """Return the size of one layer's hidden state in float16, bytes."""
        return 2 * self.hidden_size


class Drawing:
    """An SVG of boxes, arrows and texts on a panel.

    ``h_{t}`` in a text becomes an italic h with a subscript.
    """

    def __init__(self, height: int, title: str, meaning: str) -> None:
        self._height, self._title, self._meaning = height, title, meaning
        self._parts: list[str] = []

    def box(
        self, x: float, y: float, kind: str, *lines: str, width: float = 96, height: float = 46
    ) -> None:
        """Draw a box around its centre; the first line is larger than the others."""
        self._parts.append(
            f'<rect class="{kind}" x="{x - width / 2:g}" y="{y - height / 2:g}"'
            f' width="{width:g}" height="{height:g}" rx="7"/>'
        )
        first = y + 5 - 8 * (len(lines) - 1)
        for number, line in enumerate(lines):
            self.text(x, first + 17 * number, line, small=number > 0)

    def text(self, x: float, y: float, text: str, *, small: bool = True, at: str = "") -> None:
        """Write a line around x, or from x on if ``at`` is ``start``."""
        place = f' class="{"small" if small else "large"} {at}"'.replace(' "', '"')
        self._parts.append(f'<text{place} x="{x:g}" y="{y:g}">{_markup(text)}</text>')

    def arrow(self, *points: Point, kind: str = "line", head: bool = True) -> None:
        """Draw a line through points, with an arrowhead at its end."""
        path = " ".join(f"{x:g},{y:g}" for x, y in points)
        end = f' marker-end="url(#{kind})"' if head else ""
        self._parts.append(f'<polyline class="{kind}" points="{path}"{end}/>')

    def frame(self, x: float, y: float, width: float, height: float) -> None:
        """Draw a dashed frame from its upper left corner."""
        self._parts.append(
            f'<rect class="frame" x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}"'
            ' rx="10"/>'
        )

    def __str__(self) -> str:
        heads = "".join(
            f'<marker id="{kind}" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="8"'
            f' markerHeight="8" markerUnits="userSpaceOnUse" orient="auto">'
            f'<path class="{kind}-head" d="M0,0 L8,4 L0,8 z"/></marker>\n'
            for kind in ("line", "gradient")
        )
        return (
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {self._height}"'
            f' width="{WIDTH}" height="{self._height}" role="img"'
            ' aria-labelledby="title meaning">\n'
            f'<title id="title">{escape(self._title)}</title>\n'
            f'<desc id="meaning">{escape(self._meaning)}</desc>\n'
            f"<style>\n{_style()}</style>\n<defs>\n{heads}</defs>\n"
            f'<rect class="panel" x="0.5" y="0.5" width="{WIDTH - 1}"'
            f' height="{self._height - 1}" rx="10"/>\n' + "\n".join(self._parts) + "\n</svg>\n"
        )


def _style() -> str:
    """Return the style sheet: light colours, and dark ones where the reader prefers them."""
    fixed = [
        'text { font-family: system-ui, "Segoe UI", "DejaVu Sans", sans-serif;'
        " text-anchor: middle; }",
        ".large { font-size: 15px; }",
        ".small { font-size: 12px; }",
        ".start { text-anchor: start; }",
        ".i { font-style: italic; }",
        ".sub { font-size: 75%; }",
        "polyline, .frame { fill: none; stroke-width: 1.5; }",
        ".frame, .gradient { stroke-dasharray: 5 4; }",
        "rect { stroke-width: 1.5; }",
    ]
    dark = _colours(_DARK, "#f0f6fc", "#9198a1", "#f85149")
    return "\n".join(
        [
            *fixed,
            *_colours(_LIGHT, "#1f2328", "#59636e", "#cf222e"),
            "@media (prefers-color-scheme: dark) {",
            *dark,
            "}\n",
        ]
    )


def _colours(boxes: dict[str, str], ink: str, line: str, gradient: str) -> list[str]:
    rules = [
        f".{kind} {{ fill: {fill}; stroke: {stroke}; }}"
        for kind, (fill, stroke) in ((kind, pair.split()) for kind, pair in boxes.items())
    ]
    return [
        *rules,
        f"text {{ fill: {ink}; }}",
        f".line, .frame {{ stroke: {line}; }}",
        f".line-head {{ fill: {line}; }}",
        f".gradient {{ stroke: {gradient}; }}",
        f".gradient-head {{ fill: {gradient}; }}",
    ]


def _markup(text: str) -> str:
    """Return SVG of a text, with subscripts."""
    parts = re.split(r"(\w)_\{([^}]*)\}", text)
    found = [escape(parts[0])]
    for letter, below, rest in zip(parts[1::3], parts[2::3], parts[3::3], strict=True):
        found.append(
            f'<tspan class="i">{letter}</tspan><tspan class="sub" dy="4">{escape(below)}</tspan>'
        )
        if rest:  # back up to the line
            found.append(f'<tspan dy="-4">{escape(rest)}</tspan>')
    return "".join(found)


def step(sizes: Sizes) -> Drawing:
    """Draw what happens within one step."""
    drawing = Drawing(
        400,
        "One step of the recurrence",
        "The hidden state before and the payment's inputs give the score, through the head, and the"
        " hidden state after, through an input layer and the GRU. It is rounded to float16.",
    )
    h, x, head, gru = (110, 200), (400, 155), (400, 60), (400, 330)
    drawing.arrow((110, 172), (110, 60), (303, 60))
    drawing.arrow((110, 228), (110, 330), (303, 330))
    drawing.arrow((400, 127), (400, 90))
    drawing.arrow((400, 183), (400, 219))
    drawing.arrow((400, 267), (400, 300))
    drawing.arrow((495, 60), (668, 60))
    drawing.arrow((495, 330), (543, 330))
    drawing.arrow((637, 330), (668, 330))
    drawing.box(
        *h, "state", "h_{t–1}", f"{sizes.hidden_size} numbers", "from Redis", width=150, height=66
    )
    drawing.box(*x, "input", "x_{t}", f"{sizes.inputs} inputs of the payment", width=190, height=54)
    units = f"{sizes.head_size} + 2 × {sizes.rising_size} units"
    drawing.box(*head, "head", "head", units, width=190, height=54)
    drawing.box(400, 243, "plain", "input layer", f"{sizes.input_size} units", width=150)
    drawing.box(*gru, "state", "GRU", f"{sizes.hidden_size} units", width=190, height=54)
    drawing.box(590, 330, "plain", "round to", "float16", width=92)
    drawing.box(740, 60, "output", "score", "0 to 1", width=140, height=54)
    drawing.box(
        740, 330, "state", "h_{t}", f"{sizes.hidden_bytes} of the state's",
        f"{sizes.state_bytes} bytes in Redis", width=140, height=66,
    )  # fmt: skip
    drawing.text(582, 50, "sees h_{t–1}, not h_{t}")
    return drawing


STEPS = (230.0, 410.0, 590.0)
"""Places of the steps of an unfolded network."""


def _history(
    drawing: Drawing, sizes: Sizes, y: float, *, last: str = "h_{T}", names: Sequence[str] = ()
) -> None:
    """Draw an unfolded account: its states from left to right, and its payments below."""
    drawing.box(70, y, "state", "h_{0}", "zeros", width=80)
    drawing.arrow((110, y), (STEPS[0] - 50, y))
    for x, name in zip(STEPS, names or ("1", "2", "3"), strict=True):
        drawing.box(x, y, "state", "step", f"GRU {sizes.hidden_size}")
        drawing.arrow((x, y + 68), (x, y + 25))
        drawing.box(x, y + 92, "input", f"x_{{{name}}}", f"{sizes.inputs} inputs")
    for left, right in pairwise(STEPS):
        drawing.arrow((left + 48, y), (right - 50, y))
    drawing.text(683, y + 5, "· · ·", small=False)
    drawing.arrow((638, y), (664, y), head=False)
    drawing.arrow((702, y), (728, y))
    drawing.box(770, y, "state", last, f"{sizes.hidden_bytes} bytes", width=80)


def unfolded(sizes: Sizes) -> Drawing:
    """Draw the recurrence over the payments of an account."""
    drawing = Drawing(
        250,
        "The recurrence unfolded over an account's history",
        "The same step, with the same weights, is applied to each payment. Between two steps the"
        " hidden state is rounded to float16.",
    )
    _history(drawing, sizes, 90)
    for left, right in pairwise(STEPS):
        drawing.text((left + right) / 2, 80, "float16")
        drawing.text((left + right) / 2, 112, "in Redis")
    drawing.text(410, 36, "one step for each payment, always the same weights")
    drawing.text(410, 232, "the account's payments in order of time")
    return drawing


def truncated(sizes: Sizes) -> Drawing:
    """Draw training in chunks: the state goes on, the gradient does not."""
    drawing = Drawing(
        290,
        "Truncated back-propagation through time",
        f"A history is cut into chunks of {sizes.chunk_steps} payments. The hidden state passes"
        " from chunk to chunk. The gradient of a chunk's loss ends at the chunk's first payment.",
    )
    n = sizes.chunk_steps
    for number in range(3):
        left = 64 + 250 * number
        drawing.frame(left, 62, 212, 164)
        drawing.text(left + 106, 48, f"payments {n * number + 1} to {n * (number + 1)}")
        for place in (44, 168):
            drawing.box(left + place, 144, "state", "step", width=64, height=40)
            drawing.arrow((left + place, 196), (left + place, 166))
            drawing.arrow((left + place, 122), (left + place, 104))
        drawing.text(left + 106, 149, "· · ·", small=False)
        drawing.arrow((left + 76, 138), (left + 92, 138), head=False)
        drawing.arrow((left + 120, 138), (left + 134, 138))
        drawing.arrow((left + 134, 153), (left + 120, 153), kind="gradient", head=False)
        drawing.arrow((left + 92, 153), (left + 78, 153), kind="gradient")
        drawing.box(left + 106, 90, "output", "loss", width=188, height=26)
        drawing.text(left + 106, 214, "inputs")
        drawing.arrow((left + 200, 138), (left + 260, 138), head=number < 2)
        drawing.arrow((left + 12, 153), (left, 153), kind="gradient")
    drawing.arrow((26, 138), (74, 138))
    drawing.text(26, 128, "h_{0}", small=False)
    drawing.text(812, 128, "h_{T}", small=False)
    drawing.arrow((200, 258), (250, 258))
    drawing.text(258, 262, "hidden state: goes on", at="start")
    drawing.arrow((500, 258), (450, 258), kind="gradient")
    drawing.text(508, 262, "gradient: ends at the chunk's first payment", at="start")
    return drawing


def one_to_one(sizes: Sizes) -> Drawing:
    """Draw the feed-forward comparison."""
    drawing = Drawing(
        264,
        "One to one: a feed-forward network",
        "Each payment gives one score through a layer and the head. Nothing connects the payments.",
    )
    for x, name in zip((170.0, 420.0, 670.0), "123", strict=True):
        drawing.box(x, 224, "input", f"x_{{{name}}}", f"{sizes.inputs} inputs", width=140)
        drawing.arrow((x, 201), (x, 182))
        drawing.box(
            x,
            158,
            "plain",
            "first layers",
            f"{sizes.input_size} + 2 × {sizes.rising_size}",
            width=140,
        )
        drawing.arrow((x, 135), (x, 116))
        drawing.box(
            x, 92, "head", "head", f"{sizes.head_size} + 2 × {sizes.rising_size}", width=140
        )
        drawing.arrow((x, 69), (x, 54))
        drawing.box(x, 36, "output", f"score s_{{{name}}}", width=140, height=36)
    return drawing


def many_to_one(sizes: Sizes) -> Drawing:
    """Draw the account's standing."""
    drawing = Drawing(
        280,
        "Many to one: the account's standing",
        "A whole history of payments gives one number: the probability that the account is"
        " compromised now, from its last hidden state.",
    )
    _history(drawing, sizes, 150)
    drawing.arrow((770, 126), (770, 107))
    drawing.box(740, 83, "head", "account head", f"{sizes.hidden_size} → 1", width=150)
    drawing.arrow((665, 83), (600, 83))
    drawing.box(
        505, 83, "output", "compromised now?", f"a fraud within {COMPROMISED_DAYS} days", width=186
    )
    drawing.text(230, 60, "one answer for the whole history,")
    drawing.text(230, 78, "asked when somebody looks at the account")
    return drawing


def many_to_many(sizes: Sizes) -> Drawing:
    """Draw a score for each transaction."""
    drawing = Drawing(
        280,
        "Many to many, in step: a score for each payment",
        "Each payment gives a score at its own step, from the hidden state before it and from its"
        " inputs.",
    )
    _history(drawing, sizes, 140)
    for x, name in zip(STEPS, "123", strict=True):
        drawing.arrow((x, 116), (x, 74))
        drawing.box(
            x,
            50,
            "output",
            f"score s_{{{name}}}",
            f"h_{{{int(name) - 1}}} and x_{{{name}}}",
            width=112,
        )
    return drawing


def stack(sizes: Sizes) -> Drawing:
    """Draw a network of two recurrent layers."""
    drawing = Drawing(
        390,
        "A stack of two layers",
        "The hidden states of the lower layer are the inputs of the upper one, at the same payment."
        " Both layers have states that go from payment to payment. A score comes from the upper"
        " layer's state before the payment, and from the payment's inputs.",
    )
    for x, name in zip((250.0, 430.0, 610.0), "123", strict=True):
        drawing.box(x, 346, "input", f"x_{{{name}}}", f"{sizes.inputs} inputs", width=112)
        drawing.arrow((x, 323), (x, 302))
        drawing.box(x, 284, "plain", f"input layer {sizes.input_size}", width=126, height=34)
        drawing.arrow((x, 267), (x, 241))
        drawing.arrow((x, 191), (x, 161))
        drawing.arrow((x - 78, 136), (x - 78, 52), (x - 58, 52))
        drawing.box(x, 52, "output", f"score s_{{{name}}}", f"with x_{{{name}}}", width=112)
    for y, layer in ((216.0, "1"), (136.0, "2")):
        drawing.box(80, y, "state", "zeros", f"layer {layer}", width=100)
        for x in (250.0, 430.0, 610.0):
            drawing.box(
                x, y, "state", f"GRU {sizes.hidden_size}", f"layer {layer}", width=112, height=48
            )
        drawing.arrow((130, y), (192, y))
        for x in (250.0, 430.0):
            drawing.arrow((x + 56, y), (x + 122, y))
        drawing.arrow((666, y), (706, y))
        drawing.box(764, y, "state", f"{sizes.hidden_bytes} bytes", f"layer {layer}", width=112)
    return drawing


def one_to_many(sizes: Sizes) -> Drawing:
    """Draw the generator."""
    drawing = Drawing(
        330,
        "One to many: a generated history",
        "A profile gives a whole history. Each step draws a payment from distributions, and the"
        " payment is an input of the next step.",
    )
    drawing.box(70, 200, "state", "h_{0}", "zeros", width=80)
    drawing.arrow((110, 200), (STEPS[0] - 50, 200))
    drawing.box(90, 286, "input", "profile", f"{len(PROFILE)} numbers", width=120)
    drawing.arrow((150, 286), (STEPS[-1], 286), head=False)
    for number, x in enumerate(STEPS, 1):
        drawing.box(x, 200, "state", "step", f"GRU {sizes.generator_size}")
        drawing.arrow((x, 286), (x, 225))
        drawing.arrow((x, 176), (x, 88))
        drawing.box(
            x, 56, "output", f"payment {number}", "time, merchant,", "amount, label", width=116,
            height=62,
        )  # fmt: skip
        end = (x + 148, 176) if number < len(STEPS) else (x + 148, 138)
        drawing.arrow((x + 58, 56), (x + 92, 56), (x + 92, 138), (x + 148, 138), end,
                      head=number < len(STEPS))  # fmt: skip
    for left, right in pairwise(STEPS):
        drawing.arrow((left + 48, 200), (right - 50, 200))
    drawing.arrow((638, 200), (700, 200))
    drawing.text(726, 205, "· · ·", small=False)
    drawing.text(758, 142, "· · ·", small=False)
    drawing.text(350, 310, f"{sizes.generator_inputs} inputs: the profile and the payment before")
    drawing.text(640, 290, "until the period ends", at="start")
    return drawing


def forecast(sizes: Sizes) -> Drawing:
    """Draw the forecast: a decoder of another length than the history."""
    drawing = Drawing(
        350,
        "Many to many, unsynchronised: a forecast",
        "The state after a history of payments starts a decoder, which makes one step for each day"
        " to come. Both lengths are independent of each other.",
    )
    y = 186.0
    drawing.frame(20, 58, 336, 242)
    drawing.text(188, 44, "encoder: the GRU that scores")
    drawing.text(188, 324, "T_{x} payments; the state is in Redis already")
    drawing.frame(502, 58, 318, 242)
    drawing.text(661, 44, "decoder: a GRU of its own")
    drawing.text(661, 324, f"T_{{y}} days, 1 to {DAYS_MAX}: as many as you ask for")
    for x, name in ((72.0, "1"), (204.0, "T")):
        drawing.box(x, y, "state", "step", f"GRU {sizes.hidden_size}", width=84)
        drawing.arrow((x, y + 56), (x, y + 25))
        drawing.box(x, y + 79, "input", f"x_{{{name}}}", f"{sizes.inputs} inputs", width=84)
    drawing.arrow((114, y), (124, y), head=False)
    drawing.text(138, y + 5, "· · ·", small=False)
    drawing.arrow((152, y), (160, y))
    drawing.arrow((246, y), (270, y))
    drawing.box(308, y, "state", "h_{T}", f"{sizes.hidden_size}", width=72)
    drawing.arrow((344, y), (378, y))
    drawing.box(429, y, "plain", "context", f"{sizes.context_size} units", width=98)
    drawing.arrow((429, y + 56), (429, y + 25))
    drawing.box(429, y + 79, "input", "bookkeeping", f"{len(STEADY_BOOKKEEPING)} inputs", width=112)
    drawing.arrow((478, y), (514, y))
    for number, x in enumerate((558.0, 660.0, 762.0), 1):
        drawing.box(x, y, "head", "step", f"GRU {sizes.decoder_size}", width=84)
        drawing.arrow((x, y + 56), (x, y + 25))
        drawing.box(x, y + 79, "input", "calendar", f"{len(DAY_INPUTS)} inputs", width=84)
        drawing.arrow((x, y - 24), (x, y - 54))
        drawing.box(x, y - 80, "output", f"day {number}", f"{len(LEVELS)} quantiles", width=92)
    for left in (558.0, 660.0):
        drawing.arrow((left + 42, y), (left + 58, y))
    return drawing


DRAWINGS: dict[str, Callable[[Sizes], Drawing]] = {
    "step": step,
    "unfolded": unfolded,
    "truncated": truncated,
    "one-to-one": one_to_one,
    "many-to-one": many_to_one,
    "many-to-many": many_to_many,
    "stack": stack,
    "one-to-many": one_to_many,
    "forecast": forecast,
}
"""Drawings by the names of their files."""


def main(check: bool) -> int:
    """Write the drawings, or name those that are not current."""
    sizes = Sizes.shipped()
    stale = []
    for name, draw in DRAWINGS.items():
        file, text = FOLDER / f"{name}.svg", str(draw(sizes))
        if file.is_file() and file.read_text() == text:
            continue
        stale.append(f"docs/drawings/{name}.svg")
        if not check:
            file.parent.mkdir(exist_ok=True)
            file.write_text(text)
    if check and stale:
        print(f"{', '.join(stale)}: not current; run `make docs`", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main("--check" in sys.argv[1:]))
