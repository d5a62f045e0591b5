"""The parallel layouts that the laws are tested on, with the ranks that they need."""

from megatron_opdlm.parallel import Layout

TP2 = Layout(tensor=2)
PP2 = Layout(pipeline=2)
DP2 = Layout()
TP2_SP = Layout(tensor=2, sequence_parallel=True)
TP2_PP2 = Layout(tensor=2, pipeline=2)
TP2_PP2_SP = Layout(tensor=2, pipeline=2, sequence_parallel=True)
CP2 = Layout(context=2)
CP4 = Layout(context=4)  # more ranks than groups of heads
TP2_CP2 = Layout(tensor=2, context=2)
PP2_CP2 = Layout(pipeline=2, context=2)
TP2_CP2_SP = Layout(tensor=2, context=2, sequence_parallel=True)

EP2 = Layout(expert=2)
TP2_EP2_SP = Layout(tensor=2, expert=2, sequence_parallel=True)
PP2_EP2 = Layout(pipeline=2, expert=2)

# name -> (ranks, layout); data parallelism takes the ranks that the layout leaves over
LAYOUTS = {
    "tp2": (2, TP2),
    "pp2": (2, PP2),
    "dp2": (2, DP2),
    "tp2-sp": (2, TP2_SP),
    "tp2-pp2": (4, TP2_PP2),
    "tp2-pp2-sp": (4, TP2_PP2_SP),
    "tp2-dp2-sp": (4, TP2_SP),
    "pp2-dp2": (4, PP2),
    "cp2": (2, CP2),
    "cp4": (4, CP4),
    "cp2-dp2": (4, CP2),
    "tp2-cp2": (4, TP2_CP2),
    "pp2-cp2": (4, PP2_CP2),
    "tp2-cp2-sp": (4, TP2_CP2_SP),
}


# The same of models with experts, which with tensor parallelism need sequence parallelism.
EXPERT_LAYOUTS = {
    "ep2": (2, EP2),
    "dp2": (2, DP2),
    "pp2": (2, PP2),
    "tp2-sp": (2, TP2_SP),
    "tp2-ep2-sp": (4, TP2_EP2_SP),
    "pp2-ep2": (4, PP2_EP2),
    "cp2-ep2": (2, Layout(context=2, expert=2)),
    "ep2-dp2": (4, EP2),
}


def overrides(layout: Layout) -> list[str]:
    """The configuration keys of a layout."""
    return [
        f"model.tensor_parallel={layout.tensor}",
        f"model.pipeline_parallel={layout.pipeline}",
        f"model.context_parallel={layout.context}",
        f"model.expert_parallel={layout.expert}",
        f"model.sequence_parallel={str(layout.sequence_parallel).lower()}",
    ]
