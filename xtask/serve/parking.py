"""Conversations that are parked: how long until the first token of their next answer.

parking.py begin URL FILE CONVERSATIONS TOKENS   holds the first turn of each, and notes the conversations in FILE
parking.py again URL FILE [N]                    holds the second turn of each, or of the first N

Writes one JSON object: seconds to the first token, and tokens that were known, of each; the most conversations in memory.
"""

import http.client
import json
import random
import sys
import time
import urllib.parse

what, url, path, *numbers = sys.argv[1:]
connection = http.client.HTTPConnection(urllib.parse.urlsplit(url).netloc, timeout=600)
WORDS = (
    "lighthouse keeper harbour winter letter boat captain storm island bread window garden silver river market stone "
    "morning shadow bridge forest music clock mirror candle paper engine valley summer train doctor teacher village"
).split()


def ask(path, body=None):
    connection.request("POST" if body else "GET", path, json.dumps(body) if body else None)
    answer = connection.getresponse()
    text = answer.read()
    assert answer.status == 200, text
    return json.loads(text)


def turn(prompt, n):
    """Seconds to the first token, the answer's tokens, tokens of the prompt that were known."""
    body = {"prompt": prompt, "n_predict": n, "temperature": 0, "ignore_eos": True, "stream": True}
    start = time.monotonic()
    connection.request("POST", "/completion", json.dumps({**body, "return_tokens": True}))
    answer = connection.getresponse()
    assert answer.status == 200, answer.read()
    first, tokens, last = None, [], None
    for line in answer:
        if line.startswith(b"data: "):
            first = first or time.monotonic() - start
            last = json.loads(line[6:])
            tokens += last.get("tokens", [])
    assert last["stop"] and len(tokens) == n, last
    return first, tokens, last["timings"]["cache_n"]


def in_memory():
    slots = ask("/slots")
    return len(slots), sum(slot["kv"]["allocated_bytes"] for slot in slots)


result = {"seconds": [], "cached": [], "most": 0, "bytes": 0, "f16_bytes": 0}
if what == "begin":
    n, length = map(int, numbers)
    conversations = []
    for index in range(n):
        words = random.Random(index)
        text = f"Conversation {index}. " + " ".join(words.choice(WORDS) for _ in range(length))
        prompt = ask("/tokenize", {"content": text})["tokens"][:length]
        assert len(prompt) == length
        seconds, tokens, cached = turn(prompt, 16)
        conversations.append(prompt + tokens)
        result["seconds"].append(seconds)
        result["cached"].append(cached)
        most, held = in_memory()
        result["most"], result["bytes"] = max(result["most"], most), max(result["bytes"], held)
    result["f16_bytes"] = ask("/slots")[0]["kv"]["f16_bytes"]
    # The last is parked when it has been idle for some seconds.
    time.sleep(5)
    with open(path, "w") as file:
        json.dump(conversations, file)
else:
    with open(path) as file:
        conversations = json.load(file)
    again = ask("/tokenize", {"content": " And then, on the next day, what did the keeper of the lighthouse find?"})["tokens"]
    for tokens in conversations[: int(numbers[0]) if numbers else None]:
        seconds, _, cached = turn(tokens + again, 4)
        result["seconds"].append(seconds)
        result["cached"].append(cached)
        most, held = in_memory()
        result["most"], result["bytes"] = max(result["most"], most), max(result["bytes"], held)
print(json.dumps(result))
