"""A page of this site loads nothing from elsewhere: one that would is a warning.

Links that a reader follows are no requests; scripts, styles, fonts, images and frames are.
"""

import re
from html.parser import HTMLParser
from pathlib import Path

from sphinx.util import logging

logger = logging.getLogger(__name__)
EXTERNAL = re.compile(r"\s*(?:[a-z][a-z0-9+.-]*:)?//", re.IGNORECASE)
STYLE = re.compile(r"@import\s+(?:url\()?[\"']?\s*([^\"')\s;]+)|url\(\s*[\"']?([^\"')\s]+)")

NOT_LOADED = ("author", "canonical", "license", "next", "prev")


class _Requests(HTMLParser):
    def __init__(self):
        super().__init__()
        self.found = []

    def handle_starttag(self, tag, attributes):
        values = dict(attributes)
        names = ["src", "srcset", "poster", "data"]
        if tag in ("image", "use") or (tag == "link" and values.get("rel") not in NOT_LOADED):
            names.append("href")
        self.found += [values[name] for name in names if values.get(name)]
        self.found += _in_style(values.get("style") or "")


def _in_style(text: str) -> list[str]:
    return [first or second for first, second in STYLE.findall(text)]


def requests_of(file: Path) -> list[str]:
    """What an HTML or CSS file would load from another host."""
    text = file.read_text(encoding="utf-8")
    if file.suffix == ".css":
        found = _in_style(text)
    else:
        parser = _Requests()
        parser.feed(text)
        found = parser.found
    return [url for url in found if EXTERNAL.match(url)]


def _check(app, exception):
    if exception:
        return
    for file in sorted(Path(app.outdir).rglob("*")):
        if file.suffix in (".html", ".css"):
            for url in requests_of(file):
                logger.warning("%s would load %s", file.relative_to(app.outdir), url)


def setup(app):
    app.connect("build-finished", _check)
    return {"parallel_read_safe": True}
