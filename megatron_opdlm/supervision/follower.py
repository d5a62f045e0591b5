"""A program that never outlives the process that started it: ``python -m
megatron_opdlm.supervision.follower PID MODULE ARGUMENT ...`` is ``python -m MODULE ARGUMENT ...``,
gently, and is killed when process PID, its parent, ends in whatever way (Linux).
"""

import ctypes
import os
import runpy
import signal
import sys

_PR_SET_PDEATHSIG = 1
_GENTLENESS = 5  # steps of priority below the run, which goes first where processors are few


def main() -> None:
    parent, module, *arguments = sys.argv[1:]
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != int(parent):  # it had ended before
        sys.exit(1)
    os.nice(_GENTLENESS)
    sys.argv = [module, *arguments]
    runpy.run_module(module, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
