"""Each attention call chooses its own kernel, by the device and the tensors. It does not influence other threads."""

import sys
import threading
from pathlib import Path
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F

from model import kernels
from model.attention import AttentionBackend, attention, resolve_backend
from model.discriminator import Discriminator, DiscriminatorConfig
from tests.parity import TINY, random, relative_error, tiny_denoiser
from utils.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
PACKAGED = ["flash4", "flash3", "flash", "sage"]


def halves(*lengths: int):
    return [random(2, length, 2, 16, seed=length).bfloat16() for length in lengths]


@pytest.fixture
def package(monkeypatch):
    """Give a function that installs a fake package of a kernel and counts its calls."""
    calls = []

    def install(name: str, *, logsumexp: bool = False) -> list:
        def compute(q, k, v, **options):
            calls.append(name)
            out = kernels.sdpa(q, k, v)
            return (out, out) if logsumexp else out

        need = kernels.NEEDS[AttentionBackend(name)]
        module = ModuleType(need.module)
        setattr(module, need.function, compute)
        monkeypatch.setitem(sys.modules, need.module, module)
        return calls

    return install


@pytest.mark.parametrize("name", [*PACKAGED, "cudnn"])
def test_a_kernel_that_cannot_run_here_is_refused_in_one_line(name):
    assert resolve_backend(AttentionBackend.auto, torch.device("cpu"), torch.float32) is AttentionBackend.sdpa
    with pytest.raises(UserError, match=f"'{name}' needs .* not cpu and torch.bfloat16; use auto or sdpa") as error:
        resolve_backend(AttentionBackend(name), torch.device("cpu"), torch.bfloat16)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("capability", "installed", "chosen"),
    [
        ((9, 0), {"flash_attn.cute", "flash_attn_interface"}, "flash4"),
        ((9, 0), {"flash_attn_interface", "flash_attn.flash_attn_interface"}, "flash3"),
        ((9, 0), {"flash_attn.flash_attn_interface"}, "cudnn"),
        ((8, 9), {"flash_attn.cute", "flash_attn.flash_attn_interface", "sageattention"}, "flash"),
        ((8, 9), {"flash_attn.cute"}, "sdpa"),
        ((8, 6), set(), "sdpa"),
        ((7, 5), {"flash_attn.flash_attn_interface"}, "sdpa"),
    ],
)
def test_the_kernel_follows_from_what_the_gpu_can_do_and_what_is_installed(capability, installed, chosen, monkeypatch):
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda device: capability)
    monkeypatch.setattr("model.kernels.find_spec", lambda name: name if name in installed else None)
    choose = resolve_backend.__wrapped__  # without what it remembers
    assert choose(AttentionBackend.auto, torch.device("cuda"), torch.bfloat16).value == chosen
    assert choose(AttentionBackend.auto, torch.device("cuda"), torch.float32) is AttentionBackend.sdpa
    if "sageattention" not in installed:
        with pytest.raises(UserError, match="'sage' needs"):
            choose(AttentionBackend.sage, torch.device("cuda"), torch.bfloat16)


def test_a_package_that_is_absent_or_broken_is_not_there(monkeypatch):
    assert not kernels._installed("no_such_package.cute")

    def broken(name):
        raise ImportError("undefined symbol")

    monkeypatch.setattr("model.kernels.find_spec", broken)
    assert not kernels._installed("flash_attn.cute")


def test_a_kernel_in_one_thread_forbids_nothing_to_another(monkeypatch):
    """While cuDNN computes attention in one thread, a decoding thread calls torch's attention for one head of 384."""
    q, k, v = halves(6, 5, 5)
    seen, outputs = [], []

    def decode() -> None:
        x = torch.ones(1, 1, 4, 384)
        outputs.append(F.scaled_dot_product_attention(x, x, x))

    def cudnn(q, k, v, *rest):
        switches = torch.backends.cuda
        seen.append((switches.flash_sdp_enabled(), switches.math_sdp_enabled(), switches.mem_efficient_sdp_enabled()))
        other = threading.Thread(target=decode)
        other.start()
        other.join()
        return (F.scaled_dot_product_attention(q, k, v),)

    monkeypatch.setattr(torch.ops.aten, "_scaled_dot_product_cudnn_attention", cudnn)
    out = attention(q, k, v, backend=AttentionBackend.cudnn)
    assert torch.equal(out, kernels.sdpa(q, k, v))
    assert seen == [(True, True, True)] and len(outputs) == 1


def test_no_program_changes_the_kernels_of_the_whole_process():
    """`sdpa_kernel` and `torch.backends.cuda.enable_*_sdp` change the whole process, not one thread."""
    files = [
        path for part in ("model", "pipeline", "trainer", "utils", "scripts") for path in (ROOT / part).rglob("*.py")
    ]
    assert len(files) > 60
    for path in [*files, *ROOT.glob("*.py")]:
        text = path.read_text(encoding="utf-8")
        assert "sdpa_kernel(" not in text and "_sdp(" not in text, path


@pytest.mark.parametrize("name", PACKAGED)
@pytest.mark.parametrize("logsumexp", [False, True])
def test_a_packaged_kernel_is_one_operator_that_a_full_graph_holds(name, logsumexp, package):
    calls, (q, k, v) = package(name, logsumexp=logsumexp), halves(6, 10, 10)
    backend = AttentionBackend(name)

    def run(q, k, v):
        return attention(q, k, v, backend=backend) * 2

    with torch.no_grad():
        expected = kernels.sdpa(q, k, v) * 2
        torch._dynamo.reset()
        compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
        assert torch.equal(run(q, k, v), expected) and torch.equal(compiled(q, k, v), expected)
    assert calls == [name, name]


def test_the_operator_keeps_the_rules_of_operators(package):
    package("flash4")
    q, k, v = halves(6, 10, 10)
    torch.library.opcheck(kernels.packaged_attention, (q, k, v, "flash4"))
    strided = q.transpose(1, 2).contiguous().transpose(1, 2)
    torch.library.opcheck(kernels.packaged_attention, (strided, k, v, "flash4"))


def test_training_calls_the_package_itself_which_has_the_backward(package):
    calls, (q, k, v) = package("flash4"), halves(6, 10, 10)
    q.requires_grad_()
    attention(q, k, v, backend=AttentionBackend.flash4).float().sum().backward()
    expected = q.grad.clone()
    q.grad = None
    kernels.sdpa(q, k, v).float().sum().backward()
    assert torch.equal(q.grad, expected) and calls == ["flash4"]


def test_a_kernel_without_backward_is_refused_under_grad(package):
    package("sage")
    q, k, v = halves(6, 10, 10)
    with pytest.raises(UserError, match="'sage' has no backward"):
        attention(q.requires_grad_(), k, v, backend=AttentionBackend.sage)


@pytest.mark.parametrize("name", [*PACKAGED, "cudnn"])
def test_no_kernel_meets_tensors_that_it_cannot_take(name, package, monkeypatch):
    """With float32, or with a head dim that is too large or odd, sdpa is used instead of the model's kernel."""
    calls = [] if name == "cudnn" else package(name)
    monkeypatch.setattr(torch.ops.aten, "_scaled_dot_product_cudnn_attention", lambda *_: calls.append(name))
    for head_dim, dtype in [(16, torch.float32), (320, torch.bfloat16), (12, torch.bfloat16)]:
        q, k, v = (random(1, length, 1, head_dim, seed=length).to(dtype) for length in (4, 6, 6))
        assert torch.equal(attention(q, k, v, backend=AttentionBackend(name)), kernels.sdpa(q, k, v))
    assert calls == []


def test_float32_heads_over_a_backbone_in_half_precision_use_sdpa(package, monkeypatch):
    """The explicit kernel of the backbone is not used by the discriminator's heads."""
    calls = package("flash")
    monkeypatch.setattr("model.transformer.resolve_backend", lambda backend, *_: backend)
    backbone = tiny_denoiser(TINY).transformer.bfloat16()
    backbone.attention_backend = AttentionBackend.flash
    judge = Discriminator(backbone, DiscriminatorConfig(depths=[1.0]))
    with torch.no_grad():
        logits = judge(random(1, 3, 4, 4, 6).bfloat16(), torch.full((1, 1), 500.0), random(1, 5, 8).bfloat16())
    assert logits.dtype == torch.float32
    assert calls == ["flash"] * 2 * TINY.num_layers  # self- and cross-attention of the blocks, and nothing of the head


def test_prompts_are_read_by_cudnn_beside_flash4():
    assert AttentionBackend.flash4.for_text() is AttentionBackend.cudnn
    assert all(one.for_text() is one for one in AttentionBackend if one is not AttentionBackend.flash4)


@pytest.mark.gpu
@pytest.mark.parametrize("backend", list(AttentionBackend))
def test_every_kernel_that_runs_here_equals_sdpa(backend):
    q, k, v = (random(2, length, 4, 64, seed=length).cuda().bfloat16() for length in (96, 160, 160))
    try:
        resolve_backend(backend, q.device, q.dtype)
    except UserError as error:
        pytest.skip(str(error))
    tolerance = 0.1 if backend is AttentionBackend.sage else 0.02
    expected = attention(q, k, v, backend=AttentionBackend.sdpa).float()
    assert relative_error(attention(q, k, v, backend=backend).float(), expected) <= tolerance


@pytest.mark.parametrize(("name", "bound"), [("int8", 0.02), ("fp8", 0.05)])
def test_attention_in_8_bits_is_close_to_exact_attention(name, bound):
    """This also holds for keys far from zero (their mean is subtracted) and for lengths that fill no block."""
    q, k, v = (random(2, length, 3, 64, seed=length) for length in (200, 333, 334))
    v = v[:, :333]
    expected = kernels.sdpa(q, k, v)
    for keys in (k, k + 20 * random(1, 1, 3, 64)):
        made = attention(q, keys, v, backend=AttentionBackend(name))
        assert 0 < relative_error(made, expected) <= bound
    half = attention(q.bfloat16(), k.bfloat16(), v.bfloat16(), backend=AttentionBackend(name))
    assert half.dtype == torch.bfloat16 and relative_error(half.float(), expected) <= bound + 0.01
    with pytest.raises(UserError, match=f"'{name}' has no backward pass"):
        attention(q.requires_grad_(), k, v, backend=AttentionBackend(name))


@pytest.mark.parametrize("name", ["int8", "fp8"])
def test_a_rollout_with_attention_in_8_bits_is_close_to_one_without(name):
    """This also holds when it is compiled as one graph."""
    denoiser, latents, embeds = tiny_denoiser(), random(1, 3, 4, 4, 6), random(1, 5, 8, seed=1)
    arguments = latents, torch.full((1, 1), 500.0), embeds
    with torch.no_grad():
        expected = denoiser(*arguments).x0
        denoiser.transformer.attention_backend = AttentionBackend(name)
        made = denoiser(*arguments).x0
        for block in denoiser.transformer.blocks:
            block.compile(fullgraph=True, backend="eager")
        assert relative_error(denoiser(*arguments).x0, made) <= 1e-5
    assert 0 < relative_error(made, expected) <= 0.02
