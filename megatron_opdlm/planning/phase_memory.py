"""Memory of a rank by part and by phase: what it holds, and what comes on top at the peak."""

from collections.abc import Mapping
from dataclasses import dataclass

from megatron_opdlm.planning import activation_memory as activations
from megatron_opdlm.planning.activation_memory import DRAW_BYTES, LayerMemory, Row

PHASES = ("rollout", "teacher", "update")
CACHE = "KV cache"


@dataclass(frozen=True, kw_only=True)
class Work:
    """What a rank works on at a time."""

    student: Row  # an update's longest row
    teacher: Row  # the longest row of finished sequences
    rows_in_flight: int = 1  # whose activations the first pipeline stage keeps at once
    window_tokens: float = 0.0  # of the largest forward of the rollout
    drawn: float = 0.0  # tokens that a pass of the rollout draws at the most
    chunk_rows: int  # positions projected to the vocabulary at once


@dataclass(frozen=True, kw_only=True)
class RankMemory:
    """Bytes of the fullest rank."""

    parts: Mapping[str, float]  # what is held from one step to the next
    away: Mapping[str, frozenset[str]]  # phase -> parts that are not on the device in it
    work: Mapping[str, Mapping[str, float]]  # phase -> what comes on top at its peak

    def held(self, phase: str) -> float:
        return sum(size for name, size in self.parts.items() if name not in self.away[phase])

    def peak(self, phase: str, margin: float = 1.0) -> float:
        """``margin``: what comes on top is taken that many times."""
        return self.held(phase) + margin * sum(self.work[phase].values())

    def sizes(self, phase: str) -> dict[str, float]:
        """Bytes of each part that is there at the peak of a phase."""
        held = {part: size for part, size in self.parts.items() if part not in self.away[phase]}
        for part, size in self.work[phase].items():
            held[part] = held.get(part, 0.0) + size
        return {part: size for part, size in held.items() if size}

    @property
    def fullest(self) -> str:
        """The phase with the highest peak."""
        return max(PHASES, key=self.peak)


def update_work(layer: LayerMemory, work: Work, *, gradients_copied: float) -> dict[str, float]:
    """What comes on top at the peak of an update, whichever of its moments that is.

    ``gradients_copied``: bytes that the reduction of gradients copies.
    """
    # On a CPU the embedding's gradient is that of the row's tokens alone.
    whole = (not layer.build.on_host) + (not layer.build.sums_head)
    ends = whole * activations.embedding_gradient(layer)
    moments = [
        {"a copy of the gradients": gradients_copied},
        {"gradients of embedding and output": ends},
        _last_stage(layer, work),
    ]
    if layer.split.pipeline > 1:
        saved = activations.saved_activations(layer, work.student, is_last_stage=False)
        moments.append(
            {
                "saved activations": work.rows_in_flight * saved,
                "a layer at work": _backward(layer, work.student),
            }
        )
    else:
        moments.append(_first_full_layer(layer, work))
    return max(moments, key=lambda parts: sum(parts.values()))


def _last_stage(layer: LayerMemory, work: Work) -> dict[str, float]:
    """All is kept, and the divergence works."""
    return {
        "saved activations": activations.saved_activations(layer, work.student, is_last_stage=True),
        "divergence": activations.divergence_work(layer, work.student, work.chunk_rows),
    }


def _first_full_layer(layer: LayerMemory, work: Work) -> dict[str, float]:
    """The backward pass of the last layer that carries all tokens on; a tied output layer's
    gradient waits for the embedding's.
    """
    row = work.student
    saved = activations.saved_activations(layer, row, is_last_stage=True)
    if layer.build.recompute != "true":
        saved -= layer.saved_last(row)
    waits = layer.shape.tied and not layer.build.sums_head
    head = activations.embedding_gradient(layer) if waits else 0.0
    return {
        "saved activations": saved,
        "a layer at work": _backward(layer, row),
        "gradients of embedding and output": head,
    }


def _backward(layer: LayerMemory, row: Row) -> float:
    return layer.again(row) + layer.backward_work(row)


def teacher_work(layer: LayerMemory, work: Work) -> dict[str, float]:
    """A forward of the teacher over its longest row."""
    return {"a layer at work": layer.forward_work(work.teacher)}


def rollout_work(layer: LayerMemory, work: Work, cache: float) -> dict[str, float]:
    """The cache, where it is not kept, and a forward or the draws after it."""
    window = layer.forward_work(Row(tokens=work.window_tokens, positions=0))
    columns = activations.vocabulary_columns(layer.shape, layer.split)
    draws = work.drawn * columns * DRAW_BYTES
    largest = ("draws", draws) if draws > window else ("a layer at work", window)
    return {CACHE: cache, largest[0]: largest[1]}
