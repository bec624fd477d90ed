"""benchmark.py measures every part, says how to reproduce each figure, and compares with an earlier run."""

import json

import pytest

from scripts import benchmark
from scripts.measuring import floors, inference, peers, sessions

pytest_plugins = ["tests.shapes_parts"]


@pytest.fixture
def bench(release, tmp_path, monkeypatch, capsys):
    """Give a function that runs benchmark.py on the tiny release and returns its results and its output."""
    monkeypatch.setattr(floors, "FLOOR_SIZES", floors.FLOOR_SIZES | {"dim": 24, "ffn_dim": 32, "num_layers": 1})
    monkeypatch.setattr(floors, "FLOOR_LATENT", (4, 4))

    def run(what: str, *arguments: str) -> tuple[dict, str]:
        output = tmp_path / f"{what}.json"
        flags = [what, "--config_path", release.config_path, "--repeats", "1", "--output", str(output), *arguments]
        assert benchmark.main(flags) == 0
        return json.loads(output.read_text()), capsys.readouterr().out

    return run


def test_inference_shows_every_stage_and_adds_up(bench):
    report, printed = bench("inference", "--clock", "cpu")
    figures = report["results"]["inference"]
    stages = ["text", "decode", "host copy", "context", *(f"step {step}" for step in range(1, 5))]
    assert all(0 < figures[f"{stage} p50 ms"] <= figures[f"{stage} p90 ms"] for stage in stages)
    assert 0 < figures["first frame s"] < figures["total s"]
    assert figures["denoise and context s"] < figures["total s"]
    assert figures["frames/s"] < figures["frames/s without decode"]
    assert report["command"] in printed and report["machine"]["torch"] in printed


@pytest.mark.parametrize("what", ["floor", "peer", "codec", "codec_peer"])
def test_comparisons_measure_both_sides(bench, what, monkeypatch):
    monkeypatch.setattr(peers, "PEER_LATENTS", (3, 2, 2))
    report, _ = bench(what)
    figures = report["results"][what]
    assert all(value > 0 for value in figures.values())
    for name in figures:
        if " / " in name:
            mine, other = (figures[f"{side} s"] for side in name.split(" / "))
            assert figures[name] == pytest.approx(mine / other)


def test_a_session_shows_its_first_chunk_long_before_its_last(bench):
    report, _ = bench("session", "--frames", "12")
    figures = report["results"]["session"]
    assert figures["first frame p50 ms"] < figures["first chunk p50 ms"]
    assert figures["first chunk best ms"] <= figures["first chunk p50 ms"] < 1e3 * 45 / figures["frames/s p50"]


def test_viewers_are_measured_one_by_one_and_as_a_batch(bench, monkeypatch):
    monkeypatch.setattr(sessions, "VIEWERS", (2,))
    report, _ = bench("viewers", "--frames", "6")
    figures = report["results"]["viewers"]
    ratio = figures["2 viewers batched frames/s"] / figures["2 viewers in turn frames/s"]
    assert figures["2 viewers batched / in turn"] == pytest.approx(ratio)


def test_late_chunks_are_compared_with_early_ones(bench, monkeypatch):
    monkeypatch.setattr(inference, "LATE_CHUNK", 30)
    report, _ = bench("endless", "rollout.denoising_steps=[1000.0]")
    assert set(report["results"]["endless"]) == {"chunk 20 ms", "chunk 30 ms", "late / early"}


def test_random_weights_need_no_files(bench, tmp_path):
    sizes = ["generator.preset=shapes", "generator.weights=/none", "codec.weights=/none", "text_encoder.weights=/none"]
    report, _ = bench("inference", "--random-weights", "--frames", "3", "video.height=64", "video.width=64", *sizes)
    assert report["results"]["inference"]["frames/s"] > 0


def test_ratios_to_an_earlier_run(bench, tmp_path):
    report, _ = bench("codec")
    report["results"]["codec"] = {name: 2 * value for name, value in report["results"]["codec"].items()}
    (tmp_path / "earlier.json").write_text(json.dumps(report))
    again, printed = bench("codec", "--against", str(tmp_path / "earlier.json"))
    ratio = again["results"]["codec"]["decode s"] / report["results"]["codec"]["decode s"]
    assert f"{ratio:8.3f} x" in printed and f"ratios to: {report['command']}" in printed


def test_a_missing_file_to_compare_with_is_named(release, capsys):
    assert benchmark.main(["codec", "--config_path", release.config_path, "--against", "/none.json"]) == 2
    assert "--against /none.json: no such file" in capsys.readouterr().err
