"""The page at / in a real browser, Debian's Chromium: what a person sees when all is well and when something fails.

After each test, its page must be without faults: no error in the console, nothing that the Content-Security-Policy
refused, no request except to the gateway.
"""

import asyncio
import contextlib
import itertools
import re
import shutil
import subprocess
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import pytest
import pytest_asyncio
from axe_playwright_python.async_playwright import Axe
from conftest import Start, System
from kit import ROOT, eventually, reserve_port
from kit.client import get
from kit.postgres import Cluster, Database
from kit.processes import Server, run
from playwright.async_api import Browser, ConsoleMessage, Page, Request, Route, ViewportSize, async_playwright

pytestmark = pytest.mark.asyncio(loop_scope="module")  # one browser for all tests

CHROMIUM = shutil.which("chromium")
if not CHROMIUM:
    pytest.skip(
        "the page is not tested: there is no chromium (Debian: apt-get install chromium)", allow_module_level=True
    )
FLAGS = ["--disable-gpu", "--disable-quic", "--disable-sync"]  # Playwright adds the rest that keeps a browser quiet
SHORTER = "const limit = AbortSignal.timeout; AbortSignal.timeout = time => limit.call(AbortSignal, time / 10);"
DESKTOP, PHONE = ViewportSize(width=1280, height=900), ViewportSize(width=390, height=844)
RED = "rgb(179, 38, 30)"
UP = {"gateway": "up", "service": "up", "database": "up"}

Show = Callable[..., Awaitable[Page]]


class Faults:
    """Faults in a page that nobody would see."""

    def __init__(self, page: Page, origin: str) -> None:
        self.origin = origin.rstrip("/")
        self.found: list[str] = []
        page.on("console", self._console)
        page.on("pageerror", lambda error: self.found.append(str(error)))
        page.on("request", self._request)

    def _console(self, message: ConsoleMessage) -> None:
        # Chromium itself records each failed fetch as an error. A page cannot prevent that, and this page exists to
        # show those failures; so records about the URLs that it polls are ignored, and no others.
        polled = message.location["url"] in (f"{self.origin}/api/string", f"{self.origin}/healthz")
        if not (polled and message.text.startswith("Failed to load resource: ")) and message.type != "log":
            self.found.append(message.text)

    def _request(self, request: Request) -> None:
        if not request.url.startswith((self.origin + "/", "data:")):
            self.found.append(f"asked for {request.url}")


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def browser() -> AsyncIterator[Browser]:
    async with async_playwright() as playwright:
        browser = await playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield browser
        await browser.close()


@pytest_asyncio.fixture(loop_scope="module")
async def show(browser: Browser) -> AsyncIterator[Show]:
    """Shows the page of a gateway: `await show(url, size=PHONE)`."""
    shown = []

    async def show(url: str, *, size: ViewportSize = DESKTOP, fake_clock: bool = False, script: str = "") -> Page:
        page = await browser.new_page(viewport=size, color_scheme="light", reduced_motion="reduce")
        shown.append((page, Faults(page, url)))
        if fake_clock:
            await page.clock.install()
        await page.add_init_script(script)
        await page.goto(url)
        await page.locator("#state:not([data-state=unknown])").wait_for()
        return page

    yield show
    for page, _ in shown:
        await page.close()
    assert [fault for _, faults in shown for fault in faults.found] == []


@pytest_asyncio.fixture(loop_scope="module")
async def broken(start: Start) -> AsyncIterator[Server]:
    """A gateway whose message service is down."""
    with reserve_port() as refused:
        yield await start("gateway", DOWNSTREAM_URL=f"http://127.0.0.1:{refused.getsockname()[1]}")


async def states(page: Page) -> dict[str, str]:
    """The word in each box."""
    return {part: await page.locator(f"#{part} .word").inner_text() for part in UP}


async def red(page: Page) -> list[str]:
    """The boxes with a red border."""
    colours = "boxes => boxes.map(box => [box.id, getComputedStyle(box).borderTopColor])"
    return [part for part, colour in await page.locator(".part").evaluate_all(colours) if colour == RED]


async def becomes(page: Page, expected: dict[str, str], down: list[str]) -> None:
    async def reached() -> bool:
        assert (await states(page), await red(page)) == (expected, down)
        return True

    await eventually(reached, within=10, every=0.1)


async def shown(page: Page) -> str:
    """The message as the page shows it."""
    return await page.locator("#message").inner_text()


async def test_curl_is_told_where_the_api_is(system: System) -> None:
    """In the first lines of the HTML."""
    answer = await get(system.gateway.url + "/")
    assert answer.headers["Content-Type"] == "text/html; charset=utf-8"
    first = "\n".join(answer.body.decode().splitlines()[:5])
    assert "curl http://localhost:8000/api/string" in first
    assert "/openapi.yaml" in first
    assert "/metrics" in first


async def test_it_works_from_a_checkout_with_crlf(
    start: Start, show: Show, empty_database: Database, tmp_path: Path
) -> None:
    """The browser runs the script and shows the message from schema.sql."""
    shutil.copytree(ROOT / "chassis", tmp_path / "chassis", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    for file in ROOT.iterdir():
        if file.suffix in (".html", ".py", ".sql", ".yaml"):
            (tmp_path / file.name).write_bytes(file.read_bytes().replace(b"\n", b"\r\n"))
    settings = empty_database.settings()
    applied = run(str(tmp_path / "message_service.py"), "--apply-schema", **settings)
    assert applied.returncode == 0, applied.stderr
    service = await start("message_service", cwd=tmp_path, **settings)
    gateway = await start("gateway", cwd=tmp_path, DOWNSTREAM_URL=service.url)
    assert (await shown(await show(gateway.url))).startswith("Hello from PostgreSQL!")


PROXY = """
defaults
    mode http
    timeout client 10s
    timeout server 10s
    timeout connect 10s
listen site
    bind 127.0.0.1:{port}
    http-request return status 404 unless {{ path_beg /messages/ }}
    http-request replace-path /messages/(.*) /\\1
    server gateway 127.0.0.1:{gateway}
"""


@pytest.mark.skipif(not shutil.which("haproxy"), reason="there is no haproxy (Debian: apt-get install haproxy)")
async def test_it_works_at_a_path_of_a_proxy(system: System, show: Show, tmp_path: Path) -> None:
    """All parts are up, nothing outside that path is asked for, and each link works."""
    with reserve_port() as reserved:
        port = reserved.getsockname()[1]
        file = tmp_path / "haproxy.cfg"
        file.write_text(PROXY.format(port=port, gateway=system.gateway.port))
        proxy = await asyncio.create_subprocess_exec("haproxy", "-db", "-f", file, stderr=subprocess.DEVNULL)
        try:
            url = f"http://127.0.0.1:{port}/messages/"
            await eventually(lambda: is_good(url))
            page = await show(url)
            await becomes(page, UP, [])
            assert await shown(page) == system.database.sql("SELECT content FROM messages ORDER BY id LIMIT 1")[0][0]
            links = await page.locator("a").evaluate_all("links => links.map(link => link.href)")
            assert len(links) >= 3
            assert [link for link in links if not await is_good(link)] == []
        finally:
            proxy.terminate()
            await proxy.wait()
    assert not re.findall(r"""(?:href=|src=|fetch\()["'`]/""", (ROOT / "index.html").read_text())


async def is_good(url: str) -> bool:
    """Whether a request is answered with 200; not while nothing listens."""
    with contextlib.suppress(OSError):
        return (await get(url)).status == 200
    return False


async def test_it_shows_the_message_and_what_it_took(system: System, show: Show) -> None:
    """The message, that all parts are up and since when, the time of each hop; and a new message without reloading."""
    page = await show(system.gateway.url)
    assert await shown(page) == (await get(system.gateway.url + "/api/string")).json()["result"]
    await becomes(page, UP, down=[])
    for part in UP:
        assert re.fullmatch(r"seen since \d\d:\d\d:\d\d", await page.locator(f"#{part} .since").inner_text())
        assert re.fullmatch(r"[\d.]+ ms", await page.locator(f"#to-{part} .time").inner_text())
        assert await page.locator(f"#plot .{part}").count()
    assert await page.title() == "Messages"
    system.database.store("Another one.")
    await eventually(lambda: is_shown(page, "Another one."))


async def is_shown(page: Page, message: str) -> bool:
    assert await shown(page) == message
    return True


async def test_whatever_the_database_holds_is_text(system: System, show: Show) -> None:
    """Markup appears as it was written, and has no effect."""
    evil = "<script>document.title = 'taken'</script><img src=x onerror=\"document.title = 'taken'\">\n\t<b>&amp;"
    system.database.store(evil)
    page = await show(system.gateway.url)
    assert await page.locator("#message").text_content() == evil
    assert await page.locator("#message *").count() == 0
    assert await page.title() == "Messages"


async def test_the_part_that_fails_is_red(start: Start, cluster: Cluster, show: Show) -> None:
    """PostgreSQL, the message service, the gateway: each while it is stopped, in plain words, until it is back."""
    with reserve_port() as front, reserve_port() as behind:
        ports = front.getsockname()[1], behind.getsockname()[1]
        settings = cluster.database().settings()
        service = await start("message_service", PORT=ports[1], **settings)
        gateway = await start("gateway", PORT=ports[0], DOWNSTREAM_URL=service.url)
        page = await show(gateway.url)
        message = await shown(page)

        async def says(title: str) -> None:
            assert await page.locator("#state").inner_text() == "A part is down"
            assert await page.locator("#problem h2").inner_text() == title
            assert await page.title() == f"{title} · Messages"
            assert await shown(page) == message  # the last one, labelled as such
            assert "Last message, read at" in await page.locator("#read").inner_text()

        cluster.stop()
        await becomes(page, UP | {"database": "down"}, down=["database"])
        await says("PostgreSQL is not available")
        assert "503" in await page.locator("#problem").inner_text()
        cluster.start()
        await becomes(page, UP, down=[])
        assert not await page.locator("#problem").is_visible()

        service.kill()
        await becomes(page, {"gateway": "up", "service": "down", "database": "unknown"}, down=["service"])
        await says("The message service cannot be reached")
        await start("message_service", PORT=ports[1], **settings)
        await becomes(page, UP, down=[])

        gateway.kill()
        await becomes(page, {"gateway": "down", "service": "unknown", "database": "unknown"}, down=["gateway"])
        await says("The gateway cannot be reached")
        await start("gateway", PORT=ports[0], DOWNSTREAM_URL=service.url)
        await becomes(page, UP, down=[])


async def test_no_answer_is_told_from_no_gateway(start: Start, cluster: Cluster, show: Show) -> None:
    """A gateway that is still waiting is up; a frozen one, which does not answer a probe either, is down."""

    service = await start("message_service", **cluster.database().settings())
    gateway = await start("gateway", DOWNSTREAM_URL=service.url, DOWNSTREAM_TIMEOUT=60)
    page = await show(gateway.url, script=SHORTER)
    service.freeze()
    waits = {"gateway": "up", "service": "unknown", "database": "unknown"}
    await becomes(page, waits, down=[])
    assert await page.locator("#problem h2").inner_text() == "No answer yet"
    gateway.freeze()
    await becomes(page, waits | {"gateway": "down"}, down=["gateway"])
    assert await page.locator("#problem h2").inner_text() == "The gateway does not answer"
    gateway.resume()
    await becomes(page, waits, down=[])
    service.resume()
    await becomes(page, UP, down=[])


async def test_an_empty_table_is_nobodys_failure(system: System, show: Show) -> None:
    """All parts are up, and the page says what is missing."""
    system.database.sql("ALTER TABLE messages RENAME TO kept")
    system.database.sql("CREATE TABLE messages (LIKE kept INCLUDING ALL)")
    try:
        page = await show(system.gateway.url)
        assert (await states(page), await red(page)) == (UP, [])
        assert await page.locator("#problem h2").inner_text() == "There is no message"
    finally:
        system.database.sql("DROP TABLE messages")
        system.database.sql("ALTER TABLE kept RENAME TO messages")


async def runs(system: System) -> float:
    """The number of queries that have answered: of two that started for one batch, one is cancelled."""
    metrics = (await get(system.service.url + "/metrics")).body.decode()
    counts = re.findall(r'^coalescing_run_callers_count{outcome="answered".*} (.*)$', metrics, re.MULTILINE)
    return sum(map(float, counts))


async def test_a_burst_shows_how_few_queries_there_were(system: System, show: Show) -> None:
    """By keyboard: 300 requests; the number of queries matches the message service's count."""
    page = await show(system.gateway.url)
    await page.get_by_role("button", name="Pause").click()  # so that nothing else is counted
    send = page.get_by_role("button", name="Send 300 requests")
    for _ in range(5):  # while the machine's network changes, Chromium drops requests, and repeats some of them
        before = await runs(system)
        await send.focus()
        await page.keyboard.press("Enter")
        await page.locator("#send:not([aria-disabled])").wait_for()
        result = await page.locator("#result").inner_text()
        answered = re.fullmatch(r"300 answers, (\d+) quer\w+\s+in [\d.]+ seconds, 6 requests at a time\.\s*", result)
        counted = await runs(system) - before
        if answered and int(answered[1]) == counted:
            break
    assert answered, result
    assert int(answered[1]) == counted < 200
    assert await page.locator("#dots span").count() == counted
    assert await page.locator("#dots i").count() == 300


async def test_a_failed_burst_says_why(broken: Server, show: Show) -> None:
    """The part that is down, instead of times and queries; each dot is a failure."""
    page = await show(broken.url)
    await page.get_by_role("button", name="Send 300 requests").click()
    result = page.locator("#result")
    await result.get_by_text("All 300 requests failed").wait_for()
    assert (await result.inner_text()).split("\n")[-1] == "The message service cannot be reached."
    assert await page.locator("#dots > .failure").count() == 300
    assert await page.locator("#dots span").count() == 0


async def test_a_burst_that_fails_in_part_says_both(system: System, show: Show) -> None:
    """How many requests succeeded, how many failed, and each reason with its count."""
    page = await show(system.gateway.url)
    await page.get_by_role("button", name="Pause").click()
    await page.wait_for_function("!asking")
    fates = itertools.cycle(["continue", "abort", "fulfill"])

    async def meddle(route: Route) -> None:
        match next(fates):
            case "continue":
                await route.continue_()
            case "abort":
                await route.abort()  # which the page answers by asking once more
            case "fulfill":
                await route.fulfill(status=502, body="<h1>Bad Gateway</h1>")

    await page.route("**/api/string", meddle)
    await page.get_by_role("button", name="Send 300 requests").click()
    await page.locator("#send:not([aria-disabled])").wait_for()
    result = await page.locator("#result").inner_text()
    answers, failed = re.search(r"^(\d+) answers, ", result), re.search(r"(\d+) failed: (.*)\.$", result)
    assert answers, result
    assert failed, result
    assert int(answers[1]) + int(failed[1]) == 300
    assert await page.locator("#dots span i").count() == int(answers[1])
    assert await page.locator("#dots > .failure").count() == int(failed[1])
    reasons = dict(re.findall(r"(The [a-z ]+) \((\d+)\)", failed[2]))
    assert reasons.keys() == {"The gateway cannot be reached", "The gateway sends invalid answers"}
    assert sum(map(int, reasons.values())) == int(failed[1])


async def test_what_failed_is_not_drawn_as_slow(broken: Server, system: System, show: Show) -> None:
    """A failed request has no time: its mark is below the axis, where no answer's is, and the table counts it."""
    well = await show(system.gateway.url)
    ill = await show(broken.url)
    await ill.locator("#plot .failure").nth(1).wait_for(state="attached")
    axis = await ill.locator("#plot path").evaluate("line => line.getBBox().y")
    tops = "bars => bars.map(bar => bar.getBBox().y)"
    assert min(await ill.locator("#plot rect").evaluate_all(tops)) > axis
    assert max(await well.locator("#plot rect").evaluate_all(tops)) <= axis
    assert re.fullmatch(r"Last (\d+): \1 failed", await ill.locator("thead th").first.inner_text())


async def test_paused_does_not_look_healthy(broken: Server, system: System, show: Show) -> None:
    """While paused, nothing is green or red: the page shows the last state and its time; then it starts afresh."""
    well = await show(system.gateway.url)
    ill = await show(broken.url)
    seen = {well: UP, ill: {"gateway": "up", "service": "down", "database": "unknown"}}
    for page, before in seen.items():
        await page.get_by_role("button", name="Pause").click()
        was = {part: state if state == "unknown" else f"was {state}" for part, state in before.items()}
        assert (await states(page), await red(page)) == (was, [])
        assert await page.locator("#state").inner_text() == "Paused"
        assert await page.title() == "Paused · Messages"
        assert await page.locator("[data-state=up], [data-state=down]").count() == 0
        assert re.fullmatch(r"last seen \d\d:\d\d:\d\d", await page.locator("#gateway .since").inner_text())
        await page.get_by_role("button", name="Resume").click()
        await becomes(page, before, down=[part for part, state in before.items() if state == "down"])
        assert "seen since" in await page.locator("#gateway .since").inner_text()


async def test_an_answer_after_the_pause_does_not_undo_it(start: Start, cluster: Cluster, show: Show) -> None:
    """An answer that was under way when the button was pressed is shown as past."""
    service = await start("message_service", **cluster.database().settings())
    gateway = await start("gateway", DOWNSTREAM_URL=service.url)
    page = await show(gateway.url)
    gateway.freeze()
    async with page.expect_request("**/api/string"):
        pass
    await page.get_by_role("button", name="Pause").click()
    async with page.expect_response("**/api/string"):
        gateway.resume()
    await page.wait_for_function("!asking")
    assert set((await states(page)).values()) == {"was up"}
    assert await page.locator("#state").inner_text() == "Paused"


async def test_it_asks_politely(start: Start, system: System, show: Show) -> None:
    """Once a second; less often in the background; not while paused; never a second time while it waits."""
    gateway = await start("gateway", DOWNSTREAM_URL=system.service.url)
    page = await show(gateway.url, fake_clock=True)
    asked = 0
    answered = 0

    def count(request: Request) -> None:
        nonlocal asked
        asked += request.url.endswith("/api/string")

    def finished(request: Request) -> None:
        nonlocal answered
        answered += request.url.endswith("/api/string")

    page.on("request", count)
    page.on("requestfinished", finished)

    async def within(seconds: int) -> int:
        nonlocal asked, answered
        asked = answered = 0
        for _ in range(seconds):
            await page.clock.run_for(1000)
            await eventually(lambda: answered == asked)
            await page.evaluate("new Promise(done => queueMicrotask(done))")
        return asked

    assert 3 <= await within(5) <= 6
    await page.evaluate("""() => {
        Object.defineProperty(document, "hidden", { get: () => window.away ?? true, configurable: true });
        document.dispatchEvent(new Event("visibilitychange"));
    }""")
    assert 2 <= await within(40) <= 4
    await page.evaluate("window.away = false; document.dispatchEvent(new Event('visibilitychange'))")
    assert 3 <= await within(5) <= 6
    await page.get_by_role("button", name="Pause").click()
    assert await within(5) == 0
    gateway.freeze()
    asked = 0
    await page.get_by_role("button", name="Resume").click()
    for _ in range(8):
        await page.clock.run_for(1000)
    await eventually(lambda: asked)
    assert asked == 1
    gateway.resume()


async def background(page: Page) -> str:
    """The page's colour."""
    colour: str = await page.evaluate("getComputedStyle(document.body).backgroundColor")
    return colour


async def test_everybody_can_use_it(broken: Server, system: System, show: Show) -> None:
    """axe-core finds nothing, well, broken or paused, on a desk and on a phone, light and dark.

    And nothing is wider than the window.
    """
    system.database.store("A long message: " + "word " * 500 + "x" * 500)
    well = await show(system.gateway.url)
    await well.get_by_role("button", name="Send 300 requests").click()
    ill = await show(broken.url, size=PHONE)
    await ill.get_by_role("button", name="Send 300 requests").click()
    paused = await show(system.gateway.url)
    await paused.get_by_role("button", name="Pause").click()
    for page in (well, ill):
        await page.locator("#send:not([aria-disabled])").wait_for()
    for page in (well, ill, paused):
        light = await background(page)
        report = await Axe().run(page)
        assert report.violations_count == 0, report.generate_report()
        await page.emulate_media(color_scheme="dark")
        assert await background(page) != light
        report = await Axe().run(page, options={"runOnly": ["color-contrast"]})  # nothing else differs
        assert report.violations_count == 0, report.generate_report()
    for page in (well, ill, paused):
        for width in (1280, 900, 390, 320):
            await page.set_viewport_size({"width": width, "height": 800})
            assert await page.evaluate("document.documentElement.scrollWidth") == width
