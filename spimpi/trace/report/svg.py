"""SVG as text: elements, texts, axes. Colours are classes of templates/style.css."""

from dataclasses import dataclass
from html import escape as escape_markup

from spimpi.printable import printable

LEAST, MOST = 1e-100, 1e100  # of an axis


@dataclass(frozen=True)
class Picture:
    """A picture and its data: ``svg``, ``columns`` and ``rows`` of the table (text), ``note``
    where the table is not the whole. ``ids``: of rows that the picture links to, by number."""

    svg: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    note: str = ""
    ids: tuple[str, ...] = ()


def escape(text) -> str:
    """Text as markup has it; nothing in it hides or turns around what stands beside it."""
    return escape_markup(printable(text))


def element(name: str, content: str = "", **attributes) -> str:
    """``<name …>content</name>``; attributes are escaped, ``content`` is markup already.

    Underscores at the end of a name are dropped, others become hyphens: ``class_``.
    """
    said = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{escape(_number(value))}"'
        for key, value in attributes.items()
        if value is not None
    )
    return f"<{name}{said}>{content}</{name}>" if content else f"<{name}{said}/>"


def text(x: float, y: float, words: str, class_: str = "", anchor: str | None = None) -> str:
    return element("text", escape(str(words)), x=x, y=y, class_=class_ or None, text_anchor=anchor)


def square(x, y, width, height, class_: str, title: str, mark: str = "") -> str:
    """A rectangle with an accessible name, which is its tooltip too."""
    name = element("title", escape(title)) if title else ""
    drawn = element("rect", name, x=x, y=y, width=width, height=height, class_=class_)
    if mark:
        middle = y + height / 2 + min(height, 14) * 0.33
        tall = round(min(height, width * 1.6 / len(mark), 15) * 0.8)
        drawn += element(
            "text", escape(mark), x=x + width / 2, y=middle, class_=f"mark on-{class_.split()[0]}",
            text_anchor="middle", aria_hidden="true", font_size=tall,
        )  # fmt: skip
    return drawn


def link(href: str, name: str, content: str) -> str:
    """What the keyboard reaches, called ``name``; ``content`` has no name of its own."""
    content = element("title", escape(name)) + content
    return element("a", content, href=href, aria_label=name, class_="found")


def drawing(width, height, content: str, title_id: str, role: str = "img") -> str:
    """The whole picture, named by the element ``title_id``."""
    return element(
        "svg", content, viewBox=f"0 0 {_number(width)} {_number(height)}", width=width,
        height=height, role=role, aria_labelledby=title_id, xmlns="http://www.w3.org/2000/svg",
    )  # fmt: skip


def ticks(most: float, about: int = 6) -> list[float]:
    """Round numbers from 0 up to ``most``; 0 alone where that is no size to divide."""
    if not LEAST < most < MOST:
        return [0.0]
    step = 10.0 ** _floor_log10(most / about)
    step *= next(m for m in (1, 2, 5, 10) if most / (step * m) <= about)
    return [step * i for i in range(int(most / step * (1 + 1e-12)) + 1)]


def _floor_log10(value: float) -> int:
    exponent = 0
    while value >= 10:
        value, exponent = value / 10, exponent + 1
    while value < 1:
        value, exponent = value * 10, exponent - 1
    return exponent


def _number(value) -> str:
    return f"{value:.6g}" if isinstance(value, float) else str(value)
