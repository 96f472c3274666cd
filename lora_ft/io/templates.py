"""Render the pages and cards of this package with Jinja: sandboxed, and strict about names that are not defined."""

from pathlib import Path

import jinja2
import jinja2.sandbox


def environment(folder: Path, *, is_html: bool) -> jinja2.Environment:
    """Return the environment for the templates of a folder; values are escaped in HTML, and by filters elsewhere."""
    return jinja2.sandbox.ImmutableSandboxedEnvironment(
        loader=jinja2.FileSystemLoader(folder), autoescape=is_html, undefined=jinja2.StrictUndefined,
        trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True,
    )  # fmt: skip
