from pathlib import Path

from setuptools import find_packages, setup


install_requires = [
    "torch>=2.6",
    "diffusers>=0.41,<0.43",
    "transformers>=5.0,<6",
    "peft>=0.19",
    "accelerate>=1.1",
    "huggingface-hub>=1.5",
    "safetensors>=0.5",
    "av>=14.1",
    "click>=8.1",
    "filelock>=3.12",
    "psutil>=5.9",
    "numpy>=1.26",
    "pillow>=10.1",
    "ftfy>=6.1",
    "tqdm>=4.60",
]

extras = {
    "color": ["color-matcher>=0.6"],
    "demo": ["matplotlib>=3.8", "pyloudnorm>=0.2"],
    "train": ["datasets>=4.0", "tensorboard>=2.15"],
    "deepspeed": ["deepspeed>=0.17"],
    "app": ["gradio>=6.0,<7"],
    "talk": ["pyloudnorm>=0.2"],
    "test": [
        "pytest>=8",
        "pytest-xdist>=3.6",
        "hypothesis>=6.100",
        "scipy>=1.15",
        "bitsandbytes>=0.45",
        "gguf>=0.10",
        "imageio-ffmpeg>=0.5",
        "optimum-quanto>=0.2.6",
        "playwright>=1.50",
        "prodigyopt>=1.0",
        "torchao>=0.16",
    ],
    "quality": ["ruff>=0.11", "mypy>=1.15", "import-linter>=2.10", "types-psutil", "types-tqdm"],
}
for name in ("app", "color", "demo", "talk", "train", "deepspeed", "quality"):
    extras["test"] += extras[name]

setup(
    name="diffusers_svi",
    version="0.1.0.dev0",
    description="Stable Video Infinity for diffusers: videos of any length that do not fall apart",
    long_description=Path("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    package_dir={"": "src"},
    packages=find_packages("src"),
    package_data={"diffusers_svi.app": ["page.css"]},
    python_requires=">=3.11",
    install_requires=install_requires,
    extras_require=extras,
    entry_points={"console_scripts": ["diffusers-svi=diffusers_svi.cli:main"]},
    classifiers=[
        "Development Status :: 3 - Alpha",
        "Intended Audience :: Developers",
        "Intended Audience :: Science/Research",
        "Operating System :: POSIX",
        "Programming Language :: Python :: 3",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
)
