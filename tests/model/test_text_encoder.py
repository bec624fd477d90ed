"""The embedding of a prompt depends only on the prompt, and is the same after saving in every file format."""

import gc
import json
import os
import shutil
import weakref
from pathlib import Path

import pytest
import torch

from model.prompt_cache import PromptCache
from model.prompt_files import open_prompt_files
from model.text_encoder import TextEncoder, TextEncoderConfig, build_text_encoder, clean_prompt
from model.text_encoder_files import _infer_config
from model.weights import WAN_T5_TO_TRANSFORMERS, load_state_dict, read_config, rename_keys, save_folder
from utils.errors import UserError

PROMPTS = ["a large red circle moving up and right", "", "a circle", "a blue zeppelin"]


@pytest.fixture
def encoder():
    return build_text_encoder([*PROMPTS[:3], "blue"], TextEncoderConfig(dim=32, text_len=10), seed=3)


def lengths(embeds):
    """Return the number of tokens of each prompt [B]: those that are not zero."""
    return (embeds.abs().sum(-1) > 0).sum(1).tolist()


def wan_names(model):
    backwards = tuple((theirs, ours) for ours, theirs in WAN_T5_TO_TRANSFORMERS)
    state = model.state_dict()
    del state["encoder.embed_tokens.weight"]
    return rename_keys(state, backwards)


def test_embeddings_are_zero_past_each_prompt_and_cut_at_text_len(encoder):
    embeds = encoder.encode([*PROMPTS, "circle " * 40])
    assert embeds.shape == (5, encoder.text_len, encoder.dim)
    assert lengths(embeds) == [9, 1, 3, 4, 10]
    for row, length in zip(embeds, lengths(embeds), strict=True):
        assert not row[length:].any()


def test_an_embedding_does_not_depend_on_batch_neighbours(encoder):
    """With grad they are equal up to rounding (values are about 3), without grad to the last bit."""
    together = encoder.encode(PROMPTS)
    for row, prompt in zip(together, PROMPTS, strict=True):
        alone = encoder.encode([prompt])[0]
        assert (row - alone).abs().max() <= 1e-6 * alone.abs().max()
    with torch.no_grad():
        together = encoder.encode(PROMPTS)
        assert all(torch.equal(row, encoder.encode([p])[0]) for row, p in zip(together, PROMPTS, strict=True))


def test_word_tokenizer_knows_its_words_in_any_case_and_folds_the_rest(encoder):
    ids = encoder.tokenizer(["", "A Circle", "zeppelin", "red."])["input_ids"]
    assert ids[0] == [1]
    assert ids[1][-1] == 1
    assert min(ids[1][:-1]) > 2
    assert ids[2] == [2, 1]
    assert ids[3][1:] == [2, 1]
    assert encoder.tokenizer.pad_token_id == 0


def test_the_same_seed_builds_the_same_encoder_and_leaves_the_global_generator_alone():
    config = TextEncoderConfig()
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    first, second, other = (
        build_text_encoder(words, config, seed=seed) for words, seed in (("ab", 1), ("ba", 1), ("ab", 2))
    )
    assert torch.equal(torch.rand(1), expected)
    assert torch.equal(first.encode(["a b"]), second.encode(["a b"]))
    assert not torch.equal(first.encode(["a b"]), other.encode(["a b"]))


def test_encoding_is_differentiable_down_to_the_word_embeddings(encoder):
    encoder.encode(["a circle", ""]).square().sum().backward()
    grad = encoder.model.shared.weight.grad.abs().sum(-1)
    used = set(encoder.tokenizer("a circle")["input_ids"])
    assert {i for i, g in enumerate(grad.tolist()) if g > 0} == used
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in encoder.parameters())


def test_saved_and_reloaded_encoder_is_bitwise_equal(encoder, tmp_path):
    encoder.save_pretrained(tmp_path)
    encoder.save_pretrained(tmp_path)
    reloaded = TextEncoder.from_files(tmp_path)
    assert reloaded.text_len == encoder.text_len
    assert reloaded.tokenizer(PROMPTS)["input_ids"] == encoder.tokenizer(PROMPTS)["input_ids"]
    assert torch.equal(reloaded.encode(PROMPTS), encoder.encode(PROMPTS))
    assert reloaded.model.shared.weight is reloaded.model.encoder.embed_tokens.weight
    assert TextEncoder.from_files(tmp_path, text_len=4).encode(PROMPTS).shape[1] == 4
    assert not [file for file in tmp_path.iterdir() if file.is_dir() or file.name.endswith(".partial")]


def test_transformers_itself_reads_the_saved_folder(encoder, tmp_path):
    from transformers import UMT5EncoderModel

    encoder.save_pretrained(tmp_path)
    theirs = UMT5EncoderModel.from_pretrained(tmp_path, local_files_only=True).eval()
    ids = torch.tensor([[3, 4, 1]])
    mask = torch.ones_like(ids)
    assert torch.equal(theirs(ids, mask).last_hidden_state, encoder.encode_tokens(ids, mask)[:, :3])


def test_diffusers_layout_keeps_the_tokenizer_beside(encoder, tmp_path):
    encoder.model.save_pretrained(tmp_path / "text_encoder")
    encoder.tokenizer.save_pretrained(tmp_path / "tokenizer")
    reloaded = TextEncoder.from_files(tmp_path / "text_encoder", tokenizer=tmp_path / "tokenizer")
    assert reloaded.text_len == 512
    assert torch.equal(reloaded.encode(PROMPTS)[:, :10], encoder.encode(PROMPTS))


def test_wan_file_gives_the_same_encoder_with_sizes_read_off_its_shapes(encoder, tmp_path):
    torch.save(wan_names(encoder.model), tmp_path / "t5.pth")
    encoder.tokenizer.save_pretrained(tmp_path / "google/umt5-xxl")
    loaded = TextEncoder.from_files(tmp_path / "t5.pth", tokenizer=tmp_path / "google/umt5-xxl", text_len=10)
    assert torch.equal(loaded.encode(PROMPTS), encoder.encode(PROMPTS))
    half = TextEncoder.from_files(tmp_path / "t5.pth", tokenizer=tmp_path / "google/umt5-xxl", dtype=torch.bfloat16)
    assert {p.dtype for p in half.parameters()} == {half.encode(["a"]).dtype} == {torch.bfloat16}


def test_sentencepiece_style_tokenizer_gives_the_ids_of_its_own_json(encoder, tmp_path):
    """google/umt5-xxl has a Unigram tokenizer.json, and its tokenizer_config names a T5 class."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁a", -1.0), ("▁red", -2.0), ("▁", -3.0), ("c", -4.0)]
    umt5 = Tokenizer(models.Unigram(pieces, unk_id=2, byte_fallback=False))
    umt5.pre_tokenizer = pre_tokenizers.Metaspace()
    umt5.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    umt5.save(str(tmp_path / "tokenizer.json"))
    names = {"tokenizer_class": "T5Tokenizer", "pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(names))
    torch.save(wan_names(encoder.model), tmp_path / "t5.pth")
    loaded = TextEncoder.from_files(tmp_path / "t5.pth", tokenizer=tmp_path)
    assert loaded.tokenizer(["a red c", "", "x"])["input_ids"] == [[3, 4, 5, 6, 1], [1], [5, 2, 1]]
    embeds = loaded.encode(["a red c", ""])
    assert embeds.shape == (2, 512, encoder.dim)
    assert lengths(embeds) == [5, 1]


def test_xxl_shapes_give_the_xxl_model(tmp_path):
    """Check every key and shape of the 5.7B encoder on the meta device."""
    from transformers import UMT5EncoderModel

    parts = {"attn.q": (4096, 4096), "pos_embedding.embedding": (32, 64), "ffn.gate.0": (10240, 4096)}
    names = {f"blocks.{i}.{part}.weight": shape for i in range(24) for part, shape in parts.items()}
    names["token_embedding.weight"] = (256384, 4096)
    state = {key: torch.empty(shape, device="meta", dtype=torch.bfloat16) for key, shape in names.items()}
    config = _infer_config(rename_keys(state, WAN_T5_TO_TRANSFORMERS), "t5.pth")
    with torch.device("meta"):
        model = UMT5EncoderModel(config)
    expected = wan_names(model)
    assert all(expected[key].shape == tensor.shape for key, tensor in state.items())
    assert len(expected) == 2 + 24 * 10
    assert round(sum(t.numel() for t in expected.values()) / 1e9, 2) == 5.68


def test_bad_folders_give_one_line(encoder, tmp_path):
    encoder.save_pretrained(tmp_path / "good")
    weights = load_state_dict(tmp_path / "good")
    config = json.loads((tmp_path / "good/config.json").read_text())
    save_folder(tmp_path / "wider", weights, config | {"d_ff": 64})
    encoder.tokenizer.save_pretrained(tmp_path / "wider")
    save_folder(tmp_path / "other", weights, config | {"model_type": "clip"})
    save_folder(tmp_path / "wordless", weights, config)
    save_folder(tmp_path / "garbled", weights, config)
    (tmp_path / "garbled/tokenizer.json").write_text("{}")
    for name, message in {
        "wider": "does not fit UMT5EncoderModel: .*wi_0.weight",
        "other": "'umt5' is needed",
        "wordless": "holds no tokenizer",
        "garbled": "tokenizer cannot be read",
        "absent": "no such file",
    }.items():
        with pytest.raises(UserError, match=message) as error:
            TextEncoder.from_files(tmp_path / name)
        assert name in str(error.value)
        assert "\n" not in str(error.value)
    torch.save({"token_embedding.weight": torch.zeros(3, 2)}, tmp_path / "t5.pth")
    with pytest.raises(UserError, match=r"t5.pth: not a UMT5 encoder"):
        TextEncoder.from_files(tmp_path / "t5.pth", tokenizer=tmp_path / "good")


def test_wrong_arguments_are_quoted(encoder):
    with pytest.raises(ValueError, match="not 'a circle'"):
        encoder.encode("a circle")
    with pytest.raises(ValueError, match=r"not \[\]"):
        encoder.encode([])
    with pytest.raises(ValueError, match="dim=30 is not a multiple of num_heads=4"):
        TextEncoderConfig(dim=30)
    with pytest.raises(ValueError, match="num_layers=0"):
        TextEncoderConfig(num_layers=0)


def test_prompts_are_cleaned(encoder):
    assert clean_prompt(" a\n\t circle &amp;amp; a\u00a0square  âœ” ") == "a circle & a square ✔"
    assert torch.equal(encoder.encode(["  a\n circle "]), encoder.encode(["a circle"]))


@torch.no_grad()
def test_prompt_cache_encodes_a_repeated_prompt_once_and_drops_the_least_used(encoder):
    cache = PromptCache(encoder, max_prompts=2)
    counted = []
    encoder.model.register_forward_hook(lambda *_: counted.append(1))
    embeds = cache.encode(["a circle", "", "a circle"])
    assert len(counted) == 2
    assert torch.equal(embeds[0], embeds[2])
    embeds.zero_()
    assert torch.equal(cache.encode(["a circle"])[0], encoder.encode(["a circle"])[0])  # the copy given out was ours
    counted.clear()
    cache.encode(["red"])  # evicts ""
    cache.encode(["a circle"])
    assert len(counted) == 1
    cache.encode([""])
    assert len(counted) == 2


def test_prompt_cache_keeps_no_gradient(encoder):
    assert not PromptCache(encoder).encode(["a circle"]).requires_grad


@pytest.fixture
def saved(encoder, tmp_path):
    """Give a folder with the encoder, and a function that opens a cache of its prompts, as a run does."""
    encoder.save_pretrained(tmp_path / "encoder")
    loads = []

    def load():
        loads.append(TextEncoder.from_files(tmp_path / "encoder"))
        return loads[-1]

    def open_cache(**options):
        files = open_prompt_files(tmp_path / "prompts", tmp_path / "encoder", None, torch.float32)
        return PromptCache(load, files=files, **options)

    return tmp_path / "encoder", open_cache, loads


def test_a_second_run_reads_its_prompts_from_files_without_any_encoder(saved, encoder):
    folder, open_cache, loads = saved
    with torch.no_grad():
        expected = encoder.encode(PROMPTS)
    assert torch.equal(open_cache().encode(PROMPTS), expected)
    assert len(loads) == 1
    shutil.rmtree(folder)
    cache = open_cache()
    assert torch.equal(cache.encode([f" {prompt}\n" for prompt in PROMPTS]), expected)
    assert len(loads) == 1
    with pytest.raises(UserError, match="no such file"):
        cache.encode(["a prompt of no earlier run"])


def test_stored_prompts_are_as_long_as_their_tokens(saved, tmp_path):
    saved[1]().encode(["a circle", ""])
    lengths = sorted(len(load_state_dict(file)["embeds"]) for file in (tmp_path / "prompts").glob("*.safetensors"))
    assert lengths == [1, 3]


def test_prompts_of_other_weights_words_or_precision_are_not_taken(saved, tmp_path):
    folder, *_ = saved
    first = open_prompt_files(tmp_path / "prompts", folder, None, torch.float32)
    half = open_prompt_files(tmp_path / "prompts", folder, None, torch.bfloat16)
    changed = load_state_dict(folder)
    save_folder(folder, {**changed, "shared.weight": changed["shared.weight"] + 1}, read_config(folder))
    weights = open_prompt_files(tmp_path / "prompts", folder, None, torch.float32)
    (folder / "tokenizer.json").write_text((folder / "tokenizer.json").read_text() + " ")
    words = open_prompt_files(tmp_path / "prompts", folder, None, torch.float32)
    assert len({files.path("a circle") for files in (first, half, weights, words)}) == 4
    assert open_prompt_files(tmp_path / "prompts", tmp_path / "never seen", None, torch.float32) is None


def test_a_damaged_stored_prompt_is_made_anew(saved, encoder, tmp_path):
    _, open_cache, _ = saved
    open_cache().encode(["a circle"])
    (file,) = (tmp_path / "prompts").glob("*.safetensors")
    whole = file.read_bytes()
    for content in (b"", whole[:20], whole[:-3]):
        file.write_bytes(content)
        with torch.no_grad():
            assert torch.equal(open_cache().encode(["a circle"]), encoder.encode(["a circle"]))
        assert file.read_bytes() == whole


def test_a_cache_that_cannot_be_written_does_no_harm(saved, tmp_path, caplog):
    (tmp_path / "prompts").write_text("a file in the way")
    assert saved[1]().encode(["a circle"]).shape == (1, 10, 32)
    assert "prompt embeddings cannot be stored" in caplog.text


def test_a_freed_encoder_leaves_nothing_behind_and_comes_back_when_needed(saved):
    _, open_cache, loads = saved
    cache = open_cache(keep_encoder=False, max_prompts=1)
    cache.prepare(PROMPTS)
    tensors = [weakref.ref(parameter) for parameter in loads.pop().parameters()]
    gc.collect()
    assert tensors and all(tensor() is None for tensor in tensors)
    cache.files = None  # what was prepared is at hand, however small the cache was
    cache.encode(PROMPTS)
    assert loads == []
    cache.encode(["another"])
    assert len(loads) == 1


def test_umt5_equals_the_recording(tmp_path):
    """Compare with recorded case 10: the official encoder with its own weight names, without padding tokens."""
    from safetensors.torch import load_file

    if "PARITY_DATA" not in os.environ:
        pytest.skip("PARITY_DATA is not set: no recordings to compare with")
    recordings = Path(os.environ["PARITY_DATA"])
    case = load_file(recordings / "case10_t5.safetensors")
    weights = {k: t.float() for k, t in load_file(recordings / "case10_t5_weights.safetensors").items()}
    torch.save(weights, tmp_path / "t5.pth")
    build_text_encoder(["a"], TextEncoderConfig()).tokenizer.save_pretrained(tmp_path)
    encoder = TextEncoder.from_files(tmp_path / "t5.pth", tokenizer=tmp_path, text_len=200)
    with torch.no_grad():
        output = encoder.encode_tokens(case["ids"], case["mask"])
    real = case["mask"].bool()
    expected = case["output"][real]
    error = (output[:, :160][real] - expected).abs().max() / expected.abs().max()
    assert error <= 1e-6, error
    assert not output[:, 160:].any()
    assert not output[:, :160][~real].any()
