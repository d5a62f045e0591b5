"""What a training command would do, without doing it: layout, shapes and memory of each rank."""

from megatron_opdlm.config import Config


def describe(config: Config, world_size: int) -> str:
    """Check models, layout and prompts as training would, and say what each rank would hold.

    Raises InputError exactly where training would before it builds anything.
    """
    from checkpoint_tools.qwen3_shape import padded_vocab
    from megatron_opdlm import build
    from megatron_opdlm.hardware import select_hardware
    from megatron_opdlm.model.flops import low_rank_parameters
    from megatron_opdlm.run_directory import check_run_directory

    check_run_directory(config)
    source, teacher = build.open_pair(config, world_size)
    plan = build.build_plan(config, source)
    layout = build.model_layout(config)
    replicas = layout.data_parallel(world_size)
    hardware = select_hardware()
    student_bytes = build.resolve_dtype(config.model.dtype, hardware).itemsize
    shape = source.shape
    share = layout.tensor * layout.pipeline
    # Main parameters and two Adam moments in float32, split over the replicas and their context
    # ranks; gradients in float32.
    optimizer_bytes = (12 if student_bytes == 2 else 8) / (replicas * layout.context)
    gib = 1 / share / 2**30
    low_rank = build.low_rank_of(config)
    trained = low_rank_parameters(shape, low_rank) if low_rank else shape.parameters
    student = shape.parameters + (trained if low_rank else 0)
    teacher_bytes = build.teacher_bytes(config, teacher, hardware)
    if build.shares_base(config, source, hardware):
        teacher_bytes = 0
    lines = [
        f"hardware     {hardware.reason}",
        build.describe_kernels(config, hardware).replace("kernels: ", "kernels      "),
        f"ranks        {world_size} = tensor {layout.tensor} x pipeline {layout.pipeline} x "
        f"context {layout.context} x data {replicas}"
        + (", sequence parallel" if layout.sequence_parallel else ""),
        f"student      {shape.parameters:,} parameters: {shape.layers} layers, "
        f"hidden {shape.hidden}, {shape.heads}/{shape.groups} heads x {shape.head_dim}, "
        f"ffn {shape.ffn}",
        f"vocabulary   {shape.vocab_size} ids in "
        f"{padded_vocab(shape.vocab_size, layout.tensor)} rows, "
        f"mask token {source.vocabulary.mask_id}, end tokens {list(source.vocabulary.end_ids)}",
        f"prompts      {plan.prompts.summary}",
        f"steps        {plan.total_steps} of {config.rollout.prompts_per_step} prompts x "
        f"{config.rollout.responses_per_prompt} responses",
        "memory of a rank, GiB (weights split evenly over tensor and pipeline ranks; "
        "activations and KV cache not counted):",
        f"  student weights    {student * student_bytes * gib:.3f}",
        f"  gradients          {trained * 4 * gib:.3f}",
        f"  optimizer          {trained * optimizer_bytes * gib:.3f}",
        f"  teacher weights    {teacher_bytes * gib:.3f}",
    ]
    return "\n".join(lines)
