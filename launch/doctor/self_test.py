"""A training run of a minute: two steps of a tiny random model on the ranks of this machine."""

import json
import math
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from launch.doctor.finding import Finding
from launch.stages import ask, torchrun
from megatron_opdlm.config import path_override
from megatron_opdlm.reporting.progress import Progress

SECONDS = 600  # generous: compiling kernels takes minutes on a cold GPU
STEPS = 2
KEYS = (
    *(
        f"train.steps={STEPS}",
        "rollout.prompts_per_step=16",
        "optimizer.batch_size=8",
        "data.epochs=9",
    ),
    *("model.dtype=auto", "teacher.dtype=auto", "logging.tensorboard=false"),
)


def self_test(ranks: int) -> Iterator[Finding]:
    """Make a model and prompts, train two steps, look at the loss. RunError where that fails."""
    from transformers.utils import logging

    from launch.quickstart import task
    from launch.quickstart.teacher import MASK_ROW, build_model, build_tokenizer, save

    logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as temporary:
        place = Path(temporary)
        save(build_model(0), build_tokenizer(), place / "model")
        task.write_data(place / "data")
        start = time.monotonic()
        argv = torchrun(
            ranks,
            "megatron_opdlm.train",
            *("--config", "configs/tiny_cpu.yaml", *KEYS),
            path_override("model.path", place / "model"),
            f"model.mask_token_id={MASK_ROW}",
            path_override("data.path", place / "data" / task.FILES["train"]),
            path_override("train.out", place / "run"),
        )
        with Progress("self-test", STEPS, show=True, unit="step") as bar:
            ask(argv, SECONDS)
            bar.advance(count=STEPS)
        seconds = time.monotonic() - start
        lines = (place / "run" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        losses = [json.loads(line)["loss"] for line in lines]
    text = f"{STEPS} training steps on {ranks} ranks in {seconds:.0f} s, losses " + ", ".join(
        f"{loss:.3f}" for loss in losses
    )
    is_sound = len(losses) == STEPS and all(math.isfinite(loss) for loss in losses)
    remedy = "" if is_sound else f"{STEPS} finite losses are expected: run tests/run.sh"
    yield Finding(name="self-test", text=text, remedy=remedy, breaks=not is_sound)
