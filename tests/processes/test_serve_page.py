"""The page of the server in Chromium: needs `pip install playwright`, `apt install chromium`."""

import asyncio
import importlib.util
import shutil

import pytest
import uvicorn
from helpers_serving import Running

from jaxprompt.serving.http.app import make_app

CHROMIUM = shutil.which("chromium")
OPTIONS = "--headless --no-sandbox --disable-gpu --disable-background-networking".split()
ROWS = "text,label\na cat,yes\na dog,no\na cow,yes\n"

pytestmark = [
    pytest.mark.skipif(
        CHROMIUM is None or importlib.util.find_spec("playwright") is None,
        reason="chromium or playwright is not installed",
    ),
    pytest.mark.filterwarnings("ignore"),  # of libraries that are not ours
]


def seen(running, look):
    """What ``look`` sees of the page, and whatever went wrong in the browser."""

    async def everything():
        from playwright.async_api import async_playwright

        async with running.client(), async_playwright() as playwright:
            app = make_app(running.service)
            server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="error"))
            task = asyncio.create_task(server.serve())
            while not server.started:
                await asyncio.sleep(0.01)
            port = server.servers[0].sockets[0].getsockname()[1]
            browser = await playwright.chromium.launch(executable_path=CHROMIUM, args=OPTIONS)
            page = await browser.new_page()
            wrong = []
            page.on("console", lambda message: wrong.append(message.text))
            page.on("pageerror", lambda error: wrong.append(str(error)))
            home = f"http://127.0.0.1:{port}/"
            page.on("request", lambda r: wrong.append(r.url) if not r.url.startswith(home) else 0)
            await page.goto(home)
            await page.wait_for_selector("#prompts tr")
            found = await look(page)
            await browser.close()
            server.should_exit = True
            await task
            return found, wrong

    return asyncio.run(everything())


def test_prompts_are_asked_side_by_side_with_one_text(tmp_path):
    async def look(page):
        await page.wait_for_selector("#fields > :only-child textarea")
        await page.get_by_label("Try acme/own").uncheck()
        await page.get_by_label("Try second").check()
        await page.locator("#fields textarea").fill("a cat")
        await page.keyboard.press("Control+Enter")
        await page.wait_for_selector("#answers .card")
        return await page.locator("#answers .answer").all_inner_texts()

    answers, wrong = seen(Running(tmp_path), look)
    assert answers == ["yes", "no"] and not wrong


def test_rows_of_a_file_have_an_accuracy_and_two_prompts_are_compared(tmp_path):
    rows = tmp_path / "rows.csv"
    rows.write_text(ROWS)

    async def look(page):
        await page.locator("#file").set_input_files(str(rows))
        await page.select_option("#rows-a", "first")
        await page.select_option("#rows-b", "second")
        await page.click("#rows-send")
        await page.wait_for_selector("#rows-scroll:not([hidden])")
        return await page.inner_text("#rows-summary"), await page.inner_text("#rows-body tr")

    (summary, line), wrong = seen(Running(tmp_path), look)
    assert "66.7%" in summary and "33.3%" in summary and "disagree on 3 rows" in summary
    assert "✓ yes" in line and "✗ no" in line and not wrong


def test_words_around_the_vectors_are_changed_while_one_types_and_kept_as_a_config(tmp_path):
    async def look(page):
        await page.select_option("#words-prompt", "second")
        await page.get_by_label("text", exact=True).fill("a cat")
        await page.wait_for_selector("#words-answers .card")
        await page.fill("#words-template", "it was {text}")
        await page.fill("#words-labels", "good, bad")
        await page.wait_for_selector("#words-answers .answer:text-is('bad')")
        answers = await page.locator("#words-answers .answer").all_inner_texts()
        async with page.expect_download() as saved:
            await page.get_by_role("button", name="Keep as config").click()
        return answers, (await (await saved.value).path()).read_text()

    (answers, kept), wrong = seen(Running(tmp_path), look)
    assert answers == ["no", "bad"]
    assert "it was {text}" in kept and "output: runs/kept" in kept
    assert not [line for line in wrong if "blob:" not in line]
