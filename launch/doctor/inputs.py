"""What a configuration names: models, mask token, layout, data, benchmarks and their sandbox."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from launch.doctor.finding import Finding
from megatron_opdlm.config import Config

if TYPE_CHECKING:
    from megatron_opdlm.storage.model_source import ModelSource

UNSET = "give it to have it examined"
_STATE_BYTES = 12  # of a parameter's float32 weights and Adam's two moments


@dataclass(kw_only=True)
class Models:
    """The models of a configuration, as far as they could be opened."""

    student: "ModelSource | None" = None
    checkpoint_bytes: int = 0  # of the student and its optimizer; 0: not known


def models(config: Config, world: int, found: Models) -> Iterator[Finding]:
    """Both directories, their mask token and whether ``world`` ranks can hold them. Fills
    ``found``. InputError as training raises it.
    """
    from megatron_opdlm.run.build import require_layout
    from megatron_opdlm.storage.model_source import open_model, require_same_tokens

    if not config.model.path:
        yield Finding(name="model.path", text="not set", remedy=UNSET)
        return
    student = open_model(config.model.path, "model.path", config.model.mask_token_id)
    found.student = student
    found.checkpoint_bytes = student.shape.parameters * (2 + _STATE_BYTES)
    yield Finding(name="model.path", text=_described(student))
    vocabulary = student.vocabulary
    text = f"id {vocabulary.mask_id} of {vocabulary.size}; end tokens {list(vocabulary.end_ids)}"
    yield Finding(name="mask token", text=text)
    if config.teacher.path:
        teacher = open_model(config.teacher.path, "teacher.path", need_mask=False)
        require_same_tokens(student, teacher)
        require_layout(config, teacher, "teacher.path", world)
        yield Finding(name="teacher.path", text=_described(teacher))
    require_layout(config, student, "model.path", world)
    m = config.model
    text = (
        f"{world} ranks = tensor {m.tensor_parallel} x pipeline {m.pipeline_parallel} x context "
        f"{m.context_parallel} x data "
        f"{world // (m.tensor_parallel * m.pipeline_parallel * m.context_parallel)}"
    )
    yield Finding(name="layout", text=text)


def _described(source: "ModelSource") -> str:
    shape = source.shape
    kind = "Hugging Face" if source.contract is None else "Megatron checkpoint"
    return f"{source.directory}: {kind}, {shape.parameters:,} parameters, {shape.layers} layers"


def data(config: Config, found: Models) -> Iterator[Finding]:
    """The prompts, with the model's own tokenizer, and how many steps they make."""
    from megatron_opdlm.run.build import build_plan

    if not config.data.path or found.student is None:
        text = "not set" if not config.data.path else "not read: the model's tokenizer is needed"
        yield Finding(name="data.path", text=text, remedy=UNSET)
        return
    plan = build_plan(config, found.student)
    text = f"{config.data.path}: {plan.prompts.summary}; {plan.total_steps} steps"
    yield Finding(name="data.path", text=text)


def benchmarks(config: Config) -> Iterator[Finding]:
    """Tasks that are asked while training, with what grades them."""
    from evaluation.run import load_training_tasks

    if not config.evaluation.every:
        return
    tasks = load_training_tasks(config.evaluation)
    text = ", ".join(f"{task.name} ({len(rows)} rows)" for task, rows in tasks)
    yield Finding(name="evaluation", text=text)


def sandbox() -> Iterator[Finding]:
    """Whether generated programs can be run, and what holds them."""
    from evaluation.jail.sandbox import default_sandbox, sandbox_problem

    remedy = "see docs/sandbox.md"
    if problem := sandbox_problem():
        yield Finding(name="sandbox", text=problem, remedy="code benchmarks are left out")
        return
    described = default_sandbox().describe()
    layers = f"{len(described['layers'])} layers in force"
    missing = ", ".join(described["missing"])
    text = f"{layers}, without {missing}" if missing else layers
    yield Finding(name="sandbox", text=text, remedy=remedy if missing else "")
