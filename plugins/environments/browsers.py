"""Chromium in a sandbox, driven by Playwright: a bounded number of browsers with tabs for episodes.

Each browser runs in namespaces of its own, made by bubblewrap as for commands, but as the runner's
user: no network, no other processes, no files but a read-only /usr, the folder of its pages as
/pages, and /tmp in memory. Its processes and their threads are bounded (but not those of root, as
whom the kernel bounds none), and the memory of each process. A page may load
only files of /pages. A browser is started when there is no free tab, takes several episodes at
once, and is replaced after some hundreds. After an error or a late answer it takes no further
episode and ends with its last one. All that a browser started ends with it.
"""

from __future__ import annotations

import asyncio
import importlib
import importlib.util
import logging
import os
import re
import shutil
import signal
import tempfile
from collections.abc import AsyncGenerator, Mapping
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nextstate.errors import RolloutError, StartError
from plugins.sandboxes.bubblewrap import FILTER, walls

log = logging.getLogger(__name__)

_STOP_S = 10.0
PAGES = "file:///pages/"
"""Where a tab finds the files of the folder of pages."""
_OTHERS = re.compile(rf"^(?!{PAGES})")
_LAUNCH = """\
echo 1000 2>/dev/null >/proc/self/oom_score_adj
echo $$ >"$0"
exec 9<"$1"
shift
exec "$@"
"""
"""Writes the id of the process, which stays bwrap's, to the file $0; opens $1 for it."""
_FILTER_AT = 9
_LIMITED = 'ulimit -c 0 -u "$0" -d "$1" && shift && exec "$@"'
"""Bounds a browser: $0 processes and threads, $1 KiB of memory that each process may write to. A
bound of addresses, as for commands, would not let Chromium start: it reserves far more than it
uses."""
_FLAGS = (
    *("--headless", "--no-sandbox", "--remote-debugging-pipe", "--user-data-dir=/tmp/profile"),
    *("--disable-gpu", "--disable-dev-shm-usage", "--disable-extensions", "--mute-audio"),
    *("--no-first-run", "--no-default-browser-check", "--disable-background-networking"),
    *("--disable-component-update", "--disable-sync", "--disable-breakpad", "--hide-scrollbars"),
    *("--disable-background-timer-throttling", "--disable-renderer-backgrounding"),
    *("--disable-backgrounding-occluded-windows", "--block-new-web-contents", "--in-process-gpu"),
    "--disable-site-isolation-trials",
    "--disable-features=BackForwardCache,RenderDocument,Translate,IsolateOrigins,InitialWebUI",
)
"""`--no-sandbox`: bubblewrap's is around it, in which Chromium can make none of its own. Without
site isolation and RenderDocument a page is opened in a quarter less CPU time; all are files."""


@dataclass(frozen=True, slots=True)
class Limits:
    """What all browsers of an environment may use."""

    browsers: int = 2
    """At once."""
    tabs: int = 8
    """Episodes at once in each browser."""
    episodes: int = 400
    """A browser that has had so many is replaced."""
    start_s: float = 120.0
    answer_s: float = 60.0
    """How long a browser may take for one command."""
    heap_mb: int = 256
    """Memory of each page's scripts."""
    folder_mb: int = 256
    """The size of a browser's /tmp."""
    memory_mb: int = 1024
    """Memory of each of its processes, as of a page's."""
    processes: int = 1024
    """With their threads, of which a page has about 15."""


class Tab:
    """One tab, for one episode at a time. After an error it must not be used again."""

    def __init__(self, page: Any, answer_s: float) -> None:
        self._page = page
        self._answer_s = answer_s
        self.works = True
        """False while a command runs, and for ever after one that did not end well."""

    async def open(self, path: str) -> None:
        """Loads a file of the folder of pages. Raises RolloutError."""
        async with self._command("open a page"):
            await self._page.goto(PAGES + path)

    async def ask(self, script: str, argument: object) -> object:
        """What a function of JavaScript returns in the page. Raises RolloutError."""
        async with self._command("run a script"):
            return await self._page.evaluate(script, argument)

    async def picture(self) -> bytes:
        """What the page looks like, as JPEG. Raises RolloutError."""
        async with self._command("take a picture"):
            return await self._page.screenshot(type="jpeg", quality=60)

    @asynccontextmanager
    async def _command(self, what: str) -> AsyncGenerator[None]:
        if not self.works:
            raise RolloutError(f"the browser cannot {what}: an earlier command did not end")
        self.works = False
        async with _answers(what, self._answer_s):
            yield
        self.works = True


class _Browser:
    """One browser, which its task keeps until it is over."""

    def __init__(self, limits: Limits, pages: Path) -> None:
        self._limits = limits
        self._pages = pages
        self._free: list[Tab] = []
        self._running: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self._over = asyncio.Event()
        self.users = self.served = 0
        self.is_sound = True

    @property
    def takes(self) -> bool:
        """Whether it has room for another episode."""
        at_work = self.is_sound and self.served < self._limits.episodes
        return at_work and self.users < self._limits.tabs

    async def keep(self) -> None:
        """Runs the browser until `end`; then nothing of it is left."""
        process = folder = None
        driver: Any = None
        try:
            async with _answers("start", self._limits.start_s):
                folder = Path(tempfile.mkdtemp(prefix="nextstate-browser-"))
                playwright: Any = importlib.import_module("playwright.async_api")
                driver = await playwright.async_playwright().start()
                (folder / "filter").write_bytes(FILTER)
                files = [str(folder / name) for name in ("pid", "filter")]
                browser = await driver.chromium.launch(
                    executable_path="/bin/sh",
                    args=["-c", _LAUNCH, *files, *_argv(self._limits, self._pages)],
                    ignore_default_args=True,
                    timeout=1000 * self._limits.start_s,
                    handle_sigint=False,
                    handle_sigterm=False,
                    handle_sighup=False,
                )
                process = _process(folder / "pid")
                shutil.rmtree(folder)  # so a killed runner leaves nothing
                browser.on("disconnected", self.end)  # it died
            self._running.set_result(browser)
            await self._over.wait()
        except RolloutError as error:
            self.is_sound = False
            self._running.set_exception(error)
            self._running.exception()  # it is no mistake if nobody waits
        finally:
            self._running.cancel()
            if process is not None:
                with suppress(ProcessLookupError):  # its sandbox dies with it
                    signal.pidfd_send_signal(process, signal.SIGKILL)
                os.close(process)
            with suppress(Exception):  # of a driver that is already gone
                async with asyncio.timeout(_STOP_S):
                    await driver.stop()
            if folder is not None:
                shutil.rmtree(folder, ignore_errors=True)

    async def tab(self) -> Tab:
        """A tab for one episode. Raises RolloutError."""
        if self._free:
            return self._free.pop()
        running = await asyncio.shield(self._running)
        try:
            async with _answers("open a tab", self._limits.answer_s):
                context = await running.new_context(
                    viewport={"width": 160, "height": 210},
                    accept_downloads=False,
                    service_workers="block",
                )
                context.set_default_timeout(0)  # `answer_s` holds, not Playwright's half a minute
                await context.route(_OTHERS, _refuse)
                return Tab(await context.new_page(), self._limits.answer_s)
        except BaseException:
            self.is_sound = False
            raise

    def leave(self, tab: Tab | None) -> None:
        """An episode has ended; None: it got no tab."""
        self.users -= 1
        if tab is not None:
            self._free.append(tab)
            self.is_sound = self.is_sound and tab.works
        if not self.users and not self.takes:
            self.end()

    def end(self, _: object = None) -> None:
        """Makes `keep` return soon."""
        self.is_sound = False
        self._over.set()


class Browsers:
    """Gives out tabs of browsers that show one folder of pages."""

    def __init__(self, limits: Limits, pages: Path) -> None:
        self._limits = limits
        self._pages = pages
        self._browsers: dict[_Browser, asyncio.Task[None]] = {}
        self._changed = asyncio.Event()

    @asynccontextmanager
    async def tab(self) -> AsyncGenerator[Tab]:
        """A tab of its own; waits until one is free. Raises RolloutError."""
        while (browser := self._find()) is None:
            self._changed.clear()
            await self._changed.wait()
        browser.users += 1
        browser.served += 1
        tab = None
        try:
            tab = await browser.tab()
            yield tab
        finally:
            browser.leave(tab)
            self._changed.set()

    async def close(self) -> None:
        """Ends all browsers; another tab would start one anew."""
        for browser in self._browsers:
            browser.end()
        await asyncio.gather(*self._browsers.values(), return_exceptions=True)

    def _find(self) -> _Browser | None:
        """The fullest browser that has room, perhaps a new one; None: all are full."""
        found = max((b for b in self._browsers if b.takes), key=lambda b: b.users, default=None)
        if found is None and len(self._browsers) < self._limits.browsers:
            found = _Browser(self._limits, self._pages)
            self._browsers[found] = task = asyncio.create_task(found.keep())
            task.add_done_callback(lambda _: self._end(found))
        return found

    def _end(self, browser: _Browser) -> None:
        task = self._browsers.pop(browser)
        if not task.cancelled() and (error := task.exception()):
            log.error("a browser was not kept", exc_info=error)
        self._changed.set()


def check_programs() -> None:
    """Raises StartError that names what is missing and how to install it."""
    missing = [
        *(name for name in ("playwright", "miniwob") if importlib.util.find_spec(name) is None),
        *(["chromium"] if chromium() is None else []),
        *(["bubblewrap"] if shutil.which("bwrap") is None else []),
    ]
    if missing:
        raise StartError(
            f"{' and '.join(missing)} not found: run `make gui`, which installs the packages "
            "playwright and miniwob and the programs chromium and bubblewrap"
        )


def chromium() -> str | None:
    """The path of the browser; None: there is none."""
    return shutil.which("chromium") or shutil.which("chromium-browser")


def _process(file: Path) -> int:
    """A handle of the process whose id is in a file."""
    return os.pidfd_open(int(file.read_text()))


def _argv(limits: Limits, pages: Path) -> list[str]:
    environment: Mapping[str, str] = {
        "PATH": "/usr/bin:/bin",
        "HOME": "/tmp",
        "LANG": "C.UTF-8",
    }
    return [
        *walls(_FILTER_AT),
        *("--ro-bind-try", "/etc/chromium.d", "/etc/chromium.d"),
        *("--ro-bind-try", "/etc/fonts", "/etc/fonts"),
        *("--size", str(limits.folder_mb << 20), "--tmpfs", "/tmp"),
        *("--ro-bind", str(pages), "/pages", "--remount-ro", "/", "--chdir", "/tmp", "--clearenv"),
        *(part for item in environment.items() for part in ("--setenv", *item)),
        *("--", "bash", "-c", _LIMITED, str(limits.processes), str(limits.memory_mb << 10)),
        *(chromium() or "chromium", *_FLAGS),
        *(f"--js-flags=--max-old-space-size={limits.heap_mb}", "about:blank"),
    ]


@asynccontextmanager
async def _answers(what: str, within_s: float) -> AsyncGenerator[None]:
    """Makes RolloutError of whatever goes wrong, or is late, between us and the browser."""
    limit = asyncio.timeout(within_s)
    try:
        async with limit:
            yield
    except TimeoutError as error:
        if not limit.expired():
            raise
        raise RolloutError(f"the browser did not {what} within {within_s:g} s") from error
    except Exception as error:
        # Playwright's own error, or one of its driver's pipe
        raise RolloutError(f"the browser did not {what}: {_reason(error)[:300]!r}") from error


def _reason(error: Exception) -> str:
    """The first line that the browser's process wrote, else the first one of the error."""
    lines = str(error).splitlines() or [type(error).__name__]
    return next((line for line in lines if "[err]" in line), lines[0])


async def _refuse(route: Any) -> None:
    with suppress(Exception):  # the tab may be gone
        await route.abort("aborted")  # so a tab stays where it is
