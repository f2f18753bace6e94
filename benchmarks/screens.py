"""Pictures of the studio for the documentation: python -m benchmarks.screens [--base NAME] [--prompt TEXT] [--out FOLDER]."""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

from benchmarks.ui import studio
from compose.bases import BUNDLED

PICTURES = Path(__file__).parent.parent / "docs" / "pictures"


def main() -> int:
    """Drive a real studio through a drawing, and keep what it looks like."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--base", default=BUNDLED)
    parser.add_argument("--prompt", default="a fox on a night sky background, high contrast style")
    parser.add_argument("--out", type=Path, default=PICTURES)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    base = str(Path(args.base).resolve()) if Path(args.base).exists() else args.base
    with studio(base) as running:
        page = running.page
        page.set_default_timeout(180_000)
        _create(page, args.prompt, args.out)
        _compare(page, args.out)
        _library(page, args.out)
        _phone(page, args.out)
    return 0


def _create(page: Any, prompt: str, out: Path) -> None:
    page.set_viewport_size({"width": 1280, "height": 1000})
    page.fill("#prompt textarea", prompt)
    page.click("#go")
    page.wait_for_selector("#stage [data-state=done] img, #stage .fault")
    if fault := page.query_selector("#stage .fault"):
        raise SystemExit(f"the studio drew nothing: {fault.inner_text()}")
    page.wait_for_selector("#gallery img")
    time.sleep(1)
    page.screenshot(path=out / "studio-create.png")


def _compare(page: Any, out: Path) -> None:
    page.click('button[role=tab]:has-text("Compare")')
    page.click("#compare >> nth=-1")
    page.wait_for_selector("#grid img")
    time.sleep(1)
    page.screenshot(path=out / "studio-compare.png")


def _library(page: Any, out: Path) -> None:
    page.click('button[role=tab]:has-text("Library")')
    page.wait_for_selector("#shelf img")
    page.click("#shelf button >> nth=0")
    page.wait_for_selector("#card-facts table")
    page.screenshot(path=out / "studio-library.png")
    page.click('button[role=tab]:has-text("Create")')


def _phone(page: Any, out: Path) -> None:
    page.emulate_media(color_scheme="dark")
    page.set_viewport_size({"width": 390, "height": 844})
    time.sleep(1)
    page.screenshot(path=out / "studio-phone.png")


if __name__ == "__main__":
    raise SystemExit(main())
