"""HTML that cannot be broken by what it shows: text is escaped unless it is markup already."""

import html
import json
from collections.abc import Mapping
from typing import Any

from gpt.errors import shown

__all__ = ["Html", "data_block", "shown", "table", "tag", "together"]

_VOID = frozenset({"meta", "input", "br", "link"})


class Html(str):
    """Text that is markup already."""

    __slots__ = ()


def tag(name: str, /, *children: object, **attributes: object) -> Html:
    """An element; children that are not Html are escaped, as all attributes are.

    `class_` and `for_` stand for the reserved words, `data_x` for `data-x`; an attribute of None or
    False is left out, of True has no value.
    """
    opened = [name]
    for key, value in attributes.items():
        if value is None or value is False:
            continue
        attribute = key.rstrip("_").replace("_", "-")
        opened.append(
            attribute if value is True else f'{attribute}="{html.escape(shown(value), quote=True)}"'
        )
    start = f"<{' '.join(opened)}>"
    return Html(start) if name in _VOID else Html(f"{start}{together(*children)}</{name}>")


def together(*children: object) -> Html:
    """Markup of one piece after the other; None is nothing."""
    return Html(
        "".join(
            child if isinstance(child, Html) else html.escape(shown(child), quote=False)
            for child in children
            if child is not None
        )
    )


def table(header: list[object], rows: list[list[object]], caption: str | None = None) -> Html:
    """A table whose first column heads its rows; wide ones scroll by themselves."""
    head = [tag("th", cell, scope="col") for cell in header]
    body = [
        tag("tr", tag("th", row[0], scope="row"), *(tag("td", cell) for cell in row[1:]))
        for row in rows
    ]
    return tag(
        "div",
        tag(
            "table",
            tag("caption", caption) if caption else None,
            tag("thead", tag("tr", *head)),
            tag("tbody", *body),
        ),
        class_="scroll",
        tabindex="0",
        role="region",
        aria_label=caption or "table",
    )


def data_block(identifier: str, value: Mapping[str, Any]) -> Html:
    """JSON for the page's script; nothing in it can end the element that holds it."""
    text = json.dumps(value, ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    for character in "<>&":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return Html(f'<script type="application/json" id="{html.escape(identifier)}">{text}</script>')
