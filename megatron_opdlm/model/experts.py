"""The mixture of experts of a layer (Qwen3-MoE): Megatron's, with the router of the published
models.

Every token goes to its ``per_token`` likeliest experts, none is dropped, and there is no loss that
balances their load: the teacher's distribution is all that the student learns from. With expert
parallelism the ranks of a group hold some experts each and trade tokens by an all-to-all.
T tokens of this rank, E experts, H hidden size.
"""

import copy
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.models.backends import LocalSpecProvider
from megatron.core.transformer.moe import moe_utils
from megatron.core.transformer.moe.moe_layer import MoELayer, MoESubmodules
from megatron.core.transformer.moe.router import TopKRouter
from megatron.core.transformer.moe.token_dispatcher import MoEAlltoAllTokenDispatcher
from megatron.core.transformer.spec_utils import ModuleSpec
from torch import Tensor

from megatron_opdlm.model_files.shape import Experts

# Megatron 0.16 asks whether it is None, but without Transformer Engine never defines it.
_utils: Any = moe_utils
if not hasattr(_utils, "te_general_gemm"):
    _utils.te_general_gemm = None


def expert_options(experts: Experts | None) -> dict[str, Any]:
    """What Megatron's configuration says of the experts; nothing for a dense model."""
    if experts is None:
        return {}
    return {
        "num_moe_experts": experts.count,
        "moe_ffn_hidden_size": experts.ffn,
        "moe_router_topk": experts.per_token,
        "moe_router_pre_softmax": True,
        "moe_router_dtype": "fp32",  # in 16 bits many experts would tie
        "moe_router_load_balancing_type": "none",
        "moe_aux_loss_coeff": 0.0,
    }


class Router(TopKRouter):
    """Softmax over all experts in float32, the largest of them, scaled to sum 1 where the model
    says so: as transformers' Qwen3-MoE.
    """

    def __init__(self, *args: Any, renormalize: bool, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.renormalize = renormalize

    def routing(self, logits: Tensor, padding_mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """logits [T, 1, E] -> weight of each expert's output [T, E], zero for those that are not
        chosen; which are chosen, bool [T, E].
        """
        probability = logits.flatten(0, -2).softmax(-1, dtype=torch.float32)
        weight, chosen = probability.topk(self.topk, dim=-1)
        if self.renormalize:
            weight = weight / weight.sum(-1, keepdim=True)
        weights = torch.zeros_like(probability).scatter(1, chosen, weight)
        mask = torch.zeros_like(probability, dtype=torch.bool).scatter(1, chosen, True)
        return weights, mask


class MixtureOfExperts(MoELayer):
    """Megatron's layer, which also decodes under tensor parallelism.

    In training the tensor ranks hold different tokens (sequence parallelism) and Megatron gathers
    them for the experts' shards. While decoding all of them hold the same tokens: each sends them
    once through its own shards, and the sums are reduced.
    """

    def __init__(self, config: Any, submodules: MoESubmodules, **kwargs: Any) -> None:
        groups = moe_utils.get_default_pg_collection()
        super().__init__(config, submodules, pg_collection=groups, **kwargs)
        alone: Any = copy.copy(groups)
        alone.expt_tp, alone.tp_ep = None, groups.ep
        self.tensor_group = groups.expt_tp
        self.of_own_tokens = self.token_dispatcher
        self.of_same_tokens = MoEAlltoAllTokenDispatcher(
            self.num_local_experts, self.local_expert_indices, config, pg_collection=alone
        )

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        """[T, 1, H] -> ([T, 1, H], no bias)."""
        shared = dist.get_world_size(self.tensor_group) > 1 and not self.config.sequence_parallel
        self.token_dispatcher = self.of_same_tokens if shared else self.of_own_tokens
        made: Any = super().forward(hidden_states, *args, **kwargs)
        output, bias = made
        if shared:  # not differentiated: training has sequence parallelism
            assert not torch.is_grad_enabled()
            dist.all_reduce(output, group=self.tensor_group)
        return output, bias


@dataclass
class _Spec:
    """A ``ModuleSpec`` in all but its type: of those, Megatron's layer warns for every class of an
    MLP that is not its own.
    """

    module: type
    submodules: MoESubmodules
    params: dict[str, Any] = field(default_factory=dict)


def experts_spec(experts: Experts, *, grouped: bool) -> _Spec:
    """The mixture that stands in a layer's MLP slot. ``grouped``: Transformer Engine multiplies all
    experts of a rank at once (not run on a GPU yet), else they work one after the other.
    """
    if grouped:
        from megatron.core.extensions.transformer_engine_spec_provider import TESpecProvider

        module, submodules = TESpecProvider().grouped_mlp_modules(True, False)
    else:
        module, submodules = LocalSpecProvider().grouped_mlp_modules(False, False)
    return _Spec(
        module=MixtureOfExperts,
        submodules=MoESubmodules(
            experts=ModuleSpec(module=module, submodules=submodules),
            router=partial(Router, renormalize=experts.renormalize),
        ),
    )
