"""Text encoders and tokenizers in files of others: all layouts can be read, and no file can cost much or run code."""

import json
import time

import pytest
import sentencepiece
import torch
from safetensors.torch import load_file, save_file

from model.prompt_cache import PromptCache
from model.prompt_files import open_prompt_files
from model.text_encoder import TextEncoder, TextEncoderConfig, build_text_encoder
from model.tokenizer import load_tokenizer
from model.weights import load_state_dict
from model.weights.names import FOREIGN_NAMES, rename_keys
from model.weights.write import save_safetensors
from pipeline.config import TextConfig
from pipeline.inference.checks import warn_of_prompts
from tests.fake_release import SENTENCES, t5_state, write_tokenizer
from utils.errors import UserError

TEXTS = [*SENTENCES, "Ω unknown ☃ signs", "ｆｕｌｌ width and ﬁ", "", "a", "tab\tand  two blanks"]


@pytest.fixture(scope="module")
def wan(tmp_path_factory):
    """Give an encoder in Wan's own layout, with sentencepiece's file and tokenizer.json."""
    folder = tmp_path_factory.mktemp("wan")
    size = write_tokenizer(folder / "google" / "umt5-xxl")
    torch.save(t5_state(size), folder / "models_t5_umt5-xxl-enc-bf16.pth")
    return folder


@pytest.fixture(scope="module")
def pieces(wan):
    return (wan / "google" / "umt5-xxl" / "spiece.model").read_bytes()


@pytest.fixture(scope="module")
def encoder(wan):
    return TextEncoder.from_files(wan / "models_t5_umt5-xxl-enc-bf16.pth", dtype=torch.float32)


def embeds(encoder, texts=SENTENCES):
    with torch.no_grad():
        return encoder.encode(texts)


def repackage(wan, path, pieces):
    """Write the encoder as ComfyUI does: names of transformers, half precision, and the tokenizer inside."""
    state = {name: tensor.half() for name, tensor in load_file_of(wan).items()}
    if pieces is not None:
        state["spiece_model"] = torch.frombuffer(bytearray(pieces), dtype=torch.uint8)
    save_safetensors(path, state)


def test_a_repackaged_encoder_brings_its_tokenizer(tmp_path, wan, pieces, encoder):
    path = tmp_path / "umt5_xxl_fp16.safetensors"
    repackage(wan, path, pieces)
    expected = encoder.tokenizer(TEXTS)["input_ids"]
    for tokenizer in (None, "wan_models/not/there", wan):
        loaded = TextEncoder.from_files(path, tokenizer=tokenizer, dtype=torch.float32)
        if tokenizer is not wan:
            processor = sentencepiece.SentencePieceProcessor(model_proto=pieces)
            assert loaded.tokenizer(TEXTS)["input_ids"] == [[*processor.encode(text), 1] for text in TEXTS]
        else:
            assert loaded.tokenizer(TEXTS)["input_ids"] == expected
        torch.testing.assert_close(embeds(loaded), embeds(encoder), rtol=1e-2, atol=1e-2)


def test_without_any_tokenizer_the_missing_folder_is_named(tmp_path, wan):
    repackage(wan, tmp_path / "alone.safetensors", None)
    with pytest.raises(UserError, match=r"not_there: no such file or folder"):
        TextEncoder.from_files(tmp_path / "alone.safetensors", tokenizer=tmp_path / "not_there")
    with pytest.raises(UserError, match="holds no tokenizer"):
        TextEncoder.from_files(tmp_path / "alone.safetensors")


def test_a_scaled_fp8_encoder_and_one_with_a_prefix_give_the_same_embeddings(tmp_path, wan, pieces, encoder):
    state = load_state_dict(wan / "models_t5_umt5-xxl-enc-bf16.pth")
    expected = {}
    for name, tensor in list(state.items()):
        if "SelfAttention" in name and "bias" not in name:
            scale = tensor.float().abs().max() / 448
            state[name] = (tensor.float() / scale).to(torch.float8_e4m3fn)
            expected[name] = state[name].float() * scale
            state[f"{name.removesuffix('.weight')}.scale_weight"] = scale
    state["scaled_fp8"] = torch.zeros(0, dtype=torch.float8_e4m3fn)
    state["spiece_model"] = torch.frombuffer(bytearray(pieces), dtype=torch.uint8)
    save_safetensors(tmp_path / "fp8.safetensors", state)
    loaded = TextEncoder.from_files(tmp_path / "fp8.safetensors", dtype=torch.float32)
    for name, tensor in expected.items():
        assert torch.equal(loaded.model.state_dict()[name], tensor)
    whole = {f"text_encoder.{name}": tensor for name, tensor in load_file_of(wan).items()}
    save_file(whole, tmp_path / "prefixed.safetensors")
    prefixed = TextEncoder.from_files(tmp_path / "prefixed.safetensors", tokenizer=wan, dtype=torch.float32)
    assert torch.equal(embeds(prefixed), embeds(encoder))


def load_file_of(wan):
    return {name: t.clone() for name, t in load_state_dict(wan / "models_t5_umt5-xxl-enc-bf16.pth").items()}


def test_a_folder_without_config_or_known_names_is_read(tmp_path, wan, encoder):
    save_file(load_file_of(wan), tmp_path / "My UMT5 (bf16).SAFETENSORS")
    loaded = TextEncoder.from_files(tmp_path, tokenizer=wan, dtype=torch.float32)
    assert torch.equal(embeds(loaded), embeds(encoder))


@pytest.mark.parametrize("name", [".", "spiece.model", "tokenizer.json"])
def test_a_long_prompt_is_one_warning_whatever_file_holds_the_tokenizer(tmp_path, wan, caplog, name):
    file = "spiece.model" if name == "." else name
    (tmp_path / file).write_bytes((wan / "google" / "umt5-xxl" / file).read_bytes())
    weights, tokenizer = wan / "models_t5_umt5-xxl-enc-bf16.pth", str(tmp_path / name)
    warn_of_prompts(TextConfig(weights=str(weights), tokenizer=tokenizer), ["a cat sits " * 300, "a red circle"])
    (record,) = caplog.records
    assert "has 3001 tokens; the model reads the first 512" in record.getMessage()
    assert (
        load_tokenizer(tokenizer)("a cat")["input_ids"]
        == load_tokenizer(wan / "google" / "umt5-xxl")("a cat")["input_ids"]
    )


def test_sentencepiece_and_json_give_the_same_ids_for_every_text(tmp_path, wan, pieces):
    (tmp_path / "spiece.model").write_bytes(pieces)
    processor = sentencepiece.SentencePieceProcessor(model_proto=pieces)
    loaded = load_tokenizer(tmp_path)
    for text in TEXTS:
        assert loaded(text)["input_ids"] == [*processor.encode(text), processor.eos_id()], text
    assert loaded.pad_token_id == processor.pad_id()


def test_settings_beside_a_tokenizer_cannot_cost_or_run_anything(tmp_path, wan, pieces):
    (tmp_path / "spiece.model").write_bytes(pieces)
    settings = {
        "extra_ids": 10**9,
        "auto_map": {"AutoTokenizer": ["evil.Evil", None]},
        "tokenizer_class": "Evil",
        "pad_token": {"content": "<pad>"},
        "chat_template": "{% for i in range(10**9) %}x{% endfor %}",
        "model_max_length": 10**30,
    }
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    (tmp_path / "evil.py").write_text("raise SystemExit('it ran')")
    start = time.monotonic()
    assert load_tokenizer(tmp_path).pad_token_id == 0
    assert time.monotonic() - start < 5


def json_tokenizer(wan, change):
    content = json.loads((wan / "google/umt5-xxl/tokenizer.json").read_text())
    change(content)
    return json.dumps(content)


def slow_pattern(content):
    content["normalizer"] = {"type": "Replace", "pattern": {"Regex": "(a+)+$"}, "content": ""}


def slow_split(content):
    split = {"type": "Split", "pattern": {"Regex": r"(\w|\w\w)*x"}, "behavior": "Removed", "invert": False}
    content["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [content["pre_tokenizer"], split]}


def usual_pattern(content):
    content["normalizer"] = {"type": "Replace", "pattern": {"Regex": " {2,}"}, "content": " "}


@pytest.mark.parametrize("change", [slow_pattern, slow_split])
def test_a_pattern_that_could_take_very_long_is_refused(tmp_path, wan, change):
    (tmp_path / "tokenizer.json").write_text(json_tokenizer(wan, change))
    with pytest.raises(UserError, match=r"tokenizer.json: the pattern .* could take very long to match; refused"):
        load_tokenizer(tmp_path)


def test_the_patterns_of_real_tokenizers_are_accepted(tmp_path, wan):
    (tmp_path / "tokenizer.json").write_text(json_tokenizer(wan, usual_pattern))
    assert load_tokenizer(tmp_path)("a  b")["input_ids"]


def damaged_tokenizers(wan, pieces):
    whole = (wan / "google/umt5-xxl/tokenizer.json").read_text()
    yield "tokenizer.json", whole[:200].encode(), "is not JSON"
    yield "tokenizer.json", b"[]" * 3, "cannot be read|is not JSON"
    yield "tokenizer.json", b"{}", "cannot be read"
    yield "tokenizer.json", b"[" * 100_000, "is not JSON|cannot be read"
    yield "tokenizer.json", whole.replace("Unigram", "Trigram").encode(), "cannot be read"
    yield "spiece.model", b"", "cannot be read"
    yield "spiece.model", b"garbage" * 99, "cannot be read"
    yield "spiece.model", pieces[: len(pieces) // 2], "cannot be read"


def test_a_damaged_tokenizer_is_one_line(tmp_path, wan, pieces):
    for number, (name, data, message) in enumerate(damaged_tokenizers(wan, pieces)):
        folder = tmp_path / str(number)
        folder.mkdir()
        (folder / name).write_bytes(data)
        with pytest.raises(UserError, match=message) as error:
            load_tokenizer(folder)
        assert str(folder) in str(error.value)
        assert "\n" not in str(error.value)


HOSTILE_CONFIGS = {
    "layers": ({"num_layers": 10**7}, "num_layers"),
    "text_len": ({"text_len": 2**40}, "text_len = 1099511627776"),
    "no text": ({"text_len": 0}, "text_len = 0"),
    "width": ({"d_model": 2**40}, "d_model"),
    "text": ({"d_ff": "48"}, "d_ff = '48'"),
    "kind": ({"model_type": "clip"}, "'umt5' is needed"),
    "activation": ({"feed_forward_proj": "gated-__import__"}, "do not make a text encoder"),
    "float": ({"num_heads": 2.5}, "num_heads = 2.5"),
}


@pytest.mark.parametrize("case", HOSTILE_CONFIGS)
def test_a_config_beyond_the_weights_is_refused_before_anything_is_built(tmp_path, encoder, case):
    change, message = HOSTILE_CONFIGS[case]
    encoder.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | change))
    start = time.monotonic()
    with pytest.raises(UserError, match=message) as error:
        TextEncoder.from_files(tmp_path)
    assert time.monotonic() - start < 5
    assert "\n" not in str(error.value)


@pytest.fixture
def small(tmp_path):
    encoder = build_text_encoder(["a red circle"], TextEncoderConfig(dim=8, num_layers=1, num_heads=2, text_len=6))
    encoder.save_pretrained(tmp_path / "encoder")

    def cache():
        files = open_prompt_files(tmp_path / "prompts", tmp_path / "encoder", None, torch.float32)
        return PromptCache(lambda: TextEncoder.from_files(tmp_path / "encoder"), files=files)

    return encoder, cache, tmp_path / "prompts"


GOOD = {"embeds": torch.ones(2, 8), "text_len": torch.tensor(6)}
BAD_STORED = {
    "shape": GOOD | {"embeds": torch.ones(2, 9)},
    "flat": GOOD | {"embeds": torch.ones(8)},
    "empty": GOOD | {"embeds": torch.ones(0, 8)},
    "longer than the text": GOOD | {"embeds": torch.ones(7, 8)},
    "type": GOOD | {"embeds": torch.ones(2, 8).bfloat16()},
    "integers": GOOD | {"embeds": torch.ones(2, 8).int()},
    "not finite": GOOD | {"embeds": torch.full((2, 8), float("nan"))},
    "length": GOOD | {"text_len": torch.tensor(2**40)},
    "two lengths": GOOD | {"text_len": torch.tensor([6, 6])},
    "missing": {"embeds": torch.ones(2, 8)},
}


@pytest.mark.parametrize("case", BAD_STORED)
def test_a_stored_prompt_that_does_not_fit_is_made_anew_with_one_warning(small, caplog, case):
    encoder, cache, folder = small
    expected = cache().encode(["a circle"])
    assert torch.equal(expected, embeds(encoder, ["a circle"]))
    (file,) = folder.glob("*.safetensors")
    whole = load_file(file)
    save_file(BAD_STORED[case], file)
    assert not cache().files.holds("a circle")
    caplog.clear()
    assert torch.equal(cache().encode(["a circle"]), expected)
    (message,) = caplog.messages
    assert "the prompt is encoded again" in message and file.name in message
    assert load_file(file)["embeds"].equal(whole["embeds"])


def test_a_damaged_memory_of_an_encoder_is_a_warning(small, caplog, tmp_path):
    _, cache, folder = small
    cache()
    (memory,) = folder.glob("*.encoder")
    (tmp_path / "encoder").rename(tmp_path / "away")
    for content in ("", "{}", json.dumps({"encoder": "../../etc", "dim": 8, "text_len": 6}), "x" * 10_000):
        memory.write_text(content)
        caplog.clear()
        assert cache().files is None
        assert "the stored prompt embeddings of this encoder are not used" in caplog.text


def test_names_of_wan_and_transformers_are_one_encoder(wan, encoder):
    theirs = load_state_dict(wan / "models_t5_umt5-xxl-enc-bf16.pth")
    back = tuple((new, old) for old, new in FOREIGN_NAMES["token_embedding.weight"])
    assert rename_keys(theirs, back).keys() == t5_state(len(encoder.tokenizer)).keys()
