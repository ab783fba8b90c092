"""Data by the word that scripts take for it: what is on this machine is read for what it is."""

from pathlib import Path
from typing import Any

from .image_config import ImageDataConfig
from .sources import Source


# What ends the name of a file of rows.
ROWS = {".csv", ".json", ".jsonl", ".parquet"}


def named_text(data: str, **words: Any) -> Source:
    """Text as recipes name it; or rows with a column of it: a file (`.csv`, `.json`, `.jsonl`, `.parquet`), or a folder
    of nothing else but such files.

    Args:
        data: the word.
        words: further fields of `Source`.
    """
    return Source(f"hub:{data}" if _holds_rows(Path(data).expanduser()) else data, **words)


def _holds_rows(path: Path) -> bool:
    """Whether that is a file of rows, or a folder of them; what is hidden and a README.md do not count."""
    files = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
    shown = [file for file in files if "/." not in f"/{file.relative_to(path).as_posix()}" or file == path]
    suffixes = {file.suffix for file in shown if file.name != "README.md"}
    return bool(suffixes) and suffixes <= ROWS


def named_images(data: str, **words: Any) -> ImageDataConfig:
    """`digits`, `hub:ORG/NAME`, a parquet file or a folder of them, or a folder of images by class.

    Args:
        data: the word.
        words: further fields of `ImageDataConfig`.
    """
    path = Path(data).expanduser()
    if data == "digits" or not path.exists():
        return ImageDataConfig(data, **words)
    if path.suffix == ".parquet" or any(path.rglob("*.parquet")):
        return ImageDataConfig(path.name, str(path), **words)
    return ImageDataConfig(f"hub:{path}", **words)
