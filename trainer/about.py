"""Describes a configuration in words: what it reproduces, where training starts, and which files it needs."""

from __future__ import annotations

import itertools
import re
from dataclasses import dataclass
from pathlib import Path

from model.weights.published import published
from pipeline.config import DenoiserConfig
from trainer.config import Config, Objective
from trainer.data import DataKind
from trainer.self_forcing import METHODS
from utils.prompts import DOWNLOADS

REPOSITORY = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class NeededFile:
    """A file or folder that a training reads."""

    key: str
    """The key of the configuration that names it."""
    path: str

    def line(self, config_path: str | Path) -> str:
        """Say whether it is there; if not, say where it comes from."""
        if Path(self.path).expanduser().exists():
            return f"{self.key}={self.path} (is there)"
        return f"{self.key}={self.path}: {origin(self, config_path)}"


def describe(config: Config, config_path: str | Path) -> list[str]:
    """Return lines that say what a training reproduces, where it starts and which files it needs.

    Args:
        config_path: the YAML file. The comment at its beginning says what it reproduces.
    """
    lines = Path(config_path).read_text(encoding="utf-8").split("\n")
    comments = itertools.takewhile(lambda line: line.startswith("#"), lines)
    title = " ".join(line.lstrip("# ") for line in comments) or str(config_path)
    files = [file.line(config_path) for file in needed_files(config)]
    return [
        f"reproduces: {title}",
        f"trains: {config.objective.value}, {config.trainer.steps} steps",
        f"starts from: {start(config)}",
        *(["needs:", *(f"  {line}" for line in files)] if files else ["needs: no file"]),
    ]


def start(config: Config) -> str:
    """Return the key and the weights that the trained network starts from."""
    if config.objective is Objective.autoencoder:
        if config.autoencoder.weights is not None:
            return f"autoencoder.weights={config.autoencoder.weights}"
        return f"an encoder fitted to clips (autoencoder.preset={config.autoencoder.preset})"
    key = "generator" if config.objective in (Objective.diffusion, Objective.ode_regression) else "student"
    network: DenoiserConfig = getattr(config, key)
    if network.weights is None:
        return f"random weights ({key}.preset={network.preset})"
    kind = "trained" if network.use_ema is False else "averaged"
    choice = f" (its {kind} weights if it holds both kinds)" if network.weights.endswith(".pt") else ""
    return f"{key}.weights={network.weights}{choice}"


def needed_files(config: Config) -> list[NeededFile]:
    """Return the files and folders that the training reads, each path once."""
    named = [*_networks(config), *_parts(config), *_data(config)]
    unique = {path: NeededFile(key, path) for key, path in reversed(named) if path is not None}
    return list(reversed(unique.values()))


def _networks(config: Config) -> list[tuple[str, str | None]]:
    objective, method = config.objective, METHODS.get(config.objective)
    if objective is Objective.autoencoder:
        generator = config.generator.weights if config.autoencoder.denoised_share else None
        return [("autoencoder.weights", config.autoencoder.weights), ("generator.weights", generator)]
    if objective in (Objective.diffusion, Objective.ode_regression):
        return [("generator.weights", config.generator.weights)]
    networks = [("student.weights", config.student.weights)]
    if method is None or method.has_teacher:
        networks.append(("real_score.weights", config.real_score.weights))
    if method is not None:
        key = "real_score" if config.fake_score is None else "fake_score"
        networks.append((f"{key}.weights", (config.fake_score or config.real_score).weights))
    return networks


def _parts(config: Config) -> list[tuple[str, str | None]]:
    if config.objective is Objective.autoencoder and not config.autoencoder.denoised_share:
        return []
    parts: list[tuple[str, str | None]] = []
    if config.objective is not Objective.autoencoder:
        parts.append(("codec.weights", config.codec.weights))
    if config.data.embeddings is not None:
        return [*parts, ("data.embeddings", config.data.embeddings)]
    text = config.text_encoder
    return [*parts, ("text_encoder.weights", text.weights), ("text_encoder.tokenizer", text.tokenizer)]


def _data(config: Config) -> list[tuple[str, str | None]]:
    named: list[tuple[str, str | None]] = [("data.sample_prompts", config.data.sample_prompts)]
    if config.objective is not Objective.ode_regression and config.data.kind is not DataKind.shapes:
        named = [("data.path", config.data.path), ("data.switch_path", config.data.switch_path), *named]
    if config.objective is Objective.ode_regression or config.dmd.regression_weight:
        named = [("ode.pairs", config.ode.pairs), *named]
    return named


def origin(file: NeededFile, config_path: str | Path) -> str:
    """Return where a missing file comes from: the command that downloads or makes it, if one is known."""
    path = Path(file.path)
    if path.name in DOWNLOADS:
        return f"download it: {DOWNLOADS[path.name].format(path=path, name=path.name, folder=path.parent)}"
    if match := re.match(r"(?P<logdir>logs/(?P<name>[\w/.-]+?))/model(/|$)", path.as_posix()):
        return f"train it: python train.py --config_path configs/{match['name']}.yaml --logdir {match['logdir']}"
    if (source := published(path)) is not None:
        return f"download it: {source.command}"
    if file.key == "ode.pairs":
        causal = " --causal" if "causal" in path.name else ""
        return f"make it: python scripts/make_ode_pairs.py --config_path {config_path}{causal}"
    if file.key == "data.path":
        return f"make it from a folder of videos: python scripts/encode_videos.py VIDEOS --config_path {config_path}"
    if file.key == "data.embeddings":
        return f"make it: python scripts/cache_embeddings.py --config_path {config_path}"
    if (REPOSITORY / path).exists():
        return f"run the command in {REPOSITORY}, where it is"
    return "no download is known; name a file of yours"
