"""Pages that are made from the sources while mkdocs builds: a line `<!-- from: KIND -->` becomes what KIND makes.

c-api      the C header's comments (c_header.py)
cli        what `flexq COMMAND --help` prints, command by command
"""

import argparse
import re
import sys
from pathlib import Path

from mkdocs.exceptions import PluginError

ROOT = Path(__file__).parents[2]
NOTE = re.compile(r"^> As a file this page lacks.*\n", re.MULTILINE)  # not so on the site
MARK = re.compile(r"^<!-- from: (?P<kind>[\w-]+) -->$", re.MULTILINE)


def _c_api() -> str:
    import c_header

    return c_header.page((ROOT / "include" / "flexq" / "flexq.h").read_text())


def _commands(parser: argparse.ArgumentParser, words: str):
    """Each command that does something, with its words."""
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for name, sub in action.choices.items():
                yield from _commands(sub, f"{words} {name}")
            return
    yield words, parser


def _cli() -> str:
    from flexq.cli.main import _parser

    out = []
    for words, parser in _commands(_parser(), "flexq"):
        parser.formatter_class = lambda prog: argparse.HelpFormatter(prog, width=100, max_help_position=30)
        out += [f"## `{words}`", "", "```text", parser.format_help().rstrip(), "```", ""]
    return "\n".join(out)


_MAKERS = {"c-api": _c_api, "cli": _cli}


def on_page_markdown(markdown: str, page, **_) -> str:
    # Here, as mkdocs takes back what a hook does to the path while it is loaded.
    for folder in (ROOT / "tools" / "docs", ROOT / "python"):
        if str(folder) not in sys.path:
            sys.path.append(str(folder))

    def made(match: re.Match) -> str:
        kind = match["kind"]
        if kind not in _MAKERS:
            raise PluginError(f"{page.file.src_path}: nothing makes {kind!r}; there are {', '.join(_MAKERS)}")
        try:
            return _MAKERS[kind]()
        except ValueError as error:
            raise PluginError(f"{page.file.src_path}: {error}") from error

    return MARK.sub(made, NOTE.sub("", markdown))
