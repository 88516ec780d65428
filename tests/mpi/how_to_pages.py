"""Runs the how-to pages: their Python blocks are one program, their text blocks its output."""

import io
import re
import socket
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path

FOLDER = Path(__file__).parents[2] / "docs" / "how-to"
PAGES = sorted(page.stem for page in FOLDER.glob("*.md") if page.stem != "index")
_BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_HOST = "node17"


@dataclass(frozen=True)
class Block:
    """A fenced block: its language, its text, and the line of the page at which it begins."""

    language: str
    text: str
    line: int


def blocks_of(page: str) -> list[Block]:
    """The Python and text blocks of a page's text, in order."""
    found = (
        Block(match[1], match[2], page.count("\n", 0, match.start()) + 2)
        for match in _BLOCK.finditer(page)
    )
    return [block for block in found if block.language in ("python", "text")]


def program(name: str) -> list[Block]:
    """The blocks of a page after the lines that the index puts before each."""
    first = blocks_of((FOLDER / "index.md").read_text())
    return [*first, *blocks_of((FOLDER / f"{name}.md").read_text())]


def run(blocks: list[Block], name: str) -> list[tuple[str, str]]:
    """Run the Python blocks; (what a text block shows, what was printed since the last one)."""
    namespace: dict = {"__name__": name}
    printed = io.StringIO()
    pairs = []
    for block in blocks:
        if block.language == "text":
            pairs.append((one_line(block.text), one_line(printed.getvalue())))
            printed = io.StringIO()
            continue
        code = compile("\n" * (block.line - 1) + block.text, f"{name}.md", "exec")
        with redirect_stdout(printed):
            exec(code, namespace)
    return [*pairs, ("", one_line(printed.getvalue()))]


def one_line(text: str) -> str:
    """A page may break lines where the output does not; this machine's name is not its."""
    host = re.escape(socket.gethostname())
    return " ".join(re.sub(rf"\({host}\)", f"({_HOST})", text).split())
