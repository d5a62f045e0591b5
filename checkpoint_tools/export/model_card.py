"""``README.md`` of an export: where the model comes from, what was measured, how it is served.

It states figures only where a file gives them: the counts and settings of a training checkpoint,
and the rows of ``summary.json`` files of the evaluation.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from checkpoint_tools.export.engine_settings import LMDEPLOY, SGLANG, EngineSettings
from checkpoint_tools.export.training_record import TrainingRecord
from megatron_opdlm.errors import InputError
from megatron_opdlm.model_files.families import HFLayout
from megatron_opdlm.model_files.manifest import BlockContract
from megatron_opdlm.model_files.shape import ModelShape

# Settings of a run that decide what it learns, in the order of the table.
RECIPE = (
    ("rollout.block_size", "block size (tokens)"),
    ("rollout.denoising_steps", "denoising steps per block"),
    ("rollout.remasking", "remasking in rollouts"),
    ("rollout.temperature", "rollout temperature"),
    ("curriculum.kind", "length curriculum"),
    ("curriculum.start", "first response limit (tokens)"),
    ("curriculum.end", "last response limit (tokens)"),
    ("curriculum.steps", "curriculum steps"),
    ("rollout.prompts_per_step", "prompts per step"),
    ("loss.kind", "loss"),
    ("loss.top_k", "teacher entries in the loss (0: all)"),
    ("states.mode", "states"),
    ("optimizer.lr", "learning rate"),
    ("optimizer.min_lr", "last learning rate"),
    ("optimizer.batch_size", "sequences per update"),
    ("lora.rank", "rank of low-rank terms (0: all weights trained)"),
    ("train.seed", "seed"),
)
COUNTS = (
    ("step", "training steps"),
    ("cumulative_trained_tokens", "trained response tokens"),
    ("cumulative_rollout_tokens", "rollout tokens"),
)
_METHOD = (
    "It decodes by block diffusion: a response is made block by block, and inside a block all "
    "masked tokens are predicted at once and committed by confidence. It was made from an "
    "autoregressive model by on-policy distillation: the model's own rollouts are scored by the "
    "autoregressive teacher ([arXiv 2606.06712](https://arxiv.org/abs/2606.06712))."
)
_CITATION = """    @misc{su2026opdlm,
      title  = {Data-Efficient Autoregressive-to-Diffusion Language Models via On-Policy Distillation},
      author = {Su, Xingyu and Helwig, Jacob and Parashar, Shubham and Chagi, Atharv and Jotsna, Lakshmi
                and Caverlee, James and Kalathil, Dileep and Ji, Shuiwang},
      year   = {2026}, eprint = {2606.06712}, archivePrefix = {arXiv}
    }"""  # noqa: E501 -- as the README has it
_ROUNDED = (
    "Without `dtype` transformers 5 computes in bfloat16, as the weights are stored, and takes "
    "another token here and there where two are nearly as probable. On a CPU, `evaluation.sample` "
    "of Megatron-OPDLM computes in float32: `dtype=torch.float32` gives the same greedy tokens."
)
_EVALUATED = ("task", "n", "accuracy", "stderr", "tokens_per_denoising_step", "tokens_per_forward")


def read_evaluation(paths: Sequence[Path]) -> tuple[dict[str, Any], ...]:
    """Rows of ``summary.json`` files. Raises InputError for a file of another kind."""
    rows: list[dict[str, Any]] = []
    for path in paths:
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise InputError(
                f"--evaluation {path} cannot be read ({type(error).__name__}); give the "
                "summary.json of evaluation.run"
            ) from None
        if not isinstance(content, list) or not all(
            isinstance(row, dict) and all(key in row for key in _EVALUATED) for row in content
        ):
            raise InputError(
                f"--evaluation {path} is no list of rows with {', '.join(_EVALUATED)}; give the "
                "summary.json of evaluation.run"
            )
        rows += content
    return tuple(rows)


def model_card(
    shape: ModelShape,
    contract: BlockContract,
    record: TrainingRecord,
    settings: EngineSettings,
    *,
    layout: HFLayout,
    dtype: str,
    base_model: str = "",
    evaluation: Sequence[Mapping[str, Any]] = (),
    quantized: bool = False,
) -> str:
    """The card as Markdown with its front matter. ``dtype``: "fp32" | "bf16", also of what is not
    quantised.
    """
    base = base_model or record.name_of("model.path")
    head = ["---", "library_name: transformers", "pipeline_tag: text-generation"]
    if base_model:  # a name that its author vouches for; a directory's name is no hub id
        head.append(f"base_model: {json.dumps(base_model)}")
    parts = [
        "\n".join([*head, "tags:", "- diffusion-language-model", "- block-diffusion", "---"]),
        f"# Block-diffusion {shape.family.name}{f', from {base}' if base else ''}",
        "\n\n".join(_description(shape, contract, record, layout, dtype)),
        "## Training",
        _training(record),
        "## Evaluation",
        _evaluation(evaluation),
        "## Use",
        _usage(settings, layout, rounded=dtype == "bf16" and not quantized),
        "## Citation",
        _CITATION,
    ]
    return "\n\n".join(parts) + "\n"


def _description(
    shape: ModelShape,
    contract: BlockContract,
    record: TrainingRecord,
    layout: HFLayout,
    dtype: str,
) -> Iterator[str]:
    experts = ""
    if shape.experts is not None:
        experts = f", {shape.experts.count} experts of which {shape.experts.per_token} work a token"
    head = "tied" if shape.tied else "untied"
    yield (
        f"{shape.parameters:,} parameters ({shape.layers} layers, hidden size {shape.hidden}"
        f"{experts}, {head} output layer), {dtype}, layout `{layout.architecture}`."
    )
    if record.counts:
        yield _METHOD
    else:
        yield (
            "The weights are those of the model that was imported; this project has not trained "
            "them."
        )
    trained = contract.block_size or "not recorded"
    yield (
        f"Block contract: trained block size {trained}; blocks counted from "
        f"{'position 0' if contract.block_alignment == 'absolute' else 'the response'}; the token "
        f"at a position is read from the logits "
        f"{'before it' if contract.logit_shift else 'at it'}; clean tokens see their whole block "
        f"and all earlier ones; mask token id {contract.mask_token_id}."
    )


def _training(record: TrainingRecord) -> str:
    if not record.counts:
        return "None by this project."
    rows = [(what, _value(record.counts[key])) for key, what in COUNTS if key in record.counts]
    teacher = record.name_of("teacher.path") or record.name_of("model.path")
    if teacher:
        rows.append(("teacher", teacher))
    rows += [(what, _value(record.settings[key])) for key, what in RECIPE if key in record.settings]
    if record.thresholds:
        rows.append(("confidence threshold", " to ".join(f"{t:g}" for t in record.thresholds)))
    return _table(("", ""), rows)


def _evaluation(rows: Sequence[Mapping[str, Any]]) -> str:
    if not rows:
        return "None was given to the exporter (`export_hf --evaluation SUMMARY.json`)."
    header = ("task", "decoding", "problems", "accuracy", "standard error", "tokens per pass")
    ordered = sorted(rows, key=lambda row: (row["task"], row["tokens_per_forward"] or 0.0))
    return _table(
        (*header, "tokens per forward"),
        [
            (
                str(row["task"]),
                _decoding(row.get("settings") or {}),
                str(row["n"]),
                _number(row["accuracy"], ".4f"),
                _number(row["stderr"], ".4f"),
                _number(row["tokens_per_denoising_step"], ".2f"),
                _number(row["tokens_per_forward"], ".2f"),
            )
            for row in ordered
        ],
    )


def _decoding(settings: Mapping[str, Any]) -> str:
    if settings.get("mode") == "ar":
        return "autoregressive"
    parts = [str(settings[key]) for key in ("remasking",) if key in settings]
    if settings.get("remasking") == "low_confidence_dynamic" and "threshold" in settings:
        parts.append(f"threshold {settings['threshold']}")
    if "denoising_steps" in settings and "block_size" in settings:
        parts.append(f"{settings['denoising_steps']} steps a block of {settings['block_size']}")
    return ", ".join(parts) or "-"


def _usage(settings: EngineSettings, layout: HFLayout, *, rounded: bool) -> str:
    if not layout.has_code:
        return (
            "Plain layout: transformers and serving engines load it as an autoregressive "
            "model, which a block-diffusion model is not. Decode it with Megatron-OPDLM:\n\n"
            + _own_command(settings)
        )
    transformers = (
        "With transformers (>= 4.57) alone; the code beside the weights needs nothing else:\n\n"
        + "    import torch\n" * rounded
        + "    from transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        '    tokenizer = AutoTokenizer.from_pretrained("DIR", trust_remote_code=True)\n'
        '    model = AutoModelForCausalLM.from_pretrained("DIR", trust_remote_code=True'
        + ", dtype=torch.float32"
        * rounded
        + ")\n"
        '    ids = tokenizer(prompt, return_tensors="pt").input_ids\n'
        f"    model.generate(ids, max_new_tokens=256, denoising_steps={settings.denoising_steps}, "
        f"threshold={settings.threshold:g})" + f"\n\n{_ROUNDED}" * rounded
    )
    own = "With Megatron-OPDLM's engine:\n\n" + _own_command(settings)
    if not layout.served:
        return f"{transformers}\n\n{own}"
    sglang = (
        f"With SGLang (block size and threshold are in `{SGLANG}`, since it reads neither from "
        "config.json):\n\n"
        "    python -m sglang.launch_server --model-path DIR --trust-remote-code \\\n"
        "        --dllm-algorithm LowConfidence --dllm-algorithm-config DIR/"
        f"{SGLANG} --max-running-requests 64"
    )
    lmdeploy = f"With LMDeploy:\n\n    lmdeploy serve api_server DIR $(cat DIR/{LMDEPLOY})"
    return "\n\n".join((transformers, sglang, lmdeploy, own))


def _own_command(settings: EngineSettings) -> str:
    return (
        "    python -m evaluation.sample --model DIR --prompts prompts.jsonl --out out.jsonl \\\n"
        f"        --block-size {settings.block_size} --denoising-steps {settings.denoising_steps} "
        f"--remasking low_confidence_dynamic --threshold {settings.threshold:g}"
    )


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _value(value: Any) -> str:
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)
