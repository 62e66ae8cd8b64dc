"""serving/load.py, which measures a server, against a small fake one."""

import contextlib
import http.server
import json
import sys
import threading
import time

import pytest
from launch import ROOT, load_script, status

load = load_script(ROOT / "serving" / "load.py")


@contextlib.contextmanager
def server(answer):
    """The URL of a server that sends what answer(request) returns: (status, bytes, Content-Length or None)."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            code, body, length = answer(request)
            self.send_response(code)
            self.send_header("Content-Length", str(len(body) if length is None else length))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as one:
        thread = threading.Thread(target=one.serve_forever, kwargs=dict(poll_interval=0.01))
        thread.start()
        try:
            yield f"http://127.0.0.1:{one.server_port}"
        finally:
            one.shutdown()
            thread.join()


def run(monkeypatch, *argv):
    """The exit status of load.py with these arguments: a line where it is an error's."""
    monkeypatch.setattr(sys, "argv", ["load.py", *map(str, argv)])
    return status(lambda _: load.main(), [])


@pytest.mark.parametrize("share", [1, 4])
def test_the_tokens_that_came_count(monkeypatch, capsys, share):
    """Fault 17: of a server that ends after a quarter of the tokens, a token takes 4 times what it would otherwise."""

    def answer(request):
        time.sleep(0.2)
        return 200, json.dumps({"usage": {"completion_tokens": request["max_tokens"] // share}}).encode(), None

    with server(answer) as url:
        assert run(monkeypatch, f"--url={url}", "--clients", 1, 2, "--tokens", 8, "--seconds", 0) == 0
    *_, one, two = capsys.readouterr().out.splitlines()
    for line, clients in ((one, 1), (two, 2)):
        cells = [float(cell) for cell in line.strip("| ").split("|")]
        n_tokens = clients * 8 // share
        assert (cells[0], cells[3]) == (clients, n_tokens)
        assert cells[2] == pytest.approx(200 * share / 8, rel=0.5)
        assert cells[1] == pytest.approx(n_tokens / 0.2, rel=0.5)


WHOLE = json.dumps({"usage": {"completion_tokens": 8}}).encode()
ANSWERS = {
    "no usage": (200, b'{"choices": []}', None, 'an answer without usage.completion_tokens: {"choices": []}'),
    "null": (200, b'{"usage": null}', None, 'an answer without usage.completion_tokens: {"usage": null}'),
    "a list": (200, b"[1,\n2]", None, "an answer without usage.completion_tokens: [1, 2]"),
    "a text": (200, b'{"usage": {"completion_tokens": "8"}}', None, "an answer without usage.completion_tokens: "),
    "below zero": (200, b'{"usage": {"completion_tokens": -8}}', None, "an answer without usage.completion_tokens: "),
    "none at all": (200, b'{"usage": {"completion_tokens": 0}}', None, "its answers have no tokens"),
    "no JSON": (200, b"<html>\n\xff", None, "an answer without usage.completion_tokens: <html> "),
    "cut": (200, WHOLE, 1000, f"IncompleteRead({len(WHOLE)} bytes read, {1000 - len(WHOLE)} more expected)"),
    "cut error": (500, b"x", 1000, "IncompleteRead(1 bytes read, 999 more expected)"),
    "an error": (404, b'{"error":\n"no model"}', None, 'HTTP Error 404: Not Found: {"error": "no model"}'),
}


@pytest.mark.parametrize("name", ANSWERS)
def test_an_answer_that_cannot_be_counted_is_one_line(monkeypatch, name):
    """Fault 17: it was a traceback."""
    *answer, line = ANSWERS[name]
    with server(lambda _: answer) as url:
        error = run(monkeypatch, f"--url={url}", "--clients", 2, "--seconds", 0)
    assert error.startswith(f"error: {url}: {line}") and "\n" not in error


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["--tokens=0"], "--tokens 0: at least 1 is allowed"),
        (["--clients", "1", "0"], "--clients 0: at least 1 is allowed"),
        (["--seconds=-1"], "--seconds -1.0: a finite number of at least 0 is allowed"),
        (["--seconds=nan"], "--seconds nan: a finite number of at least 0 is allowed"),
        (["--url=http://127.0.0.1:port"], "http://127.0.0.1:port: nonnumeric port: 'port'"),
        (["--url=nowhere"], "nowhere: unknown url type: 'nowhere/v1/completions'"),
    ],
)
def test_impossible_arguments_are_one_line(monkeypatch, arguments, line):
    """Fault 17: --tokens 0 was a traceback, and --seconds nan had no end."""
    assert run(monkeypatch, *arguments) == f"error: {line}"
