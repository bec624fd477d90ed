"""Metadata for `pip install -e .`. To run from a checkout, requirements.txt is enough.

There is no wheel: its top-level packages `utils` and `model` would take the place of those of other programs.
"""

from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.bdist_wheel import bdist_wheel

ROOT = Path(__file__).parent


def requirements(name: str) -> list[str]:
    """Return the requirements of a requirements file, without comments and includes."""
    lines = [line.partition("#")[0].strip() for line in (ROOT / name).read_text().splitlines()]
    return [line for line in lines if line and not line.startswith("-")]


class NoWheel(bdist_wheel):
    """Refuses to build a wheel. An editable installation does not run this command."""

    def run(self) -> None:
        raise SystemExit(
            "error: no wheel is built, as its packages `utils` and `model` would harm other programs; "
            "use a checkout with: pip install -e ."
        )


setup(
    cmdclass={"bdist_wheel": NoWheel},
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
