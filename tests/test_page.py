"""The page at / in headless Chromium (Debian's chromium, Playwright for Python): make page installs what it needs."""

import json
import os
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from jaxserve.types import EngineFailed, Progress
from tests.page_server import PageServer
from tests.real_engines import RealServer, eventually

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed: make page installs it")
CHROMIUM = os.environ.get("CHROMIUM", "/usr/bin/chromium")
if not Path(CHROMIUM).exists():
    pytest.skip(f"there is no {CHROMIUM}: apt-get install chromium", allow_module_level=True)

FLAGS = (
    *("--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking"),
    *("--disable-component-update", "--disable-sync"),
)
LONG = " ".join(f"word{n}" for n in range(400))
HOSTILE = r"""<script>window.hacked = 1</script><img src=x onerror="window.hacked = 2">
<svg onload="window.hacked = 3"><animate onbegin="window.hacked = 3" attributeName=x dur=1s /></svg>
<iframe srcdoc="<script>parent.hacked = 4</script>"></iframe><iframe src="javascript:parent.hacked=5"></iframe>

[click](javascript:window.hacked=6) [data](data:text/html,<script>window.hacked=7</script>) [here](/flush_cache)
[vb](vbscript:x) [odd](java&#10;script:window.hacked=8) <javascript:window.hacked=9> [ref][r]

[r]: javascript:window.hacked=10

![outside](http://outside.invalid/a.png) ![inside](/flush_cache?from=image) ![x](x"onerror="window.hacked=11)
<div style="background: url(http://outside.invalid/b.png)">styled</div><style>@import url(http://outside.invalid/c);
body { display: none }</style><link rel=stylesheet href=http://outside.invalid/d.css>
<form action="http://outside.invalid/e"><input name=q autofocus onfocus="window.hacked = 12"><button>go</button></form>
<base href="http://outside.invalid/"><meta http-equiv=refresh content="0;url=http://outside.invalid/f">
<math><mtext><table><mglyph><style><img src=x onerror="window.hacked = 13"></style></mglyph></table></mtext></math>
<details open ontoggle="window.hacked = 14"><summary>more</summary></details><b onmouseover="window.hacked=15">bold</b>

```html"><img src=x onerror="window.hacked = 16">
</code></pre><script>window.hacked = 17</script>
```

$\href{javascript:window.hacked=20}{x}$ \(\includegraphics{http://outside.invalid/g.png}\)
$\class{x}{y}$ $\htmlStyle{background: url(/flush_cache)}{x}$ $</code><img src=x onerror="window.hacked = 21">$

| a | b |
|---|---|
| <img src=x onerror="window.hacked = 18"> | `<script>window.hacked = 19</script>` |

The end of it."""
CALL = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "<img src=x onerror=hacked=1>"}}\n</tool_call>'
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "get_weather",
            "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
        },
    }
]
TEXTS = {
    "hostile": f"<think>{HOSTILE}</think>{HOSTILE}",
    "endless": LONG * 20,
    "weather": CALL,
    "sunny": "It will be sunny.",
    "formula": r"Half is $\frac{1}{2}$, not $5 or $6." + "\n\n$$\n\\int_0^1 x^2\\,dx\n$$\n\nBroken: $\\frac{$",
    "": "<think>Let me see.</think>Hello **world**, é.\n\n```python\nx = 1\n```\n",
}


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    """Closed at the module's end: its event loop must not run beside those of other tests."""
    with playwright.sync_playwright() as running:
        browser = running.chromium.launch(executable_path=CHROMIUM, args=list(FLAGS))
        yield browser
        browser.close()


class Visit:
    """One visitor: a context of its own, so an empty store. Whatever the page does that it should not is kept."""

    def __init__(self, chromium: Any, url: str, **options: Any) -> None:
        self.context = chromium.new_context(**({"viewport": {"width": 1280, "height": 800}} | options))
        self.url, self.problems, self.requests = url, [], []
        self.open()

    def open(self, wait: bool = True) -> None:
        self.page = self.context.new_page()
        self.page.set_default_timeout(10_000)
        self.page.on("pageerror", lambda error: self.problems.append(str(error)))
        self.page.on("dialog", lambda dialog: (self.problems.append(dialog.message), dialog.dismiss()))
        self.page.on("request", lambda request: self.requests.append((request.method, request.url)))
        self.page.goto(self.url)
        self.page.wait_for_selector(".composer")

    def until(self, condition: str) -> None:
        """Asked from here: the page's policy lets Playwright's own waiting, which needs eval, not in."""
        assert eventually(lambda: bool(self.page.evaluate(condition)), 10), condition

    def ready(self) -> "Visit":
        self.until("document.querySelector('.model').options.length > 0")
        return self

    def field(self) -> Any:
        return self.page.get_by_label("Message", exact=True)

    def send(self, text: str) -> None:
        self.ready().field().fill(text)
        self.field().press("Enter")

    def ask(self, text: str) -> Any:
        """-> the answer, once it is whole."""
        self.send(text)
        return self.answered()

    def answered(self) -> Any:
        self.until("!document.querySelector('.message.live') && document.querySelector('.message')")
        return self.page.locator(".message.assistant").last

    def messages(self) -> list[str]:
        return [
            text.strip()
            for text in self.page.locator(".message .bubble, .message .prose:not(.quiet)").all_inner_texts()
        ]

    def button(self, label: str, within: Any = None) -> Any:
        return (within or self.page).get_by_role("button", name=label, exact=True)

    def outside(self) -> list[str]:
        return [url for _, url in self.requests if not url.startswith((self.url + "/", "blob:", "data:"))]

    def close(self) -> None:
        self.context.close()
        assert not self.problems, self.problems
        assert not self.outside(), self.outside()


@pytest.fixture(scope="module")
def server() -> Iterator[PageServer]:
    with PageServer(TEXTS) as server:
        yield server


@pytest.fixture
def visit(chromium: Any, server: PageServer) -> Iterator[Visit]:
    visit = Visit(chromium, server.url)
    yield visit
    visit.close()


def last_prompt(server: PageServer) -> str:
    return server.tokenizer.decode(server.engine.requests[-1].token_ids, skip_special_tokens=False)


def test_an_answer_streams_in_as_markdown_with_its_thinking_and_its_times(visit: Visit, server: PageServer):
    visit.send("tell me something endless")
    visit.until("document.querySelector('.message.live .prose:not(.quiet)')?.innerText.includes('word5 ')")
    assert visit.page.locator(".message.live .stats").inner_text(), "counted while it streams"
    visit.button("Stop").click()
    visit.answered()
    answer = visit.ask("hi")
    assert "Hello world, é." in answer.inner_text() and answer.locator("strong").inner_text() == "world"
    assert answer.locator(".code code").inner_text() == "x = 1"
    thought = answer.locator("details.thought")
    assert not thought.evaluate("e => e.open") and "Thought for" in thought.inner_text()
    thought.locator("summary").click()
    assert "Let me see." in thought.inner_text()
    stats = answer.locator(".stats").inner_text()
    for part in (r"[\d.,]+ tok/s", r"\d+ tokens", r"first after \d+ ms", r"% of context"):
        assert re.search(part, stats), stats
    visit.until("document.querySelector('.hljs-number')?.textContent === '1'")
    visit.button("Show raw text", answer).click()
    assert "Hello **world**" in answer.inner_text()


def test_formulas_are_set_and_money_is_not(visit: Visit):
    answer = visit.ask("a formula")
    answer.locator("mfrac").wait_for()
    answer.locator("math[display=block]").wait_for()
    assert answer.locator("math").count() == 2
    assert "not $5 or $6." in answer.inner_text() and answer.locator("code").inner_text() == r"\frac{"


def test_stop_aborts_the_request_and_keeps_what_was_said(visit: Visit, server: PageServer):
    before = len(server.engine.aborted)
    visit.send("endless")
    visit.until("document.querySelector('.live .prose:not(.quiet)')?.innerText.includes('word1 ')")
    visit.page.keyboard.press("Escape")
    answer = visit.answered()
    server.engine.wait_until(lambda: len(server.engine.aborted) == before + 1)
    assert "word1" in answer.inner_text() and "Stopped" in answer.locator(".stats").inner_text()
    assert "Hello world" in visit.ask("and now?").inner_text()
    assert "word1" in last_prompt(server), "what was said is part of the conversation"


def test_edits_and_other_answers_are_branches(visit: Visit, server: PageServer):
    visit.ask("first question")
    visit.button("Another answer").click()
    answer = visit.answered()
    assert "2 / 2" in answer.locator(".branches").inner_text()
    question = visit.page.locator(".message.user")
    question.hover()
    visit.button("Edit", question).click()
    visit.page.get_by_label("Edit the message").fill("a sunny question")
    visit.button("Send", question).click()
    visit.answered()
    assert visit.messages() == ["a sunny question", "It will be sunny."]
    assert "first question" not in last_prompt(server)
    visit.button("Previous version").click()
    assert visit.messages()[0] == "first question" and "Hello world" in visit.messages()[1]
    assert "2 / 2" in visit.page.locator(".message.assistant .branches").inner_text()
    visit.button("Delete this and what follows", visit.page.locator(".message.assistant")).click()
    assert visit.page.locator(".message.assistant .branches").count() == 0


def test_continue_goes_on_behind_the_same_words(visit: Visit, server: PageServer):
    visit.ask("sunny?")
    visit.button("Continue this answer").click()
    answer = visit.answered()
    assert answer.inner_text().count("It will be sunny.") == 2
    assert last_prompt(server).endswith("assistant\nIt will be sunny."), "the answer's beginning, not a new turn"


def test_a_reload_keeps_conversations_branches_and_settings(visit: Visit, server: PageServer):
    visit.ask("first question")
    visit.button("Another answer").click()
    visit.answered()
    visit.button("Previous version").click()
    visit.button("Settings (Ctrl ,)").click()
    visit.page.get_by_label("System prompt").fill("Answer as a pirate.")
    visit.page.get_by_label("Temperature").fill("0.3")
    shown = visit.messages()
    visit.page.wait_for_timeout(500)
    visit.page.close()
    visit.open()
    visit.ready()
    visit.page.locator(".pick", has_text="first question").click()
    assert visit.messages() == shown and "1 / 2" in visit.page.locator(".branches").inner_text()
    visit.ask("second question")
    assert "system\nAnswer as a pirate." in last_prompt(server)
    assert server.engine.requests[-1].params.temperature == pytest.approx(0.3)
    visit.page.reload()
    visit.ready()
    assert visit.messages()[-2] == "second question", "the address names the conversation"


def test_an_answer_that_a_reload_interrupted_is_kept_and_says_so(visit: Visit):
    visit.send("endless")
    visit.until("document.querySelector('.live .prose:not(.quiet)')?.innerText.includes('word60 ')")
    visit.page.wait_for_timeout(500)
    visit.page.reload()
    visit.ready()
    answer = visit.page.locator(".message.assistant")
    answer.wait_for()
    assert "word60 " in answer.inner_text() and "Interrupted" in answer.inner_text()


def test_conversations_are_searched_renamed_exported_imported_and_deleted(visit: Visit, tmp_path: Path):
    visit.ask("about sunny days")
    visit.page.keyboard.press("Control+Shift+O")
    visit.ask("about something else")
    titles = visit.page.locator(".pick")
    assert titles.all_inner_texts() == ["about something else", "about sunny days"]
    visit.page.keyboard.press("Control+k")
    visit.page.keyboard.type("WILL sunny")
    assert titles.all_inner_texts() == ["about sunny days"], "by what was answered, too"
    visit.page.get_by_label("Search conversations").fill("")
    with visit.page.expect_download() as download:
        visit.button("Export all conversations").click()
    path = tmp_path / "export.json"
    download.value.save_as(path)
    exported = json.loads(path.read_text())
    assert len(exported["conversations"]) == 2
    row = visit.page.locator("li", has_text="about sunny days")
    row.hover()
    visit.page.on("dialog", lambda dialog: None)
    visit.page.evaluate("window.confirm = () => true")
    visit.button("Delete", row).click()
    visit.until("document.querySelectorAll('.pick').length === 1")
    visit.page.locator("input[accept*=json]").set_input_files(path)
    visit.until("document.querySelectorAll('.pick').length === 3")
    visit.page.reload()
    visit.ready()
    assert sorted(titles.all_inner_texts()) == ["about something else"] * 2 + ["about sunny days"]
    for wrong in ("{}", "no json", '{"nodes": {"a": {"role": "user", "content": 5}}}', CIRCLE):
        path.write_text(wrong)
        visit.page.locator("input[accept*=json]").set_input_files(path)
        visit.page.wait_for_selector("#notice:not([hidden]):has-text('could not be imported')")
        visit.button("Dismiss").click()
    assert titles.count() == 3


CIRCLE = json.dumps({"nodes": {n: {"role": "user", "content": "x", "parent": p} for n, p in (("a", "b"), ("b", "a"))}})


HANDLERS = """e => [...e.querySelectorAll('*')].flatMap(x => [...x.attributes])
  .filter(a => /^on|^style$/.test(a.name)).length"""


def test_hostile_text_runs_nothing_and_asks_for_nothing(visit: Visit, server: PageServer, tmp_path: Path):
    flushes = server.engine.num_flushes
    visit.ask("hostile " + HOSTILE)
    path = tmp_path / "hostile.json"
    node = {"role": "assistant", "content": HOSTILE, "reasoning": HOSTILE, "model": HOSTILE, "finish": HOSTILE}
    node["calls"] = [{"id": HOSTILE, "name": HOSTILE, "arguments": HOSTILE}]
    path.write_text(json.dumps({"title": HOSTILE, "leaf": "n", "nodes": {"n": node}}))
    visit.page.locator("input[accept*=json]").set_input_files(path)
    visit.until("document.querySelectorAll('.pick').length === 2")
    for row in (0, 1):
        visit.page.locator(".pick").nth(row).click()
        prose = visit.page.locator(".message.assistant .body")
        prose.locator(".prose:not(.quiet)").get_by_text("The end of it.").wait_for()
        if not prose.locator("details.thought").evaluate("e => e.open"):
            prose.locator("details.thought summary").first.click()
        for link in prose.locator("a").all():
            link.dispatch_event("mouseover")
            href = link.get_attribute("href")
            assert href is None or href.startswith(("http:", "https:")), href
            assert href is None or link.get_attribute("rel") == "noopener noreferrer nofollow"
        found = prose.locator(
            "script, img, iframe, svg:not(.icon), style, link, form, base, meta, object, embed, :not(.math) > math"
        )
        assert found.count() == 0, found.first.evaluate("e => e.outerHTML")
        assert prose.evaluate(HANDLERS) == 0
    assert visit.page.evaluate("window.hacked") is None
    assert visit.page.locator("body").evaluate("e => getComputedStyle(e).display") != "none"
    assert server.engine.num_flushes == flushes and not [url for _, url in visit.requests if "flush_cache" in url]


def test_the_policy_holds_where_the_sanitiser_would_not(visit: Visit):
    """As if a text had come past DOMPurify."""
    ran = visit.page.evaluate(
        """async () => {
          const tried = [];
          try {
            document.body.insertAdjacentHTML("beforeend", "<img src=x onerror='window.hacked = 1'>");
            tried.push("html");
          } catch { /* trusted types */ }
          const script = document.createElement("script");
          try { script.textContent = "window.hacked = 2"; document.body.append(script); } catch { /* trusted types */ }
          const image = new Image();
          try { image.setAttribute("onerror", "window.hacked = 3"); } catch { /* trusted types */ }
          image.src = "http://outside.invalid/a.png";
          document.body.append(image);
          const frame = document.createElement("iframe");
          frame.src = "http://outside.invalid/";
          document.body.append(frame);
          try { await fetch("http://outside.invalid/"); tried.push("fetch"); } catch { /* connect-src */ }
          const late = () => { try { eval("window.hacked = 4"); tried.push("eval"); } catch { /* no unsafe-eval */ } };
          setTimeout(late, 50);  // what runs now may use eval, since it was sent by a debugger
          await new Promise((resolve) => setTimeout(resolve, 300));
          return [tried, window.hacked ?? null];
        }"""
    )
    assert ran == [[], None]
    visit.requests.clear()  # Playwright lists what the policy then blocked


def luminance(colour: str) -> float:
    values = [int(part) / 255 for part in re.findall(r"\d+", colour)[:3]]
    linear = [v / 12.92 if v <= 0.04045 else ((v + 0.055) / 1.055) ** 2.4 for v in values]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


BACKGROUND = """e => { for (let at = e; at; at = at.parentElement) { const c = getComputedStyle(at).backgroundColor;
  if (/^rgb\\(/.test(c)) return [getComputedStyle(e).color, c]; } }"""
READ = (".bubble", ".prose p", ".stats", ".hint", ".pick", ".code-head span", ".code code", ".tab", ".age", ".model")


def test_both_themes_are_readable_and_the_choice_is_kept(chromium: Any, server: PageServer):
    for scheme in ("light", "dark"):
        visit = Visit(chromium, server.url, color_scheme=scheme)
        visit.ask("hi")
        backgrounds = {}
        for wanted in ("auto", "light", "dark"):
            visit.page.wait_for_timeout(50)
            for name in READ:
                text, ground = visit.page.locator(name).first.evaluate(BACKGROUND)
                light, dark = sorted((luminance(text), luminance(ground)), reverse=True)
                assert (light + 0.05) / (dark + 0.05) >= 4.5, (scheme, wanted, name, text, ground)
            backgrounds[wanted] = visit.page.locator("body").evaluate("e => getComputedStyle(e).backgroundColor")
            visit.page.get_by_label(re.compile("^Theme")).click()
        assert backgrounds["auto"] == backgrounds[scheme] and backgrounds["light"] != backgrounds["dark"]
        visit.button("Theme: as the system").click()
        visit.button("Theme: light").click()
        visit.page.reload()
        visit.ready()
        assert visit.page.locator("body").evaluate("e => getComputedStyle(e).backgroundColor") == backgrounds["dark"]
        visit.close()


def test_a_phone_shows_all_of_it(chromium: Any, server: PageServer):
    visit = Visit(chromium, server.url, viewport={"width": 390, "height": 844}, has_touch=True, is_mobile=True)
    visit.ask("hi " + "averyveryverylongword" * 12)
    wide = "document.documentElement.scrollWidth > innerWidth"
    assert not visit.page.evaluate(wide)
    box = visit.page.locator(".composer").bounding_box()
    assert box["y"] + box["height"] <= 844 and not visit.page.locator("#sidebar").is_visible()
    visit.button("Conversations (Ctrl B)").tap()
    visit.page.locator(".pick").first.tap()
    assert not visit.page.locator("#sidebar").is_visible()
    visit.button("Settings (Ctrl ,)").tap()
    assert visit.page.locator("#settings").bounding_box()["width"] == 390 and not visit.page.evaluate(wide)
    visit.button("Close settings").tap()
    visit.page.get_by_role("tab", name="Engine").tap()
    visit.page.wait_for_selector(".engine-body:not([hidden])")
    assert not visit.page.evaluate(wide)
    small = (
        "[...document.querySelectorAll('button')].filter(b => b.offsetParent && b.getBoundingClientRect().width < 24)"
    )
    assert visit.page.evaluate(small + ".length") == 0
    visit.close()


def test_the_engine_tab_shows_what_runs_and_asks_only_while_it_is_shown(visit: Visit, server: PageServer):
    visit.send("endless")
    visit.page.wait_for_selector(".message.live .prose p")
    visit.page.keyboard.press("Control+e")
    row = visit.page.locator(".engine tbody tr", has_text="decode").first
    row.wait_for()
    assert re.search(r"#\d+", row.inner_text())
    assert "1 + 0" in visit.page.locator(".tile-running").inner_text()
    labels = [each.get_attribute("aria-label") for each in visit.page.locator(".canvas canvas").all()]
    assert labels[0].startswith("100 pages of 16 tokens: 1 used") and "requests and" in labels[1]
    inked = """c => { const d = c.getContext('2d').getImageData(0, 0, c.width, c.height).data;
      return new Set(Array.from({length: d.length / 4}, (_, i) => d.slice(4 * i, 4 * i + 4).join())).size }"""
    for canvas in visit.page.locator(".canvas canvas").all():
        assert canvas.evaluate(inked) >= 3, "one colour for what is held, one for what is free"
    visit.page.locator(".canvas canvas").first.hover(position={"x": 4, "y": 4})
    assert "Page 1: held by #" in visit.page.locator("#tip").inner_text()
    visit.page.get_by_role("tab", name="Chat").click()
    visit.page.wait_for_timeout(300)
    asked = server.engine.num_snapshots
    visit.button("Stop").click()
    visit.page.wait_for_timeout(900)
    assert server.engine.num_snapshots == asked


def test_a_key_is_asked_for_kept_for_the_tab_and_sent_in_the_header_only(chromium: Any):
    with PageServer(TEXTS, api_key="sesame") as server:
        visit = Visit(chromium, server.url)
        visit.page.get_by_text("This server wants an API key.").wait_for()
        visit.button("Enter it").click()
        assert visit.page.evaluate("document.activeElement.id") == "set-key"
        visit.page.keyboard.type("sesame")
        visit.page.keyboard.press("Enter")
        visit.ready()
        assert "Hello" in visit.ask("hi").inner_text()
        visit.page.reload()
        assert "Hello" in visit.ask("hi").inner_text()
        assert not [url for _, url in visit.requests if "sesame" in url]
        assert visit.page.evaluate("JSON.stringify({...localStorage}).includes('sesame')") is False
        visit.page.get_by_role("tab", name="Engine").click()
        visit.page.wait_for_selector(".engine-body:not([hidden])")
        visit.close()


def test_a_start_is_watched_and_an_end_is_told(chromium: Any):
    with PageServer(TEXTS, engine={"announce_ready": False}) as server:
        server.engine.send(Progress("compile", 7, 18, "decode 16"))
        visit = Visit(chromium, server.url)
        visit.page.get_by_text("Compiling programs").wait_for()
        assert "7 of 18" in visit.page.locator(".starting").inner_text()
        assert visit.page.locator("progress").evaluate("e => [e.value, e.max]") == [7, 18]
        visit.field().fill("hi")
        assert visit.button("Send").is_disabled()
        server.engine.become_ready()
        visit.ready()
        visit.until("document.querySelector('.starting').hidden")
        assert "Hello" in visit.ask("hi").inner_text()
        server.engine.send(EngineFailed("out of memory"))
        server.engine.die()
        visit.send("hi again")
        visit.page.locator(".message .error:not([hidden])").wait_for()
        visit.page.get_by_text("The server failed").wait_for()
        assert "out of memory" in visit.page.locator(".starting").inner_text()
        visit.close()


def test_a_server_of_embeddings_says_so_and_shows_its_engine(chromium: Any):
    with PageServer(TEXTS, engine={"generates": False}) as server:
        visit = Visit(chromium, server.url).ready()
        visit.page.get_by_text("This server makes vectors").wait_for()
        visit.field().fill("hi")
        assert visit.button("Send").is_disabled()
        visit.page.get_by_role("tab", name="Engine").click()
        visit.page.wait_for_selector(".engine-body:not([hidden])")
        visit.close()


def test_what_the_server_refuses_is_shown_in_its_words(visit: Visit):
    visit.ready()
    visit.page.keyboard.press("Control+,")
    visit.page.get_by_label("Most tokens").fill("999999")
    answer = visit.ask("hi")
    assert "maximum context length is 8192 tokens" in answer.locator(".error").inner_text()
    visit.page.get_by_label("Most tokens").fill("")
    visit.page.locator("details.more summary").click()
    visit.page.get_by_label("Further fields").fill('{"top_k": ')
    assert visit.page.locator(".wrong:not([hidden])").count() == 1
    visit.button("Another answer").click()
    assert "Further fields in the settings" in visit.answered().locator(".error").inner_text()


def test_tools_are_called_shown_and_answered(visit: Visit, server: PageServer):
    visit.ready()
    visit.page.keyboard.press("Control+,")
    visit.page.locator("details.more summary").click()
    visit.page.get_by_label("Tools", exact=True).fill(json.dumps(TOOLS))
    answer = visit.ask("weather?")
    assert (
        "Calls get_weather" in answer.inner_text() and '"city": "<img src=x onerror=hacked=1>"' in answer.inner_text()
    )
    answer.get_by_label("Result of get_weather").fill("sunny, 21 degrees")
    visit.button("Send result").click()
    visit.page.locator(".prose", has_text="It will be sunny.").wait_for()
    assert "sunny, 21 degrees" in last_prompt(server) and "get_weather" in last_prompt(server)
    assert visit.page.locator(".message.tool").inner_text().startswith("Result of get_weather")
    visit.answered()


def test_token_probabilities_are_asked_for_coloured_and_explained(visit: Visit, server: PageServer):
    visit.ready()
    visit.page.keyboard.press("Control+,")
    visit.page.get_by_label("Token probabilities").check()
    answer = visit.ask("hi")
    assert server.engine.requests[-1].params.num_logprobs == 5
    visit.button("Show token probabilities", answer).click()
    tokens = answer.locator(".token")
    assert "".join(tokens.all_text_contents()).startswith("<think>Let me see.</think>Hello **world**, é.")
    tokens.nth(2).hover()
    shown = visit.page.locator("#tip").inner_text()
    assert "90.5 %" in shown and shown.count("%") == 5
    tokens.nth(2).evaluate("e => e.focus()")
    visit.page.keyboard.press("ArrowRight")
    assert tokens.nth(3).evaluate("e => e === document.activeElement")
    visit.page.keyboard.press("Control+Shift+O")
    assert not visit.page.locator("#tip").is_visible()


def test_sampling_settings_begin_with_the_servers_and_reach_the_engine(visit: Visit, server: PageServer):
    visit.ready()
    visit.page.keyboard.press("Control+,")
    for label, usual in (("Temperature", "1"), ("Top k", "0"), ("Repetition penalty", "1"), ("Most tokens", "auto")):
        assert visit.page.get_by_label(label, exact=True).get_attribute("placeholder") == usual
    fields = {"Top p": "0.5", "Top k": "7", "Min p": "0.1", "Presence penalty": "0.25", "Most tokens": "9", "Seed": "5"}
    for label, value in fields.items():
        visit.page.get_by_label(label, exact=True).fill(value)
    visit.page.get_by_label("Stop at").fill("STOP\nEND")
    answer = visit.ask("hi")
    params = server.engine.requests[-1].params
    assert (params.top_k, params.max_tokens, params.seed, params.temperature) == (7, 9, 5, 1.0)
    assert (params.top_p, params.min_p, params.presence_penalty) == (0.5, 0.1, 0.25)
    assert "Cut at the most tokens allowed" in answer.inner_text()
    visit.button("Reset to the server's").click()
    visit.ask("hi")
    assert server.engine.requests[-1].params.top_k == 0


def test_keys_do_what_they_say_and_everything_has_a_name(visit: Visit):
    visit.ask("hi")
    visit.page.locator("body").click(position={"x": 700, "y": 300})
    visit.page.keyboard.press("?")
    visit.page.get_by_role("dialog", name="Keys").wait_for()
    visit.page.keyboard.press("Escape")
    visit.page.keyboard.press("/")
    assert visit.page.evaluate("document.activeElement.getAttribute('aria-label')") == "Message"
    visit.page.keyboard.press("ArrowUp")
    assert visit.page.get_by_label("Edit the message").input_value() == "hi"
    visit.page.keyboard.press("Escape")
    visit.page.keyboard.press("Control+Shift+Enter")
    assert "2 / 2" in visit.answered().locator(".branches").inner_text()
    visit.page.keyboard.press("Control+b")
    assert not visit.page.locator("#sidebar").is_visible()
    visit.page.keyboard.press("Control+b")
    visit.page.keyboard.press("Control+,")
    nameless = """[...document.querySelectorAll('button, input, select, textarea, [role=img], [role=region]')]
      .filter(e => e.offsetParent && !(e.getAttribute('aria-label') || e.innerText?.trim() || e.labels?.length
        || e.getAttribute('aria-hidden'))).map(e => e.outerHTML.slice(0, 120))"""
    assert visit.page.evaluate(nameless) == []


def test_text_files_are_put_into_the_message_and_others_are_refused(visit: Visit, server: PageServer, tmp_path: Path):
    text, picture = tmp_path / "notes.md", tmp_path / "picture.png"
    text.write_text("some ```fenced``` notes")
    picture.write_bytes(b"\x89PNG\0\0")
    visit.ready()
    visit.page.locator(".composer input[type=file]").set_input_files([text, picture])
    visit.page.get_by_text("picture.png is no text").wait_for()
    visit.ask("read this")
    assert "read this\n\n````notes.md\nsome ```fenced``` notes\n````" in last_prompt(server)


def test_the_default_model_answers_on_the_page(chromium: Any, live: RealServer):
    visit = Visit(chromium, live.url)
    visit.ready()
    visit.page.keyboard.press("Control+,")
    visit.page.get_by_label("Temperature").fill("0")
    visit.page.get_by_label("Most tokens").fill("24")
    answer = visit.ask("What is the capital of France?")
    assert "The capital of France is Paris." in answer.inner_text()
    assert re.search(r"[\d.]+ tok/s", answer.locator(".stats").inner_text())
    visit.page.get_by_role("tab", name="Engine").click()
    visit.page.wait_for_selector(".engine tbody tr")
    assert eventually(lambda: "decode" in visit.page.locator(".columns .card").last.inner_text(), 10)
    assert "SmolLM2-135M-Instruct · 1 \N{MULTIPLICATION SIGN} cpu" in visit.page.locator(".facts").inner_text()
    time.sleep(0.6)
    visit.close()
