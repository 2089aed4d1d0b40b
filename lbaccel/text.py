"""Text from outside (names in files, answers of a server) as it may be printed and published."""

from __future__ import annotations

import re
import unicodedata

_TOKEN = re.compile(r"\bhf_[A-Za-z0-9]{8,}|(?<=://)[^/@\s]+(?=@)")
_KEPT = "\n\t"


def printable(text: str) -> str:
    """The text with every control character as its escape: a terminal takes no orders from it.

    Line ends and tabs stay. Marks that turn the direction of writing are escaped too, since they
    show one name as another.

    >>> printable("cat\\x1b[2J"), printable("chat noir")
    ('cat\\\\x1b[2J', 'chat noir')
    """
    return "".join(char if _is_shown(char) else _escaped(char) for char in text)


def one_line(name: str) -> str:
    """A name from outside inside a sentence: as `printable`, and its line ends and tabs escaped.

    >>> one_line("a\\nerror: b")
    'a\\\\nerror: b'
    """
    return printable(name).replace("\n", "\\n").replace("\t", "\\t")


def _is_shown(char: str) -> bool:
    if char.isascii():
        return char.isprintable() or char in _KEPT
    return unicodedata.category(char) not in ("Cc", "Cs", "Zl", "Zp") and not (
        unicodedata.bidirectional(char) in ("LRE", "RLE", "PDF", "LRO", "RLO", "LRI", "RLI", "FSI")
        or unicodedata.bidirectional(char) == "PDI"
    )


def _escaped(char: str) -> str:
    return char.encode("unicode_escape").decode("ascii")


def without_tokens(text: str, token: str | None = None) -> str:
    """The text without this token, without any that begins as the hub's do, and without passwords.

    Args:
        text: such as the answer of a server, which may repeat what it was sent.
        token: the one in use, whatever it looks like.

    >>> without_tokens("no entry for hf_abcdefghijkl at https://me:secret@host/x")
    'no entry for hf_*** at https://***@host/x'
    """
    if token:
        text = text.replace(token, "hf_***")
    return _TOKEN.sub(lambda found: "hf_***" if found[0].startswith("hf_") else "***", text)


def in_markdown(text: str) -> str:
    """The text as one line of Markdown that shows its characters: no link, image, HTML or format.

    A `|` is left to the table that it may stand in.

    >>> in_markdown("![x](http://a) <b> `c`")
    '\\\\!\\\\[x\\\\](http://a) \\\\<b\\\\> \\\\`c\\\\`'
    """
    return re.sub(r"([\\`*\[\]<>#!~])", r"\\\1", printable(" ".join(text.split())))


def in_figure(text: str) -> str:
    r"""The text as a label of matplotlib, for which a `$` begins a formula.

    >>> in_figure("a $b")
    'a \\$b'
    """
    return printable(text).replace("$", r"\$")


def in_code_span(text: str) -> str:
    """The text between backticks, on one line; what would end the span is a quotation mark.

    >>> in_code_span("a`b")
    "`a'b`"
    """
    shown = printable(" ".join(text.split())).replace("`", "'")
    return f"`{shown or ' '}`"


def in_code_block(language: str, text: str) -> str:
    """A fenced block of Markdown, whose fence is longer than any in the text.

    >>> print(in_code_block("bash", "ls"))
    ```bash
    ls
    ```
    """
    longest = max((len(run) for run in re.findall(r"`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}{language}\n{printable(text)}\n{fence}"
