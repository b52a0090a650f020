"""Text of users in Markdown: names of tasks, paths and the like, shown as they are."""

import html
import re
from collections.abc import Sequence

# an underscore inside a word is no emphasis
_MARKS = re.compile(r"[\\`*~\[\]|]|(?<!\w)_|_(?!\w)")
# what begins a heading, a list or a rule at the start of a line
_BLOCK = re.compile(r"^(\d*)(#+|[-+.)]|=+|-{2,})(?=\s|$)")


def plain(text: object) -> str:
    """The text on one line, with nothing in it that is a mark of Markdown or of HTML.

    >>> plain("a|b *c* <i>")
    'a\\\\|b \\\\*c\\\\* &lt;i&gt;'
    >>> plain("train.max_eval_examples=600 (+0.02)")
    'train.max_eval_examples=600 (+0.02)'
    """
    line = html.escape(" ".join(str(text).split()), quote=False)
    return _BLOCK.sub(r"\1\\\2", _MARKS.sub(lambda mark: f"\\{mark[0]}", line))


def markdown_table(rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table. The first row is its head; the cells are taken as they are."""
    lines = [rows[0], ["---"] * len(rows[0]), *rows[1:]]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
