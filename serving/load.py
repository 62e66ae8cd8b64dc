"""Tokens per second of a running server, by how many clients ask at once.

$ make serve MODEL=grouped ARGS="--tensor-parallel-size 2"       # in another terminal
$ python serving/load.py --clients 1 8 32 --seconds 30

Each client sends the same short prompt again as soon as it has an answer, and stops after so many seconds. All answers
count, by the tokens that the server says they have, and the time until the last. Any server of OpenAI's completions
will do, and any model that takes the prompt; no package is needed.
"""

import argparse
import json
import math
import sys
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from http.client import HTTPException


def complete(url: str, tokens: int) -> int:
    """Ask once; returns how many tokens the answer has. Raises OSError, HTTPException, and ValueError for no answer."""
    body = dict(prompt="The", max_tokens=tokens, temperature=0, ignore_eos=True)
    request = urllib.request.Request(f"{url}/v1/completions", json.dumps(body).encode())
    request.add_header("Content-Type", "application/json")
    try:
        with urllib.request.urlopen(request, timeout=300) as response:
            text = response.read()
    except urllib.error.HTTPError as error:
        raise ValueError(f"{error}: {start_of(error.read())}") from None
    try:
        found = json.loads(text)["usage"]["completion_tokens"]
    except (ValueError, LookupError, TypeError, RecursionError):
        found = None
    if type(found) is not int or found < 0:
        raise ValueError(f"an answer without usage.completion_tokens: {start_of(text)}")
    return found


def start_of(text: bytes) -> str:
    """Its first 300 bytes on one line."""
    return " ".join(text[:300].decode(errors="replace").split())


def load(url: str, clients: int, tokens: int, seconds: float) -> tuple[int, float, float]:
    """(tokens of all answers, seconds until the last, seconds of all answers). Raises what complete() does."""
    begin = time.monotonic()

    def client(_):
        answers = []  # (tokens, seconds), one at least
        while True:
            start = time.monotonic()
            answers.append((complete(url, tokens), time.monotonic() - start))
            if time.monotonic() > begin + seconds:
                return answers

    with ThreadPoolExecutor(clients) as pool:
        answers = [answer for found in pool.map(client, range(clients)) for answer in found]
    took = time.monotonic() - begin
    return sum(n for n, _ in answers), took, sum(t for _, t in answers)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", default="http://127.0.0.1:8000", help="of the server, default: %(default)s")
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 8, 32], help="default: %(default)s")
    parser.add_argument("--tokens", type=int, default=32, help="of an answer, default: %(default)s")
    parser.add_argument("--seconds", type=float, default=30, help="for each number of clients, default: %(default)s")
    args = parser.parse_args()
    for name, value in (("clients", min(args.clients)), ("tokens", args.tokens)):
        if value < 1:
            sys.exit(f"error: --{name} {value}: at least 1 is allowed")
    if not 0 <= args.seconds < math.inf:  # nan is not >= either
        sys.exit(f"error: --seconds {args.seconds}: a finite number of at least 0 is allowed")
    try:
        load(args.url, max(args.clients), args.tokens, 0)  # the first steps of a server take longer
        print("| clients | tokens/s | ms a token of one client | answers' tokens |\n|---|---|---|---|")
        for clients in args.clients:
            n_tokens, took, waited = load(args.url, clients, args.tokens, args.seconds)
            if not n_tokens:
                raise ValueError("its answers have no tokens")
            print(f"| {clients} | {n_tokens / took:.1f} | {1000 * waited / n_tokens:.1f} | {n_tokens} |", flush=True)
    except (ValueError, OSError, HTTPException, RuntimeError) as error:  # RuntimeError: too many threads
        sys.exit(f"error: {args.url}: {error}")


if __name__ == "__main__":
    main()
