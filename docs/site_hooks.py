"""What `make site` does beside mkdocs: it lists the decisions, and names files outside docs/."""

import re
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
LINK = re.compile(r"\[([^\]]+)\]\((?![a-z]+:|#)([^)#\s]+)(#[^)\s]*)?\)")


def on_config(config: Any) -> None:
    """Put every decision into the navigation, newest first."""
    found = sorted((HERE / "decisions").glob("*.md"), reverse=True)
    config.nav[-1]["Decisions"] = [f"decisions/{path.name}" for path in found]


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Replace links that leave docs/ by the file's path: no public address is known to link to."""
    here = Path(page.file.abs_src_path).parent

    def shown(link: re.Match[str]) -> str:
        target = (here / link[2]).resolve()
        inside = target.is_relative_to(HERE.resolve())
        return link[0] if inside else f"{link[1]} (`{target.relative_to(HERE.parent.resolve())}`)"

    return LINK.sub(shown, markdown)
