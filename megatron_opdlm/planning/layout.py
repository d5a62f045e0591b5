"""The parallel layout of a model."""

from dataclasses import dataclass

from megatron_opdlm.config import Config
from megatron_opdlm.errors import InputError


@dataclass(frozen=True, kw_only=True)
class Layout:
    """How a model is split: data parallel size is what the world size leaves over."""

    tensor: int = 1
    pipeline: int = 1
    context: int = 1
    expert: int = 1  # ranks that share out the experts, among the replicas and their context ranks
    sequence_parallel: bool = False

    def data_parallel(self, world_size: int) -> int:
        """Data parallel size; InputError where the layout does not divide the number of ranks."""
        model_ranks = self.tensor * self.pipeline * self.context
        if world_size % model_ranks:
            raise InputError(
                f"{world_size} ranks cannot be split into tensor_parallel={self.tensor} x "
                f"pipeline_parallel={self.pipeline} x context_parallel={self.context} = "
                f"{model_ranks}; start a multiple of {model_ranks} ranks"
            )
        copies = world_size // (self.tensor * self.pipeline)
        if copies % self.expert:
            raise InputError(
                f"expert_parallel={self.expert} does not divide the {copies} ranks that have the "
                f"same tensor and pipeline rank ({world_size} ranks); start more ranks, or use a "
                "smaller expert_parallel"
            )
        return world_size // model_ranks


def model_layout(config: Config) -> Layout:
    """The layout of student and teacher."""
    m = config.model
    return Layout(
        tensor=m.tensor_parallel,
        pipeline=m.pipeline_parallel,
        context=m.context_parallel,
        expert=m.expert_parallel,
        sequence_parallel=m.sequence_parallel,
    )
