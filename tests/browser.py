"""Pages in a real headless browser."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest


def browse(page: Path, *options: str) -> tuple[str, str]:
    """What a headless browser prints of a page, and what it logs; only consoles log when all is well."""
    browser = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
    if browser is None:
        pytest.skip("no chromium or chrome on this machine")
    done = subprocess.run(
        [
            browser,
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--hide-scrollbars",
            "--enable-logging=stderr",
            f"--user-data-dir={page.parent / 'profile'}",
            "--host-resolver-rules=MAP * ~NOTFOUND",
            *options,
            page.as_uri(),
        ],
        capture_output=True,
        text=True,
        timeout=120,
    )
    return done.stdout, "\n".join(line for line in done.stderr.splitlines() if "CONSOLE" in line)


def frames(*shown: tuple[str, int]) -> str:
    """A page that shows pages in windows of so many pixels, and prints ``found[...]end`` with the message that each one posts."""
    windows = "".join(f'<iframe src="{page}" width="{width}" height="800" style="border: 0"></iframe>' for page, width in shown)
    return f"""
<body><script>
const told = [];
addEventListener("message", event => {{
  told.push(event.data);
  if (told.length === {len(shown)}) document.body.textContent = "found[" + told + "]end";
}});
</script>{windows}
"""
