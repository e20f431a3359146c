"""What `make docs` adds to the pages: the versions that were tested, and formulas."""

import importlib.metadata
import platform
import re
from typing import Any

from latex2mathml.converter import convert

# What the tests run against, besides what these bring along.
FRAMEWORKS = (
    *("torch", "deepspeed", "transformers", "accelerate", "lightning", "ray"),
    *("safetensors", "cuda-core", "nvidia-cuda-nvrtc"),
)


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Fill in the table of versions."""
    return markdown.replace("<!-- versions -->", versions())


def on_page_content(html: str, **_: Any) -> str:
    """Make MathML of formulas, which browsers show by themselves."""
    inline = re.compile(r'<span class="arithmatex">\\\((.*?)\\\)</span>', re.DOTALL)
    display = re.compile(r'<div class="arithmatex">\s*\\\[(.*?)\\\]\s*</div>', re.DOTALL)
    html = inline.sub(lambda found: convert(_plain(found[1])), html)
    return display.sub(lambda found: convert(_plain(found[1]), display="block"), html)


def versions() -> str:
    """A table of what is installed here."""
    rows = [("Python", platform.python_version())]
    for name in FRAMEWORKS:
        try:
            rows.append((name, importlib.metadata.version(name)))
        except importlib.metadata.PackageNotFoundError:
            rows.append((name, "not tested"))
    lines = [f"| {name} | {version} |" for name, version in rows]
    return "\n".join(["| | version |", "|---|---|", *lines])


def _plain(formula: str) -> str:
    return formula.replace("&lt;", "<").replace("&gt;", ">").replace("&amp;", "&")
