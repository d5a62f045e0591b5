"""The same claims on a CUDA device. Not run on a GPU yet."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_opdlm.config import load_config
from megatron_opdlm.diffusion.decoding import Decoding
from megatron_opdlm.diffusion.wide_product import wide_product
from megatron_opdlm.errors import InputError
from megatron_opdlm.hardware import select_hardware
from megatron_opdlm.model import decode_attention
from megatron_opdlm.model.decode_choice import choose_decode_attention
from megatron_opdlm.offload import HOST, move_layers
from megatron_opdlm.parallel import Layout
from megatron_opdlm.records import Trajectory
from megatron_opdlm.replay import replay
from tests import oracle, training_run
from tests.conftest import END_IDS, MASK, TinyModels
from tests.distributed import jobs
from tests.tiny_requests import IDS, request

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def test_hardware_is_the_gpu():
    """Claim: where CUDA is available it is chosen, with NCCL and bfloat16, and no CPU shim."""
    hardware = select_hardware()
    assert hardware.device.type == "cuda"
    assert hardware.process_group_backend == "nccl"
    assert hardware.dtype is torch.bfloat16
    assert hardware.free_memory_bytes() > 0


def test_logits_are_not_rounded():
    """Claim: products of bfloat16 matrices come out as their float32 sums: a thousand times nearer
    to the exact ones than bfloat16 could be."""
    generator = torch.Generator("cuda").manual_seed(3)
    a, b = (torch.randn(s, generator=generator, device="cuda") for s in ((64, 512), (300, 512)))
    a, b = a.bfloat16(), b.bfloat16().t()
    exact = a.double() @ b.double()
    error = (wide_product(a, b).double() - exact).norm() / exact.norm()
    assert float(error) < 1e-5


@pytest.mark.parametrize("remasking", ["low_confidence_static", "low_confidence_dynamic"])
def test_engine_on_the_gpu_is_the_decoder_on_the_cpu(models: TinyModels, remasking: str):
    """Claim: greedy tokens in float32 equal recomputing everything with transformers on the CPU,
    at every prompt length modulo B."""
    decoding = Decoding(block_size=4, denoising_steps=2, remasking=remasking, threshold=0.3)
    hf_dir = models.hf("student", tied=False, layers=2)
    asked = [request(i, 1 + i, limit=9) for i in range(8)]
    reference = oracle.load(hf_dir)
    rules = oracle.Rules(
        block_size=decoding.block_size,
        steps=decoding.denoising_steps,
        remasking=decoding.remasking,
        mask_id=IDS.mask_id,
        end_ids=IDS.end_ids,
        forbidden=IDS.forbidden_ids,
        threshold=decoding.threshold,
    )
    found = jobs.roll_out(Layout(), hf_dir, asked, decoding, IDS, slots=3)
    for trajectory, one in zip(found, asked, strict=True):
        expected = oracle.decode(reference, one.prompt.ids, one.max_new_tokens, rules)
        assert trajectory.response_ids == expected.response_ids


@pytest.mark.parametrize("logit_shift", [False, True], ids=["", "shift"])
def test_captured_forwards_make_the_same_tokens(models: TinyModels, logit_shift: bool):
    """Claim: passes replayed from CUDA graphs, passes kernel by kernel and buckets give the same
    trajectories in float32, with slots that empty and fill; also in a second call, whose graphs
    have a memory pool of their own: one pool for both would have outlived its first graphs."""
    decoding = Decoding(block_size=4, denoising_steps=3, temperature=1.0, logit_shift=logit_shift)
    hf_dir = models.hf("student", tied=True, layers=2)
    asked = [request(i, 1 + i, limit=3 + (5 * i) % 11) for i in range(13)]

    def found(**options: Any) -> list[Trajectory]:
        return jobs.roll_out(Layout(), hf_dir, asked, decoding, IDS, slots=5, **options)

    expected = found(attention="buckets")
    for attention in ("rows", "triton"):
        assert found(attention=attention, graphs=False) == expected
        assert found(attention=attention, graphs=True) == expected


@pytest.mark.parametrize("name", ["triton", "flash"])
@pytest.mark.parametrize(("heads", "groups", "width"), [(16, 8, 128), (4, 2, 64)])
def test_decoding_kernels_are_sdpa(name: str, heads: int, groups: int, width: int):
    """Claim: our kernel (in bfloat16 and float32) and, where it is installed, FlashAttention's give
    SDPA's sums: rows of one slot more than once, in any order, over shuffled pages, from one block
    to the whole slot."""
    generator = torch.Generator("cuda").manual_seed(5)
    for dtype, tolerance in ((torch.bfloat16, 2e-2), (torch.float32, 1e-5)):
        try:
            way = choose_decode_attention(name, dtype, width, select_hardware())
        except InputError as error:
            if name == "flash":
                pytest.skip(str(error))
            raise
        keys, values, query = (
            torch.randn(size, generator=generator, device="cuda", dtype=dtype)
            for size in ((18, 256, groups, width), (18, 256, groups, width), (20, heads, width))
        )
        assert way.kernel is not None
        rows = decode_attention.BlockRows(
            slot=torch.tensor([3, 0, 3, 5, 2], dtype=torch.int32, device="cuda"),
            visible=torch.tensor([4, 768, 8, 280, 516], dtype=torch.int32, device="cuda"),
            table=torch.randperm(18, generator=generator, device="cuda").view(6, 3).int(),
            block_size=4,
            kernel=way.kernel,
        )
        found = decode_attention.attend_rows(query, keys, values, rows, width**-0.5)
        exact = decode_attention.attend_rows(
            query.float(),
            keys.float(),
            values.float(),
            replace(rows, kernel=decode_attention.gathered),
            width**-0.5,
        )
        assert float((found.float() - exact).abs().max()) < tolerance * float(exact.abs().max())


@pytest.mark.parametrize("tied", [True, False])
def test_loss_and_gradient_norm(models: TinyModels, tmp_path: Path, tied: bool):
    """Claim: replay on the GPU in float32 equals plain PyTorch on the CPU."""
    generator = torch.Generator().manual_seed(3)
    rows = [
        {
            "prompt_ids": torch.randint(46, (1 + i,), generator=generator).tolist(),
            "response_ids": torch.randint(46, (3 + 2 * i,), generator=generator).tolist(),
            "masked": torch.randint(2, (3 + 2 * i,), generator=generator).tolist(),
        }
        for i in range(6)
    ]
    path = tmp_path / "states.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    student, teacher = (models.hf(role, tied=tied) for role in ("student", "teacher"))
    options = ["model.dtype=fp32", "teacher.dtype=fp32", f"model.mask_token_id={MASK}"]
    paths = [f"model.path={student}", f"teacher.path={teacher}"]
    found = replay(load_config(None, [*options, *paths]), path)
    reference = oracle.load(student)
    losses = oracle.loss(
        reference, oracle.load(teacher), rows, block_size=4, mask_id=MASK, end_ids=END_IDS
    )
    expected = torch.stack(losses).mean()
    expected.backward()
    assert found["loss"] == pytest.approx(expected.item(), rel=1e-4)
    assert found["grad_norm"] == pytest.approx(oracle.gradient_norm(reference), rel=1e-3)


def test_what_waits_in_host_memory_changes_nothing(models: TinyModels, tmp_path: Path):
    """Claim: with optimizer and teacher in host memory between the phases a run reports the same
    losses, and its weights end up the same bit for bit."""
    keys = ["train.steps=3", "checkpoint.every=3", "model.dtype=bf16", "teacher.dtype=bf16"]
    keys += [f"teacher.path={models.hf('teacher', tied=False, layers=2)}"]
    prompts = training_run.write_prompts(tmp_path / "prompts.jsonl")
    found = []
    for name, offload in (("plain", "false"), ("offload", "true")):
        out = tmp_path / name
        options = [f"optimizer.cpu_offload={offload}", f"teacher.offload_weights={offload}"]
        student = models.hf("student", tied=True, layers=2)
        jobs.train_run(training_run.overrides(student, prompts, out, *keys, *options))
        rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
        found.append([(row["loss"], row["grad_norm"]) for row in rows])
    assert found[0] == found[1]


def test_layers_leave_the_gpu(models: TinyModels):
    """Claim: of a teacher that waits, only the layers are in host memory."""
    model = jobs.load(Layout(), models.hf("teacher", tied=False, layers=2))
    move_layers(model, HOST)
    where = {name: p.device.type for name, p in model.named_parameters()}
    assert {kind for name, kind in where.items() if "layers." in name} == {"cpu"}
    assert {kind for name, kind in where.items() if "layers." not in name} == {"cuda"}
