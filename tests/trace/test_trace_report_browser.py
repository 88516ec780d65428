"""The report of a real failing run in a real browser: drawn, named, reachable, quiet."""

import json
import os
import shutil

import pytest

pytest.importorskip("jinja2", reason="reports need jinja2: pip install 'spimpi[report]'")
pytest.importorskip("selenium", reason="needs selenium: pip install 'spimpi[browser]'")
CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
DRIVER = shutil.which("chromedriver")
if not (CHROMIUM and DRIVER):
    pytest.skip("needs chromium and chromedriver", allow_module_level=True)

from spimpi.cli import main

FAULT = "replica:rank=2,layer=3,tensor=hidden,step=1"
SQUARE = "first divergence: rank 2, layer 3, hidden: differs from 3 replicas"


@pytest.fixture(scope="module")
def page(tmp_path_factory, run_ranks):
    """The report of a run of 4 ranks, on one of which a replica comes out different."""
    folder = tmp_path_factory.mktemp("report")
    done = run_ranks(
        4, "spimpi", "verify", "--topology", "tp=4", "--tokens", 3, "--inject", FAULT,
        "--trace", folder / "run.h5", timeout=300,
    )  # fmt: skip
    assert done.returncode == 1, done.stderr
    assert main(["trace", "report", str(folder / "run.h5")]) == 1
    return folder / "run.html"


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    profile = tmp_path_factory.mktemp("profile")
    for argument in ("--headless=new", "--disable-gpu", "--disable-dev-shm-usage",
                     f"--user-data-dir={profile}"):  # fmt: skip
        options.add_argument(argument)
    if os.geteuid() == 0:
        options.add_argument("--no-sandbox")  # Chromium has none for root
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=Service(DRIVER))
    yield driver
    driver.quit()


def look_at(browser, page, width=1280):
    """Open the page in a window of this width."""
    metrics = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    browser.get(page.as_uri())


def accessible(browser) -> dict[str, str]:
    """{name: role} of what a screen reader is told."""
    nodes = browser.execute_cdp_cmd("Accessibility.getFullAXTree", {})["nodes"]
    return {
        node["name"]["value"]: node["role"]["value"]
        for node in nodes
        if not node["ignored"] and node.get("name", {}).get("value")
    }


def test_it_opens_without_an_error_and_without_a_request(browser, page):
    browser.get("about:blank")
    browser.get_log("browser"), browser.get_log("performance")
    look_at(browser, page)
    assert browser.get_log("browser") == []
    assert browser.execute_script("return performance.getEntriesByType('resource').length") == 0
    asked = [
        message["params"]["request"]["url"]
        for entry in browser.get_log("performance")
        if (message := json.loads(entry["message"])["message"])["method"]
        == "Network.requestWillBeSent"
    ]
    assert [url for url in asked if not url.startswith("data:")] == [page.as_uri()]


@pytest.mark.parametrize("width", [1280, 400])
def test_the_pictures_are_drawn_and_fit_the_window(browser, page, width):
    look_at(browser, page, width)
    assert browser.execute_script("return document.documentElement.scrollWidth") <= width
    boxes = browser.execute_script(
        "return [...document.querySelectorAll('figure')].filter(f => f.checkVisibility())"
        ".map(f => [f, f.querySelector('.wide > svg')].map(e => e.getBoundingClientRect())"
        ".map(r => [r.left, r.width, r.height]))"
    )
    assert len(boxes) >= 5
    for (left, wide, tall), (_, svg_wide, svg_tall) in boxes:
        assert left >= 0 and 0 < left + wide <= width and tall > 0
        assert svg_wide > 100 and svg_tall > 20
    rects = browser.execute_script(
        "return [...document.querySelectorAll('#run1-map1 .wide > svg rect')]"
        ".map(e => e.getBoundingClientRect()).map(r => Math.min(r.width, r.height))"
    )
    assert len(rects) >= 4 * 8 and min(rects) >= 5


def test_the_failing_square_is_found_by_its_name(browser, page):
    look_at(browser, page)
    told = accessible(browser)
    (name,) = [name for name in told if name.startswith(SQUARE)]
    assert told[name] == "link"
    assert any(n.startswith("rank 1, layer 3, hidden: equals the majority") for n in told)
    for landmark in ("banner", "main", "navigation", "contentinfo"):
        assert landmark in told.values() or browser.find_elements(
            "css selector", {"banner": "header", "contentinfo": "footer"}.get(landmark, landmark)
        )
    pictures = browser.find_elements("css selector", "figure .wide > svg[role=img]")
    assert all(p.accessible_name for p in pictures if p.is_displayed())


def test_the_keyboard_reaches_the_failing_square_and_its_line(browser, page):
    from selenium.webdriver.common.keys import Keys

    look_at(browser, page)
    for _ in range(40):
        browser.switch_to.active_element.send_keys(Keys.TAB)
        focused = browser.switch_to.active_element
        if (focused.get_attribute("aria-label") or "").startswith(SQUARE):
            break
    else:
        pytest.fail("40 tabs did not reach it")
    stroke = browser.execute_script(
        "return getComputedStyle(arguments[0].querySelector('rect')).strokeWidth", focused
    )
    assert stroke == "3px"
    focused.send_keys(Keys.ENTER)
    line = browser.find_element("css selector", "tr:target")
    assert line.is_displayed() and line.text.startswith("2 3 ")
    assert "differs from 3 replicas" in line.text


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_stands_out_from_its_ground(browser, page, scheme):
    """WCAG AA: 4.5 to 1 for text."""
    media = [{"name": "prefers-color-scheme", "value": scheme}]
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": media})
    look_at(browser, page)
    found = browser.execute_script(CONTRASTS)
    assert len(found) > 30
    assert [f for f in found if f[0] < 4.5] == []
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})


CONTRASTS = """
function light(c) {
  return c.map(v => v / 255).map(v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)
    .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
}
const rgb = s => s.match(/[\\d.]+/g).map(Number);
const found = [];
for (const e of document.querySelectorAll('p,h1,h2,h3,dt,dd,th,td,a,li,summary,figcaption,text')) {
  if (!e.checkVisibility() || !e.textContent.trim()) continue;
  const style = getComputedStyle(e), svg = e.tagName === 'text';
  let ground = null;
  if (svg && e.classList.contains('mark')) {
    const rect = e.parentNode.querySelector(':scope > rect') && e.previousElementSibling;
    ground = rgb(getComputedStyle(rect).fill);
  }
  for (let n = e; !ground && n; n = n.parentElement) {
    const c = rgb(getComputedStyle(n).backgroundColor);
    if (c.length < 4 || c[3] > 0) ground = c;
  }
  const [a, b] = [light(rgb(svg ? style.fill : style.color).slice(0, 3)),
                  light(ground.slice(0, 3))].sort((x, y) => y - x);
  found.push([(a + 0.05) / (b + 0.05), e.tagName + '.' + e.className, e.textContent.slice(0, 40)]);
}
return found;
"""


def test_it_prints_on_white_without_what_cannot_be_clicked(browser, page):
    media = [{"name": "prefers-color-scheme", "value": "dark"}]
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": "print", "features": media})
    look_at(browser, page, 794)  # A4 at 96 dots an inch
    colours = browser.execute_script("return getComputedStyle(document.body).backgroundColor")
    assert colours == "rgb(255, 255, 255)"
    assert not browser.find_element("css selector", "nav").is_displayed()
    assert browser.execute_script("return document.documentElement.scrollWidth") <= 794
    printed = browser.execute_cdp_cmd("Page.printToPDF", {"printBackground": True})
    assert len(printed["data"]) > 10_000
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": "", "features": []})
