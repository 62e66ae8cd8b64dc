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
    """The URL of a server that sends what answer(request) returns: (status, parts, Content-Length or None)."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            code, parts, length = answer(request)
            self.send_response(code)
            if length is not None:  # else the connection's end is the answer's
                self.send_header("Content-Length", str(length))
            self.end_headers()
            for part in parts:
                self.wfile.write(part)

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


def events(n_tokens, *others):
    """A streamed answer of so many tokens, and `others`, JSON texts, in the place of what says how many."""
    usage = others or [json.dumps({"choices": [], "usage": {"completion_tokens": n_tokens}})]
    chunks = [json.dumps({"choices": [{"text": "a"}], "usage": None})] * n_tokens
    return [f"data: {text}\n\n".encode() for text in [*chunks, *usage, "[DONE]"]]


@pytest.mark.parametrize("share", [1, 4])
def test_tokens_and_latencies(monkeypatch, capsys, share):
    """The tokens that came count; of a server that ends after a quarter of them, one takes 4 times what it would."""
    asked = []

    def answer(request):
        asked.append(request["prompt"])
        for i, event in enumerate(events(request["max_tokens"] // share)):
            time.sleep(0.2 if i == 0 else 0.05)
            yield event

    argv = ["--clients", 1, 2, "--prompt_tokens", 5, 7, "--tokens", 8, "--seconds", 0]
    with server(lambda request: (200, answer(request), None)) as url:
        assert run(monkeypatch, f"--url={url}", *argv) == 0
    rows = [[float(cell) for cell in line.strip("| ").split("|")] for line in capsys.readouterr().out.splitlines()[2:]]
    assert [row[:2] for row in rows] == [[1, 5], [2, 5], [1, 7], [2, 7]]
    n = 8 // share
    for clients, _, speed, *latencies, n_tokens in rows:
        assert n_tokens == clients * n
        assert speed == pytest.approx(n_tokens / (0.2 + 0.05 * (n + 1)), rel=0.5)
        assert latencies == pytest.approx([200, 200, 50, 50], rel=0.5)
    assert [len(prompt) for prompt in asked] == [5, 5, 5, 5, 5, 7, 7, 7]
    assert len({tuple(prompt) for prompt in asked}) == len(asked)  # none that a cache knows


def test_one_token_has_no_time_per_token(monkeypatch, capsys):
    with server(lambda _: (200, events(1), None)) as url:
        assert run(monkeypatch, f"--url={url}", "--clients", 1, "--tokens", 1, "--seconds", 0) == 0
    assert capsys.readouterr().out.splitlines()[2].endswith("| - | - | 1 |")


WITHOUT = "an answer without usage.completion_tokens: "
ANSWERS = {
    "no usage": (200, events(0, '{"choices": []}'), None, WITHOUT + 'data: {"choices": []} data: [DONE]'),
    "no choices": (200, events(0, '{"error": 1}'), None, WITHOUT + 'data: {"error": 1}'),
    "a list": (200, events(1, '{"choices": [], "usage": [1]}'), None, WITHOUT),
    "a text": (200, events(1, '{"choices": [], "usage": {"completion_tokens": "8"}}'), None, WITHOUT),
    "below zero": (200, events(1, '{"choices": [], "usage": {"completion_tokens": -8}}'), None, WITHOUT),
    "none at all": (
        200,
        events(1, '{"choices": [], "usage": {"completion_tokens": 0}}'),
        None,
        "its answers have no tokens",
    ),
    "no stream": (200, [b'{"usage": {"completion_tokens": 8}}'], None, WITHOUT + '{"usage": '),
    "no JSON": (200, [b"data: {html> \xff\n"], None, WITHOUT + "data: {html> "),
    "cut": (200, events(8)[:5], 10000, WITHOUT),
    "cut error": (500, [b"x"], 1000, "IncompleteRead(1 bytes read, 999 more expected)"),
    "an error": (404, [b'{"error":\n"no model"}'], None, 'HTTP Error 404: Not Found: {"error": "no model"}'),
}


@pytest.mark.parametrize("name", ANSWERS)
def test_an_answer_that_cannot_be_counted_is_one_line(monkeypatch, name):
    """It was a traceback."""
    *answer, line = ANSWERS[name]
    with server(lambda _: answer) as url:
        error = run(monkeypatch, f"--url={url}", "--clients", 2, "--seconds", 0)
    assert error.startswith(f"error: {url}: {line}") and "\n" not in error


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["--tokens=0"], "--tokens 0: at least 1 is allowed"),
        (["--clients", "1", "0"], "--clients 0: at least 1 is allowed"),
        (["--prompt_tokens=0"], "--prompt_tokens 0: at least 1 is allowed"),
        (["--seconds=-1"], "--seconds -1.0: a finite number of at least 0 is allowed"),
        (["--seconds=nan"], "--seconds nan: a finite number of at least 0 is allowed"),
        (["--url=http://127.0.0.1:port"], "http://127.0.0.1:port: nonnumeric port: 'port'"),
        (["--url=nowhere"], "nowhere: unknown url type: 'nowhere/v1/completions'"),
    ],
)
def test_impossible_arguments_are_one_line(monkeypatch, arguments, line):
    """--tokens 0 was a traceback, and --seconds nan had no end."""
    assert run(monkeypatch, *arguments) == f"error: {line}"
