"""``manifest.json`` of a Megatron checkpoint directory: what it holds, and every file with its
size and SHA-256.

It is written last, so a directory without it, or with a file of another size, is a save that was
cut short; a file with another checksum was damaged later. The manifest carries a checksum of
itself, ``seal``.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from megatron_opdlm.errors import InputError
from megatron_opdlm.model_files.checksums import sha256_of
from megatron_opdlm.model_files.shape import read_json

FORMAT = "megatron-opdlm/1"
NAME = "manifest.json"
KINDS = ("model", "training")
# Parts of a checkpoint directory.
WEIGHTS, HUGGINGFACE, CONFIG = "weights", "huggingface", "config.yaml"


@dataclass(frozen=True, kw_only=True)
class BlockContract:
    """What a decoder must know of how a model was trained. ``block_size`` None: it never was."""

    mask_token_id: int | None  # None: not known yet (an imported model whose tokenizer has none)
    block_size: int | None = None  # tokens
    block_alignment: str = "absolute"  # blocks are counted from position 0
    logit_shift: bool = False  # the token at position i is read from logits i - 1
    clean_context: str = "block_causal"  # clean tokens see their block and all earlier ones


@dataclass(frozen=True, kw_only=True)
class LowRank:
    """The low-rank terms (alpha / rank) B A that a checkpoint holds beside its weights."""

    rank: int
    alpha: float
    targets: tuple[str, ...]  # of Megatron's linears

    @property
    def scale(self) -> float:
        """Factor of B A."""
        return self.alpha / self.rank


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """The content of ``manifest.json``."""

    kind: str  # "model" (imported) | "training"
    dtype: str  # of the weights: "fp32" | "bf16"
    block_contract: BlockContract
    step: int | None = None  # training steps done
    low_rank: LowRank | None = None  # None: the weights are all there is
    files: dict[str, int]  # relative name -> bytes
    sha256: dict[str, str] = field(default_factory=dict)  # empty: made before there were any


def is_checkpoint(directory: Path | str) -> bool:
    """True for a directory that looks like a Megatron checkpoint of ours, complete or not."""
    directory = Path(directory)
    return (directory / NAME).is_file() or (directory / WEIGHTS).is_dir()


def huggingface_dir(model_dir: Path) -> Path:
    """Where a model directory keeps its Hugging Face files: itself or ``huggingface/``."""
    return model_dir / HUGGINGFACE if is_checkpoint(model_dir) else model_dir


def write_manifest(
    directory: Path,
    *,
    kind: str,
    dtype: str,
    block_contract: BlockContract,
    step: int | None = None,
    low_rank: LowRank | None = None,
    sha256: Mapping[str, str] | None = None,
) -> None:
    """Describe a directory whose other files are all written. ``sha256``: checksums by relative
    name that are known already; the other files are read for theirs.
    """
    known = sha256 or {}
    paths = {
        path.relative_to(directory).as_posix(): path
        for path in sorted(directory.rglob("*"))
        if path.is_file() and path != directory / NAME
    }
    manifest = Manifest(
        kind=kind,
        dtype=dtype,
        block_contract=block_contract,
        step=step,
        low_rank=low_rank,
        files={name: path.stat().st_size for name, path in paths.items()},
        sha256={name: known.get(name) or sha256_of(path) for name, path in paths.items()},
    )
    content = {"format": FORMAT, **asdict(manifest)}
    text = json.dumps(content | {"seal": _seal(content)}, indent=2)
    (directory / NAME).write_text(text + "\n")


def _seal(content: Mapping[str, Any]) -> str:
    """SHA-256 of a manifest's content, whatever its layout in the file."""
    rest = {key: value for key, value in content.items() if key != "seal"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def read_manifest(directory: Path | str) -> Manifest:
    """Read a manifest and check the sizes of all files (not their checksums: ``check_contents``);
    InputError when the save was cut short.
    """
    directory = Path(directory)
    if not directory.is_dir():
        raise InputError(f"{directory} is not a directory; give a Megatron checkpoint directory")
    if not (directory / NAME).is_file():
        if is_checkpoint(directory):
            raise InputError(
                f"{directory} has no {NAME}: its save was cut short; use an earlier checkpoint"
            )
        raise InputError(
            f"{directory} is no Megatron checkpoint (no {NAME}); make one with import_hf"
        )
    content = read_json(directory / NAME)
    if content.get("format") != FORMAT:
        raise InputError(
            f"{directory / NAME}: format={content.get('format')!r}, but this version reads "
            f"{FORMAT!r}; import the model again"
        )
    if ("seal" in content or "sha256" in content) and content.get("seal") != _seal(content):
        raise InputError(
            f"{directory / NAME} is damaged (its checksum is another); use an earlier checkpoint "
            "or copy it again"
        )
    manifest = _parse(content, directory / NAME)
    for name, size in manifest.files.items():
        path = directory / name
        found = path.stat().st_size if path.is_file() else None
        if found != size:
            state = "is missing" if found is None else f"has {found} bytes instead of {size}"
            raise InputError(
                f"{directory}: {name} {state}: its save was cut short; use an earlier checkpoint "
                "or copy it again"
            )
    return manifest


def check_contents(
    directory: Path | str, manifest: Manifest, names: Iterable[str] | None = None
) -> None:
    """Read files (all that have a checksum, or those named) and compare; InputError names the
    first that differs.
    """
    for name in manifest.sha256 if names is None else names:
        if sha256_of(Path(directory) / name) != manifest.sha256[name]:
            raise InputError(
                f"{directory}: {name} is damaged (its checksum is another); use an earlier "
                "checkpoint or copy it again"
            )


def _parse(content: dict[str, Any], path: Path) -> Manifest:
    try:
        manifest = Manifest(
            kind=content["kind"],
            dtype=content["dtype"],
            block_contract=BlockContract(**content["block_contract"]),
            step=content["step"],
            low_rank=_parse_low_rank(content.get("low_rank")),
            files=dict(content["files"]),
            sha256=dict(content.get("sha256", {})),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"{path} is damaged ({error}); use an earlier checkpoint") from None
    if manifest.kind not in KINDS or manifest.dtype not in ("fp32", "bf16"):
        raise InputError(
            f"{path} is damaged (kind={manifest.kind!r}, dtype={manifest.dtype!r}); use an earlier "
            "checkpoint"
        )
    return manifest


def _parse_low_rank(content: dict[str, Any] | None) -> LowRank | None:
    if content is None:
        return None
    rank, alpha, targets = int(content["rank"]), float(content["alpha"]), content["targets"]
    if rank < 1 or not targets:
        raise ValueError(f"low_rank={content!r}")
    return LowRank(rank=rank, alpha=alpha, targets=tuple(targets))
