"""A run directory and whether this command may use it: a new one, or the one that the same
configuration made.
"""

from pathlib import Path

from megatron_opdlm.config import Config, differing_keys, load_config, may_change, to_yaml
from megatron_opdlm.data.content_hash import content_hash
from megatron_opdlm.errors import InputError
from megatron_opdlm.model_files.fingerprint import fingerprint
from megatron_opdlm.model_files.manifest import CONFIG
from megatron_opdlm.model_files.writing import check_outside, check_place, write_json, write_text
from megatron_opdlm.run.provenance import read_starts
from megatron_opdlm.run.record_files import read_record
from megatron_opdlm.run.run_lock import LOCK

INPUTS = "inputs.json"  # {key: SHA-256} of what the run reads; of models, ``fingerprint``


def check_run_directory(config: Config) -> None:
    """InputError where ``train.out`` holds something else, or a run of another configuration or
    other data, prompts or models (naming the keys).
    """
    out = Path(config.train.out)
    read = (("model.path", config.model.path), ("teacher.path", config.teacher.path))
    check_outside(out, "train.out", {key: Path(path) for key, path in read if path})
    check_place(out, f"train.out={out}")
    if not (out / CONFIG).is_file():
        _check_end(config)
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
    stored = _stored_config(out)
    differing = [key for key in differing_keys(stored, config) if not may_change(key)]
    if differing:
        raise InputError(
            f"train.out={out} was made by another configuration, which differs in "
            f"{', '.join(differing)}; "
            "use that configuration to resume, or another directory"
        )
    _check_plan(stored, config)
    if (out / INPUTS).is_file():
        remedy = "remove it (the next start records its inputs as they are then)"
        _check_inputs(config, read_record(out / INPUTS, dict, remedy))
    read_starts(out)


def _stored_config(out: Path) -> Config:
    """What the run was made with. InputError, with the way out, where the file is damaged."""
    file = out / CONFIG
    try:
        if not file.read_bytes().strip(b"\0 \n"):
            raise InputError("it is empty")
        return load_config(file, [])
    except (InputError, ValueError) as error:
        raise InputError(
            f"{file} is damaged ({error}); copy {CONFIG} of the newest checkpoint over it, or use "
            "another train.out"
        ) from None


def _check_end(config: Config) -> None:
    """InputError for a new run that is to end after its plan: a recipe's train.stop_after beside a
    train.steps that was made small for a trial.
    """
    steps, end = config.train.steps, config.train.stop_after
    if end is not None and 0 < steps < end:
        raise InputError(
            f"train.stop_after={end} is after the plan's last step, train.steps={steps}; for a "
            f"trial of the plan leave train.steps alone and use train.stop_after={steps}; a run "
            "goes on after its plan only once it is there"
        )


def _check_plan(stored: Config, config: Config) -> None:
    """InputError where the plan is another now, its schedules with it, and nobody said where the
    run ends, which is what somebody may have meant.
    """
    before, now = _planned(stored), _planned(config)
    end = config.train.stop_after
    if before == now or end not in (None, stored.train.stop_after) or not _has_schedules(config):
        return
    raise InputError(
        f"train.out={config.train.out} was planned over {before}, this command plans {now}, and "
        "optimizer.lr and threshold_schedule run over the plan. To keep their values (the learning "
        f"rate stays at optimizer.min_lr from its end) plan {before} again and add "
        f"train.stop_after={_number(now)}; to stretch them from here on add it to this command; or "
        "use another directory"
    )


def _planned(config: Config) -> str:
    """What the schedules run over, for comparison and for people."""
    steps = config.train.steps
    return f"train.steps={steps}" if steps > 0 else f"data.epochs={config.data.epochs}"


def _number(planned: str) -> str:
    """The steps of a plan, where they are known before the prompts are read."""
    key, _, number = planned.partition("=")
    return number if key == "train.steps" else f"<{planned} in steps>"


def _has_schedules(config: Config) -> bool:
    """Whether anything runs over the plan as a whole."""
    threshold = config.threshold_schedule
    falls = config.optimizer.lr != config.optimizer.min_lr
    return falls or (threshold.enabled and threshold.steps < 0)


def _check_inputs(config: Config, recorded: dict[str, str]) -> None:
    """InputError where an input of the run has changed; one that is not there is its reader's."""
    for key, path in _inputs(config).items():
        digest = _digest(key, path) if path.exists() else recorded.get(key)
        if key in recorded and recorded[key] != digest:
            raise InputError(
                f"{key}={path} has changed since train.out={config.train.out} was started (sha256 "
                f"{digest}, then {recorded[key]}); restore it, or use another directory"
            )


def _inputs(config: Config) -> dict[str, Path]:
    """Key and path of what a run reads."""
    paths = {
        "model.path": config.model.path,
        "teacher.path": config.teacher.path,
        "data.path": config.data.path,
        "mixing.path": config.mixing.path,
    }
    return {key: Path(path) for key, path in paths.items() if path}


def _digest(key: str, path: Path) -> str:
    return fingerprint(path) if key in ("model.path", "teacher.path") else content_hash(path)


def prepare_run_directory(config: Config) -> None:
    """Create the directory and record the resolved configuration, and with the first start what
    the inputs are (rank 0 only, after the check).
    """
    out = Path(config.train.out)
    out.mkdir(parents=True, exist_ok=True)
    write_text(out / CONFIG, to_yaml(config))
    if not (out / INPUTS).is_file():
        digests = {key: _digest(key, path) for key, path in _inputs(config).items()}
        write_json(out / INPUTS, digests)
