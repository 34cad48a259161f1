"""The same as one HTML file: nothing is fetched, hovering a token tells its keep probability."""

from __future__ import annotations

import base64
import html
import io
import json
from importlib import resources
from pathlib import Path
from string import Template
from typing import Any

from ..checkpoint import write_atomically

LONGEST = 1280  # pixels of the picture's longer side in the page


def write_page(document: dict[str, Any], picture: Any, path: str | Path) -> None:
    """Write a page that holds its style, script, data and picture.

    Args:
        document: as `command.describe` makes it.
        picture: PIL picture; a large one is shrunk.
        path: overwritten.
    """
    template = Template((resources.files("llava_prune.visualize") / "page.html").read_text(encoding="utf-8"))
    # "</script>" in a question would end the script
    data = json.dumps(document).replace("<", "\\u003c")
    page = template.substitute(
        about=_about(document),
        sections="\n".join(_section(number, question) for number, question in enumerate(document["questions"])),
        picture=_data_uri(picture),
        data=data,
    )
    write_atomically(Path(path), lambda temporary: temporary.write_text(page, encoding="utf-8"))


def _about(document: dict[str, Any]) -> str:
    name, size = Path(document["picture"]["file"]).name, document["picture"]
    facts = {
        "model": document["model"],
        "pruners": document["pruners"],
        "mode": document["mode"],
        "picture": f"{name}, {size['width']} x {size['height']} pixels, {document['vision_tokens']} vision tokens",
    }
    if document["budget"] is not None:
        facts["budget"] = f"{document['budget']:g} average tokens"
    return "".join(f"<dt>{name}</dt><dd>{html.escape(fact)}</dd>" for name, fact in facts.items())


def _section(number: int, question: dict[str, Any]) -> str:
    answers = "".join(
        f"<dt>{html.escape(mode)}</dt><dd>{html.escape(text)}</dd>" for mode, text in question["answers"].items()
    )
    return (
        f'<section data-question="{number}"><h2>{html.escape(question["question"])}</h2>'
        f'<dl>{answers}<dt>average tokens</dt><dd>{question["average_tokens"]:.1f}</dd></dl><div class="views"></div>'
        "</section>"
    )


def _data_uri(picture: Any) -> str:
    shown = picture.copy()
    shown.thumbnail((LONGEST, LONGEST))
    buffer = io.BytesIO()
    shown.save(buffer, format="JPEG", quality=92)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()
