"""The page in headless Chromium, on a phone and on a desk, light and dark."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Browser, sync_playwright

from sparse_bitnet.report.page import make_report, render
from sparse_bitnet.report.runs import read_runs

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    program = next(filter(None, map(shutil.which, NAMES)), None)
    if program is None:
        pytest.skip(f"no Chromium on this machine: none of {', '.join(NAMES)} is on the path")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=program, args=["--no-sandbox"])  # root has no sandbox
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def page_file(trained_runs: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("report") / "report.html"
    file.write_text(render(make_report(read_runs(trained_runs))), encoding="utf-8")
    return file


@pytest.mark.parametrize("width", [390, 1280])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_fits_and_follows_the_colour_scheme(browser: Browser, page_file: Path, width: int, scheme: str) -> None:
    context = browser.new_context(viewport={"width": width, "height": 844}, color_scheme=scheme, offline=True)
    page = context.new_page()
    problems: list[str] = []
    page.on("console", lambda message: problems.append(message.text))
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.on("requestfailed", lambda request: problems.append(request.url))
    page.goto(page_file.as_uri())
    assert problems == []
    assert page.evaluate("document.documentElement.scrollWidth") == width
    boxes = [chart.bounding_box() for chart in page.locator("figure svg").all()]
    assert len(boxes) == 13
    assert all(box is not None and box["width"] > 250 and box["height"] > 150 for box in boxes)
    columns = len({round(box["x"]) for box in boxes if box is not None})
    assert columns == (1 if width == 390 else 3)
    images = page.evaluate("Promise.all([...document.querySelectorAll('image')].map(i => i.decode().then(() => 1)))")
    assert len(images) == 8  # two maps and two colour bars a run, all of them whole
    ground, text = page.evaluate(
        "[document.body, document.querySelector('figure svg text')].map((e, i) => "
        "getComputedStyle(e)[i ? 'fill' : 'backgroundColor'].match(/\\d+/g).slice(0, 3).reduce((a, b) => a + +b, 0))"
    )
    assert ground > 700 > 400 > text if scheme == "light" else ground < 100 < 400 < text
    smallest = page.evaluate(
        "Math.min(...[...document.querySelectorAll('figure svg text')].map(t => t.getBoundingClientRect().height))"
    )
    assert smallest >= 8
    context.close()
