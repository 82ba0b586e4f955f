"""Texts from data show themselves in Markdown, through a renderer that lets HTML pass."""

from __future__ import annotations

import html
import re
from html.parser import HTMLParser

import pytest
from markdown_it import MarkdownIt

from embed_pipeline.markdown import code, escaped, fenced, table

HOSTILE = [
    "<script>alert(1)</script>",
    "<img src=x onerror=alert(1)>",
    '"><svg onload=alert(1)>',
    "<!-- a comment that never ends",
    "[click](javascript:alert(1))",
    "![picture](http://tracker.example/x.png)",
    "<javascript:alert(1)>",
    "[reference]: http://evil.example",
    "`code` and ``more`",
    "```\nfenced\n```",
    "a | b | c",
    "a \\| b",
    "ends with a backslash \\",
    "two\nlines | and\r\nthree\u2028four",
    "# heading",
    "- item",
    "+ item",
    "* item",
    "1. first",
    "12) twelfth",
    "> quoted",
    "===",
    "---",
    "~~~",
    "~~struck~~ **bold** __bold__ *it* _it_ ~sub~ $x^2$",
    "&lt;script&gt; &amp; &copy; &#124;",
    "ndcg_at_10 snake_case _edge_",
    "    indented as code",
    "|---|---|",
    "\t",
]


def render(text: str) -> str:
    rendered: str = MarkdownIt("commonmark", {"html": True}).enable(["table", "strikethrough"]).render(text)
    return rendered


class _Seen(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        assert not attrs or tag in ("code",), (tag, attrs)

    def handle_data(self, data: str) -> None:
        self.text += data


def seen(text: str) -> _Seen:
    """The tags and the text that a browser finds."""
    parser = _Seen()
    parser.feed(render(text))
    parser.close()
    return parser


def one_line(text: str) -> str:
    return " ".join(text.split())


@pytest.mark.parametrize("text", HOSTILE)
def test_a_line_shows_the_text_itself(text: str) -> None:
    for line, tags in (
        (escaped(text), {"p"}),
        (f"before {escaped(text)} after", {"p"}),
        (f"- {escaped(text)}", {"ul", "li"}),
    ):
        found = seen(str(line))
        assert set(found.tags) <= tags
        assert one_line(text) in one_line(found.text)


@pytest.mark.parametrize("text", HOSTILE)
def test_a_table_keeps_its_shape_and_shows_the_texts(text: str) -> None:
    found = seen(table(["name", text], [[text, 0.5], ["last", code(text)]]))
    assert found.tags.count("tr") == 3
    assert found.tags.count("td") == 4
    assert set(found.tags) <= {"table", "thead", "tbody", "tr", "th", "td", "code"}
    cells = [
        html.unescape(re.sub("<[^>]*>", "", cell)) for cell in re.findall("<t[dh]>(.*?)</t[dh]>", rendered_table(text))
    ]
    assert [one_line(cell) for cell in cells[:4]] == ["name", one_line(text), one_line(text), "0.5000"]


def rendered_table(text: str) -> str:
    return render(table(["name", text], [[text, 0.5]]))


@pytest.mark.parametrize("text", [text for text in HOSTILE if text.strip() and "\\|" not in text])
def test_a_span_of_code_shows_the_text_itself(text: str) -> None:
    found = seen(f"before {code(text)} after")
    assert found.tags == ["p", "code"]
    assert one_line(text) in one_line(found.text)


@pytest.mark.parametrize("text", HOSTILE)
def test_a_block_of_code_ends_where_it_should(text: str) -> None:
    found = seen(f"{fenced(f'first{chr(10)}{text}', 'python')}\n\nafter")
    assert found.tags == ["pre", "code", "p"]
    assert text.rstrip().partition("\n")[0] in found.text


def test_spaces_of_a_prompt_stay_in_code() -> None:
    assert code("query: ") == "`query: `"
    assert seen(str(code(" both "))).text.strip("\n") == " both "
    assert code("") == ""


def test_what_is_marked_safe_is_not_escaped_again_and_long_texts_are_cut() -> None:
    assert table(["a", "b"], [[escaped("<b>"), code("x|y")]]).splitlines()[-1] == "| &lt;b&gt; | `x\\|y` |"
    assert table(["a"], [["<" * 400]], longest=300).splitlines()[-1] == f"| {'&lt;' * 299}… |"
