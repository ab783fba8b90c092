"""`transformers serve`, started as `python -m rezero_hf serve`: `/v1/completions` answers what `generate` writes."""

import json
import socket
import subprocess
import sys
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from urllib.error import URLError

from checks import NEW_TOKENS, PROMPTS, TEXTS, Check, continued, follow, load, run


START_SECONDS = 180
# A pool of a few pages; by default it takes most of the machine's memory.
BATCHING = ("--continuous-batching", "--cb-num-blocks", "8", "--cb-max-batch-tokens", "256")


@contextmanager
def serving(folder, log, *flags):
    """The address of a server, as long as the block lasts."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    command = [sys.executable, "-m", "rezero_hf", "serve", folder, "--device", "cpu", "--host", "127.0.0.1"]
    command += ["--port", port, *flags]
    with log.open("w") as said, subprocess.Popen(command, stdout=said, stderr=said) as server:
        address, end = f"http://127.0.0.1:{port}", time.monotonic() + START_SECONDS
        try:
            while True:
                try:
                    urllib.request.urlopen(f"{address}/health", timeout=5).close()
                    break
                except (URLError, TimeoutError):
                    if server.poll() is not None or time.monotonic() > end:
                        raise RuntimeError(f"no server: {log.read_text()[-500:]}") from None
                    time.sleep(0.5)
            yield address
        finally:
            server.terminate()


def complete(address, folder, prompt):
    """The text of one completion, as any client of that protocol asks for it."""
    body = {"model": str(folder), "prompt": prompt, "max_tokens": NEW_TOKENS, "temperature": 0}
    request = urllib.request.Request(
        f"{address}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=120) as answer:
        return json.load(answer)["choices"][0]["text"]


def check(folder, scratch):
    model, tokenizer = load(folder)
    expected = [continued(model, tokenizer, prompt) for prompt in PROMPTS]
    for what, flags in (("", ()), (" with continuous batching, all prompts at once", BATCHING)):
        with serving(folder, scratch / "log", *flags) as address, ThreadPoolExecutor(len(PROMPTS)) as threads:
            texts = list(threads.map(lambda prompt, to=address: complete(to, folder, prompt), PROMPTS))
            if not flags:
                yield follow("A server", folder, scratch, address)
        differ = sum(text != other for text, other in zip(texts, expected, strict=True))
        yield Check(f"/v1/completions{what}, text beside `generate`'s", differ, 0, TEXTS)


if __name__ == "__main__":
    run(check)
