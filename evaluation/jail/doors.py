"""What programs could do to a machine, and which layers (``isolation.LAYERS``) keep them from it.

``tests.sandbox_doors`` tries each under each combination of layers.
"""

from evaluation.jail.seccomp import may_write_files

# Each may be done unless all layers of one of its sets are in force.
Doors = dict[str, tuple[set[str], ...]]
_READ_ONLY = "read_only"  # no layer: what the filter does where nothing else guards files

# Programs are not run where one of these is open, unless somebody means it.
DANGERS: Doors = {
    "use the network": ({"seccomp"}, {"network_namespace"}),
    "reach sockets of the machine": ({"seccomp"}, {"network_namespace", "mount_namespace"}),
    "act on the user's processes": ({"seccomp"}, {"pid_namespace"}, {"unprivileged_user"}),
    "change the user's files": ({"seccomp"}, {"mount_namespace"}, {"unprivileged_user"}),
    "start any number of processes": ({"seccomp"}, {"unprivileged_user"}, {"user_namespace"}),
}
# Said where one is open.
NUISANCES: Doors = {
    "read the user's files": ({"mount_namespace"}, {"landlock"}),
    "start any number of threads": ({"unprivileged_user"}, {"user_namespace"}),
    "use memory beyond the limit": ({"seccomp"},),
    "fill the disk with many files": ({"mount_namespace"}, {_READ_ONLY}),
}
# Limits that hold with one of these layers only.
LIMITS_NEED = {
    "work_space": NUISANCES["fill the disk with many files"],
    "threads": NUISANCES["start any number of threads"],
}


def is_closed(closed_by: tuple[set[str], ...], layers: set[str]) -> bool:
    """Whether one of the sets is in force."""
    if "seccomp" in layers and not may_write_files(layers):
        layers = layers | {_READ_ONLY}
    return any(needed <= layers for needed in closed_by)


def open_doors(doors: Doors, layers: set[str]) -> list[str]:
    return [door for door, closed_by in doors.items() if not is_closed(closed_by, layers)]
