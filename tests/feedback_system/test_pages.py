"""What the tests of pages watch for, on pages that do it."""

import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from chromium import Pages

POLICY = "default-src 'none'; script-src 'unsafe-inline'; connect-src *; img-src data:"


@contextmanager
def serving(body: str):
    """The URL of a page with this body, and of nothing else."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200 if self.path == "/" else 404)
            self.send_header("Content-Type", "text/html; charset=utf-8")
            self.send_header("Content-Security-Policy", POLICY)
            self.end_headers()
            self.wfile.write(f"<!doctype html><link rel=icon href=data:,>{body}".encode())

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@pytest.mark.parametrize(
    ("body", "problem"),
    [
        ("<script>throw new Error('broken')</script>", "error: broken"),
        ("<script>console.error('said so')</script>", "said so"),
        ("<script>fetch('http://127.0.0.1:9/x').catch(() => 0)</script>", "left the origin"),
        ("<p onclick='' style='color: red'>red</p>", "style-src"),
    ],
)
def test_a_problem_of_a_page_is_seen(browser, body, problem):
    pages = Pages(browser)
    with serving(body) as url:
        pages.open(url).wait_for_timeout(50)
        found = pages.close()
    assert any(problem in one for one in found), found


@pytest.mark.parametrize("scripts", [True, False])
def test_a_sound_page_has_no_problem(visit, scripts):
    said = "<p>text</p><noscript>no scripts</noscript><script>document.title = 'ran'</script>"
    with serving(said) as url:
        page = visit(url, java_script_enabled=scripts)
        assert page.title() == ("ran" if scripts else "")
        assert page.locator("noscript").is_visible() is not scripts


def test_settle_waits_for_htmx(visit, settle):
    busy = """<p class="htmx-request">busy</p><script>
      setTimeout(() => { document.querySelector("p").className = ""; }, 300);
    </script>"""
    with serving(busy) as url:
        page = visit(url)
        assert page.locator(".htmx-request").count() == 0
        settle(page)
