"""A conversation about pictures with a llama-server that has --mmproj. Arguments: program and its options.

Prints one JSON object: for each request the text, its tokens' logarithms of probabilities, and how many tokens were read.
"""

import base64
import json
import subprocess
import sys
import tempfile
import time
import urllib.request
import zlib

PORT = 18475


def picture(colour: tuple[int, int, int]) -> str:
    """A PNG of stripes, as a data URL."""
    size = 56
    rows = b"".join(
        b"\0" + b"".join(bytes(colour) if (x // 8 + y // 8) % 2 else b"\xff\xff\xff" for x in range(size))
        for y in range(size)
    )

    def chunk(kind: bytes, data: bytes) -> bytes:
        checked = kind + data
        return len(data).to_bytes(4, "big") + checked + zlib.crc32(checked).to_bytes(4, "big")

    header = size.to_bytes(4, "big") * 2 + bytes([8, 2, 0, 0, 0])
    png = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    return "data:image/png;base64," + base64.b64encode(png).decode()


def call(path: str, body: dict | None = None) -> dict:
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(
        f"http://127.0.0.1:{PORT}{path}", data=data, headers={"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=300) as answer:
        return json.load(answer)


def main() -> None:
    errors = tempfile.TemporaryFile("w+")
    command = sys.argv[1:] + ["-np", "1", "-c", "2048", "--port", str(PORT), "--no-warmup"]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=errors)
    try:
        for _ in range(600):
            if server.poll() is not None:
                errors.seek(0)
                sys.exit(f"the server ended with {server.returncode}: {errors.read()[-2000:]}")
            try:
                call("/health")
                break
            except OSError:
                time.sleep(0.1)
        messages, log = [], []
        questions = [("What is in this picture?", (200, 30, 30)), ("And in this one?", (20, 60, 220)), ("Which do you like?", None)]
        for text, colour in questions:
            parts = [{"type": "text", "text": text}]
            if colour is not None:
                parts.insert(0, {"type": "image_url", "image_url": {"url": picture(colour)}})
            messages.append({"role": "user", "content": parts})
            body = {"messages": messages, "max_tokens": 16, "temperature": 0, "logprobs": True}
            answer = call("/v1/chat/completions", body)
            choice = answer["choices"][0]
            messages.append({"role": "assistant", "content": choice["message"]["content"]})
            log.append(
                {
                    "text": choice["message"]["content"],
                    "logprobs": [entry["logprob"] for entry in choice["logprobs"]["content"]],
                    "read": answer["timings"]["prompt_n"],
                    "there": answer["timings"]["cache_n"],
                }
            )
        print(json.dumps(log))
    finally:
        server.terminate()
        server.wait()


if __name__ == "__main__":
    main()
