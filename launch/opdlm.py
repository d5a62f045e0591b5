"""The command ``opdlm``: ``opdlm NAME ARGUMENT ...`` is ``python -m MODULE ARGUMENT ...`` of the
table below. A module is imported when its name has been typed and not before, so ``opdlm --help``
waits for no PyTorch. Ranks: ``torchrun ... --no-python opdlm NAME ...``.
"""

import importlib
import sys
from pathlib import Path

from megatron_opdlm import __version__
from megatron_opdlm.errors import OPDLM, InputError, command, nearest

# Name -> module with a ``main``, what it does.
COMMANDS = {
    "import": ("checkpoint_tools.import_hf", "Hugging Face directory -> Megatron checkpoint"),
    "export": ("checkpoint_tools.export_hf", "Megatron checkpoint -> Hugging Face directory"),
    "verify": ("checkpoint_tools.verify", "weights, logits and greedy tokens of the two compared"),
    "serve-check": ("checkpoint_tools.serve_check", "what serving engines would not take"),
    "inspect": ("checkpoint_tools.inspect", "what a model directory holds, complete or not"),
    "prepare": ("megatron_opdlm.prepare_data", "training set -> checked file of prompts"),
    "train": ("megatron_opdlm.train", "on-policy distillation"),
    "replay": ("megatron_opdlm.replay", "loss and gradient norm of recorded states"),
    "sample": ("evaluation.sample", "responses for a file of prompts, with each token's pass"),
    "chat": ("evaluation.chat", "a talk on the terminal, the answers block by block"),
    "answer": ("evaluation.answer", "a model's own answers to a training set, to train on them"),
    "download": ("evaluation.download", "data files of the benchmarks"),
    "eval": ("evaluation.run", "benchmarks: responses, grades and a summary"),
    "recipe": ("evaluation.recipe", "benchmarks as a file of configs/evaluation/ says"),
    "sweep": ("evaluation.sweep", "accuracy over decoding settings and checkpoints"),
    "score": ("evaluation.score", "grades of responses that were made anywhere"),
    "report": ("evaluation.report", "the paper's tables and figures; of a run: its page"),
    "page": ("launch.run_page.page", "runs as one HTML file: curves, responses pass by pass"),
    "plan": ("launch.planner.run", "memory, hours and layouts of a run on GPUs not here yet"),
    "doctor": ("launch.doctor.run", "whether a machine and a configuration are ready for a run"),
    "pipeline": ("launch.pipeline", "import, train, export, evaluate and report, each stage once"),
    "quickstart": ("launch.quickstart.run", "all of it on two CPU processes with a tiny model"),
}


def main() -> None:
    """Console script."""
    command(_run)


def _run() -> None:
    name, *arguments = sys.argv[1:] or [""]
    if name in ("-h", "--help"):
        print(_overview())
        return
    if name == "--version":
        print(OPDLM, __version__)
        return
    if name not in COMMANDS:
        said = f"{name!r} is no command{nearest(name, COMMANDS)}" if name else "a command is needed"
        raise InputError(f"{said}; {OPDLM} --help lists them")
    if name == "report" and _names_a_run(arguments):
        name = "page"
    module = importlib.import_module(COMMANDS[name][0])
    sys.argv = [f"{OPDLM} {name}", *arguments]
    module.main()


def _names_a_run(arguments: list[str]) -> bool:
    """Whether what is to be reported on is a training run: then its page is the report."""
    from launch.run_page.records import is_run

    paths = (argument.rpartition("=")[2] for argument in arguments if argument[:1] != "-")
    return any(is_run(Path(path)) for path in paths)


def _overview() -> str:
    lines = (f"  {name:<12} {does}" for name, (_, does) in COMMANDS.items())
    return "\n".join(
        [
            f"usage: {OPDLM} COMMAND ARGUMENT ...",
            f"       torchrun --nproc-per-node N --no-python {OPDLM} COMMAND ARGUMENT ...",
            "",
            "From an autoregressive model to a block-diffusion one, and what goes with it:",
            "",
            *lines,
            "",
            f"{OPDLM} COMMAND --help has the arguments. docs/commands.md",
        ]
    )


if __name__ == "__main__":
    main()
