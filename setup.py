"Everything that pyproject.toml declares `dynamic` comes from settings.ini."

import re
from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup

ini = ConfigParser(delimiters=["="])
ini.read(Path(__file__).parent / "settings.ini", encoding="utf-8")
cfg = ini["DEFAULT"]

readme = (Path(__file__).parent / "README.md").read_text(encoding="utf-8")
pages = "https://github.com/ecan-fastai/ecan_fastai"  # where README's images and links lie
readme = re.sub(r"(!\[[^]]*\]\()(?!http)", rf"\1{pages}/raw/main/", readme)
readme = re.sub(r"(?<!!)(\[[^]]*\]\()(?!http)", rf"\1{pages}/blob/main/", readme)

setup(
    version=cfg["version"],
    long_description=readme,
    long_description_content_type="text/markdown",
    author=cfg["author"],
    python_requires=f">={cfg['min_python']}",
    keywords=cfg["keywords"].split(),
    packages=find_packages(include=["ecan_fastai", "ecan_fastai.*"]),
    package_data={"ecan_fastai": ["*.json", "py.typed", "shipped/*/*"]},
    install_requires=cfg["requirements"].split(),
    extras_require={k.removesuffix("_requirements"): v.split() for k, v in cfg.items() if k.endswith("_requirements")},
    entry_points={
        "console_scripts": cfg["console_scripts"].split(),
        "nbdev": [f"{cfg['lib_path']}={cfg['lib_path']}._modidx:d"],
    },
)
