"""Screenshots of pages for these documents, in headless Chromium.

    python docs/images/shoot.py PAGE.html OUT.png WIDTH HEIGHT [light|dark] [TOP]

TOP is a selector, or a number of pixels, of where the picture begins.
"""

from __future__ import annotations

import base64
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "tests" / "support"))

from liar_chromium import chromium

page, out, width, height, scheme, top = [*sys.argv[1:], *["light", "0"][len(sys.argv) - 5 :]]
with tempfile.TemporaryDirectory() as profile, chromium(Path(profile)) as browser:
    shown = browser.open(Path(page), width=int(width), height=int(height), dark=scheme == "dark")
    start = top if top.isdecimal() else f"document.querySelector('{top}').offsetTop - 12"
    clip = {"x": 0, "y": shown.evaluate(start), "width": int(width), "height": int(height)}
    shot = shown.call(
        "Page.captureScreenshot",
        format="png",
        captureBeyondViewport=True,
        clip={**clip, "scale": 1},
    )
    Path(out).write_bytes(base64.b64decode(shot["data"]))
    print(out, Path(out).stat().st_size, *shown.problems)
