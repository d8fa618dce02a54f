"""A C header's comments as Markdown: a section for each of its rules, an entry for each comment and what it is about.

python tools/docs/c_header.py include/flexq/flexq.h     # prints the page, or says what has no comment

In the header a rule is `/* ---- Name ---- */`, and a comment is about the declarations that follow it up to an empty
line. A comment's first line may be continued by lines that are indented more, which become paragraphs of their own.
"""

import re
import sys
from dataclasses import dataclass
from pathlib import Path

RULE = re.compile(r"/\* -{3,} (?P<name>.*?) -{3,} \*/")
FUNCTION = re.compile(r"\bFLEXQ_API\b[^;(]*?\b(flexq_\w+)\s*\(")
TYPE = re.compile(
    r"\}\s*(flexq_\w+)\s*;|^typedef [^;{(]*?\b(flexq_\w+)\s*;|^typedef \w+ \(\*(flexq_\w+)\)", re.MULTILINE
)


@dataclass
class Entry:
    """Declarations and the comment on them; "" where they have none."""

    comment: str
    code: str

    @property
    def functions(self) -> list[str]:
        return FUNCTION.findall(self.code)

    @property
    def names(self) -> list[str]:
        return list(dict.fromkeys(self.functions or [next(filter(None, found)) for found in TYPE.findall(self.code)]))


def _text_of(comment: str) -> str:
    """A comment without its frame; lines keep how far they are indented."""
    lines = comment.strip().removeprefix("/* ").removesuffix("*/").splitlines()
    return "\n".join(re.sub(r"^ \* ?", "", line).rstrip() for line in lines).strip("\n")


def _without_scaffold(source: str) -> str:
    """Without what is there for the compiler and the formatter alone."""
    source = re.sub(r"#if defined\(FLEXQ_STATIC\).*?\n#endif\n(?=\n)", "", source, flags=re.DOTALL)
    source = re.sub(r"#ifdef __cplusplus.*?#endif\n", "", source, flags=re.DOTALL)
    source = re.sub(
        r"^#(ifndef FLEXQ_FLEXQ_H|define FLEXQ_FLEXQ_H|endif.*|include.*)\n", "", source, flags=re.MULTILINE
    )
    return re.sub(r"^/\* clang-format (on|off) \*/\n", "", source, flags=re.MULTILINE)


def parse(source: str) -> tuple[str, list[tuple[str, list[Entry]]]]:
    """The header's opening comment, and its sections: names and entries."""
    opening, _, rest = source.partition("*/\n")
    sections: list[tuple[str, list[Entry]]] = [("Constants", [])]
    for block in re.split(r"\n\s*\n", _without_scaffold(rest)):
        block = block.strip()
        rule = RULE.fullmatch(block)
        if rule:
            sections.append((rule["name"], []))
        elif block.startswith("/*"):
            comment, _, code = block.partition("*/")
            if not code.strip().startswith("/*"):
                sections[-1][1].append(Entry(_text_of(comment), code.strip()))
            else:
                raise ValueError(f"two comments in a row, an empty line is missing:\n{block}")
        elif block:
            sections[-1][1].append(Entry("", block))
    return _text_of(opening), [(name, entries) for name, entries in sections if entries]


def undocumented(sections: list[tuple[str, list[Entry]]]) -> list[str]:
    return [name for _, entries in sections for entry in entries if not entry.comment for name in entry.functions]


def _paragraphs(text: str) -> list[str]:
    """Lines that are indented more than the first begin a paragraph; others go on with the one before."""
    paragraphs: list[str] = []
    for line in text.splitlines():
        if not line.strip():
            paragraphs.append("")
        elif line.startswith("  ") or not paragraphs or not paragraphs[-1]:
            paragraphs.append(line.strip())
        else:
            paragraphs[-1] += " " + line.strip()
    return [p for p in paragraphs if p]


def _escaped(text: str) -> str:
    """Plain text in Markdown, names of the API as code."""
    parts = re.split(r"(`[^`]*`)", text)
    for i in range(0, len(parts), 2):
        part = re.sub(r"([\[\]*<>|])", r"\\\1", parts[i])
        parts[i] = re.sub(r"\b(flexq_\w+|FLEXQ_\w+)(\(\))?", r"`\1\2`", part)
    return "".join(parts)


def _declarations(code: str) -> str:
    """As they are in the header, without the macro before functions; what hangs on its width moves along."""
    macro, out, hanging = "FLEXQ_API ", [], False
    for line in code.splitlines():
        if line.startswith(macro):
            line, hanging = line.removeprefix(macro), True
        elif hanging:
            line = line.removeprefix(" " * len(macro))
        hanging = hanging and not line.endswith(";")
        out.append(line)
    return "\n".join(out)


def page(source: str) -> str:
    """The header as Markdown below a title. ValueError names functions without a comment."""
    opening, sections = parse(source)
    if missing := undocumented(sections):
        raise ValueError(f"functions without a comment: {', '.join(missing)}")
    out = ["## What holds for all of it", "", "```text", opening, "```", ""]
    for name, entries in sections:
        out += [f"## {name}", ""]
        for entry in entries:
            if entry.names:
                out += ["### " + ", ".join(f"`{n}`" for n in entry.names), ""]
            for paragraph in _paragraphs(entry.comment):
                out += [_escaped(paragraph), ""]
            if entry.code:
                out += ["```c", _declarations(entry.code), "```", ""]
    return "\n".join(out)


if __name__ == "__main__":
    try:
        print(page(Path(sys.argv[1]).read_text()))
    except ValueError as error:
        sys.exit(str(error))
