"""What a command of the pipeline asks for: its flags, checked, and what follows from them."""

import argparse
import shlex
import subprocess
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from evaluation.reporting.results import SUMMARY
from launch.pipeline_parts import Answering, Part, Recipe, Training, parts_of, trainings
from launch.stages import ROOT
from megatron_opdlm.config import Config, path_override
from megatron_opdlm.errors import InputError
from megatron_opdlm.model_files.families import FORMATS, QWEN3
from megatron_opdlm.model_files.formats import check_format
from megatron_opdlm.model_files.manifest import HUGGINGFACE, BlockContract
from megatron_opdlm.model_files.shape import ModelShape, check_layout, read_shape
from megatron_opdlm.model_files.writing import check_outside, check_place
from megatron_opdlm.planning.layout import model_layout
from megatron_opdlm.planning.public_shapes import public_name, public_shape


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The command line, checked. Paths are absolute."""

    recipe: Recipe
    hf: Path
    data: Path
    out: Path
    evaluation: Path | None  # recipe; None: each training's own, or that of the recipe's name
    format: str  # of the export
    tp: int  # of the evaluation
    ep: int
    limit: int | None
    mask_token_id: int | None
    launcher: list[str]  # starts a module on all ranks
    world: int | None  # ranks that it starts; None: only the launcher knows

    @property
    def imported(self) -> Path:
        return self.out / "imported"

    @cached_property
    def parts(self) -> list[Part]:
        """What is made of the recipe between import and tables."""
        return parts_of(self.recipe, self.out, self.evaluation)

    @property
    def trainings(self) -> list[Training]:
        return trainings(self.parts)

    @property
    def last(self) -> Training:
        """The training that makes the student."""
        return self.trainings[-1]

    @property
    def identity(self) -> dict[str, Any]:
        """What decides the results, besides the training, whose directory has a rule of its own."""
        own: dict[str, Any] = {}
        for part in self.parts:
            if isinstance(part, Answering):
                prompts = part.config.data.path
                own[part.titled("answers")] = {"prompts": prompts, "flags": part.flags}
            else:
                runs = [{**asdict(run), "tasks": list(run.tasks)} for run in part.runs]
                own[part.titled("evaluation")] = runs
        return {
            "hf": str(self.hf),
            "mask_token_id": self.mask_token_id,
            "format": self.format,
            "data": str(self.data),
            "limit": self.limit,
            **own,
        }


def read_settings(args: argparse.Namespace, environ: Mapping[str, str]) -> Settings:
    """Check everything that the flags, the recipe and the model's config.json can tell: numbers,
    layouts, the format. InputError before anything runs.
    """
    for name, least in (("ranks", 1), ("tp", 1), ("ep", 1), ("limit", 1), ("mask_token_id", 0)):
        value = getattr(args, name)
        if value is not None and value < least:
            flag = "--" + name.replace("_", "-")
            raise InputError(f"{flag} {value}: a whole number; use {least} or more")
    recipe = Recipe(
        file=args.recipe.resolve(), overrides=tuple(keys_of(args.data.resolve(), args.overrides))
    )
    parts = parts_of(recipe, args.out.resolve(), args.evaluation)
    check_outside(args.out, "--out", {"--hf": args.hf, "--data": args.data})
    check_place(args.out, f"--out {args.out}")
    if args.out.is_file():
        raise InputError(f"--out {args.out}: is a file; give a directory")
    needed = {"hf": args.out / "imported", "data": trainings(parts)[-1].results / SUMMARY}
    for flag, made_of_it in needed.items():
        path = getattr(args, flag)
        if not (args.dry_run or made_of_it.exists() or path.is_dir()):
            raise InputError(f"--{flag} {path}: no such directory; check the path")
    shape = _shape(args)
    made = trainings(parts)[-1]
    config = recipe.config(made.stage)
    tp, ep = _evaluation_layout(args, config, shape)
    settings = Settings(
        recipe=recipe,
        hf=args.hf.resolve(),
        data=args.data.resolve(),
        out=args.out.resolve(),
        evaluation=args.evaluation,
        format=_format(args.format, config, shape),
        tp=tp,
        ep=ep,
        limit=args.limit,
        mask_token_id=args.mask_token_id,
        launcher=_launcher(args.ranks, environ),
        world=_world(args.ranks, environ, none_without_gpus=args.dry_run),
    )
    _check_ranks(settings)
    return settings


def keys_of(data: Path, overrides: list[str]) -> list[str]:
    """Keys of the recipe that the command line decides: --data is that of evaluations while
    training, too, unless key=value names another.
    """
    named = any(pair.startswith("evaluation.data=") for pair in overrides)
    return [*([] if named else [path_override("evaluation.data", data)]), *overrides]


def _shape(args: argparse.Namespace) -> ModelShape | None:
    """Of --hf or what was imported from it; where a dry run has neither, of the published model of
    that name.
    """
    imported = args.out / "imported" / HUGGINGFACE
    model = imported if imported.is_dir() else args.hf
    if model.is_dir():
        shape = read_shape(model)
        if args.mask_token_id is not None and args.mask_token_id >= shape.vocab_size:
            raise InputError(
                f"--mask-token-id {args.mask_token_id}: the model has {shape.vocab_size} ids; use "
                "one below that"
            )
        return shape
    name = public_name(str(args.hf))
    return public_shape(name) if name else None


def _format(given: str | None, recipe: Config, shape: ModelShape | None) -> str:
    """--format, or the one that can say what the recipe makes; InputError where it cannot."""
    contract = BlockContract(
        mask_token_id=0,  # training has one, or says so itself
        block_alignment=recipe.states.block_alignment,
        logit_shift=recipe.loss.logit_shift,
    )
    if given is None:
        family = shape.family if shape is not None else QWEN3
        plain = contract.logit_shift or contract.block_alignment != "absolute"
        given = (family.plain if plain else family.block_diffusion).format
    if shape is not None:
        check_format(given, contract, shape)
    return given


def _evaluation_layout(
    args: argparse.Namespace, recipe: Config, shape: ModelShape | None
) -> tuple[int, int]:
    """Tensor- and expert-parallel ranks; experts are shared out as in training unless said."""
    tp, ep = args.tp or 1, args.ep
    if ep is None:
        ep = recipe.model.expert_parallel if tp == 1 else 1
    if shape is not None:
        check_layout(shape, tp, 1, f"--tp and --ep for --hf {args.hf}", 1, ep)
    return tp, ep


def _launcher(ranks: int | None, environ: Mapping[str, str]) -> list[str]:
    one_node = str(ROOT / "launch" / "one_node.sh")
    try:
        launcher = shlex.split(environ.get("OPDLM_LAUNCHER", one_node))
    except ValueError as error:
        raise InputError(
            f"OPDLM_LAUNCHER={environ['OPDLM_LAUNCHER']}: {error}; quote it as a shell would"
        ) from error
    return launcher + (["--ranks", str(ranks)] if ranks is not None else [])


def _world(ranks: int | None, environ: Mapping[str, str], *, none_without_gpus: bool) -> int | None:
    """Ranks of all machines, as the launchers count them; None where they cannot be foreseen."""
    own = "OPDLM_LAUNCHER" in environ
    nodes = environ.get("OPDLM_NODES", "") if own else "1"
    here = ranks or environ.get("OPDLM_RANKS") or count_gpus()
    if not here and not own and not none_without_gpus:
        here = 1
    if not here or not nodes.isdecimal() or not str(here).isdecimal():
        return None
    return int(nodes) * int(here)


def count_gpus() -> int:
    """Of this machine, as launch/one_node.sh counts them."""
    try:
        done = subprocess.run(["nvidia-smi", "--list-gpus"], capture_output=True, text=True)
    except OSError:
        return 0
    return len(done.stdout.splitlines())


def _check_ranks(settings: Settings) -> None:
    """Training's and evaluation's layouts divide the ranks that will be started."""
    if settings.world is None:
        return
    for training in settings.trainings:
        model_layout(training.config).data_parallel(settings.world)
    if settings.world % (settings.tp * settings.ep):
        raise InputError(
            f"--tp {settings.tp} --ep {settings.ep}: of the evaluation, do not divide the "
            f"{settings.world} ranks; choose others, or another --ranks"
        )


def add_flags(parser: argparse.ArgumentParser) -> None:
    """The command line."""
    add = parser.add_argument
    add("recipe", type=Path, metavar="RECIPE", help="training recipe, e.g. configs/opdlm_8b.yaml")
    add("--hf", type=Path, required=True, metavar="DIR", help="Hugging Face model directory")
    add("--data", type=Path, required=True, metavar="DIR", help="data files of the benchmarks")
    add("--out", type=Path, required=True, metavar="DIR", help="new, or one to go on with")
    add("--evaluation", type=Path, metavar="FILE", help="default: configs/evaluation/RECIPE's name")
    add(
        "--format",
        choices=sorted(FORMATS),
        help="of the export (default: the family's a2d-...; sdar with experts; the family's own "
        "name for loss.logit_shift or states.block_alignment=response, which readers of the others "
        "do not know)",
    )
    add("--ranks", type=int, help="of training and evaluation (default: the GPUs here, else 1)")
    add("--tp", type=int, help="tensor-parallel ranks of the evaluation (default: 1)")
    add(
        "--ep",
        type=int,
        help="expert-parallel ranks of the evaluation (default: model.expert_parallel, or 1 with "
        "--tp above 1)",
    )
    add("--limit", type=int, help="first problems of each benchmark only")
    add("--mask-token-id", type=int, help="where the tokenizer has no mask and 151669 no room")
    add("--dry-run", action="store_true", help="check and show everything, write nothing")
    add(
        "overrides",
        nargs="*",
        metavar="key=value",
        help="keys of RECIPE; stages.NAME.key=value: of one of its stages",
    )
