"""The picture of the studio in docs/images/studio.png: the page as a visitor first sees it, with the miniature.

Needs the extra studio, playwright and a Chromium; ``python docs/studio_picture.py`` writes it anew.
"""

from __future__ import annotations

import argparse
import io
import shutil
from pathlib import Path

from PIL import Image
from playwright.sync_api import expect, sync_playwright

from dblightning.arguments import studio_parser
from dblightning.preset import even_preset
from dblightning.shared_pipeline import SharedPipeline
from dblightning.studio.blends import Blends
from dblightning.studio.command import live_rewards
from dblightning.studio.page import Studio, launch

#: milliseconds for the first images on a busy machine
PATIENCE = 120_000


def main() -> None:
    """Serve the page on this machine, open it, and take its picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "images" / "studio.png")
    parser.add_argument("--port", type=int, default=7861)
    options = parser.parse_args()
    blends = Blends(SharedPipeline.load(device="cpu"), live_rewards(studio_parser().parse_args([]), "miniature"))
    studio = Studio(blends, even_preset(), [])
    _, address, _ = launch(studio, port=options.port, prevent_thread_lock=True, quiet=True)
    with sync_playwright() as started:
        browser = started.chromium.launch(
            executable_path=shutil.which("chromium"), args=["--headless", "--no-sandbox", "--disable-gpu"]
        )
        page = browser.new_page(
            viewport={"width": 1280, "height": 1190}, device_scale_factor=0.75, color_scheme="light"
        )
        page.set_default_timeout(PATIENCE)
        expect.set_options(timeout=PATIENCE)
        page.goto(address)
        expect(page.locator("#strip img")).to_be_visible()
        for picture in ("#images img", "#strip img", "#map img"):
            page.wait_for_function("s => document.querySelector(s)?.complete", arg=picture)
        page.wait_for_timeout(1000)  # until nothing fades in any more
        taken = Image.open(io.BytesIO(page.screenshot()))
        # 256 colours take a quarter of the bytes
        taken.convert("P", palette=Image.Palette.ADAPTIVE).save(options.out, optimize=True)
        browser.close()


if __name__ == "__main__":
    main()
