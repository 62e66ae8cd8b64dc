"""Tokens per second of a running server, by how many clients ask at once.

$ make serve MODEL=grouped ARGS="--tensor-parallel-size 2"       # in another terminal
$ python serving/load.py --clients 1 8 32 --seconds 30

Each client sends the same short prompt again as soon as it has an answer of so many tokens, and stops after so many
seconds. All answers count, and the time until the last. Any server of OpenAI's completions will do, and any model that
takes the prompt; no package is needed.
"""

import argparse
import json
import sys
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor


def complete(url: str, tokens: int) -> int:
    """Ask once; returns how many tokens the answer has. Raises OSError."""
    body = dict(prompt="The", max_tokens=tokens, temperature=0, ignore_eos=True)
    request = urllib.request.Request(f"{url}/v1/completions", json.dumps(body).encode())
    request.add_header("Content-Type", "application/json")
    with urllib.request.urlopen(request, timeout=300) as response:
        return json.loads(response.read())["usage"]["completion_tokens"]


def load(url: str, clients: int, tokens: int, seconds: float) -> tuple[int, float, float]:
    """(tokens of all answers, seconds until the last, mean seconds of an answer). Raises OSError."""
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
    return sum(n for n, _ in answers), took, sum(t for _, t in answers) / len(answers)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", default="http://127.0.0.1:8000", help="of the server, default: %(default)s")
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 8, 32], help="default: %(default)s")
    parser.add_argument("--tokens", type=int, default=32, help="of an answer, default: %(default)s")
    parser.add_argument("--seconds", type=float, default=30, help="for each number of clients, default: %(default)s")
    args = parser.parse_args()
    try:
        load(args.url, max(args.clients), args.tokens, 0)  # the first steps of a server take longer
        print("| clients | tokens/s | ms a token of one client | answers' tokens |\n|---|---|---|---|")
        for clients in args.clients:
            n_tokens, took, mean = load(args.url, clients, args.tokens, args.seconds)
            print(f"| {clients} | {n_tokens / took:.1f} | {1000 * mean / args.tokens:.1f} | {n_tokens} |", flush=True)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {args.url}: {error}")


if __name__ == "__main__":
    main()
