"""Chat requests to a llama-server, four at a time. Arguments: number of requests, program and its options.

Prints one JSON object: errors, reused prompt tokens, resident memory along the way.
"""

import json
import subprocess
import sys
import threading
import time
import urllib.request

PORT = 18473
QUESTIONS = ["What is the capital of France?", "Name a colour.", "What is 2+2?", "Say hello.", "Name an animal."]
SYSTEM = "You are a helpful assistant who answers briefly. " + " ".join(
    f"Rule {i}: be kind and precise." for i in range(20)
)


def call(path: str, body: dict | None = None) -> dict:
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(
        f"http://127.0.0.1:{PORT}{path}", data=data, headers={"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=300) as answer:
        return json.load(answer)


def wait_until_ready(server: subprocess.Popen) -> None:
    for _ in range(600):
        if server.poll() is not None:
            sys.exit(f"the server ended with {server.returncode}")
        try:
            call("/health")
            return
        except OSError:
            time.sleep(0.1)
    sys.exit("the server does not answer")


def main() -> None:
    n_requests = int(sys.argv[1])
    command = sys.argv[2:] + ["-np", "4", "-c", "8192", "--port", str(PORT)]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    lock = threading.Lock()
    result = {"answered": 0, "errors": [], "reused": 0, "resident": []}

    def resident() -> int:
        with open(f"/proc/{server.pid}/status", encoding="ascii") as file:
            return next(int(line.split()[1]) * 1024 for line in file if line.startswith("VmRSS"))

    def worker(first: int) -> None:
        for i in range(first, n_requests, 4):
            messages = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": QUESTIONS[i % 5]}]
            try:
                answer = call("/v1/chat/completions", {"messages": messages, "max_tokens": 12, "temperature": 0})
                text = answer["choices"][0]["message"]["content"]
                with lock:
                    result["answered"] += bool(text.strip())
                    result["reused"] += answer["timings"].get("cache_n", 0)
                    result["resident"].append(resident())
            except Exception as error:  # whatever it is, it is counted
                with lock:
                    result["errors"].append(repr(error))

    try:
        wait_until_ready(server)
        threads = [threading.Thread(target=worker, args=(first,)) for first in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        server.terminate()
        server.wait()
    print(json.dumps(result))


if __name__ == "__main__":
    main()
