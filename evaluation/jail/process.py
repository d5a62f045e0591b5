"""The trusted process inside a jail: isolates itself, then serves the grader (``driver.py``).

Started by ``evaluation.jail.prepared`` as ``python -I -S -B jail/process.py DESCRIPTOR`` with an
empty environment; forks itself for each jail. A fork holds the only descriptor that leads back to
the grader; programs are its children, which do not have it. Standard library only.
"""

import contextlib
import gc
import os
import socket
import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from evaluation.jail import channel, isolation, prepared
from evaluation.jail.child import ProgramEnded
from evaluation.jail.driver import FRAME_LIMIT, Driver


def main() -> int:
    gc.freeze()  # what is imported lives on: a fork need not copy its pages
    descriptors = prepared.serve(socket.socket(fileno=int(sys.argv[1])))
    if descriptors is None:
        return 0
    control, errors = descriptors
    os.dup2(errors, 2)
    os.close(errors)
    # Ended without the interpreter's tidying up, which takes longer than making the process did;
    # a program's process leaves by ProgramEnded, and so as any interpreter does.
    os._exit(be_jail(control))


def be_jail(control: int) -> int:
    """The life of one jail."""
    settings = channel.receive(control, limit=FRAME_LIMIT)
    with contextlib.suppress(OSError):  # the first to go when the machine's memory runs out
        Path("/proc/self/oom_score_adj").write_text("1000")
    try:
        layers = isolation.isolate(settings)
    except OSError as error:
        channel.send(control, {"no_root": str(error)})
        return 1
    driver_pid = os.fork()
    if driver_pid:
        os.close(control)
        os.waitpid(driver_pid, 0)
        return 0
    try:
        isolation.drop_privileges(settings["uid"])
        isolation.shield()
        os.chdir(settings["work"])
    except OSError as error:
        channel.send(control, {"failed": str(error)})
        return 1
    channel.send(control, {"layers": sorted(layers)})
    Driver(control, settings, layers).loop()
    return 0


if __name__ == "__main__":
    try:
        status = main()
    except ProgramEnded as ended:
        status = ended.status
    sys.exit(status)
