"""A run directory and whether this command may use it: a new one, or the one that the same
configuration made.
"""

from pathlib import Path

from megatron_opdlm.config import Config, differing_keys, load_config, may_change, to_yaml
from megatron_opdlm.data.content_hash import content_hash
from megatron_opdlm.errors import InputError
from megatron_opdlm.model_files.manifest import CONFIG
from megatron_opdlm.model_files.shape import read_json
from megatron_opdlm.model_files.writing import check_place, write_json, write_text
from megatron_opdlm.run.run_lock import LOCK

DATA = "data.json"  # {path: SHA-256} of the files that the run reads


def check_run_directory(config: Config) -> None:
    """InputError where ``train.out`` holds something else, or a run of another configuration or
    other data (naming the keys).
    """
    out = Path(config.train.out)
    check_place(out, f"train.out={out}")
    if not out.exists():
        return
    if not out.is_dir():
        raise InputError(f"train.out={out} is a file; choose another directory")
    if not (out / CONFIG).is_file():
        begun = f".{CONFIG}.tmp", LOCK  # all that a start leaves that was killed at once
        if any(item.name not in begun for item in out.iterdir()):
            raise InputError(
                f"train.out={out} already holds something that is no run of ours; "
                "choose another directory or empty it"
            )
        return
    differing = [
        key
        for key in differing_keys(load_config(out / CONFIG, []), config)
        if not may_change(key) and key != "train.out"
    ]
    if differing:
        raise InputError(
            f"train.out={out} was made by another configuration, which differs in "
            f"{', '.join(differing)}; "
            "use that configuration to resume, or another directory"
        )
    if (out / DATA).is_file():
        _check_data(config, read_json(out / DATA))


def _check_data(config: Config, recorded: dict[str, str]) -> None:
    """InputError where a file of the run has changed; one that is not there is its reader's."""
    for key, path in _data_files(config).items():
        digest = content_hash(Path(path)) if Path(path).exists() else recorded.get(path)
        if recorded.get(path) != digest:
            raise InputError(
                f"{key}={path} has changed since train.out={config.train.out} was started (sha256 "
                f"{digest}, then {recorded.get(path)}); restore the file, or use another directory"
            )


def _data_files(config: Config) -> dict[str, str]:
    """Key and path of the files that a run reads its rows from."""
    paths = {"data.path": config.data.path, "mixing.path": config.mixing.path}
    return {key: path for key, path in paths.items() if path}


def prepare_run_directory(config: Config) -> None:
    """Create the directory and record the resolved configuration, and with the first start what
    the data is (rank 0 only, after the check).
    """
    out = Path(config.train.out)
    out.mkdir(parents=True, exist_ok=True)
    write_text(out / CONFIG, to_yaml(config))
    if not (out / DATA).is_file():
        hashes = {path: content_hash(Path(path)) for path in _data_files(config).values()}
        write_json(out / DATA, hashes)
