"""Directives of the reference pages: they are made from the code, and nothing may be left out.

    .. public-names:: spimpi.partition      documents the names that spimpi takes from this module
    .. command-line::                       what `spimpi COMMAND --help` says, for every command

A module in ``spimpi._HOMES`` that no page documents is a warning, and so is one documented twice.
"""

import argparse
import os
from importlib import import_module
from unittest import mock

from docutils import nodes
from docutils.parsers.rst import Directive
from docutils.statemachine import StringList
from sphinx.util import logging

import spimpi

logger = logging.getLogger(__name__)


class PublicNames(Directive):
    """autodoc of a module's public names, as users type them: ``spimpi.NAME``."""

    required_arguments = 1

    def run(self):
        home = self.arguments[0]
        if home not in spimpi._HOMES:
            raise self.error(f"{home} is not in spimpi._HOMES")
        env = self.state.document.settings.env
        pages = env.spimpi_homes = getattr(env, "spimpi_homes", {})
        if pages.setdefault(home, env.docname) != env.docname:
            raise self.error(f"{home} is documented on {pages[home]} too")
        lines = StringList(_lines(home), source=f"{home}, in spimpi._HOMES")
        container = nodes.container()
        self.state.nested_parse(lines, self.content_offset, container)
        return container.children


def _lines(home: str) -> list[str]:
    lines = [".. currentmodule:: spimpi", ""]
    for name in spimpi._HOMES[home]:
        value = getattr(import_module(home), name)
        # spimpi.fingerprint is also a package: there the function is documented by its home's name.
        if getattr(spimpi, name) is not value:
            lines += [f".. autofunction:: {home}.{name}", ""]
        elif isinstance(value, type):
            exception = issubclass(value, BaseException)
            directive = "autoexception" if exception else "autoclass"
            lines += [f".. {directive}:: spimpi.{name}", "   :members:"]
            lines += ["   :show-inheritance:", ""] if exception else [""]
        elif callable(value):
            lines += [f".. autofunction:: spimpi.{name}", ""]
        else:
            lines += [f".. autodata:: spimpi.{name}", ""]
    return lines


class CommandLine(Directive):
    """A section for each subcommand, with its help as a terminal shows it."""

    def run(self):
        from spimpi.cli import build_parser

        with mock.patch.dict(os.environ, {"COLUMNS": "100", "NO_COLOR": "1"}):
            return list(self._sections(build_parser(), build_parser().prog))

    def _sections(self, parser, name):
        section = nodes.section(ids=[nodes.make_id(name)], names=[name])
        section += nodes.title(text=name)
        section += nodes.literal_block(text=parser.format_help(), language="none")
        for action in parser._actions:
            if isinstance(action, argparse._SubParsersAction):
                for word, sub in action.choices.items():
                    section += list(self._sections(sub, f"{name} {word}"))
        yield section


def _forget(app, env, docname):
    homes = getattr(env, "spimpi_homes", {})
    env.spimpi_homes = {home: page for home, page in homes.items() if page != docname}


def _check_complete(app, env):
    for home in spimpi._HOMES:
        if home not in getattr(env, "spimpi_homes", {}):
            names = ", ".join(spimpi._HOMES[home])
            msg = f"{home} ({names}) is on no page: add `.. public-names:: {home}` in docs/api"
            logger.warning(msg)


def setup(app):
    app.add_directive("public-names", PublicNames)
    app.add_directive("command-line", CommandLine)
    app.connect("env-purge-doc", _forget)
    app.connect("env-check-consistency", _check_complete)
    return {"parallel_read_safe": False}
