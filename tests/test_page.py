"""The web page without a browser: its files, its headers, and the numbers that it shows."""

from __future__ import annotations

import copy
import json
import re

import pytest
from conftest import picture
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from serving import png, request, serving

from convllava import InputError, geometry
from convllava.geometry import Size
from convllava.inference import Assistant
from convllava.serving.limits import Limits
from convllava.serving.page import EXAMPLES, STATIC, pixel_budgets


@pytest.fixture(scope="module")
def server(parts):
    own = Assistant(copy.deepcopy(parts[0]), parts[1])
    limits = Limits(body_bytes=400_000, image_pixels=200_000)
    with serving(own, slots=1, api_key="key", ui=True, limits=limits) as running:
        yield running


def get(server, path, **headers):
    """Return status, headers and body."""
    connection = server.connect()
    connection.request("GET", path, headers=headers)
    response = connection.getresponse()
    return response.status, dict(response.headers), response.read()


def info(server, query=""):
    status, _, body = get(server, f"/ui/info{query}", Authorization="Bearer key")
    return status, json.loads(body)


def test_page_is_served_without_key_and_only_with_ui(server, parts):
    for path in ("/ui/", "/ui/page.js", "/ui/page.css", "/ui/examples/receipt.png"):
        assert get(server, path)[0] == 200
    for path in ("/", "/ui"):
        status, headers, _ = get(server, path)
        assert status in (302, 307)
        assert headers["location"].endswith("/ui/")
    with serving(Assistant(copy.deepcopy(parts[0]), parts[1]), slots=1) as other:
        assert get(other, "/ui/")[0] == get(other, "/ui/info")[0] == get(other, "/")[0] == 404


def test_page_cannot_load_or_send_anything_outside_its_server(server):
    for path in ("/ui/", "/ui/page.js", "/ui/examples/scene.png"):
        policy = get(server, path)[1]["content-security-policy"]
        assert "default-src 'none'" in policy
        assert "unsafe" not in policy
        assert set(re.findall(r"-src ([^;]+)", policy)) == {"'none'", "'self'", "'self' data:"}
    for file in STATIC.iterdir():
        text = file.read_text(encoding="utf-8")
        assert set(re.findall(r"https?://[^'\" ]+", text)) <= {"http://www.w3.org/2000/svg"}
        assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\b|\son\w+=|style=", text)


@pytest.mark.parametrize("path", ["/ui/../app.py", "/ui/%2e%2e/app.py", "/ui/examples/%2e%2e/errors.py", "/ui/none"])
def test_only_files_of_the_page_are_served(server, path):
    status, _, body = get(server, path)
    assert (status, json.loads(body)["error"]["code"]) == (404, "unknown_url")


def test_info_needs_the_key(server):
    for headers in ({}, {"Authorization": "Bearer other"}):
        status, _, body = get(server, "/ui/info", **headers)
        assert (status, json.loads(body)["error"]["code"]) == (401, "invalid_api_key")


def test_info_has_model_file_limit_and_examples(server):
    status, found = info(server)
    assert (status, found["model"], found["max_file_bytes"], found["budgets"]) == (200, "test", 300_000, [])
    assert [len(example["questions"]) for example in found["examples"]] == [3, 3]
    for example in found["examples"]:
        assert get(server, f"/ui/{example['image']}")[2] == (EXAMPLES.parent / example["image"]).read_bytes()


@pytest.mark.parametrize(
    ("query", "status", "message"),
    [
        ("?width=500&height=401", 422, "the image has 0.2 megapixels; the limit is 0.2"),
        ("?width=0&height=4", 422, "the image is 0x4"),
        ("?width=-7&height=-7", 422, "the image is -7x-7"),
        ("?width=1&height=3000", 422, "aspect ratio"),
        ("?width=x&height=4", 400, "width: Input should be a valid integer"),
    ],
)
def test_info_rejects_unsupported_sizes(server, query, status, message):
    found, body = info(server, query)
    assert found == status
    assert message in body["error"]["message"]


@given(height=st.integers(64, 700), width=st.integers(64, 700))
def test_budgets_match_the_image_processor(parts, height, width):
    processor = parts[1].image_processor
    budgets = pixel_budgets(Assistant(*parts), Size(height, width))
    assert [budget["max_pixels"] for budget in budgets[:-1]] == [budget["side"] ** 2 for budget in budgets[:-1]]
    assert budgets[-1]["max_pixels"] is None
    for budget in budgets:
        columns, rows = (side // 64 for side in budget["canvas"])
        assert rows * columns * 64**2 <= min(budget["max_pixels"] or processor.budget, processor.budget)
        assert budget["visual_tokens"] == rows * (columns + 1)
        assert budget["image"] == pytest.approx([0, 0, 1, 1])
    flops = [budget["tower_flops"] for budget in budgets]
    assert flops == sorted(flops)


@pytest.mark.parametrize("mode", ["native", "square", "crop"])
def test_box_positions_on_the_page_equal_the_placement(parts, mode):
    processor = copy.deepcopy(parts[1])
    processor.image_processor.change(mode=mode, side=256)
    size, box = Size(300, 500), (0.4, 0.3, 0.6, 0.7)
    (*_, budget) = pixel_budgets(Assistant(parts[0], processor), size)
    left, top, width, height = budget["image"]
    scaled = zip(box, [left, top] * 2, [width, height] * 2, strict=True)
    found = [(value - start) / length for value, start, length in scaled]
    x0, y0, x1, y1 = processor.image_processor.placement(size).box_from_normalised(box)
    assert found == pytest.approx([x0 / 500, y0 / 300, x1 / 500, y1 / 300])


def test_budget_of_the_page_is_used_and_its_cost_is_right(parts):
    processor = copy.deepcopy(parts[1])
    processor.image_processor.change(min_pixels=64**2, max_pixels=512**2)
    own = Assistant(copy.deepcopy(parts[0]), processor)
    image = png(picture(400, 500, 1))
    with serving(own, slots=1, ui=True) as running:
        budgets = json.loads(get(running, "/ui/info?width=500&height=400")[2])["budgets"]
        assert [budget["side"] for budget in budgets] == [256, 320, 384, 448, 512]
        for budget in (budgets[0], budgets[-1]):
            extra = {"mm_processor_kwargs": {"max_pixels": budget["max_pixels"]}} if budget["max_pixels"] else {}
            usage = running.post(request("what?", image, **extra))[1]["usage"]
            assert usage["prompt_tokens_details"]["image_tokens"] == budget["visual_tokens"]
        assert budgets[0]["visual_tokens"] < budgets[-1]["visual_tokens"]


def test_page_finds_the_same_boxes_as_python():
    (line,) = re.findall(r"const BOX = /(.*)/g;", (STATIC / "page.js").read_text(encoding="utf-8"))
    assert line == geometry._BOX.pattern


def test_example_images_are_within_the_default_limits():
    for path in EXAMPLES.glob("*.png"):
        with Image.open(path) as image:
            assert image.width * image.height < Limits().image_pixels
        assert path.stat().st_size < Limits().body_bytes * 3 // 4


def test_extreme_aspect_ratio_is_an_input_error(parts):
    with pytest.raises(InputError, match="aspect ratio"):
        pixel_budgets(Assistant(*parts), Size(1, 1000))
