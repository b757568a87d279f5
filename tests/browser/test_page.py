"""The page in a browser, talking to a server that says what each test needs."""

import json
import re

import pytest
from servers import serving

PHONE = {"width": 360, "height": 720}


def log_texts(page) -> list[str]:
    return page.locator("#messages .text").all_text_contents()


def say(page, text: str) -> None:
    page.locator("#box").fill(text)
    page.locator("#box").press("Enter")


def appears(page, text: str) -> None:
    page.locator("#log").get_by_text(text).wait_for()


def until(page, expression: str) -> None:
    # Playwright's own wait_for_function is refused by the page's policy: it uses eval.
    for _ in range(400):
        if page.evaluate(expression):
            return
        page.wait_for_timeout(20)
    raise AssertionError(f"never true: {expression}")


def finished(page) -> None:
    """Waits until no answer is coming in."""
    page.locator("#log[aria-busy=false]").wait_for()


def converse(page, text: str = "Hello") -> list[str]:
    say(page, text)
    finished(page)
    return log_texts(page)


def named(page, name: str):
    return page.get_by_role("button", name=name, exact=True)


def set_fields(page, **values) -> None:
    named(page, "Settings").click()
    for name, value in values.items():
        field = page.locator(f"#settings [name={name}]")
        if isinstance(value, bool):
            field.set_checked(value)
        elif name in ("model", "theme"):
            field.select_option(value)
        else:
            field.fill(str(value))
    named(page, "Done").click()


def focused(page) -> str:
    return page.evaluate("document.activeElement.id")


# --- sending and answers -----------------------------------------------------------------------


def test_an_answer_appears_while_it_streams(chat, scripted):
    scripted.say("The quick", " brown", " fox", hang=True)
    say(chat, "What jumps?")
    appears(chat, "The quick brown fox")
    assert chat.locator("#log").get_attribute("aria-busy") == "true"
    assert log_texts(chat) == ["What jumps?", "The quick brown fox"]
    named(chat, "Stop").click()


def test_text_and_the_whole_conversation_are_sent(chat, scripted):
    converse(chat, "One\n  two")
    converse(chat, "three")
    assert scripted.received[1]["messages"] == [
        {"role": "user", "content": "One\n  two"},
        {"role": "assistant", "content": "You said: One\n  two"},
        {"role": "user", "content": "three"},
    ]
    assert scripted.received[0]["stream"] is True
    assert scripted.received[0]["stream_options"] == {"include_usage": True}


def test_by_keyboard_alone(chat, scripted):
    keys = chat.keyboard
    assert focused(chat) == "box"
    keys.type("first line")
    keys.press("Shift+Enter")
    keys.type("second line")
    scripted.say("to be", " stopped", hang=True)
    keys.press("Enter")
    appears(chat, "to be stopped")
    keys.type("typed meanwhile")
    keys.press("Enter")  # is not lost, and sends nothing
    keys.press("Escape")
    finished(chat)
    assert log_texts(chat) == ["first line\nsecond line", "to be stopped"]
    assert chat.locator("#box").input_value() == "typed meanwhile"
    assert focused(chat) == "box"
    scripted.say("once more")
    keys.press("Alt+r")
    appears(chat, "once more")
    finished(chat)
    keys.press("Alt+n")
    assert log_texts(chat) == []
    assert len(scripted.received) == 2


def test_choosing_a_word_of_an_input_method_does_not_send(chat, scripted):
    chat.locator("#box").fill("にほん")
    chat.evaluate(
        """box.dispatchEvent(new KeyboardEvent("keydown",
        {key: "Enter", isComposing: true, bubbles: true, cancelable: true}))"""
    )
    assert log_texts(chat) == []
    assert chat.locator("#box").input_value() == "にほん"


def test_blanks_are_not_sent(chat):
    say(chat, "  \n ")
    assert log_texts(chat) == []
    assert named(chat, "Send").is_disabled()


def test_stop_keeps_what_came_and_leaves_the_server(chat, scripted):
    scripted.say("a partial", " answer", hang=True)
    say(chat, "Hello")
    appears(chat, "a partial answer")
    named(chat, "Stop").click()
    finished(chat)
    assert log_texts(chat)[-1] == "a partial answer"
    assert chat.locator(".note:visible").text_content() == "Stopped."
    assert scripted.disconnected.wait(5)
    assert focused(chat) == "box"
    converse(chat, "Go on")
    assert scripted.received[1]["messages"][1]["content"] == "a partial answer"


def test_stop_before_the_first_token_leaves_a_way_on(chat, scripted):
    scripted.say(hang=True)
    say(chat, "Hello")
    named(chat, "Stop").click()
    finished(chat)
    assert log_texts(chat) == ["Hello"]
    named(chat, "Answer").click()
    appears(chat, "You said: Hello")


def test_regenerate_replaces_the_last_answer(chat, scripted):
    converse(chat)
    scripted.say("another")
    named(chat, "Regenerate").click()
    appears(chat, "another")
    assert log_texts(chat) == ["Hello", "another"]
    assert scripted.received[0]["messages"] == scripted.received[1]["messages"]


def test_an_answer_is_not_lost_when_it_cannot_be_regenerated(chat, scripted):
    converse(chat)
    scripted.refuse(503, "shutting down")
    named(chat, "Regenerate").click()
    chat.locator("#notice").wait_for()
    assert log_texts(chat) == ["Hello", "You said: Hello"]


def test_the_last_message_can_be_edited(chat, scripted):
    converse(chat, "Helo")
    chat.locator("#box").press("ArrowUp")
    assert chat.locator("#box").input_value() == "Helo"
    chat.keyboard.press("Escape")
    assert chat.locator("#box").input_value() == ""
    chat.locator("#box").fill("a draft")
    named(chat, "Edit").click()
    assert converse(chat, "Hello") == ["Hello", "You said: Hello"]
    assert chat.locator("#box").input_value() == "a draft"
    assert scripted.received[1]["messages"] == [{"role": "user", "content": "Hello"}]


def test_new_chat_can_be_undone(chat):
    converse(chat)
    named(chat, "New chat").click()
    assert log_texts(chat) == []
    assert focused(chat) == "box"
    named(chat, "Bring the last chat back").click()
    assert log_texts(chat) == ["Hello", "You said: Hello"]


def test_new_chat_ends_the_answer_that_is_coming(chat, scripted):
    scripted.say("of the old", hang=True)
    say(chat, "Hello")
    appears(chat, "of the old")
    named(chat, "New chat").click()
    assert scripted.disconnected.wait(5)
    assert converse(chat, "Again") == ["Again", "You said: Again"]


def test_copy(visit, scripted):
    page = visit(scripted.url, permissions=["clipboard-read", "clipboard-write"])
    text = "two  spaces\n\ttab <b>&amp;"
    scripted.say(text)
    converse(page)
    named(page, "Copy").click()
    named(page, "Copied").wait_for()
    assert page.evaluate("navigator.clipboard.readText()") == text


def test_save_writes_a_conversation_that_training_reads(chat, tmp_path):
    from openpalm.data.rows.readers.demonstrations import read_demonstrations
    from openpalm.data.text.conversation import Message

    set_fields(chat, system="Be brief.")
    converse(chat, "Grüße, “you”")
    with chat.expect_download() as download:
        named(chat, "Save").click()
    path = tmp_path / download.value.suggested_filename
    download.value.save_as(path)
    assert re.fullmatch(r"chat-[-\dT]+\.jsonl", path.name)
    assert read_demonstrations(path).items == [
        (
            Message("system", "Be brief."),
            Message("user", "Grüße, “you”"),
            Message("assistant", "You said: Grüße, “you”"),
        )
    ]


def test_speed_is_told(chat, scripted):
    scripted.say("one", " two", " three", delay_s=0.03)
    converse(chat)
    said = chat.locator("#stats").text_content()
    assert re.fullmatch(r"3 tokens · [\d.]+ tokens/s · first after \d+\.\d\d s", said)


def test_an_answer_cut_at_the_limit_says_so(chat, scripted, stream):
    scripted.say("cut", stream.chunk("", finish="length"), end=False)
    converse(chat)
    assert "limit" in chat.locator(".note:visible").text_content()


# --- settings ----------------------------------------------------------------------------------


def test_settings_are_sent(chat, scripted):
    values = {"temperature": 0, "top_p": 0.5, "top_k": 7, "max_tokens": 33, "seed": 42}
    set_fields(chat, model="other", system="Be brief.", store=True, **values)
    converse(chat)
    sent = scripted.received[0]
    assert {name: sent[name] for name in values} == values
    assert (sent["model"], sent["store"]) == ("other", True)
    assert sent["messages"][0] == {"role": "system", "content": "Be brief."}


def test_what_is_unset_is_not_sent(chat, scripted):
    converse(chat)
    unset = {"temperature", "top_p", "top_k", "seed", "max_tokens", "store"}
    assert not unset & scripted.received[0].keys()
    set_fields(chat, temperature=1)
    set_fields(chat, temperature="")
    converse(chat)
    assert "temperature" not in scripted.received[1]


def test_the_servers_own_temperature_is_shown(chat):
    named(chat, "Settings").click()
    assert chat.locator("[name=temperature]").get_attribute("placeholder") == "0.6"


def test_only_a_server_that_keeps_conversations_offers_it(visit, scripted):
    scripted.sharing = False
    page = visit(scripted.url)
    page.evaluate("localStorage.setItem('openpalm.base.settings', JSON.stringify({ store: true }))")
    page.reload()
    named(page, "Settings").click()
    assert page.locator("[name=store]").is_hidden()
    named(page, "Done").click()
    converse(page)
    assert "store" not in scripted.received[0]


def test_a_value_out_of_bounds_is_marked_and_not_used(chat, scripted):
    named(chat, "Settings").click()
    field = chat.locator("[name=temperature]")
    field.fill("3")
    field.press("Tab")
    assert field.evaluate("field => field.matches(':user-invalid')")
    chat.keyboard.press("Escape")
    converse(chat)
    assert "temperature" not in scripted.received[0]


def test_a_reload_keeps_conversation_draft_and_settings(chat, scripted):
    set_fields(chat, temperature=0.25, show_tokens=True, theme="dark")
    converse(chat)
    chat.locator("#box").fill("not sent yet")
    chat.reload()
    assert log_texts(chat) == ["Hello", "You said: Hello"]
    assert chat.locator(".token").count() == 1
    assert chat.locator("#box").input_value() == "not sent yet"
    assert chat.locator("html").get_attribute("data-theme") == "dark"
    chat.locator("#box").press("Enter")
    appears(chat, "You said: not sent yet")
    assert scripted.received[1]["temperature"] == 0.25


def test_a_reload_keeps_a_partial_answer(chat, scripted):
    scripted.say("half of", hang=True)
    say(chat, "Hello")
    appears(chat, "half of")
    chat.reload()
    assert log_texts(chat) == ["Hello", "half of"]


def test_works_without_storage(visit, scripted, browser):
    page = visit(scripted.url)
    page.add_init_script(
        """for (const name of ["localStorage", "sessionStorage"])
        Object.defineProperty(window, name, {get() { throw new Error("refused"); }});"""
    )
    page.reload()
    assert converse(page) == ["Hello", "You said: Hello"]


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_the_chosen_appearance_wins(visit, scripted, theme):
    other = "dark" if theme == "light" else "light"
    page = visit(scripted.url, color_scheme=other)
    set_fields(page, theme=theme)
    red = page.evaluate(
        "getComputedStyle(document.documentElement).backgroundColor.match(/\\d+/)[0]"
    )
    assert (int(red) > 128) == (theme == "light")


# --- errors ------------------------------------------------------------------------------------


def test_a_busy_server_is_explained_and_retried(chat, scripted):
    scripted.refuse(429, "8 requests are waiting", Retry_After="7")
    say(chat, "Hello")
    notice = chat.locator("#notice p")
    notice.wait_for()
    assert "7 seconds" in notice.text_content()
    assert "8 requests are waiting" in notice.text_content()
    assert "7 seconds" in chat.locator("#speech").text_content()
    assert log_texts(chat) == ["Hello"]
    named(chat, "Retry").click()
    appears(chat, "You said: Hello")
    assert chat.locator("#notice").is_hidden()


@pytest.mark.parametrize(("status", "message"), [(400, "prompt too long"), (413, "too large")])
def test_a_refusal_says_why(chat, scripted, status, message):
    scripted.refuse(status, message)
    say(chat, "Hello")
    appears(chat, message)
    named(chat, "Edit").click()
    assert chat.locator("#box").input_value() == "Hello"


def test_an_error_within_the_stream_keeps_what_came(chat, scripted):
    scripted.say("so far", {"error": {"message": "the engine <stopped>"}}, end=False)
    say(chat, "Hello")
    appears(chat, "the engine <stopped>")
    assert log_texts(chat) == ["Hello", "so far"]
    named(chat, "Retry").click()
    appears(chat, "You said: Hello")
    assert log_texts(chat) == ["Hello", "You said: Hello"]


def test_a_broken_connection_is_no_finished_answer(chat, scripted):
    scripted.say("so far", end=False)
    say(chat, "Hello")
    appears(chat, "ended before the answer was complete")
    assert log_texts(chat) == ["Hello", "so far"]


def test_a_key_is_asked_for_and_used(visit, scripted):
    scripted.key = "secret"
    page = visit(scripted.url)
    named(page, "Enter API key").click()
    assert page.evaluate("document.activeElement.name") == "key"
    page.keyboard.type("secret")
    page.keyboard.press("Enter")
    page.locator("#model-name").get_by_text("tiny").wait_for()
    assert converse(page) == ["Hello", "You said: Hello"]
    assert "secret" not in page.evaluate("JSON.stringify(localStorage)")


def test_a_key_given_late_sends_the_message_again(chat, scripted):
    scripted.key = "secret"
    say(chat, "Hello")
    named(chat, "Enter API key").click()
    chat.keyboard.type("secret")
    named(chat, "Done").click()
    appears(chat, "You said: Hello")


def test_an_absent_server_is_explained(visit, scripted):
    page = visit(scripted.url)
    page.route("**/v1/chat/completions", lambda route: route.abort())
    say(page, "Hello")
    appears(page, "cannot be reached")
    page.unroute_all()
    named(page, "Retry").click()
    appears(page, "You said: Hello")


# --- hostile answers and tokens ----------------------------------------------------------------


@pytest.mark.parametrize("tinted", [False, True])
def test_markup_in_an_answer_is_text(chat, scripted, tinted):
    set_fields(chat, show_tokens=tinted)
    hostile = "<img src=x onerror=window.hurt=1><script>hurt=1</script>&lt;\u202eb\u0000"
    scripted.say(hostile)
    assert converse(chat, hostile) == [hostile, hostile]
    chat.wait_for_timeout(100)
    assert chat.locator("#messages :is(img, script)").count() == 0
    assert chat.evaluate("window.hurt") is None


@pytest.fixture
def colours(chat, scripted, stream):
    """An answer of three tokens, tinted."""
    token = stream.token
    set_fields(chat, show_tokens=True)
    scripted.say(
        stream.chunk("The", token("The", 0.9)),
        stream.chunk(" red", token(" red", 0.03, {" blue": 0.8, "\n": 0.1})),
        stream.chunk(" fox", token(" fox", 0.6)),
    )
    converse(chat)
    return chat


def test_a_token_tells_its_probability_to_the_mouse(colours):
    colours.locator(".token").nth(1).hover()
    tip = colours.locator("#tip")
    tip.wait_for()
    rows = tip.locator(".row").all_inner_texts()
    assert [re.sub(r"\s+", " ", row) for row in rows] == ["␣blue 80.0 %", "↵ 10.0 %", "␣red 3.00 %"]
    assert tip.locator(".chosen").count() == 1
    place = tip.bounding_box()  # may be pointed at itself, to be read
    colours.mouse.move(place["x"] + 5, place["y"] + place["height"] - 5, steps=8)
    colours.wait_for_timeout(300)
    assert tip.is_visible()
    colours.locator("#box").hover()
    tip.wait_for(state="hidden")


def test_a_token_tells_its_probability_to_the_keyboard(colours):
    colours.locator("#log").focus()
    keys = colours.keyboard
    while not colours.evaluate("document.activeElement.matches('.token')"):
        keys.press("Tab")
    keys.press("ArrowRight")
    token = colours.locator(".token:focus")
    assert token.text_content() == " red"
    assert token.get_attribute("aria-describedby") == "tip"
    assert "80.0 %" in colours.locator("#tip:visible").text_content()
    keys.press("Escape")
    assert colours.locator("#tip").is_hidden()
    keys.press("End")
    assert "60.0 %" in colours.locator("#tip:visible").text_content()


def test_without_tints_a_resting_mouse_is_enough(colours):
    place = colours.locator(".token").nth(1).bounding_box()
    set_fields(colours, show_tokens=False)
    assert colours.locator(".token").count() == 0
    x, y = place["x"] + place["width"] - 3, place["y"] + place["height"] / 2
    colours.mouse.move(x - 1, y)
    colours.mouse.move(x, y)
    assert colours.locator("#tip").is_hidden()
    colours.locator("#tip").wait_for()
    assert "␣blue" in colours.locator("#tip").text_content()


def test_tints_follow_the_probability(colours):
    classes = [token.get_attribute("class") for token in colours.locator(".token").all()]
    assert classes == ["token p0", "token p4", "token p1"]


def test_tokens_of_half_a_character_share_it(chat, scripted, stream):
    token = stream.token
    set_fields(chat, show_tokens=True)
    block = "█".encode()
    scripted.say(
        stream.chunk("a", token("a")),
        stream.chunk("", token(block[:2], 0.5, {b"\xe2\x97": 0.25})),
        stream.chunk("█", token(block[2:], 0.5)),
        stream.chunk("", token("<|end|>")),  # wrote no text
        stream.chunk(" held", token(" he")),  # text and tokens in different chunks
        stream.chunk(" back", token("ld"), token(" back")),
    )
    assert converse(chat)[-1] == "a█ held back"
    assert chat.locator(".token").all_text_contents() == ["a", "█", " he", "ld", " back"]
    chat.locator(".token").nth(1).hover()
    tip = chat.locator("#tip").inner_text()
    assert "25.0 % in 2 tokens" in tip
    assert r"bytes:\xe2\x97" in tip


# --- layout, speed and access ------------------------------------------------------------------

LONG = "word " * 40 + "x" * 300 + "\n" + "    indented code = " + "y" * 200


@pytest.mark.parametrize("tinted", [False, True])
def test_a_phone_never_scrolls_sideways(visit, scripted, tinted):
    page = visit(scripted.url, viewport=PHONE, has_touch=True, is_mobile=True)
    set_fields(page, show_tokens=tinted)
    scripted.refuse(400, LONG)
    say(page, LONG)
    page.locator("#notice").wait_for()
    scripted.say(LONG)
    named(page, "Retry").click()
    finished(page)
    named(page, "Settings").click()
    wide = """[...document.querySelectorAll("body *")].filter((e) => e.checkVisibility()
        && !e.closest(".unseen") && (e.getBoundingClientRect().right > innerWidth + 0.5
        || e.matches("#log, dialog") && e.scrollWidth > e.clientWidth)).map((e) => e.outerHTML)"""
    assert page.evaluate(wide) == []
    assert page.evaluate("document.documentElement.scrollWidth") == PHONE["width"]


@pytest.mark.parametrize("tinted", [False, True])
def test_four_thousand_tokens_stay_smooth(chat, scripted, tinted):
    set_fields(chat, show_tokens=tinted)
    chat.evaluate(
        """window.longest = 0;
        new PerformanceObserver((list) => list.getEntries().forEach((entry) =>
          window.longest = Math.max(window.longest, entry.duration))).observe({type: "longtask"})"""
    )
    words = [f" word{i}" + "\n" * (i % 50 == 0) for i in range(4000)]
    scripted.say(*words, delay_s=0.0005)
    say(chat, "Hello")
    chat.locator("#log[aria-busy=false]").wait_for(timeout=60_000)
    assert log_texts(chat)[-1] == "".join(words)
    assert chat.evaluate("window.longest") < 300  # ms; none is over 50 on an idle machine


def test_the_log_follows_only_a_reader_at_its_end(chat, scripted):
    scripted.say(*("line\n" for _ in range(200)), hang=True)
    say(chat, "Hello")
    at_end = "log.scrollHeight - log.scrollTop - log.clientHeight < 2"
    until(chat, "document.querySelectorAll('.text')[1].textContent.length === 1000")
    until(chat, at_end)
    chat.locator("#log").evaluate("log => log.scrollTop = 100")
    named(chat, "Newest").wait_for()
    named(chat, "Stop").click()
    finished(chat)
    assert chat.evaluate("log.scrollTop") == 100
    chat.locator("#newest").click()
    assert chat.evaluate(at_end)


def test_screen_readers_hear_sentences_not_tokens(chat, scripted):
    chat.evaluate(
        """window.heard = [];
        new MutationObserver((all) => all.forEach((one) => one.addedNodes.forEach((node) =>
          window.heard.push(node.textContent)))).observe(speech, {childList: true})"""
    )
    words = [f"Sentence {i} is said. " for i in range(40)]
    scripted.say(*words, delay_s=0.005)
    converse(chat)
    heard = chat.evaluate("window.heard")
    assert "".join(heard) == "".join(words)
    assert len(heard) <= 5
    assert all(part.strip().endswith(".") for part in heard)
    assert chat.locator("#log").get_attribute("aria-live") == "off"


@pytest.mark.parametrize("size", ["desktop", "phone"])
@pytest.mark.parametrize("theme", ["light", "dark"])
def test_axe_finds_nothing(visit, scripted, stream, axe, theme, size):
    viewport = PHONE if size == "phone" else {"width": 1100, "height": 760}
    page = visit(scripted.url, color_scheme=theme, viewport=viewport)
    check(page, axe)  # the empty page
    set_fields(page, show_tokens=True)
    chances = (0.9, 0.6, 0.3, 0.1, 0.01)
    scripted.say(*(stream.chunk(f" {p}", stream.token(f" {p}", p)) for p in chances))
    converse(page)
    page.locator(".token").nth(2).focus()
    check(page, axe)  # tints and a tooltip
    scripted.refuse(429, "busy")
    say(page, "Hello again")
    page.locator("#notice").wait_for()
    page.locator("#box").fill("draft")
    check(page, axe)  # a notice
    named(page, "Edit").click()
    check(page, axe)
    named(page, "Settings").click()
    check(page, axe)
    page.locator("[name=temperature]").fill("3")
    page.keyboard.press("Tab")
    check(page, axe)


def check(page, axe: str) -> None:
    page.evaluate(axe)
    found = page.evaluate("axe.run()")["violations"]
    shown = [
        f"{one['impact']}: {one['help']}: {node['html'][:200]} {node['failureSummary']}"
        for one in found
        for node in one["nodes"]
    ]
    assert shown == []


def test_every_control_is_reached_by_tab_and_shows_it(chat):
    converse(chat)
    chat.locator("#new").focus()
    seen = []
    for _ in range(12):
        seen.append(chat.evaluate("document.activeElement.textContent.trim().slice(0, 20)"))
        ring = "e => e.matches(':focus-visible')"
        assert chat.locator(":focus").evaluate(ring)
        if focused(chat) == "box":
            break
        chat.keyboard.press("Tab")
    names = [name for name in seen if len(name) < 15]
    assert names == ["New chat", "Save", "Settings", "Edit", "Copy", "Regenerate", ""]


# --- the real server ---------------------------------------------------------------------------


def test_the_real_server_answers(visit, page_server):
    page = visit(page_server)
    set_fields(page, show_tokens=True, max_tokens=8, temperature=0)
    converse(page, "Hi")
    texts = log_texts(page)
    assert texts[0] == "Hi"
    assert page.locator(".token").count() > 0
    assert "".join(page.locator(".token").all_text_contents()) == texts[1]
    assert re.match(r"\d+ tokens?", page.locator("#stats").text_content())
    assert page.locator("#notice").is_hidden()
    named(page, "Regenerate").click()
    finished(page)
    assert log_texts(page) == texts  # temperature 0


def test_the_real_server_can_be_stopped(visit, page_server):
    page = visit(page_server)
    say(page, "Hi")
    page.keyboard.press("Escape")
    finished(page)
    assert log_texts(page)[0] == "Hi"


def test_the_real_server_refuses_and_the_page_says_why(visit, page_server):
    page = visit(page_server)
    say(page, "x" * 5000)
    page.locator("#notice").wait_for()
    assert log_texts(page) == ["x" * 5000]


def test_the_real_server_asks_for_its_key(visit, run):
    with serving(run, "--api-key", "secret") as server:
        page = visit(server.url)
        named(page, "Enter API key").click()
        page.keyboard.type("secret")
        page.keyboard.press("Enter")
        page.locator("#notice").wait_for(state="hidden")
        set_fields(page, max_tokens=4)
        converse(page, "Hi")
        assert page.locator("#notice").is_hidden()


def test_the_scripted_server_sends_the_real_policy(visit, scripted, page_server):
    policies = set()
    for url in (scripted.url, page_server):
        page = visit(url)
        response = page.request.get(url)
        header = response.headers["content-security-policy"]
        policies.add(json.dumps(sorted(part.strip() for part in header.split(";") if part.strip())))
    assert len(policies) == 1
