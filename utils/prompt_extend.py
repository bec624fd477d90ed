"""Turn short prompts into the long, detailed ones that Wan was trained on, with any text model.

The model is behind a server that speaks OpenAI's protocol. Environment variables name it; they are read when prompts
are extended:

- `PROMPT_EXTEND_URL`: its base address, such as http://localhost:11434/v1 (Ollama, vLLM, llama.cpp, a hosted one);
- `PROMPT_EXTEND_MODEL`: the model to ask;
- `PROMPT_EXTEND_KEY`: the key, if the server wants one.
"""

import http.client
import itertools
import json
import os
import re
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from utils.chat_answers import clean_answer
from utils.errors import UserError
from utils.side_files import append_json_line, read_json_lines
from utils.tracking import progress

ENDPOINT = "/chat/completions"
TIMEOUT = 120.0  # seconds without a byte; a local model on a CPU takes its time
ATTEMPTS = 4
LONGEST_WAIT = 60.0  # seconds between attempts, whatever a server asks for
LARGEST_ANSWER = 2**20  # bytes
BUSY = {408, 425, 429, 500, 502, 503, 504}  # HTTP statuses that may pass
LOOPBACK = re.compile(r"localhost|.*\.localhost|127(\.\d+){3}|::1|0\.0\.0\.0", re.IGNORECASE)
PASSING = (TimeoutError, ConnectionResetError, http.client.IncompleteRead)  # and broken connections that may

INSTRUCTIONS = """\
You turn a short idea into the prompt of a text-to-video model. Write one paragraph of 80 to 120 words in plain
English, in the present tense, that describes a single continuous shot of about five seconds. Keep everything the idea
says: its subjects, their number, names, colours, actions, style and any quoted text. Then make it concrete: what the
main subject looks like, what it does from the first moment to the last, how it moves, what lies in front of and behind
it, the place, the weather, the light and its direction. Name the framing and the movement of the camera, and close with
the visual style and mood; where the idea names no style, choose realistic footage. Do not add cuts, sound, titles,
opinions or anything that cannot be seen. Answer with the paragraph alone: no heading, list, quotes or remark."""


@dataclass(frozen=True)
class ChatServer:
    """The server to which prompts are sent."""

    url: str
    model: str
    key: str | None

    @classmethod
    def from_environment(cls) -> "ChatServer":
        """Read the environment. Raises UserError if a variable is missing or is no web address."""
        values = {name: os.environ.get(f"PROMPT_EXTEND_{name}", "").strip() for name in ("URL", "MODEL", "KEY")}
        for name, example in (("URL", "http://localhost:11434/v1"), ("MODEL", "the model's name on that server")):
            if not values[name]:
                raise UserError(
                    f"--prompt-extend: the environment variable PROMPT_EXTEND_{name} is not set ({example})"
                )
        url = values["URL"].rstrip("/").removesuffix(ENDPOINT)
        if not re.fullmatch(r"https?://[^\s/]+.*", url):
            raise UserError(f"PROMPT_EXTEND_URL={url}: is no address of the form http://host:port/v1")
        if not re.fullmatch(r"[!-~]*", values["KEY"]):  # what a header can carry; the key itself is never shown
            raise UserError("PROMPT_EXTEND_KEY holds spaces or characters that no key has; set it again")
        return cls(url, values["MODEL"], values["KEY"] or None)

    def ask(self, prompt: str) -> str:
        """Send one request and return the text of the answer.

        Raises what `urllib` raises, or ValueError if the answer has another form.
        """
        question = [{"role": "system", "content": INSTRUCTIONS}, {"role": "user", "content": prompt}]
        headers = {"Content-Type": "application/json"}
        if self.key:
            headers["Authorization"] = f"Bearer {self.key}"
        data = json.dumps({"model": self.model, "messages": question, "stream": False}).encode()
        request = urllib.request.Request(self.url + ENDPOINT, data, headers)
        proxies = {} if self.proxy is None else {urllib.parse.urlsplit(self.url).scheme: self.proxy}
        opener = urllib.request.build_opener(_NoRedirect, urllib.request.ProxyHandler(proxies))
        with opener.open(request, timeout=TIMEOUT) as response:
            body = response.read(LARGEST_ANSWER)
        try:
            return json.loads(body)["choices"][0]["message"]["content"] + ""  # a TypeError for what is no text
        except (LookupError, TypeError, ValueError):
            raise ValueError(f"not a chat completion: {self.excerpt(body)}") from None

    @property
    def proxy(self) -> str | None:
        """The proxy in the environment for this server. None if there is none, or if the server is this machine."""
        address = urllib.parse.urlsplit(self.url)
        host = address.hostname or ""
        if LOOPBACK.fullmatch(host) or urllib.request.proxy_bypass(host):
            return None
        return urllib.request.getproxies().get(address.scheme)

    @property
    def route(self) -> str:
        """The route to the server, for error messages: empty, or the proxy without its password."""
        return "" if self.proxy is None else f" through the proxy {re.sub(r'//[^/@]*@', '//', self.proxy)}"

    def excerpt(self, body: bytes) -> str:
        """Return the beginning of an answer as one line. The key is removed, because some servers quote it."""
        return _line(body.decode(errors="replace").replace(self.key or "\0", "***"))[:200] or "no text"


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """Follows no redirect. The other address would get the key, and a GET without the prompt."""

    def redirect_request(self, *_: object) -> None:
        return None


@dataclass(frozen=True)
class ExtendedPrompt:
    """One line of the cache file."""

    prompt: str
    extended: str
    model: str = ""


def extend_prompts(prompts: Sequence[str], cache_file: str | Path, *, backoff: float = 1.0) -> list[str]:
    """Return the long version of each prompt, in order.

    Args:
        prompts: anything a user typed; equal ones are asked for once.
        cache_file: JSON lines {"prompt", "extended", "model"}. Prompts in it are not sent again, so a second run makes
            the same videos. Every answer is stored at once. A damaged line is set aside and its prompt is sent again.
        backoff: seconds before the second attempt at a busy server; each later wait is twice as long.

    Raises:
        UserError: an environment variable is missing; or the server cannot be reached, refuses the key or the model,
            stays busy, or answers in another form.
    """
    entries = {entry.prompt: entry.extended for entry in read_json_lines(cache_file, ExtendedPrompt)}
    missing = [prompt for prompt in dict.fromkeys(prompts) if prompt not in entries]
    if missing:
        server = ChatServer.from_environment()
        for prompt in progress(missing, "extending prompts", unit="prompt"):
            entry = ExtendedPrompt(prompt, _extend(server, prompt, backoff), server.model)
            append_json_line(cache_file, asdict(entry))
            entries[prompt] = entry.extended
    return [entries[prompt] for prompt in prompts]


def _extend(server: ChatServer, prompt: str, backoff: float) -> str:
    for attempt in itertools.count(1):
        try:
            return clean_answer(server.ask(prompt))
        except urllib.error.HTTPError as error:
            failure, wait = _refused(server, error), _retry_after(error) if error.code in BUSY else None
        except (OSError, http.client.HTTPException) as error:
            reason = error.reason if isinstance(error, urllib.error.URLError) else error
            failure = f"no answer{server.route} ({_line(reason)}); is it running?"
            wait = 0.0 if isinstance(reason, PASSING) else None
        except ValueError as error:
            failure, wait = str(error), None
        if wait is None or attempt == ATTEMPTS:
            raise UserError(f"PROMPT_EXTEND_URL={server.url}: {failure}")
        time.sleep(min(LONGEST_WAIT, max(wait, backoff * 2 ** (attempt - 1))))


def _refused(server: ChatServer, error: urllib.error.HTTPError) -> str:
    remedy = "try again later" if error.code in BUSY else f"check PROMPT_EXTEND_MODEL={server.model}"
    if error.code in (401, 403):
        remedy = "set PROMPT_EXTEND_KEY to a valid key"
    elif error.code < 400 or error.code == 404:
        remedy = f"check the address, and PROMPT_EXTEND_MODEL={server.model}"
    return f"HTTP {error.code}{server.route} ({server.excerpt(error.read(LARGEST_ANSWER))}); {remedy}"


def _retry_after(error: urllib.error.HTTPError) -> float:
    """Return the seconds that the server asks for; 0 if it names none, or a date."""
    value = error.headers.get("Retry-After", "")
    return float(value) if re.fullmatch(r"\d+(\.\d+)?", value) else 0.0


def _line(text: object) -> str:
    return " ".join(str(text).split())
