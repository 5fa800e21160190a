"""The real server of TensorBoard, and headless Chromium that looks at it."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

PATIENCE = 60.0  # seconds until a page must show what is awaited

# elements that match a selector, also within the shadow roots of Polymer's elements
_EVERYWHERE = """
const selector = arguments[0], found = [];
function look(root) {
  found.push(...root.querySelectorAll(selector));
  for (const one of root.querySelectorAll('*')) if (one.shadowRoot) look(one.shadowRoot);
}
look(document);
return found.filter(one => one.getClientRects().length)"""


@contextmanager
def tensorboard(folder: Path | str) -> Iterator[str]:
    """The address of a server that shows a folder."""
    command = [sys.executable, "-m", "tensorboard.main", "--logdir", str(folder), "--port", "0", "--host", "127.0.0.1"]
    server = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    try:
        said = ""
        for line in server.stderr:
            said += line
            if found := re.search(r"http://127\.0\.0\.1:\d+", line):
                yield found[0]
                break
        else:
            pytest.fail(f"TensorBoard ended: {said}")
    finally:
        server.terminate()
        server.wait()
        server.stderr.close()


@contextmanager
def chromium(width: int = 1500, height: int = 1100) -> Iterator[Any]:
    """A driver of headless Chromium. The test is skipped where Chromium, its driver or selenium is missing."""
    webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed (extra `dev`)")
    browser, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if browser is None or driver is None:
        pytest.skip("the dashboard was not looked at: apt-get install chromium chromium-driver")
    options = webdriver.ChromeOptions()
    options.binary_location = browser
    for one in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"):
        options.add_argument(one)
    options.add_argument(f"--window-size={width},{height}")
    found = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
    try:
        yield found
    finally:
        found.quit()


class Page:
    """One tab of a dashboard.

    Args:
        driver: The driver of the browser.
        address: The address of the server.
        tab: The name of the tab in addresses.
    """

    def __init__(self, driver: Any, address: str, tab: str) -> None:
        self._driver = driver
        driver.get("about:blank")  # another fragment alone would not load the page again
        driver.get(f"{address}/#{tab}")

    def text(self, *awaited: str) -> str:
        """All that is shown, once it has what is awaited."""
        end = time.monotonic() + PATIENCE
        while True:
            shown = self._driver.find_element("tag name", "body").text
            missing = [one for one in awaited if one not in shown]
            if not missing:
                return shown
            if time.monotonic() > end:
                pytest.fail(f"not shown: {missing}. Shown: {shown}")
            time.sleep(0.2)

    def values(self, selector: str, expression: str, least: int = 1) -> Sequence[Any]:
        """The value of an expression in JavaScript for each shown element `one`, once there are enough of them."""
        script = f"{_EVERYWHERE}.map(one => {expression});"
        end = time.monotonic() + PATIENCE
        while len(found := self._driver.execute_script(script, selector)) < least:
            if time.monotonic() > end:
                pytest.fail(f"{len(found)} of {least} elements {selector!r} are shown")
            time.sleep(0.2)
        return found
