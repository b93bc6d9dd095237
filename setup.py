"""Put configs and examples, which stand beside the package, into the package's folder of a wheel."""

from setuptools import find_packages, setup

setup(
    packages=[*find_packages(include=["nni_jackpot*"]), "nni_jackpot.configs", "nni_jackpot.examples"],
    package_dir={"nni_jackpot.configs": "configs", "nni_jackpot.examples": "examples"},
    package_data={
        "nni_jackpot": ["py.typed", "masking/cpu/*.c"],
        "nni_jackpot.configs": ["*/*.yml"],
        "nni_jackpot.examples": ["*.py"],
    },
)
