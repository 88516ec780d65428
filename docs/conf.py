"""Sphinx settings; the directives of the reference pages are in public_names.py.

To build the site: python -m sphinx -E -a -n -W --keep-going docs build/site
"""

import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parent / "extensions"), str(Path(__file__).parents[1])]

import spimpi  # noqa: E402

project = "spimpi"
author = "the spimpi authors"
version = release = spimpi.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "public_names", "no_requests"]
myst_heading_anchors = 3
highlight_language = "none"  # indented blocks are of many languages; fenced ones say theirs

autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
# With -n every name in a signature must be documented here. Those of other projects are not (their
# inventories would have to be fetched), nor is the inference behind a Job.
ELSEWHERE = "np|numpy|MPI|mpi4py|collections|contextlib|decimal|fractions|pathlib|spimpi.inference"
nitpick_ignore_regex = [("py:.*", rf"({ELSEWHERE})\..*")]

html_theme = "furo"
html_title = f"spimpi {version}"
html_show_sourcelink = False
html_show_copyright = False
