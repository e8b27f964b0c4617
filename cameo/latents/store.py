"""Latents on disk: written view by view into shards of bounded size, found by the content of the images.

Axes: V views, C channels, H W image pixels, h w latent cells. A shard holds `keys` int64 `[P]`, `latents`
`[P, C, h, w]` in the precision of the folder, and `checksums` int64 `[P]` of their bytes.

A key is a digest of the pixels of all images that the encoder sees together, and of a view's place among them. So the
latents of other pixels are never taken for those of a view, whatever file or scene it comes from; a view whose pixels
have changed is one whose latents are missing.
"""

from __future__ import annotations

import hashlib
import secrets
import time
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cameo.data.shards import Shard, ShardKind, check_writable, damaged
from cameo.scenes.views import images_to_bytes

__all__ = ["LATENTS", "LatentReader", "LatentWriter", "image_keys"]

LATENTS = ShardKind(
    "latents",
    version=1,
    repair="remove the file; the next start of the training encodes what is missing",
    renew="remove the file, or give another latents_dir",
    before_checksums=1,
)
# A shard that is not full is written after this many seconds, which bounds the work that is lost if the process is
# killed.
SHARD_SECONDS = 60
SHARD_BYTES = 64 << 20
# No shard takes as long to write.
LEFTOVER_SECONDS = 3600


def image_keys(images: Tensor) -> list[int]:
    """Return a key of 64 bits for each of the images `[V, 3, H, W]` that the encoder sees together.

    Images of 8 bits have the same keys as bytes and as floats in [0, 1].

    Example:
        >>> first, second = torch.zeros(1, 3, 4, 4), torch.ones(1, 3, 4, 4)
        >>> image_keys(first) == image_keys((first * 255).to(torch.uint8)), image_keys(first) == image_keys(second)
        (True, False)
    """
    content = images_to_bytes(images).contiguous()
    digest = hashlib.blake2b(f"{content.dtype}{list(content.shape)}".encode())
    digest.update(content.numpy().data)
    whole = digest.digest()
    parts = [hashlib.blake2b(whole + bytes([place]), digest_size=8).digest() for place in range(len(images))]
    return [int.from_bytes(part, "little", signed=True) for part in parts]


class LatentWriter:
    """Collects latents and writes a shard whenever there are enough of them.

    Example:
        >>> import tempfile
        >>> folder = Path(tempfile.mkdtemp())
        >>> with LatentWriter(folder, {"resolution": 8}) as writer:
        ...     writer.add(7, torch.ones(4, 1, 1, dtype=torch.float16))
        >>> LatentReader(folder).read([7]).shape
        torch.Size([1, 4, 1, 1])

    Existing shards are kept. Several processes and runs may write to one folder, since each shard has a name of its
    own. What was added is written on leaving, even after an error, and whenever it has waited for a minute.

    Raises:
        DataError: if the folder cannot be created or takes no file.
    """

    def __init__(self, folder: Path, settings: Mapping[str, Any], *, shard_bytes: int = SHARD_BYTES) -> None:
        self.folder, self.settings, self.shard_bytes = folder, dict(settings), shard_bytes
        check_writable(folder, LATENTS)
        for leftover in folder.glob(".latents-*.tmp"):  # of a process that was killed, if it is old
            if time.time() - leftover.stat().st_mtime > LEFTOVER_SECONDS:
                leftover.unlink(missing_ok=True)
        self._clear()

    def _clear(self) -> None:
        self._keys: list[int] = []
        self._latents: list[Tensor] = []
        self._bytes, self._begun = 0, time.monotonic()

    def __enter__(self) -> LatentWriter:
        return self

    def __exit__(self, *_: object) -> None:
        if self._keys:
            self._write()

    def add(self, key: int, latents: Tensor) -> None:
        """Add the latents `[C, h, w]` of a view, on the CPU.

        Raises:
            DataError: if the shard that is full cannot be written.
        """
        size = latents.numel() * latents.element_size()
        if self._keys and (self._bytes + size > self.shard_bytes or time.monotonic() - self._begun > SHARD_SECONDS):
            self._write()
        self._keys.append(key)
        self._latents.append(latents.clone())
        self._bytes += size

    def _write(self) -> None:
        tensors = {
            "keys": torch.tensor(self._keys, dtype=torch.int64),
            "latents": torch.stack(self._latents),
            "checksums": torch.tensor([_checksum(_bits(one)) for one in self._latents], dtype=torch.int64),
        }
        Shard.write(self.folder / f"latents-{secrets.token_hex(8)}.safetensors", tensors, self.settings, LATENTS)
        self._clear()


class LatentReader:
    """Reads latents by the keys of their views.

    The list of keys stays in memory, 16 bytes each; latents are read on demand. No file stays open, so data workers may
    be forked or spawned.

    Raises:
        DataError: that names the shard, if one is damaged, or holds latents of another shape or precision than the
            first.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.shards = [Shard.open(path, LATENTS) for path in sorted(folder.glob("latents-*.safetensors"))]
        keys, shards, rows = [np.zeros(0, dtype=np.int64)], [np.zeros(0, np.int32)], [np.zeros(0, np.int32)]
        for number, shard in enumerate(self.shards):
            self._check(shard)
            found = shard.whole("keys")
            keys.append(found)
            shards.append(np.full(len(found), number, dtype=np.int32))
            rows.append(np.arange(len(found), dtype=np.int32))
        self._keys, places = np.unique(np.concatenate(keys), return_index=True)
        self._shard, self._row = np.concatenate(shards)[places], np.concatenate(rows)[places]

    def _check(self, shard: Shard) -> None:
        first = self.shards[0].tensors.get("latents")
        for name in ("keys", "latents", "checksums"):
            if name not in shard.tensors:
                raise damaged(shard.path, f"has no {name}", LATENTS)
        table = shard.tensors["latents"]
        if first is None or table.shape[1:] != first.shape[1:] or table.kind != first.kind:
            raise damaged(shard.path, f"latents of another shape than in {self.shards[0].path.name}", LATENTS)

    def __len__(self) -> int:
        return len(self._keys)

    def __contains__(self, key: int) -> bool:
        return self._place(key) is not None

    def read(self, keys: Sequence[int]) -> Tensor:
        """Return the latents `[V, C, h, w]` of views, in the precision in which they were written.

        Raises:
            DataError: if a shard is damaged.
            KeyError: for a view whose latents are not here.
        """
        found = []
        for key in keys:
            place = self._place(key)
            if place is None:
                raise KeyError(key)
            shard, row = self.shards[self._shard[place]], int(self._row[place])
            bits, checksum = shard.rows([("latents", row), ("checksums", row)])
            if _checksum(bits) != int(checksum):
                raise damaged(shard.path, f"the checksum of row {row} differs", LATENTS)
            found.append(torch.from_numpy(bits.copy()))
        latents = torch.stack(found)
        return latents.view(torch.bfloat16) if latents.dtype == torch.int16 else latents

    def _place(self, key: int) -> int | None:
        at = int(np.searchsorted(self._keys, key))
        return at if at < len(self._keys) and self._keys[at] == key else None


def _bits(latents: Tensor) -> np.ndarray:
    """The numbers of a tensor as numpy holds them; of bfloat16 the bits."""
    contiguous = latents.contiguous()
    return (contiguous.view(torch.int16) if contiguous.dtype == torch.bfloat16 else contiguous).numpy()


def _checksum(bits: np.ndarray) -> int:
    return zlib.crc32(np.ascontiguousarray(bits).view(np.uint8).data)
