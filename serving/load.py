"""Tokens per second and latencies of a running server, by the number of concurrent clients and length of prompts.

$ make serve MODEL=grouped ARGS="--tensor-parallel-size 2"       # in another terminal
$ python serving/load.py --clients 1 8 32 --seconds 30
$ python serving/load.py --clients 1 --prompt_tokens 16 256 1000 --tokens 8        # together they must fit in the block

Each client sends another prompt as soon as it has an answer, and stops after so many seconds. Prompts are random ids
below 50, so that no cache knows one. All answers count, by the tokens that the server says they have. TTFT is the time
from asking to the first token, the time per token is that between an answer's others. Works with any
OpenAI-compatible server that streams and accepts token ids, and any model with at least 50 tokens; needs no package.
"""

import argparse
import json
import math
import random
import signal
import statistics
import sys
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from http.client import HTTPException
from typing import NamedTuple


class Answer(NamedTuple):
    """How many tokens it has, and the seconds to the first and between the others (None: there are none)."""

    tokens: int
    to_first: float
    per_token: float | None


def complete(url: str, prompt_tokens: int, tokens: int) -> Answer:
    """Ask once. Raises OSError, HTTPException, and ValueError for no answer."""
    body = dict(prompt=random.choices(range(50), k=prompt_tokens), max_tokens=tokens, temperature=0, ignore_eos=True)
    body |= dict(stream=True, stream_options=dict(include_usage=True))
    request = urllib.request.Request(f"{url}/v1/completions", json.dumps(body).encode())
    request.add_header("Content-Type", "application/json")
    text, times, found, begin = b"", [], None, time.monotonic()
    try:
        with urllib.request.urlopen(request, timeout=300) as response:
            for line in response:
                text += line
                if line.startswith(b"data: {"):
                    event = json.loads(line.removeprefix(b"data: "))
                    if event["choices"]:
                        times.append(time.monotonic())
                    if event.get("usage"):
                        found = event["usage"]["completion_tokens"]
    except urllib.error.HTTPError as error:
        raise ValueError(f"{error}: {start_of(error.read())}") from None
    except (json.JSONDecodeError, UnicodeDecodeError, LookupError, TypeError, RecursionError):
        found = None
    if type(found) is not int or found < 0 or not times:
        raise ValueError(f"an answer without usage.completion_tokens: {start_of(text)}")
    return Answer(found, times[0] - begin, (times[-1] - times[0]) / (found - 1) if found > 1 else None)


def start_of(text: bytes) -> str:
    """Its first 300 bytes on one line."""
    return " ".join(text[:300].decode(errors="replace").split())


def load(url: str, clients: int, prompt_tokens: int, tokens: int, seconds: float) -> tuple[list[Answer], float]:
    """(all answers, seconds until the last). Raises what complete() does."""
    begin = time.monotonic()

    def client(_):
        answers = [complete(url, prompt_tokens, tokens)]
        while time.monotonic() <= begin + seconds:
            answers.append(complete(url, prompt_tokens, tokens))
        return answers

    with ThreadPoolExecutor(clients) as pool:
        answers = [answer for found in pool.map(client, range(clients)) for answer in found]
    return answers, time.monotonic() - begin


def median_and_p95(seconds: list[float]) -> str:
    """Both in milliseconds, as two cells; of no figures, dashes."""
    if not seconds:
        return "- | -"
    p95 = sorted(seconds)[math.ceil(0.95 * len(seconds)) - 1]
    return f"{1000 * statistics.median(seconds):.1f} | {1000 * p95:.1f}"


def main():
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # all clients end at once
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", default="http://127.0.0.1:8000", help="of the server, default: %(default)s")
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 8, 32], help="default: %(default)s")
    parser.add_argument("--prompt_tokens", type=int, nargs="+", default=[16], help="of a prompt, default: %(default)s")
    parser.add_argument("--tokens", type=int, default=32, help="of an answer, default: %(default)s")
    parser.add_argument("--seconds", type=float, default=30, help="for each row, default: %(default)s")
    args = parser.parse_args()
    numbers = dict(clients=min(args.clients), prompt_tokens=min(args.prompt_tokens), tokens=args.tokens)
    for name, value in numbers.items():
        if value < 1:
            sys.exit(f"error: --{name} {value}: at least 1 is allowed")
    if not 0 <= args.seconds < math.inf:  # nan is not >= either
        sys.exit(f"error: --seconds {args.seconds}: a finite number of at least 0 is allowed")
    try:
        load(args.url, max(args.clients), min(args.prompt_tokens), args.tokens, 0)  # a server's first steps take longer
        print("| clients | prompt | tokens/s | TTFT ms | p95 | ms a token | p95 | answers' tokens |")
        print("|---|---|---|---|---|---|---|---|")
        for prompt_tokens in args.prompt_tokens:
            for clients in args.clients:
                answers, took = load(args.url, clients, prompt_tokens, args.tokens, args.seconds)
                n_tokens = sum(answer.tokens for answer in answers)
                if not n_tokens:
                    raise ValueError("its answers have no tokens")
                first = median_and_p95([answer.to_first for answer in answers])
                others = median_and_p95([answer.per_token for answer in answers if answer.per_token is not None])
                speed = f"{n_tokens / took:.1f}"
                print(f"| {clients} | {prompt_tokens} | {speed} | {first} | {others} | {n_tokens} |", flush=True)
    except (ValueError, OSError, HTTPException, RuntimeError) as error:  # RuntimeError: too many threads
        sys.exit(f"error: {args.url}: {error}")


if __name__ == "__main__":
    main()
