"""Conversations with llama-server over a long first message: turns, regenerating, editing, branching, cancelling, several at
once, slots saved and restored. Arguments: text, slots, what (see PARTS), program and its options.

The server's rule for lazy layers comes from the environment. Prints one JSON object: for each request what it was, how many
tokens were read and how many were there already, and what was answered.
"""

import http.client
import json
import os
import random
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request

PORT = 18474
FOLLOW_UPS = [
    "Who is the most important person in it?",
    "Say that in one sentence.",
    "What happens at the end?",
    "Where does it take place?",
    "Name one thing that is mentioned.",
    "Thank you. What would be a good title?",
]
EDITED = "And what is the weather like?"


class Server:
    """llama-server as a child process."""

    def __init__(self, command: list, slots: int, slot_path: str, more: list) -> None:
        self.errors = tempfile.TemporaryFile(mode="w+")
        # Whatever the frontend's default: the whole prompt in one batch, and a context for each slot.
        options = ["-np", str(slots), "-c", str(8192 * slots), "-b", "8192", "--port", str(PORT)]
        options += ["--slot-save-path", slot_path] + more
        self.process = subprocess.Popen(command + options, stdout=subprocess.DEVNULL, stderr=self.errors)
        for _ in range(600):
            self.check()
            try:
                self.call("/health")
                return
            except OSError:
                time.sleep(0.1)
        sys.exit("the server does not answer")

    def check(self) -> None:
        if self.process.poll() is not None:
            self.errors.seek(0)
            tail = self.errors.read()[-2000:]
            sys.exit(f"the server ended with {self.process.returncode}: {tail}")

    def call(self, path: str, body: dict | None = None) -> dict:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(
            f"http://127.0.0.1:{PORT}{path}", data=data, headers={"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=600) as answer:
            return json.load(answer)

    def resident(self) -> int:
        with open(f"/proc/{self.process.pid}/status", encoding="ascii") as file:
            return next(int(line.split()[1]) * 1024 for line in file if line.startswith("VmRSS"))

    def stop(self) -> None:
        self.process.terminate()
        self.process.wait()


class Conversation:
    def __init__(self, server: Server, first: str, slot: int = -1, n: int = 24) -> None:
        self.server, self.slot, self.n = server, slot, n
        self.messages: list = []
        self.first = first
        self.log: list = []

    def body(self, **more) -> dict:
        return {"messages": self.messages, "max_tokens": self.n, "temperature": 0, "id_slot": self.slot} | more

    def request(self, what: str, **more) -> str:
        answer = self.server.call("/v1/chat/completions", self.body(**more))
        text = answer["choices"][0]["message"]["content"]
        timings = answer["timings"]
        self.log.append({"what": what, "read": timings["prompt_n"], "there": timings["cache_n"], "text": text})
        return text

    def say(self, what: str, text: str, **more) -> None:
        self.messages.append({"role": "user", "content": text})
        answer = self.request(what, **more)
        self.messages.append({"role": "assistant", "content": answer})

    def begin(self) -> None:
        self.say("first", self.first)

    def regenerate(self, what: str = "regenerate", **more) -> None:
        self.messages.pop()
        self.messages.append({"role": "assistant", "content": self.request(what, **more)})

    def cancel(self, text: str) -> None:
        """Asks, and leaves after the first piece of the answer."""
        body = self.body(stream=True, max_tokens=400)
        body["messages"] = self.messages + [{"role": "user", "content": text}]
        connection = http.client.HTTPConnection("127.0.0.1", PORT, timeout=600)
        connection.request("POST", "/v1/chat/completions", json.dumps(body), {"Content-Type": "application/json"})
        answer = connection.getresponse()
        for _ in range(4):
            answer.readline()
        connection.close()


def one_conversation(server: Server, text: str, slot: int = -1) -> Conversation:
    """Six turns; then regenerate, edit two turns back, branch, cancel, go on."""
    talk = Conversation(server, text, slot)
    talk.begin()
    talk.regenerate()
    for follow_up in FOLLOW_UPS[:5]:
        talk.say("turn", follow_up)
    talk.regenerate()
    talk.regenerate("regenerate again")
    whole = list(talk.messages)
    # The third turn before the end of six is asked otherwise.
    talk.messages = whole[:6]
    talk.say("edit", EDITED)
    talk.say("turn", FOLLOW_UPS[5])
    talk.messages = whole[:10]
    talk.say("branch", FOLLOW_UPS[5])
    talk.cancel(FOLLOW_UPS[0])
    talk.say("after cancelling", FOLLOW_UPS[1])
    # An answer that is longer than what a lazy layer keeps beyond its window.
    talk.n = 320
    talk.say("long answer", "Tell the whole story again in your own words, with every detail.", ignore_eos=True)
    talk.regenerate("regenerate a long answer", ignore_eos=True)
    return talk


def fresh(server: Server, text: str) -> Conversation:
    """What a server answers that was asked the edited conversation only, turn by turn."""
    talk = Conversation(server, text)
    talk.begin()
    for follow_up in FOLLOW_UPS[:2]:
        talk.say("turn", follow_up)
    talk.say("edit", EDITED)
    return talk


def long_first_answer(server: Server, text: str) -> Conversation:
    talk = Conversation(server, text, n=320)
    talk.say("first", text, ignore_eos=True)
    talk.regenerate("regenerate a long answer", ignore_eos=True)
    return talk


def in_threads(slots: int, worker) -> None:
    threads = [threading.Thread(target=worker, args=(slot,)) for slot in range(slots)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def several(server: Server, text: str, slots: int) -> list:
    talks: list = [None] * slots
    errors: list = []

    def worker(slot: int) -> None:
        try:
            talks[slot] = one_conversation(server, f"{text}\nQuestion {slot}: what is this about?", slot)
        except Exception as error:  # whatever it is, it is told
            errors.append(repr(error))

    in_threads(slots, worker)
    server.check()
    if errors:
        sys.exit(f"a conversation failed: {errors}")
    return talks


def many(server: Server, text: str, slots: int, requests: int) -> dict:
    """Requests of mixed turns, as people make them, at all slots at once: the same four times over, so that what is resident in
    each quarter can be compared. Before the first, the slots and the prompt cache are filled by a part of them."""
    errors, lock = [], threading.Lock()
    each = requests // (4 * slots)

    def a_quarter(slot: int, n: int, resident: list) -> None:
        rng = random.Random(slot)
        talk = None
        for _ in range(n):
            with lock:
                if errors:
                    return
            try:
                kind = rng.random()
                if talk is None or kind < 0.04 or len(talk.messages) > 30:
                    length = rng.choice([200, 2000, 6000, 12000])
                    start = rng.randrange(max(1, len(text) - length))
                    talk = Conversation(server, text[start : start + length], slot, n=rng.choice([4, 8, 16]))
                    talk.begin()
                elif kind < 0.25:
                    talk.regenerate()
                elif kind < 0.35 and len(talk.messages) > 4:
                    talk.messages = talk.messages[: 2 * rng.randrange(1, len(talk.messages) // 2)]
                    talk.say("edit", rng.choice(FOLLOW_UPS))
                elif kind < 0.40:
                    talk.cancel(rng.choice(FOLLOW_UPS))
                else:
                    talk.say("turn", rng.choice(FOLLOW_UPS))
                talk.log.clear()
                with lock:
                    resident.append(server.resident())
            except Exception as error:  # whatever it is, it is told
                server.check()
                with lock:
                    errors.append(repr(error))

    in_threads(slots, lambda slot: a_quarter(slot, each // 2, []))
    quarters: list = [[] for _ in range(4)]
    for resident in quarters:
        in_threads(slots, lambda slot: a_quarter(slot, each, resident))
    server.check()
    return {"requests": sum(map(len, quarters)), "errors": errors, "resident": quarters}


def main() -> None:
    text_path, slots, what = sys.argv[1], int(sys.argv[2]), sys.argv[3]
    command = sys.argv[4:]
    with open(text_path, encoding="utf-8") as file:
        text = file.read()
    result: dict = {}
    with tempfile.TemporaryDirectory() as slot_path:

        # Of many requests the prompt cache would grow to 8 GiB.
        more = ["-cram", "64"] if what.isdigit() else []

        def serve() -> Server:
            return Server(command, slots, slot_path, more)

        def first_message(server: Server) -> str:
            """Some 3,900 tokens of the text, and a question."""
            tokens = server.call("/tokenize", {"content": text})["tokens"][:3850]
            head = server.call("/detokenize", {"tokens": tokens})["content"]
            return head + "\n\nWhat is this text about?"

        server = serve()
        try:
            if what == "conversation":
                first = first_message(server)
                talks = several(server, first, slots) if slots > 1 else [one_conversation(server, first)]
                result["talks"] = [talk.log for talk in talks]
                if slots == 1:
                    server.stop()
                    server = serve()
                    result["fresh"] = fresh(server, first).log
                    server.stop()
                    server = serve()
                    result["long"] = long_first_answer(server, first).log
            elif what == "slots":
                talk = Conversation(server, first_message(server), 0)
                talk.begin()
                talk.say("turn", FOLLOW_UPS[0])
                server.call("/slots/0?action=save", {"filename": "talk.bin"})
                messages = list(talk.messages)
                talk.say("turn", FOLLOW_UPS[1])
                talk.say("turn", FOLLOW_UPS[2])
                result["before"] = talk.log[-2:]
                server.stop()
                server = serve()
                restored = Conversation(server, "", 0)
                restored.messages = messages
                result["n_restored"] = server.call("/slots/0?action=restore", {"filename": "talk.bin"})["n_restored"]
                restored.say("turn", FOLLOW_UPS[1])
                restored.regenerate()
                restored.say("turn", FOLLOW_UPS[2])
                result["after"] = restored.log
            else:
                result = many(server, text, slots, int(what))
            server.check()
        finally:
            server.stop()
    print(json.dumps(result))


if __name__ == "__main__":
    main()
