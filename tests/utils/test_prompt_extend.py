"""A real HTTP server on this machine extends prompts. Nothing else is replaced."""

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from utils.errors import UserError
from utils.prompt_extend import ATTEMPTS, extend_prompts

KEY = "sk-quite-secret"


def completion(text: object) -> bytes:
    return json.dumps({"choices": [{"message": {"role": "assistant", "content": text}}]}).encode()


class TextModel(ThreadingHTTPServer):
    """Answers with the scripted (status, body, headers). After these it answers with a longer form of the prompt."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.script: list[tuple[int, bytes, dict]] = []
        self.requests: list[tuple[str, dict, dict]] = []

    @property
    def prompts(self) -> list[str]:
        return [body["messages"][-1]["content"] for _, _, body in self.requests]


class Handler(BaseHTTPRequestHandler):
    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.requests.append((self.path, dict(self.headers), body))
        longer = completion(f"{body['messages'][-1]['content']}, in every detail")
        status, answer, headers = self.server.script.pop(0) if self.server.script else (200, longer, {})
        if status == 0:  # hang up without an answer
            self.close_connection = True
            return
        self.send_response(status)
        for name, value in {"Content-Length": str(len(answer)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(answer)

    def log_message(self, *args):
        pass


@pytest.fixture
def model(monkeypatch):
    with TextModel() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        monkeypatch.setenv("no_proxy", "*")
        monkeypatch.setenv("PROMPT_EXTEND_URL", f"http://127.0.0.1:{server.server_port}/v1")
        monkeypatch.setenv("PROMPT_EXTEND_MODEL", "tiny")
        monkeypatch.setenv("PROMPT_EXTEND_KEY", KEY)
        yield server
        server.shutdown()
        thread.join()


def error_line(tmp_path, prompts=("a cat",)) -> str:
    with pytest.raises(UserError) as caught:
        extend_prompts(prompts, tmp_path / "cache.jsonl", backoff=0.001)
    line = str(caught.value)
    assert "\n" not in line
    assert KEY[:5] not in line
    return line


def test_each_prompt_is_asked_for_once_and_answers_keep_the_order(model, tmp_path):
    prompts = ["a cat", "une été 🐈", "a cat"]
    extended = extend_prompts(prompts, tmp_path / "new" / "cache.jsonl")
    assert extended == [f"{prompt}, in every detail" for prompt in prompts]
    assert model.prompts == ["a cat", "une été 🐈"]
    path, headers, body = model.requests[0]
    assert path == "/v1/chat/completions"
    assert headers["Authorization"] == f"Bearer {KEY}"
    assert body["model"] == "tiny"
    assert body["messages"][0]["role"] == "system"
    assert "80 to 120 words" in body["messages"][0]["content"]


def test_a_second_run_gives_the_same_prompts_without_a_server(model, tmp_path, monkeypatch):
    cache = tmp_path / "cache.jsonl"
    first = extend_prompts(["a cat", "a dog"], cache)
    model.script = [(200, completion("another answer"), {})]
    for name in ("URL", "MODEL", "KEY"):
        monkeypatch.delenv(f"PROMPT_EXTEND_{name}")
    assert extend_prompts(["a dog", "a cat"], cache) == first[::-1]
    assert len(model.requests) == 2
    assert [json.loads(line)["model"] for line in cache.read_text(encoding="utf-8").splitlines()] == ["tiny", "tiny"]


def test_answers_that_came_before_a_failure_are_kept(model, tmp_path):
    model.script = [(200, completion("one"), {}), (401, b"no", {})]
    error_line(tmp_path, ["first", "second"])
    assert extend_prompts(["first", "second"], tmp_path / "cache.jsonl") == ["one", "second, in every detail"]
    assert model.prompts == ["first", "second", "second"]


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ('"A cat\n\n sleeps."', "A cat sleeps."),
        ("<think>Hmm,\nlong.</think>\n**A cat** sleeps.", "A cat sleeps."),
        ('“A cat called "Tom" sleeps.”', 'A cat called "Tom" sleeps.'),
        ("Okay, the user wants a cat.\n</think>\n\nA cat sleeps.", "A cat sleeps."),
        ("<thinking>one</thinking><think>two</think>A cat sleeps.", "A cat sleeps."),
        ("<reasoning>\nHmm\n</reasoning>\nA cat sleeps.", "A cat sleeps."),
        ("[THINK]Hmm[/THINK]A cat sleeps.", "A cat sleeps."),
        ("◁think▷Hmm◁/think▷A cat sleeps.", "A cat sleeps."),
        ("<|START_THINKING|>Hmm<|END_THINKING|><|START_RESPONSE|>A cat sleeps.<|END_RESPONSE|>", "A cat sleeps."),
        (
            "<|channel|>analysis<|message|>Hmm.<|end|><|start|>assistant"
            "<|channel|>final<|message|>A cat sleeps.<|return|>",
            "A cat sleeps.",
        ),
        ("```\nA cat sleeps.\n```", "A cat sleeps."),
        ("```text\nA cat sleeps.```", "A cat sleeps."),
        ("Here you go:\n\n```text\nA cat sleeps.\n```\n\nLet me know if it helps!", "A cat sleeps."),
        ("Sure! Here is the prompt:\n\nA cat sleeps.", "A cat sleeps."),
        ("Sure, here's the extended prompt: A cat sleeps.", "A cat sleeps."),
        ("Certainly! A cat sleeps.", "A cat sleeps."),
        ("**Prompt:** A cat sleeps.\n\n(Word count: 3)", "A cat sleeps."),
        ("### Extended prompt\n\nA cat sleeps.", "A cat sleeps."),
        ("Here are two cats: one sleeps. A sign reads: open.", "Here are two cats: one sleeps. A sign reads: open."),
        ("Great waves roll in. Okay.", "Great waves roll in. Okay."),
    ],
)
def test_answers_become_one_line_without_thoughts_or_decoration(model, tmp_path, answer, expected):
    model.script = [(200, completion(answer), {})]
    assert extend_prompts(["a cat"], tmp_path / "cache.jsonl") == [expected]


@pytest.mark.parametrize("trouble", [(503, b"busy", {}), (429, b"slow down", {"Retry-After": "0.01"}), (0, b"", {})])
def test_a_busy_or_broken_server_is_asked_again(model, tmp_path, trouble):
    model.script = [trouble] * (ATTEMPTS - 1)
    assert extend_prompts(["a cat"], tmp_path / "cache.jsonl", backoff=0.001) == ["a cat, in every detail"]
    assert len(model.requests) == ATTEMPTS


def test_a_server_that_stays_busy_is_given_up(model, tmp_path):
    model.script = [(503, b"overloaded", {})] * ATTEMPTS
    assert "HTTP 503 (overloaded); try again later" in error_line(tmp_path)


@pytest.mark.parametrize(
    ("status", "body", "message"),
    [
        (200, b"." * 195 + KEY.encode(), "not a chat completion: "),
        (401, f"key {KEY} is wrong".encode(), r"HTTP 401 (key *** is wrong); set PROMPT_EXTEND_KEY"),
        (404, b'{"error": "no\nmodel"}', "check the address, and PROMPT_EXTEND_MODEL=tiny"),
        (400, b"", "HTTP 400 (no text); check PROMPT_EXTEND_MODEL=tiny"),
        (200, b"<html>welcome</html>", "not a chat completion: <html>welcome</html>"),
        (200, b'{"choices": []}', 'not a chat completion: {"choices": []}'),
        (200, completion(None), "not a chat completion"),
        (200, completion("<think>never done"), "answered with no text"),
        (200, completion("A cat <|tool_call|> sleeps"), "holds a mark of the model's own format"),
        (200, b"\xff\xfe", "not a chat completion"),
    ],
)
def test_a_refusal_or_a_malformed_answer_is_one_line_and_is_not_repeated(model, tmp_path, status, body, message):
    model.script = [(status, body, {})]
    assert message in error_line(tmp_path)
    assert len(model.requests) == 1
    assert not (tmp_path / "cache.jsonl").exists()


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("URL", None, "PROMPT_EXTEND_URL is not set"),
        ("MODEL", " ", "PROMPT_EXTEND_MODEL is not set"),
        ("URL", "file:///etc/hostname", "PROMPT_EXTEND_URL=file:///etc/hostname: is no address"),
        ("URL", "http://[", "PROMPT_EXTEND_URL=http://["),
        ("URL", "http://127.0.0.1:1/v1", "no answer ([Errno"),
        ("KEY", f"{KEY}\r\nX: y", "PROMPT_EXTEND_KEY holds spaces"),
        ("KEY", "ключ", "PROMPT_EXTEND_KEY holds spaces"),
    ],
)
def test_a_wrong_environment_is_one_line_that_names_the_variable(model, tmp_path, monkeypatch, name, value, message):
    if value is None:
        monkeypatch.delenv(f"PROMPT_EXTEND_{name}")
    else:
        monkeypatch.setenv(f"PROMPT_EXTEND_{name}", value)
    assert message in error_line(tmp_path)
    assert not model.requests


def test_a_server_without_keys_gets_none_and_the_whole_endpoint_is_understood(model, tmp_path, monkeypatch):
    monkeypatch.setenv("PROMPT_EXTEND_KEY", "")
    monkeypatch.setenv("PROMPT_EXTEND_URL", f"http://127.0.0.1:{model.server_port}/v1/chat/completions/")
    extend_prompts(["a cat"], tmp_path / "cache.jsonl")
    path, headers, _ = model.requests[0]
    assert path == "/v1/chat/completions"
    assert "Authorization" not in headers


@pytest.mark.parametrize("status", [301, 302, 307, 308])
def test_the_key_does_not_follow_a_redirect(model, tmp_path, status):
    model.script = [(status, b"", {"Location": f"http://127.0.0.1:{model.server_port}/elsewhere"})]
    assert f"HTTP {status} (no text); check the address" in error_line(tmp_path)
    assert [path for path, _, _ in model.requests] == ["/v1/chat/completions"]


@pytest.mark.parametrize(
    "line", [b"{", b"[]", b'{"prompt": "a cat"}', b'{"prompt": "a cat", "extended": 3}', b'"\xff"']
)
def test_a_damaged_line_of_the_cache_is_set_aside_and_asked_anew(model, tmp_path, caplog, line):
    cache = tmp_path / "cache.jsonl"
    cache.write_bytes(b'{"prompt": "x", "extended": "y"}\n' + line + b"\n")
    assert extend_prompts(["x", "a cat"], cache) == ["y", "a cat, in every detail"]
    assert (tmp_path / "cache.jsonl.damaged").read_bytes() == line + b"\n"
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert model.prompts == ["a cat"]


def test_this_machine_is_asked_directly_and_a_proxy_is_named_without_its_password(model, tmp_path, monkeypatch):
    monkeypatch.delenv("no_proxy")
    for name in ("http_proxy", "HTTP_PROXY"):
        monkeypatch.setenv(name, "http://me:secret@127.0.0.1:1")
    assert extend_prompts(["a cat"], tmp_path / "cache.jsonl") == ["a cat, in every detail"]
    monkeypatch.setenv("PROMPT_EXTEND_URL", f"http://localhost:{model.server_port}/v1")
    assert extend_prompts(["a dog"], tmp_path / "cache.jsonl") == ["a dog, in every detail"]
    monkeypatch.setenv("PROMPT_EXTEND_URL", "http://models.example/v1")
    line = error_line(tmp_path, ["a cow"])
    assert "models.example/v1: no answer through the proxy http://127.0.0.1:1 (" in line and "secret" not in line
