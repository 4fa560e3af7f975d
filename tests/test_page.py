"""The page, driven in headless Chromium against the real server; its camera is Chromium's fake one."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urljoin

import httpx
import numpy as np
import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient
from numpy.typing import NDArray
from playwright.sync_api import Browser, Page, Playwright, expect, sync_playwright

from models.params import Params
from models.spec import MODELS, style_names
from stream.server import api, pages
from stream.server.errors import Refused, problem
from stream.server.reach import opener
from stream.source import open_source
from tests.fakes import PATIENCE, FakeLaunched, FakeStylizer
from tests.serving import Serving, serving

CHROMIUM = shutil.which("chromium")
FLAGS = [
    "--no-sandbox",
    "--use-fake-device-for-media-stream=fps=30",
    "--disable-features=WebRtcHideLocalIpsWithMdns",
    "--allow-loopback-in-peer-connection",
    "--autoplay-policy=no-user-gesture-required",
    "--disable-background-networking",
    "--disable-component-update",
    "--mute-audio",
]
BOX = (512, 288)
LIVE = "#pill[data-phase=live]"
MS = 1000 * PATIENCE
PICTURES_MOST = 400_000  # bytes of the style cards

needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="needs chromium")


class PromptedStylizer(FakeStylizer):
    """Inverts; at the prompt "neon" the picture is black."""

    def step(self, state: Any, image: NDArray[np.uint8], params: Params) -> FakeLaunched:
        launched = super().step(state, image, params)
        return FakeLaunched(image * 0, launched.stages_ms) if params.style.prompt == "neon" else launched


def load(model: str, size: tuple[int, int], engine: str, say: Callable[[str], None], **build: Any) -> FakeStylizer:
    return PromptedStylizer(size)


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Serving]:
    with serving(tmp_path_factory.mktemp("page"), load, BOX) as server:
        yield server


@pytest.fixture(scope="module")
def playwright() -> Iterator[Playwright]:
    expect.set_options(timeout=MS)
    with sync_playwright() as driver:
        yield driver


@pytest.fixture(scope="module")
def browser(playwright: Playwright) -> Iterator[Browser]:
    with playwright.chromium.launch(
        executable_path=CHROMIUM, args=[*FLAGS, "--use-fake-ui-for-media-stream"]
    ) as running:
        yield running


@pytest.fixture
def page(browser: Browser) -> Iterator[Page]:
    with browser.new_context() as context:
        context.set_default_timeout(MS)
        yield context.new_page()


@pytest.fixture(scope="module")
def live(browser: Browser, served: Serving) -> Iterator[Page]:
    """A page on which Start was pressed and the camera is seen stylized."""
    with browser.new_context(accept_downloads=True) as context:
        context.set_default_timeout(MS)
        page = context.new_page()
        page.goto(served.url)
        page.locator(".card").first.wait_for()
        page.click("#start")
        page.locator(LIVE).wait_for()
        yield page


def colour(page: Page, selector: str) -> list[float]:
    """Mean RGB of what a <video> or <img> shows, read through a canvas."""
    script = """(element) => {
      const canvas = Object.assign(document.createElement("canvas"), { width: 32, height: 18 });
      const pen = canvas.getContext("2d");
      pen.drawImage(element, 0, 0, 32, 18);
      const pixels = pen.getImageData(0, 0, 32, 18).data;
      const sums = [0, 0, 0];
      pixels.forEach((value, n) => n % 4 < 3 && (sums[n % 4] += value / (32 * 18)));
      return sums;
    }"""
    return list(page.locator(selector).evaluate(script))


def becomes(page: Page, what: Callable[[], bool], within_ms: float = MS) -> None:
    """Look until it is so."""
    for _ in range(round(within_ms / 50)):
        if what():
            return
        page.wait_for_timeout(50)
    raise AssertionError(f"not within {within_ms:.0f} ms")


# what is served


@pytest.fixture(scope="module")
def client() -> Iterator[TestClient]:
    app = FastAPI()
    app.include_router(pages.router())
    app.add_exception_handler(Refused, lambda request, error: problem(error.status, error.message))
    with TestClient(app) as client:
        yield client


@pytest.mark.parametrize("path", ["/", "/view/cam", "/view/cam?obs=1"])
def test_pages_allow_no_code_but_their_own(client: TestClient, path: str) -> None:
    answer = client.get(path)
    policy = dict(part.split(" ", 1) for part in answer.headers["content-security-policy"].split("; "))
    assert answer.status_code == 200
    assert answer.headers["content-type"] == "text/html; charset=utf-8"
    assert answer.headers["referrer-policy"] == "no-referrer"
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert policy["default-src"] == "'none'"
    assert policy["script-src"] == policy["style-src"] == policy["connect-src"] == "'self'"
    assert "style=" not in answer.text
    assert answer.text.count("<script") == answer.text.count('<script type="module" src="/static/')


@pytest.mark.parametrize(
    ("path", "kind", "cache"),
    [
        ("js/page.js", "text/javascript; charset=utf-8", "no-cache"),
        ("css/page.css", "text/css; charset=utf-8", "no-cache"),
        ("icon.svg", "image/svg+xml", "no-cache"),
        ("styles/oil-painting.jpg", "image/jpeg", "public, max-age=86400"),
    ],
)
def test_files_are_asked_for_again_and_answered_not_modified(
    client: TestClient, path: str, kind: str, cache: str
) -> None:
    first = client.get(f"/static/{path}")
    again = client.get(f"/static/{path}", headers={"If-None-Match": first.headers["etag"]})
    assert (first.status_code, first.headers["content-type"], first.headers["cache-control"]) == (200, kind, cache)
    assert (again.status_code, again.content) == (304, b"")


@pytest.mark.parametrize(
    "path", ["/static/../server/pages.py", "/static/%2e%2e/__init__.py", "/static/index.html", "/static/"]
)
def test_nothing_but_the_pages_files_is_served(client: TestClient, path: str) -> None:
    assert client.get(path).status_code == 404


def test_every_style_has_a_small_picture_and_all_pictures_a_credit() -> None:
    folder = pages.WEB / "styles"
    names = [names[0].replace(" ", "-") for names in style_names(MODELS["mini"].folder).values()]
    for name in names:
        assert (folder / f"{name}.jpg").is_file()
        assert (folder / "large" / f"{name}.jpg").is_file()
    assert sum(path.stat().st_size for path in folder.rglob("*.jpg")) < PICTURES_MOST
    assert "CC0" in (folder / "README.md").read_text()


def test_no_file_of_the_page_fetches_from_another_site() -> None:
    foreign = re.compile(r"""(src|href|from|import|url|fetch)\s*[=(]?\s*["'(]?\s*(https?:)?//""")
    files = [path for path in pages.WEB.rglob("*") if path.suffix in {".html", ".js", ".css", ".svg"}]
    assert files
    for path in files:
        assert not foreign.search(path.read_text()), path.name


# the page in a browser


@needs_chromium
def test_the_page_opens_quietly_and_asks_nobody_else(page: Page, served: Serving) -> None:
    said: list[str] = []
    asked: list[str] = []
    page.on("console", lambda message: said.append(f"{message.type}: {message.text}"))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.on("request", lambda request: asked.append(request.url))
    page.goto(served.url)
    expect(page.locator(".card")).to_have_count(len(style_names(MODELS["mini"].folder)))
    expect(page.locator("#words")).to_contain_text("press Start")
    page.wait_for_load_state("networkidle")
    assert said == []
    assert [url for url in asked if not url.startswith((served.url, "blob:"))] == []


@needs_chromium
def test_ice_servers_of_a_link_header_and_the_clock_of_the_quickest_answer(page: Page, served: Serving) -> None:
    page.goto(served.url)
    link = '<stun:s:1>; rel="ice-server", <turn:t:2?transport=udp>; rel="ice-server"; username="u"; credential="a,b;c"'
    servers = page.evaluate("(link) => import('/static/js/peer.js').then((m) => m.iceServersOf(link))", link)
    turn = {"urls": "turn:t:2?transport=udp", "username": "u", "credential": "a,b;c"}
    assert servers == [{"urls": "stun:s:1"}, turn]
    local = page.evaluate("""() => import("/static/js/timing.js").then(({ Clock }) => {
      const clock = new Clock();
      clock.add(100, 180, 5090); // 80 ms there and back
      clock.add(200, 210, 5155); // 10 ms: believed
      return clock.local(5155);
    })""")
    assert local == 205


@needs_chromium
def test_start_shows_the_camera_stylized_beside_itself(live: Page) -> None:
    before, after = colour(live, "#before"), colour(live, "#after")
    for own, stylized in zip(before, after, strict=True):
        assert abs((255 - own) - stylized) < 40, (before, after)
    expect(live.locator("#start")).to_have_text("Stop")
    expect(live.locator("[data-number=latency] .note")).to_contain_text("to screen")  # by the data channels' times
    expect(live.locator("[data-number=latency] .note")).to_contain_text("to server")
    expect(live.locator("[data-number=stages] .note")).to_contain_text("unet")
    expect(live.locator("#announcer")).to_have_text("live")


@needs_chromium
def test_a_style_card_is_seen_within_a_second(live: Page, served: Serving) -> None:
    live.locator(".card", has_text="neon").click()
    becomes(live, lambda: max(colour(live, "#after")) < 40, within_ms=1000)
    stream = served.hub.get("cam")
    assert stream is not None
    assert stream.params.style.prompt == "neon"
    expect(live.get_by_role("textbox", name="Prompt")).to_have_value("neon")
    live.get_by_role("textbox", name="Prompt").fill("ink drawing")
    expect(live.get_by_role("radio", name="ink drawing")).to_be_checked()
    becomes(live, lambda: max(colour(live, "#after")) > 80)


@needs_chromium
def test_a_bad_setting_is_refused_in_words_at_its_field(live: Page, served: Serving) -> None:
    stream = served.hub.get("cam")
    assert stream is not None
    live.locator("#set-style-steps").fill("40")
    refusal = live.locator("#set-style-steps-refusal")
    expect(refusal).to_contain_text("8")
    expect(live.locator("#set-style-steps")).to_have_attribute("aria-invalid", "true")
    assert stream.params.style.steps == 1
    live.locator("#set-style-steps").fill("2")
    expect(refusal).to_be_hidden()
    becomes(live, lambda: stream.params.style.steps == 2)
    live.get_by_label("reset Steps").click()
    becomes(live, lambda: stream.params.style.steps == 1)


@needs_chromium
def test_every_setting_of_the_schema_has_a_labelled_field(live: Page) -> None:
    keys = live.locator("[data-key]").evaluate_all("(boxes) => boxes.map((box) => box.dataset.key)")
    settings = {f"{section}.{name}" for section, values in Params().model_dump().items() for name in values}
    assert sorted(keys) == sorted(settings)
    for key in keys:
        assert live.locator(f"label[for=set-{key.replace('.', '-')}]").count() == 1


@needs_chromium
def test_snapshot_and_recording_are_downloaded(live: Page, tmp_path: Path) -> None:
    with live.expect_download() as snapshot:
        live.click("#snapshot")
    assert snapshot.value.path().read_bytes().startswith(b"\x89PNG")
    live.click("#record")
    expect(live.locator("#record-words")).to_contain_text("Stop 0:01")
    live.click("#record")
    link = live.locator(".toast a")
    link.wait_for()
    with live.expect_download() as recording:
        link.click()
    film = tmp_path / "film.mp4"
    recording.value.save_as(film)
    source = open_source(str(film))
    assert sum(1 for _ in source.frames()) > 10
    source.close()
    live.locator(".toast .close").first.click()


@needs_chromium
def test_a_source_that_is_not_allowed_is_refused_with_a_hint(live: Page, served: Serving) -> None:
    live.get_by_role("button", name="Add source").click()
    live.locator("#source-url").fill("rtsp://10.9.8.7/stream")
    live.locator("#source-form button[type=submit]").click()
    expect(live.locator("#source-refusal")).to_contain_text("10.9.8.7")
    live.keyboard.press("Escape")
    assert [stream.name for stream in served.hub.streams()] == ["cam"]


@needs_chromium
def test_a_source_by_its_url_is_shown_in_the_style_that_was_chosen(page: Page, served: Serving) -> None:
    page.goto(served.url)
    page.locator(".card", has_text="neon").click()
    page.get_by_role("button", name="Add source").click()
    page.get_by_role("button", name="Demo film").click()
    page.locator(LIVE).wait_for()
    becomes(page, lambda: max(colour(page, "#after")) < 40)
    becomes(page, lambda: max(colour(page, "#before-still")) > 40)
    expect(page.locator("#stream")).to_have_value("film")
    served.hub.remove("film")
    expect(page.locator("#words")).to_contain_text("press Start")


@needs_chromium
def test_a_model_is_chosen_where_there_are_several(
    page: Page, served: Serving, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [{"name": name, "ready": True, "styles": []} for name in ("mini", "sd15-lcm")]
    monkeypatch.setattr(api, "available", lambda: rows)
    stream = served.hub.open("both")
    try:
        stream.feed(opener("demo"), "demo", retry=True)
        page.goto(f"{served.url}/?stream=both")
        page.locator(LIVE).wait_for()
        expect(page.get_by_label("Model", exact=True)).to_have_value("mini")
        page.get_by_label("Model", exact=True).select_option("sd15-lcm")
        becomes(page, lambda: stream.model == "sd15-lcm")
        expect(page.locator("#set-style-steps")).to_have_value("4")
        page.locator(LIVE).wait_for()
        stream.swap("mini")
        expect(page.get_by_label("Model", exact=True)).to_have_value("mini")
    finally:
        served.hub.remove("both")


@needs_chromium
def test_a_connection_that_is_lost_comes_back_by_itself(page: Page, served: Serving) -> None:
    served.hub.open("film").feed(opener("demo"), "demo", retry=True)
    with page.expect_response("**/whep/film") as answered:
        page.goto(f"{served.url}/view/film?obs=1")
    state = page.locator("html")
    expect(state).to_have_attribute("data-state", "live")
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgba(0, 0, 0, 0)"
    expect(page.locator("#controls")).to_be_hidden()
    httpx.delete(urljoin(served.url, answered.value.headers["location"]))
    expect(state).to_have_attribute("data-state", "reconnecting")
    expect(state).to_have_attribute("data-state", "live")
    served.hub.remove("film")


@needs_chromium
def test_pictures_come_over_http_where_webrtc_cannot_get_through(page: Page, served: Serving) -> None:
    page.add_init_script("""
      const Real = RTCPeerConnection;
      globalThis.RTCPeerConnection = class extends Real {
        constructor(configuration) { super({ ...configuration, iceTransportPolicy: "relay" }); }
      };""")
    served.hub.open("blocked").feed(opener("demo"), "demo", retry=True)
    page.goto(f"{served.url}/?stream=blocked")
    expect(page.locator("#words")).to_contain_text("MJPEG")
    becomes(page, lambda: max(colour(page, "#after-still")) > 0)
    expect(page.locator(".toast")).to_contain_text("UDP")
    becomes(page, lambda: colour(page, "#before-still") != colour(page, "#after-still"))
    served.hub.remove("blocked")


@needs_chromium
@pytest.mark.parametrize(
    ("refuse", "words"),
    [
        ("getUserMedia = () => Promise.reject(new DOMException('', 'NotFoundError'))", "No camera was found"),
        ("getUserMedia = () => Promise.reject(new DOMException('', 'NotReadableError'))", "Another program"),
        (None, "--tls-cert"),
    ],
)
def test_why_there_is_no_camera_is_said_with_help(page: Page, served: Serving, refuse: str | None, words: str) -> None:
    script = f"navigator.mediaDevices.{refuse}" if refuse else "delete Navigator.prototype.mediaDevices"
    page.add_init_script(script)
    page.goto(served.url)
    page.locator(".card").first.wait_for()
    page.click("#start")
    expect(page.locator("#trouble")).to_contain_text(words)
    expect(page.locator("#start")).to_have_text("Start")


@needs_chromium
def test_a_camera_that_the_user_does_not_allow_is_explained(playwright: Playwright, served: Serving) -> None:
    with playwright.chromium.launch(
        executable_path=CHROMIUM, args=[*FLAGS, "--use-fake-ui-for-media-stream=deny"]
    ) as browser:
        page = browser.new_page()
        page.goto(served.url)
        page.locator(".card").first.wait_for()
        page.click("#start")
        expect(page.locator("#trouble")).to_contain_text("may not use the camera")


@needs_chromium
@pytest.mark.parametrize("width", [360, 820, 1280])
def test_nothing_is_wider_than_the_screen(page: Page, served: Serving, width: int) -> None:
    page.set_viewport_size({"width": width, "height": 780})
    page.goto(served.url)
    page.locator(".card").first.wait_for()
    for summary in page.locator("summary").all():
        summary.click()
    assert page.evaluate("document.scrollingElement.scrollWidth") <= width


@needs_chromium
def test_the_keyboard_reaches_everything_and_shows_where_it_is(page: Page, served: Serving) -> None:
    page.goto(served.url)
    page.locator(".card").first.wait_for()
    reached = set()
    for _ in range(40):
        page.keyboard.press("Tab")
        name, outlined = page.evaluate("""() => {
          const element = document.activeElement;
          const shown = [element, element.querySelector("span"), element.nextElementSibling].filter(Boolean);
          const outlined = shown.some((one) => getComputedStyle(one).outlineStyle !== "none");
          const name = element.id || element.name || element.textContent.trim();
          return [element === document.body ? "" : name, outlined];
        }""")
        if name:
            reached.add(name)
            assert outlined, name
    everything = {"stream", "handle", "start", "camera", "microphone", "sound", "mirror", "compare", "fullscreen"}
    everything |= {"snapshot", "record", "style", "set-style-prompt", "set-style-strength", "set-style-seed"}
    everything |= {"Outputs", "OBS", "Phone", "Notes", "Advanced", "More about the style"}
    assert everything <= reached, everything - reached
    page.locator("#handle").focus()
    page.keyboard.press("ArrowRight")
    expect(page.locator("#handle")).to_have_attribute("aria-valuenow", "52")
    page.keyboard.press("End")
    expect(page.locator("#handle")).to_have_attribute("aria-valuenow", "100")
    page.locator("input[name=style]:checked").focus()
    page.keyboard.press("ArrowDown")
    expect(page.get_by_role("textbox", name="Prompt")).not_to_have_value("oil painting")


@needs_chromium
def test_a_token_is_asked_for_and_not_left_in_the_address(browser: Browser, tmp_path: Path) -> None:
    with serving(tmp_path, load, tokens={"control": "s3same"}) as server, browser.new_context() as context:
        page = context.new_page()
        page.goto(server.url)
        page.locator("#token").fill("s3same")
        page.keyboard.press("Enter")
        page.locator(".card").first.wait_for()
        page.click("#start")
        page.locator(LIVE).wait_for()
        page.goto(f"{server.url}/view/cam?token=s3same&obs=1")
        expect(page.locator("html")).to_have_attribute("data-state", "live")
        assert "s3same" not in page.url
