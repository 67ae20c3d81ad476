"""Packaging only: nothing here imports torch."""

from pathlib import Path

from setuptools import find_packages, setup

version = next(
    line.split('"')[1]
    for line in Path(__file__).with_name("megatron_adamba").joinpath("__init__.py").read_text().splitlines()
    if line.startswith("__version__")
)

setup(
    name="megatron_adamba",
    version=version,
    description="A distributed training stack for elastic hybrid language models",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=find_packages(include=["megatron_adamba", "megatron_adamba.*"]),
    package_data={"megatron_adamba.config": ["presets/*.yaml"], "megatron_adamba.inference.serving": ["*.html"]},
    install_requires=[
        "torch>=2.9",
        "deepspeed==0.19.8",
        "fastapi>=0.115",
        "jsonargparse[signatures]>=4.53,<5",
        "matplotlib>=3.9",
        "numpy>=1.26",
        "protobuf>=5",
        "pydantic>=2.9",
        "PyYAML>=6",
        "rich>=13",
        "safetensors>=0.5",
        "sentencepiece>=0.2",
        "tensorboard>=2.16",
        "tiktoken>=0.8",
        "tokenizers>=0.20",
        "typing_extensions>=4.12",
        "uvicorn>=0.30",
        "zstandard>=0.23",
    ],
    extras_require={
        "test": [
            "accelerate>=1.15",
            "einops>=0.8",
            "httpx>=0.28",
            "hypothesis>=6.100",
            "lm_eval==0.4.13",
            "openai>=2",
            "PyQt6-WebEngine>=6.11",
            "pytest>=8",
            "pytest-timeout>=2.3",
            "pytest-xdist>=3.6",
            "ruff==0.17.6",
            "transformers>=5.20,<6",
            "triton>=3.4; platform_system == 'Linux' and platform_machine == 'x86_64'",
        ],
        "cuda": [
            "mamba-ssm>=2.3.2,<2.4",
            "causal-conv1d>=1.6.1,<2",
            "transformer-engine[pytorch]>=2.13,<3",
        ],
        "hf": ["transformers>=5.20,<6"],
    },
)
