"""How a run ends that cannot go on: what failed, in which phase of which step, and what to do, on
every rank within ``distributed.timeout_seconds``.
"""

import errno
import re
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from megatron_opdlm.errors import InputError, RunError, Stopped
from megatron_opdlm.model_files.writing import is_refused_write
from megatron_opdlm.supervision import activity, preemption, watchdog

_MODEL = (
    "model.tensor_parallel, model.pipeline_parallel or more replicas (the optimizer is split over "
    "them), teacher.quantization=fp8, lora.rank"
)
# Phase -> what to turn down (or on), in the order to try.
_TURN_DOWN = {
    activity.SET_UP: _MODEL,
    "rollout": (
        "lower rollout.kv_cache_tokens, rollout.slots or rollout.prefill_tokens; set "
        "optimizer.cpu_offload=true or teacher.offload_weights=true; split with "
        "model.tensor_parallel"
    ),
    "states": "lower rollout.prompts_per_step or rollout.max_new_tokens",
    "teacher": (
        "lower update.tokens_per_microbatch; set teacher.offload_targets=true or "
        "optimizer.cpu_offload=true; use states.mode=one_per_block; split with "
        "model.tensor_parallel"
    ),
    "update": (
        "lower update.tokens_per_microbatch or loss.chunk_rows; set model.recompute=true, "
        "teacher.offload_targets=true or teacher.offload_weights=true; split with "
        "model.tensor_parallel or model.context_parallel"
    ),
    "save": (
        "set checkpoint.async_save=false, which needs no copy in host memory, or use more machines"
    ),
}
_TURN_DOWN["evaluation"] = _TURN_DOWN["rollout"]  # through the same engine
_SIZE = re.compile(r"[Tt]ried to allocate ([\d.]+ ?\w+)")
# How the libraries say that there is no memory, where they have no exception of their own.
_NO_MEMORY = ("can't allocate memory", "Cannot allocate memory", "out of memory", "bad_alloc")


@contextmanager
def failures_named() -> Iterator[None]:
    """A run: requests to stop are heard during it, and any failure gets its name and reaches all
    ranks, as a request does that ends one of them before the first step.

    Raises RunError for what can be named: another rank's failure, a collective that failed, memory
    that ran out. Bad input passes as it is; every rank finds it.
    """
    activity.enter(activity.SET_UP)
    try:
        with preemption.listening():
            yield
    except InputError:
        raise
    except Stopped:
        if preemption.in_set_up():
            watchdog.leave()
        raise
    except Exception as error:
        named = name(error)
        if isinstance(named, Stopped):
            watchdog.leave()
        else:
            watchdog.fail(str(named))
        if named is error:
            raise
        raise named from error
    finally:
        watchdog.stop()


def name(error: Exception) -> Exception | Stopped:
    """What to report in place of ``error``, or itself."""
    doing = activity.current()
    if preemption.in_set_up() and preemption.requested():  # the others have left, or not come
        return preemption.stop_in_set_up()
    if is_out_of_memory(error):
        return RunError(out_of_memory(error, doing))
    if is_refused_write(error):
        return RunError(
            f"{error}, in {doing}; make room or mend the file system: the same command continues "
            "from the newest checkpoint"
        )
    if isinstance(error, (RunError, OSError)) and not isinstance(error, ConnectionError):
        return error
    elsewhere = watchdog.verdict(wait=True)  # a death makes the collectives of the others fail
    if elsewhere.text:
        return Stopped(elsewhere.text) if elsewhere.is_stop else RunError(elsewhere.text)
    if _is_collective(error):
        return RunError(
            f"a collective failed in {doing}, and no rank is known to have died: "
            f"{_first_line(error)}; look at the other ranks' output, and whether all run the same "
            "version and configuration. The same command continues from the newest checkpoint"
        )
    return error


def is_out_of_memory(error: Exception) -> bool:
    """Whether memory of the device or of the host ran out."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    return isinstance(error, RuntimeError) and any(text in str(error) for text in _NO_MEMORY)


def out_of_memory(error: Exception, doing: activity.Activity) -> str:
    """One line: where, how much was asked for, and the keys to turn down."""
    size = _SIZE.search(str(error))
    asked = f" ({size.group(1)} were asked for)" if size else ""
    remedy = _TURN_DOWN.get(doing.phase, _MODEL)
    return f"out of memory in {doing}{asked}; {remedy}"


def _is_collective(error: Exception) -> bool:
    if isinstance(error, (ConnectionError, torch.distributed.DistError)):
        return True
    text = str(error)
    return "gloo" in text.lower() or "Connection closed by peer" in text or "Timed out" in text


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0][:300]
