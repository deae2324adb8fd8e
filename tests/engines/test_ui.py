"""The web page in a browser: a picture goes in, answers and boxes come out as offline, and nothing leaves this machine.

Not part of `make test`: `make test-ui` installs Gradio and runs this in headless Chromium.
"""

from __future__ import annotations

import base64
import json
import os
import shutil
import sys
import time
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from urllib.error import HTTPError
from urllib.parse import urlsplit
from urllib.request import Request, urlopen

import numpy as np
import pytest
from conftest import picture
from PIL import Image
from selenium import webdriver
from selenium.webdriver.chrome.service import Service as Driver
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from serving import png, serving, until

from convllava import load
from convllava.display import draw_boxes
from convllava.geometry import Size, parse_box
from convllava.model.images import load_image
from convllava.serving import guard
from convllava.serving.budget import Budget
from convllava.serving.limits import Limits
from convllava.serving.page import EXAMPLES

RECEIPT = EXAMPLES / "receipt.png"
TOTAL, BOX = "What is the total?", "Where exactly is the total? Give the box."
LONGEST = 32
SECONDS = 60
"""To wait for a busy machine."""
ADDRESSES: list[str] = []
"""That this process, which serves, has looked up or connected to."""
OPTIONS = (
    "--headless=new",
    "--no-sandbox",
    "--disable-dev-shm-usage",
    "--disable-background-networking",
    "--disable-component-update",
    "--no-first-run",
    "--window-size=1280,800",
    "--host-resolver-rules=MAP * ~NOTFOUND , EXCLUDE 127.0.0.1",
)
GROWING = """
window.seen = [];
new MutationObserver(() => {
    const said = [...document.querySelectorAll('#chat .bot.message')].at(-1)?.innerText.trim();
    if (said && window.seen.at(-1) !== said) window.seen.push(said);
}).observe(document.body, {subtree: true, childList: true, characterData: true});
"""


def record(event, arguments):
    if event == "socket.connect" and isinstance(arguments[1], tuple):
        ADDRESSES.append(arguments[1][0])
    elif event == "socket.getaddrinfo":
        ADDRESSES.append(arguments[0])


sys.addaudithook(record)


class Tab:
    """The page as a person uses it."""

    def __init__(self, driver, url):
        self.driver, self.url = driver, f"{url}/ui/"
        self.open()

    def open(self):
        self.driver.get(self.url)
        self.wait(lambda: self.all("#question textarea"))
        time.sleep(1)  # its parts are there before they listen

    def all(self, selector):
        return self.driver.find_elements(By.CSS_SELECTOR, selector)

    def text(self, name):
        return self.all(f"#{name}")[0].text

    def wait(self, condition):
        until(condition, SECONDS)

    def drop(self, file):
        self.all("#picture input[type=file]")[0].send_keys(str(file))

    def show(self, file):
        """Drop a good picture."""
        self.drop(file)
        self.wait(lambda: "Seen as" in self.text("cost"))

    def begin(self, question):
        self.all("#question textarea")[0].send_keys(question, Keys.ENTER)

    def ask(self, question):
        """The answer, once it is finished."""
        count = len(self.said())
        self.begin(question)
        self.wait(lambda: len(self.said()) == count + 2 and "tokens in" in self.text("facts"))
        self.wait(lambda: self.all("#question .submit-button"))
        return self.said()[-1]

    def said(self):
        return [message.text.strip() for message in self.all("#chat .message.user, #chat .message.bot")]

    def refusals(self):
        """What Gradio says of uploads that failed."""
        return [toast.text for toast in self.all("[data-testid=toast-text]")]

    def image(self):
        """What the picture's place shows; None before there is one."""
        found = self.all("#picture img")
        if not found:
            return None
        with urlopen(found[0].get_attribute("src")) as file:
            return load_image(file.read())

    def requests(self):
        """Every address that the browser asked for."""
        return [one["request"]["url"] for one in self._events("Network.requestWillBeSent")]

    def answers(self):
        """The status and kind of what was answered, by place."""
        answers = [one["response"] for one in self._events("Network.responseReceived")]
        return {urlsplit(one["url"]).path: (one["status"], one["mimeType"]) for one in answers}

    def _events(self, method):
        entries = [json.loads(entry["message"])["message"] for entry in self.driver.get_log("performance")]
        return [one["params"] for one in entries if one["method"] == method]


@contextmanager
def browser():
    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium") or ""
    for option in OPTIONS:
        options.add_argument(option)
    options.set_capability("goog:loggingPrefs", {"performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=Driver(shutil.which("chromedriver")))
    try:
        yield driver
    finally:
        driver.quit()


@pytest.fixture(scope="module")
def driver():
    with browser() as found:
        yield found


@pytest.fixture(scope="module")
def server():
    with serving(
        load("tiny", device="cpu"), "tiny", ui=True, limits=Limits(image_pixels=1_000_000, new_tokens=LONGEST)
    ) as running:
        yield running
    assert not Path(os.environ["GRADIO_TEMP_DIR"]).exists()


@pytest.fixture
def tab(driver, server):
    return Tab(driver, server.url)


@pytest.fixture(scope="module")
def assistant():
    return load("tiny", device="cpu")


@pytest.fixture
def slow(server, monkeypatch):
    """The service, whose every token takes as long as that of a large model."""
    step = server.service.engine.step
    monkeypatch.setattr(server.service.engine, "step", lambda: (time.sleep(0.2), step())[1])
    return server.service


def reddened(shown, plain):
    """Pixels that are as red as a box is and were not."""
    red = np.abs(np.asarray(shown).astype(int) - (220, 40, 40)).max(-1) < 60
    return red & (np.abs(np.asarray(plain).astype(int) - (220, 40, 40)).max(-1) >= 60)


def test_an_answer_grows_and_is_what_the_model_answers(tab, slow, assistant):
    tab.show(RECEIPT)
    tab.driver.execute_script(GROWING)
    said = tab.ask(BOX)
    assert said == assistant.ask(RECEIPT, BOX, max_new_tokens=LONGEST)
    seen = [text for text in tab.driver.execute_script("return window.seen") if text != "\N{HORIZONTAL ELLIPSIS}"]
    assert len(seen) > 2
    assert all(said.startswith(text[:-1]) for text in seen)
    plain = load_image(RECEIPT)
    cost = Budget(assistant).cost(Size(plain.height, plain.width), None)
    for fact in (cost.shape, f"{cost.visual_tokens} visual + ", "first token"):
        assert fact in tab.text("facts")


def test_a_conversation_goes_on_and_the_box_it_names_is_drawn(tab, assistant, server):
    tab.show(RECEIPT)
    first = tab.ask(TOTAL)
    assert first == assistant.ask(RECEIPT, TOTAL, max_new_tokens=LONGEST)
    images = server.service.encoder.stats.images
    second = tab.ask(BOX)
    history = [(TOTAL, first), (BOX, second)]
    messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": TOTAL}]}]
    messages += [{"role": "assistant", "content": first}, {"role": "user", "content": BOX}]
    assert second == assistant.chat(messages, [RECEIPT], max_new_tokens=LONGEST)
    assert tab.said() == [text for turn in history for text in turn]
    assert server.service.encoder.stats.images == images
    plain, box = load_image(RECEIPT), parse_box(second)
    size = Size(plain.height, plain.width)
    expected = draw_boxes(plain, [Budget(assistant).placement(size, None).box_from_normalised(box)])
    tab.wait(lambda: reddened(tab.image(), plain).any())
    drawn, due = reddened(tab.image(), plain), reddened(expected, plain)
    assert (drawn & due).sum() > 0.7 * due.sum()
    assert (drawn & ~due).sum() < 0.3 * due.sum()
    if path := os.environ.get("SCREENSHOT"):
        time.sleep(1)
        shot = Image.open(BytesIO(tab.driver.get_screenshot_as_png())).convert("RGB")
        shot.quantize(128, dither=Image.Dither.NONE).save(path, optimize=True)
    tab.ask(TOTAL)
    tab.wait(lambda: not reddened(tab.image(), plain).any())


def test_the_slider_says_what_a_budget_costs_and_is_obeyed(tab, assistant, server):
    tab.show(RECEIPT)
    size, budget = Size(512, 384), Budget(assistant)
    assert tab.text("cost") == budget.describe(size, None)
    number = tab.all("#side input[type=number]")[0]
    number.send_keys(Keys.CONTROL, "a")
    number.send_keys("512", Keys.ENTER, Keys.TAB)
    tab.wait(lambda: tab.text("cost") == budget.describe(size, 512**2))
    smaller = load("tiny", device="cpu", pixels=assistant.processor.image_processor.within(512**2))
    assert tab.ask(TOTAL) == smaller.ask(RECEIPT, TOTAL, max_new_tokens=LONGEST)
    assert budget.cost(size, 512**2).shape in tab.text("facts")


def test_an_example_is_one_click(tab, assistant):
    tab.all("#examples button")[0].click()
    tab.wait(lambda: tab.all("#question textarea")[0].get_attribute("value") == TOTAL)
    assert tab.image().size == (384, 512)
    assert tab.ask("") == assistant.ask(RECEIPT, TOTAL, max_new_tokens=LONGEST)


@pytest.mark.parametrize(
    ("data", "line"),
    [
        (b"no picture", "The picture cannot be taken: empty, or not an image file of a known kind"),
        (png(picture(64, 64))[:5000], "The picture cannot be taken: damaged, cut short"),
        (png(picture(1001, 1000)), "The picture cannot be taken: the image has 1.0 megapixels; the limit is 1"),
    ],
)
def test_a_bad_file_is_one_line_and_the_next_is_taken(tab, tmp_path, data, line):
    file = tmp_path / "bad.png"
    file.write_bytes(data)
    tab.drop(file)
    tab.wait(lambda: tab.text("cost").startswith(line))
    assert "\n" not in tab.text("cost")
    tab.wait(lambda: tab.image() is None)
    tab.begin(TOTAL)
    tab.wait(lambda: "there is no picture yet" in tab.text("facts"))
    tab.show(RECEIPT)
    assert not tab.said()


def test_a_file_that_is_too_large_is_one_line_and_the_next_is_taken(tab, tmp_path):
    assert tab.text("cost") == "Drop a picture of at most 15 MiB, or choose an example below."
    file = tmp_path / "large.png"
    with file.open("wb") as whole:
        whole.truncate(15 * 2**20 + 1)
    tab.drop(file)
    tab.wait(lambda: tab.refusals() == ['File(s) exceed the maximum allowed size of 15.0 Mb: "large.png"'])
    assert tab.image() is None
    tab.show(RECEIPT)


def test_what_the_door_refuses_is_one_line_and_the_next_is_taken(tab, monkeypatch):
    with monkeypatch.context() as full:
        full.setattr(guard, "_MOST_HELD", -1)
        tab.drop(RECEIPT)
        tab.wait(lambda: tab.refusals() == ["HTTP 503: too many pictures are held; try again later"])
    tab.show(RECEIPT)


def test_an_answer_that_is_stopped_stays_as_far_as_it_was_said(tab, slow, assistant):
    tab.show(RECEIPT)
    tab.begin(BOX)
    tab.wait(lambda: len(tab.said()) == 2 and len(tab.said()[1]) > 5)
    tab.all("#question .stop-button")[0].click()
    tab.wait(lambda: slow.engine.scheduler.running == slow.gate.inside == 0)
    tab.wait(lambda: tab.all("#question .submit-button"))
    said = tab.said()[1]
    assert 5 < len(said) < len(str(assistant.ask(RECEIPT, BOX, max_new_tokens=LONGEST)))
    tab.ask(TOTAL)
    assert tab.said()[:2] == [BOX, said]


def test_a_closed_page_frees_its_slot(tab, slow):
    tab.show(RECEIPT)
    tab.begin(BOX)
    tab.wait(lambda: slow.engine.scheduler.running == 1)
    tab.driver.get("about:blank")
    tab.wait(lambda: slow.engine.scheduler.running == slow.gate.inside == 0)


def test_the_browser_finds_all_that_a_page_asks_for_and_its_icon(server):
    with browser() as driver:
        tab = Tab(driver, server.url)
        manifest = driver.execute_cdp_cmd("Page.getAppManifest", {})
        answers = tab.answers()
    assert answers["/favicon.ico"] == (200, "image/svg+xml")
    assert answers["/manifest.json"] == (200, "application/manifest+json")
    assert {status for status, _ in answers.values()} == {200}
    assert not manifest["errors"]


def status_of(url, data=None, **headers):
    try:
        with urlopen(Request(url, data, {name.replace("_", "-"): text for name, text in headers.items()})) as answer:
            return answer.status
    except HTTPError as error:
        return error.code


def test_no_file_and_no_address_is_read_for_a_request(tab, server):
    before = len(ADDRESSES)
    for path in ("/etc/passwd", "http://example.org/a.png", RECEIPT):
        assert status_of(f"{server.url}/ui/gradio_api/file={path}") == 404
        file = {"path": str(path), "meta": {"_type": "gradio.FileData"}}
        body = {"data": [file, 1024], "fn_index": 2, "session_hash": "x"}
        join = f"{server.url}/ui/gradio_api/queue/join"
        assert status_of(join, json.dumps(body).encode(), Content_Type="application/json") == 400
    assert set(ADDRESSES[before:]) <= {"127.0.0.1", "localhost"}


def test_with_a_key_the_page_asks_for_it():
    with serving(load("tiny", device="cpu"), ui=True, api_key="key") as running, browser() as driver:
        assert status_of(f"{running.url}/ui/") == 401
        assert status_of(f"{running.url}/manifest.json") == status_of(f"{running.url}/favicon.ico") == 200
        known = {"Authorization": "Basic " + base64.b64encode(b":key").decode()}
        driver.execute_cdp_cmd("Network.enable", {})
        driver.execute_cdp_cmd("Network.setExtraHTTPHeaders", {"headers": known})
        tab = Tab(driver, running.url)
        tab.show(RECEIPT)
        assert tab.ask(TOTAL)


def test_the_page_fits_a_phone_and_a_screen(tab):
    for width, height in ((390, 844), (1280, 800)):
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 500}
        tab.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        tab.open()
        sides = tab.driver.execute_script("return [document.documentElement.scrollWidth, window.innerWidth]")
        assert sides[0] <= sides[1]
    tab.driver.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


def test_nothing_has_left_this_machine(tab, server):
    """The last one: of all that the tests before it did."""
    asked = tab.requests()
    assert len(asked) > 20
    hosts = {urlsplit(url).netloc for url in asked if not url.startswith(("data:", "blob:", "about:"))}
    assert hosts == {urlsplit(server.url).netloc}
    assert set(ADDRESSES) <= {"127.0.0.1", "localhost"}
