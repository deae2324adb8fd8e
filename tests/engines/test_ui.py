"""The web page in headless Chromium: answers, boxes and costs equal those of Python, and nothing leaves this machine.

Not part of `make test`; run `make test-ui`.
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
from urllib.parse import urlsplit

import pytest
from conftest import picture
from PIL import Image
from selenium import webdriver
from selenium.webdriver.chrome.service import Service as Driver
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from serving import png, serving, until

from convllava import load
from convllava.geometry import Size, parse_boxes
from convllava.serving.limits import Limits
from convllava.serving.page import EXAMPLES, pixel_budgets

RECEIPT = EXAMPLES / "receipt.png"
RECEIPT_SIZE = Size(512, 384)
TOTAL, BOX = "What is the total?", "Where exactly is the total? Give the box."
LONGEST = 32
SECONDS = 60
"""Longest wait on a busy machine."""
ADDRESSES: list[str] = []
"""Names and addresses that this process, which runs the server, has looked up or connected to."""
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
RECORD_TEXTS = """
window.texts = [];
new MutationObserver(() => {
    const text = [...document.querySelectorAll('#log .answer')].at(-1)?.textContent;
    if (text && window.texts.at(-1) !== text) window.texts.push(text);
}).observe(document.body, {subtree: true, childList: true, characterData: true});
"""
TRANSFER = """
const [name, data] = arguments;
const bytes = Uint8Array.from(atob(data), (character) => character.charCodeAt(0));
const transfer = new DataTransfer();
transfer.items.add(new File([bytes], 'page.png', {type: 'image/png'}));
const options = {bubbles: true, cancelable: true};
const event = name === 'paste' ? new ClipboardEvent(name, {...options, clipboardData: transfer})
    : new DragEvent(name, {...options, dataTransfer: transfer});
document.querySelector('#drop').dispatchEvent(event);
"""


def record(event, arguments):
    if event == "socket.connect" and isinstance(arguments[1], tuple):
        ADDRESSES.append(arguments[1][0])
    elif event == "socket.getaddrinfo":
        ADDRESSES.append(arguments[0])


sys.addaudithook(record)


class Tab:
    """A browser tab with the page, and actions of a user."""

    def __init__(self, driver, url, ready="#examples button"):
        self.driver, self.url = driver, f"{url}/ui/"
        self.driver.get(self.url)
        self.wait(lambda: self.all(ready))

    def all(self, selector):
        return self.driver.find_elements(By.CSS_SELECTOR, selector)

    def one(self, name):
        return self.driver.find_element(By.ID, name)

    def text(self, name):
        return self.one(name).text

    def wait(self, condition):
        until(condition, SECONDS)

    def choose(self, file):
        self.one("file").send_keys(str(file))

    def show(self, file):
        """Choose a good picture."""
        self.choose(file)
        self.wait(lambda: "Seen as" in self.text("cost") and self.one("frame").is_displayed())

    def begin(self, question):
        self.one("question").send_keys(question, Keys.ENTER)

    def ask(self, question):
        """Return the answer once it is complete."""
        count = len(self.messages())
        self.begin(question)
        return self.answer(count + 2)

    def answer(self, messages):
        self.wait(lambda: len(self.messages()) == messages and "tokens in" in self.text("facts"))
        self.wait(lambda: self.one("send").is_displayed())
        return self.messages()[-1]

    def messages(self):
        script = "return [...document.querySelectorAll('#log .asked, #log .answer')].map((one) => one.textContent)"
        return self.driver.execute_script(script)

    def boxes(self):
        """Return the drawn boxes as fractions of the picture on the screen."""
        return self.driver.execute_script(
            """const frame = document.querySelector('#picture').getBoundingClientRect();
            return [...document.querySelectorAll('#boxes rect')].map((rectangle) => {
                const box = rectangle.getBoundingClientRect();
                return [(box.left - frame.left) / frame.width, (box.top - frame.top) / frame.height,
                    (box.right - frame.left) / frame.width, (box.bottom - frame.top) / frame.height];
            });"""
        )

    def requests(self):
        """Return every address that the browser has requested."""
        entries = [json.loads(entry["message"])["message"] for entry in self.driver.get_log("performance")]
        return [one["params"]["request"]["url"] for one in entries if one["method"] == "Network.requestWillBeSent"]


@contextmanager
def browser():
    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium") or ""
    for option in OPTIONS:
        options.add_argument(option)
    options.set_capability("goog:loggingPrefs", {"performance": "ALL", "browser": "ALL"})
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
    limits = Limits(image_pixels=1_000_000, new_tokens=LONGEST)
    with serving(load("tiny", device="cpu"), "tiny", ui=True, limits=limits) as running:
        yield running


@pytest.fixture
def tab(driver, server):
    return Tab(driver, server.url)


@pytest.fixture(scope="module")
def assistant():
    return load("tiny", device="cpu")


@pytest.fixture
def slow(server, monkeypatch):
    """The service, with the speed of a large model."""
    step = server.service.engine.step
    monkeypatch.setattr(server.service.engine, "step", lambda: (time.sleep(0.2), step())[1])
    return server.service


def is_idle(service):
    return service.engine.running == service.admission.active == 0


def test_streamed_answer_equals_offline_and_its_costs_are_shown(tab, slow, assistant):
    tab.show(RECEIPT)
    tab.driver.execute_script(RECORD_TEXTS)
    answer = tab.ask(BOX)
    assert answer == assistant.ask(RECEIPT, BOX, max_new_tokens=LONGEST)
    texts = tab.driver.execute_script("return window.texts")
    assert len(texts) > 2
    assert all(answer.startswith(text) for text in texts)
    budget = pixel_budgets(assistant, RECEIPT_SIZE)[-1]
    canvas = " \N{MULTIPLICATION SIGN} ".join(map(str, budget["canvas"]))
    for fact in (f"{canvas} pixels", f"({budget['visual_tokens']} visual)", "first token", "tokens in"):
        assert fact in tab.text("facts")


def test_conversation_continues_and_last_boxes_are_drawn(tab, assistant, server):
    tab.show(RECEIPT)
    first = tab.ask(TOTAL)
    assert first == assistant.ask(RECEIPT, TOTAL, max_new_tokens=LONGEST)
    images = server.service.encoder.stats.images
    second = tab.ask(BOX)
    messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": TOTAL}]}]
    messages += [{"role": "assistant", "content": first}, {"role": "user", "content": BOX}]
    assert second == assistant.chat(messages, [RECEIPT], max_new_tokens=LONGEST)
    assert tab.messages() == [TOTAL, first, BOX, second]
    assert server.service.encoder.stats.images == images
    (drawn,), (box,) = tab.boxes(), list(parse_boxes(second))
    assert drawn == pytest.approx(box, abs=0.01)
    if path := os.environ.get("SCREENSHOT"):
        time.sleep(0.5)
        shot = Image.open(BytesIO(tab.driver.get_screenshot_as_png())).convert("RGB")
        shot.quantize(256, kmeans=3, dither=Image.Dither.NONE).save(path, optimize=True)
    tab.ask(TOTAL)
    assert tab.boxes() == []


def test_slider_shows_the_cost_of_the_budget_of_the_request(tab, assistant):
    tab.show(RECEIPT)
    budgets = pixel_budgets(assistant, RECEIPT_SIZE)
    index = next(index for index, budget in enumerate(budgets) if budget["side"] == 512)
    tab.one("budget").send_keys(Keys.HOME, *[Keys.ARROW_RIGHT] * index)
    width, height = budgets[index]["canvas"]
    shape = f"{width} \N{MULTIPLICATION SIGN} {height} pixels"
    assert tab.text("cost") == (
        f"Seen as {shape}: {budgets[index]['visual_tokens']} visual tokens, "
        f"{budgets[index]['tower_flops'] / 1e9:.1f} GFLOP in the tower, "
        f"{budgets[index]['tower_flops'] / budgets[-1]['tower_flops']:.0%} of the whole budget.".replace("%", " %")
    )
    smaller = load("tiny", device="cpu", pixels=assistant.processor.image_processor.within(512**2))
    assert tab.ask(TOTAL) == smaller.ask(RECEIPT, TOTAL, max_new_tokens=LONGEST)
    assert shape in tab.text("facts")
    assert f"({budgets[index]['visual_tokens']} visual)" in tab.text("facts")


def test_one_click_asks_an_example_question(tab, assistant):
    tab.all("#examples button")[0].click()
    first = tab.answer(2)
    assert first == assistant.ask(RECEIPT, TOTAL, max_new_tokens=LONGEST)
    tab.all("#examples button")[1].click()
    tab.answer(4)
    tab.all("#examples button")[3].click()  # of the other picture, which starts a new conversation
    tab.wait(lambda: tab.messages()[:1] == ["What colour is the diamond?"])
    tab.answer(2)


@pytest.mark.parametrize("event", ["drop", "paste"])
def test_picture_can_be_dropped_and_pasted(tab, assistant, event):
    tab.driver.execute_script(TRANSFER, event, base64.b64encode(RECEIPT.read_bytes()).decode())
    tab.wait(lambda: "Seen as" in tab.text("cost"))
    assert tab.ask(TOTAL) == assistant.ask(RECEIPT, TOTAL, max_new_tokens=LONGEST)


@pytest.mark.parametrize(
    ("data", "line"),
    [
        (b"no picture", "The file is not a picture, or it is damaged."),
        (b"", "The file is not a picture, or it is damaged."),
        (png(picture(1001, 1000)), "the image has 1.0 megapixels; the limit is 1"),
        (b"0" * (15 * 2**20 + 1), "The picture has 15.0 MiB; the limit is 15.0 MiB."),
    ],
    ids=["text", "empty", "too many pixels", "too large"],
)
def test_bad_file_gives_one_line_and_the_next_file_works(tab, tmp_path, data, line):
    file = tmp_path / "bad.png"
    file.write_bytes(data)
    tab.choose(file)
    tab.wait(lambda: tab.text("error") == line)
    assert not tab.one("frame").is_displayed()
    tab.begin(TOTAL)
    tab.wait(lambda: "There is no picture yet" in tab.text("error"))
    tab.show(RECEIPT)
    assert not tab.one("error").is_displayed()
    assert not tab.messages()


def test_api_error_gives_one_line_and_keeps_the_question(tab, assistant):
    tab.show(RECEIPT)
    tab.begin("an <image>")
    tab.wait(lambda: "<image>" in tab.text("error"))
    assert "\n" not in tab.text("error")
    assert tab.one("question").get_attribute("value") == "an <image>"
    assert not tab.messages()
    tab.one("question").clear()
    assert tab.ask(TOTAL) == assistant.ask(RECEIPT, TOTAL, max_new_tokens=LONGEST)


def test_text_is_never_read_as_html(tab):
    tab.show(RECEIPT)
    question = "<b>bold</b><script>document.title = 'x'</script>"
    tab.ask(question)
    assert tab.messages()[0] == question
    assert not tab.all("#log b, #log script")


@pytest.mark.parametrize("way", ["button", "escape"])
def test_stopped_answer_stays_and_its_slot_is_free(tab, slow, assistant, way):
    tab.show(RECEIPT)
    tab.begin(BOX)
    tab.wait(lambda: len(tab.messages()) == 2 and len(tab.messages()[1]) > 5)
    tab.one("stop").click() if way == "button" else tab.one("question").send_keys(Keys.ESCAPE)
    tab.wait(lambda: is_idle(slow) and tab.one("send").is_displayed())
    assert "Stopped after" in tab.text("facts")
    answer = tab.messages()[1]
    assert 5 < len(answer) < len(str(assistant.ask(RECEIPT, BOX, max_new_tokens=LONGEST)))
    tab.ask(TOTAL)
    assert tab.messages()[:2] == [BOX, answer]


@pytest.mark.parametrize("way", ["new picture", "closed page"])
def test_abandoned_answer_frees_its_slot(tab, slow, way):
    tab.show(RECEIPT)
    tab.begin(BOX)
    tab.wait(lambda: slow.engine.running == 1)
    if way == "new picture":
        tab.choose(RECEIPT.with_name("scene.png"))
        tab.wait(lambda: not tab.messages())
    else:
        tab.driver.get("about:blank")
    tab.wait(lambda: is_idle(slow))


def test_new_conversation_keeps_the_picture(tab, assistant):
    tab.show(RECEIPT)
    first = tab.ask(BOX)
    tab.one("clear").click()
    assert not tab.messages()
    assert not tab.boxes()
    assert tab.ask(BOX) == first


def test_wrong_key_prompts_for_another_key(driver):
    with serving(load("tiny", device="cpu"), "tiny", ui=True, api_key="clé") as running:
        tab = Tab(driver, running.url, "#key-form")
        tab.wait(lambda: tab.one("key").is_displayed())
        assert not tab.all("#examples button")
        assert "needs a key" in tab.text("key-form")
        assert not tab.one("error").is_displayed()
        if path := os.environ.get("SCREENSHOT_ALL"):
            driver.save_screenshot(f"{path}/key.png")
        tab.one("key").send_keys("wrong", Keys.ENTER)
        tab.wait(lambda: "The key is wrong" in tab.text("key-form"))
        tab.one("key").send_keys("clé", Keys.ENTER)
        tab.wait(lambda: tab.all("#examples button") and not tab.one("key-form").is_displayed())
        tab.show(RECEIPT)
        assert tab.ask(TOTAL)
        driver.refresh()
        tab.wait(lambda: tab.all("#examples button"))  # the key is kept for this tab
        assert driver.execute_script("return localStorage.length") == 0
        driver.execute_script("sessionStorage.clear()")


def test_page_works_with_keyboard_and_visible_focus(tab, assistant):
    tab.show(RECEIPT)  # a file dialog cannot be driven; the rest is keys
    keys = webdriver.ActionChains(tab.driver)
    assert tab.driver.switch_to.active_element.get_attribute("id") == "question"
    keys.send_keys(TOTAL, Keys.ENTER).perform()
    assert tab.answer(2) == assistant.ask(RECEIPT, TOTAL, max_new_tokens=LONGEST)
    tab.driver.execute_script("document.activeElement.blur(); document.querySelector('h1').focus()")
    reached = []
    for _ in range(20):
        webdriver.ActionChains(tab.driver).send_keys(Keys.TAB).perform()
        active = tab.driver.switch_to.active_element
        shown = tab.one("drop") if active.get_attribute("id") == "file" else active
        if active.tag_name != "body":
            assert shown.value_of_css_property("outline-style") == "solid"
            reached.append(active.get_attribute("id") or active.text)
    assert {"file", "budget", "log", "question", "send", "clear", TOTAL} <= set(reached)
    assert tab.one("log").get_attribute("aria-live") == "polite"


def test_page_fits_a_phone_and_a_screen_in_light_and_dark(tab):
    colours = set()
    for width, height, scheme in ((390, 844, "dark"), (1280, 800, "light"), (1280, 800, "dark")):
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 500}
        tab.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        tab.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
        tab = Tab(tab.driver, tab.url.removesuffix("/ui/"))
        tab.show(RECEIPT)
        sides = tab.driver.execute_script("return [document.documentElement.scrollWidth, window.innerWidth]")
        assert sides[0] <= sides[1]
        colours.add((scheme, tab.one("drop").value_of_css_property("background-color")))
        if path := os.environ.get("SCREENSHOT_ALL"):
            tab.ask(BOX)
            tab.driver.save_screenshot(f"{path}/{width}-{scheme}.png")
    assert len(colours) == len({colour for _, colour in colours}) == 2
    tab.driver.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
    tab.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})


def test_no_request_left_this_machine_and_no_error_was_logged(tab, server):
    """Runs last: it checks the requests and logs of all earlier tests."""
    urls = tab.requests()
    assert len(urls) > 20
    hosts = {urlsplit(url).netloc for url in urls if not url.startswith(("data:", "blob:", "about:"))}
    assert all(host.startswith("127.0.0.1:") for host in hosts)
    assert set(ADDRESSES) <= {"127.0.0.1", "localhost"}
    messages = [entry["message"] for entry in tab.driver.get_log("browser")]
    # Chromium reports answers with an error status, which the page shows, as failures to load.
    assert [message for message in messages if "Failed to load resource" not in message] == []
