"""Directives of the reference pages: they are made from the code, and nothing may be left out.

    .. public-names:: Slab TensorPartition      documents these names of `spimpi`
    .. command-line::                           what `spimpi COMMAND --help` says, of all commands

A public name that no page documents is a warning, and so is one that two pages document.
"""

import argparse
import os
from types import ModuleType
from unittest import mock

from docutils import nodes
from docutils.parsers.rst import Directive
from docutils.statemachine import StringList
from sphinx.util import logging

import spimpi

logger = logging.getLogger(__name__)


class PublicNames(Directive):
    """autodoc of public names, as users type them: ``spimpi.NAME``."""

    required_arguments = 1
    final_argument_whitespace = True

    def run(self):
        env = self.state.document.settings.env
        pages = env.spimpi_names = getattr(env, "spimpi_names", {})
        lines = [".. currentmodule:: spimpi", ""]
        for name in self.arguments[0].split():
            if name not in spimpi._HOME_OF:
                raise self.error(f"{name} is not a public name of spimpi")
            if name in pages:
                raise self.error(f"{name} is documented on {pages[name]} too")
            pages[name] = env.docname
            lines += _lines(name)
        container = nodes.container()
        text = StringList(lines, source="the public names of spimpi")
        self.state.nested_parse(text, self.content_offset, container)
        return container.children


def _lines(name: str) -> list[str]:
    value = getattr(spimpi, name)
    if isinstance(value, ModuleType):  # spimpi.fingerprint: a package and its function of that name
        return [f".. autofunction:: {spimpi._HOME_OF[name]}.{name}", ""]
    if not isinstance(value, type):
        return [f".. autofunction:: spimpi.{name}", ""]
    if issubclass(value, BaseException):
        return [f".. autoexception:: spimpi.{name}", "   :show-inheritance:", ""]
    return [f".. autoclass:: spimpi.{name}", "   :members:", ""]


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
    names = getattr(env, "spimpi_names", {})
    env.spimpi_names = {name: page for name, page in names.items() if page != docname}


def _check_complete(app, env):
    for name in spimpi._HOME_OF.keys() - getattr(env, "spimpi_names", {}).keys():
        logger.warning("%s is on no page: add `.. public-names:: %s` in docs/api", name, name)


def setup(app):
    app.add_directive("public-names", PublicNames)
    app.add_directive("command-line", CommandLine)
    app.connect("env-purge-doc", _forget)
    app.connect("env-check-consistency", _check_complete)
    return {"parallel_read_safe": False}
