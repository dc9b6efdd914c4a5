"""Images of handwritten digits as sequences, for recurrent networks.

A row-by-row sequence of an 8 x 8 image has 8 steps of 8 values, a pixel-by-pixel one
64 steps of 1 value. The longer the sequence, the further gradients travel back.
"""

import gzip
import struct
import zlib
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int
from sklearn.datasets import load_digits

MNIST_FILES = {
    "train_images": "train-images-idx3-ubyte",
    "train_labels": "train-labels-idx1-ubyte",
    "test_images": "t10k-images-idx3-ubyte",
    "test_labels": "t10k-labels-idx1-ubyte",
}
UNSIGNED_BYTE = 0x08  # the one element type that these IDX files have


class Images(NamedTuple):
    """Images with values from 0 to 1 and their labels, for training and for testing."""

    train_images: Float[np.ndarray, "train height width"]
    train_labels: Int[np.ndarray, " train"]
    test_images: Float[np.ndarray, "test height width"]
    test_labels: Int[np.ndarray, " test"]


def load(dataset: str, folder: Path | None = None) -> Images:
    """Loads ``"digits"``, which ships with scikit-learn, or ``"mnist"`` from files."""
    if dataset == "digits":
        return load_sklearn_digits()
    if dataset == "mnist":
        return load_mnist(folder)
    raise ValueError(f'Expected dataset "digits" or "mnist", got {dataset!r}.')


def load_sklearn_digits(num_test: int = 360) -> Images:
    """The 1,797 images of 8 x 8 pixels in scikit-learn, shuffled in a fixed order."""
    digits = load_digits()
    order = np.random.default_rng(0).permutation(len(digits.images))
    images = (digits.images[order] / 16).astype(np.float32)
    labels = digits.target[order].astype(np.int32)
    return Images(
        images[:-num_test], labels[:-num_test], images[-num_test:], labels[-num_test:]
    )


def load_mnist(folder: Path | None) -> Images:
    """The 70,000 images of 28 x 28 pixels, from the four IDX files, gzipped or not."""
    if folder is None:
        raise FileNotFoundError(
            "MNIST is read from files: pass --data-dir with the folder that has "
            + ", ".join(MNIST_FILES.values())
            + " (each may end in .gz)."
        )
    arrays = {
        name: read_idx(find_idx(folder, file), rank=3 if "images" in name else 1)
        for name, file in MNIST_FILES.items()
    }
    for part in ("train", "test"):
        images, labels = arrays[f"{part}_images"], arrays[f"{part}_labels"]
        if len(images) != len(labels):
            raise ValueError(
                f"Expected as many labels as images in {folder}, got {len(images)}"
                f" images and {len(labels)} labels for {part}."
            )
        arrays[f"{part}_images"] = (images / 255).astype(np.float32)
        arrays[f"{part}_labels"] = labels.astype(np.int32)
    return Images(**arrays)


def find_idx(folder: Path, name: str) -> Path:
    """The path of an IDX file or of its gzipped form."""
    for path in (folder / name, folder / f"{name}.gz"):
        if path.is_file():
            return path
    raise FileNotFoundError(
        f"Found neither {name} nor {name}.gz in {folder.resolve()}. Put the four MNIST"
        " files there, pass another folder with --data-dir, or use --dataset digits,"
        " which needs no files."
    )


def read_idx(path: Path, rank: int) -> np.ndarray:
    """Reads an array of unsigned bytes from an IDX file and checks it."""
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            content = file.read()
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise ValueError(f"{path} is damaged or cut short: {error}.") from error

    # The header: two zero bytes, the element type, the rank, and the shape as
    # big-endian 32-bit integers.
    start = 4 + 4 * rank
    if len(content) < start or content[:4] != bytes([0, 0, UNSIGNED_BYTE, rank]):
        raise ValueError(
            f"{path} is no IDX file of {rank} dimensions of unsigned bytes: it begins"
            f" with 0x{content[:4].hex()} and not 0x{UNSIGNED_BYTE << 8 | rank:08x}."
        )
    shape = struct.unpack(f">{rank}I", content[4:start])
    expected = int(np.prod(shape, dtype=np.int64))
    if len(content) - start != expected:
        raise ValueError(
            f"{path} is cut short or damaged: its header promises {expected:,} bytes of"
            f" shape {shape}, it has {len(content) - start:,}."
        )
    return np.frombuffer(content, np.uint8, offset=start).reshape(shape)


def as_sequences(
    images: Float[np.ndarray, "image height width"], order: str
) -> Float[np.ndarray, "image step value"]:
    """Images read row by row (``"rows"``) or pixel by pixel (``"pixels"``)."""
    return images if order == "rows" else images.reshape(len(images), -1, 1)
