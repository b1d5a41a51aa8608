"""What identifies the weights of a folder that no run made, without reading all of them."""

from __future__ import annotations

import hashlib
from itertools import chain
from pathlib import Path

from mtkd.models.folder import MAP_FILE
from mtkd.models.stored import StoredWeight, read_weights

# A weight file is identified by its size, this many evenly spread samples of this many bytes, and both ends of every
# weight: a 20 GB teacher would take a minute to hash whole on every start. Files of up to 4 MB are read whole.
_SAMPLES, _SAMPLE_BYTES = 64, 65_536
_END_BYTES = 16_384  # all of a classifier's head: the trunk below another head may be the same


def weights_digest(folder: Path) -> str:
    """Digest of a model folder: config.json and vocabulary map whole, size and samples of every safetensors file.

    Raises:
        DataError: the header of a file does not describe it.
    """
    digest = hashlib.sha256((folder / "config.json").read_bytes())
    if (folder / MAP_FILE).is_file():
        digest.update((folder / MAP_FILE).read_bytes())
    files = sorted(folder.glob("*.safetensors"))
    large = {file for file in files if file.stat().st_size > _SAMPLES * _SAMPLE_BYTES}
    weights = read_weights(folder).values() if large else ()
    for file in files:
        size = file.stat().st_size
        digest.update(f"{file.name}:{size}".encode())
        spread = [sample * max(size - _SAMPLE_BYTES, 0) // (_SAMPLES - 1) for sample in range(_SAMPLES)]
        ends = sorted(_ends(weight) for weight in weights if file in large and weight.file == file)
        with file.open("rb") as stream:
            for start, length in [*((start, _SAMPLE_BYTES) for start in spread), *chain(*ends)]:
                stream.seek(start)
                digest.update(stream.read(length))
    return digest.hexdigest()


def _ends(weight: StoredWeight) -> tuple[tuple[int, int], ...]:
    """(first byte, bytes) of what is read of a weight."""
    if weight.num_bytes <= 2 * _END_BYTES:
        return ((weight.start, weight.num_bytes),)
    return (weight.start, _END_BYTES), (weight.end - _END_BYTES, _END_BYTES)
