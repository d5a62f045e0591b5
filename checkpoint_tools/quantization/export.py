"""The quantised form of an export: calibrated on rollouts, written as ModelOpt's checkpoints are,
compared with the unquantised model on other rollouts.

Calibration runs the student as training runs it: two streams, the clean one and one with masks, in
every state that the recorded passes went through (``states.mode=all``), or masked at random where
no passes were recorded. So the scales of the inputs cover masked tokens.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from checkpoint_tools.export.formats import with_explicit_head
from checkpoint_tools.export.hf_files import DEFAULT_BLOCK_SIZE
from checkpoint_tools.quantization.rollouts import OPTION, Rollouts, read_rollouts
from megatron_opdlm.errors import InputError, RunError
from megatron_opdlm.model_files.manifest import HUGGINGFACE, BlockContract
from megatron_opdlm.model_files.shape import ModelShape, read_json
from megatron_opdlm.model_files.vocabulary import read_vocabulary
from megatron_opdlm.model_files.writing import write_json
from megatron_opdlm.records import Trajectory, Vocabulary
from megatron_opdlm.reporting.progress import Progress

if TYPE_CHECKING:
    from checkpoint_tools.quantization.fp8_weights import Scales
    from checkpoint_tools.quantization.loss import QuantizationLoss
    from megatron_opdlm.packing.student import PackedBatch

KINDS = ("fp8", "int8", "nvfp4")
RECORD, ENGINE_RECORD = "quantization.json", "hf_quant_config.json"
DEFAULT_CALIBRATION, DEFAULT_HELD_OUT = 128, 32  # rollouts
TOKENS_PER_MICROBATCH = 4096


@dataclass(frozen=True, kw_only=True)
class Quantization:
    """What was asked for, and on what."""

    rollouts: Rollouts
    vocabulary: Vocabulary
    max_kl: float | None  # nats, of the mean; None: any


def read_quantization(
    kind: str | None,
    checkpoint: Path,
    shape: ModelShape,
    contract: BlockContract,
    *,
    calibration: Path | None,
    calibration_samples: int | None,
    held_out_samples: int | None,
    max_kl: float | None,
) -> Quantization | None:
    """Check the flags of ``export_hf`` and read the rollouts; None without ``--quantize``.

    Raises InputError for what is not built, and for flags that do not go together.
    """
    given = {
        OPTION: calibration,
        "--calibration-samples": calibration_samples,
        "--held-out-samples": held_out_samples,
        "--max-kl": max_kl,
    }
    if kind is None:
        for flag, value in given.items():
            if value is not None:
                raise InputError(f"{flag} is for quantised exports; add --quantize fp8")
        return None
    _check_kind(kind, shape, contract)
    for flag in ("--calibration-samples", "--held-out-samples"):
        if given[flag] is not None and int(given[flag]) < 1:
            raise InputError(f"{flag} {given[flag]} is not positive; use 1 or more")
    if max_kl is not None and not max_kl >= 0:
        raise InputError(f"--max-kl {max_kl} is no divergence; use 0 or more nats")
    if calibration is None:
        raise InputError(
            f"--quantize {kind} needs rollouts of this model to calibrate on; give {OPTION} "
            "samples.jsonl of the training run, or the output of evaluation.sample"
        )
    from megatron_opdlm.model.quantization import require_modelopt

    require_modelopt(f"--quantize {kind}", "export without --quantize")
    files = checkpoint / HUGGINGFACE
    rollouts = read_rollouts(
        calibration,
        files,
        shape,
        calibration=calibration_samples or DEFAULT_CALIBRATION,
        held_out=held_out_samples or DEFAULT_HELD_OUT,
    )
    vocabulary = read_vocabulary(files, contract.mask_token_id)
    return Quantization(rollouts=rollouts, vocabulary=vocabulary, max_kl=max_kl)


def _check_kind(kind: str, shape: ModelShape, contract: BlockContract) -> None:
    if kind != "fp8":
        raise InputError(
            f"--quantize {kind} is not built: no engine that serves block diffusion was found to "
            "read it for these layouts; use fp8"
        )
    if shape.experts is not None:
        raise InputError(
            f"--quantize {kind}: a mixture of experts is not quantised, since rollouts need not "
            "reach every expert and one without inputs has no scale; export without --quantize"
        )
    if contract.mask_token_id is None:
        raise InputError(
            f"--quantize {kind}: the checkpoint has no mask token, so it cannot run masked states; "
            "import it again with --mask-token-id"
        )


def quantize(
    directory: Path,
    checkpoint: Path,
    contract: BlockContract,
    shape: ModelShape,
    exported: ModelShape,
    request: Quantization,
    *,
    dtype: str,
    shard_bytes: int,
    quiet: bool,
) -> str:
    """Write the quantised weights into ``directory``, whose other files are there, and what was
    measured; returns it as a line. ``exported`` is the export's shape, ``shape`` the checkpoint's.

    Raises RunError where the mean KL exceeds ``request.max_kl``.
    """
    from checkpoint_tools.quantization.fp8_weights import Fp8Weights, write_fp8
    from checkpoint_tools.quantization.loss import fp8_model, measure
    from checkpoint_tools.streaming.megatron_weights import read_weights
    from checkpoint_tools.streaming.streamed_models import streamed_megatron

    calibration, held_out = request.rollouts.calibration, request.rollouts.held_out
    batches = _batches(calibration, contract, request.vocabulary)
    with Progress("calibrate", len(batches), show=not quiet, unit="row") as bar:
        scales = _calibrate(checkpoint, shape, dtype, batches, bar)
    get = read_weights(checkpoint, shape)
    write_fp8(directory, exported, with_explicit_head(get, shape), scales, dtype, shard_bytes)
    with Fp8Weights(directory, exported) as weights:
        plain = streamed_megatron(shape, get, dtype, str(checkpoint))
        batches = _batches(held_out, contract, request.vocabulary)
        with Progress("measure the loss", len(batches), show=not quiet, unit="row") as bar:
            forbidden = request.vocabulary.forbidden_ids
            loss = measure(plain, fp8_model(weights), batches, forbidden, bar)
    if request.max_kl is not None and not loss.kl_mean <= request.max_kl:
        raise RunError(
            f"{loss}; --max-kl {request.max_kl:g} allows less, so nothing was exported: calibrate "
            "on more rollouts, allow more, or export without --quantize"
        )
    _write_records(directory, request, loss, dtype)
    return f"{loss}, of {len(held_out)} rollouts that did not calibrate"


def _batches(
    trajectories: Sequence[Trajectory], contract: BlockContract, vocabulary: Vocabulary
) -> "list[PackedBatch]":
    """Every recorded state, packed as for training."""
    from megatron_opdlm.hardware import select_hardware
    from megatron_opdlm.packing.rows import Packing
    from megatron_opdlm.packing.step import pack_step
    from megatron_opdlm.states import choose_states

    size = contract.block_size or DEFAULT_BLOCK_SIZE
    states = choose_states(
        trajectories,
        mode="all",
        block_size=size,
        vocabulary=vocabulary,
        exclude_eos=False,
        key=(0, 0),
        alignment=contract.block_alignment,
    )
    packing = Packing(
        block_size=size,
        mask_id=vocabulary.mask_id,
        logit_shift=contract.logit_shift,
        tokens_per_microbatch=TOKENS_PER_MICROBATCH,
        align=1,
        device=select_hardware().device,
        alignment=contract.block_alignment,
    )
    (batches,) = pack_step([states], packing).updates
    return batches


def _calibrate(
    checkpoint: Path,
    shape: ModelShape,
    dtype: str,
    batches: "Sequence[PackedBatch]",
    progress: Progress,
) -> "Scales":
    """Scales of the weights, rounded to the export's type, and of what the linears see. The whole
    model is in memory here.
    """
    import torch

    from checkpoint_tools.streaming.megatron_weights import DTYPES
    from megatron_opdlm import parallel
    from megatron_opdlm.checkpoint import load_model
    from megatron_opdlm.model.gpt import build_model
    from megatron_opdlm.model.quantization import calibrate_fp8, fp8_scales

    hardware = parallel.init(parallel.Layout())
    model = build_model(shape, parallel.Layout(), hardware.dtype, hardware, name=str(checkpoint))
    load_model(model, checkpoint)
    model.requires_grad_(False).eval()
    for parameter in model.parameters():
        parameter.copy_(parameter.to(DTYPES[dtype]))

    def run_all(_: torch.nn.Module) -> None:
        for batch in batches:
            model.run(batch.student_tokens, batch.student_positions, batch.student_plan)
            progress.advance()

    calibrate_fp8(
        model, run_all, whose="the student's", remedy=f"check the weights and the {OPTION} file"
    )
    return fp8_scales(model)


def _write_records(
    directory: Path, request: Quantization, loss: "QuantizationLoss", dtype: str
) -> None:
    """What engines read, what people read, and both numbers and where they come from."""
    from importlib.metadata import version

    producer = {"name": "modelopt", "version": version("nvidia-modelopt")}
    described = {"quant_algo": "FP8", "kv_cache_quant_algo": None, "exclude_modules": ["lm_head"]}
    write_json(directory / ENGINE_RECORD, {"producer": producer, "quantization": described})
    config = read_json(directory / "config.json")
    config["quantization_config"] = quantization_config(producer)
    write_json(directory / "config.json", config)
    rollouts = request.rollouts
    record = {
        "quantization": "fp8",
        "producer": producer,
        "unquantized_dtype": dtype,
        "calibration_file": rollouts.file,
        "calibration_samples": len(rollouts.calibration),
        "held_out_samples": len(rollouts.held_out),
        "states": "all states of the recorded passes, or random masks where none are recorded",
        "reference": f"the unquantised {dtype} weights, both models in float32",
        **asdict(loss),
        "max_kl": request.max_kl,
    }
    write_json(directory / RECORD, record)
    _add_to_card(directory, record)


def quantization_config(producer: dict[str, Any]) -> dict[str, Any]:
    """``quantization_config`` of config.json, as ModelOpt 0.29 and later write it for FP8."""
    number = {"dynamic": False, "num_bits": 8, "type": "float"}
    group = {"input_activations": number, "weights": number, "targets": ["Linear"]}
    return {
        "config_groups": {"group_0": group},
        "ignore": ["lm_head"],
        "quant_algo": "FP8",
        "producer": producer,
        "quant_method": "modelopt",
    }


def _add_to_card(directory: Path, record: dict[str, Any]) -> None:
    path, place = directory / "README.md", "\n## Use\n"
    text = path.read_text(encoding="utf-8")
    assert text.count(place) == 1
    section = (
        "\n## Quantisation\n\n"
        "The linears of the layers multiply FP8 (E4M3) numbers, weights and inputs with one scale "
        f"a tensor, through ModelOpt {record['producer']['version']}; embedding, norms, attention "
        f"and output layer are {record['unquantized_dtype']}. Calibrated on "
        f"{record['calibration_samples']} rollouts in their denoising states; compared with the "
        f"unquantised model on {record['held_out_samples']} other rollouts, at "
        f"{record['positions']} masked positions:\n\n"
        "| mean KL (nats) | largest KL (nats) | other most probable token |\n| --- | --- | --- |\n"
        f"| {record['kl_mean']:.4g} | {record['kl_max']:.4g} | {record['argmax_changes']:.2%} |\n\n"
        "SGLang reads this from config.json (`--quantization modelopt_fp8` says it explicitly); "
        "LMDeploy does not know ModelOpt's checkpoints.\n"
    )
    path.write_text(text.replace(place, section + place), encoding="utf-8")


def is_quantized(directory: Path) -> bool:
    """Whether the directory says that its weights are quantised."""
    return bool(read_json(directory / "config.json").get("quantization_config"))


def read_record(directory: Path) -> dict[str, Any]:
    """``quantization.json``. Raises InputError where a quantised directory is not ours."""
    if not (directory / RECORD).is_file():
        raise InputError(
            f"{directory} is quantised, but has no {RECORD} of this project's exporter; use an "
            "export of checkpoint_tools.export_hf"
        )
    record = read_json(directory / RECORD)
    if record.get("unquantized_dtype") not in ("fp32", "bf16"):
        raise InputError(
            f"{directory / RECORD}: unquantized_dtype={record.get('unquantized_dtype')!r} is "
            "neither 'fp32' nor 'bf16'; copy the file again"
        )
    return record
