"""The page in a real browser: charts drawn, nothing fetched, nothing wider than a phone."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from layerwright.report import write_report

pytestmark = pytest.mark.browser
FIXTURE = Path(__file__).parent / "report.json"
FLAGS = (
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--disable-dev-shm-usage",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)
ATTACK = "<script>window.attacked = true</script><img src=x onerror='window.attacked = true'>"


@pytest.fixture(scope="module")
def browser(tmp_path_factory) -> Iterator[Any]:
    pytest.importorskip("selenium", reason="needs selenium: pip install 'layerwright[dev]'")
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    driver = shutil.which("chromedriver")
    if chromium is None or driver is None:
        pytest.skip("needs chromium and chromedriver on the path (Debian: apt install chromium chromium-driver)")
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for flag in (*FLAGS, f"--user-data-dir={tmp_path_factory.mktemp('profile')}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    opened = webdriver.Chrome(options=options, service=Service(driver))
    yield opened
    opened.quit()


@pytest.fixture(scope="module")
def page(tmp_path_factory) -> Path:
    """The page of a job whose model, layers and notes try to run a script."""
    data = json.loads(FIXTURE.read_text())
    data["model"] += ATTACK
    data["title"] += ATTACK
    for row in data["layers"]:
        row["note"] = ATTACK
        if row["path"].endswith("up_proj"):
            row["path"] += ATTACK
    out = tmp_path_factory.mktemp("out")
    (out / "report.json").write_text(json.dumps(data))
    return write_report(out)


def _open(browser: Any, page: Path, width: int = 1200, scheme: str = "light") -> list[str]:
    """Show the page and return the addresses it asked for."""
    from selenium.webdriver.support.ui import WebDriverWait

    browser.get_log("performance")
    browser.get_log("browser")
    size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 500}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    media = {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", media)
    browser.get(page.as_uri())
    drawn = "return document.documentElement.dataset.charts === '3'"
    WebDriverWait(browser, 60).until(lambda b: b.execute_script(drawn))
    messages = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    sent = [m["params"] for m in messages if m["method"] == "Network.requestWillBeSent"]
    mine = [p for p in sent if p.get("documentURL") == page.as_uri()]
    return [p["request"]["url"] for p in mine]


def _background(browser: Any) -> str:
    return browser.execute_script("return getComputedStyle(document.body).backgroundColor")


def test_charts_are_drawn_without_errors_or_requests(browser, page):
    asked = _open(browser, page)
    assert page.as_uri() in asked
    assert [url for url in asked if url != page.as_uri() and not url.startswith("data:")] == []
    assert browser.get_log("browser") == []
    bars = browser.execute_script("return document.querySelectorAll('#chart-stack .bars .point path').length")
    assert bars == 2 * 15
    dots = browser.execute_script(
        "return document.querySelectorAll('#chart-sensitivity .scatterlayer path.point').length"
    )
    assert dots == 14
    lines = browser.execute_script(
        "return document.querySelectorAll('#chart-frontier .scatterlayer path.js-line').length"
    )
    assert lines == 2
    assert browser.execute_script("return document.querySelectorAll('#chart-frontier path.yerror').length") == 2


def test_names_do_not_run(browser, page):
    _open(browser, page)
    assert browser.execute_script("return window.attacked") is None
    assert ATTACK in browser.execute_script("return document.querySelector('h1').textContent")
    assert browser.execute_script("return document.querySelectorAll('main img').length") == 0


def test_filter(browser, page):
    _open(browser, page)
    count = "return Array.from(document.querySelectorAll('#decisions tbody tr')).filter(r => !r.hidden).length"
    assert browser.execute_script(count) == 14
    browser.find_element("id", "search").send_keys("q_proj LAYERS.7")
    assert browser.execute_script(count) == 1
    browser.find_element("id", "search").clear()
    browser.find_element("id", "planned").click()
    assert browser.execute_script(count) == len(json.loads(FIXTURE.read_text())["layers"])


@pytest.mark.parametrize("width", [375, 768, 1200])
def test_no_sideways_scrolling(browser, page, width):
    _open(browser, page, width=width)
    browser.execute_script("document.querySelectorAll('details').forEach(d => { d.open = true })")
    assert browser.execute_script("return document.documentElement.scrollWidth") <= width
    wide = "return Array.from(document.querySelectorAll('.chart svg')).every(s => s.clientWidth <= innerWidth)"
    assert browser.execute_script(wide)


def test_dark_rooms(browser, page):
    _open(browser, page)
    light = _background(browser)
    tick = "return getComputedStyle(document.querySelector('#chart-frontier .xtick text')).fill"
    ink = browser.execute_script(tick)
    _open(browser, page, scheme="dark")
    assert _background(browser) != light
    assert browser.execute_script(tick) != ink
