"""A page in Debian's Chromium, without a window."""

import shutil
import socket
import subprocess
import time
import urllib.request
from typing import Any

CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
HAS_BROWSER = bool(CHROMIUM and DRIVER)
NO_BROWSER = "Debian's packages chromium and chromium-driver aren't installed"


def find_free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
    return port


def wait_until_served(url: str, process: subprocess.Popen[str]) -> None:
    """Wait until a process answers at an address."""
    for _ in range(240):
        try:
            urllib.request.urlopen(url, timeout=5).read()
            return
        except OSError:
            assert process.poll() is None, process.communicate()[0]
            time.sleep(0.5)
    raise AssertionError(f"nothing answers at {url}")


class Page:
    """The page in a browser."""

    def __init__(self, address: str, width: int = 1280) -> None:
        from selenium import webdriver

        options = webdriver.ChromeOptions()
        for argument in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", f"--window-size={width},1100"):
            options.add_argument(argument)
        options.binary_location = str(CHROMIUM)
        self.browser = webdriver.Chrome(options=options, service=webdriver.ChromeService(str(DRIVER)))
        self.browser.get(address)

    def find(self, selector: str, seconds: float = 60) -> Any:
        """The first visible element, once it is there."""
        from selenium.webdriver.support.ui import WebDriverWait

        def look(browser: Any) -> Any:
            shown = [one for one in browser.find_elements("css selector", selector) if one.is_displayed()]
            return shown[0] if shown else None

        return WebDriverWait(self.browser, seconds, ignored_exceptions=[Exception]).until(look)

    def type(self, selector: str, text: str) -> None:
        from selenium.webdriver.common.keys import Keys

        field = self.find(f"{selector} textarea, {selector} input")
        field.send_keys(Keys.CONTROL, "a")
        field.send_keys(Keys.BACKSPACE, text)

    def open(self, tab: str) -> None:
        self.find("button[role=tab]")
        next(b for b in self.browser.find_elements("css selector", "button[role=tab]") if b.text == tab).click()

    def wait_for(self, selector: str, text: str, seconds: float = 90) -> None:
        from selenium.webdriver.support.ui import WebDriverWait

        WebDriverWait(self.browser, seconds, ignored_exceptions=[Exception]).until(
            lambda browser: text in browser.find_element("css selector", selector).text
        )

    def wait_until(self, script: str, seconds: float = 60) -> None:
        """Wait until a script of the page returns something true."""
        from selenium.webdriver.support.ui import WebDriverWait

        WebDriverWait(self.browser, seconds).until(lambda browser: browser.execute_script(script))

    def get_source(self, selector: str) -> str:
        return self.find(f"{selector} img").get_attribute("src")
