"""Reading a report as its reader does: tables, links, titles, by the standard library's parser."""

from html.parser import HTMLParser


class Page(HTMLParser):
    """``tables`` by the heading before them (lists of rows, the first the columns); ``titles`` of
    squares; ``links`` {name: href} of what the keyboard reaches; ``text``; ``elements``."""

    def __init__(self, path):
        super().__init__()
        self.source = path.read_text("utf-8")
        self.tables: dict[str, list[list[str]]] = {}
        self.titles: list[str] = []
        self.links: dict[str, str] = {}
        self.ids: list[str] = []
        self.elements: list[tuple[str, dict]] = []
        self.text = ""
        self._open: list[str] = []
        self._heading = self._cell = ""
        self.feed(self.source)

    def handle_starttag(self, name, attributes):
        attributes = dict(attributes)
        self.elements.append((name, attributes))
        if "id" in attributes:
            self.ids.append(attributes["id"])
        if name in ("meta", "link", "br"):
            return
        self._open.append(name)
        if name in ("h1", "h2", "h3"):
            self._heading = ""
        elif name == "table":
            self.tables[self._heading.strip()] = []
        elif name == "tr":
            self.tables[self._heading.strip()].append([])
        elif name in ("td", "th", "title"):
            self._cell = ""
        elif name == "a" and attributes.get("class") == "found":
            self.links[attributes["aria-label"]] = attributes["href"]

    def handle_startendtag(self, name, attributes):
        self.elements.append((name, dict(attributes)))

    def handle_endtag(self, name):
        assert self._open.pop() == name, f"</{name}> closes another element"
        if name in ("td", "th"):
            self.tables[self._heading.strip()][-1].append(self._cell.strip())
        elif name == "title" and "svg" in self._open:
            self.titles.append(self._cell)

    def handle_data(self, data):
        inside = self._open
        if "style" in inside:
            return
        if {"td", "th", "title"} & set(inside):
            self._cell += data
        if inside and inside[-1] in ("h1", "h2", "h3"):
            self._heading += data
        if "svg" not in inside:
            self.text += data

    def records(self, heading: str) -> list[dict[str, str]]:
        """The rows of the table under ``heading``, by column."""
        columns, *rows = self.tables[heading]
        return [dict(zip(columns, row, strict=True)) for row in rows]
