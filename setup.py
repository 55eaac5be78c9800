"""Packaging of kimi_jax. Tool settings live in pyproject.toml."""

from pathlib import Path

from setuptools import find_packages, setup

CORE = [
    "jax>=0.10.2",
    "flax>=0.12.8",
    "optax>=0.2.8",
    "orbax-checkpoint>=0.12.8,<0.13",
    "numpy>=2.0",
    "tensorstore>=0.1.80",
    "ml-collections>=1.1.0",
    "fsspec>=2025.3",
    "xxhash>=3.5",
]
DATA = ["grain>=0.2.18", "tiktoken>=0.14", "pyarrow>=21"]
REPORT = ["tensorboardX>=2.6.5", "matplotlib>=3.10", "tqdm>=4.67"]
TPU = ["jax[tpu]", "tokamax>=0.0.12"]
SERVE = ["fastapi>=0.120", "uvicorn>=0.35", "llguidance>=1.9", "prometheus-client>=0.22", "pydantic>=2.11"]
TEST = [
    "pytest>=8",
    "pytest-xdist>=3.6",
    "hypothesis>=6.100",
    "pyyaml>=6",
    "regex>=2024.4",
    "s3fs>=2025.3",
    "moto[server]>=5",
    *TPU,
    *SERVE,
    "openai>=2",
    "anthropic>=0.80",
    "httpx>=0.28",
    "jsonschema>=4.25",
    "jinja2>=3.1",
    "playwright>=1.50",
    "ruff==0.17.6",
    "pyright[nodejs]==1.1.414",
]
SOAK = ["schemathesis>=4"]  # python -m tests.server.soak
PARITY = ["torch==2.13.0", "transformers==5.23.0", "safetensors>=0.7"]

setup(
    name="kimi_jax",
    version="0.1.0",
    description="Kimi-K2 in JAX and Flax for TPU pods: exact, small enough to read in a day, fast.",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=find_packages(include=["kimi_jax", "kimi_jax.*"]),
    package_data={"kimi_jax.server": ["page.html"]},
    install_requires=CORE + DATA + REPORT,
    extras_require={
        "tpu": TPU,
        "aot": TPU,
        "serve": SERVE,
        "test": TEST,
        "parity": PARITY,
        "soak": SOAK,
    },
)
