"""The report as Chromium shows it: `make test-browser` (Debian: apt-get install chromium chromium-driver)."""

import shutil
import time

import pytest

from imbsam.report.comparison import group_runs
from imbsam.report.page import page
from imbsam.report.runs import read_runs

pytestmark = pytest.mark.browser


@pytest.fixture(scope="module")
def browser():
    webdriver = pytest.importorskip("selenium.webdriver")
    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium") or ""
    # no sandbox: it refuses to start for root, and the page is our own
    for argument in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(shutil.which("chromedriver")))
    # nothing may come from elsewhere; a request would show as an error on the console
    driver.execute_cdp_cmd("Network.enable", {})
    driver.execute_cdp_cmd("Network.emulateNetworkConditions", _offline())
    yield driver
    driver.quit()


def _offline():
    return {"offline": True, "latency": 0, "downloadThroughput": 0, "uploadThroughput": 0}


@pytest.fixture(scope="module")
def report(three_groups, tmp_path_factory):
    groups = group_runs(read_runs([three_groups / "digits/sgd", three_groups])[0])
    path = tmp_path_factory.mktemp("page") / "report.html"
    path.write_text(page(groups, {}), encoding="utf-8")
    return path


@pytest.fixture
def show(browser, report, tmp_path):
    """Open the report in a window of some width and colour scheme; leaves a screenshot of the page in tmp_path."""

    def show(width=1200, scheme="light"):
        feature = {"name": "prefers-color-scheme", "value": scheme}
        browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [feature]})
        metrics = {"width": width, "deviceScaleFactor": 1, "mobile": width < 600}
        browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", {**metrics, "height": 800})
        browser.get(report.as_uri())
        wait(browser, "return document.documentElement.dataset.drawn !== undefined")
        height = browser.execute_script("return document.documentElement.scrollHeight")
        browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", {**metrics, "height": height})
        time.sleep(0.5)  # plotly answers a change of size a little later
        browser.save_screenshot(str(tmp_path / f"{width}_{scheme}.png"))
        assert [line for line in browser.get_log("browser") if line["level"] != "INFO"] == []

    return show


def wait(browser, condition, seconds=60):
    end = time.monotonic() + seconds
    while not browser.execute_script(condition):
        assert time.monotonic() < end, f"not within {seconds} s: {condition}"
        time.sleep(0.1)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_draws_every_figure_without_a_word_on_the_console(browser, show, scheme):
    show(scheme=scheme)
    drawn, hidden = browser.execute_script(
        "return [document.querySelectorAll('.plot .main-svg').length > 0, "
        "[...document.querySelectorAll('.plot')]"
        ".filter((p) => !p.closest('[hidden]') && !p.querySelector('.main-svg')).length]"
    )
    assert drawn
    assert hidden == 0
    assert not browser.find_elements("css selector", ".error")
    assert browser.execute_script(  # nothing hangs over what follows it
        "return [...document.querySelectorAll('.plot')].filter((p) => !p.closest('[hidden]')).every((p) => "
        "p.querySelector('.main-svg').getBoundingClientRect().bottom <= p.getBoundingClientRect().bottom + 1)"
    )
    text, background = browser.execute_script(
        "return [document.querySelector('.plot .xtitle').style.fill, getComputedStyle(document.body).backgroundColor]"
    )
    assert (text, background) == {
        "light": ("rgb(28, 33, 40)", "rgb(255, 255, 255)"),
        "dark": ("rgb(230, 233, 237)", "rgb(20, 23, 28)"),
    }[scheme]


def test_the_colours_follow_a_change_while_it_is_open(browser, show):
    show()
    browser.execute_cdp_cmd(
        "Emulation.setEmulatedMedia", {"features": [{"name": "prefers-color-scheme", "value": "dark"}]}
    )
    wait(browser, "return document.querySelector('.plot .xtitle').style.fill === 'rgb(230, 233, 237)'")


def test_the_tables_numbers_are_the_logs(browser, show, three_groups):
    show()
    cells = browser.execute_script(
        "return [...document.querySelector('table').rows].map((row) => [...row.cells].map((cell) => cell.innerText))"
    )
    runs, _ = read_runs([three_groups / "digits/sgd"])
    for column, name in enumerate(cells[0][1:5], start=1):
        mean = sum(100 * run.final[f"test/{name}"] for run in runs) / len(runs)
        assert cells[1][column].startswith(f"{mean:.1f} ± ")


def test_hovering_a_class_shows_its_name_and_count(browser, show):
    from selenium.webdriver import ActionChains

    show()
    points = browser.find_elements("css selector", "#figure0 .point")
    for point, text in (
        (points[0], "class cat: 120 training samples (many)"),
        (points[2], "class <img src=x onerror="),
    ):
        ActionChains(browser).move_to_element(point).perform()
        wait(browser, "return document.querySelector('#figure0 .hoverlayer').textContent !== ''")
        time.sleep(0.3)
        assert text in browser.execute_script("return document.querySelector('#figure0 .hoverlayer').textContent")
    assert browser.execute_script("return document.querySelectorAll('img').length") == 0


def test_a_group_is_hidden_and_another_confusion_is_chosen(browser, show):
    show()
    lines = "return document.querySelectorAll('#figure0 .scatter').length"
    assert browser.execute_script(lines) == 3
    browser.find_element("css selector", ".groups input").click()
    wait(browser, lines.replace("length", "length === 2"))
    options = browser.find_elements("css selector", "select option")
    options[1].click()
    shown = "return !!document.querySelector('#{0} .main-svg') && !document.getElementById('{0}').parentElement.hidden"
    wait(browser, shown.replace("{0}", options[1].get_attribute("value")))


def test_a_phone_scrolls_tables_in_their_box_and_not_the_page(browser, show):
    show(width=360)
    page_width, widest = browser.execute_script(
        "return [document.documentElement.scrollWidth, "
        "Math.max(...[...document.querySelectorAll('.plot')].map((p) => p.getBoundingClientRect().right))]"
    )
    assert page_width <= 360
    assert widest <= 360
    assert browser.execute_script(
        "return [...document.querySelectorAll('.scroll')].some((b) => b.scrollWidth > b.clientWidth)"
    )


@pytest.mark.parametrize("width", [360, 1200])
def test_a_table_wider_than_the_screen_says_so(browser, show, width):
    show(width=width)
    wide, told = browser.execute_script(
        "return [[...document.querySelectorAll('.scroll')].map((b) => b.scrollWidth > b.clientWidth), "
        "[...document.querySelectorAll('.swipe')].map((p) => p.checkVisibility())]"
    )
    assert wide == told
    assert wide[0] == (width == 360)
