"""Metadata for `pip install -e .`. To run from a checkout, requirements.txt is enough."""

from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent


def requirements(name: str) -> list[str]:
    """Return the requirements of a requirements file, without comments and includes."""
    lines = [line.partition("#")[0].strip() for line in (ROOT / name).read_text().splitlines()]
    return [line for line in lines if line and not line.startswith("-")]


setup(
    name="self-forcing",
    version="0.1.0",
    description="Self Forcing: autoregressive video diffusion, from training to streaming",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.10",
    packages=find_packages(include=["model*", "pipeline*", "trainer*", "utils*"]),
    package_data={"pipeline.serving": ["page/*"]},
    install_requires=requirements("requirements.txt"),
    extras_require={
        "flash": ["flash-attn-4"],  # FlashAttention-4: Hopper and later, no compiler needed
        "gguf": ["gguf>=0.17"],  # reads .gguf weights
        "wandb": ["wandb>=0.17"],
        "tensorboard": ["tensorboard>=2.16"],
        "triton": ["triton>=3.2"],  # optimize.kernels=triton; torch for CUDA brings it, on a CPU only tests use it
        "quant": ["torchao>=0.10"],
        "fleet": ["ray[serve]>=2.60"],  # scripts/serve_fleet.py
        "dev": requirements("requirements-dev.txt"),
    },
)
