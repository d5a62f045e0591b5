"""What identifies a model directory: its content, wherever it lies, without reading all of it."""

import hashlib
from pathlib import Path

from megatron_opdlm.model_files import manifest
from megatron_opdlm.model_files.checksums import sha256_of
from megatron_opdlm.model_files.safetensors_dir import INDEX, read_header

_SAMPLES = 1024  # tensors of a model that are looked into
_BYTES = 4096  # from the middle of each


def fingerprint(model_dir: Path) -> str:
    """SHA-256 of what a run takes from a model directory.

    Of a Megatron checkpoint, its manifest, which holds the checksum of every file. Of a Hugging
    Face directory, configuration and tokenizer, and of the weights the headers and a piece of every
    tensor (of 1,024, where there are more): training changes them all, and 16 GB are not read
    twice. Raises InputError for a broken shard, OSError for what cannot be read.
    """
    if (model_dir / manifest.NAME).is_file():
        return sha256_of(model_dir / manifest.NAME)
    digest = hashlib.sha256()
    for path in sorted([*model_dir.glob("*.json"), *model_dir.glob("*.jinja")]):
        if path.name != INDEX:
            digest.update(f"{path.name}\0{sha256_of(path)}\0".encode())
    shards = {path: read_header(path) for path in sorted(model_dir.glob("*.safetensors"))}
    stride = -(-sum(map(len, shards.values())) // _SAMPLES)
    for path, tensors in shards.items():
        with path.open("rb", buffering=0) as stream:
            for number, (name, tensor) in enumerate(sorted(tensors.items())):
                digest.update(f"{name}\0{tensor.dtype}\0{tensor.shape}\0".encode())
                if number % stride == 0:
                    stream.seek(max(tensor.start, (tensor.start + tensor.stop - _BYTES) // 2))
                    digest.update(stream.read(min(_BYTES, tensor.stop - tensor.start)))
    return digest.hexdigest()
