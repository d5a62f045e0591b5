"""What a run finds in its ``checkpoints/`` is its own or somebody else's; only that is touched."""

from pathlib import Path

import pytest

from megatron_opdlm.errors import InputError
from megatron_opdlm.storage.run_state import Progress, RunIdentity, write_state
from megatron_opdlm.storage.step_directories import LATEST, StepDirectories

OURS = RunIdentity(seed=1, prompts=3, prompts_sha256="a")
THEIRS = RunIdentity(seed=2, prompts=3, prompts_sha256="a")


@pytest.fixture
def places(tmp_path: Path) -> StepDirectories:
    """Checkpoints of steps 2, 4 and 6, the last of which is the newest."""
    made = StepDirectories(directory=tmp_path, identity=OURS)
    for step in (2, 4, 6):
        checkpoint(made, step, OURS)
    made.point(LATEST, 6)
    return made


def checkpoint(places: StepDirectories, step: int, identity: RunIdentity) -> Path:
    directory = places.of(step)
    (directory / "weights").mkdir(parents=True)
    write_state(directory, Progress(step=step), identity, None)
    return directory


def names(places: StepDirectories) -> list[str]:
    return sorted(path.name for path in places.directory.iterdir())


def test_where_a_run_goes_on(places: StepDirectories):
    """Claim: from what ``latest`` says; without it from the run's own newest, never from the
    beginning over what is there; from the beginning in an empty place."""
    places.point(LATEST, 4)
    assert places.start() == "step_0000004"
    (places.directory / LATEST).unlink()
    assert places.start() == "step_0000006"
    elsewhere = StepDirectories(directory=places.directory / "nothing", identity=OURS)
    assert elsewhere.start() is None


@pytest.mark.parametrize(
    "name", ["latest", "best", ".step_0000008.tmp", "step_0000008", "step_0000007", "link"]
)
def test_what_is_in_the_way_is_refused(places: StepDirectories, name: str):
    """Claim: a directory in a file's place, a file in a directory's, a directory of the user's or a
    checkpoint of another run where this one will save: named before anything is done, and left."""
    path = places.directory / name
    if name == "step_0000007":
        path = checkpoint(places, 7, THEIRS)
    elif name == ".step_0000008.tmp":
        path.write_text("notes")
    elif name == "link":
        path = places.of(8)
        path.symlink_to("nowhere")
    else:
        path.unlink(missing_ok=True)
        path.mkdir()
    before = names(places)
    with pytest.raises(InputError, match=rf"^{path} is no .*move (it )?away"):
        places.start()
    assert names(places) == before


def test_only_its_own_is_removed(places: StepDirectories):
    """Claim: leftovers of saves go, and checkpoints beyond those to keep; what only resembles them
    stays, and so does a directory that appears in a save's way."""
    kept = [checkpoint(places, 3, THEIRS), places.directory / ".step_notes", places.of(1)]
    kept.append(places.directory / "step_0000002_good")
    for path in kept[1:]:
        path.mkdir()
    for left in (".step_0000008.tmp", ".step_0000002.old"):
        (places.directory / left).mkdir()
    places.discard_leftovers()
    places.keep(1, newest=6)
    assert names(places) == sorted(["latest", "step_0000006", *(path.name for path in kept)])
    with pytest.raises(FileExistsError, match="step_0000003 is no checkpoint of this run"):
        places.make_room(3)
    places.make_room(6)
    assert not places.has(6)
    places.make_room(7)


def test_steps_beyond_seven_digits_are_in_order(places: StepDirectories):
    """Claim: names are ordered by their numbers."""
    for step in (9_999_999, 10_000_000):
        checkpoint(places, step, OURS)
    assert places.own()[-2:] == ["step_9999999", "step_10000000"]
